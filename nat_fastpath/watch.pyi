# SPDX-License-Identifier: Apache-2.0
"""Failure detection for Python: the heartbeat thread, and the holder that lets sockets close at once.

The threads (heartbeat.c) run without Python's lock. Times are nanoseconds of CLOCK_MONOTONIC.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

MAX_PREPARED: int  # bytes that may be prepared: 65 536
MAX_COUNTERS: int  # loop counters of one Watch: 64

Reason = Literal["silence", "stalled worker", "TCP end", "link down"]

class Watch:
    """Sends heartbeats to a peer, judges the peer's, and writes prepared bytes when the peer dies.

    A peer is dead, while the watch is armed and the peer has not said that it leaves, when

    - ``misses`` heartbeats in a row are missing ("silence"): the last came 1/4 + ``misses`` intervals ago, and we were
      awake to see it. Silence is judged once the peer has answered us, not before.
    - ``misses`` heartbeats in a row say that a worker of the peer stands still ("stalled worker");
    - a watched TCP connection has ended, by FIN or by RST ("TCP end");
    - a watched link has gone down ("link down"): the peer may live, and is as far away.
    """

    def __init__(
        self,
        listen: int | tuple[str, int],
        peer: tuple[str, int] | None,
        key: bytes,
        *,
        instance: int,
        epoch: int,
        interval_ms: float = 2.0,
        misses: int = 3,
        patience_ms: float | None = None,
        counters: Sequence[int] = (),
        peer_instance: int | None = None,
        tcp_fd: int | None = None,
        second_fd: int | None = None,
    ) -> None:
        """``listen``: address to bind, or a bound UDP socket's descriptor, of which a copy is taken.
        ``peer``: its address; None when it is to be learned from the peer's own heartbeats.
        ``key``: 16 bytes that both know; other datagrams do not count.
        ``instance`` (0-255) and ``epoch`` (32 bit): ours, as in session ids; the peer's instance is another.
        ``interval_ms``: 0.1 to 10 000. Where the peer's is longer, the peer's is expected.
        ``patience_ms``: how long a worker may stand still before we say "stalled"; default ``interval_ms * misses``.
        ``counters``: addresses of ``uint64_t``, each advanced by a worker in its loop; 0 is skipped. They must stay
        readable until ``stop()``.
        ``tcp_fd``, ``second_fd``: see ``watch_tcp``.

        Raises ValueError for values out of range, OSError when a socket cannot be had.
        """

    def start(self) -> None:
        """Starts two threads on different CPUs of those that the caller may use (one, where there is but one), with
        SCHED_FIFO where that is allowed (``stats()["realtime"]``). Raises OSError."""

    def stop(self) -> None:
        """Ends the threads; nothing is sent, judged or written any more. A stopped watch may be started again."""

    def close(self) -> None:
        """Stops and closes all descriptors. Any other call raises ValueError from then on."""

    def __enter__(self) -> Self:
        """Starts."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""

    def arm(self, data: bytes, fd: int | None) -> None:
        """From now on, once, ``data`` is written on the stream socket ``fd`` when the peer dies; None: that is told, and nothing
        written. It forgets what was fired before. ``fd`` must stay open until ``disarm``. Raises ValueError when ``data`` is too long or ``fd`` is
        no stream socket."""

    def update(self, data: bytes) -> bool:
        """Other bytes, all at once. False: not armed, or the peer has died already and the former bytes stand."""

    def disarm(self) -> bool:
        """When this returns nothing is written any more. False: the peer died first, so bytes may have been."""

    def follow(self, role_address: int, at_death: int) -> None:
        """Heartbeats tell this role (``Role.address``; 0: none), which must be kept until ``close``. When the peer dies
        while the watch is armed, STANDBY becomes ``at_death`` (a RoleState), and the term one more than both had."""

    def rekey(self, key: bytes) -> None:
        """Another key of 16 bytes from now on; the peer must change, too. Raises ValueError."""

    def leave(self, leave: bool = True) -> None:
        """Tells the peer, three times at once and in every heartbeat after, that we leave on purpose: it does not
        fire. Call it before closing connections. ``leave(False)`` takes it back."""

    def watch_tcp(self, tcp_fd: int | None = None, second_fd: int | None = None) -> None:
        """The connections whose end is the peer's death. Nothing is read from them. Replace a descriptor before
        you close it; it may be closed once this has returned."""

    def watch_links(self, indexes: Sequence[int]) -> None:
        """The links to the peer, by interface index in the caller's network namespace (4 at most), instead of those before. What
        the kernel has told before this call, or before ``arm``, does not count. Raises ValueError, OSError."""

    @property
    def fired(self) -> Reason | None:
        """Why the peer was found dead. It stays until ``arm`` is called again."""

    @property
    def times(self) -> dict[str, int | None]:
        """``last_heartbeat`` (the last before the death, once fired), ``detected``, ``written`` (all bytes handed to
        the kernel). None: not yet."""

    @property
    def eventfd(self) -> int:
        """Becomes readable when the peer's death is detected, and again when writing has ended; for
        ``loop.add_reader``. Read 8 bytes to reset it."""

    @property
    def address(self) -> tuple[str, int]:
        """Where we listen."""

    def stats(self) -> dict[str, int]:
        """Counters since the creation: ``sent``, ``send_errors``, ``received`` and of these ``received_stalled``,
        ``unproved`` (authentic, but no answer to us), ``bad_auth``, ``bad_replay``, ``bad_foreign``, ``missed``,
        ``late_wakeups`` (of ours, by more than half an interval), ``max_late_ns``, ``longest_silence_ns``.
        Present state: ``alive``, ``left``, ``armed``, ``realtime`` (0 or 1), ``peer_instance``, ``peer_epoch``,
        ``peer_progress`` (sum of the peer's loop counters), ``write_error`` (errno, 0 for none); of the peer's role
        ``peer_term``, ``peer_carries`` and ``peer_unfit``, by its last heartbeat."""

class MemoryHolder:
    """A tiny process that shares this one's memory, so that our sockets close at once if we are killed."""

    @property
    def pid(self) -> int: ...
    @property
    def alive(self) -> bool: ...
    def close(self) -> None:
        """Ends it. Harmless in a forked child, and the second time."""

def hold_memory() -> MemoryHolder:
    """Starts the holder, which lives until ``close`` or the death of this process. Keep the object.
    Raises OSError when the kernel does not allow it (close_range is needed: Linux 5.9)."""
