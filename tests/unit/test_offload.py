# SPDX-License-Identifier: Apache-2.0
"""Who goes to the front and comes back: thresholds, hysteresis, the cap; and what is known of the front."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_control.dataplane import NO_IDS, NO_RECORDS, Ids, Records
from nat_control.offload import FrontView, Policy, may_move, why_not
from nat_control.pair_config import Offloading
from nat_control.sync.codec import CARRIED, Carried
from nat_fastpath.engine import FLAG_PENDING, RECORD, TCP_STATES

ESTABLISHED = TCP_STATES.index("established")
WANTED = Offloading(100, 50, age_seconds=10, interval_seconds=5, max=4)


def sessions(n: int, protocol: int = 17, **fields: object) -> Records:
    made = np.zeros(n, RECORD)
    made["id"], made["protocol"], made["age_ms"] = np.arange(1, n + 1), protocol, 60_000
    for name, value in fields.items():
        made[name] = value
    return made


def carried(ids: Ids, packets: object) -> Carried:
    made = np.zeros(len(ids), CARRIED)
    made["id"], made["packets"] = ids, packets
    return made


class World:
    """A server and its switch: sessions with rates, counters that grow, reports each 2 s, looks each 5 s."""

    def __init__(self, rates: np.ndarray, wanted: Offloading = WANTED, room: int = 100) -> None:  # type: ignore[type-arg]
        self.wanted, self.room = wanted, room
        self.policy, self.view = Policy(wanted), FrontView()
        self.rates = rates.astype(np.float64)
        self.sessions = sessions(len(rates))
        self.carry = np.zeros(len(rates))  # packets, not rounded
        self.since = np.zeros(len(rates))  # carried by the switch since the last report
        self.now, self.moves = 0.0, np.zeros((2, len(rates)), int)
        self.pinned: Ids = NO_IDS
        self.view.seen(0, room, carried(NO_IDS, 0), 0.0, wanted.keep_packets_per_second)

    @property
    def front(self) -> np.ndarray:  # type: ignore[type-arg]
        return np.isin(self.sessions["id"], self.view.ids)

    def second(self) -> None:
        self.now += 1
        self.carry += self.rates
        self.since += np.where(self.front, self.rates, 0)
        self.sessions["idle_ms"] = np.where(self.rates > 0, 0, self.sessions["idle_ms"] + 1000)
        self.sessions["packets_out"] = self.carry
        if self.now % 2 == 0:
            ids = self.view.ids
            counted = np.round(self.since[self.front])
            room = self.room - len(ids)
            self.view.seen(2000, room, carried(ids, counted), self.now, self.wanted.keep_packets_per_second)
            self.since[:] = 0
        if self.now % self.wanted.interval_seconds == 0:
            for page in np.array_split(self.sessions, 3):
                self.policy.look(page, self.now)
            choice = self.policy.choose(self.view, self.pinned, self.now)
            self.move(choice.there, True)
            self.move(choice.back, False)

    def move(self, ids: Ids, front: bool) -> None:
        if not len(ids):
            return
        at = ids.astype(int) - 1
        self.moves[int(front), at] += 1
        there = ids[: max(self.room - len(self.view.ids), 0)] if front else NO_IDS
        txid = self.view.ask(ids, front)
        room = self.room - len(self.view.ids) + (-len(there) if front else len(ids))
        refused = self.view.moved(txid, room, there, self.now)
        self.policy.rest(refused, self.now + 60)
        self.since[at] = 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(0, 3),
)
def test_steady_rates_never_flap_and_never_exceed(rates: list[int], most: int, room: int, pins: int) -> None:
    wanted = Offloading(100, 50, age_seconds=10, interval_seconds=5, max=most)
    world = World(np.array(rates), wanted, room)
    world.pinned = world.sessions["id"][:pins].copy()
    for _ in range(240):
        world.second()
        assert len(world.view.ids) <= min(most, room)
    assert (world.moves <= 1).all(), world.moves
    heavy = np.array(rates) >= 100
    heavy[:pins] = False
    wanted_there = min(int(heavy.sum()), most, room)
    assert world.front.sum() == wanted_there
    # a place is never left to one that carries less than half as much as one without
    if 0 < wanted_there < heavy.sum():
        assert world.rates[world.front].min() * 2 >= world.rates[heavy & ~world.front].max()
    before = world.moves.copy()
    for _ in range(60):
        world.second()
    assert (world.moves == before).all(), "at rest nothing moves"
    world.rates[:] = 0
    for _ in range(60):
        world.second()
    assert not world.front.any(), "everything is moved back in the end"


def test_between_the_thresholds_it_stays_where_it_is() -> None:
    world = World(np.array([70, 150]))
    for _ in range(60):
        world.second()
    assert world.view.ids.tolist() == [2]
    world.rates[1] = 70
    for _ in range(60):
        world.second()
    assert world.view.ids.tolist() == [2]
    world.rates[:] = 40
    for _ in range(30):
        world.second()
    assert world.view.ids.tolist() == []
    assert world.moves.tolist() == [[0, 1], [0, 1]]


def test_a_young_session_waits_and_a_busier_one_takes_its_place() -> None:
    world = World(np.array([200, 200, 200, 200, 300]))
    world.sessions["age_ms"] = [60_000] * 4 + [0]
    for _ in range(15):
        world.second()
    assert world.view.ids.tolist() == [1, 2, 3, 4]
    world.sessions["age_ms"] = 60_000
    for _ in range(20):
        world.second()
    assert world.view.ids.tolist() == [1, 2, 3, 4], "half as much again is no reason"
    world.rates[4] = 500
    for _ in range(20):
        world.second()
    assert 5 in world.view.ids
    assert len(world.view.ids) == 4


def test_pinned_sessions_are_left_alone() -> None:
    world = World(np.array([0, 150]))
    world.pinned = world.sessions["id"][:1]
    world.move(world.pinned, True)
    for _ in range(60):
        world.second()
    assert world.view.ids.tolist() == [1, 2]


def test_a_reset_connection_comes_back() -> None:
    """The next segment shows whether the reset was forged, and only the server's core can see it."""
    world = World(np.array([500]))
    world.sessions["protocol"], world.sessions["tcp_state"] = 6, ESTABLISHED
    for _ in range(15):
        world.second()
    assert world.front.all()
    world.sessions["tcp_state"] = TCP_STATES.index("reset")
    for _ in range(10):
        world.second()
    assert not world.front.any()


def test_a_smaller_max_takes_the_lightest_back() -> None:
    world = World(np.array([200, 250, 300, 350]))
    for _ in range(15):
        world.second()
    world.policy.wanted = world.wanted = Offloading(100, 50, max=2)
    for _ in range(10):
        world.second()
    assert world.view.ids.tolist() == [3, 4]


def test_who_may_move() -> None:
    udp, icmp = sessions(1), sessions(1, 1)
    tcp = sessions(len(TCP_STATES), 6, tcp_state=np.arange(len(TCP_STATES)))
    assert may_move(udp).all()
    assert not may_move(icmp).any()
    assert np.flatnonzero(may_move(tcp)).tolist() == [ESTABLISHED]
    assert not may_move(sessions(1, flags=FLAG_PENDING)).any()
    assert why_not(tcp[1]) == "its TCP connection is not established (syn_out)"
    assert why_not(icmp[0]) == "a switch cannot translate ICMP"
    assert may_move(NO_RECORDS).shape == (0,)


def ids(*numbers: int) -> Ids:
    return np.array(numbers, np.uint64)


def test_the_front_is_what_answers_and_reports_say() -> None:
    view = FrontView()
    first = view.ask(ids(5, 1, 3), True)
    assert view.asked == 1
    assert view.moved(first, 7, ids(3, 5), 1.0).tolist() == [1]
    assert (view.ids.tolist(), view.room, view.asked) == ([3, 5], 7, 0)
    assert view.moved(view.ask(ids(5, 9), False), 8, NO_IDS, 2.0).tolist() == []
    assert view.ids.tolist() == [3]
    assert view.moved(view.ask(ids(3), False), 8, ids(3), 2.0).tolist() == [3], "it stays there"
    view.seen(2000, 6, carried(ids(8, 3), [10, 500]), 5.0, 100)
    assert view.ids.tolist() == [3, 8]
    assert view.fronts["rate"].tolist() == [250.0, np.inf], "who has just come is not judged"
    view.seen(2000, 6, carried(ids(8), 10), 9.0, 100)
    assert (view.ids.tolist(), view.fronts["rate"].tolist(), view.fronts["light"].tolist()) == (
        [8],
        [5.0],
        [1],
    )


def test_an_end_overtakes_its_answer() -> None:
    view = FrontView()
    txid = view.ask(ids(1, 2), True)
    view.ended(ids(2))
    assert view.moved(txid, 0, ids(1, 2), 1.0).tolist() == []
    assert view.ids.tolist() == [1]
    view.ended(ids(1))
    assert view.ids.tolist() == []


def test_a_lost_peer_carries_nothing_and_answers_nothing() -> None:
    view = FrontView()
    view.moved(view.ask(ids(1), True), 3, ids(1), 1.0)
    txid = view.ask(ids(2), True)
    view.lost()
    assert (view.ids.tolist(), view.room, view.asked) == ([], 0, 0)
    view.moved(txid, 3, ids(2), 2.0)
    assert view.ids.tolist() == []
