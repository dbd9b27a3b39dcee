# SPDX-License-Identifier: Apache-2.0
"""A core of this process behind the cheapest device that there can be (replay.h), and the control loop that reads its events."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bench import figures
from bench.histogram import BUCKETS, quantile
from nat_control.loop import ControlLoop
from nat_fastpath.core_config import CoreConfig, PoolRange, PortConfig, RouteConfig
from nat_fastpath.engine import Core

T = TypeVar("T")
PER_HOST = 16  # flows, as replay.c makes them
PORTS, LOAD = (1024, 65535), 0.9  # of each pool address, and the share of them that is used at most
ORDERS = {"uniform": 0, "zipf": 1, "sequential": 2}


class Phase(ctypes.Structure):
    """struct replay_phase."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("seconds", "known_rate", "new_rate")),
        *((name, ctypes.c_uint32) for name in ("new_first", "new_flows")),
        ("has_known", ctypes.c_bool),
        ("swap", ctypes.c_bool),
    )


class _Result(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64 * 2) for name in ("packets", "lost", "refused")),
        ("opened", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("core_ns", "wall_ns", "worst_ns")),
        *((name, ctypes.c_uint64) for name in ("bursts", "polls", "interrupted")),
        ("latency", ctypes.c_uint64 * BUCKETS * 2),
        ("cost", ctypes.c_uint64 * BUCKETS),
    )


@dataclass(frozen=True)
class Outcome:
    """What a phase was: pairs are (known flows, new flows); histograms have shape (buckets,), see bench.histogram."""

    packets: tuple[int, int]
    lost: tuple[int, int]
    refused: tuple[int, int]
    opened: int
    core_ns: float
    wall_ns: float
    worst_ns: float
    polls: int
    interrupted: int
    latency: tuple[NDArray[np.uint64], NDArray[np.uint64]]
    cost: NDArray[np.uint64]

    def p(self, share: float, kind: int = 0) -> float:
        """Nanoseconds that so many of the packets took at most."""
        return quantile(self.latency[kind], share)


def core_config(flows: int, **changes: Any) -> CoreConfig:
    """For so many flows of replay.c: everything that is on by default, and a pool that has a port for each."""
    mac, router = ([bytes.fromhex(f"0200000000{first}{i}") for i in (1, 2)] for first in "0f")
    first = int(IPv4Address("198.18.0.0"))
    addresses = int(flows / (LOAD * (PORTS[1] - PORTS[0] + 1))) + 1
    settings: dict[str, Any] = {
        "ports": (
            PortConfig("internal", mac[0], int(IPv4Address("10.255.0.1"))),
            PortConfig("external", mac[1], int(IPv4Address("192.0.2.1"))),
        ),
        "pool": (PoolRange(first, first + addresses - 1, PORTS),),
        "routes": (
            RouteConfig(int(IPv4Address("10.0.0.0")), 8, 0, int(IPv4Address("10.255.0.2")), router[0]),
            RouteConfig(0, 0, 1, int(IPv4Address("192.0.2.2")), router[1]),
        ),
        "max_sessions": flows,
        "max_hosts": flows // PER_HOST + 64,
        "udp_timeout": 3600,
        "seed": 1,
    }
    return CoreConfig(**{**settings, **changes})


class Replay:
    """A core and what drives it, on the last CPU that we have; the control loop runs on the first."""

    def __init__(self, config: CoreConfig, known: int = 0) -> None:
        self._library = figures.library("replay")
        self._library.replay_create.restype = ctypes.c_void_p
        self._library.replay_machine_worst.restype = ctypes.c_double
        self.core = Core(config)
        addresses = (ctypes.c_void_p(Core.api_address()), ctypes.c_void_p(self.core.address))
        self._replay = ctypes.c_void_p(self._library.replay_create(*addresses, known))
        if not self._replay:
            raise MemoryError(f"no memory for {known} flows")
        self.core.attach()
        self.events = self.events_lost = 0

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.replay_destroy(self._replay)
        self.core.detach()
        self.core.close()

    def _call(self, name: str, *arguments: Any) -> Outcome:
        result = _Result()
        getattr(self._library, name)(self._replay, *arguments, ctypes.byref(result))
        return _outcome(result)

    def _beside_the_loop(self, work: Callable[[], T]) -> T:
        """``work`` in a thread with a CPU of its own, while the control loop takes the events as it does in a server."""
        cpus = sorted(os.sched_getaffinity(0))

        def alone() -> T:
            os.sched_setaffinity(0, {cpus[-1]})
            return work()

        async def both() -> T:
            loop = ControlLoop(self.core, 2, lambda: None)
            running = asyncio.create_task(loop.run(lambda: None))
            await asyncio.sleep(0)
            done = await asyncio.to_thread(alone)
            while loop.drain():
                pass
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            self.events += loop.events
            self.events_lost += loop.events_lost
            return done

        os.sched_setaffinity(0, {cpus[0]})
        try:
            return asyncio.run(both())
        finally:
            os.sched_setaffinity(0, cpus)

    def open(self, first: int, flows: int) -> Outcome:
        """Opens flows, as fast as the core and the control loop can."""
        return self._beside_the_loop(lambda: self._call("replay_open", first, flows))

    def steps_of_bursts(self, first: int, bursts: int, size: int = 32) -> NDArray[np.int64]:
        """Buckets of the indexes that each of so many bursts of new flows has looked at; shape (bursts,)."""
        found = [self.core.counters()["index_steps"]]
        for i in range(bursts):
            self._call("replay_open", first + i * size, size)
            self.core.events()
            found.append(self.core.counters()["index_steps"])
        return np.diff(np.array(found))

    def draw(self, order: str = "uniform", *, unsolicited: bool = False) -> None:
        """Chooses what packets of the known flows will come, once all are open; or such as nobody has asked for."""
        self._library.replay_draw(self._replay, ORDERS[order], ctypes.c_bool(unsolicited))

    def run(self, **phase: Any) -> Outcome:
        return self._beside_the_loop(lambda: self._call("replay_run", ctypes.byref(Phase(**phase))))

    def run_alone(self, **phase: Any) -> Outcome:
        """The same in this thread, which has chosen its CPU; nobody reads events."""
        return self._call("replay_run", ctypes.byref(Phase(**phase)))

    def age(self, ahead: float, step: float, turns: int) -> Outcome:
        """``turns`` of a loop without packets, ``step`` seconds of the core's clock apart, after ``ahead`` seconds."""
        times = (ctypes.c_uint64(int(seconds * 1e9)) for seconds in (ahead, step))
        return self._beside_the_loop(lambda: self._call("replay_age", *times, turns))

    def machine_worst(self, seconds: float) -> float:
        """Nanoseconds that a loop that does nothing is held up at most."""
        return self._beside_the_loop(
            lambda: float(self._library.replay_machine_worst(self._replay, ctypes.c_double(seconds)))
        )


def _outcome(result: _Result) -> Outcome:
    pairs = {name: tuple(getattr(result, name)) for name in ("packets", "lost", "refused")}
    return Outcome(
        **pairs,
        **{
            name: getattr(result, name)
            for name in ("opened", "core_ns", "wall_ns", "worst_ns", "polls", "interrupted")
        },
        latency=(np.array(result.latency[0], np.uint64), np.array(result.latency[1], np.uint64)),
        cost=np.array(result.cost, np.uint64),
    )
