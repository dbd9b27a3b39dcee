# SPDX-License-Identifier: Apache-2.0
"""Properties of single packets and bursts: any bytes, any split into bursts, and what translation may change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Packet, Raw

from nat_fastpath.engine import Core, Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    SERVER,
    START,
    Nat,
    addresses,
    arp,
    check_sums,
    config,
    echo,
    fragments,
    frame,
    icmp_error,
    ip,
    mac_bytes,
    parse,
    retagged,
    tagged_ports,
    tcp,
    together,
    udp,
    vlan,
)

RELAXED = settings(max_examples=400, deadline=None, derandomize=True)
PORTS = st.integers(1, 65535)
HOSTS = st.sampled_from([CLIENT, OTHER_CLIENT])
PAYLOADS = st.binary(max_size=64)
FLAGS = st.sampled_from(["S", "SA", "A", "FA", "R"])


@st.composite
def good_packets(draw: Any) -> Packet:
    """A packet from inside that may pass."""
    source, payload = draw(HOSTS), draw(PAYLOADS)
    fields = {
        "ttl": draw(st.integers(2, 255)),
        "tos": draw(st.integers(0, 255)),
        "id": draw(st.integers(0, 65535)),
    }
    kind = draw(st.sampled_from(["udp", "udp without checksum", "tcp", "echo"]))
    if kind == "tcp":
        return tcp(source, draw(PORTS), SERVER, draw(PORTS), "S", payload, **fields)
    if kind == "echo":
        return echo(source, SERVER, draw(PORTS), payload=payload, **fields)
    check = 0 if "without" in kind else None
    return udp(source, draw(PORTS), SERVER, draw(PORTS), payload, check, **fields)


def templates(port: int) -> list[bytes]:
    """Frames that reach ``port`` and whose parts are spoiled; few endpoints, so that they meet."""
    packets = [
        *(tcp(host, 4000, SERVER, 80, flags) for host in (CLIENT, OTHER_CLIENT) for flags in ("S", "A", "R")),
        *(udp(host, sport, SERVER, 53) for host in (CLIENT, OTHER_CLIENT) for sport in (4000, 4001)),
        echo(CLIENT, SERVER, 7),
        echo(CLIENT, OUR_ADDRESS[port], 7),
        echo(SERVER, "198.51.100.10", 7, reply=True),
        udp(CLIENT, 4000, SERVER, 53, ttl=1),
        udp(SERVER, 53, "198.51.100.10", 4000),
        icmp_error(CLIENT, SERVER, udp(SERVER, 53, CLIENT, 4000)),
        icmp_error(SERVER, "198.51.100.10", tcp("198.51.100.10", 4000, SERVER, 80)),
        *fragments(udp(CLIENT, 4000, SERVER, 53, b"x" * 64), 32),
        ip(CLIENT, SERVER, proto=47) / Raw(b"x" * 16),
    ]
    made = [frame(packet, port) for packet in packets]
    return [*made, vlan(packets[0], 5, port), arp(port, 1, "02:00:0a:00:00:05", CLIENT, OUR_ADDRESS[port])]


TEMPLATES = {port: templates(port) for port in (INSIDE, OUTSIDE)}


@st.composite
def spoiled(draw: Any) -> tuple[int, bytes]:
    """A frame for any port: valid, with a few bytes changed, cut off, or nothing but bytes."""
    port = draw(st.sampled_from([INSIDE, OUTSIDE]))
    if draw(st.integers(0, 5)) == 0:
        return port, draw(st.binary(max_size=120))
    data = bytearray(draw(st.sampled_from(TEMPLATES[port])))
    for at, value in draw(
        st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=2)
    ):
        data[at] = value
    return port, bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@RELAXED
@given(st.lists(spoiled(), max_size=50), st.booleans())
def test_any_bytes_get_one_verdict(frames: list[tuple[int, bytes]], synchronous: bool) -> None:
    nat = Nat(synchronous=synchronous, hold=0.1)
    results = nat.burst(frames)
    assert len(results) == len(frames)
    nat.pump(2)
    held = [result for result in results if result.verdict == Verdict.HELD]
    taken = nat.core.take()
    assert len(taken) == len(held)
    assert all(result.verdict != Verdict.HELD for result in taken)
    assert int(nat.core.verdicts().sum()) == len(frames) + len(held)
    assert nat.count(Verdict.HELD) == len(held)
    assert nat.counters()["held"] == 0
    for result in results:
        assert bool(result.frame) == (result.verdict <= Verdict.FRAGMENT)


def body(packet: Packet) -> bytes:
    """What follows the transport header."""
    return bytes(packet.payload)[20 if packet.proto == 6 else 8 :]


@RELAXED
@given(good_packets())
def test_translation_and_its_inverse(packet: Packet) -> None:
    """Out, and the answer back: only addresses, ports, TTL and checksums change, and the way back undoes it."""
    nat = Nat()
    out = nat.out(packet)
    sent = parse(frame(packet))
    source, sport, destination, dport = addresses(sent)
    _, external_port, out_destination, out_dport = addresses(out)
    assert out_destination == destination
    assert out.ttl == sent.ttl - 1
    assert (out.tos, out.id, out.len, out.flags) == (sent.tos, sent.id, sent.len, sent.flags)
    assert body(out) == body(sent)
    if UDP in sent and sent[UDP].chksum == 0:
        assert out[UDP].chksum == 0
    elif UDP in sent:
        assert out[UDP].chksum != 0
    if sent.proto != 1:
        assert out_dport == dport

    back = IP(src=out.dst, dst=out.src, ttl=64, id=2)
    if sent.proto == 1:
        back = back / ICMP(type=0, id=external_port, seq=1) / sent[ICMP].payload
    elif sent.proto == 6:
        back = back / TCP(sport=dport, dport=external_port, flags="SA") / sent[TCP].payload
    else:
        back = back / UDP(sport=dport, dport=external_port) / sent[UDP].payload
    arrived = nat.back(back)
    assert (arrived.src, arrived.dst) == (destination, source)
    assert addresses(arrived)[3] == sport
    assert body(arrived) == body(parse(frame(back, OUTSIDE)))


@RELAXED
@given(st.integers(0, 65535), st.integers(1, 65535), st.integers(0, 1 << 32))
def test_checksums_at_their_edges(word: int, sport: int, seed: int) -> None:
    """A payload word that brings the UDP checksum through all its values, 0 and 0xffff among them."""
    nat = Nat(seed=seed)
    packet = udp(CLIENT, sport, SERVER, 53, word.to_bytes(2, "big"))
    whole = parse(frame(packet))
    # the word that makes the sum come out as nought is sent as 0xffff (RFC 768)
    special = udp(CLIENT, sport, SERVER, 53, ((word + whole[UDP].chksum) % 65535).to_bytes(2, "big"))
    for sent in (packet, special):
        out = nat.out(sent)
        assert out[UDP].chksum != 0
        assert nat.back(udp(SERVER, 53, out.src, out[UDP].sport, bytes(sent[UDP].payload)))[UDP].chksum != 0


@RELAXED
@given(st.lists(spoiled(), max_size=80), st.lists(st.integers(1, 40), max_size=20))
def test_any_split_into_bursts_is_the_same(frames: list[tuple[int, bytes]], sizes: list[int]) -> None:
    """One burst of n, n bursts of one, and any split between: the same frames, counters and sessions."""
    changes = {"seed": 11, "max_sessions": 24}
    whole, single, split = (Nat(**changes) for _ in range(3))
    expected = whole.burst(frames)
    assert [single.raw(data, port) for port, data in frames] == expected
    got, at = [], 0
    for size in [*sizes, len(frames)]:
        got += split.burst(frames[at : at + size])
        at += size
    assert got == expected
    sessions = whole.sessions()
    for other in (single, split):
        assert (other.core.verdicts() == whole.core.verdicts()).all()
        assert (other.sessions() == sessions).all()
        assert other.counters() == whole.counters()


def test_a_long_burst_of_known_flows() -> None:
    """More than two batches, inside and outside mixed, with new flows in the midst of known ones."""
    one, many = Nat(max_sessions=256), Nat(max_sessions=256)
    frames: list[tuple[int, bytes]] = []
    for at in range(100):
        out = one.send(udp(CLIENT, 4000 + at, SERVER, 53))
        many.send(udp(CLIENT, 4000 + at, SERVER, 53))
        answer = udp(SERVER, 53, parse(out.frame).src, parse(out.frame)[UDP].sport)
        frames += [
            (INSIDE, frame(udp(OTHER_CLIENT, 9000 + at, SERVER, 80))),
            (OUTSIDE, frame(answer, OUTSIDE)),
        ]
    expected = [one.raw(data, port) for port, data in frames]
    assert many.burst(frames) == expected
    assert all(result.verdict == Verdict.FORWARD for result in expected)
    for result in expected:
        check_sums(result.frame)


def test_seed_decides_ports() -> None:
    """The same seed, the same ports: what makes recorded cases possible."""
    first, second, third = (Core(replace(config(), seed=seed)) for seed in (5, 5, 6))
    frames = [(INSIDE, frame(udp(CLIENT, 4000 + at, SERVER, 53))) for at in range(20)]
    assert first.burst(frames, START) == second.burst(frames, START) != third.burst(frames, START)


def test_frames_to_others_are_not_ours() -> None:
    nat = Nat()
    data = bytearray(frame(udp(CLIENT, 4000, SERVER, 53)))
    data[:6] = mac_bytes(OUR_MAC[OUTSIDE])
    assert nat.raw(bytes(data)).verdict == Verdict.DROP_NOT_FOR_US


@st.composite
def cut_anyhow(draw: Any) -> tuple[Packet, list[Packet]]:
    """A datagram, and its fragments of any sizes in any order."""
    payload = draw(st.binary(min_size=64, max_size=400))
    fields = {"id": draw(st.integers(0, 65535))}
    packet = draw(
        st.sampled_from(
            [
                udp(CLIENT, 4000, SERVER, 53, payload, **fields),
                udp(CLIENT, 4000, SERVER, 53, payload, 0, **fields),
                tcp(CLIENT, 4000, SERVER, 80, "S", payload, **fields),
                echo(CLIENT, SERVER, 7, payload=payload, **fields),
            ]
        )
    )
    parts = fragments(packet, 8 * draw(st.integers(3, 20)))
    if draw(st.booleans()):  # one of them is cut once more on its way
        at = draw(st.integers(0, len(parts) - 1))
        parts[at : at + 1] = refragmented(parts[at])
    return packet, draw(st.permutations(parts))


def refragmented(part: Packet) -> list[Packet]:
    start, more = part.frag, part.flags.MF
    again = fragments(part, 24)
    for piece in again:
        piece.frag += start
    if more:
        again[-1].flags = "MF"
    return again


@settings(RELAXED, max_examples=100)
@given(cut_anyhow(), st.sampled_from([1500, 300, 68]), st.booleans(), st.integers(1, 40))
def test_fragments_become_what_the_whole_would(
    case: tuple[Packet, list[Packet]], mtu: int, synchronous: bool, size: int
) -> None:
    """However a datagram is cut, and in whatever order and bursts it comes: the same bytes reach the far end."""
    packet, parts = case
    expected = Nat().out(packet)
    inside, outside = config().ports
    nat = Nat(ports=(inside, replace(outside, mtu=mtu)), synchronous=synchronous, hold=10)
    results = []
    for at in range(0, len(parts), size):
        results += nat.burst([(INSIDE, frame(part)) for part in parts[at : at + size]])
        nat.core.poll(nat.now)
        results += nat.core.take()
    nat.core.commit(nat.sessions())
    for _ in range(4):
        nat.core.poll(nat.now)
    results += nat.core.take()
    sent = [one for result in results for one in result.frames]
    assert all(len(one) <= 14 + mtu for one in sent)
    assert bytes(together(sent)) == bytes(expected)
    held = sum(result.verdict == Verdict.HELD for result in results)
    assert nat.count(Verdict.FORWARD) + nat.count(Verdict.FRAGMENT) == len(parts)
    assert held <= 2 * len(parts)
    assert nat.counters()["held"] == 0
    assert nat.counters()["tx_packets.1"] == len(sent)


VLANS = st.sampled_from([(10, 0), (0, 20), (10, 20), (10, 10)])


@st.composite
def tagged_or_not(draw: Any, vlans: tuple[int, int]) -> tuple[int, bytes]:
    """A spoiled frame, mostly with the tag of its port."""
    port, data = draw(spoiled())
    own = draw(st.integers(0, 9)) != 0
    return port, retagged(data, vlans[port] if own else draw(st.sampled_from([0, 10, 20, 4095])))


@settings(RELAXED, max_examples=150)
@given(VLANS, st.data())
def test_tags_change_nothing_but_themselves(vlans: tuple[int, int], data: Any) -> None:
    """With their tags taken off, frames and sessions are those of a NAT without VLANs; wrong tags reach nothing."""
    frames = data.draw(st.lists(tagged_or_not(vlans), max_size=40))
    changes = {"seed": 11, "max_sessions": 24}
    nat, plain = Nat(ports=tagged_ports(*vlans), **changes), Nat(**changes)
    for port, sent in frames:
        result, vlan = nat.raw(sent, port), vlans[port]
        if not vlan or (len(sent) >= 18 and sent[12:16] == bytes((0x81, 0, 0, vlan))):
            expected = plain.raw(sent[:12] + sent[16:] if vlan else sent, port)
            assert (result.verdict, result.port) == (expected.verdict, expected.port)
            assert result.frames == tuple(retagged(one, vlans[result.port]) for one in expected.frames)
        else:
            assert result.verdict == (Verdict.DROP_VLAN if len(sent) >= 14 else Verdict.DROP_RUNT)
    assert (nat.sessions() == plain.sessions()).all()
