# SPDX-License-Identifier: Apache-2.0
"""Our changes on their way to the peer: in order, in batches, a bounded number of them unacknowledged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nat_control.dataplane import NO_RECORDS, Changes, Ids, Records
from nat_control.sync.actions import Input, Limits
from nat_control.sync.codec import DeleteEntries, InstallEntries, UpdateEntries
from nat_fastpath.engine import FLAG_INBOUND, FLAG_OFFLOAD, FLAG_PENDING, RECORD
from nat_fastpath.tables import chosen, copied, joined


def pending(records: Records) -> Records:
    """Those whose packets are held."""
    return chosen(records, records["flags"] & FLAG_PENDING != 0)


def on_the_wire(records: Records, flags: int = FLAG_INBOUND) -> Records:
    """A copy without the flags that mean something to one side only."""
    sent = copied(records, RECORD)
    sent["flags"] &= flags
    return sent


@dataclass(slots=True)
class Batch:
    kind: Input  # INSTALL, UPDATE or DELETE
    records: Records
    held: Records  # of these, sessions whose packets wait for the acknowledgement
    deadline: float = 0.0


class Outbox:
    """Of one connection."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queue: deque[Batch] = deque()
        self._sent: dict[int, Batch] = {}
        self.txid = 0  # of the last batch
        self.waiting = 0  # records not yet sent

    def __bool__(self) -> bool:
        return bool(self._queue or self._sent)

    @property
    def unacknowledged(self) -> int:
        """Batches."""
        return len(self._sent)

    def add(self, changes: Changes, *, hold: bool) -> None:
        """``hold``: packets of pending sessions wait for the peer.

        Ends go first, since what is opened may use their ports. What has come and gone in one step is not told.
        """
        opened, closed = changes.opened, changes.closed
        if len(opened) and len(closed):
            brief = np.intersect1d(opened["id"], closed["id"])
            opened = chosen(opened, ~np.isin(opened["id"], brief))
            closed = chosen(closed, ~np.isin(closed["id"], brief))
        self._append(Input.DELETE, closed)
        self._append(Input.INSTALL, opened, hold=hold)
        self._append(Input.UPDATE, changes.updated)

    def _append(self, kind: Input, records: Records, *, hold: bool = False) -> None:
        self.waiting += len(records)
        while len(records):
            if not self._queue or self._queue[-1].kind is not kind or self._room(self._queue[-1]) <= 0:
                self._queue.append(Batch(kind, NO_RECORDS, NO_RECORDS))
            batch = self._queue[-1]
            room = self._room(batch)
            part, records = records[:room], records[room:]
            batch.records = joined(batch.records, part)
            if hold:
                batch.held = joined(batch.held, pending(part))

    def withdraw(self, ends: Ids) -> None:
        """These have not ended after all; nothing of it has been sent."""
        for batch in self._queue:
            if batch.kind is Input.DELETE:
                batch.records = batch.records[~np.isin(batch.records["id"], ends)]
        self._queue = deque(batch for batch in self._queue if len(batch.records))
        self.waiting = sum(len(batch.records) for batch in self._queue)

    def _room(self, batch: Batch) -> int:
        return self._limits.batch - len(batch.records)

    def flush(self, now: float) -> Iterator[InstallEntries | UpdateEntries | DeleteEntries]:
        """What may be sent now."""
        while self._queue and len(self._sent) < self._limits.window:
            batch = self._queue.popleft()
            self.waiting -= len(batch.records)
            if batch.kind is Input.UPDATE:
                yield UpdateEntries(on_the_wire(batch.records, FLAG_INBOUND | FLAG_OFFLOAD))
                continue
            records = on_the_wire(batch.records)
            self.txid += 1
            batch.deadline = now + self._limits.acknowledge
            self._sent[self.txid] = batch
            kind = InstallEntries if batch.kind is Input.INSTALL else DeleteEntries
            yield kind(self.txid, records)

    def acknowledged(self, kind: Input, txid: int) -> Batch | None:
        """This batch; None when no such one is unacknowledged."""
        batch = self._sent.get(txid)
        if batch is None or batch.kind is not kind:
            return None
        del self._sent[txid]
        return batch

    def lost(self, first: int, last: int) -> list[Batch] | None:
        """Batches that never arrived, no longer waited for; None unless all of them are unacknowledged."""
        if not 0 <= last - first < len(self._sent) or any(
            t not in self._sent for t in range(first, last + 1)
        ):
            return None
        return [self._sent.pop(txid) for txid in range(first, last + 1)]

    def overdue(self, now: float) -> bool:
        return any(now >= batch.deadline for batch in self._sent.values())

    def held(self) -> Records:
        """All sessions that wait for the peer."""
        batches = [*self._sent.values(), *self._queue]
        return joined(NO_RECORDS, *(batch.held for batch in batches))
