# SPDX-License-Identifier: Apache-2.0
"""Any sequence of packets and waiting: the core does what the reference model does, and forgets nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nat_fastpath.core_config import PoolRange
from nat_fastpath.engine import Core, CoreError, Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OTHER_SERVER,
    OUTSIDE,
    SERVER,
    START,
    config,
    number,
    small_pool,
    text,
)
from tests.reference_nat import FORWARD, Datagram, Session
from tests.side_by_side import Pair, model_of

CLIENTS = st.sampled_from([CLIENT, OTHER_CLIENT])
SERVERS = st.sampled_from([SERVER, OTHER_SERVER])
INSIDE_PORTS, REMOTE_PORTS = st.integers(4000, 4002), st.sampled_from([53, 80])
FLAGS = st.sampled_from(["S", "SA", "A", "PA", "FA", "R", "RA", "FS", "F"])
KINDS = st.sampled_from(["udp", "udp", "tcp", "tcp", "query"])
PICK = st.integers(0, 1 << 16)


# the keyed one where the CPU has it; behaviour is the same
HASHES = ["fnv", "aes"] if "aes" in Path("/proc/cpuinfo").read_text().split() else ["fnv"]


def one_by_one(pool: tuple[PoolRange, ...]) -> list[PoolRange]:
    """A range for each address, so that they come and go by themselves."""
    return [
        replace(part, first=at, last=at) for part in pool for at in range(int(part.first), int(part.last) + 1)
    ]


class Sequences(RuleBasedStateMachine):
    """Few hosts and ports, so that they meet; a small pool, so that it is exhausted now and then."""

    @initialize(
        mapping=st.sampled_from(["endpoint-independent", "endpoint-dependent"]),
        filtering=st.sampled_from(
            ["address-and-port-dependent", "address-dependent", "endpoint-independent"]
        ),
        ports=st.sampled_from([2, 5, 64]),
        addresses=st.sampled_from([1, 2]),
        sessions_per_host=st.sampled_from([0, 0, 6]),
        mappings_per_host=st.sampled_from([0, 0, 3]),
        max_sessions=st.sampled_from([8, 1024]),
        seed=st.integers(1, 1 << 32),
        port_preservation=st.booleans(),
        port_parity=st.booleans(),
        flow_hash=st.sampled_from(HASHES),
    )
    def begin(self, ports: int, addresses: int, **limits: object) -> None:
        # the proof at the end takes every port at once, so the table must hold that many sessions
        limits["max_sessions"] = max(int(str(limits["max_sessions"])), ports * addresses * 3 + 1)
        for name in ("sessions_per_host", "mappings_per_host"):
            if ports * addresses > 10:
                limits[name] = 0
        self.pool = one_by_one(small_pool(ports, addresses))
        self.pair = Pair(Core(config(pool=tuple(self.pool), **limits)), START)

    def session(self, pick: int) -> Session:
        sessions = self.pair.model.sessions()
        return sessions[pick % len(sessions)]

    def has_sessions(self) -> bool:
        return bool(self.pair.model.mappings)

    @rule(kind=KINDS, client=CLIENTS, sport=INSIDE_PORTS, server=SERVERS, dport=REMOTE_PORTS, flags=FLAGS)
    def out(self, kind: str, client: str, sport: int, server: str, dport: int, flags: str) -> None:
        remote = server, 0 if kind == "query" else dport
        self.pair.send(Datagram(kind, (client, sport), remote, flags=flags if kind == "tcp" else ""), INSIDE)

    @rule(
        kind=st.sampled_from(["udp", "tcp"]),
        client=CLIENTS,
        sport=INSIDE_PORTS,
        server=SERVERS,
        dport=REMOTE_PORTS,
    )
    def open(self, kind: str, client: str, sport: int, server: str, dport: int) -> None:
        self.pair.send(Datagram(kind, (client, sport), (server, dport), flags="S" * (kind == "tcp")), INSIDE)

    @precondition(has_sessions)
    @rule(pick=PICK, outwards=st.booleans(), flags=FLAGS, ttl=st.sampled_from([1, 2, 64]))
    def packet_of_session(self, pick: int, outwards: bool, flags: str, ttl: int) -> None:
        """A packet of a session, translated and translated back: the other direction restores it exactly."""
        session = self.session(pick)
        m = session.mapping
        if session.hairpin and not outwards:
            return
        ends = (m.internal, session.remote) if outwards else (session.remote, m.external)
        kind = m.protocol if m.protocol != "icmp" else ("query" if outwards else "answer")
        sent = Datagram(kind, *ends, flags=flags if kind == "tcp" else "", ttl=ttl)
        verdict, got = self.pair.send(sent, INSIDE if outwards else OUTSIDE)
        if verdict == Verdict.FORWARD and not session.hairpin:
            assert got is not None
            expected = (m.external, session.remote) if outwards else (session.remote, m.internal)
            assert (got.source, got.destination) == expected

    @precondition(has_sessions)
    @rule(pick=PICK, other=PICK, known=st.booleans(), server=SERVERS, sport=REMOTE_PORTS, flags=FLAGS)
    def stranger(self, pick: int, other: int, known: bool, server: str, sport: int, flags: str) -> None:
        """To an external endpoint that is in use, from anybody, or from the remote end of another session."""
        m = self.session(pick).mapping
        answer = flags == "S"
        if known and not self.session(other).hairpin:
            server, sport = self.session(other).remote
        if m.protocol == "icmp":
            self.pair.send(Datagram("answer" if answer else "query", (server, 0), m.external), OUTSIDE)
        else:
            flags = flags if m.protocol == "tcp" else ""
            self.pair.send(Datagram(m.protocol, (server, sport), m.external, flags=flags), OUTSIDE)

    @rule(kind=KINDS, server=SERVERS, dport=st.integers(1998, 2066), inside_pool=st.booleans())
    def nobody(self, kind: str, server: str, dport: int, inside_pool: bool) -> None:
        to = "198.51.100.10" if inside_pool else "198.51.100.77"
        if kind == "query":
            self.pair.send(Datagram("answer", (server, 0), (to, dport)), OUTSIDE)
        else:
            self.pair.send(Datagram(kind, (server, 9), (to, dport), flags="S" * (kind == "tcp")), OUTSIDE)

    @precondition(has_sessions)
    @rule(pick=PICK, client=CLIENTS, sport=INSIDE_PORTS, flags=FLAGS)
    def hairpin(self, pick: int, client: str, sport: int, flags: str) -> None:
        m = self.session(pick).mapping
        if m.protocol != "icmp":
            flags = flags if m.protocol == "tcp" else ""
            self.pair.send(Datagram(m.protocol, (client, sport), m.external, flags=flags), INSIDE)

    @precondition(has_sessions)
    @rule(pick=PICK, outwards=st.booleans(), by=st.sampled_from([SERVER, "192.0.2.33"]), wrong=st.booleans())
    def icmp_error(self, pick: int, outwards: bool, by: str, wrong: bool) -> None:
        """An error about a packet of a session, from its end or from a router on the way; or about none."""
        session = self.session(pick)
        m = session.mapping
        # what travelled: translated to the outside, or to the inside
        ends = (session.remote, m.internal) if outwards else (m.external, session.remote)
        kind = m.protocol if m.protocol != "icmp" else ("answer" if outwards else "query")
        if session.hairpin and not outwards:
            return
        if wrong:
            ends = ((ends[0][0], (ends[0][1] + 5) % 65536), ends[1]) if kind != "answer" else ends
        quoted = Datagram(kind, *ends, flags="A" if kind == "tcp" else "", ttl=40)
        source = m.internal[0] if outwards else by
        error = Datagram("error", (source, 0), (quoted.source[0], 0), quoted=quoted)
        self.pair.send(error, INSIDE if outwards else OUTSIDE)

    @rule(seconds=st.sampled_from([1, 59, 60, 239, 240, 299, 300, 7439, 7440]))
    def wait(self, seconds: int) -> None:
        self.pair.wait(seconds)

    @rule(
        udp_timeout=st.sampled_from([60, 300]),
        icmp_timeout=st.sampled_from([30, 60]),
        filtering=st.sampled_from(["address-and-port-dependent", "endpoint-independent"]),
        limit=st.sampled_from([0, 6]),
        drained=st.sampled_from([None, None, 0, 1]),
        gone=st.booleans(),
    )
    def reconfigure(
        self, filtering: str, limit: int, drained: int | None, gone: bool, **timeouts: int
    ) -> None:
        """Sessions survive any change, and from then on the new rules hold. An address that is used does not go."""
        core, model = self.pair.core, self.pair.model
        if core.config.mapping != "endpoint-independent" or core.config.filtering == "address-dependent":
            filtering = core.config.filtering
        changes: dict[str, Any] = {"filtering": filtering, **timeouts}
        if core.config.sessions_per_host:
            changes["sessions_per_host"] = limit or 1024
        pool = list(self.pool)
        if drained is not None and len(pool) > 1:
            pool[drained : drained + 1] = [] if gone else [replace(pool[drained], own=(1, 0))]
        change = core.prepare(replace(core.config, pool=tuple(pool), **changes))
        left = {text(int(part.first)) for part in self.pool} - {text(int(part.first)) for part in pool}
        if used := left & {m.external[0] for m in model.mappings.values()}:
            with pytest.raises(CoreError, match="has mappings"):
                change.apply()
            assert sum(core.mappings_on(number(address)) for address in used) > 0
            return
        change.apply()
        change.reroute()
        after = model_of(core)
        for name in ("pool", "filtering", "sessions_per_host", "udp_timeout", "icmp_timeout"):
            setattr(model, name, getattr(after, name))
        # a host whose address has nothing to hand out gets another one
        model.homes = {host: home for host, home in model.homes.items() if model.pool.get(home)}

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            limits = self.pair.core.config
            if not limits.sessions_per_host and not limits.mappings_per_host:
                self.pair.empty()


Sequences.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    # a failing sequence is short enough to read, and shrinking one takes minutes
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSequences = pytest.mark.timeout(110)(Sequences.TestCase)


def test_the_model_is_no_mirror_of_the_core() -> None:
    """The model finds a wrong choice of port: what the core would have to do wrong to be caught."""
    pair = Pair(Core(config()), START)
    sent = Datagram("udp", (CLIENT, 4000), (SERVER, 53))
    assert pair.model.outbound(sent, 0, lambda _: ("198.51.100.10", 5000))[0] == FORWARD
    other = Datagram("udp", (OTHER_CLIENT, 4000), (SERVER, 53))
    for illegal in (("198.51.100.10", 5000), ("198.51.100.99", 5000), ("198.51.100.10", 80)):
        with pytest.raises(AssertionError):
            pair.model.outbound(other, 0, lambda _, illegal=illegal: illegal)
