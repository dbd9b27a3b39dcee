# SPDX-License-Identifier: Apache-2.0
"""What a side's own plane has carried of its peer's sessions, and what it only knows from the peer."""

from __future__ import annotations

from typing import Any

import numpy as np

from nat_control.dataplane import NO_IDS, Ids, Mask, Records
from nat_fastpath.engine import FLAG_FOREIGN

BLUR = 0.2  # seconds that a plane may take over what it is told; a packet so much later is our own

_Seconds = np.ndarray[Any, np.dtype[np.float64]]
_Told = tuple[Ids, _Seconds]  # ids, and when each had its last packet as the peer says
_NOTHING: _Told = NO_IDS, np.zeros(0)


class Hearsay:
    """Sessions of which the peer has told. That they were in use until then is no news to it, and telling it so would take back
    what their packets have changed there since. Later packets are our own, and news."""

    def __init__(self, now: float) -> None:
        self._since = self._began = now  # of the look before this one, and of this one
        self._told: list[_Told] = []  # since then
        self._before = _NOTHING  # between the two, sorted

    def heard(self, records: Records, now: float) -> None:
        """As the plane is given them."""
        self._told.append((records["id"], now - records["idle_ms"] / 1000))

    def look(self, now: float) -> None:
        """A new look at what was carried since the last one begins."""
        self._since, self._began = self._began, now
        self._before, self._told = _sorted(self._told), []

    def carried(self, page: Records) -> Records:
        """Of sessions as they are since the look began, the peer's that our own plane has carried since the look before it."""
        used = self._began - page["idle_ms"] / 1000
        carried = (page["flags"] & FLAG_FOREIGN != 0) & (used > self._since)
        for told in (self._before, _sorted(self._told)):
            if len(told[0]) and carried.any():
                carried[carried] = _later(page["id"][carried], used[carried], told)
        return np.asarray(page[carried])


def _sorted(told: list[_Told]) -> _Told:
    """By id, and the latest of each behind its others."""
    ids, until = (np.concatenate([none, *some]) for none, *some in zip(_NOTHING, *told, strict=True))
    order = np.lexsort((until, ids))
    return ids[order], until[order]


def _later(ids: Ids, used: _Seconds, told: _Told) -> Mask:
    """Those that were used later than is told of them."""
    at = np.maximum(np.searchsorted(told[0], ids, side="right") - 1, 0)
    return np.asarray((told[0][at] != ids) | (used > told[1][at] + BLUR))
