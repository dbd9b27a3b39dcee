# SPDX-License-Identifier: Apache-2.0
"""A trace tells the decisions for the next packets of a flow, ends by itself, and changes none of them."""

from __future__ import annotations

from typing import Any

import pytest

from nat_fastpath.engine import TCP_STATES, Trace, Verdict
from tests.packets import (
    CLIENT,
    GATEWAY_MAC,
    INSIDE,
    OTHER_CLIENT,
    OUTSIDE,
    SERVER,
    Nat,
    external,
    frame,
    mac_bytes,
    number,
    retagged,
    tagged_ports,
    tcp,
    text,
    udp,
)


def start(nat: Nat, packets: int = 10, seconds: float = 5, **flow: int) -> int:
    nat.core.poll(nat.now)  # its time begins with what the core was last told
    token = nat.core.trace_start(packets, seconds, **flow)
    assert token
    return token


def read(nat: Nat, token: int) -> Trace:
    nat.core.poll(nat.now)
    return nat.core.trace_read(token)


def ends(entry: Any, suffix: str = "") -> tuple[str, int, str, int]:
    return (
        text(entry[f"source{suffix}"]),
        int(entry[f"source_port{suffix}"]),
        text(entry[f"destination{suffix}"]),
        int(entry[f"destination_port{suffix}"]),
    )


def test_both_directions_of_a_flow_with_what_they_became() -> None:
    nat = Nat()
    token = start(nat, internal_addr=number(CLIENT), internal_port=4000, protocol=6)
    nat.out(tcp(CLIENT, 4000, SERVER, 80))
    nat.out(udp(CLIENT, 4000, SERVER, 80))  # another protocol
    nat.out(tcp(OTHER_CLIENT, 4000, SERVER, 80))  # another host
    outside = external(nat.sessions()[0])
    nat.back(tcp(SERVER, 80, *outside, "SA"))
    trace = read(nat, token)
    assert [ends(entry) for entry in trace.entries] == [
        (CLIENT, 4000, SERVER, 80),
        (SERVER, 80, *outside),
    ]
    assert [ends(entry, "_after") for entry in trace.entries] == [
        (*outside, SERVER, 80),
        (SERVER, 80, CLIENT, 4000),
    ]
    first, second = trace.entries
    assert (first["verdict"], first["port"], first["port_after"]) == (Verdict.FORWARD, INSIDE, OUTSIDE)
    assert int(first["next_hop_mac"]) == int.from_bytes(mac_bytes(GATEWAY_MAC), "big")
    assert [TCP_STATES[entry["tcp_state"]] for entry in (first, second)] == ["syn_out", "syn_both"]
    assert first["session"] == second["session"] == nat.sessions()[0]["id"]
    assert (first["tcp_flags"], second["tcp_flags"]) == (0x02, 0x12)
    assert trace.running
    assert trace.packets == 8
    assert not trace.missed
    assert not len(read(nat, token).entries), "told once"


@pytest.mark.parametrize("vlans", [(5, 0), (0, 7), (5, 7)])
def test_tags_make_no_difference(vlans: tuple[int, int]) -> None:
    nat = Nat(ports=tagged_ports(*vlans))
    token = start(nat, internal_addr=number(CLIENT))
    assert nat.raw(retagged(frame(udp(CLIENT, 4000, SERVER, 53)), vlans[0])).verdict == Verdict.FORWARD
    outside = external(nat.sessions()[0])
    answer = retagged(frame(udp(SERVER, 53, *outside), OUTSIDE), vlans[1])
    assert nat.raw(answer, OUTSIDE).verdict == Verdict.FORWARD
    entries = read(nat, token).entries
    assert [ends(entry) for entry in entries] == [(CLIENT, 4000, SERVER, 53), (SERVER, 53, *outside)]
    assert [ends(entry, "_after") for entry in entries] == [
        (*outside, SERVER, 53),
        (SERVER, 53, CLIENT, 4000),
    ]
    assert set(entries["session"]) == {nat.sessions()[0]["id"]}


def test_a_dropped_packet_says_why() -> None:
    nat = Nat()
    token = start(nat, external_addr=number("198.51.100.10"), external_port=2000)
    assert nat.verdict(udp(SERVER, 53, "198.51.100.10", 2000), OUTSIDE) == "DROP_NO_MAPPING"
    (entry,) = read(nat, token).entries
    assert entry["verdict"] == Verdict.DROP_NO_MAPPING
    assert entry["next_hop_mac"] == 0
    assert entry["session"] == 0
    assert ends(entry) == ends(entry, "_after")


def test_it_ends_after_so_many_packets() -> None:
    nat = Nat()
    token = start(nat, packets=2)
    for _ in range(3):
        nat.out(udp(CLIENT, 4000, SERVER, 53))
    trace = read(nat, token)
    assert len(trace.entries) == 2
    assert not trace.running
    assert not trace.packets


def test_it_ends_in_time_with_no_packet_at_all() -> None:
    nat = Nat()
    token = start(nat, seconds=5)
    nat.pump(5.1, step=1)
    assert not read(nat, token).running
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    assert not len(read(nat, token).entries)


def test_one_at_a_time_and_none_reads_anothers() -> None:
    nat = Nat()
    token = start(nat, packets=2)
    assert nat.core.trace_start(1, 1) is None
    nat.core.trace_read(token, stop=True)
    following = start(nat)
    assert following != token
    with pytest.raises(KeyError):
        nat.core.trace_read(token, stop=True)
    assert read(nat, following).running


def test_what_nobody_reads_is_counted() -> None:
    nat = Nat()
    token = start(nat, packets=300)
    for _ in range(300):
        nat.out(udp(CLIENT, 4000, SERVER, 53))
    trace = read(nat, token)
    assert (len(trace.entries), trace.missed, trace.running) == (256, 44, False)


def test_a_packet_that_waited_is_told_twice() -> None:
    nat = Nat(synchronous=True)
    token = start(nat)
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "HELD"
    nat.core.commit(nat.sessions())
    (result,) = nat.core.take()
    assert result.verdict == Verdict.FORWARD
    held, sent = read(nat, token).entries
    assert (held["verdict"], held["was_held"], ends(held)) == (Verdict.HELD, 0, (CLIENT, 4000, SERVER, 53))
    assert (sent["verdict"], sent["was_held"]) == (Verdict.FORWARD, 1)
    assert ends(sent)[2:] == (SERVER, 53)


def test_a_traced_core_does_and_counts_the_same() -> None:
    plain, traced = Nat(), Nat()
    start(traced, packets=1000, seconds=1000)
    for nat in (plain, traced):
        nat.out(tcp(CLIENT, 4000, SERVER, 80))
        nat.back(tcp(SERVER, 80, *external(nat.sessions()[0]), "SA"))
        nat.out(tcp(CLIENT, 4000, SERVER, 80, "A", payload=b"x" * 100))
        nat.verdict(udp(SERVER, 53, "198.51.100.10", 2000), OUTSIDE)
        nat.verdict(udp(CLIENT, 53, SERVER, 53, ttl=1))
    assert plain.core.verdicts().tolist() == traced.core.verdicts().tolist()
    assert bytes(plain.sessions()) == bytes(traced.sessions())
    same = [{k: v for k, v in nat.counters().items() if k != "commands"} for nat in (plain, traced)]
    assert same[0] == same[1]
