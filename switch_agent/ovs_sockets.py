# SPDX-License-Identifier: Apache-2.0
"""Receive buffers of the packet sockets that a running Open vSwitch has open.

A socket takes net.core.rmem_default when it is opened, and nothing in Open vSwitch changes it later. Raising that is for the
whole machine and helps only ports that are opened afterwards; opening them anew interrupts traffic. So we borrow the daemon's
sockets (pidfd_getfd(2)) and raise the limit of each: traffic goes on, and nobody else's sockets change.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

PIDFD_GETFD = 438  # the same number on every architecture
SO_RCVBUFFORCE = 33  # asm-generic/socket.h: beyond net.core.rmem_max, as root

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def server_pid(control: Path) -> int:
    """Who listens at this unix socket. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(control))
        credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    if not pid:
        raise ProcessLookupError(0, "its daemon is not seen from here, as in another container")
    return pid


def enlarge(pid: int, size: int, enough: int) -> list[int]:
    """Packet sockets of ``pid`` with fewer bytes than ``enough`` get ``size``; what they had. Raises OSError."""
    changed = []
    for one in _packet_sockets(pid):
        with one:
            before = one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            if before < enough:
                one.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size // 2)  # the kernel doubles it
                changed.append(before)
    return changed


def _packet_sockets(pid: int) -> Iterator[socket.socket]:
    """Our own descriptors of them; the caller closes each."""
    table = Path(f"/proc/{pid}/net/packet").read_text().splitlines()
    rows = [line.split() for line in table[1:]]
    names = {f"socket:[{row[8]}]" for row in rows if row[3] != "0000"}  # that of no protocol only sends
    process = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{name}") not in names:
                    continue
            except FileNotFoundError:
                continue  # closed meanwhile
            ours = _syscall(PIDFD_GETFD, process, int(name), 0)
            if ours < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            yield socket.socket(fileno=ours)
    finally:
        os.close(process)
