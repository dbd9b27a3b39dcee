# SPDX-License-Identifier: Apache-2.0
"""Takes an AF_PACKET port's socket out of its fanout group, so that fragments come as they are on the wire.

DPDK's driver puts its socket into a group, even if it is the only one, with PACKET_FANOUT_FLAG_DEFRAG: the kernel
then reassembles fragments, and cuts the result at the size of a frame in the ring. A socket cannot leave its
group, and the driver has no option against it. But all that the driver knows of its socket is a file descriptor
and where its rings are mapped: so a new socket, like the old one but in no group, takes the place of both.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

# linux/if_packet.h
SOL_PACKET = 263
PACKET_RX_RING, PACKET_VERSION, PACKET_TX_RING, PACKET_LOSS, PACKET_QDISC_BYPASS = 5, 10, 13, 14, 20
ETH_P_ALL = 3
MAP_FIXED, MAP_LOCKED = 0x10, 0x2000


class Ring(NamedTuple):
    """What the driver was told: sizes in bytes; its rings are one for each direction."""

    block_size: int
    frame_size: int
    frames: int

    @property
    def blocks(self) -> int:
        return self.frames // (self.block_size // self.frame_size)

    @property
    def mapped(self) -> int:
        return 2 * self.block_size * self.blocks


def leave_fanout(descriptor: int, name: str, ring: Ring) -> None:
    """Replaces the socket ``descriptor``, bound to the interface ``name``. Only before the port is started.

    Raises OSError, and then the old socket is still in its place.
    """
    with (
        socket.socket(fileno=os.dup(descriptor)) as old,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as new,
    ):
        address = _mapping(os.fstat(descriptor).st_ino, ring.mapped)
        for option in (PACKET_VERSION, PACKET_LOSS, PACKET_QDISC_BYPASS):
            new.setsockopt(SOL_PACKET, option, old.getsockopt(SOL_PACKET, option))
        request = struct.pack("IIII", ring.block_size, ring.blocks, ring.frame_size, ring.frames)
        for option in (PACKET_RX_RING, PACKET_TX_RING):
            new.setsockopt(SOL_PACKET, option, request)
        _map_over(new.fileno(), address, ring.mapped)
        os.dup2(new.fileno(), descriptor, inheritable=False)
        new.bind((name, ETH_P_ALL))


def _mapping(inode: int, size: int) -> int:
    """Where the rings of this socket are mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        first, last = (int(end, 16) for end in fields[0].split("-"))
        if int(fields[4]) == inode and fields[-1] == f"socket:[{inode}]" and last - first == size:
            return first
    raise OSError(0, "the rings of the driver's socket are not where they should be")


def _map_over(descriptor: int, address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_SHARED | MAP_FIXED | MAP_LOCKED
    if libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
