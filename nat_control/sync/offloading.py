# SPDX-License-Identifier: Apache-2.0
"""Which sessions the peer's switch carries in front of us: asked for here, moved and reported there.

The truth is the switch's. Each report says all that is in front, so an answer that never comes, an end that was under way or a
connection that was lost mends itself with the next one.
"""

from __future__ import annotations

from nat_control.dataplane import Ids
from nat_control.sync.actions import ErrorCode, FrontMoved, FrontSeen, Move
from nat_control.sync.codec import MAX_FRONT, InFront, Moved, Offload, Recall
from nat_control.sync.merge import Merging

MAX_MOVES = 8  # of the peer, not yet answered


class Offloading(Merging):
    def _forget(self) -> None:
        super()._forget()
        self._asked: set[int] = set()  # txids of ours that are not answered
        self._moves: dict[int, int] = {}  # operations → the peer's txid

    # -- who asks

    def _ask_front(self, txid: int, ids: Ids, front: bool) -> None:
        """The peer's switch is asked to carry sessions in front of us, or to leave them to us again."""
        self._asked.add(txid)
        self._send(Offload(txid, ids) if front else Recall(txid, ids))

    def _moved(self, message: Moved, now: float) -> None:
        """Noted, which of those that were asked for are in front."""
        if message.txid not in self._asked:
            self._fail(ErrorCode.PROTOCOL, f"Moved {message.txid} answers nothing")
            return
        self._asked.discard(message.txid)
        self._out.append(FrontMoved(message.txid, message.room, message.ids))

    def _in_front(self, message: InFront, now: float) -> None:
        """Noted: all that is in front, and what it has carried."""
        self._out.append(FrontSeen(message.ms, message.room, message.carried))

    # -- who carries

    def _offload(self, message: Offload, now: float) -> None:
        """Sessions are put in front of the peer."""
        self._move(message.txid, message.ids, front=True)

    def _recall(self, message: Recall, now: float) -> None:
        """Sessions are left to the peer again."""
        self._move(message.txid, message.ids, front=False)

    def _move(self, txid: int, ids: Ids, *, front: bool) -> None:
        if len(self._moves) >= MAX_MOVES or len(ids) > MAX_FRONT:
            self._fail(ErrorCode.PROTOCOL, f"more than {MAX_MOVES} moves, or {MAX_FRONT} sessions, at once")
            return
        op = self._txid()
        self._moves[op] = txid
        self._out.append(Move(op, ids, front))

    def _front_moved(self, op: int, room: int, ids: Ids) -> None:
        """The peer hears which of those that it named are in front; an earlier connection's is left out."""
        if (txid := self._moves.pop(op, None)) is not None:
            self._send(Moved(txid, room, ids))

    def _tell_front(self, message: InFront) -> None:
        """The peer hears what is in front."""
        self._send(message)
