# SPDX-License-Identifier: Apache-2.0
"""An XDP program that passes every packet, by one system call and one netlink message: no library is worth its weight here.

While a veth has a program, the kernel takes GSO from the other end's features: large segments are split before they come.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct

SYS_BPF = {"x86_64": 321, "aarch64": 280}
BPF_PROG_LOAD, BPF_PROG_TYPE_XDP, BPF_F_XDP_HAS_FRAGS = 5, 6, 1 << 5
PASS = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)  # r0 = XDP_PASS; exit
RTM_SETLINK, NLMSG_ERROR, NLM_F_REQUEST_ACK = 19, 2, 0b101
IFLA_XDP, NLA_F_NESTED, IFLA_XDP_FD, IFLA_XDP_FLAGS = 43, 1 << 15, 1, 3
XDP_FLAGS_UPDATE_IF_NOEXIST, XDP_FLAGS_DRV_MODE = 1, 1 << 2


def attach_pass_program(ifindex: int) -> None:
    """Attaches it to an interface that has none; ``ip link set dev NAME xdp off`` takes it away. Raises OSError.

    It outlives its process on purpose. A program that went with the process would be taken off by the kernel just when
    somebody else has to take over, with the lock held that a software switch on this machine asks for its interfaces with:
    20 ms without a packet.
    """
    program = _load()
    try:
        _set_link(ifindex, program)
    finally:
        os.close(program)


def _load() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    number = SYS_BPF.get(os.uname().machine)
    if number is None:
        raise OSError(38, f"the bpf system call is not known for {os.uname().machine}")
    code, licence = ctypes.create_string_buffer(PASS), ctypes.create_string_buffer(b"Apache-2.0")
    load = struct.pack(
        "=IIQQIIQII",
        BPF_PROG_TYPE_XDP,
        len(PASS) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        0,  # log level, size and buffer
        0,
        0,
        0,  # kernel version
        BPF_F_XDP_HAS_FRAGS,
    )
    program = libc.syscall(number, BPF_PROG_LOAD, ctypes.create_string_buffer(load, 128), 128)
    if program < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(program)


def _set_link(ifindex: int, program: int) -> None:
    flags = XDP_FLAGS_DRV_MODE | XDP_FLAGS_UPDATE_IF_NOEXIST
    xdp = struct.pack("=HHiHHI", 8, IFLA_XDP_FD, program, 8, IFLA_XDP_FLAGS, flags)
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, ifindex, 0, 0)
    body += struct.pack("=HH", 4 + len(xdp), IFLA_XDP | NLA_F_NESTED) + xdp
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(struct.pack("=IHHII", 16 + len(body), RTM_SETLINK, NLM_F_REQUEST_ACK, 1, 0) + body)
        answer = netlink.recv(4096)
    kind, error = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
    if kind != NLMSG_ERROR or error:
        raise OSError(-error, os.strerror(-error))
