# SPDX-License-Identifier: Apache-2.0
"""How sessions in front of the server are asked for, moved and reported: the machine step by step."""

from __future__ import annotations

import numpy as np
import pytest

from nat_control.dataplane import NO_IDS
from nat_control.sync.actions import ErrorCode, FrontMoved, FrontSeen, Move, State
from nat_control.sync.codec import CARRIED, MAX_FRONT, InFront, Moved, Offload, Recall
from nat_control.sync.offloading import MAX_MOVES
from tests.unit.test_protocol import EPOCH, machine, only, refused, sent

IDS = np.array([3, 5, 8], np.uint64)


def carried(*packets: int) -> np.ndarray:  # type: ignore[type-arg]
    made = np.zeros(len(packets), CARRIED)
    made["id"], made["packets"] = IDS[: len(packets)], packets
    return made


@pytest.mark.parametrize(("front", "kind"), [(True, Offload), (False, Recall)])
def test_who_asks_hears_what_moved(front: bool, kind: type) -> None:
    p = machine(State.OPERATIONAL)
    (message,) = sent(p.ask_front(7, IDS, front, 1.0))
    assert type(message) is kind
    assert (message.txid, list(message.ids)) == (7, list(IDS))  # type: ignore[union-attr]
    (told,) = only(FrontMoved, p.received(EPOCH, Moved(7, 40, IDS[:2]), 1.0))
    assert (told.txid, told.room, list(told.ids)) == (7, 40, list(IDS[:2]))
    assert not p.busy


def test_an_answer_to_nothing_ends_the_connection() -> None:
    p = machine(State.OPERATIONAL)
    p.ask_front(7, IDS, True, 1.0)
    p.received(EPOCH, Moved(7, 0, NO_IDS), 1.0)
    text = refused(p.received(EPOCH, Moved(7, 0, NO_IDS), 1.0), ErrorCode.PROTOCOL)
    assert text == "Moved 7 answers nothing"


@pytest.mark.parametrize(("message", "front"), [(Offload(9, IDS), True), (Recall(9, IDS), False)])
def test_who_carries_moves_and_answers(message: Offload | Recall, front: bool) -> None:
    p = machine(State.OPERATIONAL)
    (move,) = only(Move, p.received(EPOCH, message, 1.0))
    assert (list(move.ids), move.front) == (list(IDS), front)
    (answer,) = sent(p.front_moved(move.op, IDS[1:], 5, 1.0))
    assert isinstance(answer, Moved)
    assert (answer.txid, answer.room, list(answer.ids)) == (9, 5, [5, 8])
    assert sent(p.front_moved(move.op, IDS, 5, 1.0)) == [], "one answer for one question"


def test_moves_are_bounded() -> None:
    p = machine(State.OPERATIONAL)
    for txid in range(MAX_MOVES):
        assert only(Move, p.received(EPOCH, Offload(txid, IDS), 1.0))
    assert "at once" in refused(p.received(EPOCH, Recall(99, IDS), 1.0), ErrorCode.PROTOCOL)
    many = np.arange(MAX_FRONT + 1, dtype=np.uint64)
    p = machine(State.OPERATIONAL)
    assert "at once" in refused(p.received(EPOCH, Offload(1, many), 1.0), ErrorCode.PROTOCOL)
    assert only(Move, machine(State.OPERATIONAL).received(EPOCH, Offload(1, many[1:]), 1.0))


def test_what_is_in_front_is_told() -> None:
    p = machine(State.OPERATIONAL)
    (message,) = sent(p.tell_front(2000, 6, carried(4, 0), 1.0))
    assert isinstance(message, InFront)
    (seen,) = only(FrontSeen, p.received(EPOCH, message, 1.0))
    assert (seen.ms, seen.room, seen.carried["packets"].tolist()) == (2000, 6, [4, 0])


@pytest.mark.parametrize("state", [state for state in State if state is not State.OPERATIONAL])
def test_without_a_peer_that_holds_our_sessions_nobody_asks_or_tells(state: State) -> None:
    p = machine(state)
    assert p.ask_front(1, IDS, True, 1.0) == []
    assert p.tell_front(2000, 6, carried(1), 1.0) == []
    assert p.state is state
    if state is State.STARTING:
        return
    assert p.front_moved(12, IDS, 6, 1.0) == [], "of an earlier connection"


def test_a_lost_connection_forgets_questions_and_moves() -> None:
    p = machine(State.OPERATIONAL)
    p.ask_front(7, IDS, True, 1.0)
    (move,) = only(Move, p.received(EPOCH, Offload(9, IDS), 1.0))
    p.disconnected(2.0)
    assert p.front_moved(move.op, IDS, 5, 2.0) == []
    assert not p._asked
