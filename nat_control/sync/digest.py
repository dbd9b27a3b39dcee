# SPDX-License-Identifier: Apache-2.0
"""Whether two sides hold the same sessions, in 2 KiB: sums of a keyed hash, by bucket.

It covers identity and endpoints, not times, states or counters, which differ at any moment. A sum does not
depend on the order, and a session is added or taken away without looking at the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nat_control.dataplane import Ids, Records
from nat_control.sync.codec import BUCKETS, ENTRY, Buckets, Entries
from nat_fastpath.tables import chosen

_U64 = np.ndarray[Any, np.dtype[np.uint64]]
_ROUND = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64


def _mix(x: _U64) -> _U64:
    x = (x ^ (x >> np.uint64(30))) * _ROUND[0]
    x = (x ^ (x >> np.uint64(27))) * _ROUND[1]
    return x ^ (x >> np.uint64(31))


def hashes(records: Records, key: int) -> _U64:
    """Shape (n,) uint64: of id and both 5-tuples, under a 64-bit key."""

    def word(high: str, low: str, shift: int) -> _U64:
        return records[high].astype(np.uint64) << np.uint64(shift) | records[low].astype(np.uint64)

    ports = word("internal_port", "external_port", 16) << np.uint64(24) | word("remote_port", "protocol", 8)
    # Mixed first: small keys and small counters would else cancel out over a whole set.
    mixed = np.repeat(_mix(np.array([key ^ 0x9E3779B97F4A7C15], np.uint64)), len(records))
    for part in (
        records["id"].astype(np.uint64),
        word("internal_addr", "external_addr", 32),
        records["remote_addr"].astype(np.uint64),
        ports,
    ):
        mixed = _mix(mixed ^ part)
    return mixed


def _bucket(of: _U64) -> np.ndarray[Any, np.dtype[np.intp]]:
    return (of >> np.uint64(56)).astype(np.intp)


def entries_of(records: Records, key: int = 0) -> Entries:
    """Shape (n,), dtype ENTRY."""
    made = np.empty(len(records), ENTRY)
    made["id"], made["hash"] = records["id"], hashes(records, key)
    return made


def within(records: Records, buckets: tuple[int, ...], key: int = 0) -> Records:
    """Those in one of these buckets."""
    return np.asarray(chosen(records, np.isin(_bucket(hashes(records, key)), buckets)))


def without(records: Records, ids: Ids) -> Records:
    """Those with other ids."""
    return chosen(records, ~np.isin(records["id"], ids)) if len(ids) else records


class Summary:
    """``buckets``: shape (BUCKETS,) uint64, sums modulo 2^64, over ``count`` sessions."""

    def __init__(self, key: int = 0) -> None:
        self._key = key
        self.count = 0
        self.buckets: Buckets = np.zeros(BUCKETS, np.uint64)

    def add(self, records: Records) -> None:
        of = hashes(records, self._key)
        # The top bits choose the bucket, and the rest of the hash still differs within it.
        np.add.at(self.buckets, _bucket(of), of)
        self.count += len(records)

    def remove(self, records: Records) -> None:
        """Undoes ``add``."""
        of = hashes(records, self._key)
        np.subtract.at(self.buckets, _bucket(of), of)
        self.count -= len(records)


def differing(one: Buckets, other: Buckets) -> list[int]:
    """Numbers of the buckets whose sums are unequal, ascending; empty: both hold the same sessions."""
    return [int(i) for i in np.flatnonzero(one != other)]
