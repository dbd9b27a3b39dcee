# SPDX-License-Identifier: Apache-2.0
"""The thread that carries packets between ports and a core; the loop itself is worker.c."""

from __future__ import annotations

from collections.abc import Sequence

from nat_fastpath.dpdk._dpdk import ffi, lib
from nat_fastpath.dpdk.binding import DpdkError, Mempool, Port
from nat_fastpath.engine import Core

IDLE_MODES = ("adaptive", "busy")


class Worker:
    """Runs ``core`` on ``ports``, whose order is that of the core's ports, in a thread of its own.

    One device may be several of them, with a VLAN each.

    ``idle`` is ``busy`` (polls all the time, the least latency) or ``adaptive`` (sleeps when there is nothing
    to do, never longer than ``idle_bound_us``). ``wake_fd`` is an eventfd that is written when events come while their
    reader sleeps (``Core.events_sleep``). While it runs the core belongs to it.
    """

    idle_bound_us: int = lib.WORKER_IDLE_BOUND_US

    def __init__(
        self,
        core: Core,
        ports: Sequence[Port],
        pool: Mempool,
        *,
        cpu: int | None = None,
        idle: str = "adaptive",
        wake_fd: int | None = None,
    ) -> None:
        if idle not in IDLE_MODES:
            raise ValueError(f"idle: {idle!r} is none of {', '.join(IDLE_MODES)}")
        if len(ports) != len(core.config.ports):
            raise ValueError(f"{len(ports)} ports for a core that has {len(core.config.ports)}")
        self._core, self._ports, self._pool = core, tuple(ports), pool
        self._cpu, self._adaptive, self._wake_fd = cpu, idle == "adaptive", wake_fd
        self._worker = ffi.NULL
        self._total_ns = self._busy_ns = 0

    @property
    def running(self) -> bool:
        return bool(self._worker != ffi.NULL)

    def start(self) -> None:
        """Raises DpdkError when the thread cannot be started, or was built for another core."""
        if self.running:
            raise RuntimeError("the worker runs already")
        config = ffi.new("struct worker_config *")
        config.api = ffi.cast("const struct nat_api *", Core.api_address())
        config.core = ffi.cast("struct nat_core *", self._core.address)
        config.pool = self._pool._pool
        config.cpu = -1 if self._cpu is None else self._cpu
        config.adaptive = self._adaptive
        config.wake_fd = -1 if self._wake_fd is None else self._wake_fd
        config.n_ports = len(self._ports)
        for i, port in enumerate(self._ports):
            config.ports[i].port_id = port.port_id
            config.ports[i].fill_checksums = port.fill_checksums
            config.ports[i].vlan = self._core.config.ports[i].vlan
        error = ffi.new("char[256]")
        self._core.attach()
        self._worker = lib.worker_start(config, error, len(error))
        if not self.running:
            self._core.detach()
            raise DpdkError(ffi.string(error).decode())

    def stop(self) -> None:
        """Ends the thread and waits for it; held packets are given up. The core is the caller's again."""
        if self.running:
            worker, self._worker = self._worker, ffi.NULL
            lib.worker_stop(worker)
            self._core.detach()

    @property
    def loops_address(self) -> int:
        """Of the ``uint64_t`` that every turn of the loop advances, while it runs: proof of life for a heartbeat."""
        if not self.running:
            raise RuntimeError("the worker does not run")
        return int(ffi.cast("uintptr_t", lib.worker_loops(self._worker)))

    def stats(self) -> dict[str, int | float]:
        """Counters of the loop. ``busy_share`` is the part of the time since the last call that had work."""
        if not self.running:
            return {}
        stats = ffi.new("struct worker_stats *")
        lib.worker_read_stats(self._worker, stats)
        total, busy = stats.total_ns - self._total_ns, stats.busy_ns - self._busy_ns
        self._total_ns, self._busy_ns = stats.total_ns, stats.busy_ns
        out: dict[str, int | float] = {
            "loops": stats.loops,
            "loops_with_packets": stats.loops_with_packets,
            "sleeps": stats.sleeps,
            "sleep_max_us": stats.sleep_max_ns // 1000,
            "busy_share": busy / total if total else 0.0,
            "outbox_no_buffer": stats.outbox_no_buffer,
            "fragment_no_buffer": stats.fragment_no_buffer,
        }
        for i in range(len(self._ports)):
            out[f"tx_dropped.{i}"] = stats.tx_dropped[i]
            out[f"checksums_filled.{i}"] = stats.checksums_filled[i]
        return out
