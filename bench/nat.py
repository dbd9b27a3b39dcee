# SPDX-License-Identifier: Apache-2.0
"""A NAT in this process between two DPDK ports, as the generator sees it: addresses, MACs, and a core big enough."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from typing import Any

from bench.pktgen import Flows
from nat_fastpath import cores
from nat_fastpath.core_config import CoreConfig, PoolRange, PortConfig, RouteConfig
from nat_fastpath.dpdk import Mempool, Port, Workers

MACS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")  # of the NAT, inside first
ROUTERS = bytes.fromhex("0200000000f1"), bytes.fromhex("0200000000f2")  # the generator's
POOL_FIRST, PORTS = IPv4Address("198.18.0.0"), (1024, 65535)
INSIDE, OUTSIDE = 0, 1
LOAD = 0.9  # of the ports of the pool, at most


def flows(count: int, *, per_host: int = 64) -> Flows:
    """So many flows, and a pool that has a port for each."""
    addresses = int(count / (LOAD * (PORTS[1] - PORTS[0] + 1))) + 1
    return Flows(count, (POOL_FIRST, POOL_FIRST + addresses - 1), per_host=per_host)


def core_config(of: Flows, **changes: Any) -> CoreConfig:
    """For these flows, and what an established NAT has switched on: states, limits, events."""
    settings: dict[str, Any] = {
        "ports": (
            PortConfig("internal", MACS[0], int(IPv4Address("10.255.0.1"))),
            PortConfig("external", MACS[1], int(IPv4Address("192.0.2.1"))),
        ),
        "pool": (PoolRange(int(of.pool[0]), int(of.pool[1]), PORTS),),
        "routes": (
            RouteConfig(int(IPv4Address("10.0.0.0")), 8, INSIDE, int(IPv4Address("10.255.0.2")), ROUTERS[0]),
            RouteConfig(0, 0, OUTSIDE, int(IPv4Address("192.0.2.2")), ROUTERS[1]),
        ),
        "max_sessions": of.count + of.count // 8 + 64,
        "max_hosts": of.count // of.per_host + 64,
        "udp_timeout": 3600,
        "event_ring": 65536,
        "seed": 1,
    }
    return CoreConfig(**{**settings, **changes})


class Nat:
    """Workers that poll, each on its CPU of ``cpus``, or ``n`` anywhere. ``drain`` reads all events away, as the control loop would."""

    def __init__(
        self,
        ports: tuple[Port, Port],
        pool: Mempool,
        config: CoreConfig,
        cpus: Sequence[int] | None = None,
        n: int = 1,
    ) -> None:
        n = len(cpus) if cpus else n
        self.core = cores.make(config, n)
        self.workers = Workers(
            cores.parts(self.core), ports, pool, cpus=cpus, idle="busy" if cpus else "adaptive"
        )
        self.workers.start()
        self._asked, self._busy = time.monotonic(), 0.0

    def drain(self) -> int:
        total = 0
        for core in cores.parts(self.core):
            while n := len(core.events(65536)):
                total += n
        return total

    @contextlib.contextmanager
    def drained(self) -> Iterator[None]:
        """Meanwhile somebody reads the events: with their ring full the core opens nothing."""
        ended = threading.Event()

        def read() -> None:
            while not ended.wait(0.001):
                self.drain()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.drain()

    def busy(self) -> tuple[float, float]:
        """Packets that were forwarded so far, and seconds of the turns that had work, of all workers."""
        now = time.monotonic()
        share = sum(stats["busy_share"] for stats in self.workers.stats())
        self._busy += share * (now - self._asked)
        self._asked = now
        return float(self.core.verdicts()[0]), self._busy

    def handed_off(self) -> int:
        """Packets that came to another worker than theirs."""
        return int(sum(stats["handed_off"] for stats in self.workers.stats()))

    def close(self) -> None:
        self.workers.stop()
        self.core.close()
