# SPDX-License-Identifier: Apache-2.0
"""The sync protocol step by step: what each side says, and what it refuses. tests/sim has the long runs."""

from __future__ import annotations

import numpy as np
import pytest

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, Records
from nat_control.sync.actions import (
    MAX_OUTSTANDING,
    Action,
    Cede,
    Close,
    Commit,
    Conflicts,
    Delete,
    DigestCompared,
    ErrorCode,
    Input,
    Install,
    Limits,
    Mode,
    Precedence,
    Send,
    SendState,
    State,
    StateChanged,
    TakeDigest,
    TakeOwnership,
    Update,
)
from nat_control.sync.codec import (
    BUCKETS,
    CARRIED,
    MAX_RECORDS,
    BucketEntries,
    Bye,
    DeleteComplete,
    DeleteEntries,
    Digest,
    Error,
    Hello,
    InFront,
    InitState,
    InstallComplete,
    InstallEntries,
    Message,
    Moved,
    Offload,
    PoolRange,
    Ready,
    Recall,
    Resync,
    UpdateEntries,
    WantEntries,
)
from nat_control.sync.protocol import CONNECTED, INPUT_OF, TABLE, Protocol
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_INBOUND, FLAG_OFFLOAD, FLAG_PENDING, RECORD

OURS, THEIRS = PoolRange(100, 110, 1024, 2047), PoolRange(100, 110, 2048, 4095)
EPOCH = 77  # of the peer
MESSAGES: list[Message] = [
    Hello(2, EPOCH, 0, (THEIRS,)),
    InitState(1, 0, True, NO_RECORDS),
    Ready(1),
    InstallEntries(1, NO_RECORDS),
    UpdateEntries(NO_RECORDS),
    DeleteEntries(1, NO_RECORDS),
    InstallComplete(1),
    DeleteComplete(1),
    Digest(0, np.zeros(BUCKETS, np.uint64)),
    Error(1, "no"),
    Bye(),
    BucketEntries(0),
    WantEntries(NO_IDS),
    Resync(1, 1),
    Offload(1, NO_IDS),
    Recall(1, NO_IDS),
    Moved(1, 0, NO_IDS),
    InFront(0, 0, np.zeros(0, CARRIED)),
]


def sessions(n: int, *, instance: int = 1, first: int = 1, flags: int = 0) -> Records:
    made = np.zeros(n, RECORD)
    made["id"] = np.arange(first, first + n) | 1 << 60 | instance << 52
    made["flags"] = flags
    return made


def only(kind: type, actions: list[Action]) -> list:  # type: ignore[type-arg]
    return [action for action in actions if isinstance(action, kind)]


def sent(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send)]


def machine(state: State, mode: Mode = Mode.SYNCHRONOUS, **limits: float) -> Protocol:
    """One that has come to this state; nothing happened on the way."""
    p = Protocol(1, (OURS,), mode, epoch=5, limits=Limits(**limits))  # type: ignore[arg-type]
    if state is State.STARTING:
        return p
    p.plane_ready()
    if state is State.ALONE:
        return p
    p.connected(0.0)
    if state is State.HANDSHAKE:
        return p
    (state_wanted,) = only(SendState, p.received(EPOCH, Hello(2, EPOCH, 3, (THEIRS,)), 0.0))
    if state is State.EXCHANGING:
        return p
    p.state_page(state_wanted.txid, NO_RECORDS, True, 0.0)
    p.received(EPOCH, InitState(9, 0, True, NO_RECORDS), 0.0)
    p.received(EPOCH, Ready(state_wanted.txid), 0.0)
    if state is State.FAILED:
        p.stop(0.0)
    assert p.state is state
    return p


def test_whose_sessions_stay_is_said_by_what_was_sent() -> None:
    """A side whose role changes while its Hello is on the way: the other one has heard what it was."""
    sides = [Protocol(1, (OURS,), Mode.SYNCHRONOUS), Protocol(2, (THEIRS,), Mode.SYNCHRONOUS)]
    sides[0].precedence, sides[1].precedence = Precedence.STANDS_BY, Precedence.CARRIES
    hellos = []
    for side in sides:
        side.plane_ready()
        hellos += sent(side.connected(0.0))
    sides[0].precedence, sides[0].term = Precedence.DECIDES, 9
    for side, hello in zip(sides, reversed(hellos), strict=True):
        assert isinstance(hello, Hello)
        side.received(hello.epoch, hello, 0.0)
    assert [side.yields for side in sides] == [True, False]


def refused(actions: list[Action], code: ErrorCode) -> str:
    """The text of the Error; the connection is closed and nothing of ours was touched."""
    (error,) = only(Error, sent(actions))  # type: ignore[arg-type]
    assert error.code == code
    assert only(Close, actions)
    assert not only(Install, actions)
    assert not only(Delete, actions)
    return str(error.text)


def test_the_way_to_operational() -> None:
    p = Protocol(1, (OURS,), Mode.SYNCHRONOUS, epoch=5)
    assert [a.after for a in only(StateChanged, p.plane_ready())] == [State.ALONE]
    assert sent(p.connected(0.0)) == [Hello(1, 6, 0, (OURS,))]
    actions = p.received(EPOCH, Hello(2, EPOCH, 0, (THEIRS,)), 0.1)
    (wanted,) = only(SendState, actions)
    first, last = sent(p.state_page(wanted.txid, sessions(MAX_RECORDS + 1), True, 0.2))
    assert isinstance(first, InitState)
    assert isinstance(last, InitState)
    assert [(m.chunk, m.last, len(m.records)) for m in (first, last)] == [
        (0, False, MAX_RECORDS),
        (1, True, 1),
    ]
    (install,) = only(Install, p.received(EPOCH, InitState(9, 0, False, sessions(2, instance=2)), 0.3))
    assert sent(p.received(EPOCH, InitState(9, 1, True, NO_RECORDS), 0.3)) == []
    assert p.received(EPOCH, Ready(wanted.txid, install.records["id"][:1]), 0.4)[0:1] != []
    assert p.state is State.EXCHANGING  # the plane does not hold the peer's sessions yet
    actions = p.plane_done(install.op, 0.5)
    (ready,) = sent(actions)
    assert isinstance(ready, Ready)
    assert ready.txid == 9
    assert p.state is State.OPERATIONAL
    assert p.conflicts == 1


def test_ownership_goes_by_the_id() -> None:
    p = machine(State.OPERATIONAL)
    both = np.concatenate(
        [
            sessions(1, instance=1, flags=FLAG_FOREIGN | FLAG_INBOUND),
            sessions(1, instance=2, first=2, flags=FLAG_PENDING | FLAG_OFFLOAD),
        ]
    )
    (install,) = only(Install, p.received(EPOCH, InstallEntries(1, both), 1.0))
    assert list(install.records["flags"]) == [FLAG_INBOUND, FLAG_FOREIGN]
    (answer,) = sent(p.plane_done(install.op, 1.0))
    assert isinstance(answer, InstallComplete)
    assert answer.txid == 1


def test_what_the_peer_refuses_stays_ours() -> None:
    p = machine(State.EXCHANGING)
    txid = p.epoch and 1
    p.state_page(txid, sessions(2), True, 0.0)
    actions = p.received(EPOCH, Ready(txid, sessions(1)["id"]), 0.0)
    (cede,) = only(Cede, actions)
    assert cede.instance == 2
    assert list(cede.besides) == list(sessions(1)["id"])
    assert not only(Conflicts, actions)[0].here


def test_synchronous_packets_wait_for_the_acknowledgement() -> None:
    p = machine(State.OPERATIONAL)
    actions = p.events(Changes(opened=sessions(3, flags=FLAG_PENDING)), 1.0)
    assert not only(Commit, actions)
    (message,) = sent(actions)
    assert isinstance(message, InstallEntries)
    assert list(message.records["flags"]) == [0, 0, 0]
    (commit,) = only(Commit, p.received(EPOCH, InstallComplete(message.txid), 1.0))
    assert len(commit.records) == 3


@pytest.mark.parametrize("state", [s for s in State if s is not State.OPERATIONAL])
def test_alone_packets_wait_for_nobody(state: State) -> None:
    (commit,) = only(Commit, machine(state).events(Changes(opened=sessions(2, flags=FLAG_PENDING)), 1.0))
    assert len(commit.records) == 2


def test_asynchronous_packets_wait_for_nobody() -> None:
    p = machine(State.OPERATIONAL, Mode.ASYNCHRONOUS)
    actions = p.events(Changes(opened=sessions(2, flags=FLAG_PENDING)), 1.0)
    assert len(only(Commit, actions)) == 1
    assert only(Commit, p.disconnected(1.0)) == []


def test_a_lost_peer_releases_everything_and_leaves_its_sessions() -> None:
    p = machine(State.OPERATIONAL, batch=2, window=1)
    p.events(Changes(opened=sessions(5, flags=FLAG_PENDING)), 1.0)
    assert (p.outstanding, p.waiting) == (1, 3)
    actions = p.disconnected(2.0)
    (commit,) = only(Commit, actions)
    assert len(commit.records) == 5
    assert only(TakeOwnership, actions)
    assert p.state is State.ALONE
    assert (p.outstanding, p.waiting) == (0, 0)
    assert p.term == 4  # beyond the peer's, which was 3


def test_batches_and_the_window() -> None:
    p = machine(State.OPERATIONAL, batch=2, window=2)
    first = sent(p.events(Changes(opened=sessions(3)), 1.0))
    assert [len(m.records) for m in first if isinstance(m, InstallEntries)] == [2, 1]
    assert sent(p.events(Changes(closed=sessions(1), updated=sessions(1, first=2)), 1.0)) == []
    assert sent(p.events(Changes(opened=sessions(1, first=9)), 1.0)) == []
    for answered, expected in zip(first, (DeleteEntries, UpdateEntries), strict=True):
        assert isinstance(answered, InstallEntries)
        followed = sent(p.received(EPOCH, InstallComplete(answered.txid), 1.0))
        assert type(followed[0]) is expected
    assert type(followed[1]) is InstallEntries


def test_what_came_and_went_in_one_step_is_not_told() -> None:
    p = machine(State.OPERATIONAL)
    assert sent(p.events(Changes(opened=sessions(2), closed=sessions(2)), 1.0)) == []


def test_changes_of_the_exchange_follow_it() -> None:
    p = machine(State.EXCHANGING)
    assert sent(p.events(Changes(opened=sessions(1), closed=sessions(1, first=5)), 0.0)) == []
    p.received(EPOCH, InitState(9, 0, True, NO_RECORDS), 0.0)
    p.state_page(1, NO_RECORDS, True, 0.0)
    actions = p.received(EPOCH, Ready(1), 0.0)
    assert [type(m) for m in sent(actions)] == [DeleteEntries, InstallEntries]
    # What ended here while the peer's InitState was under way must not live on.
    (again,) = only(Delete, actions)
    assert list(again.records["id"]) == list(sessions(1, first=5)["id"])


def test_what_only_our_timer_ends_during_the_exchange_goes_on_if_the_peer_has_it() -> None:
    p, ended = machine(State.EXCHANGING), sessions(3, first=5)
    p.events(Changes(closed=ended, aged=ended["id"][:2]), 0.0)
    p.state_page(1, NO_RECORDS, True, 0.0)
    brought = ended[[0, 2]]
    (install,) = only(Install, p.received(EPOCH, InitState(9, 0, True, brought), 0.0))
    p.plane_done(install.op, 0.0)
    actions = p.received(EPOCH, Ready(1), 0.0)
    (told,) = sent(actions)
    assert isinstance(told, DeleteEntries)
    assert list(told.records["id"]) == list(ended["id"][1:])
    assert [list(one.records["id"]) for one in only(Delete, actions)] == [list(ended["id"][1:])]
    (again,) = only(Install, actions)
    assert list(again.records["id"]) == [ended["id"][0]]
    # Its port was given away meanwhile: then it has ended after all.
    (told,) = sent(p.plane_done(again.op, 0.0, again.records["id"]))
    assert isinstance(told, DeleteEntries)
    assert list(told.records["id"]) == [ended["id"][0]]


def test_what_our_timer_ends_after_the_peer_has_told_of_it_has_ended() -> None:
    p, ended = machine(State.EXCHANGING), sessions(1, first=5)
    p.state_page(1, NO_RECORDS, True, 0.0)
    (install,) = only(Install, p.received(EPOCH, InitState(9, 0, True, ended), 0.0))
    p.plane_done(install.op, 0.0)
    p.events(Changes(closed=ended, aged=ended["id"]), 0.0)
    actions = p.received(EPOCH, Ready(1), 0.0)
    assert [type(m) for m in sent(actions)] == [DeleteEntries]
    assert not only(Install, actions)


def test_updates_and_deletes_reach_the_plane() -> None:
    p = machine(State.OPERATIONAL)
    assert only(Update, p.received(EPOCH, UpdateEntries(sessions(1, instance=2)), 1.0))
    (delete,) = only(Delete, p.received(EPOCH, DeleteEntries(1, sessions(1, instance=2)), 1.0))
    assert sent(p.plane_done(delete.op, 1.0)) == [DeleteComplete(1)]
    assert sent(p.plane_done(delete.op, 1.0)) == []


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("state", CONNECTED)
def test_a_message_out_of_place_ends_the_connection(state: State, message: Message) -> None:
    if (state, INPUT_OF[type(message)]) in TABLE:
        return
    p = machine(state)
    assert "not expected" in refused(p.received(EPOCH, message, 1.0), ErrorCode.PROTOCOL)
    assert p.state is State.FAILED
    assert [a.after for a in only(StateChanged, p.disconnected(1.0))] == [State.ALONE]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("state", [State.STARTING, State.ALONE, State.FAILED])
def test_a_late_message_is_left_out(state: State, message: Message) -> None:
    p = machine(state)
    assert p.received(EPOCH, message, 1.0) == []
    assert p.state is state


def test_pools_that_overlap_are_refused_by_name() -> None:
    p = machine(State.HANDSHAKE)
    shared = (PoolRange(1, 2, 1, 2), PoolRange(0x0A000000, 0x0AFFFFFF, 1, 65535))
    p.pools = (PoolRange(0x0A000001, 0x0A000001, 1024, 2047),)
    text = refused(p.received(EPOCH, Hello(2, EPOCH, 0, shared), 1.0), ErrorCode.POOLS)
    assert text == "both would hand out 10.0.0.1 ports 1024-2047"


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (Hello(1, EPOCH, 0, (THEIRS,)), ErrorCode.INSTANCE),
        (Hello(2, EPOCH, 0, (THEIRS,), 95), ErrorCode.RECORD),
        (Hello(2, EPOCH, 0, (THEIRS,), slices=2), ErrorCode.SLICES),
    ],
)
def test_a_peer_that_does_not_fit(hello: Hello, code: ErrorCode) -> None:
    refused(machine(State.HANDSHAKE).received(EPOCH, hello, 1.0), code)


def test_both_sides_have_the_same_slices() -> None:
    p = machine(State.HANDSHAKE)
    p.slices = 4
    text = refused(p.received(EPOCH, Hello(2, EPOCH, 0, (THEIRS,), slices=2), 1.0), ErrorCode.SLICES)
    assert text.startswith("nat.pool.slices: 2 there and 4 here")
    p = Protocol(1, (OURS,), Mode.SYNCHRONOUS, slices=4)
    p.plane_ready()
    assert [hello.slices for hello in sent(p.connected(0.0))] == [4]
    p.received(EPOCH, Hello(2, EPOCH, 0, (THEIRS,), slices=4), 1.0)
    assert p.state is State.EXCHANGING


def test_another_epoch_is_refused() -> None:
    p = machine(State.OPERATIONAL)
    assert "epoch 76" in refused(p.received(EPOCH - 1, DeleteEntries(1, sessions(1)), 1.0), ErrorCode.EPOCH)


@pytest.mark.parametrize(
    "message", [InstallComplete(99), DeleteComplete(99), DeleteComplete(1)], ids=lambda m: f"{m.txid}"
)
def test_an_acknowledgement_of_nothing_is_refused(message: Message) -> None:
    p = machine(State.OPERATIONAL)
    p.events(Changes(opened=sessions(1, flags=FLAG_PENDING)), 1.0)
    actions = p.received(EPOCH, message, 1.0)
    refused(actions, ErrorCode.PROTOCOL)
    assert len(only(Commit, actions)) == 1


@pytest.mark.parametrize("chunk", [InitState(9, 1, True, NO_RECORDS), InitState(9, 7, False, NO_RECORDS)])
def test_chunks_come_in_order(chunk: InitState) -> None:
    refused(machine(State.EXCHANGING).received(EPOCH, chunk, 1.0), ErrorCode.PROTOCOL)


def test_chunks_belong_together_and_end_once() -> None:
    p = machine(State.EXCHANGING)
    p.received(EPOCH, InitState(9, 0, False, NO_RECORDS), 1.0)
    refused(p.received(EPOCH, InitState(8, 1, True, NO_RECORDS), 1.0), ErrorCode.PROTOCOL)
    p = machine(State.EXCHANGING)
    p.received(EPOCH, InitState(9, 0, True, NO_RECORDS), 1.0)
    refused(p.received(EPOCH, InitState(9, 1, True, NO_RECORDS), 1.0), ErrorCode.PROTOCOL)


def test_ready_answers_a_whole_state() -> None:
    p = machine(State.EXCHANGING)
    refused(p.received(EPOCH, Ready(1), 1.0), ErrorCode.PROTOCOL)
    p = machine(State.EXCHANGING)
    p.state_page(1, NO_RECORDS, True, 1.0)
    refused(p.received(EPOCH, Ready(2), 1.0), ErrorCode.PROTOCOL)


def test_a_peer_that_floods_is_refused() -> None:
    p = machine(State.OPERATIONAL)
    for i in range(3 * MAX_OUTSTANDING):
        actions = p.received(EPOCH, InstallEntries(i + 1, sessions(1, instance=2, first=i + 1)), 1.0)
        if p.state is State.FAILED:
            refused(actions, ErrorCode.PROTOCOL)
            return
    pytest.fail("it is served without end")


def test_bytes_that_are_no_messages() -> None:
    p = machine(State.OPERATIONAL)
    assert refused(p.broken("magic", 1.0), ErrorCode.MALFORMED) == "magic"
    assert p.broken("magic", 1.0) == []


# -- bounds and times -------------------------------------------------------------------------------------


def test_a_slow_peer_is_given_up() -> None:
    p = machine(State.OPERATIONAL, waiting=10, batch=2, window=1)
    p.events(Changes(opened=sessions(9, flags=FLAG_PENDING)), 1.0)
    assert p.state is State.OPERATIONAL
    actions = p.events(Changes(opened=sessions(4, first=10, flags=FLAG_PENDING)), 1.0)
    refused(actions, ErrorCode.SLOW)
    assert [len(commit.records) for commit in only(Commit, actions)] == [13]


@pytest.mark.parametrize(("state", "limit"), [(State.HANDSHAKE, 5.0), (State.EXCHANGING, 30.0)])
def test_silence_is_given_up(state: State, limit: float) -> None:
    p = machine(state)
    assert p.tick(limit - 0.1) == []
    refused(p.tick(limit), ErrorCode.TIMEOUT)


def test_a_batch_without_acknowledgement_is_given_up() -> None:
    p = machine(State.OPERATIONAL)
    p.events(Changes(opened=sessions(1, flags=FLAG_PENDING)), 1.0)
    assert p.tick(10.9) == []
    assert len(only(Commit, p.tick(11.0))) == 1


def test_off_and_not_ready() -> None:
    p = machine(State.ALONE, Mode.OFF)
    assert [type(a) for a in p.connected(0.0)] == [Close]
    assert p.disconnected(0.0) == []
    assert [type(a) for a in machine(State.STARTING).connected(0.0)] == [Close]


def test_limits_are_checked() -> None:
    for bad in ({"batch": 0}, {"batch": MAX_RECORDS + 1}, {"window": 0}, {"window": MAX_OUTSTANDING + 1}):
        with pytest.raises(ValueError, match="out of range"):
            Limits(**bad)  # type: ignore[arg-type]


def test_inputs_of_the_shell_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="connected cannot happen in state operational"):
        machine(State.OPERATIONAL).connected(1.0)


# -- the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", CONNECTED)
def test_leaving_on_purpose(state: State) -> None:
    p = machine(state)
    actions = p.stop(1.0)
    assert sent(actions) == [Bye()]
    assert only(Close, actions)
    assert p.state is State.FAILED
    for message in (Bye(), Error(3, "tired")):
        p = machine(state)
        actions = p.received(EPOCH, message, 1.0)
        assert sent(actions) == []
        assert only(Close, actions)
    assert p.last_error == "the peer reports error 3: tired"


@pytest.mark.parametrize("state", [State.ALONE, State.HANDSHAKE, State.EXCHANGING, State.FAILED])
def test_answers_for_an_earlier_connection_change_nothing(state: State) -> None:
    p = machine(state)
    at = only(TakeDigest, machine(State.OPERATIONAL).tick(100.0))[0].at
    assert p.state_page(12345, sessions(1), True, 1.0) == []
    assert p.plane_done(12345, 1.0) == []
    assert p.digest_taken(at, np.zeros(BUCKETS, np.uint64), 0, 1.0) == []


# -- the digest -------------------------------------------------------------------------------------------


def test_digests_are_compared_at_rest() -> None:
    p = machine(State.OPERATIONAL)
    (wanted,) = only(TakeDigest, p.tick(100.0))
    buckets = np.arange(BUCKETS, dtype=np.uint64)
    (mine,) = sent(p.digest_taken(wanted.at, buckets, 0, 100.0))
    assert isinstance(mine, Digest)
    assert mine.position == 0
    (wanted,) = only(TakeDigest, p.received(EPOCH, Digest(0, buckets), 101.0))
    other = buckets.copy()
    other[7] += 1
    assert p.digest_taken(wanted.at, other, 0, 101.0)[:1] == [DigestCompared((7,))]


def test_a_digest_that_is_overtaken_is_dropped() -> None:
    p = machine(State.OPERATIONAL)
    buckets = np.zeros(BUCKETS, np.uint64)
    (wanted,) = only(TakeDigest, p.received(EPOCH, Digest(0, buckets), 1.0))
    p.events(Changes(opened=sessions(1), closed=sessions(1)), 1.0)
    assert p.digest_taken(wanted.at, buckets, 0, 1.0) == []
    assert p.received(EPOCH, Digest(5, buckets), 1.0) == []


def test_every_message_has_its_input() -> None:
    assert {INPUT_OF[type(message)].value for message in MESSAGES} == {type(m).__name__ for m in MESSAGES}
    assert {kind for _, kind in TABLE} == set(Input)
