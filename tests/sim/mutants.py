# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: ``python -m tests.sim.mutants [PROCESSES]`` plants one after the other, prints how many are found, and fails when one is not.

A bug in every row of TABLE (it does nothing; where it should do nothing, what it does while operational, or it is not
there), found by the unit tests of the machine or by simulation; bugs by hand, which simulation alone must find; and for every
rule of the simulation a bug that breaks this one.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import sys
import time
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
    Message,
    Offload,
    Ready,
    encode,
)
from nat_control.sync.hearsay import Hearsay
from nat_control.sync.merge import Merging
from nat_control.sync.outbox import Outbox
from nat_control.sync.protocol import TABLE, Handler, Protocol
from nat_fastpath.engine import FLAG_FOREIGN
from tests.memory_plane import IDLE, Endpoint, Key, MemoryPlane, inside, outside
from tests.sim import node
from tests.sim.plane import AgeingPlane
from tests.sim.rules import Violation
from tests.sim.world import simulate

MUTANT_SEEDS = 400  # by then a planted bug must be found
KEEN = (17, 18, 32, 86, 235)  # seeds that find what few others do, so tried early
FEW = 20  # that cost less than the unit tests
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


def both(one: Plant, other: Plant) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        one(patch)
        other(patch)

    return plant


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


def dropped_later(self: Protocol, message: InstallEntries, now: float) -> None:
    if (earlier := vars(self).get("earlier")) is not None:
        self._delete_at_plane(Input.EVENTS, 0, earlier)
    vars(self)["earlier"] = message.records
    Protocol._install(self, message, now)


def never_finished(self: Protocol, op: int, refused: Ids, now: float) -> None:
    operation = self._plane.get(op)
    Protocol._plane_done(self, op, refused, now)
    if operation is not None and operation.answer is Input.DELETE:
        self._plane[op] = operation


def ceded_before_the_answer(self: Merging, records: Records, refused: Ids) -> None:
    self._offered = NO_IDS
    answered_there(self, records, refused)


answered_there = Merging._answered_there


def any_port(self: MemoryPlane, protocol: int) -> Endpoint:
    address, port = self._rng.choice(self._own)
    return protocol, address, port


def kept_port(self: MemoryPlane, key: Key, reason: int = IDLE) -> None:
    record = self.held[key]
    endpoints = outside(record), inside(record)
    close(self, key, reason)
    self.owner.setdefault(*endpoints)


close = MemoryPlane.close


def cut_short(message: Message, epoch: int) -> bytes:
    return encode(message, epoch)[: -1 if isinstance(message, DeleteEntries) else None]


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
    "what was acknowledged is dropped later": instead(State.OPERATIONAL, Input.INSTALL, dropped_later),
    "an operation is never finished": instead(State.OPERATIONAL, Input.PLANE_DONE, never_finished),
    "an operation is waited for without end": both(
        instead(State.OPERATIONAL, Input.PLANE_DONE, never_finished),
        method(Merging, "_hangs", lambda self, now: False),
    ),
    "Ready is not heard": instead(State.EXCHANGING, Input.READY, Protocol._nothing),
    "any number of changes may wait": method(Protocol, "_bound", lambda self: None),
    "TCP states are not told": instead(State.OPERATIONAL, Input.UPDATE, Protocol._nothing),
    "what was heard is told back": method(Hearsay, "heard", lambda self, records, now: None),
    "traffic is not told to the owner": method(Hearsay, "carried", lambda self, page: NO_RECORDS),
    "what both hold ages as if nobody else had seen it": method(
        AgeingPlane, "_used", lambda self, held, idle_ms: None
    ),
    "given back before the peer says that it holds it": method(
        Merging, "_answered_there", ceded_before_the_answer
    ),
    "a plane gives a port twice": method(MemoryPlane, "_free", any_port),
    "a plane never gives a port back": method(MemoryPlane, "close", kept_port),
    "a message is cut short": method(node, "encode", cut_short),
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


# The rules that a bug must be seen to break: each of them can fail.
SHOWN: dict[str, str] = {
    "released": "packets leave before the peer holds the session",
    "protected": "what was acknowledged is dropped later",
    "endpoint": "a plane gives a port twice",
    "live": "traffic is not told to the owner",
    "alone": "ownership is not taken",
    "bounded": "any number of changes may wait",
    "bytes": "a message is cut short",
    "held": "acknowledged, not released",
    "operational": "Ready is not heard",
    "refused": "openings before ends",
    "front": "a move is answered before it is done",
    "rest": "an operation is waited for without end",
    "given up": "an operation is never finished",
    "equal": "late answers end the exchange",
    "content": "TCP states are not told",
    "owner": "nothing is ceded",
    "ports": "a plane never gives a port back",
    "digest": "digests of different moments are compared",
    "asked": "a request is taken for its answer",
    "next hops": "next hops are not learned",
}


# -- who finds them -------------------------------------------------------------------------------------------


def found_by_simulation(seeds: int = MUTANT_SEEDS, rule: str = "") -> bool:
    """``rule``: this one must be broken, not just any."""
    for seed in sorted(range(seeds), key=lambda seed: (seed >= 10, seed not in KEEN, seed)):
        try:
            simulate(seed)
        except Exception as error:
            if not rule or (isinstance(error, Violation) and error.rule == rule):
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
    """Of a bug by its name, or of a rule that it breaks."""
    with pytest.MonkeyPatch.context() as patch:
        if name in ROWS:
            ROWS[name](patch)
            return name, found_by_simulation(FEW) or found_by_unit_tests() or found_by_simulation()
        BUGS[SHOWN.get(name, name)](patch)
        return name, found_by_simulation(rule=name if name in SHOWN else "")


def main() -> None:
    if found_by_unit_tests():
        sys.exit("the unit tests fail without any bug")
    began, kinds = time.monotonic(), {"rows of the table": ROWS, "bugs by hand": BUGS, "rules broken": SHOWN}
    found = dict.fromkeys([name for kind in kinds.values() for name in kind], False)
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else None
    with multiprocessing.Pool(workers) as pool:
        for done, (name, killed) in enumerate(pool.imap_unordered(is_found, found), 1):
            found[name] = killed
            if not killed:
                print(f"not found: {name}", flush=True)
            if done % 20 == 0:
                print(f"{done} of {len(found)} tried, {time.monotonic() - began:.0f} s", flush=True)
    for kind, names in kinds.items():
        print(f"{kind}: {sum(found[name] for name in names)}/{len(names)}")
    print(f"planted bugs killed: {sum(found.values())}/{len(found)}, in {time.monotonic() - began:.0f} s")
    sys.exit(not all(found.values()))


if __name__ == "__main__":
    main()
