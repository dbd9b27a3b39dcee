# SPDX-License-Identifier: Apache-2.0
"""Ports with a VLAN tag (IEEE 802.1Q): what is accepted, and the tag on all that leaves, whatever its way.

Each way goes through ports with no tag, one tag or two; without a tag the frames are those of the other tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet

from nat_fastpath.core_config import RouteConfig
from nat_fastpath.engine import CoreError, Result, Verdict
from tests.packets import (
    CLIENT,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    OTHER_CLIENT,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    POOL,
    SERVER,
    Nat,
    arp,
    check_sums,
    echo,
    external,
    fragments,
    frame,
    host_mac,
    icmp_error,
    number,
    parse,
    retagged,
    tagged_ports,
    tcp,
    together,
    udp,
)

WAYS = [(0, 0), (10, 0), (0, 20), (10, 20), (10, 10)]  # VLAN inside, outside
LEARNED = (
    RouteConfig(number("10.0.0.0"), 24, INSIDE),
    RouteConfig(number("198.51.100.0"), 24, OUTSIDE),
    RouteConfig(0, 0, OUTSIDE, number(GATEWAY)),
)


class TaggedNat(Nat):
    """Tags what is sent to it as its ports want it, and asserts that all that leaves has the tag of its port."""

    def __init__(self, vlans: tuple[int, int], mtu: int = 1500, **changes: Any) -> None:
        super().__init__(ports=tagged_ports(*vlans, external_mtu=mtu), **changes)
        self.vlans = vlans
        self.priority = 0

    def check(self, result: Result) -> Result:
        for one in result.frames:
            self.check_frame(result.port, one)
        return result

    def check_frame(self, port: int, data: bytes) -> None:
        packet, vlan = Ether(data), self.vlans[port]
        assert (Dot1Q in packet) == bool(vlan)
        assert packet.src == OUR_MAC[port]
        assert not vlan or packet[Dot1Q].vlan == vlan
        assert b"\x81\x00" not in data[16:18], "one tag only"

    def burst(self, frames: Sequence[tuple[int, bytes]]) -> list[Result]:
        tagged = [(port, retagged(data, self.vlans[port], self.priority)) for port, data in frames]
        return [self.check(result) for result in super().burst(tagged)]

    def raw(self, data: bytes, port: int = INSIDE) -> Result:
        return self.burst([(port, data)])[0]

    def as_is(self, data: bytes, port: int = INSIDE) -> str:
        """The verdict on a frame with the tags that it has."""
        return str(super().burst([(port, data)])[0].verdict.name)

    def take(self) -> list[Result]:
        return [self.check(result) for result in self.core.take()]

    def outbox(self) -> list[tuple[int, Packet]]:
        frames = self.core.outbox()
        for port, data in frames:
            self.check_frame(port, data)
            assert len(data) == (64 if self.vlans[port] else 60)
        return [(port, Ether(data)) for port, data in frames]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def vlans(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


# -- what is accepted ---------------------------------------------------------------------------------------


def tagged(data: bytes, tci: int, ethertype: int = 0x8100) -> bytes:
    return data[:12] + ethertype.to_bytes(2, "big") + tci.to_bytes(2, "big") + data[12:]


def test_only_its_own_tag_is_accepted() -> None:
    nat = TaggedNat((10, 0))
    plain, outside = frame(udp(CLIENT, 4000, SERVER, 53)), frame(udp(SERVER, 53, POOL[0], 4000), OUTSIDE)
    assert nat.as_is(tagged(plain, 10)) == "FORWARD"
    refused = [
        plain,
        tagged(plain, 11),
        tagged(plain, 0),  # only a priority
        tagged(plain, 10, 0x88A8),
        tagged(tagged(plain, 10), 10),
        tagged(tagged(plain, 10), 10, 0x88A8),
        tagged(tagged(plain, 10, 0x88A8), 10),
        tagged(plain, 10)[:17],
        arp(INSIDE, 1, host_mac(CLIENT), CLIENT, OUR_ADDRESS[0]),
        tagged(arp(INSIDE, 1, host_mac(CLIENT), CLIENT, OUR_ADDRESS[0]), 11),
    ]
    for data in refused:
        assert nat.as_is(data) == "DROP_VLAN"
    for data in (tagged(outside, 10), tagged(outside, 0), tagged(outside, 10, 0x88A8)):
        assert nat.as_is(data, OUTSIDE) == "DROP_VLAN"
    assert nat.count("DROP_VLAN") == len(refused) + 3
    assert nat.counters()["sessions"] == 1


def test_behind_the_tag_all_is_as_without() -> None:
    nat = TaggedNat((10, 20))
    data = bytearray(tagged(frame(udp(CLIENT, 4000, SERVER, 53)), 10))
    for ethertype, verdict in ((b"\x86\xdd", "DROP_IPV6"), (b"\x88\xcc", "DROP_ETHERTYPE")):
        data[16:18] = ethertype
        assert nat.as_is(bytes(data)) == verdict
    data[16:18] = b"\x08\x00"
    assert nat.as_is(bytes(data[:37])) == "DROP_RUNT"
    assert nat.as_is(bytes(data[:40])) == "DROP_IP_HEADER"
    assert nat.as_is(b"\2" + bytes(5) + bytes(data[6:])) == "DROP_NOT_FOR_US"
    assert nat.as_is(b"\xff" * 6 + bytes(data[6:])) == "DROP_MULTICAST"
    assert nat.as_is(bytes(data[:6]) + b"\1" + bytes(data[7:])) == "DROP_ADDRESS"


def test_no_vlan_beyond_4094() -> None:
    with pytest.raises(CoreError, match="a VLAN is 1 to 4094"):
        Nat(ports=tagged_ports(4095, 0))


# -- forwarded ----------------------------------------------------------------------------------------------


def test_established_flows_both_ways(vlans: tuple[int, int]) -> None:
    """Two packets of each kind: the first opens, the second takes the way of known sessions."""
    nat, plain = TaggedNat(vlans), Nat()
    for packet in (udp(CLIENT, 4000, SERVER, 53), tcp(CLIENT, 4000, SERVER, 80), echo(CLIENT, SERVER, 7)):
        for _ in range(2):
            out = nat.out(packet)
            assert bytes(out) == bytes(plain.out(packet)), "the packet is that of a NAT without tags"
        if UDP in out:
            back = udp(SERVER, 53, out.src, out[UDP].sport, b"answer")
        elif ICMP in out:
            back = echo(SERVER, out.src, out[ICMP].id, reply=True)
        else:
            back = tcp(SERVER, 80, out.src, out.sport, "SA")
        for _ in range(2):
            assert bytes(nat.back(back)) == bytes(plain.back(back))
    assert (nat.sessions()["bytes_out"] == plain.sessions()["bytes_out"]).all(), "IP bytes, without the tag"
    assert (nat.core.verdicts() == plain.core.verdicts()).all()
    mine, theirs = nat.counters(), plain.counters()
    for port, vlan in enumerate(vlans):
        for way, packets in ((f"rx_bytes.{port}", 6), (f"tx_bytes.{port}", 6)):
            assert mine[way] == theirs[way] + 4 * packets * bool(vlan), "frame bytes, with it"


def test_a_priority_goes_on_and_none_is_made_up() -> None:
    def priority(vlans: tuple[int, int], packet: Packet, port: int = INSIDE, tci: int = 0xB) -> int:
        nat = TaggedNat(vlans)
        nat.priority = tci
        result = nat.send(packet, port)
        assert result.verdict <= Verdict.REPLY
        return int.from_bytes(result.frame[14:16], "big") >> 12

    packet = udp(CLIENT, 4000, SERVER, 53)
    assert priority((10, 20), packet) == 0xB, "priority 5, drop eligible"
    assert priority((0, 20), packet) == 0
    assert priority((10, 20), echo(CLIENT, OUR_ADDRESS[0], 7)) == 0xB, "an answer has that of its question"


def test_bursts_with_all_tags(vlans: tuple[int, int]) -> None:
    """More than two batches; every third frame has a tag that is none of ours."""
    one, many = TaggedNat(vlans), TaggedNat(vlans)
    frames: list[tuple[int, bytes]] = []
    for at in range(60):
        out = one.out(udp(CLIENT, 4000 + at, SERVER, 53))
        many.out(udp(CLIENT, 4000 + at, SERVER, 53))
        frames += [
            (INSIDE, frame(udp(CLIENT, 4000 + at, SERVER, 53))),
            (OUTSIDE, frame(udp(SERVER, 53, out.src, out[UDP].sport), OUTSIDE)),
        ]
    wrong = [(port, tagged(data, 99)) for port, data in frames[::3]]
    mixed = [(port, retagged(data, vlans[port])) for port, data in frames]
    for at, bad in enumerate(wrong):
        mixed.insert(at * 3, bad)
    expected = [one.core.burst([pair], one.now)[0] for pair in mixed]
    assert many.core.burst(mixed, many.now) == expected
    assert many.count("DROP_VLAN") == len(wrong)
    assert many.count("FORWARD") == 60 + len(frames)
    for result in expected:
        many.check(result)


def test_hairpin(vlans: tuple[int, int]) -> None:
    nat = TaggedNat(vlans, filtering="endpoint-independent")
    nat.out(udp(OTHER_CLIENT, 5000, SERVER, 53))
    (session,) = nat.sessions()
    address, port = external(session)
    for _ in range(2):
        result = nat.send(udp(CLIENT, 4000, address, port))
        assert (result.verdict, result.port) == (Verdict.FORWARD, INSIDE)
        check_sums(result.frame)
        assert parse(result.frame).dst == OTHER_CLIENT
        assert Ether(result.frame).dst == host_mac(OTHER_CLIENT)
    assert nat.counters()["hairpinned"] == 2


# -- answers of our own -------------------------------------------------------------------------------------


def test_arp_of_others_is_answered(vlans: tuple[int, int]) -> None:
    nat = TaggedNat(vlans)
    for port, address in ((INSIDE, OUR_ADDRESS[0]), (OUTSIDE, OUR_ADDRESS[1]), (OUTSIDE, POOL[0])):
        sender = (CLIENT, GATEWAY)[port]
        result = nat.raw(arp(port, 1, GATEWAY_MAC, sender, address), port)
        assert (result.verdict, result.port) == (Verdict.REPLY, port)
        answer = Ether(result.frame)[ARP]
        assert (answer.op, answer.psrc, answer.pdst) == (2, address, sender)


def test_addresses_are_announced(vlans: tuple[int, int]) -> None:
    nat = TaggedNat(vlans)
    nat.core.announce()
    nat.pump(0.1)
    said = [(port, packet[ARP].psrc) for port, packet in nat.outbox() if packet[ARP].psrc == packet[ARP].pdst]
    pool = [(OUTSIDE, f"198.51.100.{n}") for n in range(10, 14)]
    assert said == [(INSIDE, OUR_ADDRESS[0]), (OUTSIDE, OUR_ADDRESS[1]), *pool]


def test_held_for_its_next_hop(vlans: tuple[int, int]) -> None:
    """Requests have the tag; what waited leaves with it, a packet that is too long in pieces."""
    nat = TaggedNat(vlans, mtu=600, routes=LEARNED)
    nat.pump(0.1)
    assert (OUTSIDE, GATEWAY) in [(port, packet[ARP].pdst) for port, packet in nat.outbox()]
    long = udp(CLIENT, 4001, SERVER, 53, bytes(1000))
    assert [nat.verdict(packet) for packet in (udp(CLIENT, 4000, SERVER, 53), long)] == ["HELD"] * 2
    answer = arp(OUTSIDE, 2, GATEWAY_MAC, GATEWAY, OUR_ADDRESS[1], OUR_MAC[1], OUR_MAC[1])
    assert nat.raw(answer, OUTSIDE).verdict == Verdict.CONSUMED
    short, pieces = nat.take()
    assert (short.verdict, pieces.verdict) == (Verdict.FORWARD, Verdict.FRAGMENT)
    check_sums(short.frame)
    assert bytes(together(pieces.frames))[28:] == bytes(1000)
    assert all(Ether(one).dst == GATEWAY_MAC for one in (short.frame, *pieces.frames))


def test_held_for_its_session(vlans: tuple[int, int]) -> None:
    """In a synchronous pair: forwarded and hairpinned packets wait for the commit."""
    nat = TaggedNat(vlans, synchronous=True, filtering="endpoint-independent", hold=5)
    assert nat.verdict(udp(OTHER_CLIENT, 5000, SERVER, 53)) == "HELD"
    (session,) = nat.sessions()
    nat.core.commit(nat.sessions())
    assert nat.verdict(udp(CLIENT, 4000, *external(session))) == "HELD"
    for _ in range(2):  # its outbound half's session, and its inbound half's
        nat.core.commit(nat.sessions())
    first, second = nat.take()
    assert (first.port, second.port) == (OUTSIDE, INSIDE)
    for result in (first, second):
        assert result.verdict == Verdict.FORWARD
        check_sums(result.frame)


def test_errors_and_echoes_of_our_own(vlans: tuple[int, int]) -> None:
    nat = TaggedNat(vlans, mtu=600)
    expired, long = (
        udp(CLIENT, 4000, SERVER, 53, ttl=1),
        udp(CLIENT, 4000, SERVER, 53, bytes(800), flags="DF"),
    )
    for _ in range(2):  # without a session, and with one
        for packet, kind in ((expired, (11, 0)), (long, (3, 4))):
            result = nat.send(packet)
            assert (result.verdict, result.port) == (Verdict.REPLY, INSIDE)
            check_sums(result.frame)
            answer = parse(result.frame)
            assert (answer[ICMP].type, answer[ICMP].code) == kind
            assert (answer.src, answer.dst) == (OUR_ADDRESS[0], CLIENT)
            assert len(result.frame) == 14 + 4 * bool(vlans[INSIDE]) + answer.len
        nat.out(udp(CLIENT, 4000, SERVER, 53))
    asked = ((CLIENT, OUR_ADDRESS[0], INSIDE), (SERVER, OUR_ADDRESS[1], OUTSIDE), (SERVER, POOL[0], OUTSIDE))
    for source, address, port in asked:
        result = nat.send(echo(source, address, 7), port)
        assert (result.verdict, result.port) == (Verdict.REPLY, port)
        check_sums(result.frame)
        assert (parse(result.frame).src, parse(result.frame)[ICMP].type) == (address, 0)


def test_errors_of_others_are_translated(vlans: tuple[int, int]) -> None:
    nat = TaggedNat(vlans)
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    back = nat.back(icmp_error("192.0.2.33", out.src, out, 11, 0))
    assert (back.dst, back[ICMP].type) == (CLIENT, 11)
    assert IP(bytes(back[ICMP].payload)).src == CLIENT
    answer = nat.back(udp(SERVER, 53, out.src, out[UDP].sport))
    assert nat.out(icmp_error(CLIENT, SERVER, answer)).src == out.src


# -- fragments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["in order", "first last"])
def test_fragments(vlans: tuple[int, int], order: tuple[int, ...]) -> None:
    nat = TaggedNat(vlans)
    parts = fragments(udp(CLIENT, 4000, SERVER, 53, bytes(range(256)) * 12, id=77), 1480)
    results = [nat.send(parts[at]) for at in order]
    nat.core.poll(nat.now)
    out = [r for r in (*results, *nat.take()) if r.verdict != Verdict.HELD]
    assert {(r.verdict, r.port) for r in out} == {(Verdict.FORWARD, OUTSIDE)}
    whole = together([r.frame for r in out])
    assert bytes(whole[UDP].payload) == bytes(range(256)) * 12
    assert nat.counters()["held"] == 0


def test_the_mtu_counts_ip_bytes(vlans: tuple[int, int]) -> None:
    nat = TaggedNat(vlans, mtu=600)
    fits = udp(CLIENT, 4000, SERVER, 53, bytes(600 - 28), flags="DF")
    assert len(nat.out(fits)) == 600
    long = udp(CLIENT, 4000, SERVER, 53, bytes(601 - 28))
    before = nat.counters()
    result = nat.send(long)
    assert (result.verdict, len(result.frames)) == (Verdict.FRAGMENT, 2)
    assert bytes(together(result.frames)[UDP].payload) == bytes(601 - 28)
    now = nat.counters()
    assert now["tx_packets.1"] - before["tx_packets.1"] == 2
    assert now["tx_bytes.1"] - before["tx_bytes.1"] == sum(map(len, result.frames))


def test_padding_stays_behind_the_packet(vlans: tuple[int, int]) -> None:
    """A frame is at least 60 bytes long: a tag moves what is before the IP header, and nothing after it."""
    nat = TaggedNat(vlans)
    data = frame(udp(CLIENT, 4000, SERVER, 53, b"")).ljust(60, b"\0")
    for _ in range(2):
        result = nat.raw(data)
        assert result.verdict == Verdict.FORWARD
        assert len(result.frame) == 60 + 4 * bool(vlans[OUTSIDE])
        assert parse(result.frame)[UDP].len == 8
