# SPDX-License-Identifier: Apache-2.0
"""Sessions in front of the server, which decides which: moved as it asks, and reported with what they carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nat_control.api import Conversation
from nat_control.dataplane import NO_IDS, NO_RECORDS, Ids, Records
from nat_control.offload import packets_of
from nat_control.offloader import listed
from nat_control.pair import Pair
from nat_control.sync.actions import State
from nat_control.sync.codec import CARRIED, MAX_FRONT
from switch_agent.plane import OpenFlowDataPlane

PERIOD = 2.0  # seconds between two looks at the counters, while something is in front
SHARE = 20  # of the time that a look takes, or more: a large table is looked at less often


class SwitchFront:
    """See ``nat_control.dataplane.Front``. ``chosen``: nothing is in front but what the server asks for."""

    def __init__(self, plane: OpenFlowDataPlane, clock: Callable[[], float], *, chosen: bool) -> None:
        self._plane = plane
        self._clock = clock
        self._chosen = chosen
        self._carried = [NO_RECORDS]  # what was carried in front since the last report
        self._reported = 0.0  # when
        self._told = 0  # sessions, by the last report
        self._took = 0.0  # seconds that the last look took
        self.pair: Pair | None = None
        plane.tell = self._heard

    @property
    def room(self) -> int:
        return max(0, min(self._plane.room_in_front, MAX_FRONT - len(self.ids))) if self._chosen else 0

    @property
    def ids(self) -> Ids:
        """In front because the server wants it; ascending."""
        return self._plane.in_front if self._chosen else NO_IDS

    @property
    def period(self) -> float | None:
        """Seconds until the next look; None: there is nothing to look at."""
        return max(PERIOD, SHARE * self._took) if len(self.ids) or self._told else None

    async def move(self, ids: Ids, front: bool) -> tuple[Ids, int]:
        """See Front."""
        if self._chosen:
            await self._plane.set_front(ids[: self.room] if front else ids, front)
        return np.intersect1d(ids, self.ids), self.room

    def _heard(self, records: Records) -> None:
        """What rules in front have carried: the server adds it to what it has carried itself."""
        if self._chosen:
            self._carried.append(records)
        if self.pair is not None:
            self.pair.carried(records)

    async def look(self) -> None:
        """Reads the counters, for all who want to know. Raises ChannelLost."""
        began = self._clock()
        await self._plane.refresh()
        self._took = self._clock() - began
        self.report()

    def report(self) -> None:
        """Tells the server what is in front, and what it has carried since the last report while the server carried too."""
        now, ids = self._clock(), self.ids
        if self.pair is None or self.pair.state is not State.OPERATIONAL or not (len(ids) or self._told):
            return
        records, self._carried = np.concatenate(self._carried), [NO_RECORDS]
        carried = np.zeros(len(ids), CARRIED)
        carried["id"] = ids
        if len(ids) and len(records):
            at = np.minimum(np.searchsorted(ids, records["id"]), len(ids) - 1)
            known = ids[at] == records["id"]
            np.add.at(carried["packets"], at[known], packets_of(records[known]))
        ms = int((now - self._reported) * 1000) if self._plane.server_carries and self._told else 0
        self._reported, self._told = now, len(ids)
        self.pair.transport.tell_front(min(ms, 2**32 - 1), self.room, carried)

    def greet(self) -> None:
        """A server that has just come hears at once what is in front."""
        self._told = max(self._told, 1)
        self._carried = [NO_RECORDS]
        self._reported = self._clock()
        self.report()

    def status(self) -> dict[str, Any]:
        return {"in_front": len(self.ids), "room": self.room}

    async def verb(self, body: object, conversation: Conversation) -> None:
        await listed(body, conversation, self._plane, self.ids, room=self.room)
