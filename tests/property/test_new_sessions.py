# SPDX-License-Identifier: Apache-2.0
"""What a burst does with new sessions is what each of its packets would do alone: a traced core takes them so, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_fastpath.engine import Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OUTSIDE,
    SERVER,
    Nat,
    echo,
    external,
    frame,
    host_mac,
    remote,
    small_pool,
    tagged_ports,
    tcp,
    udp,
    vlan,
)

PLAIN = ("8.8.8.8", "8.8.4.4", "192.0.2.1")  # of which the configuration says nothing
INSIDERS = (CLIENT, OTHER_CLIENT, "10.0.0.77", "10.1.0.7")  # two without a static neighbour
MANY, LONG = 1 << 20, 3000

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "endpoint-dependent": {"mapping": "endpoint-dependent"},
    "address-dependent": {"filtering": "address-dependent"},
    "open": {"filtering": "endpoint-independent"},
    "few ports": {"pool": small_pool(3)},
    "few sessions": {"max_sessions": 4},
    "quotas": {"sessions_per_host": 3, "mappings_per_host": 2},
    "budget": {"new_sessions_rate": 100, "new_sessions_burst": 4},
    "few events": {"event_ring": 16},
    "few neighbours": {"max_neighbours": 45},
    "synchronous": {"synchronous": True, "max_held": 64},
    "tags": {"ports": tagged_ports(100, 200)},
    "parity and preservation": {"port_parity": True, "port_preservation": True},
}
OUTBOUND = st.tuples(
    st.just("out"),
    st.sampled_from(("udp", "udp", "tcp", "echo")),
    st.sampled_from(INSIDERS),
    st.integers(4000, 4003),
    st.sampled_from((*PLAIN, *PLAIN, SERVER)),
    st.integers(53, 54),
    st.sampled_from("SSSARF"),
    st.sampled_from((64, 64, 64, 64, 1)),
)
INBOUND = st.tuples(
    st.just("in"),
    st.integers(0, 20),  # of which session; beyond them: to nobody
    st.sampled_from((*PLAIN, SERVER, CLIENT, "224.0.0.1", "127.0.0.1")),
    st.booleans(),  # from the session's own remote end
    st.sampled_from(("S", "SA", "A")),
)
BURSTS = st.lists(
    st.lists(st.one_of(OUTBOUND, OUTBOUND, INBOUND), min_size=1, max_size=40), min_size=1, max_size=4
)


class Side:
    def __init__(self, alone: bool, changes: dict[str, Any]) -> None:
        self.nat = Nat(**changes)
        self.tag = [port.vlan for port in changes.get("ports", ())]
        if alone:
            self.nat.core.poll(self.nat.now)
            assert self.nat.core.trace_start(MANY, LONG, internal_port=1)

    def _frame(self, packet: Any, port: int, mac: str | None = None) -> tuple[int, bytes]:
        return port, vlan(packet, self.tag[port], port) if self.tag else frame(packet, port, mac)

    def sessions(self) -> np.ndarray[Any, Any]:
        records = self.nat.sessions()
        return records[
            np.argsort(
                records, order=["internal_addr", "internal_port", "remote_addr", "remote_port", "protocol"]
            )
        ]

    def burst(self, packets: list[Any]) -> list[str]:
        known = self.sessions()
        frames = []
        for packet in packets:
            if packet[0] == "out":
                _, kind, host, port, server, at, flags, ttl = packet
                mac = None if host in (CLIENT, OTHER_CLIENT) else host_mac(host)
                if kind == "echo":
                    frames.append(self._frame(echo(host, server, port, ttl=ttl), INSIDE, mac))
                elif kind == "udp":
                    frames.append(self._frame(udp(host, port, server, at, ttl=ttl), INSIDE, mac))
                else:
                    frames.append(self._frame(tcp(host, port, server, at, flags, ttl=ttl), INSIDE, mac))
                continue
            _, which, source, own, flags = packet
            end, sender, protocol = ("198.51.100.10", 2001), (source, 53), 17
            if which < len(known):
                record = known[which]
                end, protocol = external(record), int(record["protocol"])
                sender = remote(record) if own else sender
            if protocol == 1:
                frames.append(self._frame(echo(sender[0], end[0], end[1], reply=True), OUTSIDE))
            elif protocol == 6:
                frames.append(self._frame(tcp(*sender, *end, flags), OUTSIDE))
            else:
                frames.append(self._frame(udp(*sender, *end), OUTSIDE))
        return [result.verdict.name for result in self.nat.burst(frames)]

    def state(self) -> dict[str, Any]:
        """But for which ports were chosen, and how."""
        sessions = self.sessions()
        for name in ("id", "mapping_id", "external_addr", "external_port"):
            sessions[name] = 0
        left_out = ("index_steps", "commands", "unpaired", "parity_missed", "class_missed", "no_port_resting")
        return {
            "sessions": [bytes(record) for record in sessions],
            "hosts": sorted(bytes(host)[:12] for host in self.nat.core.hosts()),
            "neighbours": sorted(bytes(one) for one in self.nat.core.neighbours()),
            "verdicts": self.nat.core.verdicts().tolist(),
            "counters": {name: n for name, n in self.nat.core.counters().items() if name not in left_out},
        }


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=40, deadline=None)
@given(bursts=BURSTS)
def test_a_burst_is_its_packets_one_by_one(name: str, bursts: list[list[Any]]) -> None:
    sides = [Side(False, CONFIGS[name]), Side(True, CONFIGS[name])]
    for burst in bursts:
        together, alone = (side.burst(burst) for side in sides)
        assert together == alone
        for side in sides:
            side.nat.now += 1_000_000
    assert sides[0].state() == sides[1].state()


def test_what_an_answer_opens_is_found_by_the_question_behind_it() -> None:
    nat = Nat(filtering="endpoint-independent")
    nat.out(udp(CLIENT, 4000, "8.8.8.8", 53))
    end = external(nat.sessions()[0])
    question, answer = udp(CLIENT, 4000, "8.8.4.4", 53), udp("8.8.4.4", 53, *end)
    results = nat.burst([(OUTSIDE, frame(answer, OUTSIDE)), (INSIDE, frame(question))])
    assert [result.verdict for result in results] == [Verdict.FORWARD] * 2
    assert len(nat.sessions()) == 2
