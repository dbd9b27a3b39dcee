# SPDX-License-Identifier: Apache-2.0
"""One of two servers, with a clock, a pair and links of the test: what it tells, and what it makes of what it hears."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nat_control import config as c
from nat_control.standby import NOBODY
from nat_control.sync.actions import State
from nat_control.twin import Twin, role_of
from nat_fastpath.role import Role, RoleState
from tests.unit.test_pair_config import TWIN, with_sections

SILENCE = 6000  # µs: 2 ms x 3


class Bench:
    """The secondary, in step with a primary that carries."""

    def __init__(self) -> None:
        peer = TWIN["peer"] | {"on_split": "primary"}
        config = c.parse(with_sections(TWIN | {"peer": peer}, devices=True))
        assert config.peer
        assert config.peer.twin
        role = role_of(config)
        assert role
        self.role: Role = role
        self.now = 0.0
        self.links = True
        self.heard = {
            "alive": True, "peer_carries": True, "peer_unfit": False, "peer_term": 6, "stalled": False,
            "peer_both": False, "peer_silence_us": SILENCE,
        }  # fmt: skip
        self.protocol = SimpleNamespace(peer=None, apart=False, instance=1, term=0, precedence=None)
        watch = SimpleNamespace(stats=lambda: self.heard, fired="", follow=lambda role, state: None)
        self.pair: Any = SimpleNamespace(
            state=State.OPERATIONAL, differing=False, protocol=self.protocol, watch=watch
        )
        self.twin = Twin(config, role, clock=lambda: self.now, say=lambda line: None, fit=lambda: self.links)
        self.twin.bind(self.pair)

    def step(self, seconds: float = 0.01) -> None:
        self.now += seconds
        self.twin._step()


def test_timings_and_on_split_of_both_sides_are_compared() -> None:
    bench = Bench()
    bench.step()
    assert bench.twin.conditions() == {}
    bench.heard |= {"peer_silence_us": 40_000, "peer_both": True}
    found = bench.twin.conditions()
    assert "the peer waits 40 ms for our heartbeats, and we 6 ms for its" in found["silence"]
    assert "peer.on_split is both at the peer, and primary here" in found["on_split"]
    assert all("\n" not in line for line in found.values())
    bench.heard["alive"] = False  # then what it told last says nothing
    assert not {"silence", "on_split"} & bench.twin.conditions().keys()


@pytest.mark.parametrize(("its", "fence"), [(2000, 0.002), (40_000, 0.006), (0, 0.006)])
def test_the_fence_is_the_shorter_patience(its: int, fence: float) -> None:
    """Who is away for longer than the peer waits has been replaced, whatever the own file says."""
    bench = Bench()
    bench.heard["peer_silence_us"] = its
    bench.step()
    assert bench.role.fence == fence


def test_a_takeover_after_a_probe_counts_as_one() -> None:
    bench = Bench()
    bench.step()
    bench.heard["alive"] = False
    for _ in range(500):
        bench.step()
    assert bench.role.state is RoleState.PROBING
    bench.role.state = RoleState.ACTIVE  # the core: nobody has answered
    bench.step()
    assert bench.role.term == 7
    bench.step()
    assert bench.role.term == 7


def test_who_has_met_a_peer_in_step_gives_way_when_a_worker_stands_still() -> None:
    bench = Bench()
    bench.pair.state = State.EXCHANGING
    bench.step()
    assert not bench.role.yields, "the peer lacks the sessions"
    bench.pair.state = State.OPERATIONAL
    bench.step()
    assert bench.role.yields
    bench.pair.state = State.ALONE  # the peer has found it dead, and ended the connection
    bench.step()
    assert bench.role.yields
    bench.heard["peer_unfit"] = True
    bench.step()
    assert not bench.role.yields
    assert not bench.role.unfit
    bench.heard["stalled"] = True
    bench.step()
    assert bench.role.unfit, "or it would take it back"


@pytest.mark.parametrize("what", ["peer_unfit", "alive"])
def test_two_that_stand_by_while_something_toggles(what: str) -> None:
    bench = Bench()
    bench.heard["peer_carries"] = False
    while bench.role.state is RoleState.STANDBY:
        bench.heard[what] = not bench.heard[what]
        bench.step(0.2)
        assert bench.now < NOBODY[False] + 1, "nobody carries"
    assert bench.role.state is RoleState.PROBING


def test_who_ends_answers_nobody() -> None:
    bench = Bench()
    bench.role.state = RoleState.ACTIVE
    bench.step()
    bench.twin.leave()
    assert bench.role.state is RoleState.STANDBY
    bench.heard["peer_carries"] = False
    for _ in range(2000):
        bench.step()
        assert bench.role.state is RoleState.STANDBY
