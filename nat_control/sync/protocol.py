# SPDX-License-Identifier: Apache-2.0
"""The sync protocol as a pure state machine (thesis, table 7.3 and figure 7.6): inputs in, actions out.

No sockets, no clock, no data plane: ``now`` is an argument, in seconds of any monotonic clock, and the shell
carries out what the machine returns. TABLE says which input means what in which state; a message that it has no
row for is answered with Error and the end of the connection, and our own sessions go on untouched.

What the shell owes:

- actions in their order. Those on the data plane (Install, Update, Delete, TakeOwnership, Cede, SendState,
  TakeDigest) take effect one after the other, over connections too; Commit overtakes them all.
- an event that happened before an operation of the plane was finished is delivered before ``plane_done``,
  ``state_page`` or ``digest_taken`` of that operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nat_control.dataplane import NO_IDS, Changes, Ids, NextHops, Records
from nat_control.sync import codec
from nat_control.sync.actions import (
    MAX_OUTSTANDING,
    Action,
    Carry,
    Cede,
    Close,
    Commit,
    Conflicts,
    Delete,
    DigestCompared,
    ErrorCode,
    Input,
    Install,
    Learn,
    Limits,
    Mode,
    PeerCarries,
    Position,
    Send,
    SendState,
    State,
    StateChanged,
    TakeDigest,
    TakeOwnership,
    Update,
)
from nat_control.sync.codec import (
    Buckets,
    Bye,
    DeleteComplete,
    DeleteEntries,
    Digest,
    Error,
    HandOver,
    HandOverComplete,
    Hello,
    InitState,
    InstallComplete,
    InstallEntries,
    Message,
    NextHopsKnown,
    PoolRange,
    Ready,
    UpdateEntries,
)
from nat_control.sync.digest import differing
from nat_control.sync.exchange import Exchange, instances, misfit_of
from nat_control.sync.outbox import Outbox, on_the_wire, pending
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_INBOUND

MAX_REFUSED = (codec.MAX_PAYLOAD - 8) // 8


class Protocol:
    """One side. Every input returns the actions to carry out, in order. ``heartbeat_key`` is what Hello tells.

    ``epoch``: the number of the last connection of an earlier start, or anything that differs from it."""

    def __init__(
        self,
        instance: int,
        pools: tuple[PoolRange, ...],
        mode: Mode,
        *,
        epoch: int = 0,
        term: int = 0,
        slices: int = 1,
        limits: Limits | None = None,
    ) -> None:
        self.instance = instance
        self.pools = pools
        self.mode = mode
        self.epoch = epoch
        self.term = term
        self.slices = slices
        self.limits = limits or Limits()
        self.state = State.STARTING
        self.heartbeat_key = codec.NO_KEY
        self.peer: Hello | None = None
        self.conflicts = 0  # sessions refused, here or at the peer, since the start
        self.last_error = ""
        self._out: list[Action] = []
        self._last_txid = 0
        self._forget()

    def _forget(self) -> None:
        """All that belongs to one connection."""
        self._exchange = Exchange(0)
        self._outbox = Outbox(self.limits)
        self._plane: dict[int, tuple[Input, int]] = {}  # op -> what it answers: message, txid
        self._position = Position(self.epoch)
        self._peer_digest: tuple[Position, Buckets] | None = None
        self._deadline = 0.0
        self._next_digest = 0.0

    # -- inputs

    def plane_ready(self) -> list[Action]:
        return self._step(Input.PLANE_READY)

    def connected(self, now: float) -> list[Action]:
        return self._step(Input.CONNECTED, now)

    def disconnected(self, now: float, why: str = "the connection ended") -> list[Action]:
        return self._step(Input.DISCONNECTED, why)

    def events(self, changes: Changes, now: float) -> list[Action]:
        """What our own plane did since the last call."""
        return self._step(Input.EVENTS, changes, now)

    def state_page(self, txid: int, records: Records, last: bool, now: float) -> list[Action]:
        return self._step(Input.STATE_PAGE, txid, records, last, now)

    def plane_done(self, op: int, now: float, refused: Ids = NO_IDS) -> list[Action]:
        return self._step(Input.PLANE_DONE, op, refused, now)

    def digest_taken(self, at: Position, buckets: Buckets, now: float) -> list[Action]:
        return self._step(Input.DIGEST_TAKEN, at, buckets, now)

    def next_hops(self, next_hops: NextHops, now: float) -> list[Action]:
        """What our own plane knows of them, all or the news; told to a peer that is there."""
        return self._step(Input.NEXT_HOPS, next_hops)

    def hand_over(self, now: float) -> list[Action]:
        """The peer shall carry the traffic. Only an operational one can; otherwise nothing comes of it."""
        return self._step(Input.HAND_OVER)

    def handed_over(self, now: float) -> list[Action]:
        """We carry the traffic, as the peer has asked."""
        return self._step(Input.HANDED_OVER)

    def tick(self, now: float) -> list[Action]:
        """At least every second."""
        return self._step(Input.TICK, now)

    def stop(self, now: float) -> list[Action]:
        """We leave on purpose."""
        return self._step(Input.STOP, now)

    def broken(self, why: str, now: float) -> list[Action]:
        """The peer's bytes are no messages."""
        if self.state in CONNECTED:
            self._fail(ErrorCode.MALFORMED, why)
        return self._take()

    def received(self, epoch: int, message: Message, now: float) -> list[Action]:
        """``epoch`` is that of the message's header. What comes after the end of a connection is left out."""
        if self.state not in CONNECTED:
            return []
        kind = INPUT_OF[type(message)]
        if kind is not Input.HELLO and self.peer is not None and epoch != self.peer.epoch:
            self._fail(ErrorCode.EPOCH, f"{kind.value} of epoch {epoch}, this is {self.peer.epoch}")
        elif handler := TABLE.get((self.state, kind)):
            handler(self, message, now)
        else:
            self._fail(ErrorCode.PROTOCOL, f"{kind.value} is not expected in state {self.state.value}")
        return self._take()

    def _step(self, kind: Input, *arguments: object) -> list[Action]:
        handler = TABLE.get((self.state, kind))
        if handler is None:
            raise ValueError(f"{kind.value} cannot happen in state {self.state.value}")
        handler(self, *arguments)
        return self._take()

    def _take(self) -> list[Action]:
        out, self._out = self._out, []
        return out

    # -- helpers

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

    def _txid(self) -> int:
        self._last_txid += 1
        return self._last_txid

    def _become(self, state: State, why: str) -> None:
        self._out.append(StateChanged(self.state, state, why))
        self.state = state

    def _send(self, message: Message) -> None:
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
        self._commit(self._outbox.held())
        if self.state is State.OPERATIONAL:
            self.term = max(self.term, self.peer.term if self.peer else 0) + 1
        if self.state in (State.EXCHANGING, State.OPERATIONAL):
            self._out.append(TakeOwnership())
        self.peer = None
        self._forget()
        self._become(state, why)

    # -- connection

    def _connected(self, now: float) -> None:
        if self.mode is Mode.OFF:
            self._out.append(Close("synchronisation is off"))
            return
        self.epoch = (self.epoch + 1) & 0xFFFFFFFF
        self._forget()
        self._deadline = now + self.limits.handshake
        self._send(self._own_hello())
        self._become(State.HANDSHAKE, "connected")

    def _own_hello(self) -> Hello:
        key, slices = self.heartbeat_key, self.slices
        return Hello(self.instance, self.epoch, self.term, self.pools, heartbeat_key=key, slices=slices)

    def _disconnected(self, why: str) -> None:
        self._release(State.ALONE, why)

    def _stop(self, now: float) -> None:
        self._send(Bye())
        self._give_up("we leave")

    def _error(self, message: Error, now: float) -> None:
        self._give_up(f"the peer reports error {message.code}: {message.text}")

    def _bye(self, message: Bye, now: float) -> None:
        self._give_up("the peer leaves")

    def _nothing(self, *arguments: object) -> None:
        """Comes too late to matter."""

    # -- Hello and the exchange of all sessions

    def _hello(self, message: Hello, now: float) -> None:
        if misfit := misfit_of(self._own_hello(), message):
            self._fail(*misfit)
        else:
            self.peer = message
            self._exchange = Exchange(self._txid())
            self._deadline = now + self.limits.exchange
            self._become(State.EXCHANGING, f"instance {message.instance} answers")
            self._out.append(SendState(self._exchange.txid))

    def _state_page(self, txid: int, records: Records, last: bool, now: float) -> None:
        exchange = self._exchange
        if txid != exchange.txid or exchange.state_sent:
            return
        self._deadline = now + self.limits.exchange
        starts = range(0, len(records), codec.MAX_RECORDS) or range(1 if last else 0)
        for start in starts:
            part = on_the_wire(records[start : start + codec.MAX_RECORDS])
            end = last and start == starts[-1]
            self._send(InitState(txid, exchange.chunks_out, end, part))
            exchange.chunks_out += 1
        exchange.state_sent = last

    def _init_state(self, message: InitState, now: float) -> None:
        exchange = self._exchange
        if exchange.peer_txid is None:
            exchange.peer_txid = message.txid
        expected = (exchange.peer_txid, exchange.chunks_in)
        if exchange.last_in or (message.txid, message.chunk) != expected:
            self._fail(ErrorCode.PROTOCOL, f"InitState {message.txid} chunk {message.chunk} is out of order")
            return
        self._deadline = now + self.limits.exchange
        exchange.chunks_in += 1
        exchange.last_in = message.last
        if len(message.records):
            exchange.installing += 1
            self._install_at_plane(Input.INIT_STATE, message.txid, message.records)
        self._ready_if_installed(now)

    def _ready_if_installed(self, now: float) -> None:
        """Ready is sent, and we are operational, only after the plane holds the peer's sessions: their ports
        are taken before we hand out any."""
        exchange = self._exchange
        if not exchange.last_in or exchange.installing or exchange.peer_txid is None:
            return
        refused = np.concatenate([NO_IDS, *exchange.refused])
        if len(refused) > MAX_REFUSED:
            self._fail(ErrorCode.CONFLICTS, f"{len(refused)} sessions contradict ours")
            return
        self._send(Ready(exchange.peer_txid, refused))
        exchange.ready_sent = True
        self._operational_if_both(now)

    def _ready(self, message: Ready, now: float) -> None:
        exchange = self._exchange
        if message.txid != exchange.txid or not exchange.state_sent or exchange.ready_received:
            self._fail(ErrorCode.PROTOCOL, f"Ready {message.txid} answers nothing")
            return
        assert self.peer is not None
        exchange.ready_received = True
        self._count(message.refused, here=False)
        # What the peer could not take stays ours: nobody else would ever end it.
        self._out.append(Cede(self.peer.instance, message.refused))
        self._operational_if_both(now)

    def _operational_if_both(self, now: float) -> None:
        exchange = self._exchange
        if not (exchange.ready_sent and exchange.ready_received):
            return
        self._become(State.OPERATIONAL, "both sides hold all sessions")
        if exchange.closed:
            # The peer's InitState may have brought back what ended here while it was under way.
            self._delete_at_plane(Input.EVENTS, 0, np.concatenate(exchange.closed))
        self._exchange = Exchange(0)
        self._flush(now)

    # -- our changes, to the peer

    def _events_alone(self, changes: Changes, now: float) -> None:
        self._commit(pending(changes.opened))

    def _events_buffer(self, changes: Changes, now: float) -> None:
        """Kept until the peer has our InitState. Until then we are alone, and no packet waits for it."""
        self._commit(pending(changes.opened))
        exchange = self._exchange
        if len(changes.closed):
            exchange.closed.append(changes.closed)
            exchange.n_closed += len(changes.closed)
        self._enqueue(changes, hold=False)
        self._bound()

    def _events_send(self, changes: Changes, now: float) -> None:
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
            self._position = self._position._replace(sent=self._position.sent + 1)
            self._send(message)

    def _acknowledged(self, kind: Input, txid: int, now: float) -> bool:
        held = self._outbox.acknowledged(kind, txid)
        if held is None:
            self._fail(ErrorCode.PROTOCOL, f"an acknowledgement of {txid}, which is not outstanding")
            return False
        self._commit(held)
        self._flush(now)
        return True

    def _install_complete(self, message: InstallComplete, now: float) -> None:
        # A session that contradicts one of the peer's is released too: it cannot be protected, but works.
        if self._acknowledged(Input.INSTALL, message.txid, now):
            self._count(message.refused, here=False)

    def _delete_complete(self, message: DeleteComplete, now: float) -> None:
        self._acknowledged(Input.DELETE, message.txid, now)

    # -- the peer's changes, to our plane

    def _changed(self) -> bool:
        """Counts one change of the peer; false when it does not wait for our acknowledgements."""
        self._position = self._position._replace(received=self._position.received + 1)
        if len(self._plane) > 2 * MAX_OUTSTANDING:
            self._fail(ErrorCode.PROTOCOL, f"more than {MAX_OUTSTANDING} batches at once")
            return False
        return True

    def _install(self, message: InstallEntries, now: float) -> None:
        if self._changed():
            self._install_at_plane(Input.INSTALL, message.txid, message.records)

    def _update(self, message: UpdateEntries, now: float) -> None:
        if self._changed():
            self._out.append(Update(message.records))

    def _delete(self, message: DeleteEntries, now: float) -> None:
        if self._changed():
            self._delete_at_plane(Input.DELETE, message.txid, message.records)

    def _install_at_plane(self, answer: Input, txid: int, records: Records) -> None:
        ours = records.copy()
        ours["flags"] &= FLAG_INBOUND
        ours["flags"][instances(ours) != self.instance] |= FLAG_FOREIGN
        self._out.append(Install(self._operation(answer, txid), ours))

    def _delete_at_plane(self, answer: Input, txid: int, records: Records) -> None:
        self._out.append(Delete(self._operation(answer, txid), records))

    def _operation(self, answer: Input, txid: int) -> int:
        op = self._txid()
        self._plane[op] = answer, txid
        return op

    def _plane_done(self, op: int, refused: Ids, now: float) -> None:
        answer, txid = self._plane.pop(op, (Input.PLANE_DONE, 0))
        self._count(refused, here=True)
        if answer is Input.INIT_STATE:
            self._deadline = now + self.limits.exchange
            self._exchange.installing -= 1
            self._exchange.refused.append(refused)
            self._ready_if_installed(now)
        elif answer is Input.INSTALL:
            self._send(InstallComplete(txid, refused))
        elif answer is Input.DELETE:
            self._send(DeleteComplete(txid))

    def _count(self, refused: Ids, *, here: bool) -> None:
        if len(refused):
            self.conflicts += len(refused)
            self._out.append(Conflicts(refused, here))

    # -- next hops

    def _next_hops(self, next_hops: NextHops) -> None:
        for start in range(0, len(next_hops), codec.MAX_NEXT_HOPS):
            self._send(NextHopsKnown(next_hops[start : start + codec.MAX_NEXT_HOPS]))

    def _next_hops_known(self, message: NextHopsKnown, now: float) -> None:
        self._out.append(Learn(message.next_hops))

    # -- digest and time

    def _digest(self, message: Digest, now: float) -> None:
        """Comparable only if the peer had all our changes, and we have all of its, as the stream's order says."""
        if not self.busy and message.position == self._position.sent:
            self._peer_digest = self._position, message.buckets
            self._out.append(TakeDigest(self._position))

    def _digest_taken(self, at: Position, buckets: Buckets, now: float) -> None:
        if at != self._position or self.busy:
            return
        if self._peer_digest and self._peer_digest[0] == at:
            self._out.append(DigestCompared(tuple(differing(self._peer_digest[1], buckets))))
            self._peer_digest = None
        else:
            self._send(Digest(at.received, buckets))

    def _tick_exchange(self, now: float) -> None:
        if now >= self._deadline:
            self._fail(ErrorCode.TIMEOUT, f"no progress in state {self.state.value}")

    def _tick_operational(self, now: float) -> None:
        if self._outbox.overdue(now):
            self._fail(ErrorCode.TIMEOUT, "a batch is not acknowledged")
        elif now >= self._next_digest and not self.busy:
            self._next_digest = now + self.limits.digest
            self._out.append(TakeDigest(self._position))


CONNECTED = (State.HANDSHAKE, State.EXCHANGING, State.OPERATIONAL)

INPUT_OF: Mapping[type, Input] = {
    Hello: Input.HELLO,
    InitState: Input.INIT_STATE,
    Ready: Input.READY,
    InstallEntries: Input.INSTALL,
    UpdateEntries: Input.UPDATE,
    DeleteEntries: Input.DELETE,
    InstallComplete: Input.INSTALL_COMPLETE,
    DeleteComplete: Input.DELETE_COMPLETE,
    Digest: Input.DIGEST,
    Error: Input.ERROR,
    Bye: Input.BYE,
    NextHopsKnown: Input.NEXT_HOPS_KNOWN,
    HandOver: Input.PEER_HANDS_OVER,
    HandOverComplete: Input.HAND_OVER_COMPLETE,
}

_P = Protocol
Handler = Callable[..., None]
_UNCONNECTED: Mapping[Input, Handler] = {
    Input.EVENTS: _P._events_alone,
    Input.TICK: _P._nothing,
    Input.STOP: _P._nothing,
    Input.DISCONNECTED: _P._nothing,
}
# What the shell may say at any time, and only a peer that holds our sessions must hear.
_IDLE: Mapping[Input, Handler] = {
    Input.NEXT_HOPS: _P._nothing,
    Input.HAND_OVER: _P._nothing,
    Input.HANDED_OVER: _P._nothing,
}
# What an earlier connection asked the data plane for.
_LATE: Mapping[Input, Handler] = {
    Input.STATE_PAGE: _P._nothing,
    Input.PLANE_DONE: _P._nothing,
    Input.DIGEST_TAKEN: _P._nothing,
}
_ENDS: Mapping[Input, Handler] = {
    Input.DISCONNECTED: _P._disconnected,
    Input.STOP: _P._stop,
    Input.ERROR: _P._error,
    Input.BYE: _P._bye,
}
_ROWS: Mapping[State, Mapping[Input, Handler]] = {
    State.STARTING: {
        **_IDLE,
        **_UNCONNECTED,
        Input.PLANE_READY: lambda protocol: protocol._become(State.ALONE, "the data plane is ready"),
        Input.CONNECTED: lambda protocol, now: protocol._out.append(Close("the data plane is not ready")),
    },
    State.ALONE: {**_IDLE, **_UNCONNECTED, **_LATE, Input.CONNECTED: _P._connected},
    State.HANDSHAKE: {
        **_IDLE,
        **_LATE,
        **_ENDS,
        Input.HELLO: _P._hello,
        Input.EVENTS: _P._events_alone,
        Input.TICK: _P._tick_exchange,
    },
    State.EXCHANGING: {
        **_IDLE,
        **_LATE,
        **_ENDS,
        Input.STATE_PAGE: _P._state_page,
        Input.INIT_STATE: _P._init_state,
        Input.PLANE_DONE: _P._plane_done,
        Input.READY: _P._ready,
        Input.NEXT_HOPS: _P._next_hops,
        Input.NEXT_HOPS_KNOWN: _P._next_hops_known,
        Input.EVENTS: _P._events_buffer,
        Input.TICK: _P._tick_exchange,
    },
    State.OPERATIONAL: {
        **_LATE,
        **_ENDS,
        Input.EVENTS: _P._events_send,
        Input.INSTALL: _P._install,
        Input.UPDATE: _P._update,
        Input.DELETE: _P._delete,
        Input.PLANE_DONE: _P._plane_done,
        Input.INSTALL_COMPLETE: _P._install_complete,
        Input.DELETE_COMPLETE: _P._delete_complete,
        Input.NEXT_HOPS: _P._next_hops,
        Input.NEXT_HOPS_KNOWN: _P._next_hops_known,
        Input.HAND_OVER: lambda protocol: protocol._send(HandOver()),
        Input.HANDED_OVER: lambda protocol: protocol._send(HandOverComplete()),
        Input.PEER_HANDS_OVER: lambda protocol, message, now: protocol._out.append(Carry()),
        Input.HAND_OVER_COMPLETE: lambda protocol, message, now: protocol._out.append(PeerCarries()),
        Input.DIGEST: _P._digest,
        Input.DIGEST_TAKEN: _P._digest_taken,
        Input.TICK: _P._tick_operational,
    },
    State.FAILED: {**_IDLE, **_UNCONNECTED, **_LATE, Input.DISCONNECTED: _P._disconnected},
}
TABLE: dict[tuple[State, Input], Handler] = {
    (state, kind): handler for state, row in _ROWS.items() for kind, handler in row.items()
}
"""What an input means in a state. A message without a row is an error of the peer, anything else one of the shell."""
