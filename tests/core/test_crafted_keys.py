# SPDX-License-Identifier: Apache-2.0
"""Keys that crowd chosen buckets, from a host inside that knows the hash: what they cost, and whom."""

from __future__ import annotations

import shutil
import subprocess
from ctypes import CDLL, CFUNCTYPE, c_bool, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nat_fastpath.core_config import RouteConfig
from nat_fastpath.engine import RECORD, Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OUTSIDE,
    POOL,
    SERVER,
    Nat,
    frame,
    number,
    small_pool,
    udp,
    udp_flows,
)

Array = np.ndarray[Any, Any]
CORE = Path(__file__).parents[2] / "nat_fastpath" / "core"
TABLE = 1 << 18  # max_sessions
SEARCH = 24  # FLOW_TABLE_SEARCH: buckets that one insertion looks at
INSERTIONS = 4  # of one new session at most: host, mapping, and both directions
PRIME, BASIS = 16777619, 2166136261
M32 = 0xFFFFFFFF
has_aes = "aes" in Path("/proc/cpuinfo").read_text().split()


def buckets(entries: int) -> int:
    """flow_table_buckets()."""
    return (entries * 20 + 17 * 8 - 1) // (17 * 8) + 2


def crowds(hashes: Array, n_buckets: int, chosen: int) -> Array:
    """Of which of these (uint64) both buckets are among the first ``chosen`` ones."""
    first = hashes * np.uint64(n_buckets) >> np.uint64(32)
    offset = (hashes * np.uint64(0x9E3779B1) & np.uint64(M32)) * np.uint64(n_buckets) >> np.uint64(32)
    other = np.where(offset >= first, offset - first, offset + np.uint64(n_buckets) - first)
    return (first < chosen) & (other < chosen)


def crowding(n_buckets: int, chosen: int) -> Array:
    """All hashes that do."""
    hashes = np.arange(chosen * (1 << 32) // n_buckets, dtype=np.uint64)
    return hashes[crowds(hashes, n_buckets, chosen)].astype(np.uint32)


def unmixed(hashes: Array) -> Array:
    """mix32() backwards."""
    h = hashes ^ hashes >> 16
    h = h * np.uint32(pow(0xC2B2AE35, -1, 1 << 32))
    h = h ^ h >> 13 ^ h >> 26
    h = h * np.uint32(pow(0x85EBCA6B, -1, 1 << 32))
    return h ^ h >> 16


def fnv(h: Array, data: Array) -> Array:
    return (h ^ data.astype(np.uint32)) * np.uint32(PRIME)


def crafted(client: str, targets: Array, n: int) -> list[tuple[int, str, int]]:
    """``n`` UDP flows (port, remote, port) of ``client`` whose outbound hashes are among ``targets``.

    FNV can be undone: forwards over the addresses and the first port, backwards over the rest, and both meet.
    """
    inverse = np.uint32(pow(PRIME, -1, 1 << 32))
    ports = np.arange(1024, 65536, dtype=np.uint32)
    back = unmixed(targets)[:, None] * inverse ^ np.uint32(17)
    for byte in (ports & 255, ports >> 8):
        back = back * inverse ^ byte
    found: list[tuple[int, str, int]] = []
    for host in range(1, 250):
        remote = f"203.0.113.{host}"
        h = np.full(1, BASIS, np.uint32)
        for byte in number(client).to_bytes(4, "big") + number(remote).to_bytes(4, "big"):
            h = fnv(h, np.array(byte))
        forward = fnv(fnv(h, ports >> 8), ports & 255)
        order = np.argsort(forward)
        known = np.zeros(1 << 22, bool)
        known[forward >> 10] = True
        row, column = np.nonzero(known[back >> 10])
        wanted = back[row, column]
        at = np.searchsorted(forward[order], wanted).clip(max=len(order) - 1)
        hit = forward[order][at] == wanted
        found += [
            (int(ports[order[i]]), remote, int(ports[k])) for i, k in zip(at[hit], column[hit], strict=True)
        ]
        if len(found) >= n:
            return found[:n]
    raise AssertionError("not enough flows")


def send(nat: Nat, flows: list[tuple[int, str, int]]) -> list[Verdict]:
    frames = [(INSIDE, data) for data in udp_flows(CLIENT, flows)]
    return [result.verdict for result in nat.burst(frames)]


def honest(n: int, seed: int) -> Array:
    """Sessions of other hosts, all of them different."""
    random = np.random.default_rng(seed)
    rows = np.zeros(n, RECORD)
    at = np.arange(n)
    rows["id"], rows["protocol"] = 1 + at, 17
    rows["internal_addr"] = number("10.0.0.40") + at % 200
    rows["internal_port"] = random.integers(1024, 65536, n)
    rows["external_addr"], rows["external_port"] = number(POOL[0]) + at // 60000, 2000 + at % 60000
    rows["remote_addr"] = random.choice(1 << 24, n, replace=False, shuffle=False) + number("192.0.0.0")
    rows["remote_port"] = random.integers(1, 65536, n)
    return rows


def attacked(**changes: Any) -> Nat:
    routes = (
        RouteConfig(number("10.0.0.0"), 24, INSIDE),
        RouteConfig(0, 0, OUTSIDE, number("198.51.100.254"), bytes(6)),
    )
    return Nat(
        pool=small_pool(60000, 8), max_neighbours=1024, max_sessions=TABLE, event_ring=2 * TABLE, routes=routes,
        mapping="endpoint-dependent", **changes,
    )  # fmt: skip


def failing(nat: Nat, rounds: int, n: int) -> int:
    """How many of ``rounds`` times ``n`` honest sessions find no place."""
    failed = 0
    for round_ in range(rounds):
        rows = honest(n, round_)
        failed += n - nat.core.install(rows)
        nat.core.delete(rows)
        while len(nat.core.events()):
            pass
    return failed


def test_quota_keeps_crafted_keys_from_honest_sessions() -> None:
    """2.1 million honest insertions, into a table filled to 0.8 of its size; at most one in 10^6 may fail.

    The attacker has a 2048th of ``max_sessions``: they fill 16 buckets of 77 104. Without the quota the same
    attack is felt, see below.
    """
    quota = TABLE // 2048
    nat = attacked(sessions_per_host=quota, new_sessions_rate=100000)
    flows = crafted(CLIENT, crowding(buckets(2 * TABLE), quota // 8), 3 * quota)
    verdicts = send(nat, flows)
    accepted = verdicts.count(Verdict.FORWARD)
    assert quota * 0.9 <= accepted <= quota
    steps = nat.counters()["index_steps"]
    assert verdicts[-1] in (Verdict.DROP_QUOTA, Verdict.DROP_TABLE_FULL)
    if accepted == quota:
        assert set(send(nat, flows[-quota:])) <= {Verdict.DROP_QUOTA, Verdict.FORWARD}
        assert nat.counters()["index_steps"] == steps, "the quota comes before any insertion"
    assert failing(nat, 10, 210_000) <= 2


def test_crafted_keys_without_quota_are_felt_and_bounded() -> None:
    """512 chosen places take what they can hold. A refused packet costs a bounded search, and nobody's session."""
    nat = attacked()
    rows = honest(1000, 99)
    assert nat.core.install(rows) == 1000
    targets = crowding(buckets(2 * TABLE), 256)[:1000]
    flows = crafted(CLIENT, targets, 6000)
    established = 0
    refused = 0
    for flow in flows:
        before = nat.counters()["index_steps"]
        (verdict,) = send(nat, [flow])
        steps = nat.counters()["index_steps"] - before
        assert steps <= SEARCH * INSERTIONS
        refused += verdict == Verdict.DROP_TABLE_FULL
        established += verdict == Verdict.FORWARD
    assert refused > 1000
    assert nat.core.holds(rows).all()
    again = send(nat, flows)
    assert again.count(Verdict.FORWARD) == established, "the crafted ones that were let in go on as well"
    assert failing(nat, 2, 200_000) > 0, "this is what the quota is for"


@pytest.mark.skipif(not has_aes, reason="the CPU has no AES instructions")
def test_keyed_hash_makes_crafted_keys_ordinary() -> None:
    nat = attacked(flow_hash="aes", seed=0)
    flows = crafted(CLIENT, crowding(buckets(2 * TABLE), 256)[:1000], 6000)
    assert set(send(nat, flows)) == {Verdict.FORWARD}
    assert set(send(nat, flows)) == {Verdict.FORWARD}
    assert len(nat.sessions()) == len(set(flows))
    assert nat.counters()["index_steps"] < 3 * len(flows), "each found room in its own buckets"
    assert failing(nat, 2, 200_000) == 0


def spoofed(n_buckets: int, chosen: int, kind: str) -> list[tuple[int, int]]:
    """(address, port) whose hash in the index of hosts, or of mappings, has both buckets among the first ones."""
    if kind == "host":
        addresses = np.arange(number("10.0.0.2"), number("10.20.0.0"), dtype=np.uint32)
        found = addresses[crowds(mixed(addresses).astype(np.uint64), n_buckets, chosen)]
        return [(int(address), 4000) for address in found]
    wanted = crowding(n_buckets, chosen)
    pairs: list[tuple[int, int]] = []
    # of hash = mix(mix(address) + word) the address that gives a wanted hash with a chosen port
    for port in range(1024, 65536):
        address = unmixed(unmixed(wanted) - np.uint32(port << 8 | 17))
        good = address[(address >> 24 == 10) & (address & 0xFFFF != 0)]
        pairs += [(int(one), port) for one in good]
        if len(pairs) >= 600:
            break
    return pairs


def mixed(h: Array) -> Array:
    h = (h ^ h >> 16) * np.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
    return h ^ h >> 16


def text(address: int) -> str:
    return ".".join(map(str, address.to_bytes(4, "big")))


@pytest.mark.parametrize("kind", ["host", "mapping"])
@pytest.mark.parametrize(
    "hash_", ["fnv", pytest.param("aes", marks=pytest.mark.skipif(not has_aes, reason="no AES"))]
)
def test_invented_sources_crowd_the_small_indexes_within_bounds(kind: str, hash_: str) -> None:
    """A quota per host says nothing to who invents hosts: the budget limits these, and the keyed hash ends it."""
    size, entries = 4096, 1024 if kind == "host" else 4096
    pairs = spoofed(buckets(entries), 4, kind)[:400]
    routes = (
        RouteConfig(number("10.0.0.0"), 8, INSIDE),
        RouteConfig(0, 0, OUTSIDE, number("198.51.100.254"), bytes(6)),
    )
    nat = Nat(
        pool=small_pool(60000), max_sessions=size, routes=routes, flow_hash=hash_, seed=0, max_neighbours=4096
    )
    nat.out(udp(OTHER_CLIENT, 4000, SERVER, 53))
    verdicts = []
    for address, port in pairs:
        before = nat.counters()["index_steps"]
        verdicts.append(nat.send(udp(text(address), port, SERVER, 53)).verdict)
        assert nat.counters()["index_steps"] - before <= SEARCH * INSERTIONS
    assert len(verdicts) >= 100
    full = verdicts.count(Verdict.DROP_TABLE_FULL)
    assert (full > 50) if hash_ == "fnv" else (full == 0)
    nat.out(udp(OTHER_CLIENT, 4000, SERVER, 53))
    limited = Nat(
        pool=small_pool(60000), max_sessions=size, routes=routes, new_sessions_rate=10,
        new_sessions_burst=10, max_neighbours=4096,
    )  # fmt: skip
    frames = [(INSIDE, frame(udp(text(address), port, SERVER, 53))) for address, port in pairs]
    assert [result.verdict for result in limited.burst(frames)].count(Verdict.FORWARD) == 10


# -- the hash itself ---------------------------------------------------------------------------------------


def library(tmp_path: Path, *flags: str) -> CDLL:
    """flow_hash.c alone."""
    compiler = shutil.which("cc")
    assert compiler
    out = tmp_path / "flow_hash.so"
    command = [compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags]
    subprocess.run([*command, "-o", out, CORE / "flow_hash.c"], check=True)
    hash_ = CDLL(str(out))
    hash_.flow_hasher_aes.restype = c_bool
    return hash_


@pytest.mark.skipif(not has_aes, reason="the CPU has no AES instructions")
def test_one_by_one_and_many_agree_and_the_key_decides(tmp_path: Path) -> None:
    """struct flow_hasher begins with the two functions; bench and worker see none of this."""
    hash_ = library(tmp_path)
    random = np.random.default_rng(1)
    n = 1008
    addresses = random.integers(0, 1 << 64, n, np.uint64)
    ports, protocols = random.integers(0, 1 << 32, n, np.uint32), random.integers(0, 256, n, np.uint8)
    seen = []
    for key in (random.integers(0, 1 << 32, 20, np.uint32) for _ in range(2)):
        space = np.zeros(512, np.uint8)
        hasher = space.ctypes.data + 15 & ~15
        assert hash_.flow_hasher_aes(c_void_p(hasher), key.ctypes.data_as(c_void_p))
        many_at, one_at = (c_uint64.from_address(hasher + 8 * i).value for i in range(2))
        many = CFUNCTYPE(None, c_void_p, *[c_void_p] * 4, c_uint32)(many_at)
        one = CFUNCTYPE(c_uint32, c_void_p, c_uint64, c_uint32, c_uint8)(one_at)
        hashes = np.zeros(n, np.uint32)
        many(hasher, *(array.ctypes.data for array in (addresses, ports, protocols, hashes)), n)
        alone = [one(hasher, *map(int, key)) for key in zip(addresses, ports, protocols, strict=True)]
        assert alone == hashes.tolist()
        seen.append(hashes)
    assert (seen[0] == seen[1]).sum() < 3
    assert len(np.unique(seen[0])) > n - 3


def test_cpu_without_aes_says_no(tmp_path: Path) -> None:
    hash_ = library(tmp_path, "-D__builtin_cpu_supports(feature)=0")
    space, key = np.zeros(512, np.uint8), np.zeros(20, np.uint32)
    assert not hash_.flow_hasher_aes(c_void_p(space.ctypes.data + 15 & ~15), key.ctypes.data_as(c_void_p))


@pytest.mark.skipif(not has_aes, reason="the CPU has no AES instructions")
@pytest.mark.parametrize("filtering", ["address-and-port-dependent", "address-dependent"])
def test_bursts_find_what_single_packets_opened(filtering: str) -> None:
    nat = Nat(flow_hash="aes", filtering=filtering, seed=0)
    frames = [(INSIDE, frame(udp(CLIENT, 4000 + at, SERVER, 53))) for at in range(64)]
    for _ in range(3):
        assert {result.verdict for result in nat.burst(frames)} == {Verdict.FORWARD}
    assert nat.counters()["sessions_opened"] == 64
    back = [(OUTSIDE, frame(udp(SERVER, 53, "198.51.100.10", 1), OUTSIDE))]
    assert nat.burst(back)[0].verdict != Verdict.FORWARD
    rows = nat.sessions()
    back = [
        (OUTSIDE, frame(udp(SERVER, 53, text(int(row["external_addr"])), int(row["external_port"])), OUTSIDE))
        for row in rows
    ]
    assert {result.verdict for result in nat.burst(back)} == {Verdict.FORWARD}
    assert nat.core.holds(rows).all()
    assert nat.core.delete(rows) == 64
    assert (nat.counters()["sessions"], nat.counters()["hosts"]) == (0, 0)
