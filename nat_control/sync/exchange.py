# SPDX-License-Identifier: Apache-2.0
"""The beginning of a connection: whether both sides fit together, and how far the exchange of all sessions is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nat_control.dataplane import NO_IDS, Ids, Records
from nat_control.sync.actions import ErrorCode
from nat_control.sync.codec import Hello

KINDS = {
    0: "half of a pair with a switch",
    1: "the primary of two servers",
    2: "the secondary of two servers",
}
FITTING = {(0, 0), (1, 2), (2, 1)}
INSTANCE_SHIFT = np.uint64(52)  # of an id; see nat_id() in nat.h


def misfit_of(own: Hello, other: Hello) -> tuple[ErrorCode, str] | None:
    """Why these two cannot be a pair."""
    if other.record_size != own.record_size:
        return ErrorCode.RECORD, f"records of {other.record_size} bytes, not {own.record_size}"
    if (own.kind, other.kind) not in FITTING:
        return (
            ErrorCode.KIND,
            f"{KINDS[own.kind]} here, {KINDS.get(other.kind, 'something new')} there (peer.with, peer.role)",
        )
    if other.instance == own.instance:
        return ErrorCode.INSTANCE, f"both are instance {own.instance}"
    if other.slices != own.slices:
        return ErrorCode.SLICES, (
            f"nat.pool.slices: {other.slices} there and {own.slices} here; "
            "an agent needs as many as its server has workers.cores"
        )
    for mine in own.pools:
        for its in other.pools:
            if shared := mine.overlap(its):
                return ErrorCode.POOLS, f"both would hand out {shared}"
    return None


def rank(hello: Hello) -> tuple[int, int, int]:
    """Of two contradicting sessions the higher rank's stays."""
    return hello.precedence, hello.term, -hello.instance


@dataclass(slots=True)
class Exchange:
    """How far the two InitStates are."""

    txid: int  # of ours
    chunks_out: int = 0
    state_sent: bool = False
    peer_txid: int | None = None
    chunks_in: int = 0
    last_in: bool = False
    installing: int = 0
    refused: list[Ids] = field(default_factory=list)
    ready_sent: bool = False
    ready_received: bool = False
    closed: list[Records] = field(default_factory=list)
    n_closed: int = 0
    aged: Ids = field(default_factory=lambda: NO_IDS)  # of those closed, by our timer
    kept: list[Records] = field(default_factory=list)  # of those aged, what the peer then brought back


def instances(records: Records) -> Ids:
    """Who opened each session, by its id; shape (n,)."""
    return np.asarray(records["id"] >> INSTANCE_SHIFT & np.uint64(0xFF))
