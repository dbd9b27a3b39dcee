# SPDX-License-Identifier: Apache-2.0
"""The sync protocol as a pure state machine (thesis, table 7.3 and figure 7.6): inputs in, actions out.

No sockets, no clock, no data plane: ``now`` is an argument, in seconds of any monotonic clock, and the shell
carries out what the machine returns. TABLE says which input means what in which state; a message that it has no
row for is answered with Error and the end of the connection, and our own sessions go on untouched.

What the shell owes:

- actions in their order. Those on the data plane (Install, Update, Delete, TakeOwnership, Cede, SendState,
  TakeDigest, TakeBuckets, Fetch, Move) take effect and are answered one after the other, over connections too; Commit overtakes them all.
- an event that happened before an operation of the plane was finished is delivered before ``plane_done``,
  ``state_page``, ``digest_taken``, ``buckets_taken`` or ``fetched`` of that operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, Ids, NextHops, Records
from nat_control.sync import codec
from nat_control.sync.actions import (
    Action,
    CarrierTold,
    Carry,
    Cede,
    Close,
    ErrorCode,
    Input,
    Learn,
    Mode,
    Position,
    SendState,
    State,
    Update,
)
from nat_control.sync.codec import (
    BucketEntries,
    Buckets,
    Bye,
    Carries,
    DeleteComplete,
    DeleteEntries,
    Digest,
    Error,
    HandOver,
    Hello,
    InFront,
    InitState,
    InstallComplete,
    InstallEntries,
    Message,
    Moved,
    NextHopsKnown,
    Offload,
    Ready,
    Recall,
    Resync,
    UpdateEntries,
    WantEntries,
)
from nat_control.sync.exchange import Exchange, misfit_of, rank
from nat_control.sync.offloading import Offloading
from nat_control.sync.outbox import on_the_wire, pending
from nat_fastpath.tables import chosen, joined

MAX_REFUSED = (codec.MAX_PAYLOAD - 8) // 8


class Protocol(Offloading):
    """One side. Every input returns the actions to carry out, in order. ``heartbeat_key`` is what Hello tells.

    ``epoch``: the number of the last connection of an earlier start, or anything that differs from it."""

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

    def digest_taken(self, at: Position, buckets: Buckets, count: int, now: float) -> list[Action]:
        return self._step(Input.DIGEST_TAKEN, at, buckets, count, now)

    def buckets_taken(
        self, at: Position, buckets: tuple[int, ...], records: Records, now: float
    ) -> list[Action]:
        return self._step(Input.BUCKETS_TAKEN, at, buckets, records, now)

    def fetched(self, op: int, records: Records, now: float) -> list[Action]:
        return self._step(Input.FETCHED, op, records, now)

    def verify(self, now: float) -> list[Action]:
        """A digest as soon as nothing is under way."""
        self._next_digest = now
        return self.tick(now)

    def next_hops(self, next_hops: NextHops, now: float) -> list[Action]:
        """What our own plane knows of them, all or the news; told to a peer that is there."""
        return self._step(Input.NEXT_HOPS, next_hops)

    def hand_over(self, carrier: int, now: float, *, lasting: bool = False) -> list[Action]:
        """This instance shall carry the traffic, which the peer decides. Only an operational one is asked."""
        return self._step(Input.HAND_OVER, HandOver(carrier, lasting))

    def carries(self, carrier: int, now: float, *, lasting: bool = False, why: str = "") -> list[Action]:
        """Who carries the traffic, by our decision; or why nothing came of what the peer has asked for."""
        return self._step(Input.CARRIER, Carries(carrier, lasting, why))

    def ask_front(self, txid: int, ids: Ids, front: bool, now: float) -> list[Action]:
        """The peer's switch shall carry these sessions in front of us, or leave them to us; ``txid`` comes back in FrontMoved."""
        return self._step(Input.ASK_FRONT, txid, ids, front)

    def front_moved(self, op: int, ids: Ids, room: int, now: float) -> list[Action]:
        """A Move is done; ``ids``: those of it that are in front."""
        return self._step(Input.FRONT_MOVED, op, room, ids)

    def tell_front(self, ms: int, room: int, carried: codec.Carried, now: float) -> list[Action]:
        """All that is in front, with packets of the last ``ms`` milliseconds; 0: not counted."""
        return self._step(Input.TELL_FRONT, InFront(ms, room, carried))

    def tick(self, now: float) -> list[Action]:
        """At least every second."""
        return self._step(Input.TICK, now)

    def stop(self, now: float) -> list[Action]:
        """We leave on purpose."""
        return self._step(Input.STOP, now)

    def broken(self, why: str, now: float, code: ErrorCode = ErrorCode.MALFORMED) -> list[Action]:
        """The peer's bytes are no messages, or not of our version."""
        if self.state in CONNECTED:
            self._fail(code, why)
        return self._take()

    def received(self, epoch: int, message: Message, now: float) -> list[Action]:
        """``epoch`` is that of the message's header. What comes after the end of a connection is left out."""
        if self.state not in CONNECTED:
            return []
        kind = INPUT_OF[type(message)]
        self.messages["received"][kind.value] += 1
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

    # -- connection

    def _plane_ready(self) -> None:
        """Connections are taken from here on."""
        self._become(State.ALONE, "the data plane is ready")

    def _too_early(self, now: float) -> None:
        """Closed: the data plane is not ready."""
        self._out.append(Close("the data plane is not ready"))

    def _connected(self, now: float) -> None:
        """A new epoch, and our Hello; with mode off it is closed."""
        if self.mode is Mode.OFF:
            self._out.append(Close("synchronisation is off"))
            return
        self.epoch = (self.epoch + 1) & 0xFFFFFFFF
        self._forget()
        self._deadline = now + self.limits.handshake
        hello = self._own_hello()
        self._rank = rank(hello)
        self._send(hello)
        self._become(State.HANDSHAKE, "connected")

    def _own_hello(self) -> Hello:
        return Hello(
            self.instance,
            self.epoch,
            self.term,
            self.pools,
            heartbeat_key=self.heartbeat_key,
            slices=self.slices,
            precedence=self.precedence,
            kind=self.kind,
        )

    def _disconnected(self, why: str) -> None:
        """What waits is released, the peer's sessions are ours."""
        self._release(State.ALONE, why)

    def _stop(self, now: float) -> None:
        """Goodbye; what waits is released, the peer's sessions are ours."""
        self._send(Bye())
        self._give_up("we leave")

    def _error(self, message: Error, now: float) -> None:
        """The peer gives up, and so do we."""
        self._give_up(f"the peer reports error {message.code}: {message.text}")

    def _bye(self, message: Bye, now: float) -> None:
        """The peer leaves; what waits is released, its sessions are ours."""
        self._give_up("the peer leaves")

    def _nothing(self, *arguments: object) -> None:
        """Nothing: it comes too early or too late to matter."""

    # -- Hello and the exchange of all sessions

    def _hello(self, message: Hello, now: float) -> None:
        """Both are compared; the exchange begins."""
        own = self._own_hello()
        if misfit := misfit_of(own, message):
            self._fail(*misfit)
        else:
            self.peer = message
            self.yields = self._rank < rank(message)  # what we have become since, the peer has not heard
            self._exchange = Exchange(self._txid())
            self._deadline = now + self.limits.exchange
            self._become(State.EXCHANGING, f"instance {message.instance} answers")
            self._out.append(SendState(self._exchange.txid))

    def _state_page(self, txid: int, records: Records, last: bool, now: float) -> None:
        """Sent as InitState; of an earlier exchange: left out."""
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
        """Installed here; with the last one done, Ready."""
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
        """What the peer refused stays ours, the rest of its own is its again."""
        exchange = self._exchange
        if message.txid != exchange.txid or not exchange.state_sent or exchange.ready_received:
            self._fail(ErrorCode.PROTOCOL, f"Ready {message.txid} answers nothing")
            return
        assert self.peer is not None
        exchange.ready_received = True
        self._answered_there(NO_RECORDS, message.refused)
        # What the peer could not take stays ours: nobody else would ever end it.
        self._out.append(Cede(self.peer.instance, message.refused))
        self._operational_if_both(now)

    def _operational_if_both(self, now: float) -> None:
        exchange = self._exchange
        if not (exchange.ready_sent and exchange.ready_received):
            return
        self._become(State.OPERATIONAL, "both sides hold all sessions")
        kept = joined(NO_RECORDS, *exchange.kept)
        closed = joined(NO_RECORDS, *exchange.closed)
        closed = closed[~np.isin(closed["id"], kept["id"])]
        if len(closed):
            # The peer's InitState may have brought back what ended here while it was under way.
            self._delete_at_plane(Input.EVENTS, 0, closed)
        if len(kept):
            # What only our timer has ended goes on: the packets go to the peer, perhaps, and it has kept it.
            self._outbox.withdraw(kept["id"])
            self._install_at_plane(Input.EVENTS, 0, kept)
        self._exchange = Exchange(0)
        self._flush(now)

    # -- our changes, to the peer

    def _events_alone(self, changes: Changes, now: float) -> None:
        """New sessions' packets leave."""
        self._commit(pending(changes.opened))

    def _events_buffer(self, changes: Changes, now: float) -> None:
        """Kept until the peer has our InitState. Until then we are alone, and no packet waits for it."""
        self._commit(pending(changes.opened))
        exchange = self._exchange
        if len(changes.closed):
            exchange.closed.append(changes.closed)
            exchange.n_closed += len(changes.closed)
            exchange.aged = np.concatenate([exchange.aged, changes.aged])
        self._enqueue(changes, hold=False)
        self._bound()

    def _acknowledged(self, kind: Input, txid: int, now: float) -> Records | None:
        """The batch's records; None when there is none, which ends the connection."""
        batch = self._outbox.acknowledged(kind, txid)
        if batch is None:
            self._fail(ErrorCode.PROTOCOL, f"an acknowledgement of {txid}, which is not outstanding")
            return None
        self._commit(batch.held)
        self._flush(now)
        return batch.records

    def _install_complete(self, message: InstallComplete, now: float) -> None:
        """Its packets leave; refused sessions are noted."""
        # A session that contradicts one of the peer's is released too: it cannot be protected, but works.
        records = self._acknowledged(Input.INSTALL, message.txid, now)
        if records is not None:
            self._answered_there(records, message.refused)

    def _delete_complete(self, message: DeleteComplete, now: float) -> None:
        """No longer waited for."""
        records = self._acknowledged(Input.DELETE, message.txid, now)
        if records is not None:
            self._ended(records)

    # -- the peer's changes, to our plane

    def _install(self, message: InstallEntries, now: float) -> None:
        """Installed here, then acknowledged; a gap before it is told."""
        if self._changed(message.txid):
            self._install_at_plane(Input.INSTALL, message.txid, message.records)

    def _update(self, message: UpdateEntries, now: float) -> None:
        """Passed on to the plane. Not counted: a digest does not depend on it."""
        self._out.append(Update(message.records))

    def _delete(self, message: DeleteEntries, now: float) -> None:
        """Deleted here, then acknowledged; a gap before it is told."""
        if self._changed(message.txid):
            self._delete_at_plane(Input.DELETE, message.txid, message.records)

    def _plane_done(self, op: int, refused: Ids, now: float) -> None:
        """What the operation was for is answered; an earlier connection's is left out."""
        operation = self._plane.pop(op, None)
        if operation is None:
            return
        answer, txid = operation.answer, operation.txid
        if answer in (Input.INIT_STATE, Input.INSTALL):
            self._answered_here(operation.records, refused)
        if answer is Input.INIT_STATE:
            self._deadline = now + self.limits.exchange
            self._exchange.installing -= 1
            self._exchange.refused.append(refused)
            # What ends from here on was known with the peer's last packet.
            if len(self._exchange.aged):
                ids = operation.records["id"]
                kept = np.isin(ids, self._exchange.aged) & ~np.isin(ids, refused)
                self._exchange.kept.append(chosen(operation.records, kept))
            self._ready_if_installed(now)
        elif answer is Input.EVENTS and len(refused):
            # Its place was given away before the peer brought it back: it has ended after all.
            self._tell(Changes(closed=operation.records[np.isin(operation.records["id"], refused)]), now)
        elif answer is Input.INSTALL:
            self._send(InstallComplete(txid, refused))
        elif answer is Input.DELETE:
            self._ended(operation.records)
            self._send(DeleteComplete(txid))

    # -- who carries

    def _hand_over(self, wanted: HandOver) -> None:
        """The peer is asked that this instance carries."""
        self._send(HandOver(wanted.carrier, wanted.lasting))

    def _carrier(self, told: Carries) -> None:
        """The peer hears who carries."""
        self.carrier, self.lasting = told.carrier, told.lasting
        self._send(Carries(told.carrier, told.lasting, told.why))

    def _peer_hands_over(self, message: HandOver, now: float) -> None:
        """We decide who carries, and say so."""
        if self._one_of_us(message.carrier):
            self._out.append(Carry(message.carrier, message.lasting))

    def _peer_tells_carrier(self, message: Carries, now: float) -> None:
        """Noted."""
        if self._one_of_us(message.carrier):
            self.carrier, self.lasting = message.carrier, message.lasting
            self._out.append(CarrierTold(message.carrier, message.lasting, message.why))

    def _one_of_us(self, carrier: int) -> bool:
        assert self.peer is not None
        if carrier in (self.instance, self.peer.instance):
            return True
        self._fail(ErrorCode.PROTOCOL, f"instance {carrier} shall carry, and is none of this pair")
        return False

    # -- next hops

    def _next_hops(self, next_hops: NextHops) -> None:
        """Told to the peer."""
        for start in range(0, len(next_hops), codec.MAX_NEXT_HOPS):
            self._send(NextHopsKnown(next_hops[start : start + codec.MAX_NEXT_HOPS]))

    def _next_hops_known(self, message: NextHopsKnown, now: float) -> None:
        """Learned."""
        self._out.append(Learn(message.next_hops))

    # -- time

    def _tick_exchange(self, now: float) -> None:
        """Given up when nothing has moved for too long."""
        if now >= self._deadline:
            self._fail(ErrorCode.TIMEOUT, f"no progress in state {self.state.value}")


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
    Carries: Input.CARRIES,
    BucketEntries: Input.BUCKET_ENTRIES,
    WantEntries: Input.WANT_ENTRIES,
    Resync: Input.RESYNC,
    Offload: Input.OFFLOAD,
    Recall: Input.RECALL,
    Moved: Input.MOVED,
    InFront: Input.IN_FRONT,
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
    Input.CARRIER: _P._nothing,
    Input.ASK_FRONT: _P._nothing,
    Input.TELL_FRONT: _P._nothing,
}
# What an earlier connection asked the data plane for.
_LATE: Mapping[Input, Handler] = {
    Input.STATE_PAGE: _P._nothing,
    Input.PLANE_DONE: _P._nothing,
    Input.DIGEST_TAKEN: _P._nothing,
    Input.BUCKETS_TAKEN: _P._nothing,
    Input.FETCHED: _P._nothing,
    Input.FRONT_MOVED: _P._nothing,
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
        Input.PLANE_READY: _P._plane_ready,
        Input.CONNECTED: _P._too_early,
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
        Input.EVENTS: _P._tell,
        Input.INSTALL: _P._install,
        Input.UPDATE: _P._update,
        Input.DELETE: _P._delete,
        Input.PLANE_DONE: _P._plane_done,
        Input.INSTALL_COMPLETE: _P._install_complete,
        Input.DELETE_COMPLETE: _P._delete_complete,
        Input.NEXT_HOPS: _P._next_hops,
        Input.NEXT_HOPS_KNOWN: _P._next_hops_known,
        Input.HAND_OVER: _P._hand_over,
        Input.CARRIER: _P._carrier,
        Input.PEER_HANDS_OVER: _P._peer_hands_over,
        Input.CARRIES: _P._peer_tells_carrier,
        Input.ASK_FRONT: _P._ask_front,
        Input.OFFLOAD: _P._offload,
        Input.RECALL: _P._recall,
        Input.FRONT_MOVED: _P._front_moved,
        Input.MOVED: _P._moved,
        Input.TELL_FRONT: _P._tell_front,
        Input.IN_FRONT: _P._in_front,
        Input.DIGEST: _P._digest,
        Input.DIGEST_TAKEN: _P._digest_taken,
        Input.BUCKET_ENTRIES: _P._bucket_entries,
        Input.BUCKETS_TAKEN: _P._buckets_taken,
        Input.WANT_ENTRIES: _P._want_entries,
        Input.FETCHED: _P._fetched,
        Input.RESYNC: _P._resync,
        Input.TICK: _P._tick_operational,
    },
    State.FAILED: {**_IDLE, **_UNCONNECTED, **_LATE, Input.DISCONNECTED: _P._disconnected},
}
TABLE: dict[tuple[State, Input], Handler] = {
    (state, kind): handler for state, row in _ROWS.items() for kind, handler in row.items()
}
"""What an input means in a state. A message without a row is an error of the peer, anything else one of the shell."""
