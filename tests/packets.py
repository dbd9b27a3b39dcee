# SPDX-License-Identifier: Apache-2.0
"""Frames for the tests, made and checked with scapy, and a small NAT to send them through.

Inside is 10.0.0.0/24 on port 0, outside 198.51.100.0/24 on port 1 with the gateway .254.  Every host has a
static neighbour entry, so that nothing waits for ARP unless a test wants it to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import numpy as np
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from nat_fastpath.core_config import CoreConfig, NeighbourConfig, PoolRange, PortConfig, RouteConfig
from nat_fastpath.engine import RECORD, Core, Result, Verdict

INSIDE, OUTSIDE = 0, 1
SECOND = 1_000_000_000
START = 1_000 * SECOND

OUR_MAC = ("02:00:00:00:00:01", "02:00:00:00:00:02")  # by port
OUR_ADDRESS = ("10.0.0.1", "198.51.100.1")
GATEWAY, GATEWAY_MAC = "198.51.100.254", "02:00:00:00:01:fe"
CLIENT, OTHER_CLIENT = "10.0.0.5", "10.0.0.6"
SERVER, OTHER_SERVER = "203.0.113.7", "203.0.113.8"
POOL = ("198.51.100.10", "198.51.100.13")
MARK = 4  # of the inside's packets, in the type of service: the lowest bit of the DSCP


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def number(address: str) -> int:
    return int(IPv4Address(address))


def text(address: Any) -> str:
    return str(IPv4Address(int(address)))


def host_mac(address: str) -> str:
    """The MAC that an inside host of this address has in all tests."""
    return "02:00:0a:" + ":".join(f"{int(part):02x}" for part in address.split(".")[1:])


# -- frames -----------------------------------------------------------------------------------------------


def frame(ip: Packet, port: int = INSIDE, mac: str | None = None) -> bytes:
    """The frame as it reaches the NAT on ``port``; from its inside host, or from the gateway."""
    sender = mac or (host_mac(ip.src) if port == INSIDE else GATEWAY_MAC)
    return bytes(Ether(src=sender, dst=OUR_MAC[port]) / ip)


def ip(source: str, destination: str, **fields: Any) -> Packet:
    return IP(src=source, dst=destination, **{"ttl": 64, "id": 1, **fields})


def udp(
    source: str,
    sport: int,
    destination: str,
    dport: int,
    payload: bytes = b"data",
    check: int | None = None,
    **fields: Any,
) -> Packet:
    """``check`` 0: sent without a checksum (RFC 768)."""
    return ip(source, destination, **fields) / UDP(sport=sport, dport=dport, chksum=check) / Raw(payload)


def udp_flows(source: str, flows: Iterable[tuple[int, str, int]]) -> list[bytes]:
    """Frames of an inside host, one for each (port, remote, port); where scapy would take its time."""
    head = frame(udp(source, 0, "0.0.0.0", 0, check=0))
    rest = sum(int.from_bytes(head[at : at + 2], "big") for at in range(14, 34, 2) if at != 24)
    frames = []
    for port, remote, remote_port in flows:
        to = number(remote)
        total = rest + (to >> 16) + (to & 0xFFFF)
        total = (total & 0xFFFF) + (total >> 16)
        check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        ends = struct.pack("!IHH", to, port, remote_port)
        frames.append(head[:24] + check.to_bytes(2, "big") + head[26:30] + ends + head[38:])
    return frames


def tcp(
    source: str,
    sport: int,
    destination: str,
    dport: int,
    flags: str = "S",
    payload: bytes = b"",
    **fields: Any,
) -> Packet:
    return (
        ip(source, destination, **fields)
        / TCP(sport=sport, dport=dport, flags=flags, seq=1000)
        / Raw(payload)
    )


def echo(
    source: str, destination: str, ident: int, reply: bool = False, payload: bytes = b"ping", **fields: Any
) -> Packet:
    return ip(source, destination, **fields) / ICMP(type=0 if reply else 8, id=ident, seq=1) / Raw(payload)


def icmp_error(
    source: str,
    destination: str,
    about: Packet,
    kind: int = 3,
    code: int = 3,
    quote: int | None = None,
    **fields: Any,
) -> Packet:
    """An error quoting the first ``quote`` bytes of the packet ``about``; all of them when None."""
    quoted = bytes(about)[:quote]
    return ip(source, destination, **fields) / ICMP(type=kind, code=code) / Raw(quoted)


def arp(
    port: int,
    operation: int,
    sender_mac: str,
    sender: str,
    target: str,
    target_mac: str = "00:00:00:00:00:00",
    to: str = "ff:ff:ff:ff:ff:ff",
) -> bytes:
    body = ARP(op=operation, hwsrc=sender_mac, psrc=sender, hwdst=target_mac, pdst=target)
    return bytes(Ether(src=sender_mac, dst=to) / body).ljust(60, b"\0")


def fragments(packet: Packet, size: int) -> list[Packet]:
    """The datagram cut into IPv4 fragments of ``size`` payload bytes, a multiple of 8 (RFC 791)."""
    whole, header = bytes(packet), packet.ihl or 5
    body, first = whole[header * 4 :], IP(whole[: header * 4])
    parts = []
    for at in range(0, len(body), size):
        piece = first.copy()
        piece.remove_payload()
        piece.len = piece.chksum = None
        piece.frag = at // 8
        piece.flags = "MF" if at + size < len(body) else 0
        parts.append(piece / Raw(body[at : at + size]))
    return parts


def vlan(ip_packet: Packet, tag: int, port: int = INSIDE) -> bytes:
    return bytes(Ether(src=host_mac(ip_packet.src), dst=OUR_MAC[port]) / Dot1Q(vlan=tag) / ip_packet)


def retagged(data: bytes, vlan: int, priority: int = 0) -> bytes:
    """The frame with this tag in front, ``priority`` being its upper four bits; as it is for VLAN 0."""
    tag = b"\x81\x00" + (priority << 12 | vlan).to_bytes(2, "big")
    return data[:12] + tag + data[12:] if vlan else data


def marked(data: bytes, inside: bool) -> bytes:
    """The frame as it is on a link that both sides share by DSCP; what is not IPv4 has no mark."""
    if data[12:14] != b"\x08\x00":
        return data
    packet = Ether(data)
    packet[IP].tos = packet[IP].tos & ~MARK | (MARK if inside else 0)
    del packet[IP].chksum
    return bytes(packet)


# -- the oracle -------------------------------------------------------------------------------------------


def parse(data: bytes) -> Packet:
    """The IP packet in a frame."""
    return Ether(data)[IP]


def rebuilt(packet: Packet) -> bytes:
    """The same packet with all checksums of its own layers computed anew by scapy."""
    copy = packet.copy()
    for layer in (IP, UDP, TCP, ICMP):
        # what an ICMP error quotes has classes of its own (UDPerror, ...) and stays as it is
        found = copy.getlayer(layer)
        if found is not None and type(found) is layer and not (layer is UDP and found.chksum == 0):
            del found.chksum
    return bytes(copy)


def check_sums(data: bytes) -> None:
    """Asserts that every checksum of the frame is what scapy computes for it; of a quoted header too."""
    packet = parse(data)
    assert bytes(packet) == rebuilt(packet), packet.show2(dump=True)
    quoted = packet.getlayer(IPerror)
    if quoted is not None:
        header = bytes(quoted)[: quoted.ihl * 4]
        again = IP(header)
        del again.chksum
        assert bytes(again) == header, "header checksum of the quoted packet"


def sum_words(data: bytes) -> int:
    """The one's complement sum (RFC 1071): 0xffff over a header whose checksum is right."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


def addresses(packet: Packet) -> tuple[str, int, str, int]:
    """(source, source port, destination, destination port); the identifier stands on both sides for ICMP."""
    if TCP in packet or UDP in packet:
        return packet.src, packet.payload.sport, packet.dst, packet.payload.dport
    return packet.src, packet[ICMP].id, packet.dst, packet[ICMP].id


def together(frames: Sequence[bytes]) -> Packet:
    """The datagram that a receiver would have of these; every byte of it must be there, once."""
    pieces = sorted((parse(one) for one in frames), key=lambda piece: piece.frag)
    for piece in pieces:
        header = IP(bytes(piece)[: piece.ihl * 4])
        del header.chksum
        assert IP(bytes(header)).chksum == piece.chksum
    assert [bool(piece.flags.MF) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    data = b""
    for piece in pieces:
        assert piece.frag * 8 == len(data)
        data += bytes(piece)[piece.ihl * 4 : piece.len]
    first = pieces[0]
    whole = IP(bytes(first)[: first.ihl * 4])
    whole.flags, whole.len, whole.chksum = 0, first.ihl * 4 + len(data), None
    whole = IP(bytes(whole) + data)
    check_sums(frame(whole))
    return whole


# -- a small NAT ------------------------------------------------------------------------------------------


def config(**changes: Any) -> CoreConfig:
    """The configuration of the drawing above, with these fields changed."""
    hosts = [CLIENT, OTHER_CLIENT, *(f"10.0.0.{i}" for i in range(20, 60))]
    defaults: dict[str, Any] = {
        "ports": (
            PortConfig("internal", mac_bytes(OUR_MAC[0]), number(OUR_ADDRESS[0])),
            PortConfig("external", mac_bytes(OUR_MAC[1]), number(OUR_ADDRESS[1])),
        ),
        "pool": (PoolRange(number(POOL[0]), number(POOL[1])),),
        "routes": (
            RouteConfig(number("10.0.0.0"), 24, INSIDE),
            RouteConfig(number("198.51.100.0"), 24, OUTSIDE),
            RouteConfig(0, 0, OUTSIDE, number(GATEWAY), mac_bytes(GATEWAY_MAC)),
        ),
        "neighbours": tuple(
            NeighbourConfig(number(host), INSIDE, mac_bytes(host_mac(host))) for host in hosts
        ),
        "max_sessions": 1024,
        "max_neighbours": 256,
        "event_ring": 4096,
        "udp_timeout": 300,
        "seed": 7,
    }
    return CoreConfig(**{**defaults, **changes})


def tagged_ports(inside: int, outside: int, external_mtu: int = 1500) -> tuple[PortConfig, PortConfig]:
    """The ports of the drawing above with these VLANs."""
    internal, external = config().ports
    return replace(internal, vlan=inside), replace(external, vlan=outside, mtu=external_mtu)


def small_pool(ports: int, addresses: int = 1, first: int = 2000) -> tuple[PoolRange, ...]:
    """``ports`` ports on each of ``addresses`` addresses."""
    start = number(POOL[0])
    return (PoolRange(start, start + addresses - 1, (first, first + ports - 1)),)


class Nat:
    """A core with a clock of its own: the tests' short way to send packets and to see what became of them."""

    def __init__(self, **changes: Any) -> None:
        self.core = Core(config(**changes))
        self.now = START

    def burst(self, frames: Sequence[tuple[int, bytes]]) -> list[Result]:
        return self.core.burst(frames, self.now)

    def raw(self, data: bytes, port: int = INSIDE) -> Result:
        return self.core.burst([(port, data)], self.now)[0]

    def send(self, packet: Packet, port: int = INSIDE, mac: str | None = None) -> Result:
        return self.raw(frame(packet, port, mac), port)

    def forward(self, packet: Packet, port: int = INSIDE, mac: str | None = None) -> Packet:
        """Sends a packet that must come out at the other side, with right checksums; returns it parsed."""
        result = self.send(packet, port, mac)
        assert result.verdict == Verdict.FORWARD, result.verdict.name
        check_sums(result.frame)
        return parse(result.frame)

    def out(self, packet: Packet) -> Packet:
        return self.forward(packet, INSIDE)

    def back(self, packet: Packet) -> Packet:
        return self.forward(packet, OUTSIDE)

    def verdict(self, packet: Packet, port: int = INSIDE) -> str:
        return str(self.send(packet, port).verdict.name)

    def wait(self, seconds: float) -> None:
        """Lets time pass and everything that is due happen."""
        self.now += round(seconds * SECOND)
        self.core.settle(self.now)

    def pump(self, seconds: float, step: float = 0.05) -> None:
        """Lets time pass in small steps, as a worker does: neighbours and held packets move by them."""
        end = self.now + round(seconds * SECOND)
        while self.now < end:
            self.now = min(self.now + round(step * SECOND), end)
            for _ in range(4):
                self.core.poll(self.now)

    def resolve(self, address: str, port: int, mac: str) -> None:
        """Answers the ARP request that stands in the outbox for ``address``."""
        asked = [Ether(data)[ARP].pdst for at, data in self.core.outbox() if at == port]
        assert address in asked, f"nobody asked for {address}, but for {asked}"
        reply = arp(port, 2, mac, address, OUR_ADDRESS[port], OUR_MAC[port], OUR_MAC[port])
        assert self.raw(reply, port).verdict == Verdict.CONSUMED

    def sessions(self) -> np.ndarray:
        records, cursor = self.core.sessions(0, 1 << 16)
        assert cursor == 0
        return records

    def counters(self) -> dict[str, int]:
        return self.core.counters()

    def count(self, verdict: Verdict | str) -> int:
        """Packets with this verdict so far."""
        at = Verdict[verdict] if isinstance(verdict, str) else verdict
        return int(self.core.verdicts()[at])


def internal(record: Any) -> tuple[str, int]:
    return text(record["internal_addr"]), int(record["internal_port"])


def external(record: Any) -> tuple[str, int]:
    return text(record["external_addr"]), int(record["external_port"])


def remote(record: Any) -> tuple[str, int]:
    return text(record["remote_addr"]), int(record["remote_port"])


def records(rows: Iterable[dict[str, int]]) -> np.ndarray:
    """Session records from dictionaries of their fields."""
    rows = list(rows)
    out = np.zeros(len(rows), RECORD)
    for at, row in enumerate(rows):
        for name, value in row.items():
            out[at][name] = value
    return out
