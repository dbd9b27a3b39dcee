# SPDX-License-Identifier: Apache-2.0
"""Devices on rings of this process, whose other end the test holds: wire.c."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nat_fastpath.dpdk._dpdk import ffi

from nat_fastpath.dpdk import Mempool, Port
from tests.packets import OUR_MAC, mac_bytes, retagged

HERE = Path(__file__).parent
ETHERTYPE_ARP = b"\x08\x06"


def build(folder: Path) -> str:
    """The path of the library that it makes there."""
    flags = subprocess.run(["pkg-config", "--cflags", "libdpdk"], check=True, capture_output=True, text=True)
    core, library = HERE.parents[1] / "nat_fastpath" / "core", folder / "wire.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", f"-I{core}", *flags.stdout.split(), "-o", library]
    subprocess.run([*command, HERE / "wire.c"], check=True)
    return str(library)


def load(library: str) -> Any:
    """After EAL: its symbols are those that the process has already."""
    for name in ("eal", "ring", "mempool", "mbuf", "ethdev"):
        ctypes.CDLL(f"librte_{name}.so.23", ctypes.RTLD_GLOBAL)
    wire = ctypes.CDLL(library)
    wire.wire_ring.restype = ctypes.c_void_p
    return wire


class SpreadPort(Port):
    """Whose queues are filled as RSS would: by the wire."""

    def _set_up_for_rss(self, conf: Any, pool: Mempool) -> bool:
        self._set_up(conf, pool, self._workers)
        return True


class Wire:
    """A device ``net_ring_NAME0``, with as many queues in each direction; ``port`` is ours, this the other end."""

    def __init__(
        self, library: Any, pool: Mempool, name: str, queues: int, workers: int, side: str | None
    ) -> None:
        self.library, self.side = library, side
        self.pool = ctypes.c_void_p(int(ffi.cast("uintptr_t", pool._pool)))
        make = library.wire_ring
        self.to = (ctypes.c_void_p * queues)(*(make(f"{name}-to{i}".encode()) for i in range(queues)))
        self.fro = (ctypes.c_void_p * queues)(*(make(f"{name}-fro{i}".encode()) for i in range(queues)))
        net_ring = ctypes.CDLL("librte_net_ring.so.23")
        assert net_ring.rte_eth_from_rings(f"{name}0".encode(), self.to, queues, self.fro, queues, 0) >= 0
        kind = SpreadPort if queues > 1 else Port
        self.port = kind(f"net_ring_{name}0", pool, index=0, state_dir=Path(), queues=workers, side=side)
        self.sent, self.arp = 0, list[bytes]()

    def _frames(self) -> list[bytes]:
        return [frame for ring in self.fro for frame in self._of(ring)]

    def _of(self, ring: int) -> list[bytes]:
        frames, buffer = [], ctypes.create_string_buffer(2048)
        while n := self.library.wire_receive(ctypes.c_void_p(ring), buffer, len(buffer)):
            frames.append(buffer.raw[:n])
        return frames

    def drain(self) -> None:
        """Whatever is still in it, of both directions."""
        for ring in (*self.fro, *self.to):
            self._of(ring)

    def send(self, frames: list[bytes]) -> None:
        for frame in frames:
            external = self.side == "external"
            args = self.pool, self.to, len(self.to), external, frame, len(frame)
            assert self.library.wire_send(*args), "the wire is full"
            self.sent += 1

    def received(self, vlan: int = 0) -> list[bytes]:
        """What has come to this VLAN and without its tag, but for ARP, which is put aside."""
        frames = self._frames()
        tag = retagged(bytes(14), vlan)[12:-2]
        tagged = 4 if frames and frames[0][12:14] == b"\x81\x00" else 0
        self.arp += [one for one in frames if one[12 + tagged :][:2] == ETHERTYPE_ARP]
        frames = [one for one in frames if one[12 + tagged :][:2] != ETHERTYPE_ARP]
        assert all(one[12:].startswith(tag) for one in frames), f"not of VLAN {vlan}"
        return [one[:12] + one[12 + len(tag) :] for one in frames]

    def await_frames(self, n: int, vlan: int = 0) -> list[bytes]:
        """So many, and whatever else there is then."""
        frames: list[bytes] = []
        until(lambda: len(frames.__iadd__(self.received(vlan))) >= n)
        return frames


class Veth(Wire):
    """A kernel interface ``SIDE0`` of ours, and the far end of its cable, ``SIDE1``."""

    def __init__(self, pool: Mempool, workers: int, side: str, driver: str, state: Path) -> None:
        self.side, self.sent, self.arp = side, 0, []
        index = ("internal", "external").index(side)
        mac = mac_bytes(OUR_MAC[index])
        self.port = Port(
            f"{side}0",
            pool,
            index=index,
            mac=mac,
            state_dir=state,
            queues=workers,
            side=side,
            driver=driver,
        )
        self.far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self.far.bind((f"{side}1", 0))
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.far.setblocking(False)

    def _frames(self) -> list[bytes]:
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, address = self.far.recvfrom(2048)
                if address[2] != socket.PACKET_OUTGOING:
                    frames.append(frame)
        return frames

    def send(self, frames: list[bytes]) -> None:
        for frame in frames:
            self.far.send(frame)
            self.sent += 1

    def drain(self) -> None:
        self.port.close()
        self.far.close()


def until(what: Callable[[], object], seconds: float = 20) -> bool:
    """Whether it came true in that time."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
