# SPDX-License-Identifier: Apache-2.0
"""What nat_control/dataplane.py promises, sentence by sentence, of every plane."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nat_control.dataplane import CLOSED_BY_COMMAND, NO_IDS, NO_RECORDS, Changes, Records, changes
from nat_fastpath.engine import (
    EVENT_CLOSE,
    EVENT_OPEN,
    EVENT_UPDATE,
    FLAG_FOREIGN,
    FLAG_OFFLOAD,
    FLAG_PENDING,
    FLAG_PREVAILS,
    NEIGHBOUR,
    TCP_STATES,
)
from tests.packets import number
from tests.planes.conftest import Make
from tests.planes.subjects import HOSTS, INSTANCE, PEER, Subject, session, sessions

KEPT = (
    "id", "protocol", "tcp_state", "flags", "packets_out", "packets_in", "bytes_out", "bytes_in",
    "internal_addr", "internal_port", "external_addr", "external_port", "remote_addr", "remote_port",
)  # fmt: skip


def plain(records: Records) -> list[tuple[int, ...]]:
    """Comparable, without times and in no order."""
    return sorted(tuple(int(one[name]) for name in KEPT) for one in records)


def identities(records: Records) -> set[int]:
    return set(records["id"].tolist())


def told(subject: Subject) -> Changes:
    return changes(subject.events())


# -- install -----------------------------------------------------------------------------------------------


def test_what_is_installed_is_held_as_it_was_given(subject: Subject) -> None:
    given = sessions(50)
    given["flags"][::3] = FLAG_FOREIGN
    given["packets_out"], given["bytes_in"] = 3, 1 << 40
    given["tcp_state"][given["protocol"] == 6] = TCP_STATES.index("established")
    assert subject.run(subject.plane.install(given)) == 50
    assert plain(subject.held()) == plain(given)
    assert subject.run(subject.plane.holds(given)).all()
    assert len(subject.events()) == 0, "only what a plane does by itself is told"
    subject.check()


def test_installing_again_counts_and_takes_the_ownership_and_no_state(subject: Subject) -> None:
    given = sessions(4)
    subject.run(subject.plane.install(given))
    for flags in (FLAG_FOREIGN, FLAG_FOREIGN, 0):
        again = given.copy()
        again["flags"], again["packets_out"] = flags, 99
        again["tcp_state"][again["protocol"] == 6] = TCP_STATES.index("closing")
        assert subject.run(subject.plane.install(again)) == 4
        expected = given.copy()
        expected["flags"] = flags
        assert plain(subject.held()) == plain(expected)
    assert subject.run(subject.plane.install(np.concatenate([given, given]))) == 8
    subject.check()


BESIDE = {"id": int(session(2)["id"][0]), "remote_port": 99}  # another session than 1
CONTRADICTIONS = {
    "its external endpoint has another inside host": {**BESIDE, "internal_addr": number(HOSTS[8])},
    "its external endpoint has another inside port": {**BESIDE, "internal_port": 5000},
    "its 5-tuple is taken under another id": {"id": BESIDE["id"]},
    "it is held with another external endpoint": {"external_port": 5000},
}


@pytest.mark.parametrize("why", CONTRADICTIONS)
def test_what_contradicts_a_held_session_is_refused(subject: Subject, why: str) -> None:
    held, good = session(1), sessions(2, first=10)
    bad = session(1, **CONTRADICTIONS[why])
    subject.run(subject.plane.install(held))
    batch = np.concatenate([good[:1], bad, good[1:]])
    assert subject.run(subject.plane.install(batch)) == 2, why
    assert subject.run(subject.plane.holds(batch)).tolist() == [True, False, True]
    assert plain(subject.held()) == plain(np.concatenate([held, good]))
    subject.check()
    # Nothing of it stays: without the one that it contradicts it is welcome.
    assert subject.run(subject.plane.delete(held)) == 1
    assert subject.run(subject.plane.install(bad)) == 1
    assert plain(subject.held()) == plain(np.concatenate([bad, good]))
    subject.check()


BOTH = {
    "another external port": {**BESIDE, "external_port": 5000},
    "another external address": {**BESIDE, "external_addr": number("198.51.100.10")},
}


@pytest.mark.parametrize("what", BOTH)
def test_one_inside_endpoint_may_have_two_external_ones(subject: Subject, what: str) -> None:
    """The two sides of a split have used it: no session of either is lost."""
    batch = np.concatenate([session(1), session(1, **BOTH[what])])
    assert subject.run(subject.plane.install(batch)) == 2
    assert plain(subject.held()) == plain(batch)
    subject.check()
    for one in (batch[:1], batch[1:]):
        assert subject.run(subject.plane.delete(one)) == 1
        subject.check()
    assert subject.run(subject.plane.install(batch)) == 2
    subject.check()


@pytest.mark.parametrize(
    "why", ["its 5-tuple is taken under another id", "it is held with another external endpoint"]
)
def test_a_session_that_prevails_ends_another_of_its_5_tuple(subject: Subject, why: str) -> None:
    held, other = session(1), session(7)
    prevailing = session(1, **{**CONTRADICTIONS[why], "id": BESIDE["id"]})
    prevailing["flags"] |= FLAG_PREVAILS
    subject.run(subject.plane.install(np.concatenate([held, other])))
    assert subject.run(subject.plane.install(prevailing)) == 1
    prevailing["flags"] = 0
    assert plain(subject.held()) == plain(np.concatenate([prevailing, other]))
    assert subject.events()["id"].tolist() == held["id"].tolist()
    subject.check()


def test_within_a_call_the_first_of_two_that_contradict_each_other_is_held(subject: Subject) -> None:
    first, second = session(1), session(1, **CONTRADICTIONS["its 5-tuple is taken under another id"])
    assert subject.run(subject.plane.install(np.concatenate([first, second]))) == 1
    assert plain(subject.held()) == plain(first)
    subject.check()


def test_sessions_of_one_endpoint_and_of_other_protocols_are_no_contradictions(subject: Subject) -> None:
    one = session(1, protocol=17)
    others = [session(2 + i, **endpoints(1), remote_port=100 + i, protocol=17) for i in range(3)]
    others.append(session(9, **{**endpoints(1), "external_port": 5000}, protocol=6))
    batch = np.concatenate([one, *others])
    assert subject.run(subject.plane.install(batch)) == 5
    assert plain(subject.held()) == plain(batch)
    subject.check()


def endpoints(n: int) -> dict[str, int]:
    """Inside and external endpoint of session ``n``."""
    names = ("internal_addr", "internal_port", "internal_mac", "external_addr", "external_port")
    return {name: int(session(n)[name][0]) for name in names}


def test_a_full_plane_refuses_and_counts(make: Make) -> None:
    subject = make(max_sessions=64)
    most = subject.plane.capabilities.max_sessions
    assert most == 64
    given = sessions(most + 10)
    assert subject.run(subject.plane.install(given)) == most
    assert subject.run(subject.plane.holds(given)).tolist() == [True] * most + [False] * 10
    assert len(subject.held()) == most
    subject.check()
    assert subject.run(subject.plane.install(given[:most])) == most, "what is held needs no room"
    assert subject.run(subject.plane.delete(given[:3])) == 3
    assert subject.run(subject.plane.install(given[most:])) == 3
    assert identities(subject.held()) == identities(given[3 : most + 3])
    subject.check()


# -- holds, update, delete -------------------------------------------------------------------------------


def strangers() -> Records:
    """Like the sessions 1 to 4, but for an id, a 5-tuple, both, or the external endpoint."""
    return np.concatenate(
        [
            session(1, id=int(session(101)["id"][0])),
            session(2, remote_port=99, internal_mac=1),
            session(3, remote_addr=number("203.0.113.8"), id=int(session(103)["id"][0])),
            session(4, external_port=5000),
        ]
    )


def test_holds_goes_by_5_tuple_external_endpoint_and_id(subject: Subject) -> None:
    held = sessions(5)
    subject.run(subject.plane.install(held))
    asked = np.concatenate([held, strangers()])[::-1]
    found = subject.run(subject.plane.holds(asked))
    assert found.dtype == np.bool_
    assert found.tolist() == [False] * len(strangers()) + [True] * len(held)
    assert len(subject.run(subject.plane.holds(held[:0]))) == 0


def test_update_changes_state_times_and_counters_of_what_is_held(subject: Subject) -> None:
    held = sessions(6, flags=FLAG_FOREIGN, idle_ms=120_000)
    subject.run(subject.plane.install(held))
    seen = held.copy()
    seen["packets_out"], seen["packets_in"], seen["bytes_out"], seen["bytes_in"] = 1, 1 << 33, 3, 1 << 50
    seen["tcp_state"][seen["protocol"] == 6] = TCP_STATES.index("established")
    seen["idle_ms"] = 60_000
    assert subject.run(subject.plane.update(np.concatenate([seen, strangers()]))) == 6
    assert plain(subject.held()) == plain(seen)
    assert (subject.held()["idle_ms"] >= 60_000).all()
    assert (subject.held()["idle_ms"] < 90_000).all()
    assert len(subject.events()) == 0
    subject.check()


def test_what_a_switch_has_carried_is_added(subject: Subject) -> None:
    """Counters add up, the shorter idle time counts, and of TCP only a handshake's last ACK is concluded."""
    states = ("syn_out", "syn_both", "established", "fin_out", "closing", "reset")
    held = sessions(len(states), protocol=6, idle_ms=60_000, packets_out=5, bytes_in=(1 << 33) + 1)
    held["packets_in"] = (1 << 32) - 1
    held["tcp_state"] = [TCP_STATES.index(state) for state in states]
    subject.run(subject.plane.install(held))
    carried = held.copy()
    carried["flags"], carried["tcp_state"], carried["idle_ms"] = FLAG_OFFLOAD, 0, 0
    carried["packets_out"], carried["packets_in"], carried["bytes_out"], carried["bytes_in"] = 7, 2, 700, 9
    assert subject.run(subject.plane.update(carried)) == len(states)
    expected = held.copy()
    expected["packets_out"], expected["packets_in"], expected["bytes_out"] = 12, (1 << 32) + 1, 700
    expected["bytes_in"] = (1 << 33) + 10
    expected["tcp_state"][1] = TCP_STATES.index("established")
    assert plain(subject.held()) == plain(expected)
    assert (subject.held()["idle_ms"] < 30_000).all()
    carried["idle_ms"] = 90_000
    subject.run(subject.plane.update(carried))
    assert (subject.held()["idle_ms"] < 30_000).all()
    assert len(subject.events()) == 0


def test_an_update_by_whoever_saw_fewer_packets_takes_nothing_back(subject: Subject) -> None:
    """Traffic moves, and who had it before tells of it once more."""
    held = sessions(
        6, flags=FLAG_FOREIGN, idle_ms=60_000, packets_out=7, packets_in=1 << 33, bytes_in=1 << 40
    )
    held["tcp_state"][held["protocol"] == 6] = TCP_STATES.index("established")
    subject.run(subject.plane.install(held))
    old = held.copy()
    old["packets_out"], old["packets_in"], old["bytes_in"], old["bytes_out"] = 6, 1, 2, 9
    old["tcp_state"][old["protocol"] == 6] = TCP_STATES.index("closing")
    old["idle_ms"] = 120_000
    assert subject.run(subject.plane.update(old)) == 6
    held["bytes_out"] = 9
    assert plain(subject.held()) == plain(held)
    assert (subject.held()["idle_ms"] < 90_000).all()


def test_a_session_that_both_hold_ages_by_its_last_packet(subject: Subject) -> None:
    """Two sides meet again: one carried it meanwhile, and the other, who owns it, has seen nothing."""
    held = sessions(2, idle_ms=120_000)
    subject.run(subject.plane.install(held))
    for idle, least in ((60_000, 60_000), (240_000, 60_000)):
        held["idle_ms"] = idle
        assert subject.run(subject.plane.install(held)) == 2
        assert (subject.held()["idle_ms"] >= least).all()
        assert (subject.held()["idle_ms"] < least + 30_000).all()


def test_update_leaves_out_what_is_not_held(subject: Subject) -> None:
    held = sessions(4)
    subject.run(subject.plane.install(held))
    others = strangers()
    others["packets_out"] = 99
    assert subject.run(subject.plane.update(others)) == 0
    assert plain(subject.held()) == plain(held)
    subject.check()


def test_delete_minds_the_identity(subject: Subject) -> None:
    held = sessions(5)
    subject.run(subject.plane.install(held))
    assert subject.run(subject.plane.delete(strangers())) == 0
    assert plain(subject.held()) == plain(held)
    subject.check()
    assert subject.run(subject.plane.delete(np.concatenate([strangers(), held[:2], held[:2]]))) == 2
    assert plain(subject.held()) == plain(held[2:])
    assert subject.run(subject.plane.delete(held)) == 3
    assert len(subject.held()) == 0
    subject.check()


def test_endpoints_are_free_after_their_last_session(subject: Subject) -> None:
    both = np.concatenate([session(1), session(2, **endpoints(1), protocol=6, remote_port=99)])
    other = session(1, **CONTRADICTIONS["its external endpoint has another inside port"])
    other["id"] += 50
    other["protocol"] = both["protocol"][0] = both["protocol"][1] = 6
    assert subject.run(subject.plane.install(both)) == 2
    assert subject.run(subject.plane.delete(both[:1])) == 1
    assert subject.run(subject.plane.install(other)) == 0
    assert subject.run(subject.plane.delete(both[1:])) == 1
    assert subject.run(subject.plane.install(other)) == 1
    subject.check()


# -- commit ------------------------------------------------------------------------------------------------


def test_commit_releases_the_packets_of_pending_sessions(subject: Subject) -> None:
    assert subject.plane.capabilities.holds_packets
    for port in (4000, 4001, 4002):
        subject.open(port)
    pending = subject.held()
    assert (pending["flags"] & FLAG_PENDING != 0).all()
    assert len(pending) == 3
    chosen = pending[pending["internal_port"] != 4001]
    stranger = chosen[:1].copy()
    stranger["id"] += 1000
    assert subject.left() == 0
    assert subject.run(subject.plane.commit(np.concatenate([chosen, stranger]))) == 2
    assert subject.left() == (2 if subject.carries else 0)
    now = subject.held()
    assert now["internal_port"][now["flags"] & FLAG_PENDING != 0].tolist() == [4001]
    subject.check()


def test_a_pending_session_can_be_deleted(subject: Subject) -> None:
    subject.open(4000)
    assert subject.run(subject.plane.delete(subject.held())) == 1
    assert len(subject.held()) == 0
    assert subject.left() == 0
    subject.check()


# -- ownership ---------------------------------------------------------------------------------------------


def test_adopt_takes_the_peers_sessions_and_restarts_all_timers(subject: Subject) -> None:
    theirs, ours = sessions(5, flags=FLAG_FOREIGN, idle_ms=60_000), sessions(3, 100, INSTANCE, idle_ms=60_000)
    subject.run(subject.plane.install(np.concatenate([theirs, ours])))
    assert subject.run(subject.plane.adopt()) == 5
    now = subject.held()
    assert not now["flags"].any()
    assert (now["idle_ms"] < 30_000).all(), "the peer may have carried ours as well"
    assert subject.run(subject.plane.adopt()) == 0
    assert len(subject.events()) == 0
    subject.check()


def test_cede_gives_the_peer_its_own_but_not_besides(subject: Subject) -> None:
    theirs, ours, anothers = sessions(6), sessions(3, 100, INSTANCE), sessions(2, 200, 3)
    subject.run(subject.plane.install(np.concatenate([theirs, ours, anothers])))
    besides = np.concatenate([theirs["id"][:2], ours["id"][:1], np.array([12345], np.uint64)])
    assert subject.run(subject.plane.cede(PEER, besides)) == 4
    now = subject.held()
    assert identities(now[now["flags"] & FLAG_FOREIGN != 0]) == identities(theirs[2:])
    assert subject.run(subject.plane.cede(PEER, besides)) == 0, "they are its own already"
    assert subject.run(subject.plane.cede(PEER, NO_IDS)) == 2
    assert subject.run(subject.plane.cede(9, NO_IDS)) == 0
    assert subject.run(subject.plane.adopt()) == 6
    assert len(subject.held()) == 11
    subject.check()


def test_what_the_peer_could_not_take_is_ours_whoever_had_it_before(subject: Subject) -> None:
    subject.run(subject.plane.install(sessions(4, flags=FLAG_FOREIGN)))
    assert subject.run(subject.plane.cede(PEER, sessions(4)["id"][:1])) == 0
    now = subject.held()
    assert identities(now[now["flags"] & FLAG_FOREIGN == 0]) == identities(session(1))


# -- sessions ----------------------------------------------------------------------------------------------


def test_all_sessions_come_in_pages(make: Make) -> None:
    subject = make(max_sessions=16384)
    most = subject.plane.capabilities.max_batch
    given = sessions(2 * most + 100)

    async def fill_and_read() -> list[Records]:
        for at in range(0, len(given), most):
            part = given[at : at + most]
            assert await subject.plane.install(part) == len(part)
        return [page async for page in subject.plane.sessions()]

    pages = subject.run(fill_and_read())
    assert len(pages) > 1
    assert plain(np.concatenate(pages)) == plain(given)
    subject.check()


def test_a_plane_without_sessions_has_no_records(subject: Subject) -> None:
    assert len(subject.held()) == 0


def test_what_is_there_all_the_time_is_in_the_pages_once(make: Make) -> None:
    subject = make(max_sessions=16384)
    most = subject.plane.capabilities.max_batch
    given = sessions(2 * most + 100)
    steady, leaving, coming = given[::2], given[1::2], sessions(500, first=20_000)

    async def read() -> list[int]:
        for at in range(0, len(given), most):
            await subject.plane.install(given[at : at + most])
        seen, turn = [], 0
        async for page in subject.plane.sessions():
            seen += page["id"].tolist()
            if not turn:
                await subject.plane.delete(leaving[-1000:])
                await subject.plane.install(coming)
            turn += 1
        assert turn > 1
        return seen

    seen = subject.run(read())
    assert len(seen) == len(set(seen))
    assert identities(steady) <= set(seen) <= identities(given) | identities(coming)


# -- what goes in and comes out ----------------------------------------------------------------------------


def test_every_call_takes_as_many_as_it_says_and_none_at_all(subject: Subject) -> None:
    plane = subject.plane
    given = sessions(plane.capabilities.max_batch)
    for call in (plane.install, plane.update, plane.commit, plane.delete):
        assert subject.run(call(given)) == len(given)
        assert subject.run(plane.holds(given)).all() == (call != plane.delete)
        assert subject.run(call(NO_RECORDS)) == 0
    assert len(subject.held()) == 0
    subject.check()


def test_arrays_are_neither_kept_nor_changed_nor_shared(subject: Subject) -> None:
    plane = subject.plane
    wide = np.repeat(sessions(4), 2)
    given = wide[::2]  # a view, with gaps
    before = given.copy()
    assert subject.run(plane.install(given)) == 4
    given["packets_out"], given["flags"] = 77, FLAG_FOREIGN
    assert plain(subject.held()) == plain(before)
    subject.held()["packets_out"][:] = 78
    assert plain(subject.held()) == plain(before)
    for call in (plane.install, plane.holds, plane.update, plane.commit, plane.delete):
        constant = before.copy()
        constant.flags.writeable = False
        subject.run(call(constant))
        assert (constant == before).all()


# -- events ------------------------------------------------------------------------------------------------


def test_what_packets_do_is_told_in_order(subject: Subject) -> None:
    subject.open(4000)
    subject.open(4001)
    subject.answer(4000)
    events = subject.events()
    assert events["type"].tolist() == [EVENT_OPEN, EVENT_OPEN, EVENT_UPDATE]
    assert (np.diff(events["sequence"].astype(np.int64)) > 0).all()
    opened, updated, closed, _ = changes(events)
    assert opened["internal_port"].tolist() == [4000, 4001]
    assert (opened["flags"] & FLAG_PENDING != 0).all()
    assert (opened["id"] >> np.uint64(52) & np.uint64(0xFF) == INSTANCE).all()
    assert updated["internal_port"].tolist() == [4000]
    assert TCP_STATES[int(updated["tcp_state"][0])] == "syn_both"
    assert len(closed) == 0
    assert identities(subject.held()) == identities(opened)
    assert len(subject.events()) == 0


def test_an_end_that_the_peer_ordered_is_not_told_back(subject: Subject) -> None:
    theirs, ours = sessions(3, flags=FLAG_FOREIGN), sessions(2, 100, INSTANCE)
    subject.run(subject.plane.install(np.concatenate([theirs, ours])))
    subject.run(subject.plane.delete(np.concatenate([theirs, ours])))
    events = subject.events()
    assert events["type"].tolist() == [EVENT_CLOSE] * 5
    assert events["reason"].tolist() == [CLOSED_BY_COMMAND] * 5
    opened, updated, closed, _ = changes(events)
    assert len(opened) == len(updated) == 0
    assert plain(closed) == plain(ours)


def test_after_adopt_the_end_of_the_peers_sessions_is_told(subject: Subject) -> None:
    theirs = sessions(3, flags=FLAG_FOREIGN)
    subject.run(subject.plane.install(theirs))
    subject.run(subject.plane.adopt())
    subject.run(subject.plane.delete(theirs))
    assert identities(told(subject).closed) == identities(theirs)


def test_more_ends_than_events_fit_in_the_ring(make: Make) -> None:
    """Whoever drives the plane takes events meanwhile."""
    subject = make(max_sessions=16384)
    plane = subject.plane
    most = plane.capabilities.max_batch
    given = sessions(10_000)
    seen: set[int] = set()

    async def take() -> None:
        while len(seen) < len(given):
            seen.update(told(subject).closed["id"].tolist())
            await asyncio.sleep(0.001)

    async def empty() -> int:
        for at in range(0, len(given), most):
            await plane.install(given[at : at + most])
        taking = asyncio.create_task(take())
        done = sum([await plane.delete(given[at : at + most]) for at in range(0, len(given), most)])
        await taking
        return done

    assert subject.run(empty()) == len(given)
    assert seen == identities(given)
    assert len(subject.held()) == 0


# -- overlapping calls -------------------------------------------------------------------------------------


def test_calls_on_different_sessions_may_overlap(subject: Subject) -> None:
    plane = subject.plane
    parts = [sessions(100, 1 + 100 * i) for i in range(12)]

    async def together() -> None:
        assert await asyncio.gather(*(plane.install(part) for part in parts)) == [100] * 12
        mixed = await asyncio.gather(
            *(plane.delete(part) for part in parts[:4]),
            *(plane.update(part) for part in parts[4:8]),
            *(plane.commit(part) for part in parts[8:]),
            *(plane.holds(part) for part in parts[8:]),
            read(),
        )
        assert mixed[:12] == [100] * 12
        assert all(mask.all() for mask in mixed[12:16])
        assert mixed[16] >= identities(np.concatenate(parts[4:]))

    async def read() -> set[int]:
        return {one async for page in plane.sessions() for one in page["id"].tolist()}

    subject.run(together())
    assert identities(subject.held()) == identities(np.concatenate(parts[4:]))
    subject.check()


def test_overlapping_installs_of_the_same_sessions_agree(subject: Subject) -> None:
    given = sessions(300)

    async def together() -> list[int]:
        return await asyncio.gather(*(subject.plane.install(given) for _ in range(5)))

    assert subject.run(together()) == [300] * 5
    assert plain(subject.held()) == plain(given)
    subject.check()


# -- next hops ---------------------------------------------------------------------------------------------


def hop(mac: int, age_ms: int, address: str = "10.0.0.99") -> np.ndarray:
    one = np.zeros(1, NEIGHBOUR)
    one["mac"], one["address"], one["confirmed_ms"] = mac, number(address), age_ms
    return one


def known(subject: Subject) -> dict[int, int]:
    return {int(one["address"]): int(one["mac"]) for one in subject.run(subject.plane.next_hops())}


def test_the_later_confirmation_of_a_next_hop_counts(subject: Subject) -> None:
    learn, at = subject.plane.learn, number("10.0.0.99")
    assert at not in known(subject)
    assert subject.run(learn(hop(0x02_00_00_00_00_AA, 20_000))) == 1
    assert known(subject)[at] == 0x02_00_00_00_00_AA
    assert subject.run(learn(hop(0x02_00_00_00_00_BB, 25_000))) == 0, "it is older"
    assert known(subject)[at] == 0x02_00_00_00_00_AA
    assert subject.run(learn(hop(0x02_00_00_00_00_AA, 10_000))) == 0, "later, and nothing new"
    assert subject.run(learn(hop(0x02_00_00_00_00_BB, 5_000))) == 1
    assert known(subject)[at] == 0x02_00_00_00_00_BB
    two = np.concatenate([hop(0x02_00_00_00_00_CC, 0, "10.0.0.98"), hop(0x02_00_00_00_00_CC, 0)])
    assert subject.run(learn(two)) == 2
    assert subject.run(learn(two[:0])) == 0
