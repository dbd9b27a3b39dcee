# SPDX-License-Identifier: Apache-2.0
"""The kernel's word on a link, where the switch's ports are devices of this host: sooner than the switch's.

A port is a device of ours if name and MAC are; others are left to PORT_STATUS, the word of any switch. Open vSwitch reads all
routes again before it says that a link is down, and forwards nothing meanwhile; the kernel tells both of us at once.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Callable, Iterable, Iterator

from switch_agent.codec import PortDescription

RTMGRP_LINK, RTM_NEWLINK, RTM_DELLINK = 1, 16, 17
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change
SIOCGIFHWADDR = 0x8927
IFF_UP, IFF_LOWER_UP = 1, 1 << 16
BUFFER = 1 << 16


class Devices:
    """``tell`` hears of each link of the ports of ``watch`` that goes down or comes up. Read when ``fileno`` is readable."""

    def __init__(self, tell: Callable[[PortDescription, bool], None]) -> None:
        self._tell = tell
        self._ports: dict[int, PortDescription] = {}
        self._up: dict[int, bool] = {}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self._socket.bind((0, RTMGRP_LINK))

    def watch(self, ports: Iterable[PortDescription]) -> None:
        """These, instead of those before, as the switch describes them."""
        self._ports = {index: port for port in ports if (index := _device(port))}
        self._up = {index: port.up for index, port in self._ports.items()}

    def of(self, numbers: Iterable[int]) -> list[int]:
        """The interface indexes of those of these ports of the switch that are devices of ours."""
        wanted = set(numbers)
        return [index for index, port in self._ports.items() if port.number in wanted]

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> None:
        """All that waits."""
        while True:
            try:
                data = self._socket.recv(BUFFER)
            except BlockingIOError:
                return
            except OSError:
                continue  # news were too many for the buffer; the switch tells what is missed
            for index, up in _links(data):
                if self._up.get(index, up) != up:
                    self._up[index] = up
                    self._tell(self._ports[index], up)

    def close(self) -> None:
        self._socket.close()


def _device(port: PortDescription) -> int:
    """Its index here; 0: none."""
    with socket.socket(type=socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFHWADDR, struct.pack("16s24x", port.name.encode()[:15]))
            return socket.if_nametoindex(port.name) if answer[18:24] == port.mac else 0
        except OSError:
            return 0


def _links(data: bytes) -> Iterator[tuple[int, bool]]:
    """Index, and whether there is a link, of each message."""
    at = 0
    while at + HEADER.size + LINK.size <= len(data):
        length, kind, *_ = HEADER.unpack_from(data, at)
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            _, _, index, flags, _ = LINK.unpack_from(data, at + HEADER.size)
            yield index, kind == RTM_NEWLINK and flags & IFF_UP != 0 and flags & IFF_LOWER_UP != 0
        at += max((length + 3) & ~3, HEADER.size)
