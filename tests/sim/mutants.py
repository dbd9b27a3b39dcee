# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: ``python -m tests.sim.mutants`` plants one after the other, prints how many are found, and fails when one is not.

A bug in every row of TABLE (it does nothing; where it should do nothing, what it does while operational, or it is not
there), found by the unit tests of the machine or by simulation; and bugs by hand, which simulation alone must find.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, Ids, Records
from nat_control.offload import FrontView
from nat_control.sync import machine, outbox
from nat_control.sync.actions import (
    CarrierTold,
    Cede,
    Commit,
    Delete,
    Input,
    Install,
    Learn,
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
    Offload,
    Ready,
)
from nat_control.sync.outbox import Outbox
from nat_control.sync.protocol import TABLE, Handler, Protocol
from nat_fastpath.engine import FLAG_FOREIGN
from tests.sim.world import simulate

MUTANT_SEEDS = 400  # by then a planted bug must be found
Plant = Callable[[pytest.MonkeyPatch], None]


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


def moved_before(self: Protocol, message: Offload, now: float) -> None:
    Protocol._offload(self, message, now)
    self._front_moved(next(reversed(self._moves)), 0, message.ids)


def all_moved(self: FrontView, txid: int, room: int, ids: Ids, now: float) -> Ids:
    asked, front = self._asked.pop(txid)
    self._put(self.fronts[~np.isin(self.ids, asked)], asked if front else NO_IDS, now)
    return NO_IDS


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
    "a move is answered before it is done": instead(State.OPERATIONAL, Input.OFFLOAD, moved_before),
    "what was asked for is taken for what is there": method(FrontView, "moved", all_moved),
    "a request is taken for its answer": instead(
        State.OPERATIONAL,
        Input.PEER_HANDS_OVER,
        lambda self, message, now: self._out.append(CarrierTold(message.carrier, message.lasting, "")),
    ),
    "what comes is owned": method(Protocol, "_install_at_plane", own_what_comes),
    "what comes is foreign": method(machine, "instances", nobody_elses),
    "late answers end the exchange": instead(
        State.EXCHANGING,
        Input.PLANE_DONE,
        lambda self, op, refused, now: Protocol._plane_done(self, next(iter(self._plane), op), NO_IDS, now),
    ),
}


def row_bug(row: tuple[State, Input]) -> Plant:
    """The row does nothing; one that should does what it does while operational, or is not there."""
    state, kind = row
    if TABLE[row] is not Protocol._nothing:
        return instead(state, kind, Protocol._nothing)
    usual = TABLE.get((State.OPERATIONAL, kind), Protocol._nothing)
    if usual is Protocol._nothing or kind in (
        Input.PLANE_DONE,
        Input.FETCHED,
        Input.FRONT_MOVED,
    ):  # of an unknown operation: nothing
        return lambda patch: patch.delitem(TABLE, row)
    return instead(state, kind, usual)


ROWS: dict[str, Plant] = {f"{state.value}, {kind.value}": row_bug((state, kind)) for state, kind in TABLE}


# -- who finds them -------------------------------------------------------------------------------------------


def found_by_simulation() -> bool:
    for seed in range(MUTANT_SEEDS):
        try:
            simulate(seed)
        except Exception:
            return True
    return False


def found_by_unit_tests() -> bool:
    unit = Path(__file__).parents[1] / "unit"
    files = [str(unit / f"test_{name}.py") for name in ("protocol", "merge", "offload_protocol")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(said.getvalue())
    return code == pytest.ExitCode.TESTS_FAILED


def is_found(name: str) -> tuple[str, bool]:
    with pytest.MonkeyPatch.context() as patch:
        if plant := BUGS.get(name):
            plant(patch)
            return name, found_by_simulation()
        ROWS[name](patch)
        return name, found_by_unit_tests() or found_by_simulation()


def main() -> None:
    if found_by_unit_tests():
        sys.exit("the unit tests fail without any bug")
    names, found = [*ROWS, *BUGS], 0
    with multiprocessing.Pool() as pool:
        for name, killed in pool.imap_unordered(is_found, names):
            found += killed
            if not killed:
                print(f"not found: {name}", flush=True)
    print(f"{found} of {len(names)} planted bugs are found; {len(ROWS)} of them in the rows of the table")
    sys.exit(found < len(names))


if __name__ == "__main__":
    main()
