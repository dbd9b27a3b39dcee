# SPDX-License-Identifier: Apache-2.0
"""What all parts of the sync protocol's machine share: its state, and the steps that more than one of them takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, Ids, Records
from nat_control.sync import codec
from nat_control.sync.actions import (
    Action,
    Close,
    Commit,
    Conflicts,
    Delete,
    ErrorCode,
    Input,
    Install,
    Limits,
    Mode,
    Position,
    Precedence,
    Send,
    State,
    StateChanged,
    TakeOwnership,
)
from nat_control.sync.codec import Digest, Entries, Error, Hello, Message, PoolRange
from nat_control.sync.exchange import Exchange, instances
from nat_control.sync.outbox import Outbox, pending
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_INBOUND, FLAG_PREVAILS, RECORD
from nat_fastpath.tables import copied, joined


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Of two digests; when, and how many sessions each side had in its own."""

    when: float
    differing: tuple[int, ...]
    ours: int
    theirs: int | None  # None: unequal, and the peer has compared


@dataclass(frozen=True, slots=True, eq=False)
class _Operation:
    """Of the plane: what it answers, and the sessions that it is about."""

    answer: Input
    txid: int
    records: Records
    ended: list[Ids] = field(default_factory=list)  # since it began, if it looks for sessions


class Machine:
    def __init__(
        self,
        instance: int,
        pools: tuple[PoolRange, ...],
        mode: Mode,
        *,
        epoch: int = 0,
        term: int = 0,
        slices: int = 1,
        kind: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self.instance = instance
        self.pools = pools
        self.mode = mode
        self.epoch = epoch
        self.term = term
        self.slices = slices
        self.kind = kind  # of pair; see Hello
        self.limits = limits or Limits()
        self.state = State.STARTING
        self.heartbeat_key = codec.NO_KEY
        self.peer: Hello | None = None
        self._rank = (0, 0, 0)  # of our last Hello
        self.precedence = Precedence.CARRIES  # for the next Hello
        self.conflicts = 0  # sessions refused, here or at the peer, since the start
        self.gaps = 0  # in the peer's changes, since the start
        self.mended = 0  # sessions that one side alone held, since the start
        self.messages: dict[str, Counter[str]] = {"sent": Counter(), "received": Counter()}
        self.last_error = ""
        self._out: list[Action] = []
        self._last_txid = 0
        self._forget()

    def _forget(self) -> None:
        """All that belongs to one connection."""
        self.yields = False  # of two sessions that cannot be held beside each other the peer's stays
        self.carrier: int | None = None  # as the peer says, who decides it
        self.lasting = False
        self._exchange = Exchange(0)
        self._outbox = Outbox(self.limits)
        self._plane: dict[int, _Operation] = {}
        self._oldest = 0, 0.0  # of these, and when it is overdue
        self._position = Position(self.epoch)
        self._peer_digest: tuple[Position, Digest] | None = None
        self._own_digest: tuple[Position, int] | None = None  # sent; of so many sessions
        self._peer_entries: tuple[Position, tuple[int, ...], Entries] | None = None
        self._missing = NO_RECORDS  # held sessions whose batch was lost, and is told again
        self._deadline = 0.0
        self._next_digest = 0.0
        self._next_offer = 0.0
        self._may_fit = False  # what was refused may have room since
        self.comparison: Comparison | None = None
        self.only_ours = NO_RECORDS  # by the last comparison of buckets
        self.only_theirs = NO_IDS
        self.refused_here = NO_RECORDS  # the peer's sessions that could not be held beside ours
        self.refused_there = NO_IDS
        self._offered = NO_IDS  # refused once, and told again without an answer yet

    # -- what others may ask

    @property
    def busy(self) -> bool:
        """Whether a change is under way, to the peer or from it."""
        return bool(self._outbox or self._plane)

    @property
    def waiting(self) -> int:
        """Records that wait for the peer's acknowledgement of earlier ones."""
        return self._outbox.waiting

    @property
    def outstanding(self) -> int:
        """Batches sent and not acknowledged."""
        return self._outbox.unacknowledged

    @property
    def apart(self) -> bool:
        """Whether a session is refused at one side."""
        return len(self.refused_here) + len(self.refused_there) + len(self._offered) > 0

    def prevailing(self, op: int, records: Records) -> Records:
        """The records of an Install when it is carried out: if we yield they end what contradicts them, unless their
        connection is over. Else both sides might, one after the other."""
        if not self.yields or op not in self._plane:
            return records
        found = copied(records, RECORD)
        found["flags"] |= FLAG_PREVAILS
        return found

    # -- steps

    def _txid(self) -> int:
        self._last_txid += 1
        return self._last_txid

    def _become(self, state: State, why: str) -> None:
        self._out.append(StateChanged(self.state, state, why))
        self.state = state

    def _send(self, message: Message) -> None:
        self.messages["sent"][type(message).__name__] += 1
        self._out.append(Send(self.epoch, message))

    def _commit(self, records: Records) -> None:
        if len(records):
            self._out.append(Commit(records))

    def _fail(self, code: ErrorCode, text: str) -> None:
        self._send(Error(code, text))
        self._give_up(text)

    def _give_up(self, why: str) -> None:
        self.last_error = why
        self._out.append(Close(why))
        self._release(State.FAILED, why)

    def _release(self, state: State, why: str) -> None:
        """Nobody acknowledges any more: what waits for it goes, and the peer's sessions are ours."""
        self._commit(joined(self._outbox.held(), self._missing))
        if self.state is State.OPERATIONAL:
            self.term = max(self.term, self.peer.term if self.peer else 0) + 1
        if self.state in (State.EXCHANGING, State.OPERATIONAL):
            self._out.append(TakeOwnership())
        self.peer = None
        self._forget()
        self._become(state, why)

    # -- our changes, to the peer

    def _tell(self, changes: Changes, now: float) -> None:
        """Sent in order, in batches; in synchronous mode their packets wait for the acknowledgement."""
        if len(changes.closed):
            for operation in self._plane.values():
                operation.ended.append(changes.closed["id"])
        hold = self.mode is Mode.SYNCHRONOUS
        if not hold:
            self._commit(pending(changes.opened))
        self._enqueue(changes, hold=hold)
        self._flush(now)
        self._bound()

    def _enqueue(self, changes: Changes, *, hold: bool) -> None:
        self._outbox.add(changes, hold=hold)
        self._position = self._position._replace(steps=self._position.steps + 1)

    def _bound(self) -> None:
        waiting = max(self._outbox.waiting, self._exchange.n_closed)
        if waiting > self.limits.waiting:
            self._fail(ErrorCode.SLOW, f"{waiting} changes wait for the peer")

    def _flush(self, now: float) -> None:
        for message in self._outbox.flush(now):
            self._send(message)
        self._position = self._position._replace(sent=self._outbox.txid)

    # -- the peer's changes, to our plane

    def _install_at_plane(self, answer: Input, txid: int, records: Records) -> None:
        ours = copied(records, RECORD)
        ours["flags"] &= FLAG_INBOUND
        ours["flags"][instances(ours) != self.instance] |= FLAG_FOREIGN
        self._out.append(Install(self._operation(answer, txid, ours), ours))

    def _delete_at_plane(self, answer: Input, txid: int, records: Records) -> None:
        self._out.append(Delete(self._operation(answer, txid, records), records))

    def _operation(self, answer: Input, txid: int, records: Records) -> int:
        op = self._txid()
        self._plane[op] = _Operation(answer, txid, records)
        return op

    def _count(self, refused: Ids, *, here: bool) -> None:
        if len(refused):
            self.conflicts += len(refused)
            self._out.append(Conflicts(refused, here))
