# SPDX-License-Identifier: Apache-2.0
"""What the switch has carried, seen by its flow statistics: the core sees none of these packets, and would end their sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nat_control.dataplane import Ids, Mask, Records
from nat_fastpath.engine import FLAG_OFFLOAD, TCP_STATES
from switch_agent.pipeline import FRONT_PRIORITY, INBOUND, TCP, UDP

# What rules have carried; IP bytes are not known to OpenFlow, these are whole frames.
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
_ESTABLISHED = TCP_STATES.index("established")
_FRONT = np.uint64(INBOUND)  # in an id: the pair in front, which has counters of its own


def by_pair(flows: np.ndarray[Any, np.dtype[np.void]]) -> Activity:
    """What flows with the fields of codec.FLOW_STAT have carried: both rules of a pair together, under the session's
    id, with its highest bit where the pair is in front."""
    inbound = flows["cookie"] & np.uint64(INBOUND) != 0
    front = np.where(flows["priority"] == FRONT_PRIORITY, _FRONT, np.uint64(0))
    ids, where = np.unique(flows["cookie"] & ~np.uint64(INBOUND) | front, return_inverse=True)
    found = np.zeros(len(ids), ACTIVITY)
    found["id"] = ids
    for direction, chosen in (("out", ~inbound), ("in", inbound)):
        np.add.at(found[f"packets_{direction}"], where[chosen], flows["packets"][chosen])
        np.add.at(found[f"frame_bytes_{direction}"], where[chosen], flows["bytes"][chosen])
    return found


def by_session(pairs: Activity) -> Activity:
    """What ``by_pair`` has found, both pairs of a session together."""
    ids, where = np.unique(pairs["id"] & ~_FRONT, return_inverse=True)
    found = np.zeros(len(ids), ACTIVITY)
    found["id"] = ids
    for name in _COUNTERS:
        np.add.at(found[name], where, pairs[name])
    return found


def since(before: Activity, now: Activity) -> Activity:
    """What was carried between two looks, of those that carried anything. Rules made anew begin at 0."""
    carried = now.copy()
    if len(before) and len(now):
        at = np.minimum(np.searchsorted(before["id"], now["id"]), len(before) - 1)
        known = before["id"][at] == now["id"]
        for name in _COUNTERS:
            same = known & (now[name] >= before[name][at])
            carried[name] -= np.where(same, before[name][at], 0)
    return np.asarray(carried[(carried["packets_out"] > 0) | (carried["packets_in"] > 0)])


def applied(records: Records, carried: Activity, headers: Sequence[int]) -> Records:
    """Those of ``records`` that have carried something, just used, with it and nothing else as their counters, as
    DataPlane.update takes it with FLAG_OFFLOAD.

    ``headers``: bytes of a frame's own, outbound and inbound.
    """
    if not len(carried):
        return records[:0]
    at = np.minimum(np.searchsorted(carried["id"], records["id"]), len(carried) - 1)
    active = carried["id"][at] == records["id"]
    found, of = records[active].copy(), carried[at[active]]
    found["idle_ms"] = 0
    found["flags"] |= FLAG_OFFLOAD
    for direction, header in zip(("out", "in"), headers, strict=True):
        packets = of[f"packets_{direction}"]
        found[f"packets_{direction}"] = packets
        found[f"bytes_{direction}"] = of[f"frame_bytes_{direction}"] - packets * np.uint64(header)
    return np.asarray(found)


def packets_of(before: np.ndarray[Any, np.dtype[np.uint64]], ids: Ids, packets: Ids) -> Ids:
    """How many of ``packets`` of these sessions came since ``before``: shape (2, n), ascending ids and their packets."""
    recent = packets.copy()
    if before.shape[1] and len(ids):
        at = np.minimum(np.searchsorted(before[0], ids), before.shape[1] - 1)
        same = (before[0][at] == ids) & (packets >= before[1][at])
        recent -= np.where(same, before[1][at], np.uint64(0))
    return recent


def taken_for_established(records: Records, carried: Records) -> Records:
    """TCP sessions that were opening, and have carried both ways: nobody shows us their handshake."""
    both = carried["id"][(carried["packets_out"] > 0) & (carried["packets_in"] > 0)]
    opening = (records["tcp_state"] < _ESTABLISHED) & (records["protocol"] == TCP)
    found = records[opening & np.isin(records["id"], both)].copy()
    found["tcp_state"] = _ESTABLISHED
    return np.asarray(found)


def settled(records: Records) -> Mask:
    """Sessions that need nobody but rules from here on: UDP, and TCP after its handshake; shape (n,)."""
    protocol = records["protocol"]
    return np.asarray((protocol == UDP) | ((protocol == TCP) & (records["tcp_state"] >= _ESTABLISHED)))
