# SPDX-License-Identifier: Apache-2.0
"""The threads that carry packets between ports and cores; the loop itself is worker.c."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network

from nat_fastpath.dpdk._dpdk import ffi, lib
from nat_fastpath.dpdk.binding import DpdkError, Mempool, Port
from nat_fastpath.engine import Core

STOP_PATIENCE = 5  # seconds
IDLE_MODES = ("adaptive", "busy")
SIDES = {"internal": 0, "external": 1}


class WorkerStuck(DpdkError):
    """A worker's thread does not end."""


class Workers:
    """Runs ``cores`` on ``ports``, whose order is that of the cores' ports, in a thread for each core.

    Of several cores, each has the slice that is its place among them. One device may be several ports, with a
    VLAN each, or marked by DSCP (mark.h): then ``inside`` is the internal port's subnet.

    ``idle`` is ``busy`` (polls all the time, the least latency) or ``adaptive`` (sleeps when there is nothing
    to do, never longer than ``idle_bound_us``). ``cpus`` are theirs, one each. ``wake_fd`` is an eventfd that is written
    when events come while their reader sleeps (``Core.events_sleep``). While they run the cores belong to them.
    """

    idle_bound_us: int = lib.WORKER_IDLE_BOUND_US

    def __init__(
        self,
        cores: Sequence[Core],
        ports: Sequence[Port],
        pool: Mempool,
        *,
        cpus: Sequence[int] | None = None,
        idle: str = "adaptive",
        wake_fd: int | None = None,
        inside: IPv4Network | None = None,
    ) -> None:
        if idle not in IDLE_MODES:
            raise ValueError(f"idle: {idle!r} is none of {', '.join(IDLE_MODES)}")
        if not 1 <= len(cores) <= lib.WORKERS_MAX:
            raise ValueError(f"{len(cores)} cores; there are 1 to {lib.WORKERS_MAX}")
        if cpus is not None and len(cpus) != len(cores):
            raise ValueError(f"{len(cpus)} CPUs for {len(cores)} cores")
        for i, core in enumerate(cores):
            if len(ports) != len(core.config.ports):
                raise ValueError(f"{len(ports)} ports for a core that has {len(core.config.ports)}")
            if len(cores) > 1 and (core.config.slice, core.config.n_slices) != (i, len(cores)):
                raise ValueError(
                    f"core {i} of {len(cores)} has slice {core.config.slice} of {core.config.n_slices}"
                )
        self._cores, self._ports, self._pool = tuple(cores), tuple(ports), pool
        self._cpus, self._adaptive, self._wake_fd = cpus, idle == "adaptive", wake_fd
        self._inside = inside
        self._workers = ffi.NULL
        self._seen = [(0, 0)] * len(cores)  # total_ns and busy_ns of each, when last asked

    @property
    def running(self) -> bool:
        return bool(self._workers != ffi.NULL)

    def start(self) -> None:
        """Raises DpdkError when a thread cannot be started, or was built for another core."""
        if self.running:
            raise RuntimeError("the worker runs already")
        config = ffi.new("struct workers_config *")
        config.api = ffi.cast("const struct nat_api *", Core.api_address())
        config.pool = self._pool._pool
        config.adaptive = self._adaptive
        config.wake_fd = -1 if self._wake_fd is None else self._wake_fd
        config.n_ports = len(self._ports)
        for to, port, settings in zip(config.ports, self._ports, self._cores[0].config.ports, strict=False):
            to.port_id, to.fill_checksums = port.port_id, port.fill_checksums
            to.rx_queues, to.tx_queues, to.gated = port.rx_queues, port.tx_queues, port.gated
            to.side, to.vlan = SIDES[settings.side], settings.vlan
        if self._inside:
            network, mask = int(self._inside.network_address), int(self._inside.netmask)
            config.marking = {"used": 1, "network": network, "mask": mask}
        config.n = len(self._cores)
        for i, core in enumerate(self._cores):
            config.cores[i] = ffi.cast("struct nat_core *", core.address)
            config.cpus[i] = -1 if self._cpus is None else self._cpus[i]
        error = ffi.new("char[256]")
        attached: list[Core] = []
        try:
            for core in self._cores:
                core.attach()
                attached.append(core)
            self._workers = lib.workers_start(config, error, len(error))
            if not self.running:
                raise DpdkError(ffi.string(error).decode())
        finally:
            if not self.running:
                for core in attached:
                    core.detach()

    def stop(self) -> None:
        """Ends the threads and waits for them; held packets are given up. The cores are the caller's again.

        Raises WorkerStuck when one does not end: it may go on at any moment, so nothing that it uses may be closed.
        """
        if self.running:
            workers, self._workers = self._workers, ffi.NULL
            if not lib.workers_stop(workers, STOP_PATIENCE):
                raise WorkerStuck(
                    f"a worker has not ended in {STOP_PATIENCE} seconds: it is stopped, or stuck in a driver"
                )
            for core in self._cores:
                core.detach()

    def alone_on(self, i: int) -> list[int]:
        """Ports on which worker ``i`` receives or sends for all, as worker.c assigns them."""
        n, devices = len(self._cores), list(dict.fromkeys(port.port_id for port in self._ports))
        return [
            k
            for k, port in enumerate(self._ports)
            if min(port.rx_queues, port.tx_queues) < n and devices.index(port.port_id) % n == i
        ]

    @property
    def loops_addresses(self) -> list[int]:
        """Of the ``uint64_t`` that every turn of a worker's loop advances, while they run: proof of life."""
        if not self.running:
            raise RuntimeError("the worker does not run")
        return [
            int(ffi.cast("uintptr_t", lib.worker_loops(self._workers, i))) for i in range(len(self._cores))
        ]

    def stats(self) -> list[dict[str, int | float]]:
        """Counters of each loop. ``busy_share`` is the part of the time since the last call that had work."""
        return [self._stats(i) for i in range(len(self._cores))] if self.running else []

    def _stats(self, i: int) -> dict[str, int | float]:
        stats = ffi.new("struct worker_stats *")
        lib.worker_read_stats(self._workers, i, stats)
        total, busy = stats.total_ns - self._seen[i][0], stats.busy_ns - self._seen[i][1]
        self._seen[i] = stats.total_ns, stats.busy_ns
        out: dict[str, int | float] = {
            "loops": stats.loops,
            "loops_with_packets": stats.loops_with_packets,
            "sleeps": stats.sleeps,
            "sleep_max_us": stats.sleep_max_ns // 1000,
            "busy_share": busy / total if total else 0.0,
            "outbox_no_buffer": stats.outbox_no_buffer,
            "fragment_no_buffer": stats.fragment_no_buffer,
            "handed_off": stats.handed_off,
            "handoff_received": stats.handoff_received,
            "handoff_dropped": stats.handoff_dropped,
            "arp_copies": stats.arp_copies,
            "tx_passed": stats.tx_passed,
        }
        for port in range(len(self._ports)):
            out[f"tx_dropped.{port}"] = stats.tx_dropped[port]
            out[f"checksums_filled.{port}"] = stats.checksums_filled[port]
        return out


class Worker:
    """One core and its thread: ``Workers`` for the usual case."""

    idle_bound_us: int = Workers.idle_bound_us

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
        self._one = Workers(
            [core], ports, pool, cpus=None if cpu is None else [cpu], idle=idle, wake_fd=wake_fd
        )
        self.start, self.stop = self._one.start, self._one.stop

    @property
    def running(self) -> bool:
        return self._one.running

    @property
    def loops_address(self) -> int:
        return self._one.loops_addresses[0]

    def stats(self) -> dict[str, int | float]:
        return next(iter(self._one.stats()), {})
