# SPDX-License-Identifier: Apache-2.0
"""What an earlier agent has left on a switch, read back: a session's two rules say all of it but its TCP state.

An agent that has lost its memory while it carried alone must not give the external ports of living sessions to
others. Only sessions without rules are forgotten: ICMP, hairpin, and what was beyond ``max_flows``.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from nat_control.dataplane import Mask, Records
from nat_fastpath.engine import RECORD, TCP_STATES
from switch_agent.codec import ENTRY_FIXED, FLOW_STAT, ProtocolError, entry_bounds, flow_statistics
from switch_agent.compile import Numbers
from switch_agent.pipeline import CLASS_MASK, INBOUND, TCP

# A session's rule; ``translated`` is what its source (outbound) or destination (inbound) becomes. All 0: not such a rule.
RULE = np.dtype(
    [
        *((name, FLOW_STAT[name].str) for name in FLOW_STAT.names or ()),
        ("source", "<u4"),
        ("destination", "<u4"),
        ("translated", "<u4"),
        ("source_port", "<u2"),
        ("destination_port", "<u2"),
        ("translated_port", "<u2"),
        ("protocol", "u1"),
    ]
)
GROUP_MAC = np.dtype([("group", "<u4"), ("mac", "<u8")])  # mac 0: it goes to the agent

_MAPPING_CLASS = 2 << 60  # NAT_ID_MAPPING
_ESTABLISHED = TCP_STATES.index("established")
_APPLY_ACTIONS, _SET_FIELD = 4, 25
_ETH_DST = 0x80000606  # OXM headers: class, field, length of the value
_MATCHED = {
    0x80001401: "protocol",
    0x80001604: "source",
    0x80001804: "destination",
    0x80001A02: "source_port",  # TCP
    0x80001C02: "destination_port",
    0x80001E02: "source_port",  # UDP
    0x80002002: "destination_port",
}
_CHANGED = {
    header: "translated" + name.removeprefix("source").removeprefix("destination")
    for header, name in _MATCHED.items()
    if name != "protocol"
}
_VALUES = {*_MATCHED.values(), *_CHANGED.values()}
_ENDPOINTS = (
    ("internal", "translated"),
    ("remote", "source"),
    ("external", "destination"),
)  # of an inbound rule
_ENDPOINTS_OUT = (("internal", "source"), ("remote", "destination"), ("external", "translated"))


class Left(NamedTuple):
    """Sessions, and the groups that their rules use, shape (n,): 0 where a rule is missing."""

    records: Records
    internal: np.ndarray[Any, np.dtype[np.uint32]]
    external: np.ndarray[Any, np.dtype[np.uint32]]


def rules(body: bytes) -> np.ndarray[Any, np.dtype[np.void]]:
    """The rules of one part of a statistics reply; shape (n,), dtype RULE. Raises ProtocolError.

    The order of a rule's fields is the switch's choice: it is read from one entry, and holds for all that have
    the same bytes around their values.
    """
    starts, ends = entry_bounds(body)
    found = np.zeros(len(starts), RULE)
    statistics = flow_statistics(body)
    for name in FLOW_STAT.names or ():
        found[name] = statistics[name]
    raw = np.frombuffer(body, np.uint8)
    left = np.arange(len(starts))
    while len(left):
        size = int(ends[left[0]] - starts[left[0]])
        same_size = left[ends[left] - starts[left] == size]
        entries = raw[starts[same_size][:, None] + np.arange(size)]
        places = _places(entries[0].tobytes())
        frame = np.ones(size, np.bool_)
        frame[:ENTRY_FIXED] = False
        frame[-4:] = False  # the group
        for name, at in places.items():
            frame[at : at + RULE[name].itemsize] = False
        alike = (entries[:, frame] == entries[0, frame]).all(axis=1)
        if places.keys() == _VALUES:
            for name, at in places.items():
                value = np.ascontiguousarray(entries[alike, at : at + RULE[name].itemsize])
                found[name][same_size[alike]] = value.view(RULE[name].newbyteorder(">"))[:, 0]
        left = np.setdiff1d(left, same_size[alike])
    return found


def _places(entry: bytes) -> dict[str, int]:
    """Where the values of RULE stand in this flow's entry, as many as there are."""
    try:
        (length,) = struct.unpack_from("!H", entry, ENTRY_FIXED + 2)
        found = dict(_fields(entry, ENTRY_FIXED + 4, ENTRY_FIXED + length, _MATCHED))
        at = ENTRY_FIXED + (length + 7) // 8 * 8
        while at < len(entry):
            kind, length = struct.unpack_from("!HH", entry, at)
            if kind == _APPLY_ACTIONS:
                for action in _actions(entry, at + 8, at + length):
                    found |= dict(_fields(entry, action + 4, action + 8, _CHANGED))
            at += max(length, 8)
        return found
    except struct.error:
        raise ProtocolError("flow statistics with a flow that ends too early") from None


def _fields(data: bytes, at: int, end: int, names: dict[int, str]) -> list[tuple[str, int]]:
    """Name and place of the values of these OXM fields."""
    found = []
    while at < end:
        (header,) = struct.unpack_from("!I", data, at)
        if header in names:
            found.append((names[header], at + 4))
        at += 4 + (header & 0xFF)
    return found


def _actions(data: bytes, at: int, end: int) -> list[int]:
    """Where the actions that set a field begin."""
    found = []
    while at < end:
        kind, length = struct.unpack_from("!HH", data, at)
        if kind == _SET_FIELD:
            found.append(at)
        at += max(length, 8)
    return found


def group_macs(body: bytes) -> np.ndarray[Any, np.dtype[np.void]]:
    """What MAC the groups of one part of a group description send to; shape (n,), dtype GROUP_MAC. Raises ProtocolError."""
    found = []
    at = 0
    try:
        while at < len(body):
            length, group = struct.unpack_from("!HxxI", body, at)
            if length < 8 or at + length > len(body):
                raise ProtocolError("a group description that ends within a group")
            mac = 0
            if length > 8:  # its first bucket
                (end,) = struct.unpack_from("!H", body, at + 8)
                for action in _actions(body, at + 24, min(at + 8 + end, at + length)):
                    for _, place in _fields(body, action + 4, action + 8, {_ETH_DST: "mac"}):
                        mac = int.from_bytes(body[place : place + 6], "big")
            found.append((group, mac))
            at += length
    except struct.error:
        raise ProtocolError("a group description that ends within a group") from None
    return np.array(found, GROUP_MAC)


def sessions(found: np.ndarray[Any, np.dtype[np.void]], headers: tuple[int, int]) -> Left:
    """The sessions of rules (dtype RULE), just used, and established if they are of TCP.

    ``headers``: bytes of a frame's own, outbound and inbound.
    """
    found = found[found["protocol"] != 0]
    ids, where = np.unique(found["cookie"] & ~np.uint64(INBOUND), return_inverse=True)
    records = np.zeros(len(ids), RECORD)
    groups = np.zeros((2, len(ids)), np.uint32)
    records["id"] = ids
    records["mapping_id"] = ids & ~np.uint64(CLASS_MASK) | np.uint64(_MAPPING_CLASS)
    inbound = found["cookie"] & np.uint64(INBOUND) != 0
    for chosen, direction, group, header, endpoints in (
        (inbound, "in", groups[0], headers[1], _ENDPOINTS),
        (~inbound, "out", groups[1], headers[0], _ENDPOINTS_OUT),
    ):
        at, some = where[chosen], found[chosen]
        records["protocol"][at] = some["protocol"]
        for name, of in endpoints:
            records[f"{name}_addr"][at] = some[of]
            records[f"{name}_port"][at] = some[f"{of}_port"]
        records["age_ms"][at] = np.minimum(some["duration_s"], 0xFFFF_FFFF // 1000) * 1000
        records[f"packets_{direction}"][at] = some["packets"]
        records[f"bytes_{direction}"][at] = some["bytes"] - some["packets"] * np.uint64(header)
        group[at] = some["group"]
    records["tcp_state"][records["protocol"] == TCP] = _ESTABLISHED
    return Left(records, groups[0], groups[1])


def compared(
    found: np.ndarray[Any, np.dtype[np.void]], cookies: Numbers, groups: Numbers, priorities: Numbers
) -> tuple[Mask, Mask, Mask]:
    """Which found flows are unknown, which are a known session's at the priority that is not its own, and which of the
    (sorted) expected ones are there with the right group and priority."""
    right = np.zeros(len(cookies), np.bool_)
    if not len(cookies):
        return np.ones(len(found), np.bool_), np.zeros(len(found), np.bool_), right
    at = np.minimum(np.searchsorted(cookies, found["cookie"]), len(cookies) - 1)
    known = cookies[at] == found["cookie"]
    placed = known & (priorities[at] == found["priority"])
    right[at[placed & (groups[at] == found["group"])]] = True
    return ~known, known & ~placed, right
