# SPDX-License-Identifier: Apache-2.0
"""Which external port a mapping gets, and when a freed one is given out again."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from ctypes import CDLL, c_uint8, c_uint32
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_fastpath.core_config import PoolRange
from nat_fastpath.engine import RECORD, CoreError, Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    POOL,
    SERVER,
    Nat,
    echo,
    number,
    small_pool,
    tcp,
    udp,
    udp_flows,
)

CORE = Path(__file__).parents[2] / "nat_fastpath" / "core"


def taken(nat: Nat, wanted: int, client: str = CLIENT) -> int:
    return int(nat.out(udp(client, wanted, SERVER, 53))["UDP"].sport)


def all_taken(nat: Nat, wanted: range) -> set[int]:
    """The external ports of new flows from these inside ports, each of which gets one."""
    verdicts = {
        one.verdict
        for one in nat.burst([(INSIDE, f) for f in udp_flows(CLIENT, ((w, SERVER, 53) for w in wanted))])
    }
    assert verdicts == {Verdict.FORWARD}
    rows = nat.sessions()
    return set(rows["external_port"][np.isin(rows["internal_port"], wanted)].tolist())


def record(port: int, *, id_: int = 1, internal_port: int = 4000) -> Any:
    row = np.zeros(1, RECORD)
    row["id"], row["protocol"] = id_, 17
    row["internal_addr"], row["internal_port"] = number(CLIENT), internal_port
    row["external_addr"], row["external_port"] = number(POOL[0]), port
    row["remote_addr"], row["remote_port"] = number(SERVER), 53
    return row


# -- choice ------------------------------------------------------------------------------------------------


def test_random_numbers_are_those_of_rfc_8439(tmp_path: Path) -> None:
    """Section 2.3.2 of the RFC: its key, counter and nonce, its block."""
    compiler = shutil.which("cc")
    assert compiler
    library = tmp_path / "random.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, CORE / "random.c"], check=True)
    source = (c_uint32 * 33)()
    random = CDLL(str(library))
    random.random_start(source, (c_uint32 * 8).from_buffer_copy(bytes(range(32))))
    source[12:16] = [1, 0x09000000, 0x4A000000, 0]
    random.random_block(source)
    assert bytes(source)[64:80].hex() == "10f1e7e4d13b5915500fdd1fa32071c4"
    assert bytes(source)[112:128].hex() == "b5129cd1de164eb9cbd083e8a2503c4e"
    assert source[12] == 2, "the next block is another one"


def test_ports_of_two_starts_differ_and_of_one_seed_do_not() -> None:
    def ports(seed: int) -> list[int]:
        nat = Nat(pool=small_pool(60000), seed=seed)
        return [taken(nat, 4000 + at) for at in range(40)]

    assert ports(0) != ports(0)
    assert ports(3) == ports(3) != ports(4)


def test_ports_are_spread_over_all_ranges_evenly() -> None:
    """A hole draws nothing to the port behind it. 16 cells of 500 expected draws; 5 sigma is 108."""
    ranges = ((2000, 2999), (10000, 16999))
    nat = Nat(pool=small_pool(30000), port_ranges=ranges, max_sessions=8000, event_ring=16384)
    cells: Counter[int] = Counter()
    for _ in range(4):
        for port in all_taken(nat, range(4000, 6000)):
            cells[(port - 2000 if port < 3000 else port - 9000) // 500] += 1
        nat.core.delete(nat.sessions())
        nat.core.events()
    assert sorted(cells) == list(range(16))
    assert all(abs(n - 500) < 108 for n in cells.values()), cells


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    first=st.integers(990, 1060),
    cuts=st.lists(st.integers(0, 90), min_size=2, max_size=8, unique=True).filter(lambda c: len(c) % 2 == 0),
    parity=st.booleans(),
    preservation=st.booleans(),
    kind=st.sampled_from(["udp", "tcp", "icmp"]),
    wanted=st.lists(st.integers(980, 1160), min_size=130, max_size=130),
)
def test_every_port_is_found_whatever_is_preferred(
    first: int, cuts: list[int], parity: bool, preservation: bool, kind: str, wanted: list[int]
) -> None:
    """Preferences are kept where a port allows it, counted where not, and never refuse one that is free."""
    edges = sorted(cuts)
    ranges = tuple((first + low, first + high) for low, high in zip(edges[::2], edges[1::2], strict=True))
    free = {port for low, high in ranges for port in range(low, high + 1)}
    existing = set(free)
    nat = Nat(
        pool=small_pool(100, first=first), port_ranges=ranges, port_parity=parity,
        port_preservation=preservation,
    )  # fmt: skip
    missed = {"parity_missed": 0, "class_missed": 0}
    for at, port in enumerate(wanted):
        client = f"10.0.0.{20 + at}"
        packet = {
            "udp": lambda c=client, p=port: udp(c, p, SERVER, 53),
            "tcp": lambda c=client, p=port: tcp(c, p, SERVER, 80),
            "icmp": lambda c=client, p=port: echo(c, SERVER, p),
        }[kind]()  # fmt: skip
        if not free:
            assert nat.verdict(packet) == "DROP_NO_PORT"
            continue
        nat.out(packet)
        found = nat.sessions()
        got = int(found["external_port"][found["internal_addr"] == number(client)][0])
        assert got in free
        if preservation and port in free:
            assert got == port
        elif kind == "udp" and parity and any((other ^ port) & 1 == 0 for other in free):
            assert (got ^ port) & 1 == 0
        same_class = [other for other in free if (other < 1024) == (port < 1024)]
        if kind == "tcp" or (kind == "udp" and not parity):
            assert not same_class or got in same_class
        missed["parity_missed"] += kind == "udp" and parity and (got ^ port) & 1
        missed["class_missed"] += (
            kind != "icmp"
            and (got < 1024) != (port < 1024)
            and any((other < 1024) == (port < 1024) for other in existing)
        )
        free.remove(got)
    counters = nat.counters()
    assert {name: counters[name] for name in missed} == missed


def test_preserved_port_needs_to_be_our_own() -> None:
    """Of a pair each half hands out its own ports, whatever the inside port is."""
    nat = Nat(
        pool=(PoolRange(number(POOL[0]), number(POOL[0]), (1, 65535), (2000, 2999)),), port_preservation=True
    )
    assert taken(nat, 2500) == 2500
    assert 2000 <= taken(nat, 3500) <= 2999
    assert taken(nat, 2500, OTHER_CLIENT) != 2500, "it has an owner"


# -- slices ------------------------------------------------------------------------------------------------


def toeplitz(key: bytes, data: bytes) -> int:
    """The hash of RSS, by its definition."""
    bits, window, out = int.from_bytes(data, "big"), int.from_bytes(key, "big"), 0
    for at in range(len(data) * 8):
        if bits >> (len(data) * 8 - 1 - at) & 1:
            out ^= window >> (len(key) * 8 - 32 - at) & 0xFFFFFFFF
    return out


HOST_KEY = (0x9E3779B1 << 7).to_bytes(8, "big") + bytes(44)
PORT_KEY = bytes(14) + b"\1" + bytes(37)


def host_slice(address: int, n: int) -> int:
    """By the hash of whole packets with anything else in them: it must not count."""
    rest = address * 2654435761 % 2**64
    return (toeplitz(HOST_KEY, address.to_bytes(4, "big") + rest.to_bytes(8, "big")) & 127) * n // 128


def port_slice(port: int, n: int) -> int:
    rest = port * 0x9E3779B97F4A7C15 % 2**80
    return (toeplitz(PORT_KEY, rest.to_bytes(10, "big") + port.to_bytes(2, "big")) & 127) * n // 128


def test_keys_are_those_of_the_core(tmp_path: Path) -> None:
    source = '#include "slices.h"\nvoid keys(uint8_t *host, uint8_t *port) { slices_host_key(host); slices_port_key(port); }\n'
    (tmp_path / "keys.c").write_text(source)
    library = tmp_path / "keys.so"
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", f"-I{CORE}", "-o", library, tmp_path / "keys.c"], check=True
    )
    host, port = (c_uint8 * 52)(), (c_uint8 * 52)()
    CDLL(str(library)).keys(host, port)
    assert (bytes(host), bytes(port)) == (HOST_KEY, PORT_KEY)


@pytest.mark.parametrize("n", [2, 3, 32])
@pytest.mark.parametrize("parity", [False, True])
def test_slices_share_the_ports_and_each_finds_all_of_its_own(n: int, parity: bool) -> None:
    """One core hands out each of its ports once, and then no other."""
    found: list[int] = []
    for one in range(n):
        nat = Nat(
            pool=small_pool(300, first=900), n_slices=n, slice=one, port_parity=parity, max_sessions=1000
        )
        client = next(f"10.0.0.{i}" for i in range(20, 250) if host_slice(number(f"10.0.0.{i}"), n) == one)
        nat.burst([(INSIDE, f) for f in udp_flows(client, ((w, SERVER, 53) for w in range(2000, 2310)))])
        ports = nat.sessions()["external_port"].tolist()
        assert {port_slice(port, n) for port in ports} == {one}
        found += ports
        assert nat.core.install(record(901 + 2 * one)) == (
            port_slice(901 + 2 * one, n) == one and 901 + 2 * one not in ports
        )
    assert sorted(found) == list(range(900, 1200))


@pytest.mark.parametrize("n", [2, 5])
def test_a_core_of_every_slice_gives_each_host_ports_of_its_own(n: int) -> None:
    nat = Nat(pool=small_pool(512, first=4096), n_slices=n, slice=None, max_sessions=1000)
    for at in range(100):
        for port in range(4):
            nat.send(udp(f"10.0.0.{20 + at}", 4000 + port, SERVER, 53))
    rows = nat.sessions()
    assert len(rows) == 400
    for row in rows:
        assert port_slice(int(row["external_port"]), n) == host_slice(int(row["internal_addr"]), n)
    assert len(np.unique(rows["external_port"])) == 400


def test_a_slice_without_a_port_is_refused() -> None:
    with pytest.raises(CoreError, match="no port to hand out"):
        Nat(pool=small_pool(2, first=4096), n_slices=4, slice=3)


# -- rest --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rest=st.sampled_from([1, 2, 10, 120, 600]), gaps=st.lists(st.floats(0, 30), min_size=1, max_size=40))
def test_rest_is_never_shorter_and_a_256th_longer_at_most(rest: int, gaps: list[float]) -> None:
    nat = Nat(pool=small_pool(64), quarantine=rest)
    freed: list[int] = []

    def look() -> None:
        ages = [(nat.now - since) / 1e9 for since in freed]
        least = sum(age < rest for age in ages)
        most = sum(age < rest + rest / 256 + 0.003 for age in ages)
        assert least <= nat.counters()["ports_resting"] <= most

    for at, gap in enumerate(gaps):
        if nat.verdict(udp(CLIENT, 4000 + at, SERVER, 53)) == "FORWARD":
            nat.core.delete(nat.sessions())
            freed.append(nat.now)
        nat.wait(gap * rest / 100)
        look()
    for _ in range(150):
        nat.wait(rest / 100)
        look()
    assert nat.counters()["ports_resting"] == 0


def test_rest_is_not_shorter_when_nobody_wakes() -> None:
    """Many steps of the clock without nat_poll between them."""
    nat = Nat(pool=small_pool(1000), quarantine=10, max_sessions=2000)
    for at in range(700):
        nat.send(udp(CLIENT, 4000 + at, SERVER, 53))
        nat.core.delete(nat.sessions())
        nat.now += 45_000_000
    last = nat.now
    nat.wait(9)
    assert nat.counters()["ports_resting"] >= 22, "those freed less than ten seconds ago"
    nat.wait(1.2)
    assert nat.now - last < 10.3e9
    assert nat.counters()["ports_resting"] == 0


def test_pool_at_rest_is_told_apart_from_a_pool_in_use() -> None:
    nat = Nat(pool=small_pool(2), quarantine=120)
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.out(udp(CLIENT, 4001, SERVER, 53))
    assert nat.verdict(udp(CLIENT, 4002, SERVER, 53)) == "DROP_NO_PORT"
    assert nat.counters()["no_port_resting"] == 0
    nat.core.delete(nat.sessions()[:1])
    assert nat.verdict(udp(CLIENT, 4002, SERVER, 53)) == "DROP_NO_PORT"
    assert (nat.counters()["no_port_resting"], nat.counters()["ports_resting"]) == (1, 1)
    assert nat.verdict(tcp(CLIENT, 4002, SERVER, 80)) == "FORWARD", "protocols do not share ports"


def test_so_many_ports_rest_at_most_and_the_first_end_first() -> None:
    """RFC 6888, REQ-8: the length of the rest and the number of ports at rest are both configurable."""
    nat = Nat(pool=small_pool(4), quarantine=120, quarantine_ports=3)
    for at in range(4):
        nat.out(udp(CLIENT, 4000 + at, SERVER, 53))
    rows = nat.sessions()
    for row in rows:
        nat.core.delete(row)
    assert (nat.counters()["ports_resting"], nat.counters()["rests_cut"]) == (3, 1)
    assert taken(nat, 5000) == int(rows[0]["external_port"])
    assert nat.verdict(udp(CLIENT, 5001, SERVER, 53)) == "DROP_NO_PORT"


def test_all_ports_come_back_after_their_rest() -> None:
    ports = 4097
    nat = Nat(pool=small_pool(ports), max_sessions=ports, event_ring=16384, quarantine=120)
    for _ in range(3):
        assert len(all_taken(nat, range(2000, 2000 + ports))) == ports
        nat.core.events()
        nat.core.delete(nat.sessions())
        assert nat.counters()["ports_resting"] == ports
        nat.core.events()
        nat.wait(121)
        assert nat.counters()["ports_resting"] == 0


def test_worker_s_small_steps_wake_all_in_time() -> None:
    """nat_poll alone, as a worker calls it: 4097 rests that end together are over in 17 of its steps."""
    ports = 4097
    nat = Nat(pool=small_pool(ports), max_sessions=ports, event_ring=16384, quarantine=120)
    assert len(all_taken(nat, range(2000, 2000 + ports))) == ports
    nat.core.events()
    nat.core.delete(nat.sessions())
    nat.now += 121_000_000_000
    for _ in range(17):
        assert nat.counters()["ports_resting"] > 0
        nat.core.poll(nat.now)
    assert nat.counters()["ports_resting"] == 0


@pytest.mark.parametrize("mapping", ["endpoint-independent", "endpoint-dependent"])
def test_record_of_the_peer_takes_a_port_that_rests(mapping: str) -> None:
    """The peer knows of a session on it; what waits in the queue must not wake the port under that session."""
    nat = Nat(pool=small_pool(1), quarantine=120, mapping=mapping)
    port = taken(nat, 4000)
    nat.core.delete(nat.sessions())
    nat.wait(60)
    assert nat.core.install(record(port, id_=7)) == 1
    assert nat.counters()["ports_resting"] == 0
    nat.wait(30)
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.core.delete(nat.sessions())
    nat.wait(31)
    assert nat.counters()["ports_resting"] == 1, "the first rest would be over, the second is not"
    assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "DROP_NO_PORT"
    nat.wait(90)
    assert taken(nat, 4001) == port


def test_refused_record_leaves_the_port_at_rest() -> None:
    nat = Nat(pool=small_pool(2), quarantine=120, max_sessions=1)
    port = taken(nat, 4000)
    nat.core.delete(nat.sessions())
    nat.out(udp(CLIENT, 4001, SERVER, 53))
    assert nat.core.install(record(port, internal_port=4002)) == 0, "the table is full"
    assert nat.counters()["ports_resting"] == 1
    nat.wait(121)
    assert nat.counters()["ports_resting"] == 0


def test_the_peers_ports_rest_at_the_peer() -> None:
    nat = Nat(pool=(PoolRange(number(POOL[0]), number(POOL[0]), (1, 65535), (2000, 2999)),), quarantine=120)
    for _ in range(2):
        assert nat.core.install(record(5000)) == 1
        assert nat.core.delete(record(5000)) == 1
        assert nat.counters()["ports_resting"] == 0


def conversation(nat: Nat, port: int, end: str) -> None:
    out = nat.out(tcp(CLIENT, port, SERVER, 80))
    there = SERVER, 80, out.src, out["TCP"].sport
    nat.back(tcp(*there, "SA"))
    nat.out(tcp(CLIENT, port, SERVER, 80, "A"))
    if end == "fin":
        nat.out(tcp(CLIENT, port, SERVER, 80, "FA"))
        nat.back(tcp(*there, "FA"))
        nat.out(tcp(CLIENT, port, SERVER, 80, "A"))
    elif end == "reset":
        nat.back(tcp(*there, "R"))


@pytest.mark.parametrize("mapping", ["endpoint-independent", "endpoint-dependent"])
@pytest.mark.parametrize(("end", "rests"), [("fin", 0), ("reset", 1), ("idle", 1)])
def test_tcp_seen_to_end_need_not_rest(mapping: str, end: str, rests: int) -> None:
    """RFC 6888, REQ-8 A. A reset may be forged (RFC 7857, 2.2), and an idle connection may live on."""
    nat = Nat(pool=small_pool(1), quarantine=1000, mapping=mapping)
    conversation(nat, 4000, end)
    nat.wait(7441 if end == "idle" else 241)
    assert nat.counters()["sessions"] == 0
    assert nat.counters()["ports_resting"] == rests


def test_mapping_rests_unless_all_its_connections_were_seen_to_end() -> None:
    nat = Nat(pool=small_pool(1), quarantine=1000)
    conversation(nat, 4000, "fin")
    nat.send(tcp(CLIENT, 4000, "203.0.113.2", 80))
    nat.core.delete(next(row for row in nat.sessions() if int(row["remote_addr"]) != number(SERVER)))
    nat.wait(241)
    assert nat.counters()["sessions"] == 0
    assert nat.counters()["ports_resting"] == 1
