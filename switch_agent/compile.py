# SPDX-License-Identifier: Apache-2.0
"""Sessions to flow-mods, many at a time: one encoded template per kind of rule, filled in by numpy, or for a few by hand.

An OpenFlow library takes 0.1 to 0.2 ms for one flow-mod. All flow-mods of one protocol and direction have
the same layout, so one is encoded, the places of what differs are found by encoding it again with other
values, and 10 000 are made with a handful of array assignments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from nat_fastpath.engine import RECORD
from switch_agent.pipeline import ALL_BITS, INBOUND, PORT_FIELDS, SESSION_PRIORITY, Pipeline, Rule

Records = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), dtype engine.RECORD
Numbers = np.ndarray[Any, np.dtype[np.integer[Any]]]
Encode = Callable[[Rule, int, int], bytes]  # rule, command, transaction id → one flow-mod
EncodeDelete = Callable[[int, int, int], bytes]  # cookie, mask, transaction id → one flow-mod

FEW = 4  # sessions for which numpy takes longer than Python alone: the first packet of each waits
PROTOCOLS = tuple(PORT_FIELDS)  # others have no ports to match on; they pass through the agent
# Field of the flow-mod → its width in bytes. The endpoints are those of the packet that the rule matches.
WIDTHS: Mapping[str, int] = {
    "txid": 4,
    "cookie": 8,
    "priority": 2,
    "source": 4,
    "source_port": 2,
    "destination": 4,
    "destination_port": 2,
    "translated": 4,
    "translated_port": 2,
    "group": 4,
}
MATCHED = ("txid", "cookie", "priority", "source", "source_port", "destination", "destination_port")
# Which fields of the record those are, outbound and inbound.
OUTWARD: Mapping[str, str] = {
    "source": "internal_addr",
    "source_port": "internal_port",
    "destination": "remote_addr",
    "destination_port": "remote_port",
    "translated": "external_addr",
    "translated_port": "external_port",
}
INWARD: Mapping[str, str] = {
    "source": "remote_addr",
    "source_port": "remote_port",
    "destination": "external_addr",
    "destination_port": "external_port",
    "translated": "internal_addr",
    "translated_port": "internal_port",
}
_LETTERS = {2: "H", 4: "I", 8: "Q"}
_NAMES = RECORD.names or ()
_ID, _PROTOCOL = _NAMES.index("id"), _NAMES.index("protocol")
_PLAIN = (*_NAMES, "txid", "priority", "inside", "outside", "inbound")  # what a Both is filled in from


class NextHopGroups(NamedTuple):
    """Group ids per record, shape (n,): towards the inside and towards the outside."""

    internal: Numbers
    external: Numbers


class Template:
    """One encoded message; ``at`` has the offset of each field that differs between messages."""

    def __init__(self, message: bytes, at: Mapping[str, int]) -> None:
        formats = [f">u{WIDTHS[name]}" for name in at]
        self._message = message
        self._layout = np.dtype(
            {"names": list(at), "formats": formats, "offsets": list(at.values()), "itemsize": len(message)}
        )
        # What does not differ, and the field behind it; none behind the last.
        self.pieces: list[tuple[bytes, str]] = []
        done = 0
        for name in sorted(at, key=at.__getitem__):
            self.pieces.append((message[done : at[name]], name))
            done = at[name] + WIDTHS[name]
        self.pieces.append((message[done:], ""))

    def fill(self, n: int, values: Mapping[str, Numbers | int]) -> bytes:
        """``n`` messages one after the other; a value is one for all, or shape (n,)."""
        block = bytearray(self._message * n)
        rows: np.ndarray[Any, Any] = np.frombuffer(block, self._layout)
        for name in self._layout.names or ():
            rows[name] = values[name]
        return bytes(block)


class Both:
    """The flow-mods of one session, outbound and inbound, of plain numbers: numpy takes longer for a few."""

    def __init__(self, templates: Mapping[tuple[int, bool], Template], protocol: int) -> None:
        self._fixed: list[bytes] = []
        letters, places = ">", []
        for inbound, fields, cookie, group in (
            (False, OUTWARD, "id", "outside"),
            (True, INWARD, "inbound", "inside"),
        ):
            template, names = templates[protocol, inbound], {**fields, "cookie": cookie, "group": group}
            for piece, name in template.pieces:
                places.append(len(_PLAIN) + len(self._fixed))
                self._fixed.append(piece)
                letters += f"{len(piece)}s"
                if name:
                    places.append(_PLAIN.index(names.get(name, name)))
                    letters += _LETTERS[WIDTHS[name]]
        self._pack = struct.Struct(letters).pack
        self._choose = itemgetter(*places)

    def fill(
        self, record: tuple[int, ...], txid: int, priority: int, inside: int = 0, outside: int = 0
    ) -> bytes:
        """``record``: the fields of one in their order; ``inside``, ``outside``: the groups of its next hops."""
        further = (txid, priority, inside, outside, record[_ID] | INBOUND)
        return self._pack(*self._choose((*record, *further, *self._fixed)))


def make_template(encode: Callable[[Mapping[str, int]], bytes], fields: tuple[str, ...]) -> Template:
    """Finds where each field stands. Raises ValueError when a field has no place of its own."""
    base = np.frombuffer(encode(dict.fromkeys(fields, 0)), np.uint8)
    at = {}
    for name in fields:
        ones = (1 << 8 * WIDTHS[name]) - 1
        other = np.frombuffer(encode({**dict.fromkeys(fields, 0), name: ones}), np.uint8)
        if len(other) != len(base):
            raise ValueError(f"the length of a flow-mod depends on {name}")
        places = np.flatnonzero(base != other)
        first = int(places[0]) if len(places) else -1
        if first < 0 or not np.array_equal(places, first + np.arange(WIDTHS[name])):
            raise ValueError(f"{name} has no place of its own in a flow-mod")
        at[name] = first
    return Template(base.tobytes(), at)


class Compiler:
    """Makes the flow-mods of sessions. ``encode`` and ``encode_delete`` are those of the channel."""

    def __init__(
        self, pipeline: Pipeline, encode: Encode, encode_delete: EncodeDelete, *, add: int, delete_strict: int
    ) -> None:
        self._pipeline = pipeline
        self._adds: dict[tuple[int, bool], Template] = {}
        self._deletes: dict[tuple[int, bool], Template] = {}
        for protocol in PROTOCOLS:
            for inbound in (False, True):
                key = protocol, inbound
                self._adds[key] = make_template(self._encoder(encode, add, *key), tuple(WIDTHS))
                self._deletes[key] = make_template(self._encoder(encode, delete_strict, *key), MATCHED)
        self._add = {protocol: Both(self._adds, protocol) for protocol in PROTOCOLS}
        self._delete = {protocol: Both(self._deletes, protocol) for protocol in PROTOCOLS}
        self._by_cookie = make_template(
            lambda values: encode_delete(values["cookie"], ALL_BITS, values["txid"]), ("txid", "cookie")
        )

    def _encoder(
        self, encode: Encode, command: int, protocol: int, inbound: bool
    ) -> Callable[[Mapping[str, int]], bytes]:
        def one(values: Mapping[str, int]) -> bytes:
            rule = self._pipeline.session(
                protocol,
                inbound,
                cookie=values["cookie"],
                source=(values["source"], values["source_port"]),
                destination=(values["destination"], values["destination_port"]),
                translated=(values.get("translated", 0), values.get("translated_port", 0)),
                group_id=values.get("group", 0),
                priority=values["priority"],
            )
            return encode(rule, command, values["txid"])

        return one

    def install(
        self,
        records: Records,
        groups: NextHopGroups,
        txid: int,
        priority: Numbers | int = SESSION_PRIORITY,
    ) -> bytes:
        """Two flow-mods for each TCP or UDP record. ``priority``: one for all, or shape (n,)."""
        parts = []
        for protocol in PROTOCOLS:
            chosen = records["protocol"] == protocol
            some = records[chosen]
            of = priority if isinstance(priority, int) else priority[chosen]
            if len(some):
                outward = _values(some, OUTWARD, 0, txid, of, groups.external[chosen])
                inward = _values(some, INWARD, INBOUND, txid, of, groups.internal[chosen])
                parts.append(self._adds[protocol, False].fill(len(some), outward))
                parts.append(self._adds[protocol, True].fill(len(some), inward))
        return b"".join(parts)

    def one(self, record: tuple[int, ...], txid: int, inside: int, outside: int) -> bytes:
        """The same, behind, for the fields of a single record and the groups of its next hops; b"": of another protocol."""
        both = self._add.get(record[_PROTOCOL])
        return both.fill(record, txid, SESSION_PRIORITY, inside, outside) if both else b""

    def delete(self, records: Records, txid: int, priority: Numbers | int = SESSION_PRIORITY) -> bytes:
        """Deletes exactly the rules of these records: by match, priority and cookie, which a switch finds fast."""
        if len(records) <= FEW:
            of = [priority] * len(records) if isinstance(priority, int) else priority.tolist()
            found = (
                (self._delete.get(one[_PROTOCOL]), one, at)
                for one, at in zip(records.tolist(), of, strict=True)
            )
            return b"".join(both.fill(one, txid, at) for both, one, at in found if both)
        parts = []
        for protocol in PROTOCOLS:
            chosen = records["protocol"] == protocol
            some = records[chosen]
            of = priority if isinstance(priority, int) else priority[chosen]
            if len(some):
                outward = _values(some, OUTWARD, 0, txid, of)
                inward = _values(some, INWARD, INBOUND, txid, of)
                parts.append(self._deletes[protocol, False].fill(len(some), outward))
                parts.append(self._deletes[protocol, True].fill(len(some), inward))
        return b"".join(parts)

    def delete_cookies(self, cookies: Numbers, txid: int) -> bytes:
        """One flow-mod for each cookie (with its direction bit), for rules of which no more is known."""
        if not len(cookies):
            return b""
        return self._by_cookie.fill(len(cookies), {"cookie": cookies, "txid": txid})


def _values(
    records: Records,
    fields: Mapping[str, str],
    direction: int,
    txid: int,
    priority: Numbers | int,
    groups: Numbers | int = 0,
) -> dict[str, Numbers | int]:
    found: dict[str, Numbers | int] = {name: records[field] for name, field in fields.items()}
    found |= {"txid": txid, "cookie": records["id"] | np.uint64(direction)}
    found |= {"priority": priority, "group": groups}
    return found
