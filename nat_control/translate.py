# SPDX-License-Identifier: Apache-2.0
"""`tandem-nat translate`: a capture through the very core that carries live traffic.

Time is the capture's own. A packet comes from inside if its source address does (internal subnets and what
is behind the internal routes); frames of other protocols follow the MACs seen so far. Where the sides have
different VLANs, a frame's tag says its side. Nothing waits for ARP:
next hops that the configuration gives no MAC are made up, and every frame is taken as addressed to us, so
that captures made elsewhere can be used. The file format is that of libpcap (draft-ietf-opsawg-pcap).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nat_control.config import Config, to_core
from nat_fastpath.core_config import CoreConfig, NeighbourConfig
from nat_fastpath.engine import VERDICT_NAMES, Core

MAGICS = {  # as the bytes stand in the file: byte order, nanoseconds per unit of the fraction
    bytes.fromhex("d4c3b2a1"): ("<", 1000),
    bytes.fromhex("a1b2c3d4"): (">", 1000),
    bytes.fromhex("4d3cb2a1"): ("<", 1),
    bytes.fromhex("a1b23c4d"): (">", 1),
}
PCAPNG = bytes.fromhex("0a0d0d0a")
ETHERNET = 1
HEADER_BYTES = 24
FRAME_BYTES = 262144  # libpcap's own limit
OUT_MAGIC, OUT_SNAPLEN = 0xA1B23C4D, 262144
SETTLE_NS = 1_000_000_000  # of the capture's time between two sweeps for aged sessions
SECOND = 1_000_000_000
ARP, IPV4, VLAN = b"\x08\x06", b"\x08\x00", b"\x81\x00"


class CaptureError(Exception):
    """A capture that cannot be read; one line."""


class Packet(NamedTuple):
    """A captured frame: nanoseconds since 1970, its bytes, and its length on the wire."""

    time_ns: int
    frame: bytes
    length: int


class Capture:
    """A classic pcap file, either endian, micro- or nanoseconds; iterating gives its packets, from the first.

    A pipe can be read only once, and is copied into a temporary file. A capture that was interrupted ends in the
    middle of a packet: what is whole is read, and then ``cut`` says so in one line. Raises CaptureError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut: str | None = None
        with self._naming(), contextlib.ExitStack() as stack:
            self._stream = stack.enter_context(_rereadable(path))
            self._order, self._unit = self._read_header()
            stack.pop_all()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Packet]:
        header = struct.Struct(f"{self._order}IIII")
        self._stream.seek(HEADER_BYTES)
        number, self.cut = 0, None
        while part := self._read(header.size):
            number += 1
            if len(part) < header.size:
                self.cut = f"{self.path}: the file ends in the header of packet {number}"
                return
            seconds, fraction, captured, length = header.unpack(part)
            if captured > FRAME_BYTES:
                raise CaptureError(
                    f"{self.path}: packet {number} claims {captured} bytes; the file is damaged"
                )
            frame = self._read(captured)
            if len(frame) < captured:
                self.cut = f"{self.path}: the file ends in packet {number}"
                return
            yield Packet(seconds * SECOND + fraction * self._unit, frame, length)

    def _read_header(self) -> tuple[str, int]:
        path, head = self.path, self._stream.read(HEADER_BYTES)
        if head[:4] == PCAPNG:
            raise CaptureError(f"{path}: this is pcapng; make it pcap: editcap -F pcap {path} NEW.pcap")
        if head[:4] not in MAGICS or len(head) < HEADER_BYTES:
            raise CaptureError(f"{path}: no pcap file (magic {head[:4].hex() or 'missing'})")
        order, unit = MAGICS[head[:4]]
        (link,) = struct.unpack(f"{order}I", head[20:])
        if link & 0x0FFFFFFF != ETHERNET:  # the bits above tell of frame check sequences
            raise CaptureError(
                f"{path}: link type {link & 0x0FFFFFFF}, and only Ethernet (1) can be translated"
            )
        return order, unit

    def _read(self, size: int) -> bytes:
        with self._naming():
            return self._stream.read(size)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CaptureError(f"{self.path}: {error.strerror}") from None


def _rereadable(path: Path) -> BinaryIO:
    stream = path.open("rb")
    if stream.seekable():
        return stream
    with stream, contextlib.ExitStack() as stack:
        copy: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        stack.pop_all()
    return copy


def read_pcap(path: Path) -> Iterator[Packet]:
    """The packets of a capture, once. Raises CaptureError."""
    with Capture(path) as capture:
        yield from capture


class PcapWriter:
    """Writes Ethernet frames as a pcap file with nanoseconds."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.packets = 0
        stream.write(struct.pack("<IHHiIII", OUT_MAGIC, 2, 4, 0, 0, OUT_SNAPLEN, ETHERNET))

    def write(self, time_ns: int, frame: bytes) -> None:
        seconds, fraction = divmod(time_ns, SECOND)
        self._stream.write(struct.pack("<IIII", seconds, fraction, len(frame), len(frame)) + frame)
        self.packets += 1


# -- which side a frame comes from ------------------------------------------------------------------------


def _vlan_and_offset(frame: bytes) -> tuple[int, int]:
    """Its VLAN (0: untagged), and where its ethertype stands."""
    if frame[12:14] != VLAN:
        return 0, 12
    return int.from_bytes(frame[14:16], "big") & 0xFFF, 16


class _Sides:
    """Tells the port of a frame; remembers MACs for frames whose addresses do not say."""

    def __init__(self, config: Config) -> None:
        sides = [port.side for port in config.ports]
        self._internal, self._external = sides.index("internal"), sides.index("external")
        self._inside: list[tuple[int, int]] = []
        self._configured: dict[bytes, int] = {}
        self._learned: dict[bytes, int] = {}
        vlans = {port.vlan: i for i, port in enumerate(config.ports)}
        self._by_vlan = vlans if len(vlans) == len(config.ports) else {}
        for i, port in enumerate(config.ports):
            if port.side == "internal":
                prefixes = [port.address.network, *(route.prefix for route in port.routes)]
                self._inside += [(int(prefix.network_address), int(prefix.netmask)) for prefix in prefixes]
            macs = [port.gateway_mac, *(route.gateway_mac for route in port.routes)]
            macs += [neighbour.mac for neighbour in port.neighbours]
            self._configured |= {mac: i for mac in macs if mac}

    def port(self, frame: bytes) -> int:
        vlan, at = _vlan_and_offset(frame)
        if vlan in self._by_vlan:
            return self._by_vlan[vlan]
        mac = frame[6:12]
        if mac in self._configured:
            return self._configured[mac]
        offset = at + {IPV4: 14, ARP: 16}.get(frame[at : at + 2], len(frame))
        address = int.from_bytes(frame[offset : offset + 4], "big")
        if not address:  # not IPv4, or a host that has no address yet
            return self._learned.get(mac, self._internal)
        inside = any(address & mask == prefix for prefix, mask in self._inside)
        self._learned[mac] = self._internal if inside else self._external
        return self._learned[mac]


# -- next hops ----------------------------------------------------------------------------------------------


def made_up_mac(what: bytes) -> bytes:
    """A locally administered unicast MAC that is always the same for the same ``what``."""
    return b"\x02" + hashlib.blake2b(what, digest_size=5).digest()


def _with_all_neighbours(config: Config, core: CoreConfig, addresses: set[int]) -> CoreConfig:
    """Makes every next hop static that these packets can need, so that none is held."""
    hops: dict[tuple[int, int], bytes] = {}
    for i, port in enumerate(config.ports):
        net = port.address.network
        first, last = int(net.network_address), int(net.broadcast_address)
        wanted = {address for address in addresses if first <= address <= last}
        wanted |= {int(route.gateway) for route in port.routes}
        if port.gateway:
            wanted.add(int(port.gateway))
        for address in sorted(wanted - {int(port.address.ip)}):
            hops[i, address] = made_up_mac(address.to_bytes(4, "big"))
        for route in port.routes:
            if route.gateway_mac:
                hops[i, int(route.gateway)] = route.gateway_mac
        if port.gateway and port.gateway_mac:
            hops[i, int(port.gateway)] = port.gateway_mac
        hops.update({(i, int(neighbour.address)): neighbour.mac for neighbour in port.neighbours})
    if len(hops) > 65000:
        raise CaptureError(f"{len(hops)} next hops on the links, and 65000 at most: split the capture")
    return replace(
        core,
        neighbours=tuple(
            NeighbourConfig(address, port, mac) for (port, address), mac in sorted(hops.items())
        ),
        max_neighbours=max(core.max_neighbours, min(2 * len(hops) + 64, 65534)),
    )


def _survey(capture: Capture) -> tuple[int, set[int]]:
    """How many packets there are, and which IPv4 addresses."""
    packets = 0
    addresses: set[int] = set()
    for packet in capture:
        packets += 1
        _, at = _vlan_and_offset(packet.frame)
        if packet.frame[at : at + 2] == IPV4 and len(packet.frame) >= at + 22:
            addresses.update(struct.unpack_from("!II", packet.frame, at + 14))
    return packets, addresses


# -- the whole ----------------------------------------------------------------------------------------------


def translate(source: Path, target: Path, config: Config) -> dict[str, Any]:
    """Sends ``source`` through a core, and writes what the NAT would send to ``target``.

    Returns ``packets``, ``truncated`` (shorter than on the wire), ``cut`` (a line, where the file ends in the
    middle of a packet), ``written``, ``sessions`` (opened),
    ``seconds`` (that the capture spans), ``verdicts`` (packets by verdict, zeros left out) and ``counters``.
    Raises CaptureError, also when ``target`` cannot be written, and CoreError.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise CaptureError(f"{target}: is the capture itself; write to another file")
    with Capture(source) as capture:
        packets, addresses = _survey(capture)
        macs = [port.mac or made_up_mac(port.name.encode()) for port in config.ports]
        core_config = replace(
            _with_all_neighbours(config, to_core(config, macs), addresses),
            max_sessions=min(config.nat.max_sessions, max(packets, 64)),  # memory for no more than can be
            synchronous=False,  # there is no peer to wait for
            seed=1,  # the same capture is translated in the same way every time
        )
        macs = [port.mac for port in core_config.ports]
        with contextlib.closing(Core(core_config)) as core:
            try:
                with target.open("wb") as stream:
                    summary = _send(capture, core, _Sides(config), macs, PcapWriter(stream))
            except OSError as error:  # the capture's own are CaptureErrors
                raise CaptureError(f"{target}: {error.strerror}") from None
    return {"packets": packets, "cut": capture.cut, **summary}


def _send(
    capture: Capture, core: Core, sides: _Sides, macs: Sequence[bytes], out: PcapWriter
) -> dict[str, Any]:
    truncated = 0
    start = settled = now = None
    for packet in capture:
        truncated += len(packet.frame) < packet.length
        if start is None or now is None or settled is None:
            start = settled = now = packet.time_ns
        now = max(now, packet.time_ns)  # packets of several CPUs may stand in the wrong order
        if now - settled >= SETTLE_NS:
            core.settle(now - start + SECOND)
            settled = now
        port = sides.port(packet.frame)
        frame = packet.frame
        if len(frame) >= 14 and not frame[0] & 1:  # multicast stays what it is
            frame = macs[port] + frame[6:]
        results = core.burst([(port, frame)], now - start + SECOND)
        core.poll(now - start + SECOND)  # fragments that came before their first one
        for result in results + core.take():
            for sent in result.frames:
                out.write(packet.time_ns, sent)
        core.events()
        core.outbox()  # ARP that nobody is there to answer
    verdicts = core.verdicts().tolist()
    counters = core.counters()
    return {
        "truncated": truncated,
        "written": out.packets,
        "sessions": counters["sessions_opened"],
        "seconds": ((now or 0) - (start or 0)) / SECOND,
        "verdicts": {name: n for name, n in zip(VERDICT_NAMES, verdicts, strict=True) if n},
        "counters": counters,
    }
