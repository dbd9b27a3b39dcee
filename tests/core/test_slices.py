# SPDX-License-Identifier: Apache-2.0
"""Several cores: whose a frame is, and what one core hands to another."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from nat_fastpath.engine import SLICE_ALL, SLICE_ANY, STEP_KINDS, Core, Verdict, slice_of
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
    SECOND,
    SERVER,
    START,
    arp,
    check_sums,
    config,
    echo,
    external,
    fragments,
    frame,
    host_mac,
    icmp_error,
    number,
    parse,
    retagged,
    tcp,
    text,
    udp,
)
from tests.spread import SLICE, Spread, host_slice, port_slice

ROOT = Path(__file__).parents[2]
SIDES = ("internal", "external")
ADDRESSES = st.integers(0x0A000000, 0x0AFFFFFF).map(text)
PORTS = st.integers(0, 65535)
QUOTED = st.sampled_from(["udp", "tcp", "query"])


def made(kind: str, source: str, sport: int, destination: str, dport: int) -> Packet:
    if kind in ("udp", "tcp"):
        return {"udp": udp, "tcp": tcp}[kind](source, sport, destination, dport)
    return echo(source, destination, sport if kind == "query" else dport, reply=kind == "answer")


@settings(max_examples=400)
@given(
    st.integers(1, 32), st.sampled_from(SIDES), st.sampled_from(["udp", "tcp", "query", "answer", "error"]),
    QUOTED, ADDRESSES, ADDRESSES, PORTS, PORTS, st.sampled_from([0, 7]), st.integers(0, 2),
)  # fmt: skip
def test_whose_a_packet_is(
    n: int, side: str, kind: str, about: str, source: str, destination: str, sport: int, dport: int,
    vlan: int, fragment: int,
) -> None:  # fmt: skip
    """Inside by its host and outside by its external port: a packet and its answer have one owner."""
    if kind == "error":
        if about == "query" and side == "internal":
            about = "answer"
        # quoted is what went the other way: to this host from inside, from this port outside
        packet = icmp_error(source, destination, made(about, destination, dport, source, sport))
        host, port = source, dport
        packet.src = "10.9.9.9"  # a router's word counts for its host
    else:
        packet = made(kind, source, sport, destination, dport)
        host, port = source, dport
    if fragment:
        packet = fragments(packet, 24)[min(fragment, len(fragments(packet, 24))) - 1]
        host = packet.src
    if side == "internal":
        expected = host_slice(number(host), n)
    elif packet.flags.MF or packet.frag:
        expected = 0
    else:
        expected = SLICE_ANY if kind == "query" else port_slice(port, n)
    assert slice_of(retagged(frame(packet), vlan), side, n) == expected


@given(st.binary(max_size=90), st.sampled_from(SIDES), st.integers(1, 32))
def test_any_bytes_have_an_owner(data: bytes, side: str, n: int) -> None:
    for ethertype in (b"", b"\x08\x00E", b"\x08\x06"):
        owner = slice_of(data[:12] + ethertype + data[12:], side, n)
        assert owner < n or owner in (SLICE_ANY, SLICE_ALL)


@pytest.mark.parametrize("n", [2, 3, 8, 32])
def test_slices_are_even(n: int) -> None:
    """128 addresses in a row, and 256 ports, fall into all slices alike."""
    for start in (0x0A000000, 0xC0A80100, 0x64400080):
        counts = [0] * n
        for address in range(start, start + 128):
            counts[slice_of(frame(udp(text(address), 1, SERVER, 1)), "internal", n)] += 1
        assert max(counts) - min(counts) <= 1
    ports = [port_slice(port, n) for port in range(1024, 1024 + 256)]
    assert max(map(ports.count, range(n))) - min(map(ports.count, range(n))) <= 2
    assert all(port_slice(port, n) == port_slice(port + 1, n) for port in range(0, 65536, 502))


# DPDK's own software hash, on the keys and with the groups of slices.h
SOFTRSS = r"""
#include <stdio.h>
#include <rte_thash.h>
#include "slices.h"

int main(void)
{
    uint8_t keys[2][SLICE_KEY_BYTES];
    uint64_t state = 7;
    slices_host_key(keys[0]);
    slices_port_key(keys[1]);
    for (unsigned i = 0; i < 200000; i++) {
        uint32_t tuple[3]; /* addresses and ports, as rte_softrss wants them: in host order */
        for (unsigned k = 0; k < 3; k++)
            tuple[k] = (uint32_t)((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 32);
        for (unsigned length = 2; length <= 3; length++)
            if ((rte_softrss(tuple, length, keys[0]) & 127) != slice_host_group(tuple[0]))
                return printf("host %08x: %x\n", tuple[0], rte_softrss(tuple, length, keys[0])), 1;
        if ((rte_softrss(tuple, 3, keys[1]) & 127) != slice_port_group((uint16_t)tuple[2]))
            return printf("port %u\n", tuple[2] & 65535), 1;
        if (rte_softrss(tuple, 2, keys[1]) & 127)
            return printf("without ports it is the first queue's\n"), 1;
    }
    return puts("all agree") < 0;
}
"""


def test_rss_computes_the_same(tmp_path: Path) -> None:
    source, program = tmp_path / "softrss.c", tmp_path / "softrss"
    source.write_text(SOFTRSS)
    flags = subprocess.run(["pkg-config", "--cflags", "libdpdk"], check=True, capture_output=True, text=True)
    command = ["gcc", "-O2", f"-I{ROOT / 'nat_fastpath/core'}", *flags.stdout.split(), "-o", program, source]
    subprocess.run(command, check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=False).stdout == "all agree\n"


# -- between cores ------------------------------------------------------------------------------------------


def opened(nat: Spread, client: str = CLIENT, port: int = 4000) -> tuple[str, int]:
    """The external endpoint of a session of this client."""
    [result] = nat.burst([(INSIDE, frame(udp(client, port, SERVER, 53)))], START)
    assert result.verdict == Verdict.FORWARD
    return parse(result.frame).src, parse(result.frame)[UDP].sport


def hairpin(nat: Spread, **changes: Any) -> tuple[bytes, tuple[str, int]]:
    """A frame from one client to the external endpoint of the other, whose core is another one."""
    to = opened(nat)
    assert port_slice(to[1], nat.n) != host_slice(number(OTHER_CLIENT), nat.n)
    return frame(udp(OTHER_CLIENT, 4001, *to, **changes)), to


def test_a_hairpin_between_two_cores() -> None:
    nat = Spread(config(filtering="endpoint-independent"), 2)
    data, _ = hairpin(nat)
    first = nat.cores[0].burst([(INSIDE, data)], START)[0]
    assert (first.verdict, first.port, first.frames) == (Verdict.HANDOFF, INSIDE, ())
    assert first.handoff & SLICE == 1
    [second] = nat.cores[1].handed([(first.port, first.frame, first.handoff)], START)
    assert (second.verdict, second.port) == (Verdict.FORWARD, INSIDE)
    check_sums(second.frame)
    arrived = parse(second.frame)
    assert (arrived.dst, arrived[UDP].dport, arrived.ttl) == (CLIENT, 4000, 63)
    # the answer goes the same way back, to the endpoint that it came from
    [back] = nat.burst([(INSIDE, frame(udp(CLIENT, 4000, arrived.src, arrived[UDP].sport)))], START)
    assert (parse(back.frame).dst, parse(back.frame)[UDP].dport) == (OTHER_CLIENT, 4001)
    assert nat.handoffs == 1
    counters = [core.counters() for core in nat.cores]
    assert [c["rx_packets.0"] for c in counters] == [1, 2], "counted where it was received"
    assert [c["tx_packets.0"] for c in counters] == [1, 1]
    assert int(nat.verdicts()[Verdict.HANDOFF]) == 2


def test_the_other_half_of_a_hairpin_is_not_taken_from_a_wire() -> None:
    nat = Spread(config(filtering="endpoint-independent"), 2)
    data, to = hairpin(nat)
    [result] = nat.burst([(INSIDE, data)], START)
    sent = parse(result.frame)
    forged = frame(udp(sent.src, sent[UDP].sport, *to), OUTSIDE)
    assert nat.burst([(OUTSIDE, forged)], START)[0].verdict == Verdict.DROP_ADDRESS


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_hairpin_that_waits_for_its_commit(order: tuple[int, ...]) -> None:
    """In fragments, in any order: released, they still go to the other core."""
    nat = Spread(config(filtering="endpoint-independent", synchronous=True, hold=10), 2)
    opening = frame(udp(CLIENT, 4000, SERVER, 53))
    assert nat.burst([(INSIDE, opening)], START)[0].verdict == Verdict.HELD
    nat.commit(nat.sessions()[0])
    to = external(nat.sessions()[0][0])
    assert [r.verdict for r in nat.take(START)] == [Verdict.FORWARD]
    parts = fragments(udp(OTHER_CLIENT, 4001, *to, bytes(3000), id=9), 1480)
    sent = nat.burst([(INSIDE, frame(parts[i])) for i in order], START)
    for _ in range(6):
        nat.poll(START)
        nat.commit(nat.sessions()[0])
        sent += nat.take(START)
    arrived = [parse(result.frame) for result in sent if result.verdict == Verdict.FORWARD]
    assert [piece.dst for piece in arrived] == [CLIENT] * 3
    assert nat.counters()["held"] == 0


def test_fragments_whose_first_never_comes_are_dropped_once() -> None:
    nat = Spread(config(), 2)
    opened(nat)
    part = fragments(udp(SERVER, 53, POOL[0], 7777, bytes(3000)), 1480)[1]
    assert nat.burst([(OUTSIDE, frame(part, OUTSIDE))], START)[0].verdict == Verdict.HELD
    for step in range(50):
        nat.poll(START + step * SECOND // 10)
    assert [r.verdict for r in nat.take(START)] == [Verdict.DROP_FRAGMENT]


def test_all_learn_from_arp_and_one_answers() -> None:
    nat = Spread(config(neighbours=()), 3)
    hosts = [CLIENT, OTHER_CLIENT, "10.0.0.22"]  # one of each core
    assert {host_slice(number(host), 3) for host in hosts} == {0, 1, 2}
    for host in hosts:  # and each core will want the gateway, and knows its MAC by configuration
        nat.burst([(INSIDE, frame(udp(host, 4000, SERVER, 53)))], START)
    question = arp(INSIDE, 1, "02:00:00:00:0b:0b", OTHER_CLIENT, OUR_ADDRESS[INSIDE])
    before = nat.verdicts()
    [answer] = nat.burst([(INSIDE, question)], START)
    assert answer.verdict == Verdict.REPLY
    assert Ether(answer.frame)[ARP].hwsrc == OUR_MAC[INSIDE]
    assert int((nat.verdicts() - before).sum()) == 1, "copies are counted nowhere"
    assert nat.counters()["rx_packets.0"] == 4
    [known] = [n for n in nat.cores[0].neighbours() if text(n["address"]) == OTHER_CLIENT]
    assert int(known["mac"]) == 0x020000000B0B, "the core that needs it has learned it, whoever answered"
    assert all(text(n["address"]) != OTHER_CLIENT for core in nat.cores[1:] for n in core.neighbours())


def test_an_arp_answer_reaches_who_asked() -> None:
    """And is no bad ARP for the core that receives it, and has not asked."""
    nat = Spread(config(neighbours=(), routes=config().routes[:2]), 2)
    for host in (CLIENT, OTHER_CLIENT):
        to = "198.51.100.77" if host == CLIENT else "198.51.100.78"
        assert nat.burst([(INSIDE, frame(udp(host, 4000, to, 53)))], START)[0].verdict == Verdict.HELD
    asked = {Ether(data)[ARP].pdst for port, data in nat.outbox() if port == OUTSIDE}
    assert asked == {"198.51.100.77", "198.51.100.78"}
    for address in sorted(asked) * 2:  # by either worker
        reply = arp(
            OUTSIDE, 2, GATEWAY_MAC, address, OUR_ADDRESS[OUTSIDE], OUR_MAC[OUTSIDE], OUR_MAC[OUTSIDE]
        )
        assert nat.burst([(OUTSIDE, reply)], START)[0].verdict == Verdict.CONSUMED
    assert [r.verdict for r in nat.take(START)] == [Verdict.FORWARD] * 2
    stranger = arp(OUTSIDE, 1, GATEWAY_MAC, GATEWAY, "198.51.100.99")
    assert nat.burst([(OUTSIDE, stranger)], START)[0].verdict == Verdict.DROP_ARP


def test_the_first_core_announces() -> None:
    nat = Spread(config(), 2)
    for core in nat.cores:
        core.announce()
    nat.poll(START)
    assert len(nat.cores[0].outbox()) == 2 + 4  # its own addresses and the pool's
    assert nat.cores[1].outbox() == []


def test_ids_are_unique_across_cores() -> None:
    nat = Spread(config(), 3)
    for i in range(60):
        opened(nat, f"10.0.0.{20 + i % 30}", 4000 + i)
    counters = {int(r["id"]) & 0xFFFFFFFF for r in nat.sessions()[0]}
    assert len(counters) == 60
    nat.check()
    for i, core in enumerate(nat.cores):
        records, _ = core.sessions()
        assert {int(r["id"]) % (1 << 32) % 3 for r in records} == {i}
        assert {int(r["mapping_id"]) % (1 << 32) % 3 for r in records} == {i}


def test_explaining_goes_from_core_to_core() -> None:
    nat = Spread(config(filtering="endpoint-independent"), 2)
    data, _ = hairpin(nat)
    [asked] = nat.cores[1].explain(INSIDE, data).steps
    assert (STEP_KINDS[asked["kind"]], int(asked["value"])) == ("handoff", 0)
    told = nat.explain(INSIDE, data)
    steps = [STEP_KINDS[kind] for kind in told.steps["kind"]]
    assert told.verdict == Verdict.FORWARD
    assert steps.index("hairpin") < len(steps) - 1 - steps[::-1].index("handoff") < steps.index("next_hop")
    assert told.frame == nat.burst([(INSIDE, data)], START)[0].frame


def test_a_trace_sees_both_halves() -> None:
    nat = Spread(config(filtering="endpoint-independent"), 2)
    data, to = hairpin(nat)
    nat.poll(START)
    tokens = [core.trace_start(10, 60) for core in nat.cores]
    nat.burst([(INSIDE, data), (INSIDE, arp(INSIDE, 1, host_mac(CLIENT), CLIENT, "10.0.0.99"))], START)
    [first], [second] = (core.trace_read(t).entries for core, t in zip(nat.cores, tokens, strict=True))
    assert (first["verdict"], second["verdict"]) == (Verdict.HANDOFF, Verdict.FORWARD)
    assert text(first["source"]) == OTHER_CLIENT
    assert (first["source_after"], first["source_port_after"]) == (second["source"], second["source_port"])
    assert (text(second["destination"]), int(second["destination_port"])) == to
    assert text(second["destination_after"]) == CLIENT
    assert first["session"] != second["session"] != 0


def test_a_core_with_every_slice_hands_nothing_over() -> None:
    """The agent of a pair: one core with the ports of all slices."""

    core = Core(replace(config(filtering="endpoint-independent"), n_slices=4, slice=None))
    for client in (CLIENT, OTHER_CLIENT):
        core.burst([(INSIDE, frame(udp(client, 4000, SERVER, 53)))], START)
    records, _ = core.sessions()
    assert [port_slice(external(r)[1], 4) for r in records] == [
        host_slice(int(r["internal_addr"]), 4) for r in records
    ]
    assert sorted(int(r["id"]) & 0xFFFFFFFF for r in records) == [1, 2]
    to = external(records[0])
    parts = fragments(udp(OTHER_CLIENT, 4001, *to, bytes(2000)), 1480)
    results = core.burst([(INSIDE, frame(part)) for part in parts], START)
    assert [r.verdict for r in results] == [Verdict.FORWARD] * 2
    ping = echo(OTHER_CLIENT, POOL[0], 7)
    assert core.burst([(INSIDE, frame(ping))], START)[0].verdict == Verdict.REPLY
