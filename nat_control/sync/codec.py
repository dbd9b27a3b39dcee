# SPDX-License-Identifier: Apache-2.0
"""The sync protocol's messages (thesis, table 7.3, in batches) and their bytes.

Little-endian. A header of 12 bytes, then the payload:

    magic u16 0x4e54 | version u8 | type u8 | epoch u32 | payload length u32

``epoch`` is that of the sender's Hello on this connection. Records are struct nat_record as it is, next hops struct
nat_neighbour_record.
Every length is checked before anything is read or kept by it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, NamedTuple

import numpy as np

from nat_control.dataplane import NO_IDS, Ids, NextHops, Records
from nat_fastpath.engine import NEIGHBOUR, RECORD

VERSION = 4
MAGIC = 0x4E54  # "TN"
HEADER = struct.Struct("<HBBII")
MAX_PAYLOAD = 1 << 20
MAX_POOLS = 256
MAX_TEXT = 1024
BUCKETS = 256  # of a digest
MAX_RECORDS = (MAX_PAYLOAD - 16) // RECORD.itemsize  # in one message
MAX_NEXT_HOPS = MAX_PAYLOAD // NEIGHBOUR.itemsize
ENTRY = np.dtype([("id", "<u8"), ("hash", "<u8")])  # a session, and the digest's hash of it
_BUCKET_BYTES = BUCKETS // 8
MAX_ENTRIES = (MAX_PAYLOAD - 8 - _BUCKET_BYTES) // ENTRY.itemsize

CARRIED = np.dtype([("id", "<u8"), ("packets", "<u8")])  # a session in front, and what it has carried
MAX_FRONT = (MAX_PAYLOAD - 8) // CARRIED.itemsize  # sessions in front that one report can tell

NO_KEY = bytes(16)

Buckets = np.ndarray[Any, np.dtype[np.uint64]]
Entries = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), dtype ENTRY
Carried = np.ndarray[Any, np.dtype[np.void]]  # shape (n,), dtype CARRIED


class CodecError(Exception):
    """These bytes are no message of this protocol, or this message cannot become bytes; one line."""


class VersionError(CodecError):
    """The peer speaks another version of this protocol."""


class PoolRange(NamedTuple):
    """External endpoints that a side may hand out; all four inclusive, addresses as integers."""

    first: int
    last: int
    port_first: int
    port_last: int

    def overlap(self, other: PoolRange) -> PoolRange | None:
        """What both have."""
        both = PoolRange(
            max(self.first, other.first),
            min(self.last, other.last),
            max(self.port_first, other.port_first),
            min(self.port_last, other.port_last),
        )
        return both if both.first <= both.last and both.port_first <= both.port_last else None

    def __str__(self) -> str:
        addresses = str(IPv4Address(self.first))
        if self.last != self.first:
            addresses += f"-{IPv4Address(self.last)}"
        return f"{addresses} ports {self.port_first}-{self.port_last}"


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of both. ``pools`` are the sender's own sets, ``term`` counts takeovers, ``slices`` those of
    hosts and ports, which say what port a host may get. ``precedence`` (``actions.Precedence``), then ``term``, then the
    lower number say whose sessions stay where two contradict each other. ``kind``: 0 half of a pair with a switch, 1 the
    primary of two servers, 2 the secondary.

    ``heartbeat_key`` (16 bytes) is zeros without TLS; else that of the side that listens is used by both.
    """

    instance: int
    epoch: int
    term: int
    pools: tuple[PoolRange, ...]
    record_size: int = RECORD.itemsize
    heartbeat_key: bytes = NO_KEY
    slices: int = 1
    precedence: int = 1
    kind: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class InitState:
    """Part ``chunk`` (from 0, without a gap) of all sessions of the sender."""

    txid: int
    chunk: int
    last: bool
    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """The InitState of this txid is held, but for the sessions ``refused``, which contradict others."""

    txid: int
    refused: Ids = field(default_factory=lambda: NO_IDS)


@dataclass(frozen=True, slots=True, eq=False)
class InstallEntries:
    txid: int
    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class UpdateEntries:
    """TCP states, times and counters; not acknowledged."""

    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class DeleteEntries:
    txid: int
    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class InstallComplete:
    """The batch is held by the sender's data plane, but for the sessions ``refused``."""

    txid: int
    refused: Ids = field(default_factory=lambda: NO_IDS)


@dataclass(frozen=True, slots=True)
class DeleteComplete:
    txid: int


@dataclass(frozen=True, slots=True, eq=False)
class Digest:
    """Sums over the sender's sessions, ``count`` of them, when the last change that it had received was ``position``;
    shape (BUCKETS,) uint64. Those that the receiver refused are left out."""

    position: int
    buckets: Buckets
    count: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class BucketEntries:
    """The answer to a Digest: all sessions of the sender in these buckets, which differ; no bucket: all are equal."""

    position: int
    buckets: tuple[int, ...] = ()
    entries: Entries = field(default_factory=lambda: np.empty(0, ENTRY))


@dataclass(frozen=True, slots=True, eq=False)
class WantEntries:
    """The sender lacks these sessions: whoever owns them tells them again, or ends them where the sender does."""

    ids: Ids


@dataclass(frozen=True, slots=True)
class Resync:
    """Changes of the txids from ``first`` to ``last`` never came."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Error:
    code: int
    text: str


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender leaves on purpose."""


@dataclass(frozen=True, slots=True, eq=False)
class NextHopsKnown:
    """MACs of the sender's next hops, each with the age of its last confirmation; not acknowledged."""

    next_hops: NextHops


@dataclass(frozen=True, slots=True)
class HandOver:
    """``carrier``, one of the two instances, shall carry the traffic from now on; ``lasting``: until one of them is asked
    for something else, whatever happens to the connection."""

    carrier: int
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Carries:
    """``carrier`` carries the traffic, and keeps it if ``lasting``; told when that changes, and in answer to HandOver.
    ``why`` nothing came of what was asked; "": it did."""

    carrier: int
    lasting: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Offload:
    """The receiver's switch shall carry these sessions in front of the sender."""

    txid: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Recall:
    """It shall leave these to the sender again."""

    txid: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """The answer to both: those named that are in front now; ``room`` for so many more."""

    txid: int
    room: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class InFront:
    """All sessions that the sender's switch carries in front of the receiver, with their packets in the last ``ms``
    milliseconds; ``ms`` 0: not counted."""

    ms: int
    room: int
    carried: Carried


Message = (
    Hello
    | InitState
    | Ready
    | InstallEntries
    | UpdateEntries
    | DeleteEntries
    | InstallComplete
    | DeleteComplete
    | Digest
    | Error
    | Bye
    | NextHopsKnown
    | HandOver
    | Carries
    | BucketEntries
    | WantEntries
    | Resync
    | Offload
    | Recall
    | Moved
    | InFront
)

# record size, instance, slices, term, number of ranges, precedence, kind, key of heartbeats
_HELLO = struct.Struct("<HBBIHBB16s")
_RANGE = struct.Struct("<IIHH")
_INIT = struct.Struct("<QIB3x")  # txid, chunk, last
_U64 = struct.Struct("<Q")
_TWO = struct.Struct("<QQ")
_CODE = struct.Struct("<H")
_CARRIER = struct.Struct("<BB")  # instance, lasting
_MOVED = struct.Struct("<QI4x")  # txid, room
_FRONT = struct.Struct("<II")  # milliseconds, room


# -- fields -----------------------------------------------------------------------------------------------


def _bytes_of(records: Records | NextHops | Entries | Carried, layout: np.dtype[np.void] = RECORD) -> bytes:
    if records.dtype != layout:
        raise CodecError(f"records of {records.dtype.itemsize} bytes are not those of this version")
    return records.tobytes()


def _records(payload: memoryview, layout: np.dtype[np.void] = RECORD) -> Records:
    if len(payload) % layout.itemsize:
        raise CodecError(f"{len(payload)} bytes are no whole number of {layout.itemsize}-byte records")
    return np.frombuffer(payload, layout)


def _ids(payload: memoryview) -> Ids:
    if len(payload) % 8:
        raise CodecError(f"{len(payload)} bytes are no whole number of session ids")
    return np.frombuffer(payload, "<u8")


def _head(layout: struct.Struct, payload: memoryview) -> tuple[Any, ...]:
    if len(payload) < layout.size:
        raise CodecError(f"the payload has {len(payload)} bytes and needs {layout.size} at least")
    return layout.unpack_from(payload)


def _exactly(payload: memoryview, size: int) -> None:
    if len(payload) != size:
        raise CodecError(f"the payload has {len(payload)} bytes instead of {size}")


# -- each message, from and to its payload -----------------------------------------------------------------


def _write_hello(m: Hello) -> bytes:
    if len(m.pools) > MAX_POOLS:
        raise CodecError(f"{len(m.pools)} address ranges, and {MAX_POOLS} at most fit a hello")
    whose = (m.precedence, m.kind, m.heartbeat_key)
    head = _HELLO.pack(m.record_size, m.instance, m.slices, m.term, len(m.pools), *whose)
    return head + b"".join(_RANGE.pack(*pool) for pool in m.pools)


def _read_hello(payload: memoryview, epoch: int) -> Hello:
    size, instance, slices, term, count, precedence, kind, key = _head(_HELLO, payload)
    if count > MAX_POOLS:
        raise CodecError(f"hello with {count} address ranges, {MAX_POOLS} at most")
    _exactly(payload, _HELLO.size + count * _RANGE.size)
    pools = tuple(PoolRange(*pool) for pool in _RANGE.iter_unpack(payload[_HELLO.size :]))
    for pool in pools:
        if pool.first > pool.last or pool.port_first > pool.port_last:
            raise CodecError(f"hello with an empty range: {pool}")
    return Hello(instance, epoch, term, pools, size, key, slices, precedence, kind)


def _read_init(payload: memoryview, epoch: int) -> InitState:
    txid, chunk, last = _head(_INIT, payload)
    if last > 1:
        raise CodecError(f"the last flag is {last}")
    return InitState(txid, chunk, last == 1, _records(payload[_INIT.size :]))


def _read_delete_complete(payload: memoryview, epoch: int) -> DeleteComplete:
    _exactly(payload, _U64.size)
    return DeleteComplete(*_U64.unpack(payload))


def _read_digest(payload: memoryview, epoch: int) -> Digest:
    _exactly(payload, _TWO.size + _U64.size * BUCKETS)
    position, count = _TWO.unpack_from(payload)
    return Digest(position, _ids(payload[_TWO.size :]), count)


def _write_buckets(m: BucketEntries) -> bytes:
    chosen = sum(1 << bucket for bucket in m.buckets)
    return _U64.pack(m.position) + chosen.to_bytes(_BUCKET_BYTES, "little") + _bytes_of(m.entries, ENTRY)


def _read_buckets(payload: memoryview, epoch: int) -> BucketEntries:
    (position,) = _head(_U64, payload)
    if len(payload) < _U64.size + _BUCKET_BYTES:
        raise CodecError(
            f"the payload has {len(payload)} bytes and needs {_U64.size + _BUCKET_BYTES} at least"
        )
    chosen = int.from_bytes(payload[_U64.size : _U64.size + _BUCKET_BYTES], "little")
    buckets = tuple(bucket for bucket in range(BUCKETS) if chosen >> bucket & 1)
    return BucketEntries(position, buckets, _records(payload[_U64.size + _BUCKET_BYTES :], ENTRY))


def _read_resync(payload: memoryview, epoch: int) -> Resync:
    _exactly(payload, _TWO.size)
    return Resync(*_TWO.unpack(payload))


def _write_text(text: str) -> bytes:
    # Cut by bytes, and a character that this halves goes whole.
    return text.encode()[:MAX_TEXT].decode(errors="ignore").encode()


def _read_text(payload: memoryview) -> str:
    if len(payload) > MAX_TEXT:
        raise CodecError(f"a text of {len(payload)} bytes, {MAX_TEXT} at most")
    return bytes(payload).decode(errors="replace")


def _read_error(payload: memoryview, epoch: int) -> Error:
    (code,) = _head(_CODE, payload)
    return Error(code, _read_text(payload[_CODE.size :]))


def _write_hand_over(m: HandOver | Carries) -> bytes:
    return _CARRIER.pack(m.carrier, m.lasting)


def _read_carrier(payload: memoryview) -> tuple[int, bool]:
    carrier, lasting = _head(_CARRIER, payload)
    if lasting > 1:
        raise CodecError(f"the lasting flag is {lasting}")
    return carrier, lasting == 1


def _read_hand_over(payload: memoryview, epoch: int) -> HandOver:
    _exactly(payload, _CARRIER.size)
    return HandOver(*_read_carrier(payload))


def _read_carries(payload: memoryview, epoch: int) -> Carries:
    return Carries(*_read_carrier(payload), _read_text(payload[_CARRIER.size :]))


def _nothing(kind: Callable[[], Any]) -> Callable[[memoryview, int], Any]:
    def read(payload: memoryview, epoch: int) -> Any:
        _exactly(payload, 0)
        return kind()

    return read


def _txid_records(kind: Callable[[int, Records], Any]) -> Callable[[memoryview, int], Any]:
    return lambda payload, epoch: kind(_head(_U64, payload)[0], _records(payload[_U64.size :]))


def _txid_ids(kind: Callable[[int, Ids], Any]) -> Callable[[memoryview, int], Any]:
    return lambda payload, epoch: kind(_head(_U64, payload)[0], _ids(payload[_U64.size :]))


class _Layout(NamedTuple):
    number: int
    write: Callable[[Any], bytes]
    read: Callable[[memoryview, int], Any]


def _write_txid_records(m: InstallEntries | DeleteEntries) -> bytes:
    return _U64.pack(m.txid) + _bytes_of(m.records)


def _write_txid_ids(m: Ready | InstallComplete) -> bytes:
    return _U64.pack(m.txid) + m.refused.astype("<u8").tobytes()


def _write_move(m: Offload | Recall) -> bytes:
    return _U64.pack(m.txid) + m.ids.astype("<u8").tobytes()


def _read_moved(payload: memoryview, epoch: int) -> Moved:
    txid, room = _head(_MOVED, payload)
    return Moved(txid, room, _ids(payload[_MOVED.size :]))


def _read_in_front(payload: memoryview, epoch: int) -> InFront:
    ms, room = _head(_FRONT, payload)
    return InFront(ms, room, _records(payload[_FRONT.size :], CARRIED))


LAYOUTS: Mapping[type, _Layout] = {
    Hello: _Layout(1, _write_hello, _read_hello),
    InitState: _Layout(2, lambda m: _INIT.pack(m.txid, m.chunk, m.last) + _bytes_of(m.records), _read_init),
    Ready: _Layout(3, _write_txid_ids, _txid_ids(Ready)),
    InstallEntries: _Layout(4, _write_txid_records, _txid_records(InstallEntries)),
    UpdateEntries: _Layout(
        5, lambda m: _bytes_of(m.records), lambda payload, epoch: UpdateEntries(_records(payload))
    ),
    DeleteEntries: _Layout(6, _write_txid_records, _txid_records(DeleteEntries)),
    InstallComplete: _Layout(7, _write_txid_ids, _txid_ids(InstallComplete)),
    DeleteComplete: _Layout(8, lambda m: _U64.pack(m.txid), _read_delete_complete),
    Digest: _Layout(
        9, lambda m: _TWO.pack(m.position, m.count) + m.buckets.astype("<u8").tobytes(), _read_digest
    ),
    Error: _Layout(10, lambda m: _CODE.pack(m.code) + _write_text(m.text), _read_error),
    Bye: _Layout(11, lambda m: b"", _nothing(Bye)),
    NextHopsKnown: _Layout(
        12,
        lambda m: _bytes_of(m.next_hops, NEIGHBOUR),
        lambda payload, epoch: NextHopsKnown(_records(payload, NEIGHBOUR)),
    ),
    HandOver: _Layout(13, _write_hand_over, _read_hand_over),
    Carries: _Layout(14, lambda m: _write_hand_over(m) + _write_text(m.why), _read_carries),
    BucketEntries: _Layout(15, _write_buckets, _read_buckets),
    WantEntries: _Layout(
        16, lambda m: m.ids.astype("<u8").tobytes(), lambda payload, epoch: WantEntries(_ids(payload))
    ),
    Resync: _Layout(17, lambda m: _TWO.pack(m.first, m.last), _read_resync),
    Offload: _Layout(18, _write_move, _txid_ids(Offload)),
    Recall: _Layout(19, _write_move, _txid_ids(Recall)),
    Moved: _Layout(20, lambda m: _MOVED.pack(m.txid, m.room) + m.ids.astype("<u8").tobytes(), _read_moved),
    InFront: _Layout(21, lambda m: _FRONT.pack(m.ms, m.room) + _bytes_of(m.carried, CARRIED), _read_in_front),
}
_BY_NUMBER = {layout.number: layout for layout in LAYOUTS.values()}


def encode(message: Message, epoch: int) -> bytes:
    """One message of a connection with this epoch (32 bits). Raises CodecError when it cannot be sent."""
    layout = LAYOUTS[type(message)]
    try:
        payload = layout.write(message)
        header = HEADER.pack(MAGIC, VERSION, layout.number, epoch, len(payload))
    except struct.error as error:
        raise CodecError(f"{type(message).__name__}: {error}") from None
    if len(payload) > MAX_PAYLOAD:
        raise CodecError(f"{type(message).__name__} of {len(payload)} bytes, {MAX_PAYLOAD} at most")
    return header + payload


class Received(NamedTuple):
    """A message with the epoch that stood in its header."""

    epoch: int
    message: Message


class Decoder:
    """Bytes in, however they are split; messages out. Keeps one unfinished message at most."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._failed = False

    @property
    def kept(self) -> int:
        """Bytes of the unfinished message."""
        return len(self._kept)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Received]:
        """The messages that are complete now; take them all before the next call.

        Raises CodecError for what is none. The stream cannot be followed after that: any further call raises.
        """
        if self._failed:
            raise CodecError("the stream is broken already")
        try:
            yield from self._messages(memoryview(data))
        except CodecError:
            self._failed = True
            self._kept.clear()
            raise

    def end(self) -> None:
        """The stream is over. Raises CodecError when that cuts a message."""
        if self._kept:
            raise CodecError(f"the stream ends {len(self._kept)} bytes into a message")

    def _messages(self, data: memoryview) -> Iterator[Received]:
        at = 0
        while at < len(data) or len(self._kept) >= HEADER.size:
            if len(self._kept) < HEADER.size:
                at += self._keep(data[at:], HEADER.size - len(self._kept))
                if len(self._kept) < HEADER.size:
                    return
            layout, epoch, length = _header(self._kept)
            at += self._keep(data[at:], HEADER.size + length - len(self._kept))
            if len(self._kept) < HEADER.size + length:
                return
            # A copy of its own: records stay views of it after the buffer has moved on.
            payload = memoryview(bytes(self._kept))[HEADER.size :]
            self._kept.clear()
            yield Received(epoch, layout.read(payload, epoch))

    def _keep(self, data: memoryview, wanted: int) -> int:
        part = data[:wanted]
        self._kept += part
        return len(part)


def _header(data: bytearray) -> tuple[_Layout, int, int]:
    magic, version, number, epoch, length = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise CodecError(f"magic {magic:#06x}: this is not the sync protocol")
    if version != VERSION:
        raise VersionError(
            f"the peer speaks version {version} of the sync protocol and we {VERSION}: sessions are not exchanged until "
            "both run the same release (docs/upgrade.md)"
        )
    if length > MAX_PAYLOAD:
        raise CodecError(f"a message of {length} bytes, {MAX_PAYLOAD} at most")
    if number not in _BY_NUMBER:
        raise CodecError(f"unknown message type {number}")
    return _BY_NUMBER[number], epoch, length
