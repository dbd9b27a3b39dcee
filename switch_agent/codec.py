# SPDX-License-Identifier: Apache-2.0
"""OpenFlow 1.3 bytes to switch events: pure, fed with any split of the stream (thesis table 7.1).

Everything that comes often is read by its fixed offsets; nothing in here needs an OpenFlow library. A message
that is truncated, too short for what it says, of another version or of a kind that a switch does not send
raises ProtocolError, and the connection is worth nothing from there on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION = 4
HEADER = struct.Struct("!BBHI")  # version, type, length, xid
INVALID_TTL = 2  # OFPR_INVALID_TTL
NO_BUFFER = 0xFFFFFFFF
CONTROLLER_PORT = 0xFFFFFFFD  # OFPP_CONTROLLER
TABLE_PORT = 0xFFFFFFF9  # OFPP_TABLE: through the rules

HELLO, ERROR, ECHO_REQUEST, ECHO_REPLY, EXPERIMENTER = 0, 1, 2, 3, 4
FEATURES_REPLY, PACKET_IN, FLOW_REMOVED, PORT_STATUS = 6, 10, 11, 12
PACKET_OUT, FLOW_MOD, MULTIPART_REPLY, BARRIER_REQUEST, BARRIER_REPLY = 13, 14, 19, 20, 21
IGNORED = {ECHO_REPLY, EXPERIMENTER, 8, 23, 25, 27}  # answers to what we do not ask
FLOW_STATISTICS, GROUP_DESCRIPTIONS, PORT_DESCRIPTIONS = 1, 7, 13  # kinds of multipart messages

_PACKET_IN = struct.Struct("!IHBBQHH")  # buffer, total length, reason, table, cookie, match type and length
_MATCH = 16  # where the match of a packet-in begins, its type and length included
_FLOW_REMOVED = struct.Struct("!QHBBIIHHQQ")
_PORT = struct.Struct("!I4x6s2x16sII24x")
_IN_PORT = 0x80000004  # OXM header
_PACKET_OUT = struct.Struct("!BBHIIIH6x")
_OUTPUT, _GROUP = struct.Struct("!HHIH6x"), struct.Struct("!HHI")

# One flow of a statistics reply. ``group`` is that of its last action, 0 without.
FLOW_STAT = np.dtype(
    [
        ("cookie", "<u8"),
        ("packets", "<u8"),
        ("bytes", "<u8"),
        ("duration_s", "<u4"),
        ("group", "<u4"),
        ("priority", "<u2"),
    ]
)
_FLOW_FIXED = np.dtype(
    {
        "names": ["length", "duration_s", "priority", "cookie", "packets", "bytes"],
        "formats": [">u2", ">u4", ">u2", ">u8", ">u8", ">u8"],
        "offsets": [0, 4, 12, 24, 32, 40],
        "itemsize": 48,
    }
)
ENTRY_FIXED = _FLOW_FIXED.itemsize  # bytes before a flow's match
_GROUP_ACTION = 0x0016_0008


class ProtocolError(Exception):
    """One line: how the switch broke the protocol."""


@dataclass(frozen=True, slots=True)
class PortDescription:
    number: int
    name: str
    mac: bytes
    up: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """A switch is connected, its identity checked, and it has taken our settings."""

    datapath_id: int
    tables: int
    ports: tuple[PortDescription, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection ended; what was outstanding has failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class TransactionComplete:
    """The switch has done all that was sent under this transaction id (32 bits), or said why not."""

    txid: int


@dataclass(frozen=True, slots=True)
class Error:
    """The switch refused a message. ``cookie`` is that of the flow-mod that it quotes, if it does."""

    txid: int
    type: int
    code: int
    text: str
    cookie: int | None = None


@dataclass(frozen=True, slots=True)
class FlowTimeout:
    """A flow ended by itself; ``reason`` is OFPRR_*, ``duration_s`` seconds that it lived."""

    cookie: int
    reason: int
    duration_s: int
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PacketIn:
    """A packet for the agent. ``reason`` is OFPR_* (1 action, 2 invalid TTL); ``cookie`` that of its rule."""

    in_port: int
    frame: bytes
    reason: int
    cookie: int


@dataclass(frozen=True, slots=True)
class PortStatus:
    """``reason`` is OFPPR_*: 0 added, 1 deleted, 2 modified."""

    port: PortDescription
    reason: int


@dataclass(frozen=True, slots=True)
class Hello:
    pass


@dataclass(frozen=True, slots=True)
class Echo:
    """An echo request; to be answered with the same body."""

    xid: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Features:
    datapath_id: int
    tables: int


@dataclass(frozen=True, slots=True)
class Multipart:
    """A part of an answer in parts; ``more`` says that this is not the last."""

    txid: int
    kind: int
    more: bool
    body: bytes


Event = (
    Ready
    | Lost
    | TransactionComplete
    | Error
    | FlowTimeout
    | PacketIn
    | PortStatus
    | Hello
    | Echo
    | Features
    | Multipart
)
Name = Callable[[int, int], str]  # error type and code → text


class Decoder:
    """Bytes in, events out; holds at most one incomplete message (64 KiB)."""

    def __init__(self, error_name: Name = lambda kind, code: f"error {kind}/{code}") -> None:
        self._rest = b""
        self._error_name = error_name

    def feed(self, data: bytes) -> list[Event]:
        """The events of all messages that are complete now. Raises ProtocolError."""
        if self._rest:
            data = self._rest + data
        events: list[Event] = []
        at, end = 0, len(data)
        while end - at >= 8:
            version, kind, length, xid = HEADER.unpack_from(data, at)
            if length < 8:
                raise ProtocolError(f"a message of type {kind} says that it has {length} bytes")
            if version != VERSION and kind != HELLO:
                raise ProtocolError(f"a message of OpenFlow version {version:#x}; 0x4 (1.3) was agreed")
            if end - at < length:
                break
            body = data[at + 8 : at + length]
            try:
                event = self._decode(version, kind, xid, body)
            except (struct.error, IndexError):
                raise ProtocolError(f"a message of type {kind} ends after {length} bytes") from None
            if event is not None:
                events.append(event)
            at += length
        self._rest = data[at:]
        return events

    def _decode(self, version: int, kind: int, xid: int, body: bytes) -> Event | None:
        if kind == PACKET_IN:
            return _packet_in(body)
        if kind == BARRIER_REPLY:
            return TransactionComplete(xid)
        if kind == FLOW_REMOVED:
            cookie, _, reason, _, seconds, _, _, _, packets, octets = _FLOW_REMOVED.unpack_from(body)
            return FlowTimeout(cookie, reason, seconds, packets, octets)
        if kind == ECHO_REQUEST:
            return Echo(xid, body)
        if kind == ERROR:
            what, code = struct.unpack_from("!HH", body)
            quoted = body[4:]
            cookie = None
            if len(quoted) >= 16 and quoted[1] == FLOW_MOD:
                cookie = int.from_bytes(quoted[8:16], "big")
            return Error(xid, what, code, self._error_name(what, code), cookie)
        if kind == MULTIPART_REPLY:
            what, flags = struct.unpack_from("!HH4x", body)
            return Multipart(xid, what, bool(flags & 1), body[8:])
        if kind == PORT_STATUS:
            return PortStatus(_port(body, 8), body[0])
        if kind == FEATURES_REPLY:
            datapath_id, _, tables = struct.unpack_from("!QIB11x", body)
            return Features(datapath_id, tables)
        if kind == HELLO:
            _check_hello(version, body)
            return Hello()
        if kind in IGNORED:
            return None
        raise ProtocolError(f"a message of type {kind}, which switches do not send")


def _check_hello(version: int, body: bytes) -> None:
    at = 0
    while at + 4 <= len(body):
        kind, length = struct.unpack_from("!HH", body, at)
        if length < 4 or at + length > len(body):
            raise ProtocolError("a hello with an element that goes beyond its end")
        if kind == 1 and length >= 8:  # a bitmap of versions
            if not struct.unpack_from("!I", body, at + 4)[0] >> VERSION & 1:
                raise ProtocolError("the switch does not speak OpenFlow 1.3")
            return
        at += (length + 7) // 8 * 8
    if version < VERSION:
        raise ProtocolError(f"the switch speaks OpenFlow version {version:#x} at most; 0x4 (1.3) is needed")


def _packet_in(body: bytes) -> PacketIn:
    _, _, reason, _, cookie, _, length = _PACKET_IN.unpack_from(body)
    at, end = _PACKET_IN.size, _MATCH + length
    frame = _MATCH + (length + 7) // 8 * 8 + 2
    if length < 4 or frame > len(body):
        raise ProtocolError("a packet-in whose match goes beyond its end")
    while at + 4 <= end:
        (header,) = struct.unpack_from("!I", body, at)
        if header == _IN_PORT and at + 8 <= end:
            return PacketIn(struct.unpack_from("!I", body, at + 4)[0], body[frame:], reason, cookie)
        at += 4 + (header & 0xFF)
    raise ProtocolError("a packet-in that does not say where the packet came in")


def _port(body: bytes, at: int) -> PortDescription:
    number, mac, name, config, state = _PORT.unpack_from(body, at)
    up = not config & 1 and not state & 1  # OFPPC_PORT_DOWN, OFPPS_LINK_DOWN
    return PortDescription(number, name.split(b"\0")[0].decode("ascii", "replace"), mac, up)


def ports(body: bytes) -> list[PortDescription]:
    """The ports of one part of a port description. Raises ProtocolError."""
    if len(body) % _PORT.size:
        raise ProtocolError("a port description that ends within a port")
    return [_port(body, at) for at in range(0, len(body), _PORT.size)]


def flow_statistics(body: bytes) -> np.ndarray[Any, np.dtype[np.void]]:
    """The flows of one part of a statistics reply; shape (n,), dtype FLOW_STAT. Raises ProtocolError."""
    starts, ends = entry_bounds(body)
    found = np.zeros(len(starts), FLOW_STAT)
    if not len(starts):
        return found
    raw = np.frombuffer(body, np.uint8)
    fixed = raw[starts[:, None] + np.arange(_FLOW_FIXED.itemsize)].view(_FLOW_FIXED)[:, 0]
    for name in ("cookie", "packets", "bytes", "duration_s", "priority"):
        found[name] = fixed[name]
    tail = np.ascontiguousarray(raw[ends[:, None] + np.arange(-8, 0)]).view(">u4")
    found["group"] = np.where(tail[:, 0] == _GROUP_ACTION, tail[:, 1], 0)
    return found


def entry_bounds(
    body: bytes,
) -> tuple[np.ndarray[Any, np.dtype[np.intp]], np.ndarray[Any, np.dtype[np.intp]]]:
    """Where each entry begins and ends. Entries are mostly of one length, which needs no look at each. Raises ProtocolError."""
    least = _FLOW_FIXED.itemsize + 8
    if not body:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    first = int.from_bytes(body[:2], "big")
    if first >= least and len(body) % first == 0:
        entries = np.frombuffer(body, np.uint8).reshape(-1, first)
        if (np.ascontiguousarray(entries[:, :2]).view(">u2") == first).all():
            starts = np.arange(0, len(body), first, dtype=np.intp)
            return starts, starts + first
    starts_list = []
    at = 0
    while at < len(body):
        length = int.from_bytes(body[at : at + 2], "big")
        if length < least or at + length > len(body):
            raise ProtocolError("flow statistics that end within a flow")
        starts_list.append(at)
        at += length
    starts = np.array(starts_list, np.intp)
    return starts, np.append(starts[1:], len(body))


# -- what is sent often ------------------------------------------------------------------------------------


def barrier(txid: int) -> bytes:
    return HEADER.pack(VERSION, BARRIER_REQUEST, 8, txid)


def echo(kind: int, xid: int, body: bytes = b"") -> bytes:
    return HEADER.pack(VERSION, kind, 8 + len(body), xid) + body


def packet_out(
    frame: bytes, *, port: int = 0, group: int = 0, in_port: int = CONTROLLER_PORT, txid: int = 0
) -> bytes:
    """A frame to a port, or through a next-hop group; as if it had come in at ``in_port``."""
    action = _GROUP.pack(22, 8, group) if group else _OUTPUT.pack(0, 16, port, 0)
    length = _PACKET_OUT.size + len(action) + len(frame)
    if length > 0xFFFF:
        raise ValueError(f"a frame of {len(frame)} bytes is too long for OpenFlow")
    head = _PACKET_OUT.pack(VERSION, PACKET_OUT, length, txid, NO_BUFFER, in_port, len(action))
    return b"".join((head, action, frame))


def messages(data: bytes) -> Sequence[tuple[int, int, int]]:
    """Type, offset and length of each message in ``data``; for tests and for checks of prepared bytes."""
    found = []
    at = 0
    while at + 8 <= len(data):
        _, kind, length, _ = HEADER.unpack_from(data, at)
        found.append((kind, at, length))
        at += max(length, 8)
    return found
