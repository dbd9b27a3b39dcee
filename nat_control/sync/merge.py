# SPDX-License-Identifier: Apache-2.0
"""Whether both sides hold the same, and how what differs is mended: digests, the sessions in buckets that differ, and
changes that never came.

All of it may be dropped at any step: the next digest finds what is left. Only these rules make it safe. A session is told
by its owner alone, behind its own earlier changes, so that a later end follows it. A side ends a foreign session
only when its owner says that it holds it no more; ids are never used again.
"""

from __future__ import annotations

import numpy as np

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, Ids, Records
from nat_control.sync.actions import (
    MAX_OUTSTANDING,
    Cede,
    DigestCompared,
    ErrorCode,
    Fetch,
    Gap,
    Input,
    Mended,
    Position,
    TakeBuckets,
    TakeDigest,
)
from nat_control.sync.codec import BUCKETS, MAX_ENTRIES, BucketEntries, Buckets, Digest, Resync, WantEntries
from nat_control.sync.digest import differing, entries_of
from nat_control.sync.exchange import instances
from nat_control.sync.machine import Comparison, Machine
from nat_fastpath.engine import FLAG_FOREIGN, RECORD
from nat_fastpath.tables import chosen, joined


class Merging(Machine):
    def _quiet(self, position: int) -> bool:
        """Whether what the peer says of a position is comparable: it had all our changes, and we have all of its, as the
        stream's order says."""
        return not self.busy and position == self._position.sent

    # -- digests

    def _take_digest(self) -> None:
        self._out.append(TakeDigest(self._position, self.refused_there))

    def _tick_operational(self, now: float) -> None:
        """An acknowledgement that is overdue ends it; from time to time a digest, if nothing is under way."""
        if self._outbox.overdue(now):
            self._fail(ErrorCode.TIMEOUT, "a batch is not acknowledged")
        elif self._hangs(now):
            self._fail(ErrorCode.TIMEOUT, "the data plane does not answer")
        elif now >= self._next_digest and not self.busy:
            self._next_digest = now + self.limits.digest
            refused = np.union1d(self._offered, self.refused_there)
            if len(refused) and now >= self._next_offer:
                self._next_offer = now + self.limits.offer
                self._out.append(Fetch(self._operation(Input.TICK, 0, NO_RECORDS), refused))
            else:
                self._take_digest()

    def _hangs(self, now: float) -> bool:
        """Whether our plane has not finished one operation for too long; a peer does not wait for all of them."""
        oldest = next(iter(self._plane), 0)
        if oldest != self._oldest[0]:
            self._oldest = oldest, now + self.limits.exchange
        return oldest != 0 and now >= self._oldest[1]

    def _offer(self, held: Ids, now: float) -> None:
        """What is refused and still held differs again, if it may fit, so that it is told again; the rest has ended, whoever
        has missed it, and would keep both sides apart for good."""
        refused = np.union1d(self._offered, self.refused_there)
        gone = np.setdiff1d(refused, held)
        if self._may_fit:
            self._offered, self.refused_there, self._may_fit = np.intersect1d(refused, held), NO_IDS, False
        self._next_digest = now
        if len(gone):
            closed = np.zeros(len(gone), RECORD)
            closed["id"] = gone
            self._tell(Changes(closed=closed), now)
        self._tick_operational(now)

    def _digest(self, message: Digest, now: float) -> None:
        """Comparable only at the same position: then our own is taken."""
        if self._quiet(message.position):
            self._peer_digest = self._position, message
            self._take_digest()

    def _digest_taken(self, at: Position, buckets: Buckets, count: int, now: float) -> None:
        """Compared with the peer's, or sent; dropped when anything has happened since."""
        if at != self._position or self.busy:
            return
        if self._peer_digest is None or self._peer_digest[0] != at:
            self._own_digest = at, count
            self._send(Digest(at.received, buckets, count))
            return
        theirs, self._peer_digest = self._peer_digest[1], None
        unequal = tuple(differing(theirs.buckets, buckets))
        self._compared(Comparison(now, unequal, count, theirs.count))
        if not unequal:
            self._send(BucketEntries(at.received))
            return
        # As many as fit into a message; the next digest finds the others.
        fit = max(1, MAX_ENTRIES // 2 * BUCKETS // max(count, theirs.count, 1))
        self._out.append(TakeBuckets(at, unequal[:fit], self.refused_there))

    def _compared(self, comparison: Comparison) -> None:
        self.comparison = comparison
        if not comparison.differing:
            self.only_ours, self.only_theirs = NO_RECORDS, NO_IDS
        self._out.append(DigestCompared(comparison.differing))

    # -- buckets that differ

    def _bucket_entries(self, message: BucketEntries, now: float) -> None:
        """The answer to our digest: equal, or our own sessions of these buckets are gathered."""
        if not self._quiet(message.position) or self._own_digest is None:
            return
        at, count = self._own_digest
        if at != self._position:
            return
        self._own_digest = None
        if message.buckets:
            self._compared(Comparison(now, message.buckets, count, None))
            self._peer_entries = at, message.buckets, message.entries
            self._out.append(TakeBuckets(at, message.buckets, self.refused_there))
        else:
            self._compared(Comparison(now, (), count, count))

    def _buckets_taken(self, at: Position, buckets: tuple[int, ...], records: Records, now: float) -> None:
        """Listed for the peer, or compared with its list, and mended."""
        if at != self._position or self.busy:
            return
        entries = entries_of(records)
        if self._peer_entries is None or self._peer_entries[:2] != (at, buckets):
            if len(entries) <= MAX_ENTRIES:
                self._send(BucketEntries(at.received, buckets, entries))
            return
        theirs, self._peer_entries = self._peer_entries[2], None
        self.only_ours = chosen(records, ~np.isin(entries["hash"], theirs["hash"]))
        self.only_theirs = theirs["id"][~np.isin(theirs["hash"], entries["hash"])]
        if len(self.only_theirs):
            self._send(WantEntries(self.only_theirs))
        self._mend(self.only_ours, self.only_theirs, now)

    def _mend(self, lacking: Records, wanted: Ids, now: float) -> None:
        """The peer does not hold ``lacking``: its own have ended, ours it must hear of."""
        foreign = lacking["flags"] & FLAG_FOREIGN != 0
        room = max(0, self.limits.waiting - self._outbox.waiting)
        told, ended = lacking[~foreign][:room], lacking[foreign]
        self.mended += len(told) + len(ended)
        self._next_digest = now
        self._out.append(Mended(told["id"], ended["id"], wanted))
        if len(ended):
            self._delete_at_plane(Input.EVENTS, 0, ended)
        # What the peer was refused for these may have room now: one of them tells it so.
        room_made = ended[: len(self.refused_here) > 0]
        if len(told) or len(room_made):
            self._tell(Changes(opened=told, closed=room_made), now)

    def _want_entries(self, message: WantEntries, now: float) -> None:
        """These sessions are looked for."""
        if self._room_at_plane():
            self._out.append(Fetch(self._operation(Input.WANT_ENTRIES, 0, NO_RECORDS), message.ids))

    def _room_at_plane(self) -> bool:
        """False when the peer does not wait for our acknowledgements."""
        if len(self._plane) > 2 * MAX_OUTSTANDING:
            self._fail(ErrorCode.PROTOCOL, f"more than {MAX_OUTSTANDING} batches at once")
            return False
        return True

    def _fetched(self, op: int, records: Records, now: float) -> None:
        """Told again by their owner, ended where their owner has ended them."""
        operation = self._plane.pop(op, None)
        if operation is None:
            return
        # What has ended since was told, and what ends later is told after them.
        records = records[~np.isin(records["id"], np.concatenate([NO_IDS, *operation.ended]))]
        if operation.answer is Input.WANT_ENTRIES:
            self.only_ours = records
            self._mend(records, NO_IDS, now)
        elif operation.answer is Input.TICK:
            self._offer(records["id"], now)
        else:
            lost = np.isin(self._missing["id"], operation.records["id"])
            self._missing = self._missing[~lost]
            self._tell(Changes(opened=records), now)

    # -- changes that never came

    def _changed(self, txid: int) -> bool:
        """Notes one change of the peer; false when it is not served. What is missing before it is asked for again."""
        expected = self._position.received + 1
        if txid < expected:
            self._fail(ErrorCode.PROTOCOL, f"change {txid} comes after {expected - 1}")
            return False
        self._position = self._position._replace(received=txid)
        if txid > expected:
            self.gaps += 1
            self._out.append(Gap(expected, txid - 1))
            self._send(Resync(expected, txid - 1))
        return self._room_at_plane()

    def _resync(self, message: Resync, now: float) -> None:
        """These changes of ours never came: what still holds of them is told again."""
        lost = self._outbox.lost(message.first, message.last)
        if lost is None:
            self._fail(ErrorCode.PROTOCOL, f"changes {message.first}-{message.last} are not outstanding")
            return
        self._may_fit, self._next_offer = True, now  # what came behind them may have been refused for them
        for batch in lost:
            if batch.kind is Input.DELETE:
                self._enqueue(Changes(closed=batch.records), hold=False)
            else:
                self._missing = joined(self._missing, batch.held)
                op = self._operation(Input.RESYNC, 0, batch.records)
                self._out.append(Fetch(op, batch.records["id"]))
        self._flush(now)
        self._bound()

    # -- what was refused

    def _answered_here(self, records: Records, refused: Ids) -> None:
        """Our plane has tried to hold these sessions of the peer."""
        if len(self.refused_here) or len(refused):
            others = self.refused_here[~np.isin(self.refused_here["id"], records["id"])]
            self.refused_here = joined(others, chosen(records, np.isin(records["id"], refused)))
        self._count(refused, here=True)

    def _answered_there(self, records: Records, refused: Ids) -> None:
        """The peer's plane has tried to hold these sessions of ours."""
        taken = chosen(records, ~np.isin(records["id"], refused)) if len(refused) else records
        if len(refused) or self.apart:
            self._note_refused_there(records, refused)
        # Once it could not take these of its own back; now it holds and owns them again. Of others it has not said so yet.
        if self.peer is not None and bool((instances(taken) == self.peer.instance).any()):
            self._out.append(Cede(self.peer.instance, np.union1d(self.refused_there, self._offered)))

    def _note_refused_there(self, records: Records, refused: Ids) -> None:
        self.refused_there = np.union1d(np.setdiff1d(self.refused_there, records["id"]), refused)
        self._offered = np.setdiff1d(self._offered, records["id"])
        self._count(refused, here=False)

    def _ended(self, records: Records) -> None:
        """Either side ended these; what was refused for them may have room."""
        # So may what is on its way there: the answer that refuses it may come after this end.
        self._may_fit = self._may_fit or bool(self._outbox) or len(self.refused_there) > 0
        if not self.apart:
            return
        ids = records["id"]
        self.refused_there = np.setdiff1d(self.refused_there, ids)
        self._offered = np.setdiff1d(self._offered, ids)
        self.refused_here = self.refused_here[~np.isin(self.refused_here["id"], ids)]
