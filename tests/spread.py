# SPDX-License-Identifier: Apache-2.0
"""Several cores, and the driver between them in plain Python: to a test it looks like one core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nat_control.reload import apply_to_all
from nat_fastpath.core_config import CoreConfig
from nat_fastpath.engine import SLICE_ALL, SLICE_ANY, Core, Explanation, Result, Verdict, slice_of

SLICE, COPY = 0x1F, 0x80  # NAT_HANDOFF_*


class SpreadChange:
    """Another configuration for all of the cores, or none."""

    def __init__(self, spread: Spread, config: CoreConfig) -> None:
        self.spread, self.config = spread, config
        self.changes = [
            core.prepare(one) for core, one in zip(spread.cores, spread.split(config), strict=True)
        ]

    def apply(self) -> None:
        apply_to_all(self.spread.cores, self.changes)
        self.spread.config = self.config

    def reroute(self) -> int:
        return sum(change.reroute() for change in self.changes)


class Spread:
    """``n`` cores of one configuration. Each frame is received by another one of them in turn."""

    def __init__(self, config: CoreConfig, n: int) -> None:
        self.config, self.n = config, n
        self.cores = [Core(one) for one in self.split(config)]
        self.received = self.handoffs = 0

    def split(self, config: CoreConfig) -> list[CoreConfig]:
        return [replace(config, n_slices=self.n, slice=i) for i in range(self.n)]

    def prepare(self, config: CoreConfig) -> SpreadChange:
        return SpreadChange(self, config)

    def mappings_on(self, address: int) -> int:
        return sum(core.mappings_on(address) for core in self.cores)

    # -- the driver ----------------------------------------------------------------------------------------

    def burst(self, frames: Sequence[tuple[int, bytes]], now: int) -> list[Result]:
        return [self._one(port, frame, now) for port, frame in frames]

    def _one(self, port: int, frame: bytes, now: int) -> Result:
        receiver = self.received % self.n
        self.received += 1
        owner = slice_of(frame, self.config.ports[port].side, self.n)
        if owner == SLICE_ALL:
            for core in self.cores[:receiver] + self.cores[receiver + 1 :]:
                [copy] = core.handed([(port, frame, COPY)], now)
                assert copy.verdict == Verdict.CONSUMED
        at = receiver if owner in (SLICE_ANY, SLICE_ALL) else owner
        return self._last(self.cores[at].burst([(port, frame)], now)[0], now)

    def _last(self, result: Result, now: int) -> Result:
        """Its last verdict, of whichever core."""
        for _ in range(3):
            if result.verdict != Verdict.HANDOFF:
                return result
            self.handoffs += 1
            to = self.cores[result.handoff & SLICE]
            [result] = to.handed([(result.port, result.frame, result.handoff)], now)
        raise AssertionError(f"handed from core to core without an end: {result}")

    def explain(self, port: int, frame: bytes) -> Explanation:
        """Any core is asked, and says whom to ask; with the steps of all of them."""
        told = self.cores[self.received % self.n].explain(port, frame)
        steps = [told.steps]
        while told.verdict == Verdict.HANDOFF:
            told = self.cores[told.handoff & SLICE].explain(told.port, told.frame, handoff=told.handoff)
            steps.append(told.steps)
        return told._replace(steps=np.concatenate(steps))

    def take(self, now: int) -> list[Result]:
        return [self._last(result, now) for core in self.cores for result in core.take()]

    def poll(self, now: int) -> None:
        for core in self.cores:
            core.poll(now)

    def settle(self, now: int) -> None:
        for core in self.cores:
            core.settle(now)

    def outbox(self) -> list[tuple[int, bytes]]:
        return [frame for core in self.cores for frame in core.outbox()]

    # -- what there is -------------------------------------------------------------------------------------

    def sessions(self, cursor: int = 0, maximum: int = 1 << 16) -> tuple[np.ndarray[Any, Any], int]:
        pages = [core.sessions(cursor, maximum) for core in self.cores]
        assert not any(following for _, following in pages)
        return np.concatenate([records for records, _ in pages]), 0

    def neighbours(self) -> np.ndarray[Any, Any]:
        return np.concatenate([core.neighbours() for core in self.cores])

    def hosts(self) -> np.ndarray[Any, Any]:
        return np.concatenate([core.hosts() for core in self.cores])

    def events(self) -> np.ndarray[Any, Any]:
        return np.concatenate([core.events() for core in self.cores])

    def find(self, *ends: Any) -> Any:
        found = [record for core in self.cores if (record := core.find(*ends)) is not None]
        assert len(found) <= 1, "a session in two cores"
        return found[0] if found else None

    def commit(self, records: np.ndarray[Any, Any]) -> int:
        return sum(core.commit(records) for core in self.cores)

    def counters(self) -> dict[str, int]:
        each = [core.counters() for core in self.cores]
        return {name: sum(counters[name] for counters in each) for name in each[0]}

    def verdicts(self) -> np.ndarray[Any, Any]:
        return sum((core.verdicts() for core in self.cores), np.zeros(len(Verdict), np.uint64))

    def check(self) -> None:
        """Each session is in the core that its packets of both directions come to, and known by its id alone."""
        ids: list[int] = []
        for i, core in enumerate(self.cores):
            records, _ = core.sessions(0, 1 << 16)
            assert {host_slice(int(r["internal_addr"]), self.n) for r in records} <= {i}
            assert {port_slice(int(r["external_port"]), self.n) for r in records} <= {i}
            ids += [int(r["id"]) for r in records]
        assert len(ids) == len(set(ids)), "an id twice"


# -- slices.h, by what a Toeplitz hash is (the input's bits select windows of the key) ----------------------

HOST_KEY = 0x9E3779B1 << (320 - 64 + 7)  # 40 bytes; the host multiplier at bits 25 to 56
PORT_KEY = 1 << (320 - 120)  # bit 119


def toeplitz(key: int, data: bytes) -> int:
    found = 0
    for i in range(8 * len(data)):
        if data[i // 8] >> (7 - i % 8) & 1:
            found ^= key >> (320 - 32 - i) & 0xFFFFFFFF
    return found


def host_slice(address: int, n: int) -> int:
    """Whatever follows the source address does not count."""
    return (toeplitz(HOST_KEY, address.to_bytes(4, "big") + b"\xc0\0\2\1\x13\x88\0\x35") & 127) * n // 128


def port_slice(port: int, n: int) -> int:
    before = b"\xcb\0\x71\7\xc6\x33\x64\x0a\0\x35"  # addresses and source port
    return (toeplitz(PORT_KEY, before + port.to_bytes(2, "big")) & 127) * n // 128
