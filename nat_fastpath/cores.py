# SPDX-License-Identifier: Apache-2.0
"""Several cores that share hosts and external ports (core/slices.h), as one: each worker owns one of them.

Everything that belongs to a host is in one core. So whatever is asked is asked of the core that has it, or of all,
and the answers are put together.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nat_fastpath import engine
from nat_fastpath.core_config import CoreConfig
from nat_fastpath.engine import (
    NEIGHBOUR_STATES,
    RECORD,
    STEP,
    STEP_KINDS,
    TRACE,
    Core,
    Explanation,
    Posted,
    Trace,
    Verdict,
)
from nat_fastpath.errors import EventRingFull
from nat_fastpath.tables import copied, joined, taken

Records = np.ndarray[Any, np.dtype[np.void]]

SLICE = 0x1F  # NAT_HANDOFF_SLICE
NOBODY = 0xFF  # owns a session whose host and external port are of different slices
PAGE = 1 << 32  # of a cursor: what is above is the core, what is below its own cursor
DIVIDED = (
    "max_sessions", "max_mappings", "max_hosts", "max_held", "event_ring", "new_sessions_rate",
    "new_sessions_burst", "icmp_rate", "quarantine_ports",
)  # fmt: skip
LARGEST = ("neighbours",)  # gauges of which every core has its own of the same
# From the worst, so that the best is the last when they are sorted.
RANKS = [NEIGHBOUR_STATES.index(name) for name in ("free", "incomplete", "probe", "reachable", "static")]


def sliced(config: CoreConfig, n: int) -> tuple[CoreConfig, ...]:
    """The configurations of ``n`` cores that are together what ``config`` is alone; of one, ``config`` itself.

    What the NAT may have in all is divided, and rounded up; what one host may have is not: it is in one core.
    """
    if n == 1:
        return (config,)
    share = {name: -(-getattr(config, name) // n) for name in DIVIDED}
    return tuple(replace(config, n_slices=n, slice=i, **share) for i in range(n))


def memory_for(config: CoreConfig, n: int) -> dict[str, int]:
    """What ``n`` cores would take, in bytes by part, without taking it."""
    return _sum([engine.memory_for(one) for one in sliced(config, n)])


def _sum(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


class PostedToAll:
    """As engine.Posted, of several cores."""

    def __init__(self, parts: Sequence[Posted]) -> None:
        self._parts = parts

    def result(self) -> int | None:
        """How many records were handled, or None as long as a worker has not come to its own."""
        done = 0
        for part in self._parts:
            if (result := part.result()) is None:
                return None
            done += result
        return done


class Cores:
    """``n`` cores with the interface of engine.Core, but for packets: those are each core's own.

    See ``sliced``. Raises CoreError.
    """

    def __init__(self, config: CoreConfig, n: int) -> None:
        self._whole = config
        self.cores = tuple(Core(one) for one in sliced(config, n))
        # One caller at a time: a command that waits behind another's would be taken for one without progress.
        self._lock = threading.Lock()
        self._trace = _NoTrace
        self._token = 0

    @property
    def config(self) -> CoreConfig:
        """Of the whole, in force now; what is divided is as it was at the start."""
        whole = {name: getattr(self._whole, name) for name in DIVIDED}
        return replace(self.cores[0].config, slice=None, **whole)

    def close(self) -> None:
        for core in self.cores:
            core.close()

    # -- sessions ------------------------------------------------------------------------------------------

    def _owners(self, records: Records) -> np.ndarray[Any, np.dtype[np.uint8]]:
        n = len(self.cores)
        owners = engine.slice_of_hosts(records["internal_addr"], n)
        # its packets from outside would come to a core that does not have it
        owners[owners != engine.slice_of_ports(records["external_port"], n)] = NOBODY
        return owners

    def _post(self, what: str, records: Records) -> list[tuple[np.ndarray[Any, Any], Posted]]:
        """To each core its own; with their places in ``records``."""
        owners = self._owners(records)
        shares = [np.flatnonzero(owners == i) for i in range(len(self.cores))]
        return [
            (share, core.post(what, taken(records, share)))
            for core, share in zip(self.cores, shares, strict=True)
            if len(share)
        ]

    def _records(self, what: str, records: Records) -> int:
        done, rest = 0, []
        records = copied(records, RECORD)
        with self._lock:
            for share, posted in self._post(what, records):
                try:
                    done += posted.wait()
                except EventRingFull as full:
                    done += full.result
                    rest.append(share[len(share) - len(full.rest) :])
        if rest:
            raise EventRingFull(taken(records, np.sort(np.concatenate(rest))), len(records), done)
        return done

    def install(self, records: Records) -> int:
        return self._records("install", records)

    def delete(self, records: Records) -> int:
        """As Core.delete: what is left when a ring was full is in the exception."""
        return self._records("delete", records)

    def commit(self, records: Records) -> int:
        return self._records("commit", records)

    def update(self, records: Records) -> int:
        return self._records("update", records)

    def post_commit(self, records: Records) -> PostedToAll:
        return PostedToAll([posted for _, posted in self._post("commit", records)])

    def holds(self, records: Records) -> np.ndarray[Any, np.dtype[np.bool_]]:
        records = copied(records, RECORD)
        held = np.zeros(len(records), np.bool_)
        with self._lock:
            for share, posted in self._post("holds", records):
                posted.wait()
                held[share] = posted.records["reserved0"] == 1
        return held

    def adopt(self) -> int:
        with self._lock:
            return sum(core.adopt() for core in self.cores)

    def cede(self, instance: int, besides: Any = ()) -> int:
        with self._lock:
            return sum(core.cede(instance, besides) for core in self.cores)

    def sessions(self, cursor: int = 0, maximum: int = 4096) -> tuple[Records, int]:
        """Pages as Core.sessions gives them, one core after the other; a page is of one core."""
        at, own = divmod(cursor, PAGE)
        if at >= len(self.cores):
            return np.empty(0, RECORD), 0
        with self._lock:
            records, following = self.cores[at].sessions(own, maximum)
        if following:
            return records, at * PAGE + following
        return records, (at + 1) * PAGE if at + 1 < len(self.cores) else 0

    def find(
        self, protocol: int, source: tuple[int, int], destination: tuple[int, int], side: str = "internal"
    ) -> Any:
        n = len(self.cores)
        owner = (
            engine.slice_of_hosts(int(source[0]), n)
            if side == "internal"
            else engine.slice_of_ports(destination[1], n)
        )
        with self._lock:
            return self.cores[int(owner)].find(protocol, source, destination, side)

    # -- next hops and hosts -------------------------------------------------------------------------------

    def neighbours(self) -> Records:
        """Each next hop once, as the core sees it that knows it best; sessions and held packets are summed."""
        with self._lock:
            found = np.concatenate([core.neighbours() for core in self.cores])
        by_mac = np.where(found["address"] == 0, found["mac"], 0)
        rank = np.argsort(RANKS)[found["state"]]
        order = np.lexsort((~found["confirmed_ms"], rank, by_mac, found["address"], found["port"]))
        found, by_mac = found[order], by_mac[order]
        if not len(found):
            return found
        keys = (found["port"], found["address"], by_mac)
        new = np.any([np.diff(key, prepend=key[:1]) != 0 for key in keys], axis=0)
        new[0] = True
        first = np.flatnonzero(new)
        merged = found[np.append(first[1:], len(found)) - 1]
        for name in ("sessions", "held"):
            merged[name] = np.add.reduceat(found[name].astype(np.uint32), first)
        return np.asarray(merged)

    def learn(self, neighbours: Records) -> int:
        """As Core.learn, by every core: each sends by itself. Returns the most that were news to one."""
        with self._lock:
            return max(core.learn(neighbours) for core in self.cores)

    def hosts(self) -> Records:
        with self._lock:
            return np.asarray(np.concatenate([core.hosts() for core in self.cores]))

    # -- single packets ------------------------------------------------------------------------------------

    def explain(self, port: int, frame: bytes, length: int | None = None) -> Explanation:
        """As Core.explain, by the core that has the packet; where it goes on in another, a step says in which."""
        whole = len(frame) if length is None else length
        at = engine.slice_of(frame, self.config.ports[port].side, len(self.cores))
        at = at if at < len(self.cores) else 0  # whichever receives it
        begin = np.zeros(1, STEP)
        begin["kind"], begin["value"] = STEP_KINDS.index("handoff"), at
        steps = [begin]
        with self._lock:
            told = self.cores[at].explain(port, frame, length)
            for _ in self.cores:
                steps.append(told.steps)
                if told.verdict != Verdict["HANDOFF"]:
                    break
                told = self.cores[told.handoff & SLICE].explain(
                    told.port, told.frame, max(whole, len(told.frame)), told.handoff
                )
        return told._replace(steps=np.concatenate(steps))

    def trace_start(self, packets: int, seconds: float, **flow: int) -> int | None:
        """As Core.trace_start, in every core; the first ``packets`` of all are told."""
        with self._lock:
            tokens: list[int] = []
            for core in self.cores:
                if (token := core.trace_start(packets, seconds, **flow)) is None:
                    _Trace(0, tokens, 0).read(self.cores, stop=True)
                    return None
                tokens.append(token)
            self._token += 1
            self._trace = _Trace(self._token, tokens, packets)
            return self._token

    def trace_read(self, token: int, stop: bool = False) -> Trace:
        """Takes what has been traced, in the order of time. Raises KeyError when another one has begun."""
        with self._lock:
            trace = self._trace
            if trace.token != token:
                raise KeyError(token)
            parts = trace.read(self.cores, stop)
            entries = np.concatenate([np.empty(0, TRACE), *(part.entries for part in parts)])
            entries = entries[np.argsort(entries["time_ns"], kind="stable")]
            missed = sum(part.missed for part in parts)
            told = entries[: max(trace.packets - trace.told - missed, 0)]
            trace.told += len(told)
            left = max(trace.packets - trace.told - missed, 0)
            running = not stop and left > 0 and any(part.running for part in parts)
            if not running and not stop:
                trace.read(self.cores, stop=True)
            return Trace(told, running, left, missed)

    # -- what may be read at any time ----------------------------------------------------------------------

    def events(self, maximum: int = 65536) -> np.ndarray[Any, np.dtype[np.void]]:
        """Of all cores, one after the other; ``sequence`` is each core's own."""
        return joined(*(core.events(maximum) for core in self.cores))

    def verdicts(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.asarray(np.sum([core.verdicts() for core in self.cores], axis=0, dtype=np.uint64))

    def counters(self) -> dict[str, int]:
        """Sums; of next hops, which every core has for itself, the most that one has."""
        parts = [core.counters() for core in self.cores]
        return {**_sum(parts), **{name: max(part[name] for part in parts) for name in LARGEST}}

    def memory(self) -> dict[str, int]:
        return _sum([core.memory() for core in self.cores])


class _Trace:
    def __init__(self, token: int, tokens: Sequence[int], packets: int) -> None:
        self.token, self.tokens, self.packets, self.told = token, tokens, packets, 0

    def read(self, cores: Sequence[Core], stop: bool) -> list[Trace]:
        found = []
        for core, token in zip(cores, self.tokens, strict=False):
            # one that had ended there may have been followed by another, which then could not begin elsewhere
            with contextlib.suppress(KeyError):
                found.append(core.trace_read(token, stop))
        return found


_NoTrace = _Trace(0, (), 0)
AnyCore = Core | Cores
AnyPosted = Posted | PostedToAll


def make(config: CoreConfig, n: int) -> AnyCore:
    """One core, or ``n`` that share what there is. Raises CoreError."""
    return Core(config) if n == 1 else Cores(config, n)


def parts(core: AnyCore) -> tuple[Core, ...]:
    """The cores themselves: each has a worker and a ring of events of its own."""
    return core.cores if isinstance(core, Cores) else (core,)
