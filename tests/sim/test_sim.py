# SPDX-License-Identifier: Apache-2.0
"""Two instances under losses and crashes, many seeds; and that planted bugs are found by the same runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, Ids, Records
from nat_control.sync import machine, outbox
from nat_control.sync.actions import (
    Cede,
    Commit,
    Delete,
    Input,
    Install,
    Learn,
    PeerCarries,
    Position,
    SendState,
    State,
    TakeOwnership,
)
from nat_control.sync.codec import (
    Buckets,
    DeleteComplete,
    DeleteEntries,
    InitState,
    InstallComplete,
    InstallEntries,
    Ready,
)
from nat_control.sync.outbox import Outbox
from nat_control.sync.protocol import TABLE, Handler, Protocol
from nat_fastpath.engine import FLAG_FOREIGN
from tests.sim.world import simulate

SEEDS = 240
MUTANT_SEEDS = 400  # by then a planted bug must be found


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
    late = {Input.STATE_PAGE, Input.PLANE_DONE, Input.DIGEST_TAKEN, Input.HANDED_OVER}
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
        (State.OPERATIONAL, Input.HANDED_OVER),
    } <= reached


# -- planted bugs -----------------------------------------------------------------------------------------


def without(kind: type) -> Callable[[pytest.MonkeyPatch], None]:
    """The machine forgets all actions of a kind."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        take = Protocol._take

        def forgetful(self: Protocol) -> object:
            return [action for action in take(self) if not isinstance(action, kind)]

        patch.setattr(Protocol, "_take", forgetful)

    return plant


def instead(state: State, kind: Input, handler: Handler) -> Callable[[pytest.MonkeyPatch], None]:
    """One row of the table does something else."""
    return lambda patch: patch.setitem(TABLE, (state, kind), handler)


def method(owner: object, name: str, replacement: object) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, replacement)


def release_at_once(self: Protocol, changes: Changes, now: float) -> None:
    self._commit(changes.opened)
    self._enqueue(changes, hold=False)
    self._flush(now)


def acknowledge_before_installing(self: Protocol, message: InstallEntries, now: float) -> None:
    Protocol._install(self, message, now)
    self._plane.popitem()
    self._send(InstallComplete(message.txid))


def acknowledge_without_deleting(self: Protocol, message: DeleteEntries, now: float) -> None:
    self._changed(message.txid)
    self._send(DeleteComplete(message.txid))


def never_acknowledge(self: Protocol, message: DeleteEntries, now: float) -> None:
    Protocol._delete(self, message, now)
    self._plane.popitem()


def ready_before_installed(self: Protocol, message: InitState, now: float) -> None:
    Protocol._init_state(self, message, now)
    if message.last and self._exchange.installing:
        self._exchange.installing = 0
        self._ready_if_installed(now)


def forget_part_of_the_state(self: Protocol, message: InitState, now: float) -> None:
    kept = InitState(message.txid, message.chunk, message.last, message.records[:2])
    Protocol._init_state(self, kept, now)


def operational_on_ready(self: Protocol, message: Ready, now: float) -> None:
    self._exchange.ready_sent = True
    Protocol._ready(self, message, now)


def cede_nothing_back(self: Protocol, message: Ready, now: float) -> None:
    Protocol._ready(self, message, now)
    self._out = [action for action in self._out if not isinstance(action, Cede)]


def forget_what_ended(self: Protocol, changes: Changes, now: float) -> None:
    Protocol._events_buffer(self, changes, now)
    self._exchange.closed.clear()


def tell_no_ends(self: Protocol, changes: Changes, now: float) -> None:
    Protocol._tell(self, changes._replace(closed=NO_RECORDS), now)


def tell_no_openings(self: Protocol, changes: Changes, now: float) -> None:
    Protocol._tell(self, changes._replace(opened=NO_RECORDS), now)


def acknowledged_but_not_released(self: Protocol, message: InstallComplete, now: float) -> None:
    self._outbox.acknowledged(Input.INSTALL, message.txid)
    self._flush(now)


def window_not_opened(self: Protocol, message: InstallComplete, now: float) -> None:
    batch = self._outbox.acknowledged(Input.INSTALL, message.txid)
    assert batch is not None
    self._commit(batch.held)


def compare_whatever_happened_since(
    self: Protocol, at: Position, buckets: Buckets, count: int, now: float
) -> None:
    if self._peer_digest:
        self._peer_digest = self._position, self._peer_digest[1]
    Protocol._digest_taken(self, self._position, buckets, count, now)


def openings_first(self: Outbox, changes: Changes, *, hold: bool) -> None:
    self._append(Input.INSTALL, changes.opened, hold=hold)
    self._append(Input.DELETE, changes.closed)
    self._append(Input.UPDATE, changes.updated)


def openings_of_the_ended(self: Outbox, changes: Changes, *, hold: bool) -> None:
    self._append(Input.DELETE, changes.closed)
    self._append(Input.INSTALL, changes.opened, hold=hold)


def nothing_held(self: Outbox) -> Records:
    return NO_RECORDS


def own_what_comes(self: Protocol, answer: Input, txid: int, records: Records) -> None:
    ours = records.copy()
    ours["flags"] &= 0xFF ^ FLAG_FOREIGN
    self._out.append(Install(self._operation(answer, txid, ours), ours))


def nobody_elses(records: Records) -> Ids:
    return np.zeros(len(records), np.uint64)


EVENTS = (State.OPERATIONAL, Input.EVENTS)
BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "packets leave before the peer holds the session": instead(*EVENTS, release_at_once),
    "acknowledged before installed": instead(State.OPERATIONAL, Input.INSTALL, acknowledge_before_installing),
    "deletion acknowledged, not done": instead(State.OPERATIONAL, Input.DELETE, acknowledge_without_deleting),
    "deletion never acknowledged": instead(State.OPERATIONAL, Input.DELETE, never_acknowledge),
    "Ready before the state is installed": instead(
        State.EXCHANGING, Input.INIT_STATE, ready_before_installed
    ),
    "part of the state is lost": instead(State.EXCHANGING, Input.INIT_STATE, forget_part_of_the_state),
    "operational on the peer's Ready alone": instead(State.EXCHANGING, Input.READY, operational_on_ready),
    "nothing is ceded": instead(State.EXCHANGING, Input.READY, cede_nothing_back),
    "changes during the exchange are lost": instead(State.EXCHANGING, Input.EVENTS, Protocol._events_alone),
    "what ended during the exchange comes back": instead(State.EXCHANGING, Input.EVENTS, forget_what_ended),
    "ends are not told": instead(*EVENTS, tell_no_ends),
    "openings are not told": instead(*EVENTS, tell_no_openings),
    "acknowledged, not released": instead(
        State.OPERATIONAL, Input.INSTALL_COMPLETE, acknowledged_but_not_released
    ),
    "the window never opens": instead(State.OPERATIONAL, Input.INSTALL_COMPLETE, window_not_opened),
    "digests of different moments are compared": instead(
        State.OPERATIONAL, Input.DIGEST_TAKEN, compare_whatever_happened_since
    ),
    "openings before ends": method(Outbox, "add", openings_first),
    "ended sessions are opened at the peer": method(Outbox, "add", openings_of_the_ended),
    "held packets stay when the peer is lost": method(Outbox, "held", nothing_held),
    "held packets are not marked": method(outbox, "pending", lambda records: NO_RECORDS),
    "nothing is released": without(Commit),
    "ownership is not taken": without(TakeOwnership),
    "the state is not sent": without(SendState),
    "nothing is installed": without(Install),
    "nothing is deleted": without(Delete),
    "next hops are not learned": without(Learn),
    "next hops are not told": instead(State.OPERATIONAL, Input.NEXT_HOPS, Protocol._nothing),
    "a request is taken for its answer": instead(
        State.OPERATIONAL,
        Input.PEER_HANDS_OVER,
        lambda self, message, now: self._out.append(PeerCarries()),
    ),
    "what comes is owned": method(Protocol, "_install_at_plane", own_what_comes),
    "what comes is foreign": method(machine, "instances", nobody_elses),
    "late answers end the exchange": instead(
        State.EXCHANGING,
        Input.PLANE_DONE,
        lambda self, op, refused, now: Protocol._plane_done(self, next(iter(self._plane), op), NO_IDS, now),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    for seed in range(MUTANT_SEEDS):
        try:
            simulate(seed)
        except Exception:
            return
    pytest.fail(f"{MUTANT_SEEDS} seeds do not find it")
