# SPDX-License-Identifier: Apache-2.0
"""Which of two servers carries: the table of decisions, and two of them together through splits, stops and deaths."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from nat_control.standby import (
    AGAIN,
    LAST,
    LATE,
    MERGE,
    MERGE_LAST,
    MERGE_NEW,
    NOBODY,
    SETTLED,
    START,
    STEADY,
    View,
    at_death,
    decide,
)
from nat_fastpath.role import RoleState

ACTIVE, STANDBY, PROBING = RoleState
NOW = 1000.0
US = View(state=STANDBY, term=3, primary=True, carries=True, peer_term=3, quiet=NOW)

TABLE: dict[str, tuple[dict[str, object], RoleState | None]] = {
    # alone
    "who carries goes on without a peer": ({"state": ACTIVE, "alive": False, "lost": NOW}, None),
    "a lost peer is looked for on the ports": ({"alive": False, "lost": NOW}, PROBING),
    "but not at once again": ({"alive": False, "lost": NOW, "quiet": AGAIN / 2}, None),
    "nor when it was heard just now": ({"alive": False, "lost": AGAIN / 2}, None),
    "on_split both does not look": ({"alive": False, "both": True, "quiet": 0.0}, ACTIVE),
    "a start looks, too, with both": (
        {"alive": False, "both": True, "seen": False, "stepped": False, "lost": START[True]},
        PROBING,
    ),
    "so does with both who was never in step": (
        {"alive": False, "both": True, "stepped": False, "lost": AGAIN},
        PROBING,
    ),
    "and not before its time": ({"alive": False, "both": True, "stepped": False, "lost": 0.0}, None),
    "a start waits for the peer": ({"alive": False, "seen": False, "lost": START[True] - 0.1}, None),
    "the secondary for longer": (
        {"alive": False, "seen": False, "primary": False, "lost": START[False] - 0.1},
        None,
    ),
    "and then looks": ({"alive": False, "seen": False, "primary": False, "lost": START[False]}, PROBING),
    "who asks already does not begin anew": ({"state": PROBING, "alive": False, "lost": NOW}, None),
    # two carry
    "the later takeover stays": ({"state": ACTIVE, "term": 4}, None),
    "the earlier one stands down": ({"state": ACTIVE, "term": 2}, STANDBY),
    "in doubt the primary stays": ({"state": ACTIVE}, None),
    "and the secondary stands down": ({"state": ACTIVE, "primary": False}, STANDBY),
    "not before both are in step": (
        {"state": ACTIVE, "term": 2, "synced": False, "quiet": MERGE_LAST - 0.1},
        None,
    ),
    "unless that does not come about": (
        {"state": ACTIVE, "term": 2, "synced": False, "quiet": MERGE_LAST},
        STANDBY,
    ),
    "nor who has only just started": (
        {"state": ACTIVE, "term": 2, "synced": False, "stepped": False, "quiet": MERGE - 0.1},
        None,
    ),
    "but that one is the first": (
        {"state": ACTIVE, "term": 2, "synced": False, "stepped": False, "quiet": MERGE},
        STANDBY,
    ),
    "even with the later takeover": (
        {"state": ACTIVE, "term": 4, "synced": False, "stepped": False, "quiet": MERGE_NEW},
        STANDBY,
    ),
    "which may still get in step": (
        {"state": ACTIVE, "term": 4, "synced": False, "stepped": False, "quiet": MERGE_NEW - 0.1},
        None,
    ),
    # the other one carries
    "nothing moves by itself": ({}, None),
    "return automatic": ({"automatic": True}, ACTIVE),
    "is the primary's": ({"automatic": True, "primary": False}, None),
    "waits until it is steady": ({"automatic": True, "quiet": STEADY / 2}, None),
    "until both are in step": ({"automatic": True, "synced": False}, None),
    "and equal": ({"automatic": True, "equal": False}, None),
    "and all links are there": ({"automatic": True, "fit": False}, None),
    "a peer without a link": ({"peer_fit": False, "primary": False}, ACTIVE),
    "whose link may be back": ({"peer_fit": False, "quiet": SETTLED / 2}, None),
    "and we have none either": ({"peer_fit": False, "fit": False}, None),
    "and we lack its sessions": ({"peer_fit": False, "synced": False}, None),
    # nobody carries
    "the primary does": ({"carries": False, "quiet": SETTLED}, ACTIVE),
    "after a moment": ({"carries": False, "quiet": SETTLED / 2}, None),
    "when in step": ({"carries": False, "synced": False, "quiet": LATE - 0.1}, None),
    "or when that takes too long": ({"carries": False, "synced": False, "quiet": LATE}, ACTIVE),
    "the secondary lets it": ({"carries": False, "primary": False, "quiet": LAST - 0.1}, None),
    "but not for ever": ({"carries": False, "primary": False, "quiet": LAST}, ACTIVE),
    "nor when the primary has no link": (
        {"carries": False, "primary": False, "peer_fit": False, "quiet": SETTLED},
        ACTIVE,
    ),
    "and whatever toggles, not for ever": (
        {"carries": False, "fit": False, "quiet": 0.0, "uncarried": NOBODY[True]},
        PROBING,
    ),
    "nor the secondary": (
        {"carries": False, "primary": False, "quiet": 0.0, "uncarried": NOBODY[False]},
        PROBING,
    ),
    "which lets the primary be first": (
        {"carries": False, "primary": False, "quiet": 0.0, "uncarried": NOBODY[False] - 0.1},
        None,
    ),
    "and without a peer, too": ({"alive": False, "quiet": 0.0, "uncarried": NOBODY[True]}, PROBING),
    "to whom a link is missing waits": ({"carries": False, "fit": False, "quiet": LAST - 0.1}, None),
}


@pytest.mark.parametrize("case", TABLE)
def test_decision(case: str) -> None:
    changes, wanted = TABLE[case]
    found, why = decide(replace(US, **changes))  # type: ignore[arg-type]
    assert (found, bool(why)) == (wanted, wanted is not None)


def test_what_a_death_does_at_once() -> None:
    assert at_death(US) is PROBING
    assert at_death(replace(US, both=True)) is ACTIVE
    assert at_death(replace(US, both=True, synced=False)) is PROBING, "it would carry without the sessions"


# -- two of them -------------------------------------------------------------------------------------------

STEP = 0.01
PROBE = 0.005
SYNC = 0.4  # seconds until both are in step again


@dataclass
class Server:
    primary: bool
    both: bool
    automatic: bool
    state: RoleState = STANDBY
    term: int = 0
    up: bool = True
    running: bool = True  # not stopped
    fit: bool = True
    since: float = 0.0
    told: tuple[object, ...] = ()
    began: float = 0.0
    heard: float = 0.0
    seen: bool = False
    stepped: bool = False
    probing_until: float = 0.0
    was_alive: bool = False


@dataclass
class World:
    """Both, their networks, and time; what the C code does is done here in a few lines."""

    servers: list[Server]
    now: float = 0.0
    sync: bool = True
    data: bool = True  # each hears the other's ARP
    joined: float = 0.0  # since when both hear each other
    history: list[str] = field(default_factory=list)

    def alive(self, i: int) -> bool:
        other = self.servers[1 - i]
        return self.sync and other.up and other.running

    def view(self, i: int) -> View:
        us, other = self.servers[i], self.servers[1 - i]
        alive = self.alive(i)
        synced = alive and self.alive(1 - i) and self.now - self.joined > SYNC
        if alive:
            us.seen, us.heard = True, self.now
        us.stepped |= synced
        told = (us.state, us.fit, alive, alive and (other.state, other.fit, other.term), synced)
        if told != us.told:
            us.told, us.since = told, self.now
        return View(
            state=us.state, term=us.term, primary=us.primary, both=us.both, automatic=us.automatic, fit=us.fit,
            seen=us.seen, alive=alive, lost=self.now - us.heard, carries=other.state is ACTIVE,
            peer_fit=other.fit, peer_term=other.term, synced=synced, stepped=us.stepped,
            quiet=self.now - us.since,
        )  # fmt: skip

    def become(self, i: int, state: RoleState) -> None:
        us = self.servers[i]
        if state is ACTIVE:
            us.term = max(us.term, self.servers[1 - i].term if self.sync else 0) + 1
        us.state, us.since, us.probing_until = state, self.now, self.now + PROBE

    def step(self) -> None:
        self.now += STEP
        if not (self.alive(0) and self.alive(1)):
            self.joined = self.now
        for i, us in enumerate(self.servers):
            other = self.servers[1 - i]
            if not (us.up and us.running):
                continue
            view = self.view(i)
            if us.was_alive and not view.alive and us.state is STANDBY:
                us.term = max(us.term, other.term) + 1
                us.state = at_death(replace(view, synced=us.stepped))
                us.probing_until = self.now + PROBE
            us.was_alive = view.alive
            if us.state is PROBING:
                if self.data and other.up and other.running and other.state is ACTIVE:
                    us.state = STANDBY
                elif self.now >= us.probing_until:
                    us.state = ACTIVE
                continue
            wanted, _ = decide(self.view(i))
            if wanted is not None:
                self.become(i, wanted)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.step()

    @property
    def active(self) -> list[int]:
        return [i for i, s in enumerate(self.servers) if s.state is ACTIVE and s.up and s.running]


def world(*, both: bool = False, automatic: bool = False) -> World:
    found = World([Server(primary, both, automatic) for primary in (True, False)])
    found.run(1)
    assert found.active == [0], "both come up: the primary carries"
    return found


def wake(w: World, i: int) -> None:
    """It has stood still: it asks on the ports before it sends (the fence in the core)."""
    us = w.servers[i]
    us.running = True
    if us.state is ACTIVE:
        us.state, us.probing_until = PROBING, w.now + PROBE


@pytest.mark.parametrize("both", [False, True])
def test_a_death_and_a_return(both: bool) -> None:
    w = world(both=both)
    w.servers[0].up = False
    w.run(0.05)
    assert w.active == [1]
    w.servers[0] = Server(True, both, False, began=w.now, heard=w.now)
    w.run(20)
    assert w.active == [1]


def test_who_lacks_the_sessions_believes_the_answer() -> None:
    """Started anew beside the one that carries, and a beat is lost before both are in step."""
    w = world(both=True)
    w.servers[1] = Server(False, True, False, began=w.now, heard=w.now)
    w.joined = w.now
    w.run(SYNC / 2)
    assert not w.servers[1].stepped
    w.sync = False
    for _ in range(500):
        w.step()
        assert w.active == [0]


@pytest.mark.parametrize("new", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("later", [0, 1])
def test_two_that_carry_and_never_get_in_step(new: tuple[int, ...], later: int) -> None:
    w = world(both=True)
    for i, us in enumerate(w.servers):
        us.state, us.stepped, us.term = ACTIVE, i not in new, 7 + (i == later)
    for _ in range(1500):
        w.joined = w.now  # so not even for a moment
        w.step()
        assert w.active, "one of them goes on"
    assert w.active == [1 - new[0] if len(new) == 1 else later]


def test_the_primary_takes_it_back() -> None:
    w = world(automatic=True)
    w.servers[0].up = False
    w.run(1)
    w.servers[0] = Server(True, False, True, began=w.now, heard=w.now)
    w.run(20)
    assert w.active == [0]


def test_sync_network_cut_alone() -> None:
    w = world()
    w.sync = False
    for _ in range(2000):
        w.step()
        assert w.active == [0]
    w.sync = True
    w.run(2)
    assert w.active == [0]


def test_everything_cut_and_joined() -> None:
    """What no rule fences: both carry. The later takeover stays."""
    w = world()
    w.sync = w.data = False
    w.run(3)
    assert w.active == [0, 1]
    w.sync = w.data = True
    w.run(3)
    assert w.active == [1]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_ends_with_one(seed: int, both: bool) -> None:
    """While the ports hear each other no two carry but with ``both``, and what is whole again has exactly one."""
    rng = random.Random(f"{seed} {both}")
    w = world(both=both, automatic=rng.random() < 0.3)
    for _ in range(12):
        what, i = rng.choice(("kill", "stop", "sync", "link", "quiet")), rng.randrange(2)
        us = w.servers[i]
        if what == "kill":
            us.up = not us.up
            if us.up:
                w.servers[i] = Server(us.primary, us.both, us.automatic, began=w.now, heard=w.now)
        elif what == "stop" and us.up:
            wake(w, i) if not us.running else setattr(us, "running", False)
        elif what == "sync":
            w.sync = not w.sync
        elif what == "link":
            us.fit = not us.fit
        for _ in range(rng.choice((1, 5, 50, 800))):
            before = w.active
            w.step()
            if len(w.active) == 2 and not both and len(before) < 2:
                # the one moment that is left: a move on purpose, of which the other hears a step later
                assert w.sync, (seed, what, w.now)
    w.sync = True
    for i, us in enumerate(w.servers):
        us.fit = True
        if not us.up:
            w.servers[i] = Server(us.primary, us.both, us.automatic, began=w.now, heard=w.now)
        elif not us.running:
            wake(w, i)
    w.run(20)
    assert len(w.active) == 1, seed
