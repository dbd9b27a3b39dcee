# SPDX-License-Identifier: Apache-2.0
"""What the switch has carried, seen by its flow statistics: the core sees none of these packets, and would end their sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nat_control.dataplane import Records

# What each session's rules have carried; IP bytes are not known to OpenFlow, these are whole frames.
ACTIVITY = np.dtype(
    [
        ("id", "<u8"),
        ("packets_out", "<u8"),
        ("packets_in", "<u8"),
        ("frame_bytes_out", "<u8"),
        ("frame_bytes_in", "<u8"),
    ]
)
Activity = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), ascending ids
NO_ACTIVITY: Activity = np.zeros(0, ACTIVITY)
_COUNTERS = tuple(name for name in ACTIVITY.names or () if name != "id")


def since(before: Activity, now: Activity) -> Activity:
    """What was carried between two looks, of the sessions that carried anything. Rules made anew begin at 0."""
    carried = now.copy()
    if len(before) and len(now):
        at = np.minimum(np.searchsorted(before["id"], now["id"]), len(before) - 1)
        known = before["id"][at] == now["id"]
        for name in _COUNTERS:
            same = known & (now[name] >= before[name][at])
            carried[name] -= np.where(same, before[name][at], 0)
    return np.asarray(carried[(carried["packets_out"] > 0) | (carried["packets_in"] > 0)])


def applied(records: Records, carried: Activity, headers: Sequence[int]) -> Records:
    """Those of ``records`` that have carried something, with it added and just used.

    ``headers``: bytes of a frame's own, outbound and inbound.
    """
    if not len(carried):
        return records[:0]
    at = np.minimum(np.searchsorted(carried["id"], records["id"]), len(carried) - 1)
    active = carried["id"][at] == records["id"]
    found, of = records[active].copy(), carried[at[active]]
    found["idle_ms"] = 0
    for direction, header in zip(("out", "in"), headers, strict=True):
        packets = of[f"packets_{direction}"]
        found[f"packets_{direction}"] += packets
        found[f"bytes_{direction}"] += of[f"frame_bytes_{direction}"] - packets * np.uint64(header)
    return np.asarray(found)
