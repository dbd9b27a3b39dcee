# SPDX-License-Identifier: Apache-2.0
"""What happens where something ends: ports, table, quota, budget, event ring. Refused and counted, no more."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_fastpath.engine import EVENT_CLOSE, RECORD, Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    POOL,
    SERVER,
    Nat,
    check_sums,
    echo,
    external,
    frame,
    number,
    parse,
    records,
    small_pool,
    tcp,
    text,
    udp,
)


def opening(kind: str, port: int, client: str = CLIENT) -> Any:
    if kind == "tcp":
        return tcp(client, port, SERVER, 80)
    return udp(client, port, SERVER, 53) if kind == "udp" else echo(client, SERVER, port)


@pytest.mark.parametrize("mapping", ["endpoint-independent", "endpoint-dependent"])
@pytest.mark.parametrize("kind", ["udp", "tcp", "echo"])
def test_pool_of_64_exhausted_under_load(kind: str, mapping: str) -> None:
    """Nothing leaves untranslated, live flows go on, refused ones are counted (OVS's conntrack NAT fails here)."""
    nat = Nat(pool=small_pool(64), mapping=mapping)
    live, refused = set(range(64)), 0
    for at in range(64):
        assert nat.send(opening(kind, 4000 + at)).verdict == Verdict.FORWARD
    for round_ in range(5):
        burst = [at if at < 64 else 64 + at + round_ * 100 for at in range(128)]
        results = nat.burst([(INSIDE, frame(opening(kind, 4000 + at))) for at in burst])
        for at, result in zip(burst, results, strict=True):
            expected = Verdict.FORWARD if at in live else Verdict.DROP_NO_PORT
            assert result.verdict == expected
            refused += expected == Verdict.DROP_NO_PORT
            if result.frame:
                check_sums(result.frame)
                assert parse(result.frame).src == "198.51.100.10"
        nat.wait(10)
    assert nat.count("DROP_NO_PORT") == refused
    assert nat.counters()["sessions"] == 64


@pytest.mark.parametrize("ports", [1, 2, 63, 64, 65, 4096, 4097])
def test_each_single_freed_port_is_found_again(ports: int) -> None:
    """Bitmaps of one word, of several, and of more than one group: the one free port, wherever it is."""
    nat = Nat(pool=small_pool(ports), max_sessions=ports, event_ring=16384)
    frames = [(INSIDE, frame(udp(CLIENT, 4000 + at, SERVER, 53))) for at in range(ports)]
    assert all(result.verdict == Verdict.FORWARD for result in nat.burst(frames))
    nat.core.events()
    sessions = nat.sessions()
    assert len({external(record) for record in sessions}) == ports
    for at in {*range(min(ports, 65)), ports // 2, ports - 1}:
        assert nat.core.delete(sessions[at : at + 1]) == 1
        assert nat.out(udp(OTHER_CLIENT, 9000, SERVER, 53))["UDP"].sport == int(sessions[at]["external_port"])
        found = nat.core.find(17, (number(OTHER_CLIENT), 9000), (number(SERVER), 53))
        assert nat.core.delete(found) == 1
        nat.out(udp(CLIENT, int(sessions[at]["internal_port"]), SERVER, 53))
        sessions[at] = nat.core.find(
            17, (number(CLIENT), int(sessions[at]["internal_port"])), (number(SERVER), 53)
        )
        assert nat.send(udp(OTHER_CLIENT, 9001, SERVER, 53)).verdict in (
            Verdict.DROP_NO_PORT,
            Verdict.DROP_TABLE_FULL,
        )


def test_one_free_port_among_many_groups() -> None:
    """The search starts anywhere and wraps round: the free port may lie in any group of 4096, behind or ahead."""
    ports = 3 * 4096
    nat = Nat(pool=small_pool(ports), max_sessions=ports, event_ring=16384)
    rows = np.zeros(ports, RECORD)
    rows["id"] = 1 + np.arange(ports)
    rows["protocol"] = 17
    rows["internal_addr"], rows["internal_port"] = number(CLIENT), 2000 + np.arange(ports)
    rows["external_addr"], rows["external_port"] = number(POOL[0]), 2000 + np.arange(ports)
    rows["remote_addr"], rows["remote_port"] = number(SERVER), 53
    assert nat.core.install(rows) == ports
    for at in (0, 4095, 4096, 4101, 8191, 8192, ports - 1) * 4:
        assert nat.core.delete(rows[at : at + 1]) == 1
        assert nat.out(udp(OTHER_CLIENT, 9000, SERVER, 53))["UDP"].sport == 2000 + at
        nat.core.delete(nat.core.find(17, (number(OTHER_CLIENT), 9000), (number(SERVER), 53)))
        assert nat.core.install(rows[at : at + 1]) == 1


def test_table_full_is_refused_and_live_flows_go_on() -> None:
    nat = Nat(max_sessions=10)
    for at in range(15):
        expected = "FORWARD" if at < 10 else "DROP_TABLE_FULL"
        assert nat.verdict(udp(CLIENT, 4000 + at, SERVER, 53)) == expected
    for at in range(10):
        nat.out(udp(CLIENT, 4000 + at, SERVER, 53))
    assert nat.count("DROP_TABLE_FULL") == 5
    nat.wait(300)
    assert nat.verdict(udp(CLIENT, 4999, SERVER, 53)) == "FORWARD"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(0, 9), min_size=20, max_size=60))
def test_quotas_hold_for_each_host(sessions: int, mappings: int, flows: list[int]) -> None:
    nat = Nat(sessions_per_host=sessions, mappings_per_host=mappings)
    open_flows: set[int] = set()
    for flow in flows:
        # flows 0 to 4 and 5 to 9 share their five mappings
        packet = udp(CLIENT, 4000 + flow % 5, SERVER, 53 + flow // 5)
        used = {other % 5 for other in open_flows}
        full = len(open_flows) >= sessions or (flow % 5 not in used and len(used) >= mappings)
        assert nat.verdict(packet) == ("DROP_QUOTA" if full and flow not in open_flows else "FORWARD")
        if not full:
            open_flows.add(flow)
    assert nat.verdict(udp(OTHER_CLIENT, 4000, SERVER, 53)) == "FORWARD"
    host = {int(row["address"]): row for row in nat.core.hosts()}[number(CLIENT)]
    assert (int(host["sessions"]), int(host["refused"])) == (len(open_flows), nat.count("DROP_QUOTA"))


def test_budget_of_new_sessions() -> None:
    """A bucket of 5, refilled by 10 a second; what is known does not pay."""
    nat = Nat(new_sessions_rate=10, new_sessions_burst=5)
    verdicts = [nat.verdict(udp(CLIENT, 4000 + at, SERVER, 53)) for at in range(8)]
    assert verdicts == ["FORWARD"] * 5 + ["DROP_BUDGET"] * 3
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "FORWARD"
    nat.wait(0.2)
    verdicts = [nat.verdict(udp(CLIENT, 5000 + at, SERVER, 53)) for at in range(3)]
    assert verdicts == ["FORWARD", "FORWARD", "DROP_BUDGET"]


def test_host_at_its_quota_does_not_spend_the_others_budget() -> None:
    nat = Nat(new_sessions_rate=10, new_sessions_burst=5, sessions_per_host=1)
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "FORWARD"
    assert {nat.verdict(udp(CLIENT, 4001 + at, SERVER, 53)) for at in range(20)} == {"DROP_QUOTA"}
    assert nat.verdict(udp(OTHER_CLIENT, 4000, SERVER, 53)) == "FORWARD"


def test_full_event_ring_pushes_back_on_new_flows_only() -> None:
    """No event is lost: an eighth of the ring is kept for closes and updates, which wait when that is full too."""
    nat = Nat(event_ring=16)
    verdicts = [nat.verdict(udp(CLIENT, 4000 + at, SERVER, 53)) for at in range(20)]
    assert verdicts == ["FORWARD"] * 14 + ["DROP_EVENTS_FULL"] * 6
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.wait(301)
    assert nat.counters()["sessions"] == 12, "two closes found room"
    events = []
    for _ in range(4):
        events += list(nat.core.events())
        nat.wait(1)
    assert [int(event["sequence"]) for event in events] == list(range(28))
    assert sum(int(event["type"]) == EVENT_CLOSE for event in events) == 14
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "FORWARD"


def test_port_rests_before_it_is_used_again() -> None:
    nat = Nat(pool=small_pool(1), quarantine=120)
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.core.delete(nat.sessions())
    assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "DROP_NO_PORT"
    nat.wait(119.9)
    assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "DROP_NO_PORT"
    nat.wait(2)
    assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "FORWARD"


def test_resting_ports_return_in_order_and_all() -> None:
    nat = Nat(pool=small_pool(64), quarantine=10)
    for at in range(64):
        nat.out(udp(CLIENT, 4000 + at, SERVER, 53))
    for record in nat.sessions():
        nat.core.delete(record)
        nat.wait(0.1)
    nat.wait(11)
    assert all(nat.verdict(udp(CLIENT, 4000 + at, SERVER, 53)) == "FORWARD" for at in range(64))


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_colliding_flow_hashes_are_refused_not_scanned(direction: str) -> None:
    """5-tuples with one and the same hash have 16 places; the seventeenth session is refused, nothing else is."""
    nat = Nat(pool=small_pool(60000), max_sessions=4096)
    rows = colliding(direction, 40)
    assert nat.core.install(records(rows)) == 16
    assert nat.counters()["sessions"] == 16
    # the others can still be looked up, refused as packets, and the table serves everybody else
    for row in rows[16:]:
        assert (
            nat.core.find(
                17, (row["internal_addr"], row["internal_port"]), (row["remote_addr"], row["remote_port"])
            )
            is None
        )
    assert nat.out(udp(OTHER_CLIENT, 4000, SERVER, 53)).src == "198.51.100.10"
    assert nat.core.delete(nat.sessions()) == 17
    assert nat.core.install(records(rows[16:32])) == 16


def test_packet_with_a_colliding_hash_is_dropped_as_table_full() -> None:
    nat = Nat(pool=small_pool(60000), max_sessions=4096)
    rows = colliding("outbound", 17)
    nat.core.install(records(rows[:16]))
    last = rows[16]
    packet = udp(
        text(last["internal_addr"]), last["internal_port"], text(last["remote_addr"]), last["remote_port"]
    )
    assert nat.verdict(packet) == "DROP_TABLE_FULL"
    before = nat.counters()["sessions"]
    assert nat.verdict(packet) == "DROP_TABLE_FULL"
    assert nat.counters()["sessions"] == before, "what was taken for it was given back"


def fnv1a(data: bytes, h: int = 2166136261) -> int:
    """FNV-1a, 32 bit (the final mix of the core is a bijection, so equal here is equal there)."""
    for byte in data:
        h = (h ^ byte) * 16777619 & 0xFFFFFFFF
    return h


def colliding(direction: str, n: int) -> list[dict[str, int]]:
    """``n`` sessions whose keys in this direction have one hash.

    Each step of FNV-1a can be undone, so two halves meet in the middle: forwards over the addresses and the
    first port, backwards from the wanted hash over the protocol and every second port.
    """
    wanted, inverse = 0x1234567, pow(16777619, -1, 1 << 32)
    second_of = {}
    for port in range(2000, 62000):
        state = wanted
        for byte in reversed(port.to_bytes(2, "big") + b"\x11"):
            state = state * inverse & 0xFFFFFFFF ^ byte
        second_of[state] = port
    pool, rows = number(POOL[0]), []
    for host, server in product(range(2, 250), range(1, 250)):
        inside, remote = number("10.0.0.0") + host, number("203.0.113.0") + server
        ends = (inside, remote) if direction == "outbound" else (remote, pool)
        prefix = fnv1a(b"".join(end.to_bytes(4, "big") for end in ends))
        for first in range(2000 + host, 62000, 257):
            second = second_of.get(fnv1a(first.to_bytes(2, "big"), prefix))
            if second is None:
                continue
            other = 2000 + len(rows)
            ports = (first, second, other) if direction == "outbound" else (other, first, second)
            row = {"id": 1 + len(rows), "protocol": 17, "internal_addr": inside, "remote_addr": remote}
            row |= {"external_addr": pool}
            row |= zip(("internal_port", "remote_port", "external_port"), ports, strict=True)
            rows.append(row)
            if len(rows) == n:
                return rows
    raise AssertionError("not enough collisions in this range")
