# SPDX-License-Identifier: Apache-2.0
"""The exchange of all sessions at the beginning of a connection: how far both InitStates are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nat_control.dataplane import Ids, Records

INSTANCE_SHIFT = np.uint64(52)  # of an id; see nat_id() in nat.h


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


def instances(records: Records) -> Ids:
    """Who opened each session, by its id; shape (n,)."""
    return np.asarray(records["id"] >> INSTANCE_SHIFT & np.uint64(0xFF))
