# SPDX-License-Identifier: Apache-2.0
"""What can hold sessions: the server's fast path, an OpenFlow switch, the reference in memory.

The control side is written once against this interface. Sessions travel as arrays of
``nat_fastpath.engine.RECORD``, events as arrays of EVENT; whoever drives a plane delivers its events, in order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from nat_fastpath.engine import EVENT_CLOSE, EVENT_OPEN, EVENT_UPDATE, FLAG_FOREIGN, NEIGHBOUR, RECORD
from nat_fastpath.tables import chosen

Records = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), dtype RECORD
NextHops = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), dtype NEIGHBOUR
Events = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), dtype EVENT
Ids = np.ndarray[Any, np.dtype[np.uint64]]  # shape (n,), RECORD["id"]
Mask = np.ndarray[Any, np.dtype[np.bool_]]  # shape (n,)

NO_RECORDS: Records = np.empty(0, RECORD)
NO_RECORDS.flags.writeable = False
NO_NEXT_HOPS: NextHops = np.empty(0, NEIGHBOUR)
NO_NEXT_HOPS.flags.writeable = False
NO_IDS: Ids = np.empty(0, np.uint64)
NO_IDS.flags.writeable = False

CLOSED_BY_TIMER, CLOSED_BY_COMMAND = 1, 2  # enum nat_close_reason


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Limits as data. ``max_sessions`` it can hold, ``max_batch`` records it takes in one call.

    ``holds_packets``: it keeps the packets of a pending session until ``commit`` (synchronous mode).
    """

    name: str
    max_sessions: int
    holds_packets: bool
    max_batch: int


class DataPlane(Protocol):
    """Every call takes shape (n,) RECORD arrays, n <= ``capabilities.max_batch``, and keeps none of them.

    Calls may overlap only where the caller does not mind in which order they take effect.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    async def install(self, records: Records) -> int:
        """Returns when the plane really holds them (a switch: after the barrier), and how many it holds.

        A session that is held already (see ``holds``) counts, and takes the record's ownership (FLAG_FOREIGN); its timer
        goes by the later packet, ours or the record's.
        One that contradicts a held session is refused: its external endpoint has another inside one, or its 5-tuple is
        taken under another id, which ends for a record with FLAG_PREVAILS. So is one for which there is no room. Where its
        inside endpoint has another external one both are held; new sessions use the one that was first, or that of a
        record with FLAG_PREVAILS.
        """

    async def holds(self, records: Records) -> Mask:
        """Which of them are held under this 5-tuple, external endpoint and id; asked after an install fell short."""

    async def update(self, records: Records) -> int:
        """What the peer knows of sessions that are held; others are left out. Returns how many are. Counters never go back;
        TCP state and times are taken unless we have seen a later packet.

        With FLAG_OFFLOAD a record says what a switch has carried beside all that the plane knows: its counters are added, its
        idle time counts if it is the shorter one, and no more than a handshake's last ACK is concluded from it.
        """

    async def delete(self, records: Records) -> int:
        """Ends those of these sessions that are held; returns how many there were. Each end is an event, for
        which the driver may have to make room before this returns."""

    async def commit(self, records: Records) -> int:
        """Releases held packets of these pending sessions; returns how many there were. May begin before it is awaited."""

    async def adopt(self) -> int:
        """The peer is lost: its sessions become ours. All timers restart in full, ours too, since the peer may have carried
        them and told no more. Returns how many became ours."""

    async def cede(self, instance: int, besides: Ids) -> int:
        """The peer is back: sessions with its instance number in their id are its own again; those of the ids
        ``besides``, which it could not take, are ours. Returns how many became the peer's."""

    async def next_hops(self) -> NextHops:
        """Those with an address whose MAC is known."""

    async def learn(self, next_hops: NextHops) -> int:
        """What the peer knows: the later confirmation of a MAC counts. Returns how many were news."""

    def sessions(self) -> AsyncIterator[Records]:
        """All sessions in pages; those that open or close meanwhile may be in it or not."""


class Front(Protocol):
    """A switch that can carry sessions in front of a server that lives."""

    async def move(self, ids: Ids, front: bool) -> tuple[Ids, int]:
        """Puts sessions in front, or back behind. Returns those of them that are in front now, and for how many more
        there is room. A session that is not held, or has no room, stays where it is."""


class Changes(NamedTuple):
    """What a step of a plane did to its sessions, to be told to the peer. ``aged``: those of ``closed`` that had no packets."""

    opened: Records = NO_RECORDS
    updated: Records = NO_RECORDS
    closed: Records = NO_RECORDS
    aged: Ids = NO_IDS


def changes(events: Events) -> Changes:
    """Sorts events by kind. Closes that the peer itself has ordered are left out."""
    if not len(events):
        return Changes()
    kind = events["type"]
    if kind.tobytes().count(EVENT_OPEN) == len(events):  # most often, and the first packets of new flows wait
        return Changes(opened=sessions_of(events))
    ended = kind == EVENT_CLOSE
    ordered = (events["reason"] == CLOSED_BY_COMMAND) & (events["flags"] & FLAG_FOREIGN != 0)
    return Changes(
        opened=sessions_of(chosen(events, kind == EVENT_OPEN)),
        updated=sessions_of(chosen(events, kind == EVENT_UPDATE)),
        closed=sessions_of(chosen(events, ended & ~ordered)),
        aged=events["id"][ended & (events["reason"] == CLOSED_BY_TIMER)],
    )


def sessions_of(events: Events) -> Records:
    """The records that the events carry; shape (n,), dtype RECORD."""
    if len(events) == 1:
        return np.frombuffer(bytearray(events.tobytes()[-RECORD.itemsize :]), RECORD)
    raw = np.ascontiguousarray(events).view(np.uint8).reshape(len(events), events.dtype.itemsize)
    return np.ascontiguousarray(raw[:, -RECORD.itemsize :]).reshape(-1).view(RECORD)
