# SPDX-License-Identifier: Apache-2.0
"""Two instances under losses and crashes, many seeds; and that planted bugs are found by the same runs."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from nat_control.sync.actions import Input, State
from nat_control.sync.protocol import TABLE, Handler, Protocol
from tests.sim.mutants import BUGS, MUTANT_SEEDS, ROWS, SHOWN, found_by_simulation
from tests.sim.rules import RULES
from tests.sim.scenario import FAULTS, draw
from tests.sim.world import simulate

SEEDS = 150


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_rule_is_broken(seed: int) -> None:
    try:
        simulate(seed)
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}\nreplay: python -m tests.sim {seed}")


def trace_of(seed: int) -> str:
    """A hash of all that happens."""
    lines: list[str] = []
    simulate(seed, lines.append)
    assert len(lines) > 100
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("seed", [7, 38])
def test_a_seed_replays_in_any_process(seed: int) -> None:
    """Not even the order of a set may tell one run from another."""
    told = {trace_of(seed)}
    for hashing in ("1", "2"):
        ask = f"from tests.sim.test_sim import trace_of; print(trace_of({seed}))"
        done = subprocess.run(
            [sys.executable, "-c", ask],
            env={**os.environ, "PYTHONHASHSEED": hashing},
            capture_output=True,
            text=True,
            check=True,
        )
        told.add(done.stdout.strip())
    assert len(told) == 1


def test_every_fault_strikes() -> None:
    struck: Counter[str] = Counter()
    for seed in range(60):
        struck += simulate(seed).struck
        if set(struck) == set(FAULTS):
            break
    assert set(struck) == set(FAULTS)
    drawn = [draw(seed, random.Random(seed)).faults for seed in range(SEEDS)]
    assert all(sum(fault in faults for faults in drawn) > SEEDS / 20 for fault in FAULTS)
    assert frozenset() in drawn


def test_the_runs_reach_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[tuple[State, Input]] = set()

    def noting(row: tuple[State, Input], handler: Handler) -> Handler:
        def noted(self: Protocol, *arguments: object) -> None:
            reached.add(row)
            handler(self, *arguments)

        return noted

    for row, handler in TABLE.items():
        monkeypatch.setitem(TABLE, row, noting(row, handler))
    # What comes too late or too early has tests of its own.
    connected = {State.HANDSHAKE, State.EXCHANGING, State.OPERATIONAL}
    late = {
        Input.STATE_PAGE,
        Input.PLANE_DONE,
        Input.DIGEST_TAKEN,
        Input.BUCKETS_TAKEN,
        Input.FETCHED,
        Input.CARRIER,
        Input.FRONT_MOVED,
    }
    wanted = {
        row
        for row in TABLE
        if row[0] in connected and row[1] not in {*late, Input.BYE, Input.ERROR, Input.STOP, Input.HAND_OVER}
    }
    wanted |= {
        (State.EXCHANGING, Input.STATE_PAGE),
        (State.EXCHANGING, Input.PLANE_DONE),
        (State.OPERATIONAL, Input.BYE),
        (State.OPERATIONAL, Input.ERROR),
        (State.OPERATIONAL, Input.STOP),
        (State.FAILED, Input.EVENTS),
        (State.FAILED, Input.DISCONNECTED),
        (State.OPERATIONAL, Input.PLANE_DONE),
        (State.OPERATIONAL, Input.DIGEST_TAKEN),
        (State.OPERATIONAL, Input.BUCKETS_TAKEN),
        (State.OPERATIONAL, Input.FETCHED),
        (State.OPERATIONAL, Input.HAND_OVER),
        (State.OPERATIONAL, Input.CARRIER),
    }
    for seed in range(MUTANT_SEEDS):
        simulate(seed)
        if wanted <= reached:
            return
    pytest.fail(f"never reached: {wanted - reached}")


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    if not found_by_simulation():
        pytest.fail(f"{MUTANT_SEEDS} seeds do not find it")


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_broken(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[SHOWN[rule]](monkeypatch)
    if not found_by_simulation(rule=rule):
        pytest.fail(f"{MUTANT_SEEDS} seeds do not break it")


def test_every_row_has_its_bug() -> None:
    assert set(ROWS) == {f"{state.value}, {kind.value}" for state, kind in TABLE}
