# SPDX-License-Identifier: Apache-2.0
"""Two instances under losses and crashes, many seeds; and that planted bugs are found by the same runs."""

from __future__ import annotations

import pytest

from nat_control.sync.actions import Input, State
from nat_control.sync.protocol import TABLE, Handler, Protocol
from tests.sim.mutants import BUGS, MUTANT_SEEDS, ROWS, found_by_simulation
from tests.sim.world import simulate

SEEDS = 240


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_rule_is_broken(seed: int) -> None:
    try:
        simulate(seed)
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}\nreplay: python -m tests.sim {seed}")


def test_a_seed_replays() -> None:
    first: list[str] = []
    second: list[str] = []
    simulate(7, first.append)
    simulate(7, second.append)
    assert first == second
    assert len(first) > 100


def test_the_runs_reach_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[tuple[State, Input]] = set()

    def noting(row: tuple[State, Input], handler: Handler) -> Handler:
        def noted(self: Protocol, *arguments: object) -> None:
            reached.add(row)
            handler(self, *arguments)

        return noted

    for row, handler in TABLE.items():
        monkeypatch.setitem(TABLE, row, noting(row, handler))
    for seed in range(40):
        simulate(seed)
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
        if row[0] in connected and row[1] not in {*late, Input.BYE, Input.ERROR, Input.STOP}
    }
    assert wanted <= reached
    assert {
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
        (State.OPERATIONAL, Input.CARRIER),
    } <= reached


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    if not found_by_simulation():
        pytest.fail(f"{MUTANT_SEEDS} seeds do not find it")


def test_every_row_has_its_bug() -> None:
    assert set(ROWS) == {f"{state.value}, {kind.value}" for state, kind in TABLE}
