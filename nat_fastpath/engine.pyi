# SPDX-License-Identifier: Apache-2.0
"""The NAT core for Python: sessions, events and counters as numpy arrays, frames as bytes."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from nat_fastpath.core_config import CoreConfig

RECORD: np.dtype[np.void]  # struct nat_record: a session
EVENT: np.dtype[np.void]  # struct nat_event: sequence, time_ns, type, reason, and all fields of RECORD
NEIGHBOUR: np.dtype[np.void]  # struct nat_neighbour_record
HOST: np.dtype[np.void]  # struct nat_host_record
STEP: np.dtype[np.void]  # struct nat_step: one thing that was looked at on a packet's way
STEP_KINDS: tuple[str, ...]  # "session", "no_session", ..., indexed by STEP["kind"]
TRACE: np.dtype[np.void]  # struct nat_trace_entry: a packet of a flow under trace

class Verdict(IntEnum):
    """enum nat_verdict; member names are those of nat.h (``Verdict.DROP_NO_MAPPING``), see VERDICT_NAMES."""

    FORWARD = ...
    REPLY = ...
    FRAGMENT = ...
    HELD = ...
    CONSUMED = ...
    DROP_RUNT = ...
    # ... and so on; the runtime class has one member per line of NAT_VERDICTS

VERDICT_NAMES: tuple[str, ...]  # "forward", "reply", ..., indexed by Verdict
VERDICT_HELP: tuple[str, ...]  # one line on each
EVENT_OPEN: int
EVENT_CLOSE: int
EVENT_UPDATE: int
CLOSE_REASONS: Mapping[int, str]  # 1 "idle", 2 "command", 3 "hold timeout"
TCP_STATES: tuple[str, ...]  # "none", "syn_out", ..., indexed by RECORD["tcp_state"]
NEIGHBOUR_STATES: tuple[str, ...]
FLAG_PENDING: int
FLAG_FOREIGN: int
FLAG_INBOUND: int
FLAG_OFFLOAD: int
FLAG_PREVAILS: int
SLICE_ANY: int  # whoever receives such a frame does what is to be done
SLICE_ALL: int  # likewise, and all other cores get a copy (ARP)

class Result(NamedTuple):
    """What became of one packet. ``frame`` is the translated frame or the answer, empty when dropped or held.

    ``frames`` are those to be sent: none, ``frame``, or its fragments when it is longer than the MTU (FRAGMENT).
    HANDOFF: ``frame`` and ``handoff`` are for ``handed`` of another core, that of slice ``handoff & 0x1f``.
    """

    verdict: Verdict
    port: int
    frame: bytes
    frames: tuple[bytes, ...]
    handoff: int = 0

class Explanation(NamedTuple):
    """What would become of a packet. ``frame`` is what would leave, as far as it was given; empty when dropped.

    HANDOFF: the core of slice ``handoff & 0x1f`` goes on, asked with this ``frame`` and ``handoff``.
    """

    verdict: Verdict
    port: int
    frame: bytes
    mtu: int  # for FRAGMENT
    steps: np.ndarray[Any, np.dtype[np.void]]  # dtype STEP
    handoff: int = 0

class Trace(NamedTuple):
    """What a trace has seen since it was last read."""

    entries: np.ndarray[Any, np.dtype[np.void]]  # dtype TRACE
    running: bool
    packets: int  # that it still waits for
    missed: int  # that found no room, because nobody read

class CoreError(Exception):
    """The configuration or the memory does not allow a core; the message says why."""

class Posted:
    """A command that was given to the worker and is not waited for."""
    def result(self) -> int | None:
        """How many records were handled, or None as long as the worker has not come to it."""
    def wait(self) -> int:
        """How many records were handled, when they are. Raises TimeoutError when the worker does not answer, and
        nat_fastpath.errors.EventRingFull."""
    @property
    def records(self) -> np.ndarray[Any, np.dtype[np.void]]:
        """A copy of those given; of ``holds``, ``reserved0`` is 1 once it is done where the session is held."""

class Change:
    """Another configuration for a core, prepared: memory is taken, and nothing is changed yet."""

    @property
    def config(self) -> CoreConfig: ...
    def apply(self) -> None:
        """Puts it in force. Raises CoreError, and nothing is changed, when the core refuses it: an address that leaves the
        pool has mappings, or there is no room for next hops. Raises TimeoutError when the worker does not answer."""
    def reroute(self) -> int:
        """After ``apply``: sessions whose routes are others now go the new ways; returns how many did."""

class Core:
    """One NAT core, owned by the thread that calls it, until a worker takes it over with ``attach``."""

    def __init__(self, config: CoreConfig) -> None: ...
    @property
    def config(self) -> CoreConfig:
        """In force now."""
    @property
    def address(self) -> int:
        """The ``struct nat_core *`` as an integer, for a native worker. Keep the Core alive while it is used."""
    @staticmethod
    def api_address() -> int:
        """The ``const struct nat_api *`` as an integer."""
    # -- packets; raise RuntimeError while a worker is attached
    def burst(self, frames: Sequence[tuple[int, bytes]], now_ns: int) -> list[Result]:
        """Sends (port, frame) pairs through the core as one call; one Result each, in order."""
    def handed(self, frames: Sequence[tuple[int, bytes, int]], now_ns: int) -> list[Result]:
        """As ``burst``, for (port, frame, handoff) that another core had from a wire and has counted."""
    def poll(self, now_ns: int) -> bool: ...
    def settle(self, now_ns: int) -> None:
        """Polls until the ageing sweep has seen every session once at ``now_ns``."""
    def take(self) -> list[Result]:
        """Held packets that have a final verdict now."""
    def outbox(self) -> list[tuple[int, bytes]]:
        """(port, frame) pairs that the core itself wants sent."""
    def announce(self) -> None: ...
    # -- from any one other thread too
    def attach(self) -> None:
        """From now on a worker owns the core: commands go through the ring instead of being carried out at once."""
    def detach(self) -> None: ...
    def events(self, maximum: int = 65536) -> np.ndarray[Any, np.dtype[np.void]]:
        """Takes up to ``maximum`` events out of the ring; shape (n,), dtype EVENT."""
    def events_sleep(self) -> bool:
        """Before waiting for the worker's wake-up: true when there is nothing to take, and the next event wakes."""
    def sessions(
        self, cursor: int = 0, maximum: int = 4096
    ) -> tuple[np.ndarray[Any, np.dtype[np.void]], int]:
        """Up to ``maximum`` records and the cursor of the next page, 0 at the end.  A cursor names a slot, so
        paging is stable while sessions come and go. Raises TimeoutError when the worker does not answer."""
    def find(
        self, protocol: int, source: tuple[int, int], destination: tuple[int, int], side: str = "internal"
    ) -> Any:
        """The record of the session that a packet with this 5-tuple belongs to (numpy void), or None."""
    def install(self, records: np.ndarray[Any, np.dtype[np.void]]) -> int:
        """Returns how many are held now; one that was held under its id only takes the record's FLAG_FOREIGN."""
    def delete(self, records: np.ndarray[Any, np.dtype[np.void]]) -> int:
        """Ends the sessions of these records (by 5-tuple and id); returns how many there were.
        Raises nat_fastpath.errors.EventRingFull."""
    def commit(self, records: np.ndarray[Any, np.dtype[np.void]]) -> int: ...
    def post_commit(self, records: np.ndarray[Any, np.dtype[np.void]]) -> Posted:
        """As ``commit``, without waiting for the worker. Raises TimeoutError when it takes no more commands."""
    def post(self, what: str, records: np.ndarray[Any, np.dtype[np.void]]) -> Posted:
        """Begins ``what`` (install, delete, commit, update or holds) without waiting for the worker. Raises
        TimeoutError when it takes no more commands."""
    def adopt(self) -> int:
        """The peer's sessions become ours, and their timers restart; returns how many there were."""
    def cede(self, instance: int, besides: Sequence[int] | np.ndarray[Any, np.dtype[np.uint64]] = ()) -> int:
        """Sessions with this instance in their id become the peer's, which ages them from now on; how many.
        Those with the ids ``besides`` become ours."""
    def update(self, records: np.ndarray[Any, np.dtype[np.void]]) -> int:
        """TCP state, idle time and counters of the sessions that are held; returns how many were."""
    def holds(self, records: np.ndarray[Any, np.dtype[np.void]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each is held under its 5-tuple, external endpoint and id; shape (n,)."""
    def neighbours(self) -> np.ndarray[Any, np.dtype[np.void]]: ...
    def learn(self, neighbours: np.ndarray[Any, np.dtype[np.void]]) -> int:
        """Next hops that the peer knows, dtype NEIGHBOUR: the later confirmation counts. One with ``mac`` 0 is
        asked for. Returns how many were news."""
    def hosts(self) -> np.ndarray[Any, np.dtype[np.void]]: ...
    def prepare(self, config: CoreConfig) -> Change:
        """Another configuration, checked, with all memory that it takes. Ports (but for their MTU), modes and the sizes of
        tables must be those in force, epoch and seed stay. Raises CoreError with the reason."""
    def mappings_on(self, address: int) -> int:
        """How many mappings an address of the pool has, about now."""
    def explain(self, port: int, frame: bytes, length: int | None = None, handoff: int = 0) -> Explanation:
        """What would become of a frame that came by ``port`` now, and why; nothing is changed or sent. ``length`` is
        that of the whole frame, when only its beginning is given; ``handoff`` what another core's explanation says."""
    def trace_start(self, packets: int, seconds: float, **flow: int) -> int | None:
        """Traces the next packets of a flow (protocol, internal_addr, internal_port, external_..., remote_...; what
        is left out or 0 may be any). Returns a token, or None when another trace runs."""
    def trace_read(self, token: int, stop: bool = False) -> Trace:
        """Takes what has been traced; ``stop`` ends the trace. Raises KeyError when another one has begun."""
    def verdicts(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Packets by verdict; shape (len(Verdict),)."""
    def counters(self) -> dict[str, int]:
        """All other counters and gauges by name: rx_packets.0, tx_bytes.1, sessions, mappings, ..."""
    def memory(self) -> dict[str, int]:
        """Bytes by part: sessions, index, mappings, hosts, pool, other, total."""
    def close(self) -> None: ...

def slice_of_hosts(addresses: Any, n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The slice of each inside address among ``n`` (core/slices.h); the shape of ``addresses``."""

def slice_of_ports(ports: Any, n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The slice of each external port among ``n``; the shape of ``ports``."""

def hash_path() -> str:
    """The code that hashes on this CPU: "avx512", "avx2" or "baseline"."""

def slice_of(frame: bytes, side: str, n_slices: int) -> int:
    """Whose packet a frame from a wire is, of ``n_slices`` cores: a slice, SLICE_ANY or SLICE_ALL."""

def memory_for(config: CoreConfig) -> dict[str, int]:
    """What ``Core(config)`` would take, in bytes, without taking it."""
