# SPDX-License-Identifier: Apache-2.0
"""Fragments (RFC 791, RFC 1858, RFC 4787 REQ-14): those that come, those that wait, and those that are made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.packet import Packet, Raw

from nat_fastpath.engine import Result, Verdict
from tests.packets import (
    CLIENT,
    GATEWAY,
    INSIDE,
    OTHER_CLIENT,
    OTHER_SERVER,
    OUR_ADDRESS,
    OUTSIDE,
    SERVER,
    Nat,
    arp,
    config,
    echo,
    fragments,
    frame,
    icmp_error,
    parse,
    tcp,
    together,
    udp,
)

LONG = bytes(range(256)) * 16
BIG = udp(CLIENT, 4000, SERVER, 53, LONG, id=77)  # of 3 fragments
PARTS = fragments(BIG, 1480)
EXTERNAL_MTU = 1000


def arrive(nat: Nat, parts: Sequence[Packet], port: int = INSIDE) -> list[Result]:
    """Sends the parts; what came out, in order."""
    results = [nat.send(part, port) for part in parts]
    nat.core.poll(nat.now)
    return [r for r in (*results, *nat.core.take()) if r.verdict != Verdict.HELD]


def small_mtu(mtu: int = EXTERNAL_MTU, **changes: object) -> Nat:
    inside, outside = config().ports
    return Nat(ports=(inside, replace(outside, mtu=mtu)), **changes)


def as_whole(packet: Packet) -> Packet:
    """The packet translated in one piece: what its fragments must become."""
    return small_mtu(9000).out(packet)


# -- those that come ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [
        BIG,
        udp(CLIENT, 4000, SERVER, 53, LONG, check=0),
        tcp(CLIENT, 4000, SERVER, 80, "S", LONG),
        echo(CLIENT, SERVER, 9, payload=LONG),
    ],
    ids=["udp", "unsummed", "tcp", "echo"],
)
def test_a_datagram_in_fragments_leaves_like_a_whole_one(packet: Packet) -> None:
    """Its first fragment opens what a whole packet would, with the same external port and the same bytes."""
    nat, expected = Nat(), as_whole(packet)
    results = arrive(nat, fragments(packet, 1480))
    assert [r.verdict for r in results] == [Verdict.FORWARD] * 3
    assert bytes(together([r.frame for r in results])) == bytes(expected)
    assert {r.port for r in results} == {OUTSIDE}
    assert {r.frame[:12] for r in results} == {results[0].frame[:12]}, "one next hop"
    (session,) = nat.sessions()
    assert (session["packets_out"], session["bytes_out"]) == (3, 2 * 1500 + len(packet) - 2 * 1480)
    assert nat.count("FORWARD") == 3
    assert nat.counters()["datagrams"] == 1
    assert nat.counters()["tx_packets.1"] == 3


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("at_once", [False, True])
def test_any_order_arrives(order: tuple[int, ...], at_once: bool) -> None:
    """Those before the first wait, and leave behind it in the order in which they came."""
    nat = Nat()
    expected = as_whole(BIG)
    sent = [PARTS[i] for i in order]
    if at_once:
        results = nat.burst([(INSIDE, frame(part)) for part in sent])
        nat.core.poll(nat.now)
        out = [r for r in (*results, *nat.core.take()) if r.verdict != Verdict.HELD]
    else:
        out = arrive(nat, sent)
    assert bytes(together([r.frame for r in out])) == bytes(expected)
    waiting = order.index(0)
    left = [parse(r.frame).frag for r in out]
    assert left[0] == 0
    if waiting:
        assert left[1:] == [PARTS[i].frag for i in order if i], "in the order in which they came"
        assert nat.count("HELD") == 2
    assert nat.count("FORWARD") == 3
    assert nat.counters()["held"] == 0


def test_fragments_from_outside() -> None:
    nat = Nat()
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    answer = udp(SERVER, 53, out.src, out[UDP].sport, LONG, id=5)
    for order in ((0, 1, 2), (2, 1, 0)):
        results = arrive(nat, [fragments(answer, 1480)[i] for i in order], OUTSIDE)
        whole = together([r.frame for r in results])
        assert (whole.dst, whole[UDP].dport, bytes(whole[Raw])) == (CLIENT, 4000, LONG)
        assert {r.port for r in results} == {INSIDE}
        nat.wait(11)


def test_fragments_open_from_outside_what_a_whole_packet_would() -> None:
    strict, open_ = Nat(), Nat(filtering="endpoint-independent")
    for nat in (strict, open_):
        out = nat.out(udp(CLIENT, 4000, SERVER, 53))
        parts = fragments(udp(OTHER_SERVER, 1, out.src, out[UDP].sport, LONG), 1480)
        results = arrive(nat, parts, OUTSIDE)
        if nat is open_:
            assert together([r.frame for r in results]).dst == CLIENT
            continue
        nat.pump(2.1)
        nat.core.take()
        assert nat.count("DROP_FILTERED") == 1
        assert nat.count("DROP_FRAGMENT") == 2
        assert nat.count("FORWARD") == 1
        assert len(nat.sessions()) == 1


def test_a_first_fragment_in_the_middle_of_tcp_opens_nothing() -> None:
    nat = Nat()
    assert nat.verdict(fragments(tcp(CLIENT, 4000, SERVER, 80, "A", LONG), 1480)[0]) == "DROP_TCP_NOT_SYN"
    assert nat.verdict(PARTS[1]) == "HELD"
    assert nat.counters()["sessions"] == 0


def test_a_session_that_ended_carries_no_fragments() -> None:
    nat = Nat()
    nat.send(PARTS[0])
    nat.core.delete(nat.sessions())
    nat.out(udp(OTHER_CLIENT, 1, SERVER, 2))  # perhaps in the same slot
    assert nat.verdict(PARTS[1]) == "DROP_FRAGMENT"


def test_hairpinned_fragments() -> None:
    for order in ((0, 1, 2), (2, 0, 1)):
        nat = Nat(filtering="endpoint-independent")
        there = nat.out(udp(CLIENT, 4000, SERVER, 53))
        packet = udp(OTHER_CLIENT, 5000, there.src, there[UDP].sport, LONG, id=8)
        results = arrive(nat, [fragments(packet, 1480)[i] for i in order])
        whole = together([r.frame for r in results])
        assert (whole.dst, whole[UDP].dport, whole.ttl) == (CLIENT, 4000, 63)
        assert whole.src.startswith("198.51.100.1")
        assert nat.counters()["hairpinned"] == 3
        # one half of it must not be usable from the wire
        forged = fragments(udp(whole.src, whole[UDP].sport, there.src, there[UDP].sport, LONG, id=8), 1480)
        assert nat.verdict(forged[1], OUTSIDE) == "DROP_ADDRESS"


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("hairpin", [False, True])
def test_fragments_of_a_session_that_is_not_committed(order: tuple[int, ...], hairpin: bool) -> None:
    """Held behind the first; nothing leaves before the commit, and everything after it, in order."""
    nat = Nat(synchronous=True, filtering="endpoint-independent", hold=10)
    packet = BIG
    if hairpin:
        assert nat.verdict(udp(OTHER_CLIENT, 9, SERVER, 53)) == "HELD"
        nat.core.commit(nat.sessions())
        (there,) = nat.core.take()
        packet = udp(CLIENT, 4000, parse(there.frame).src, parse(there.frame)[UDP].sport, LONG)
    assert arrive(nat, [fragments(packet, 1480)[i] for i in order]) == []
    while (pending := nat.sessions())["flags"].any() and nat.counters()["held"]:
        nat.core.commit(pending)
        if len(nat.sessions()) == len(pending):
            break
    nat.core.poll(nat.now)
    out = nat.core.take()
    assert [r.verdict for r in out] == [Verdict.FORWARD] * 3
    assert parse(out[0].frame).frag == 0
    assert bytes(together([r.frame for r in out])[UDP].payload) == LONG


def test_fragments_wait_for_the_next_hop_in_order() -> None:
    nat = Nat(routes=(*config().routes[:2], replace(config().routes[2], gateway_mac=None)))
    assert [nat.verdict(part) for part in PARTS] == ["HELD"] * 3
    nat.core.poll(nat.now)
    nat.resolve(GATEWAY, OUTSIDE, "02:00:00:00:01:fe")
    out = nat.core.take()
    assert [parse(r.frame).frag for r in out] == [part.frag for part in PARTS]
    together([r.frame for r in out])


def test_an_error_about_a_fragmented_packet() -> None:
    nat = Nat()
    out = [parse(r.frame) for r in arrive(nat, PARTS)]
    back = nat.back(icmp_error("192.0.2.9", out[0].src, out[0], 11, 1, 28))
    assert back.dst == CLIENT
    assert (
        nat.verdict(icmp_error("192.0.2.9", out[0].src, out[1], 11, 0, 28), OUTSIDE) == "DROP_ICMP_EMBEDDED"
    )


def test_an_error_that_comes_in_fragments_itself() -> None:
    nat = Nat()
    out = nat.out(udp(CLIENT, 4000, SERVER, 53, LONG[:600]))
    before = nat.sessions()[0]
    error = icmp_error("192.0.2.9", out.src, out, 3, 3, id=9)
    nat.now += 5_000_000
    whole = together([r.frame for r in arrive(nat, fragments(error, 256), OUTSIDE)])
    assert (whole.src, whole.dst, whole[ICMP].type) == ("192.0.2.9", CLIENT, 3)
    after = nat.sessions()[0]
    assert after["packets_in"] == before["packets_in"]
    assert after["idle_ms"] == 5, "an error keeps no session alive"


def test_time_to_live_of_fragments() -> None:
    nat = Nat()
    for part in fragments(udp(CLIENT, 4000, SERVER, 53, LONG, id=77), 1480)[:1]:
        nat.send(part)
    dying = PARTS[1].copy()
    dying.ttl = 1
    assert nat.verdict(dying) == "DROP_TTL", "no error about a later fragment (RFC 1812, 4.3.2.7)"
    assert nat.verdict(fragments(udp(CLIENT, 4000, SERVER, 53, LONG, ttl=1), 1480)[0]) == "REPLY"


def test_fragments_to_ourselves() -> None:
    nat = Nat()
    for address in (OUR_ADDRESS[0], "198.51.100.11"):
        first, later, _ = fragments(echo(CLIENT, address, 5, payload=LONG), 1480)
        assert nat.verdict(first) == "DROP_LOCAL"
        assert nat.verdict(later) == ("DROP_LOCAL" if address == OUR_ADDRESS[0] else "HELD")
    assert (
        nat.verdict(fragments(udp(SERVER, 1, "198.51.100.99", 2, LONG), 1480)[1], OUTSIDE) == "DROP_NOT_POOL"
    )
    assert (
        nat.verdict(fragments(udp(CLIENT, 1, "198.51.100.10", 2, LONG), 1480)[1], OUTSIDE) == "DROP_ADDRESS"
    )


# -- bounds, and who abuses them ------------------------------------------------------------------------------


def piece(packet: Packet, offset: int, size: int, more: bool) -> Packet:
    """Any fragment of a packet, by bytes of its payload."""
    one = IP(bytes(packet)[:20])
    data = bytes(packet)[20 + offset : 20 + offset + size]
    one.len, one.chksum, one.frag, one.flags = None, None, offset // 8, "MF" if more else 0
    return one / Raw(data)


def test_tiny_and_overlapping_fragments_have_a_name() -> None:
    """RFC 1858: what would hide a TCP header, or write over it. RFC 791: what no honest sender makes."""
    nat = Nat()
    syn = tcp(CLIENT, 4000, SERVER, 80, "S", LONG)
    bad = [
        piece(syn, 0, 8, True),
        piece(syn, 0, 16, True),
        piece(syn, 8, 64, True),
        piece(syn, 16, 64, False),
        piece(syn, 800, 63, True),
        piece(BIG, 0, 1479, True),
        piece(echo(CLIENT, SERVER, 1, payload=LONG), 0, 0, True),
        piece(BIG, 800, 0, False),
    ]
    beyond = piece(BIG, 0, 100, False)
    beyond.frag = 8190
    for part in (*bad, beyond):
        assert nat.verdict(part) == "DROP_FRAGMENT_SHAPE", part.summary()
    assert nat.count("DROP_FRAGMENT_SHAPE") == len(bad) + 1
    assert nat.counters()["sessions"] == nat.counters()["datagrams"] == 0
    assert nat.verdict(piece(BIG, 0, 8, True)) == "FORWARD", "a whole UDP header is there"
    assert nat.verdict(piece(syn, 24, 64, True)) == "HELD"


def test_a_second_first_fragment_is_judged_like_the_first() -> None:
    """RFC 3128: a header that is let through does not vouch for another one with the same identification."""
    nat = Nat()
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    good = udp(SERVER, 53, out.src, out[UDP].sport, LONG, id=3)
    bad = udp(SERVER, 54, out.src, out[UDP].sport, LONG, id=3)
    assert nat.verdict(fragments(good, 1480)[0], OUTSIDE) == "FORWARD"
    assert nat.verdict(fragments(bad, 1480)[0], OUTSIDE) == "DROP_FILTERED"


def test_fragments_without_a_first_age_out() -> None:
    nat = Nat()
    assert [nat.verdict(part) for part in PARTS[1:]] == ["HELD"] * 2
    nat.pump(1.9)
    assert nat.core.take() == []
    nat.pump(0.2)
    assert [r.verdict for r in nat.core.take()] == [Verdict.DROP_FRAGMENT] * 2
    assert nat.count("DROP_FRAGMENT") == 2
    assert nat.counters()["datagrams"] == nat.counters()["held"] == 0


def test_a_known_datagram_ages_out() -> None:
    nat = Nat()
    nat.send(PARTS[0])
    nat.pump(9.9)
    assert nat.verdict(PARTS[1]) == "FORWARD"
    nat.pump(9.9)
    assert nat.counters()["datagrams"] == 1
    nat.pump(0.2)
    assert nat.counters()["datagrams"] == 0
    assert nat.verdict(PARTS[2]) == "HELD"


def test_one_datagram_holds_no_more_than_its_share() -> None:
    nat = Nat()
    verdicts = [nat.verdict(piece(BIG, 8 * (1 + at), 8, True)) for at in range(60)]
    assert verdicts == ["HELD"] * 48 + ["DROP_FRAGMENT"] * 12


def test_a_flood_of_fragments_takes_a_quarter_of_the_room() -> None:
    """Whoever else needs to wait, does; the oldest of the flood end by name, and the newest still arrive."""
    nat = Nat(max_held=64, routes=(*config().routes[:2], replace(config().routes[2], gateway_mac=None)))
    for ident in range(40):
        assert nat.verdict(fragments(udp(CLIENT, 1, SERVER, 2, LONG, id=ident), 1480)[1]) == "HELD"
    ended = nat.core.take()
    assert [r.verdict for r in ended] == [Verdict.DROP_FRAGMENT] * (40 - 16)
    assert nat.counters()["held"] == 16
    assert [nat.verdict(udp(CLIENT, 5000 + at, SERVER, 53)) for at in range(47)] == ["HELD"] * 47
    assert nat.verdict(fragments(udp(CLIENT, 1, SERVER, 2, LONG, id=39), 1480)[0]) == "HELD"
    nat.core.poll(nat.now)
    nat.resolve(GATEWAY, OUTSIDE, "02:00:00:00:01:fe")
    assert {r.verdict for r in nat.core.take()} == {Verdict.FORWARD}


def test_a_full_store_gives_up_its_oldest() -> None:
    """1024 datagrams are known beside those that wait; established traffic does not care."""
    nat = Nat(max_held=4)
    nat.out(udp(OTHER_CLIENT, 7, SERVER, 53))
    assert nat.verdict(PARTS[0]) == "FORWARD"
    for ident in range(1030):
        first = fragments(udp(CLIENT, 4000, SERVER, 53, LONG, id=1000 + ident), 1480)[0]
        assert nat.verdict(first) == "FORWARD"
    assert nat.counters()["datagrams"] == 1025
    assert nat.verdict(PARTS[1]) == "HELD", "it is unknown by now"
    assert nat.verdict(fragments(udp(CLIENT, 4000, SERVER, 53, LONG, id=2029), 1480)[1]) == "FORWARD"
    nat.out(udp(OTHER_CLIENT, 7, SERVER, 53))


def test_flush_gives_waiting_fragments_back() -> None:
    nat = Nat()
    nat.send(PARTS[2])
    assert [r.verdict for r in nat.core.flush()] == [Verdict.DROP_FRAGMENT]
    assert nat.counters()["datagrams"] == 0


# -- those that are made ----------------------------------------------------------------------------------------


def test_a_packet_that_is_too_long_leaves_in_fragments() -> None:
    expected = as_whole(udp(CLIENT, 4000, SERVER, 53, LONG[:1400], id=4))
    nat = small_mtu()
    result = nat.send(udp(CLIENT, 4000, SERVER, 53, LONG[:1400], id=4))
    assert result.verdict == Verdict.FRAGMENT
    assert [len(one) - 14 for one in result.frames] == [20 + 976, 20 + 432]
    assert bytes(together(result.frames)) == bytes(expected)
    assert nat.count("FRAGMENT") == 1
    counters = nat.counters()
    assert (counters["tx_packets.1"], counters["tx_bytes.1"]) == (2, sum(map(len, result.frames)))


def test_fragments_that_are_too_long_are_cut_further() -> None:
    for order in ((0, 1, 2), (1, 2, 0)):
        results = arrive(small_mtu(), [PARTS[i] for i in order])
        frames = [one for r in results for one in r.frames]
        assert len(frames) == 2 + 2 + 2
        assert max(map(len, frames)) <= 14 + EXTERNAL_MTU
        assert bytes(together(frames)) == bytes(as_whole(BIG))


def test_inbound_and_held_packets_are_cut_too() -> None:
    inside, outside = config().ports
    nat = Nat(ports=(replace(inside, mtu=EXTERNAL_MTU), outside), synchronous=True, hold=10)
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "HELD"
    nat.core.commit(nat.sessions())
    (out,) = (parse(r.frame) for r in nat.core.take())
    result = nat.send(udp(SERVER, 53, out.src, out[UDP].sport, LONG[:1400]), OUTSIDE)
    assert (result.verdict, len(result.frames), result.port) == (Verdict.FRAGMENT, 2, INSIDE)
    together(result.frames)
    pending = small_mtu(synchronous=True, hold=10)
    assert pending.verdict(udp(CLIENT, 4000, SERVER, 53, LONG[:1400])) == "HELD"
    pending.core.commit(pending.sessions())
    (held,) = pending.core.take()
    assert held.verdict == Verdict.FRAGMENT
    together(held.frames)
    assert pending.counters()["tx_packets.1"] == 2


def test_dont_fragment_is_obeyed() -> None:
    nat = small_mtu()
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53, LONG[:1400], flags="DF")) == "REPLY"
    nat.send(PARTS[0])
    later = PARTS[1].copy()
    later.flags = "MF+DF"
    later.chksum = None
    assert nat.verdict(later) == "DROP_TOO_BIG"


def test_options_are_copied_as_their_bit_says() -> None:
    """RFC 791, 3.1: record route stands in the first fragment only, the stream identifier in each."""
    record, stream = IPOption(b"\x07\x07\x04" + bytes(4)), IPOption(b"\x88\x04\x12\x34")
    nat = small_mtu()
    result = nat.send(udp(CLIENT, 4000, SERVER, 53, LONG[:1400], options=[record, stream]))
    assert result.verdict == Verdict.FRAGMENT
    headers = [one[34 : 14 + (one[14] & 15) * 4] for one in result.frames]
    assert headers == [b"\x07\x07\x04" + bytes(4) + b"\x88\x04\x12\x34" + b"\0", b"\x88\x04\x12\x34"]
    assert together(result.frames)[UDP].len == 1408


def test_a_packet_may_be_held_and_cut_for_a_new_next_hop() -> None:
    nat = small_mtu(routes=(*config().routes[:2], replace(config().routes[2], gateway_mac=None)))
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53, LONG[:1400])) == "HELD"
    nat.core.poll(nat.now)
    nat.raw(arp(OUTSIDE, 2, "02:00:00:00:01:fe", GATEWAY, OUR_ADDRESS[1], to="02:00:00:00:00:02"), OUTSIDE)
    (result,) = nat.core.take()
    assert (result.verdict, len(result.frames)) == (Verdict.FRAGMENT, 2)
    assert {one[:6].hex(":") for one in result.frames} == {"02:00:00:00:01:fe"}
    assert nat.forward(tcp(CLIENT, 1, SERVER, 2))[TCP].flags == "S"
