# SPDX-License-Identifier: Apache-2.0
"""A traffic generator around any NAT: sends on two DPDK ports, and knows what must come back.

Every packet carries its flow's number, so that the other side can say what the NAT did: one external endpoint for each flow,
none for two inside endpoints, addresses of the pool, right checksums. Losses, latencies and rates are in the ``Result`` of a phase.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.histogram import quantile, quantiles
from bench.pktgen._pktgen import ffi, lib
from nat_fastpath.dpdk import Mempool, Port

LEAST_FRAME: int = lib.PKTGEN_LEAST_FRAME  # bytes, without the checksum of Ethernet
IMIX = (60,) * 7 + (590,) * 4 + (1514,)  # 7:4:1, as IETF and vendors have it
INSIDE, REMOTE = IPv4Address("10.0.1.0"), IPv4Address("203.0.113.0")
LINK_PATIENCE = 20.0  # seconds for the other ends of devices that have one
STEP = 0.1  # seconds of one rate in ``Result.steps``
WRONG = ("mapping", "shared", "pool", "destination", "checksum", "ttl", "length")


class What(IntFlag):
    """Which packets: of inside hosts, answers to them, or such as nobody has asked for."""

    OUT = lib.PKTGEN_OUT
    IN = lib.PKTGEN_IN
    UNSOLICITED = lib.PKTGEN_UNSOLICITED


class Order(IntEnum):
    """Which flow comes next."""

    SEQUENTIAL = lib.PKTGEN_SEQUENTIAL
    RANDOM = lib.PKTGEN_RANDOM
    ZIPF = lib.PKTGEN_ZIPF
    EACH_ONCE = lib.PKTGEN_EACH_ONCE


@dataclass(frozen=True, slots=True)
class Flows:
    """The endpoints: flow f is of inside host ``inside`` + f / ``per_host``, and of one of ``remotes`` addresses from ``remote`` on.

    ``pool`` are the first and the last external address that the NAT may use.
    """

    count: int
    pool: tuple[IPv4Address, IPv4Address]
    inside: IPv4Address = INSIDE
    per_host: int = 64
    remote: IPv4Address = REMOTE
    remotes: int = 256
    port: int = 9


@dataclass(frozen=True, slots=True)
class Phase:
    """What is sent, how fast (packets per second in all, 0: as many as go), and until when.

    One in ``check_every`` packets that arrive is looked at byte by byte; endpoints are of all.
    """

    what: What = What.OUT
    order: Order = Order.RANDOM
    rate: float = 0
    seconds: float = 0
    packets: int = 0
    sizes: Sequence[int] = (LEAST_FRAME,)
    first: int = 0
    flows: int = 0  # 0: all
    only: NDArray[np.uint32] | None = None  # these, one after the other, whatever the order
    drain: float = 0.05  # seconds of silence that end it
    check_every: int = 16
    seed: int = 1


@dataclass(frozen=True)
class Result:
    """Of a phase. ``sent`` and ``received`` by the side that a packet entered, inside first; rates per second.

    ``histogram``: shape (buckets,), packets by latency, see ``quantile``. ``steps``: shape (2, n), received in each
    tenth of a second. ``wrong``: what must not be, by name; empty when all is right.
    """

    seconds: float
    sent: tuple[int, int]
    received: tuple[int, int]
    counters: dict[str, int]
    latest: float  # seconds that a packet left late at most
    histogram: NDArray[np.uint64] = field(repr=False)
    steps: NDArray[np.uint32] = field(repr=False)

    @property
    def lost(self) -> int:
        return sum(self.sent) - sum(self.received)

    @property
    def wrong(self) -> dict[str, int]:
        found = {name: self.counters[f"wrong_{name}"] for name in WRONG}
        return {name: count for name, count in found.items() if count}

    @property
    def rate(self) -> float:
        return sum(self.received) / self.seconds if self.seconds else 0.0

    def quantile(self, share: float) -> float:
        """Nanoseconds that so many of the packets took at most; each bucket's upper bound. NaN without packets."""
        return quantile(self.histogram, share)

    def summary(self) -> dict[str, Any]:
        """For JSON: rates in packets per second, latencies in µs."""
        return {
            "seconds": round(self.seconds, 3),
            "sent": sum(self.sent),
            "received": sum(self.received),
            "lost": self.lost,
            "packets_per_second": round(self.rate),
            "sent_per_second": round(sum(self.sent) / self.seconds) if self.seconds else 0,
            "latency_us": quantiles(self.histogram),
            "latest_us": round(self.latest * 1e6, 1),
            "wrong": self.wrong,
            **{name: count for name, count in self.counters.items() if not name.startswith("wrong_")},
        }


def ring_pair(name: str, slots: int = 4096) -> tuple[str, str]:
    """Makes two devices of which each receives what the other sends; their names, for Port. After EAL. Raises GeneratorError."""
    if lib.pktgen_ring_pair(name.encode(), slots) < 0:
        raise GeneratorError(f"no rings {name}: is there memory, and are they there already?")
    return f"net_ring_{name}0", f"net_ring_{name}1"


def wait_for_links(ports: Sequence[Port]) -> None:
    """A memif or virtio_user has none before its other end has come, and must not be polled while it comes."""
    end = time.monotonic() + LINK_PATIENCE
    while not all(port.link().up for port in ports) and time.monotonic() < end:
        for port in ports:
            port.seek_other_end()
        time.sleep(0.05)
    time.sleep(0.2 if any(port.gated for port in ports) else 0)  # it says that it is up a moment before it is


class GeneratorError(Exception):
    """One line."""


class Generator:
    """Two ports of this process and what is known of the flows between them. Raises GeneratorError."""

    def __init__(
        self, ports: tuple[Port, Port], pool: Mempool, flows: Flows, macs: tuple[bytes, bytes]
    ) -> None:
        self.flows = flows
        config = ffi.new("struct pktgen_config *")
        config.pool = ffi.cast("void *", pool.address)
        config.flows = flows.count
        config.flows_per_host = flows.per_host
        config.inside_first = int(flows.inside)
        config.remote_first, config.remotes, config.remote_port = int(flows.remote), flows.remotes, flows.port
        config.pool_first, config.pool_last = (int(address) for address in flows.pool)
        for i, (port, mac) in enumerate(zip(ports, macs, strict=True)):
            config.ports[i] = port.port_id
            config.mac[i] = list(mac)
        error = ffi.new("char[]", 256)
        self._generator = lib.pktgen_create(config, error, len(error))
        if self._generator == ffi.NULL:
            raise GeneratorError(ffi.string(error).decode())

    def resolve(self, side: int, ours: IPv4Address, nat: IPv4Address, seconds: float = 5) -> bytes:
        """Learns the NAT's MAC on a side (0 inside, 1 outside) by ARP, and sends there from now on."""
        mac = ffi.new("uint8_t[6]")
        if not lib.pktgen_resolve(self._generator, side, int(ours), int(nat), mac, int(seconds * 1000)):
            raise GeneratorError(f"{nat} does not answer ARP within {seconds:g} s")
        self.send_to(side, bytes(mac))
        return bytes(mac)

    def send_to(self, side: int, mac: bytes) -> None:
        lib.pktgen_set_nat_mac(self._generator, side, ffi.new("uint8_t[6]", list(mac)))

    def run(self, phase: Phase) -> Result:
        """Blocks the thread until the phase has ended, without Python's lock; its CPU polls."""
        asked = ffi.new("struct pktgen_phase *")
        asked.what, asked.order = int(phase.what), int(phase.order)
        asked.first_flow, asked.flows = phase.first, phase.flows or self.flows.count - phase.first
        only = None if phase.only is None else np.ascontiguousarray(phase.only, np.uint32)
        if only is not None:
            asked.only, asked.first_flow, asked.flows = ffi.cast("uint32_t *", only.ctypes.data), 0, len(only)
        asked.rate, asked.duration_ns = phase.rate, int(phase.seconds * 1e9)
        asked.packets, asked.drain_ns = phase.packets, int(phase.drain * 1e9)
        asked.check_every, asked.seed = phase.check_every, phase.seed
        if not phase.seconds and not phase.packets:
            raise GeneratorError("a phase ends after a time or a number of packets")
        if (
            not 0 < len(phase.sizes) <= len(asked.sizes)
            or min(phase.sizes) < LEAST_FRAME
            or max(phase.sizes) > 1514
        ):
            raise GeneratorError(f"1 to {len(asked.sizes)} sizes, each {LEAST_FRAME} to 1514 bytes")
        if asked.first_flow + asked.flows > self.flows.count or (
            only is not None and only.max() >= self.flows.count
        ):
            raise GeneratorError(f"there are {self.flows.count} flows")
        asked.n_sizes = len(phase.sizes)
        for i, size in enumerate(phase.sizes):
            asked.sizes[i] = size
        result = ffi.new("struct pktgen_result *")
        lib.pktgen_run(self._generator, asked, result)
        n = result.n_steps
        names = [name for name, _ in ffi.typeof("struct pktgen_result").fields]
        counted = names[names.index("sent_bytes") + 1 : names.index("latest_ns")]
        return Result(
            seconds=result.elapsed_ns / 1e9,
            sent=(result.sent[0], result.sent[1]),
            received=(result.received[0], result.received[1]),
            counters={name: getattr(result, name) for name in counted},
            latest=result.latest_ns / 1e9,
            histogram=np.frombuffer(ffi.buffer(result.histogram), np.uint64).copy(),
            steps=np.frombuffer(ffi.buffer(result.steps), np.uint32).reshape(2, -1)[:, :n].copy(),
        )

    def start(self, phase: Phase) -> Running:
        """The same in a thread."""
        return Running(self, phase)

    def stop(self) -> None:
        """Ends the phase that runs, from another thread."""
        lib.pktgen_stop(self._generator)

    def mappings(self) -> NDArray[np.uint64]:
        """The external endpoint of each flow, shape (flows,): address in the upper half, port below; 0 where none was seen."""
        pointer = lib.pktgen_mappings(self._generator)
        return np.frombuffer(ffi.buffer(pointer, 8 * self.flows.count), np.uint64)

    def forget(self) -> None:
        lib.pktgen_forget(self._generator)

    def close(self) -> None:
        """No phase may be running."""
        if self._generator != ffi.NULL:
            lib.pktgen_destroy(self._generator)
            self._generator = ffi.NULL


class Running:
    """A phase in a thread of its own."""

    def __init__(self, generator: Generator, phase: Phase) -> None:
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(generator, phase), daemon=True)
        self._thread.start()

    def _run(self, generator: Generator, phase: Phase) -> None:
        try:
            self._result = generator.run(phase)
        except BaseException as error:
            self._error = error

    def wait(self) -> Result:
        self._thread.join()
        if self._error:
            raise self._error
        assert self._result
        return self._result


class Forwarder:
    """Plain forwarding between two ports in a thread with a CPU of its own: what a NAT is compared with."""

    def __init__(self, ports: tuple[Port, Port], cpu: int | None) -> None:
        self._state = ffi.new("struct pktgen_forward *")
        self._state.ports = [port.port_id for port in ports]
        self._thread = threading.Thread(target=self._run, args=(cpu,), daemon=True)
        self._thread.start()

    def _run(self, cpu: int | None) -> None:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        lib.pktgen_forward(self._state)

    def counts(self) -> tuple[int, float]:
        """Packets, and seconds of the turns that had some."""
        return self._state.packets, self._state.busy_ns / 1e9

    def close(self) -> None:
        self._state.stop = 1
        self._thread.join()
