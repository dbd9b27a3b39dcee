# SPDX-License-Identifier: Apache-2.0
"""Several cores as one: what each is given, and how their answers are put together."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nat_fastpath import cores
from nat_fastpath.cores import Cores
from nat_fastpath.engine import (
    EVENT_CLOSE,
    FLAG_FOREIGN,
    FLAG_PENDING,
    NEIGHBOUR,
    NEIGHBOUR_STATES,
    RECORD,
    STEP_KINDS,
    Core,
    CoreError,
    Verdict,
    slice_of_hosts,
    slice_of_ports,
)
from nat_fastpath.errors import EventRingFull
from tests.packets import (
    CLIENT,
    INSIDE,
    OUR_ADDRESS,
    POOL,
    SERVER,
    START,
    arp,
    config,
    frame,
    host_mac,
    mac_bytes,
    number,
    parse,
    udp,
)

N = 3
NETWORK = number("10.0.0.0")


def sessions(count: int, n: int = N, **fields: Any) -> np.ndarray:
    """Sessions of many hosts with ports of their slices; ids from 1 on."""
    at = np.arange(count)
    hosts = NETWORK + 20 + at % 40
    made = np.zeros(count, RECORD)
    made["id"] = at + 1
    made["protocol"] = 17
    made["internal_addr"], made["internal_port"] = hosts, 2000 + at
    made["internal_mac"] = 0x02_00_00_00_01_00
    ports = np.arange(1024, 65536)
    by_slice = [ports[slice_of_ports(ports, n) == i] for i in range(n)]
    for i in range(n):
        mine = np.flatnonzero(slice_of_hosts(hosts, n) == i)
        made["external_port"][mine] = by_slice[i][: len(mine)]
    made["external_addr"] = number(POOL[0])
    made["remote_addr"], made["remote_port"] = number(SERVER), 53
    for name, value in fields.items():
        made[name] = value
    return made


@pytest.fixture
def several() -> Iterator[Cores]:
    made = Cores(config(max_sessions=6000, event_ring=4096 * N), N)
    for core in made.cores:
        core.poll(START)
    yield made
    made.close()


def pages(core: Cores | Core, maximum: int) -> list[np.ndarray]:
    found, cursor = [], 0
    while True:
        page, cursor = core.sessions(cursor, maximum)
        assert len(page) <= maximum
        found.append(page)
        if not cursor:
            return found


def ids(records: np.ndarray) -> list[int]:
    return sorted(records["id"].tolist())


# -- slices ------------------------------------------------------------------------------------------------


def test_slices_are_those_of_the_header(tmp_path: Path) -> None:
    """Compared with slices.h in a library of its own, and with the meaning of its groups."""
    header = Path(__file__).parents[2] / "nat_fastpath/core/slices.h"
    (tmp_path / "s.c").write_text(
        f'#include "{header}"\n'
        "unsigned host(unsigned a, unsigned n) { return slice_of_host(a, n); }\n"
        "unsigned port(unsigned p, unsigned n) { return slice_of_port((uint16_t)p, n); }\n"
    )
    library = tmp_path / "s.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "s.c"], check=True)
    c = ctypes.CDLL(str(library))
    addresses = np.random.default_rng(3).integers(0, 1 << 32, 500, dtype=np.uint32)
    ports = np.arange(0, 65536, 97, dtype=np.uint16)
    for n in (1, 2, 3, 7, 32):
        assert slice_of_hosts(addresses, n).tolist() == [c.host(int(a), n) for a in addresses]
        assert slice_of_ports(ports, n).tolist() == [c.port(int(p), n) for p in ports]
    assert (slice_of_ports(ports & 0xFFFE, 8) == slice_of_ports(ports | 1, 8)).all(), "a pair stays together"
    row = np.arange(NETWORK, NETWORK + 128)
    assert np.bincount(slice_of_hosts(row, 4)).tolist() == [32] * 4, (
        "128 addresses in a row are shared evenly"
    )
    assert slice_of_hosts(int(NETWORK), 4).shape == ()
    assert slice_of_hosts(row.reshape(2, 64), 4).shape == (2, 64)


def test_one_core_is_the_core_itself() -> None:
    core = cores.make(config(), 1)
    assert isinstance(core, Core)
    assert cores.parts(core) == (core,)
    core.close()
    with pytest.raises(CoreError, match="32 slices"):
        Cores(config(), 33)


# -- sessions ----------------------------------------------------------------------------------------------


def test_each_core_holds_its_own_and_the_answers_are_those_of_one(several: Cores) -> None:
    given = sessions(1000)
    assert several.install(given) == 1000
    for i, core in enumerate(several.cores):
        (own,) = pages(core, 4096)
        assert ids(own) == ids(given[slice_of_hosts(given["internal_addr"], N) == i])
        assert len(own) > 100
    assert several.counters()["sessions"] == 1000
    assert len(several.hosts()) == 40
    assert int(several.hosts()["sessions"].sum()) == 1000

    order = np.random.default_rng(5).permutation(1000)
    asked = given[order].copy()
    absent = np.arange(1000) % 4 == 0
    asked["id"][absent] += 5000
    assert (several.holds(asked) == ~absent).all(), "answered in the order asked"
    asked["packets_out"] = 9
    assert several.update(asked) == 750
    found = np.concatenate(pages(several, 4096))
    assert (found["packets_out"] == 9).sum() == 750
    assert several.delete(asked) == 750
    assert ids(np.concatenate(pages(several, 4096))) == ids(given[order][absent])


@pytest.mark.parametrize("maximum", [1, 7, 333, 4096])
def test_pages_go_through_all_cores(several: Cores, maximum: int) -> None:
    count = 40 if maximum == 1 else 1000
    several.install(sessions(count))
    found = pages(several, maximum)
    assert ids(np.concatenate(found)) == list(range(1, count + 1))
    assert several.sessions(N << 32)[1] == 0
    assert len(several.sessions(N << 32)[0]) == 0


def test_what_no_core_could_carry_is_refused(several: Cores) -> None:
    """A host of one slice with a port of another: its answers would come to the wrong core."""
    given = sessions(30)
    given["external_port"][::3] ^= 0x80 | 0x40 | 0x20 | 2  # changes the groups of most
    fits = slice_of_hosts(given["internal_addr"], N) == slice_of_ports(given["external_port"], N)
    assert (~fits).sum() > 0
    assert several.install(given) == fits.sum()
    assert (several.holds(given) == fits).all()
    assert several.delete(given) == fits.sum()


def test_a_session_is_found_from_both_sides(several: Cores) -> None:
    given = sessions(60)
    several.install(given)
    for one in given:
        inside, outside, remote = (
            (int(one[f"{end}_addr"]), int(one[f"{end}_port"])) for end in ("internal", "external", "remote")
        )
        assert several.find(17, inside, remote)["id"] == one["id"]
        assert several.find(17, remote, outside, "external")["id"] == one["id"]
    assert several.find(6, inside, remote) is None


def test_pending_sessions_are_committed_wherever_they_are(several: Cores) -> None:
    given = sessions(200)
    several.install(given)
    assert several.commit(given) == 200
    posted = several.post_commit(given)
    assert posted.result() == 200
    assert not (np.concatenate(pages(several, 4096))["flags"] & FLAG_PENDING).any()


def test_ownership_changes_in_all_cores(several: Cores) -> None:
    given = sessions(200)
    given["id"] |= np.uint64(2 << 52)
    several.install(given)
    assert several.cede(2, given["id"][:50]) == 150
    assert (np.concatenate(pages(several, 4096))["flags"] & FLAG_FOREIGN != 0).sum() == 150
    assert several.adopt() == 150


def test_a_full_ring_leaves_the_rest_in_the_order_given() -> None:
    several = Cores(config(max_sessions=6000, event_ring=64 * N), N)
    given = sessions(1000)
    assert several.install(given) == 1000
    done, left, rounds = 0, given, 0
    while True:
        try:
            done += several.delete(left)
            break
        except EventRingFull as full:
            rest, result = full.rest, full.result
        assert (np.diff(rest["id"].astype(np.int64)) > 0).all()
        gone = np.concatenate(pages(several, 4096))
        assert ids(gone) == ids(rest), "those of the rest are there, all others are not"
        assert result == len(left) - len(rest) > 0
        closed = several.events()
        assert (closed["type"] == EVENT_CLOSE).all()
        assert len(closed) == result
        done, left, rounds = done + result, rest, rounds + 1
    assert (done, rounds > 3) == (1000, True)
    several.close()


# -- next hops ---------------------------------------------------------------------------------------------


def next_hop(address: str, mac: int, ago: float) -> np.ndarray:
    made = np.zeros(1, NEIGHBOUR)
    made["address"], made["mac"], made["port"] = number(address), mac, INSIDE
    made["confirmed_ms"] = round(ago * 1000)
    return made


def test_a_next_hop_is_shown_once_as_the_core_sees_it_that_knows_it_best() -> None:
    several = Cores(config(neighbours=(), max_sessions=300), N)
    for core in several.cores:
        core.poll(START)
    assert several.learn(next_hop(CLIENT, 0, 0)) == 0, "asked for"
    assert [NEIGHBOUR_STATES[state] for state in of(several, CLIENT)["state"]] == ["incomplete"]
    old, new = 0x02_00_00_00_0A_01, 0x02_00_00_00_0A_02
    several.cores[0].learn(next_hop(CLIENT, old, 20))
    several.cores[2].learn(next_hop(CLIENT, new, 5))
    (seen,) = of(several, CLIENT)
    assert (int(seen["mac"]), NEIGHBOUR_STATES[seen["state"]]) == (new, "reachable")
    assert 4900 <= seen["confirmed_ms"] <= 5100
    several.learn(next_hop(CLIENT, old, 1))
    assert all(int(of(core, CLIENT)["mac"][0]) == old for core in several.cores)
    several.close()


def test_sessions_of_a_next_hop_are_summed_and_those_by_mac_alone_stay_apart(several: Cores) -> None:
    given = sessions(90)
    given["internal_addr"] = NETWORK + 20 + np.arange(90) % 40
    mac = int.from_bytes(mac_bytes(host_mac("10.0.0.20")), "big")
    given["internal_mac"] = mac
    assert several.install(given) == 90
    found = several.neighbours()
    keys = list(
        zip(found["port"], found["address"], np.where(found["address"] == 0, found["mac"], 0), strict=True)
    )
    assert len(set(keys)) == len(keys)
    assert int(found["sessions"].sum()) == sum(
        int(core.neighbours()["sessions"].sum()) for core in several.cores
    )
    assert several.counters()["neighbours"] == max(core.counters()["neighbours"] for core in several.cores)


def of(core: Cores | Core, address: str) -> np.ndarray:
    found = core.neighbours()
    return np.asarray(found[found["address"] == number(address)])


# -- with owners of their own ------------------------------------------------------------------------------


class Owner(threading.Thread):
    """What a worker does for commands: it turns."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core, self.ends = core, threading.Event()
        core.attach()

    def run(self) -> None:
        while not self.ends.is_set():
            poll(self.core)

    def stop(self) -> None:
        self.ends.set()
        self.join()
        self.core.detach()


def poll(core: Core) -> None:
    """nat_poll as native code calls it, since Core.poll is refused while it is attached."""
    api = ctypes.cast(Core.api_address(), ctypes.POINTER(ctypes.c_void_p))
    turn = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64)(api[POLL])
    turn(core.address, time.monotonic_ns())


def _place_of_poll() -> int:
    """Of its pointer in struct nat_api, in words: size, abi and hash are two, then the functions follow."""
    header = (Path(__file__).parents[2] / "nat_fastpath/core/nat.h").read_text()
    functions = re.findall(r"\(\*(\w+)\)", header.split("struct nat_api {")[1].split("};")[0])
    return 2 + functions.index("poll")


POLL = _place_of_poll()


def test_commands_wait_for_all_owners(several: Cores) -> None:
    owners = [Owner(core) for core in several.cores]
    for owner in owners:
        owner.start()
    given = sessions(1000)
    try:
        assert several.install(given) == 1000
        assert several.holds(given).all()
        posted = several.post_commit(given)
        end = time.monotonic() + 10
        while (released := posted.result()) is None:
            assert time.monotonic() < end
        assert released == 1000
        assert ids(np.concatenate(pages(several, 100))) == ids(given)
        # a ring that is full is waited for, as long as somebody takes its events
        several.delete(given)
        assert (several.events()["type"] == EVENT_CLOSE).sum() == 1000
    finally:
        for owner in owners:
            owner.stop()


def test_an_owner_that_stands_still_is_told_of(several: Cores) -> None:
    owners = [Owner(core) for core in several.cores[:2]]
    for owner in owners:
        owner.start()
    several.cores[2].attach()
    try:
        with pytest.raises(TimeoutError, match="does not answer"):
            several.install(sessions(100))
        assert several.cores[0].counters()["sessions"] > 0, "the others are not kept from it"
    finally:
        several.cores[2].detach()
        for owner in owners:
            owner.stop()


# -- traces ------------------------------------------------------------------------------------------------


def test_a_trace_runs_in_all_cores_under_one_token(several: Cores) -> None:
    token = several.trace_start(5, 60.0)
    assert token is not None
    assert several.trace_start(5, 60.0) is None, "one at a time"
    trace = several.trace_read(token)
    assert (len(trace.entries), trace.running, trace.packets, trace.missed) == (0, True, 5, 0)
    with pytest.raises(KeyError):
        several.trace_read(token + 1)
    several.trace_read(token, stop=True)
    again = several.trace_start(5, 60.0)
    assert again not in (None, token)
    with pytest.raises(KeyError):
        several.trace_read(token)
    assert several.trace_read(again, stop=True).running is False


def test_a_trace_that_cannot_begin_everywhere_begins_nowhere(several: Cores) -> None:
    own = several.cores[2].trace_start(5, 60.0)
    assert several.trace_start(5, 60.0) is None
    several.cores[2].trace_read(own, stop=True)
    token = several.trace_start(5, 60.0)
    assert token is not None
    several.trace_read(token, stop=True)


# -- what would become of a packet -------------------------------------------------------------------------


def steps_of(told: Any) -> list[tuple[str, int]]:
    return [(STEP_KINDS[step["kind"]], int(step["value"])) for step in told.steps]


def test_a_packet_is_explained_by_the_core_that_has_its_host(several: Cores) -> None:
    for last in range(20, 60):
        host = f"10.0.0.{last}"
        told = several.explain(INSIDE, frame(udp(host, 5000, SERVER, 53)))
        assert told.verdict == Verdict.FORWARD
        packet = parse(told.frame)
        owner = int(slice_of_hosts(number(host), N))
        assert int(slice_of_ports(packet.sport, N)) == owner
        assert steps_of(told)[0] == ("handoff", owner)
    assert several.counters()["sessions"] == 0
    assert several.explain(INSIDE, arp_request()).verdict in (Verdict.REPLY, Verdict.CONSUMED)


def test_a_hairpin_is_explained_through_both_cores() -> None:
    several = Cores(config(max_sessions=600, filtering="endpoint-independent"), N)
    for core in several.cores:
        core.poll(START)
    by_slice = [
        next(host for host in (f"10.0.0.{i}" for i in range(20, 60)) if slice_of_hosts(number(host), N) == i)
        for i in range(N)
    ]
    for asks, asked in ((by_slice[0], by_slice[1]), (by_slice[2], by_slice[0])):
        owner = several.cores[by_slice.index(asked)]
        (opened,) = owner.burst([(INSIDE, frame(udp(asked, 7000, SERVER, 53)))], START)
        external = parse(opened.frame)
        told = several.explain(INSIDE, frame(udp(asks, 5000, external.src, external.sport)))
        assert told.verdict == Verdict.FORWARD
        turned = parse(told.frame)
        assert (turned.dst, turned.dport) == (asked, 7000)
        assert slice_of_ports(turned.sport, N) == by_slice.index(asks)
        handed = [value for kind, value in steps_of(told) if kind == "handoff"]
        assert handed == [by_slice.index(asks), by_slice.index(asked)]
    assert several.counters()["sessions"] == 2, "only those that were opened"
    several.close()


def arp_request() -> bytes:
    return arp(INSIDE, 1, host_mac(CLIENT), CLIENT, OUR_ADDRESS[INSIDE])
