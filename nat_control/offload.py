# SPDX-License-Identifier: Apache-2.0
"""Which sessions a switch shall carry in front of the server: what it carries as its reports say, and who shall come and go.

No clock, no sockets: ``now`` is an argument, in seconds. All is done for arrays of sessions at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nat_control.dataplane import NO_IDS, Ids, Mask, Records
from nat_control.pair_config import Offloading
from nat_control.sync.codec import MAX_FRONT, Carried
from nat_fastpath.engine import FLAG_PENDING, TCP_STATES

MOST_AT_ONCE = 2000  # sessions that one look moves there
SETTLE = 1.0  # seconds that a switch's counters may be behind what it carries
LIGHT = 2  # reports in a row, so that one that was cut short recalls nobody
BUSIER = 2  # a session takes the place of one that carries less than half as much
REFUSED = 60.0  # seconds until one that the switch had no place for is tried again
TCP, UDP = 6, 17
ESTABLISHED, RESET = TCP_STATES.index("established"), TCP_STATES.index("reset")

Floats = np.ndarray[Any, np.dtype[np.float64]]
FRONT = np.dtype([("id", "<u8"), ("since", "<f8"), ("rate", "<f8"), ("light", "<u4")])
Fronts = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), ascending ids
NO_FRONT: Fronts = np.zeros(0, FRONT)
SEEN = np.dtype([("id", "<u8"), ("packets", "<u8"), ("when", "<f8"), ("old", "?")])


def packets_of(records: Records) -> Ids:
    return np.asarray(records["packets_out"] + records["packets_in"], np.uint64)


def may_move(records: Records) -> Mask:
    """Sessions that a switch can carry as the server would: UDP, and TCP between its handshake and its end."""
    tcp = (records["protocol"] == TCP) & (records["tcp_state"] == ESTABLISHED)
    return np.asarray(((records["protocol"] == UDP) | tcp) & (records["flags"] & FLAG_PENDING == 0))


def why_not(record: np.void) -> str:
    """Why ``may_move`` says no, for people."""
    if record["protocol"] == TCP:
        return f"its TCP connection is not established ({TCP_STATES[int(record['tcp_state'])]})"
    if record["protocol"] == UDP:
        return "its first packet still waits for the peer"
    return "a switch cannot translate ICMP"


def _where(ids: Ids, wanted: Ids) -> tuple[Any, Mask]:
    """For each of ``wanted`` its place in the ascending ``ids``, and whether it is there."""
    if not len(ids):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return at, np.asarray(ids[at] == wanted)


class FrontView:
    """What the peer carries in front of us, as far as we know. ``room``: for so many more."""

    def __init__(self) -> None:
        self.fronts = NO_FRONT
        self.room = 0
        self._asked: dict[int, tuple[Ids, bool]] = {}
        self._txid = 0

    @property
    def ids(self) -> Ids:
        """Ascending."""
        return np.asarray(self.fronts["id"])

    @property
    def asked(self) -> int:
        """Moves that are not answered."""
        return len(self._asked)

    def ask(self, ids: Ids, front: bool) -> int:
        """A move is asked for; returns its number."""
        self._txid += 1
        self._asked[self._txid] = np.unique(ids), front
        return self._txid

    def moved(self, txid: int, room: int, ids: Ids, now: float) -> Ids:
        """The answer; returns those that did not move, ascending."""
        asked, front = self._asked.pop(txid, (NO_IDS, False))
        there = asked[np.isin(asked, ids)]
        stays = self.fronts[~np.isin(self.ids, asked) | np.isin(self.ids, there)]
        new = there[~np.isin(there, stays["id"])]
        self._put(stays, new, now)
        self.room = room
        return np.asarray(there if not front else asked[~np.isin(asked, there)])

    def seen(self, ms: int, room: int, carried: Carried, now: float, keep: float) -> None:
        """A report: all that is in front, and no more. ``keep``: packets per second below which a session is light."""
        carried = np.sort(carried, order="id")
        at, known = _where(carried["id"], self.ids)
        fronts, packets = self.fronts[known], carried["packets"][at[known]]
        # who came within this time, or just before, has not been counted for all of it
        whole = (fronts["since"] + ms / 1000 + SETTLE <= now) if ms else np.zeros(len(fronts), np.bool_)
        rate = packets / max(ms / 1000, 1e-3)
        fronts["rate"] = np.where(whole, rate, fronts["rate"])
        fronts["light"] = np.where(whole, np.where(rate < keep, fronts["light"] + 1, 0), fronts["light"])
        self._put(fronts, carried["id"][~np.isin(carried["id"], fronts["id"])], now)
        self.room = room

    def ended(self, ids: Ids) -> None:
        """These sessions are no more."""
        if not len(ids):
            return
        self.fronts = self.fronts[~np.isin(self.ids, ids)]
        for txid, (asked, front) in self._asked.items():
            if (
                front
            ):  # one that comes back may have been reported since, before the peer has heard of its end
                self._asked[txid] = asked[~np.isin(asked, ids)], front

    def lost(self) -> None:
        """The peer is lost: nothing is in front of us, and no answer comes any more."""
        self.fronts, self.room = NO_FRONT, 0
        self._asked.clear()

    def _put(self, stays: Fronts, new: Ids, now: float) -> None:
        added = np.zeros(len(new), FRONT)
        added["id"], added["since"], added["rate"] = (
            new,
            now,
            np.inf,
        )  # not known yet, so nobody's place is taken
        self.fronts = np.sort(np.concatenate([stays, added]), order="id")


class Choice(NamedTuple):
    """Who shall go to the front, and who shall come back; ids."""

    there: Ids
    back: Ids


class Policy:
    """One look: ``look`` at every page of sessions, then ``choose``. Both directions have their own threshold, so a session of a
    steady rate moves once at most."""

    def __init__(self, wanted: Offloading) -> None:
        self.wanted = wanted
        self._pages: list[Any] = []  # dtype SEEN
        self._before = np.zeros(0, SEEN)
        self._reset = [NO_IDS]
        self._resting = np.zeros(0, [("id", "<u8"), ("until", "<f8")])

    def look(self, page: Records, now: float) -> None:
        """Notes who may be heavy: few of many, so that what is kept and compared stays small."""
        wanted, packets = self.wanted, packets_of(page)
        heavy = packets >= wanted.packets_per_second * wanted.interval_seconds
        heavy &= page["idle_ms"] < 2000 * wanted.interval_seconds
        found = page[heavy]
        self._reset.append(found["id"][(found["protocol"] == TCP) & (found["tcp_state"] == RESET)])
        chosen = may_move(found)
        noted = np.zeros(int(chosen.sum()), SEEN)
        noted["id"], noted["packets"] = found["id"][chosen], packets[heavy][chosen]
        noted["when"], noted["old"] = now, found["age_ms"][chosen] >= wanted.age_seconds * 1000
        self._pages.append(noted)

    def choose(self, view: FrontView, pinned: Ids, now: float) -> Choice:
        """``pinned``: moved by hand, and for the policy to leave where they are."""
        wanted, (ids, rate) = self.wanted, self._rates()
        reset = np.concatenate(self._reset)
        self._pages, self._reset = [], [NO_IDS]
        self._resting = self._resting[self._resting["until"] > now]
        fronts = view.fronts[~np.isin(view.ids, pinned)]
        back = fronts["id"][(fronts["light"] >= LIGHT) | np.isin(fronts["id"], reset)]
        new = (rate >= wanted.packets_per_second) & ~np.isin(ids, view.ids)
        new &= ~np.isin(ids, self._resting["id"]) & ~np.isin(ids, pinned)
        ids, rate = ids[new], rate[new]
        order = np.argsort(-rate, kind="stable")
        ids, rate = ids[order], rate[order]
        room = max(0, min(view.room, min(wanted.max, MAX_FRONT) - len(view.ids)))
        over = len(view.ids) - len(back) - wanted.max
        free = fronts[~np.isin(fronts["id"], back)]
        free = free[np.argsort(free["rate"], kind="stable")]
        # the lightest make room: who is over the limit, and whose place a much heavier one would take
        contenders = rate[room : room + MOST_AT_ONCE]
        n = min(len(contenders), len(free))
        swap = int((contenders[:n] > BUSIER * free["rate"][:n]).sum())
        gone = free["id"][: max(swap, over, 0)]
        back = np.concatenate([back, gone])
        self.rest(back, now + 3 * wanted.interval_seconds)
        return Choice(ids[: min(room, MOST_AT_ONCE)], back)

    def rest(self, ids: Ids, until: float) -> None:
        """These are not moved there before: late counts of the switch would make them look heavy, or it has no place."""
        resting = np.zeros(len(ids), self._resting.dtype)
        resting["id"], resting["until"] = ids, until
        self._resting = np.concatenate([self._resting[~np.isin(self._resting["id"], ids)], resting])

    def _rates(self) -> tuple[Ids, Floats]:
        """Packets per second since the look before, of sessions that are old enough."""
        seen = np.sort(np.concatenate([np.zeros(0, SEEN), *self._pages]), order="id")
        before, self._before = self._before, seen
        at, known = _where(before["id"], seen["id"])
        known &= seen["old"]
        seen, before = seen[known], before[at[known]]
        seconds = np.maximum(seen["when"] - before["when"], 1e-3)
        packets = np.where(seen["packets"] > before["packets"], seen["packets"] - before["packets"], 0)
        return np.asarray(seen["id"]), np.asarray(packets / seconds)
