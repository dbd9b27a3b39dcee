# SPDX-License-Identifier: Apache-2.0
"""Several cores behave as one: beside the reference NAT, with fragments, and when they are asked to explain."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant
from scapy.layers.inet import ICMP, UDP
from scapy.packet import Packet

from nat_fastpath.engine import STEP_KINDS, Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OUTSIDE,
    SECOND,
    SERVER,
    START,
    config,
    echo,
    external,
    fragments,
    frame,
    icmp_error,
    parse,
    small_pool,
    text,
    together,
    udp,
)
from tests.property import test_explain as explaining
from tests.property import test_sequences as sequences
from tests.side_by_side import Pair, opening
from tests.spread import Spread, port_slice

ROUTER = "10.0.0.22"  # inside; of another slice than the clients, of three
CORES = st.sampled_from([2, 3])
CLIENTS = (CLIENT, OTHER_CLIENT)  # one in the first slice and one in the last


class SeveralCores(sequences.Sequences):
    """The same sequences, and enough ports that no slice runs out of them: that differs from one core."""

    @initialize(
        n=CORES,
        mapping=st.sampled_from(["endpoint-independent", "endpoint-dependent"]),
        filtering=st.sampled_from(
            ["address-and-port-dependent", "address-dependent", "endpoint-independent"]
        ),
        addresses=st.sampled_from([1, 2]),
        sessions_per_host=st.sampled_from([0, 0, 6]),
        mappings_per_host=st.sampled_from([0, 0, 3]),
        seed=st.integers(1, 1 << 32),
        port_preservation=st.booleans(),
        port_parity=st.booleans(),
    )
    def begin(self, n: int, addresses: int, **limits: Any) -> None:  # type: ignore[override]
        self.pool = sequences.one_by_one(small_pool(256, addresses))
        self.spread = Spread(config(pool=tuple(self.pool), **limits), n)
        self.pair = Pair(self.spread, START)  # type: ignore[arg-type]

    @invariant()
    def each_session_in_its_core(self) -> None:
        if hasattr(self, "spread"):
            self.spread.check()

    def teardown(self) -> None:
        """All is given back: each slice hands out all of its ports again, and none of another's."""
        if not hasattr(self, "pair") or self.spread.config.sessions_per_host:
            return
        if self.spread.config.mappings_per_host:
            return
        self.pair.wait(10_000)
        assert self.spread.counters()["sessions"] == 0
        for at, client in ((0, OTHER_CLIENT), (self.spread.n - 1, CLIENT)):
            ports = {p for p in range(2000, 2256) if port_slice(p, self.spread.n) == at}
            count = len(ports) * sum(map(bool, self.pair.model.pool.values()))  # one may be draining
            frames = [
                (INSIDE, opening("udp", (client, 1 + i), ("203.0.113.99", 99))) for i in range(count + 1)
            ]
            results = self.spread.cores[at].burst(frames, self.pair.now)
            assert [r.verdict for r in results] == [Verdict.FORWARD] * count + [Verdict.DROP_NO_PORT]
            assert {parse(r.frame)[UDP].sport for r in results[:-1]} == ports


SeveralCores.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSeveralCores = pytest.mark.timeout(150)(SeveralCores.TestCase)


def way(nat: Spread, kind: str, client: str, data: bytes, number: int) -> tuple[int, Packet]:
    """A packet with much data of a session that is there: where it comes from, and itself."""
    other = CLIENTS[client == CLIENTS[0]]
    remote = (SERVER, 0 if kind == "ping" else 53)
    made = echo(client, SERVER, 4000) if kind == "ping" else udp(client, 4000, *remote)
    [result] = nat.burst([(INSIDE, frame(made))], START)
    out = parse(result.frame)
    fields: dict[str, Any] = {"id": number}
    if kind == "ping":
        return OUTSIDE, echo(SERVER, out.src, out[ICMP].id, reply=True, payload=data, **fields)
    outside = out.src, out[UDP].sport
    if kind == "out":
        return INSIDE, udp(client, 4000, *remote, data, **fields)
    if kind == "in":
        return OUTSIDE, udp(*remote, *outside, data, **fields)
    if kind == "hairpin":
        return INSIDE, udp(other, 4001, *outside, data, **fields)
    if kind == "error from inside":
        return INSIDE, icmp_error(ROUTER, SERVER, udp(*remote, client, 4000, data), **fields)
    return OUTSIDE, icmp_error("192.0.2.33", outside[0], udp(*outside, *remote, data), **fields)


KINDS = ["out", "in", "hairpin", "ping", "error from inside", "error from outside"]


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    CORES,
    st.sampled_from(KINDS),
    st.sampled_from(CLIENTS),
    st.integers(200, 400),
    st.integers(6, 20),
    st.randoms(use_true_random=False),
)
def test_fragments_become_what_the_whole_does(
    n: int, kind: str, client: str, length: int, size: int, shuffle: random.Random
) -> None:
    """In whatever order they come, and whoever receives them: only the first says whose they are."""
    nat = Spread(config(filtering="endpoint-independent"), n)
    port, packet = way(nat, kind, client, shuffle.randbytes(length), 77)
    parts = fragments(packet, 8 * size)
    shuffle.shuffle(parts)
    results = []
    for part in parts:
        results += nat.burst([(port, frame(part, port))], START)
        if shuffle.random() < 0.3:
            nat.poll(START)
            results += nat.take(START)
    for _ in range(n + 2):  # they go from core to core
        nat.poll(START)
        results += nat.take(START)
    sent = [one for result in results for one in result.frames]
    [whole] = nat.burst([(port, frame(packet, port))], START)
    assert whole.verdict == Verdict.FORWARD
    assert bytes(together(sent)) == bytes(parse(whole.frame))
    assert nat.counters()["held"] == 0
    assert nat.counters()[f"rx_packets.{port}"] == len(parts) + 1 + (port == INSIDE), "counted once each"
    nat.check()


@pytest.mark.timeout(240)
def test_what_they_explain_is_what_happens() -> None:
    """Any mix of packets: the explanation goes from core to core as the packet does, and changes nothing."""
    rng = random.Random(20_261_130)
    seen: Counter[Verdict] = Counter()
    told_of: Counter[str] = Counter()
    for turn in range(30):
        drawn = explaining.settings(rng)
        # ports for every slice
        made = config(
            **drawn | {"pool": small_pool(rng.choice((8, 8, 64)), rng.choice((1, 2))), "port_ranges": ()}
        )
        nat = Spread(made, 2 + turn % 2)
        traffic, now, sent = explaining.Traffic(nat, rng), START, 0  # type: ignore[arg-type]
        for _ in range(100):
            now += round(rng.choice((0, 0.05, 0.05, 0.3, 61)) * SECOND)
            nat.poll(now)
            finished = nat.take(now)
            seen.update(result.verdict for result in finished)
            nat.outbox()
            nat.events()
            if rng.random() < 0.3:
                nat.commit(nat.sessions()[0])
            port, data = traffic.frame()
            before = explaining.state(nat)  # type: ignore[arg-type]
            explained = nat.explain(port, data)
            assert explaining.state(nat) == before, "a question has changed something"  # type: ignore[arg-type]
            [result] = nat.burst([(port, data)], now)
            sent += 1
            kinds = [STEP_KINDS[kind] for kind in explained.steps["kind"]]
            assert explained.verdict == result.verdict, (kinds, data.hex())
            if result.verdict <= Verdict.FRAGMENT:
                assert (explained.port, explained.frame) == (result.port, result.frame), kinds
            seen[result.verdict] += 1
            told_of.update(kinds)
            if result.verdict == Verdict.FORWARD and result.port == OUTSIDE:
                assert text(made.pool[0].first) <= parse(result.frame).src
            nat.check()
        verdicts = nat.verdicts()
        assert int(verdicts.sum()) - int(verdicts[Verdict.HANDOFF]) - int(verdicts[Verdict.HELD]) == (
            sent - nat.counters()["held"]
        ), "each packet has one last verdict"
        assert sum(nat.counters()[f"rx_packets.{i}"] for i in (0, 1)) == sent
        ends = {(int(r["protocol"]), *external(r)): r["internal_addr"] for r in nat.sessions()[0]}
        assert all(ends[int(r["protocol"]), *external(r)] == r["internal_addr"] for r in nat.sessions()[0])
    assert told_of["handoff"] > 100, told_of
    wanted = (
        "FORWARD",
        "REPLY",
        "FRAGMENT",
        "HELD",
        "CONSUMED",
        "DROP_NO_PORT",
        "DROP_FILTERED",
        "DROP_FRAGMENT",
    )
    assert not {name for name in wanted if not seen[Verdict[name]]}, seen
