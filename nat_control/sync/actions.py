# SPDX-License-Identifier: Apache-2.0
"""The words of the sync protocol: its states, what comes in, what is to be done, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from nat_control.dataplane import Ids, NextHops, Records
from nat_control.sync import codec
from nat_control.sync.codec import Carried, Message

MAX_OUTSTANDING = 64  # batches that a side may leave unacknowledged


class State(Enum):
    STARTING = "starting"  # the data plane is not ready
    ALONE = "alone"  # no connection
    HANDSHAKE = "handshake"  # our Hello is sent
    EXCHANGING = "exchanging"  # InitState under way, in both directions
    OPERATIONAL = "operational"  # each side holds the other's sessions
    FAILED = "failed"  # the connection is given up, its end not yet seen


class Precedence(IntEnum):
    """Whose sessions stay where both sides have used one endpoint differently: told by Hello, the higher one's."""

    STANDS_BY = 0  # the peer carries
    CARRIES = 1  # as far as it knows
    DECIDES = 2  # it carries, and who does is its decision


class Mode(Enum):
    OFF = "off"
    ASYNCHRONOUS = "asynchronous"
    SYNCHRONOUS = "synchronous"  # output commit: a new session's packets wait until the peer holds it


class ErrorCode(IntEnum):
    PROTOCOL = 1  # this message has no place in this state
    MALFORMED = 2  # these bytes are no message
    EPOCH = 3  # of another connection
    RECORD = 4  # record size unlike ours
    INSTANCE = 5  # the peer has our own instance number
    POOLS = 6  # both would hand out the same external endpoints
    TIMEOUT = 7
    SLOW = 8  # more waits for the peer than may wait
    CONFLICTS = 9  # more contradictions than a message can name
    SLICES = 10  # the peer gives hosts other ports
    VERSION = 11  # the peer speaks another version of this protocol
    KIND = 12  # one is of a pair of servers, and the other is not its counterpart


class Input(Enum):
    PLANE_READY = "plane ready"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    EVENTS = "events"
    STATE_PAGE = "state page"
    PLANE_DONE = "plane done"
    DIGEST_TAKEN = "digest taken"
    BUCKETS_TAKEN = "buckets taken"
    FETCHED = "fetched"
    NEXT_HOPS = "next hops"
    HAND_OVER = "hand over"
    CARRIER = "carrier"
    ASK_FRONT = "ask front"
    FRONT_MOVED = "front moved"
    TELL_FRONT = "tell front"
    TICK = "tick"
    STOP = "stop"
    HELLO = "Hello"
    INIT_STATE = "InitState"
    READY = "Ready"
    INSTALL = "InstallEntries"
    UPDATE = "UpdateEntries"
    DELETE = "DeleteEntries"
    INSTALL_COMPLETE = "InstallComplete"
    DELETE_COMPLETE = "DeleteComplete"
    DIGEST = "Digest"
    ERROR = "Error"
    BYE = "Bye"
    NEXT_HOPS_KNOWN = "NextHopsKnown"
    PEER_HANDS_OVER = "HandOver"
    CARRIES = "Carries"
    BUCKET_ENTRIES = "BucketEntries"
    WANT_ENTRIES = "WantEntries"
    RESYNC = "Resync"
    OFFLOAD = "Offload"
    RECALL = "Recall"
    MOVED = "Moved"
    IN_FRONT = "InFront"


# -- actions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    epoch: int
    message: Message


@dataclass(frozen=True, slots=True)
class SendState:
    """Gather all sessions now and feed them to ``state_page`` with this txid, no faster than the peer reads."""

    txid: int


@dataclass(frozen=True, slots=True, eq=False)
class Install:
    """Of the records as ``prevailing`` gives them when their turn has come; then ``plane_done(op, ids of those refused)``."""

    op: int
    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class Delete:
    """Then ``plane_done(op)``."""

    op: int
    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """Their packets may leave now. Overtakes what else the plane was asked for."""

    records: Records


@dataclass(frozen=True, slots=True, eq=False)
class Learn:
    """Next hops that the peer knows."""

    next_hops: NextHops


@dataclass(frozen=True, slots=True)
class Carry:
    """The peer wants this instance, we or itself, to carry the traffic, lasting or not: see to it, then say by
    ``carrier`` who does, or why nothing came of it."""

    carrier: int
    lasting: bool


@dataclass(frozen=True, slots=True)
class CarrierTold:
    """Who carries, as the peer says. ``why`` nothing came of what we have asked for by ``hand_over``; "": it did, or we
    have not asked."""

    carrier: int
    lasting: bool
    why: str


@dataclass(frozen=True, slots=True)
class TakeOwnership:
    """The peer is lost: its sessions are ours, and every timer restarts in full."""


@dataclass(frozen=True, slots=True, eq=False)
class Cede:
    """Sessions with this instance in their id are the peer's again, but for the ids ``besides``."""

    instance: int
    besides: Ids


class Position(NamedTuple):
    """A point in the life of one connection."""

    epoch: int
    sent: int = 0  # the last txid of a change
    received: int = 0
    steps: int = 0  # of our own plane, those included that the peer was not told


@dataclass(frozen=True, slots=True, eq=False)
class TakeDigest:
    """Sum up all sessions but those of the ids ``besides``, and return ``digest_taken(at, buckets, count)``."""

    at: Position
    besides: Ids


@dataclass(frozen=True, slots=True, eq=False)
class TakeBuckets:
    """Gather all sessions in these buckets but those of the ids ``besides``; ``buckets_taken(at, buckets, records)``."""

    at: Position
    buckets: tuple[int, ...]
    besides: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Look for sessions with these ids, then ``fetched(op, those that are held)``."""

    op: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Mended:
    """Sessions that one side alone held: told to the peer, ended here because the peer, their owner, has ended them,
    and asked for."""

    told: Ids
    ended: Ids
    wanted: Ids


@dataclass(frozen=True, slots=True)
class Gap:
    """Changes of the peer never came, from one txid to another; it was asked to tell them again."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class DigestCompared:
    """Both sides at the same position; ``differing`` buckets, none when both hold the same."""

    differing: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Conflicts:
    """Sessions that could not be held beside others, ``here`` or at the peer."""

    ids: Ids
    here: bool


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Put these sessions in front of the peer, or leave them to it again; then ``front_moved(op, those in front, room)``."""

    op: int
    ids: Ids
    front: bool


@dataclass(frozen=True, slots=True, eq=False)
class FrontMoved:
    """Of those that we asked the peer to move by ``ask_front``, these are in front; it has room for so many more."""

    txid: int
    room: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class FrontSeen:
    """All that the peer carries in front of us, with packets of the last ``ms`` milliseconds; 0: not counted."""

    ms: int
    room: int
    carried: Carried


@dataclass(frozen=True, slots=True)
class Close:
    """End the connection once everything is sent; then ``disconnected``."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No connection comes about, for this reason; told when the reason is another one."""

    why: str


@dataclass(frozen=True, slots=True)
class StateChanged:
    before: State
    after: State
    why: str


Action = (
    Send
    | SendState
    | Install
    | Update
    | Delete
    | Commit
    | Learn
    | Carry
    | CarrierTold
    | TakeOwnership
    | Cede
    | TakeDigest
    | TakeBuckets
    | Fetch
    | DigestCompared
    | Mended
    | Gap
    | Conflicts
    | Move
    | FrontMoved
    | FrontSeen
    | Close
    | StateChanged
    | Unreachable
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Records, batches and seconds. None of them is agreed with the peer."""

    batch: int = 1024  # records in one message of changes
    window: int = 8  # batches sent and not acknowledged
    waiting: int = 65536  # records behind them; more, and the peer is given up as too slow
    handshake: float = 5.0  # from the connection to the peer's Hello
    exchange: float = 30.0  # without any progress of the exchange
    acknowledge: float = 10.0
    digest: float = 60.0  # between two digests; taken only when nothing is under way
    offer: float = 60.0  # between two offers of what the peer has refused

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= codec.MAX_RECORDS or not 1 <= self.window <= MAX_OUTSTANDING:
            raise ValueError("batch or window out of range")
