# SPDX-License-Identifier: Apache-2.0
"""What a side's own plane has carried of its peer's sessions, and what it only knows from the peer."""

from __future__ import annotations

import numpy as np

from nat_control.dataplane import NO_IDS, Ids, Mask, Records
from nat_fastpath.engine import FLAG_FOREIGN


class Hearsay:
    """Sessions of which the peer has told. That they are in use is no news to it, and telling it so would take back what
    their packets have changed there since."""

    def __init__(self) -> None:
        self._now: list[Ids] = []
        self._before: Ids = NO_IDS  # sorted

    def heard(self, records: Records) -> None:
        """Before the plane is given them."""
        self._now.append(records["id"])

    def look(self) -> None:
        """A new look at what was carried begins; what was heard before the last one is forgotten."""
        self._before, self._now = np.sort(np.concatenate([NO_IDS, *self._now])), []

    def carried(self, page: Records, within: float) -> Records:
        """The peer's sessions that our own plane has carried in these seconds; may leave out some until the next look."""
        active = page[(page["flags"] & FLAG_FOREIGN != 0) & (page["idle_ms"] < np.uint32(within * 1000))]
        return np.asarray(active[~self._is_heard(active["id"])])

    def _is_heard(self, ids: Ids) -> Mask:
        found = np.isin(ids, np.concatenate([NO_IDS, *self._now]))
        if len(self._before):
            at = np.minimum(np.searchsorted(self._before, ids), len(self._before) - 1)
            found |= self._before[at] == ids
        return found
