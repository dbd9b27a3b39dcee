# SPDX-License-Identifier: Apache-2.0
"""What differs between two sides, step by step: who lists, who tells, who ends, and what is told again after a gap."""

from __future__ import annotations

import numpy as np
import pytest

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, Records
from nat_control.sync.actions import (
    Action,
    CarrierTold,
    Carry,
    Cede,
    Commit,
    Conflicts,
    Delete,
    DigestCompared,
    ErrorCode,
    Fetch,
    Gap,
    Input,
    Install,
    Learn,
    Mended,
    Mode,
    State,
    TakeBuckets,
    TakeDigest,
)
from nat_control.sync.codec import (
    BucketEntries,
    Carries,
    DeleteComplete,
    DeleteEntries,
    Digest,
    HandOver,
    InstallComplete,
    InstallEntries,
    NextHopsKnown,
    Ready,
    Resync,
    WantEntries,
)
from nat_control.sync.digest import Summary, entries_of
from nat_control.sync.protocol import Protocol
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_PENDING, NEIGHBOUR
from tests.unit.test_protocol import EPOCH, machine, only, refused, sent, sessions

OURS, THEIRS = sessions(3), sessions(3, instance=2, flags=FLAG_FOREIGN)


def summary(records: Records) -> Summary:
    made = Summary()
    made.add(records)
    return made


def receives_a_digest(p: Protocol, theirs: Records, ours: Records, now: float = 1.0) -> list[Action]:
    told, own = summary(theirs), summary(ours)
    (take,) = only(TakeDigest, p.received(EPOCH, Digest(0, told.buckets, told.count), now))
    return p.digest_taken(take.at, own.buckets, own.count, now)


def looks_for_refused(p: Protocol, held: Records, now: float) -> list[Action]:
    """Then it takes a digest."""
    (fetch,) = only(Fetch, p.verify(now))
    return only(TakeDigest, p.fetched(fetch.op, held[np.isin(held["id"], fetch.ids)], now))


def sends_a_digest(p: Protocol, ours: Records, now: float = 1.0) -> None:
    (take,) = only(TakeDigest, p.verify(now))
    own = summary(ours)
    (digest,) = sent(p.digest_taken(take.at, own.buckets, own.count, now))
    assert isinstance(digest, Digest)
    assert digest.count == len(ours)


def test_equal_digests_are_told_to_the_sender() -> None:
    p = machine(State.OPERATIONAL)
    actions = receives_a_digest(p, OURS, OURS)
    assert only(DigestCompared, actions) == [DigestCompared(())]
    (answer,) = sent(actions)
    assert isinstance(answer, BucketEntries)
    assert answer.buckets == ()
    p = machine(State.OPERATIONAL)
    sends_a_digest(p, OURS)
    assert p.received(EPOCH, BucketEntries(0), 2.0) == [DigestCompared(())]
    assert p.comparison is not None
    assert (p.comparison.ours, p.comparison.theirs, p.comparison.when) == (3, 3, 2.0)


def test_the_receiver_lists_the_buckets_that_differ() -> None:
    p = machine(State.OPERATIONAL)
    actions = receives_a_digest(p, OURS[:2], OURS)
    (compared,) = only(DigestCompared, actions)
    assert len(compared.differing) == 1
    (take,) = only(TakeBuckets, actions)
    assert take.buckets == compared.differing
    (listed,) = sent(p.buckets_taken(take.at, take.buckets, OURS[2:], 1.0))
    assert isinstance(listed, BucketEntries)
    assert listed.buckets == take.buckets
    assert list(listed.entries["id"]) == list(OURS["id"][2:])


def test_each_owner_tells_its_own_and_the_other_side_ends_what_has_ended() -> None:
    p = machine(State.OPERATIONAL, Mode.ASYNCHRONOUS)
    held = np.concatenate([OURS[:2], THEIRS[:2]])
    sends_a_digest(p, held)
    peers = np.concatenate([OURS[1:], THEIRS[1:]])
    buckets = tuple(range(256))
    (take,) = only(TakeBuckets, p.received(EPOCH, BucketEntries(0, buckets, entries_of(peers)), 1.0))
    actions = p.buckets_taken(take.at, buckets, held, 1.0)
    wanted, told = sent(actions)
    assert isinstance(wanted, WantEntries)
    assert isinstance(told, InstallEntries)
    assert set(wanted.ids) == {OURS["id"][2], THEIRS["id"][2]}
    assert list(told.records["id"]) == [OURS["id"][0]]
    (ended,) = only(Delete, actions)
    assert list(ended.records["id"]) == [THEIRS["id"][0]]
    assert len(only(Mended, actions)) == 1
    assert list(p.only_ours["id"]) == [OURS["id"][0], THEIRS["id"][0]]
    assert p.mended == 2


def test_what_is_wanted_is_told_or_ended() -> None:
    p = machine(State.OPERATIONAL)
    (fetch,) = only(Fetch, p.received(EPOCH, WantEntries(np.concatenate([OURS, THEIRS])["id"]), 1.0))
    assert p.busy
    actions = p.fetched(fetch.op, np.concatenate([OURS[:1], THEIRS[:1]]), 1.0)
    (told,) = sent(actions)
    assert isinstance(told, InstallEntries)
    assert list(told.records["id"]) == [OURS["id"][0]]
    assert [list(one.records["id"]) for one in only(Delete, actions)] == [[THEIRS["id"][0]]]
    assert p.fetched(fetch.op, OURS, 1.0) == []  # answered already


@pytest.mark.parametrize("step", ["list", "compare"])
def test_a_list_that_is_overtaken_is_dropped(step: str) -> None:
    p = machine(State.OPERATIONAL)
    buckets = tuple(range(256))
    if step == "list":
        (take,) = only(TakeBuckets, receives_a_digest(p, OURS[:2], OURS))
    else:
        sends_a_digest(p, OURS)
        (take,) = only(TakeBuckets, p.received(EPOCH, BucketEntries(0, buckets), 1.0))
    p.events(Changes(opened=sessions(1, first=9), closed=sessions(1, first=9)), 1.0)
    assert p.buckets_taken(take.at, take.buckets, OURS, 1.0) == []


def test_a_list_that_nobody_asked_for_changes_nothing() -> None:
    p = machine(State.OPERATIONAL)
    assert p.received(EPOCH, BucketEntries(0, (1,)), 1.0) == []
    assert p.received(EPOCH, BucketEntries(5), 1.0) == []


# -- what is refused ------------------------------------------------------------------------------------------


def test_what_is_refused_is_named_and_stays_out_of_digests() -> None:
    p = machine(State.OPERATIONAL)
    (told,) = sent(p.events(Changes(opened=OURS), 1.0))
    assert isinstance(told, InstallEntries)
    actions = p.received(EPOCH, InstallComplete(told.txid, OURS["id"][:1]), 1.0)
    assert [one.here for one in only(Conflicts, actions)] == [False]
    assert p.apart
    (take,) = looks_for_refused(p, OURS, 1.0)
    assert list(take.besides) == list(OURS["id"][:1])
    (told,) = sent(p.events(Changes(closed=OURS[:1]), 1.0))
    assert isinstance(told, DeleteEntries)
    p.received(EPOCH, DeleteComplete(told.txid), 1.0)
    assert not p.apart


def test_what_is_refused_here_is_named_until_it_ends() -> None:
    p = machine(State.OPERATIONAL)
    (install,) = only(Install, p.received(EPOCH, InstallEntries(1, THEIRS), 1.0))
    p.plane_done(install.op, 1.0, THEIRS["id"][:2])
    assert list(p.refused_here["id"]) == list(THEIRS["id"][:2])
    (delete,) = only(Delete, p.received(EPOCH, DeleteEntries(2, THEIRS[:1]), 1.0))
    p.plane_done(delete.op, 1.0)
    assert list(p.refused_here["id"]) == list(THEIRS["id"][1:2])
    (install,) = only(Install, p.received(EPOCH, InstallEntries(3, THEIRS[1:2]), 1.0))
    p.plane_done(install.op, 1.0)
    assert not p.apart


def test_what_was_refused_is_offered_again_when_something_has_ended() -> None:
    p = machine(State.OPERATIONAL)
    (told,) = sent(p.events(Changes(opened=OURS), 1.0))
    assert isinstance(told, InstallEntries)
    p.received(EPOCH, InstallComplete(told.txid, OURS["id"]), 1.0)
    assert len(looks_for_refused(p, OURS, 100.0)[0].besides) == 3
    (delete,) = only(Delete, p.received(EPOCH, DeleteEntries(1, THEIRS), 100.0))
    p.plane_done(delete.op, 100.0)
    assert len(only(TakeDigest, p.verify(101.0))[0].besides) == 3
    assert len(looks_for_refused(p, OURS, 200.0)[0].besides) == 0


@pytest.mark.parametrize("lists", [True, False])
def test_who_has_refused_tells_when_it_ends_what_its_peer_no_longer_has(lists: bool) -> None:
    """Else the peer never hears that there is room, and both would stay apart."""
    p = machine(State.OPERATIONAL)
    (install,) = only(Install, p.received(EPOCH, InstallEntries(1, THEIRS[1:]), 1.0))
    p.plane_done(install.op, 1.0, THEIRS["id"][1:])
    if lists:
        (fetch,) = only(Fetch, p.received(EPOCH, WantEntries(THEIRS["id"][:1]), 2.0))
        actions = p.fetched(fetch.op, THEIRS[:1], 2.0)
    else:
        (take,) = only(TakeDigest, p.verify(2.0))
        own, buckets = summary(THEIRS[:1]), tuple(range(256))
        p.digest_taken(take.at, own.buckets, own.count, 2.0)
        only(TakeBuckets, p.received(EPOCH, BucketEntries(0, buckets), 2.0))
        actions = p.buckets_taken(take.at, buckets, THEIRS[:1], 2.0)
    (delete,) = only(Delete, actions)
    (told,) = sent(actions)
    assert isinstance(told, DeleteEntries)
    assert list(told.records["id"]) == list(delete.records["id"]) == list(THEIRS["id"][:1])


def test_what_ended_before_the_refusal_was_told_may_have_made_room() -> None:
    p = machine(State.OPERATIONAL)
    (told,) = sent(p.events(Changes(opened=OURS), 1.0))
    (delete,) = only(Delete, p.received(EPOCH, DeleteEntries(1, THEIRS), 1.0))
    p.plane_done(delete.op, 1.0)
    p.received(EPOCH, InstallComplete(told.txid, OURS["id"]), 1.0)
    assert len(looks_for_refused(p, OURS, 100.0)[0].besides) == 0


def test_what_is_refused_and_has_ended_unseen_keeps_nobody_apart() -> None:
    p = machine(State.OPERATIONAL)
    (told,) = sent(p.events(Changes(opened=OURS), 1.0))
    assert isinstance(told, InstallEntries)
    p.received(EPOCH, InstallComplete(told.txid, OURS["id"][:2]), 1.0)
    (fetch,) = only(Fetch, p.verify(1.0))
    (ended,) = sent(p.fetched(fetch.op, OURS[:1], 1.0))
    assert isinstance(ended, DeleteEntries)  # so that the peer names it no more
    assert list(ended.records["id"]) == [OURS["id"][1]]
    p.received(EPOCH, DeleteComplete(ended.txid), 1.0)
    assert list(p.refused_there) == [OURS["id"][0]]


def test_what_has_ended_while_it_was_looked_for_is_not_told() -> None:
    p = machine(State.OPERATIONAL)
    (fetch,) = only(Fetch, p.received(EPOCH, WantEntries(OURS["id"]), 1.0))
    p.events(Changes(closed=OURS[:1]), 1.0)
    (told,) = sent(p.fetched(fetch.op, OURS, 1.0))
    assert isinstance(told, InstallEntries)
    assert list(told.records["id"]) == list(OURS["id"][1:])


def test_an_operation_that_never_ends_ends_the_connection() -> None:
    p = machine(State.OPERATIONAL)
    receives_a_digest(p, THEIRS[:1], THEIRS)
    (fetch,) = only(Fetch, p.received(EPOCH, WantEntries(THEIRS["id"]), 1.0))
    p.fetched(fetch.op, THEIRS, 1.0)
    assert p.busy  # with ends that nobody waits for
    p.tick(2.0)
    assert p.tick(31.9) == []
    refused(p.tick(32.0), ErrorCode.TIMEOUT)


def test_who_could_not_take_its_own_back_owns_it_once_it_can() -> None:
    p = machine(State.EXCHANGING)
    p.state_page(1, THEIRS, True, 0.0)
    p.received(EPOCH, Ready(1, THEIRS["id"]), 0.0)
    assert list(p.refused_there) == list(THEIRS["id"])
    p = machine(State.OPERATIONAL)
    owned = sessions(1, instance=2)
    (told,) = sent(p.events(Changes(opened=owned), 1.0))
    assert isinstance(told, InstallEntries)
    (cede,) = only(Cede, p.received(EPOCH, InstallComplete(told.txid), 1.0))
    assert (cede.instance, len(cede.besides)) == (2, 0)


# -- gaps -----------------------------------------------------------------------------------------------------


def test_a_gap_is_asked_for_and_the_connection_stays() -> None:
    p = machine(State.OPERATIONAL)
    actions = p.received(EPOCH, InstallEntries(4, THEIRS), 1.0)
    assert only(Gap, actions) == [Gap(1, 3)]
    assert sent(actions) == [Resync(1, 3)]
    assert only(Install, actions)
    assert p.state is State.OPERATIONAL
    assert p.gaps == 1
    actions = p.received(EPOCH, DeleteEntries(6, THEIRS), 1.0)
    assert sent(actions) == [Resync(5, 5)]
    assert only(Delete, actions)


def test_a_change_that_comes_twice_is_refused() -> None:
    p = machine(State.OPERATIONAL)
    p.received(EPOCH, InstallEntries(1, THEIRS), 1.0)
    refused(p.received(EPOCH, InstallEntries(1, THEIRS), 1.0), ErrorCode.PROTOCOL)


def test_after_a_gap_what_still_holds_is_told_again() -> None:
    p = machine(State.OPERATIONAL, batch=3)
    opened = sessions(3, flags=FLAG_PENDING)
    p.events(Changes(opened=opened), 1.0)
    p.events(Changes(closed=sessions(1, first=9)), 1.0)
    actions = p.received(EPOCH, Resync(1, 2), 1.0)
    (again,) = sent(actions)
    assert isinstance(again, DeleteEntries)
    assert again.txid == 3
    (fetch,) = only(Fetch, actions)
    assert list(fetch.ids) == list(opened["id"])
    actions = p.fetched(fetch.op, opened[1:], 1.0)  # the first has ended since
    assert not only(Commit, actions)
    (again,) = sent(actions)
    assert isinstance(again, InstallEntries)
    (commit,) = only(Commit, p.received(EPOCH, InstallComplete(again.txid), 1.0))
    assert len(commit.records) == 2


def test_a_peer_that_is_lost_after_a_gap_holds_no_packets() -> None:
    p = machine(State.OPERATIONAL)
    p.events(Changes(opened=sessions(3, flags=FLAG_PENDING)), 1.0)
    p.received(EPOCH, Resync(1, 1), 1.0)
    (commit,) = only(Commit, p.disconnected(2.0))
    assert len(commit.records) == 3


@pytest.mark.parametrize("gap", [Resync(1, 2), Resync(2, 2), Resync(0, 2**64 - 1), Resync(1, 0)], ids=str)
def test_a_gap_of_what_is_not_outstanding_is_refused(gap: Resync) -> None:
    p = machine(State.OPERATIONAL)
    p.events(Changes(opened=OURS), 1.0)
    refused(p.received(EPOCH, gap, 1.0), ErrorCode.PROTOCOL)


# -- what must change nothing -----------------------------------------------------------------------------------

AT = only(TakeDigest, machine(State.OPERATIONAL).verify(1.0))[0].at
SAY = {
    Input.EVENTS: lambda p: p.events(Changes(updated=OURS), 1.0),
    Input.TICK: lambda p: p.tick(1.0),
    Input.STOP: lambda p: p.stop(1.0),
    Input.DISCONNECTED: lambda p: p.disconnected(1.0),
    Input.NEXT_HOPS: lambda p: p.next_hops(np.zeros(1, "u1"), 1.0),
    Input.HAND_OVER: lambda p: p.hand_over(2, 1.0),
    Input.CARRIER: lambda p: p.carries(2, 1.0),
    Input.STATE_PAGE: lambda p: p.state_page(0, OURS, True, 1.0),
    Input.PLANE_DONE: lambda p: p.plane_done(0, 1.0),
    Input.DIGEST_TAKEN: lambda p: p.digest_taken(AT._replace(epoch=p.epoch), summary(OURS).buckets, 3, 1.0),
    Input.BUCKETS_TAKEN: lambda p: p.buckets_taken(AT._replace(epoch=p.epoch), (1,), OURS, 1.0),
    Input.FETCHED: lambda p: p.fetched(0, OURS, 1.0),
}
IDLE = [Input.NEXT_HOPS, Input.HAND_OVER, Input.CARRIER]
UNCONNECTED = [*IDLE, Input.EVENTS, Input.TICK, Input.STOP]
LATE = [Input.STATE_PAGE, Input.PLANE_DONE, Input.DIGEST_TAKEN, Input.BUCKETS_TAKEN, Input.FETCHED]
QUIET = {
    State.STARTING: [*UNCONNECTED, Input.DISCONNECTED],
    State.ALONE: [*UNCONNECTED, Input.DISCONNECTED, *LATE],
    State.HANDSHAKE: [*IDLE, Input.EVENTS, Input.TICK, *LATE],
    State.EXCHANGING: [Input.HAND_OVER, Input.CARRIER, *LATE],
    State.FAILED: [*UNCONNECTED, *LATE],
}


@pytest.mark.parametrize(
    ("state", "kind"), [(state, kind) for state, kinds in QUIET.items() for kind in kinds]
)
def test_nothing_comes_of_it(state: State, kind: Input) -> None:
    p = machine(state)
    assert SAY[kind](p) == []
    assert p.state is state
    assert not p.busy


def test_nothing_is_asked_of_nobody() -> None:
    assert machine(State.ALONE).verify(1.0) == []
    assert list(NO_IDS) == list(NO_RECORDS["id"])


@pytest.mark.parametrize("state", [State.EXCHANGING, State.OPERATIONAL])
def test_next_hops_are_told_and_learned(state: State) -> None:
    p, hops = machine(state), np.zeros(2, NEIGHBOUR)
    (told,) = sent(p.next_hops(hops, 1.0))
    assert isinstance(told, NextHopsKnown)
    assert len(told.next_hops) == 2
    (learn,) = p.received(EPOCH, NextHopsKnown(hops), 1.0)
    assert isinstance(learn, Learn)


def test_the_traffic_is_handed_over_and_taken() -> None:
    p = machine(State.OPERATIONAL)
    assert sent(p.hand_over(2, 1.0, lasting=True)) == [HandOver(2, True)]
    assert p.received(EPOCH, HandOver(2), 1.0) == [Carry(2, False)]
    assert p.received(EPOCH, HandOver(1, True), 1.0) == [Carry(1, True)]
    assert sent(p.carries(1, 1.0, why="no link")) == [Carries(1, False, "no link")]
    assert (p.carrier, p.lasting) == (1, False)
    assert p.received(EPOCH, Carries(2, True), 1.0) == [CarrierTold(2, True, "")]
    assert (p.carrier, p.lasting) == (2, True)
    p.disconnected(2.0)
    assert p.carrier is None


@pytest.mark.parametrize("message", [HandOver(3), Carries(3)])
def test_somebody_else_cannot_carry(message: HandOver | Carries) -> None:
    text = refused(machine(State.OPERATIONAL).received(EPOCH, message, 1.0), ErrorCode.PROTOCOL)
    assert text == "instance 3 shall carry, and is none of this pair"


def test_a_page_of_an_exchange_that_is_over_is_left_out() -> None:
    assert machine(State.OPERATIONAL).state_page(0, OURS, True, 1.0) == []
