# SPDX-License-Identifier: Apache-2.0
"""The phases of RFC 9693 around any NAT: set-up rate, capacity, throughput, tear-down rate. Each is one figure.

A rate is searched for: the highest at which nothing is lost. Connections are UDP flows, set up by their first packet, and each
is validated by a packet from outside. The RFC wants an empty table before each trial of the set-up rate, and leaves how to the
tester: a command that empties it; where there is none, a trial has flows of its own, which the table has never had, and what
differs is that it is fuller each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.pktgen import Generator, Order, Phase, Result, What

RESOLUTION = 0.05  # of a rate that is searched for
TRIALS = 12  # at most, each with flows of its own
PASSES = 6  # until each flow has an external endpoint
PROBES = 100_000.0  # per second, to see whether sessions are there
GONE = 0.02  # seconds without an answer: the table is empty
PATIENCE = 60.0


def _run(generator: Generator, phase: Phase) -> Result:
    """In a thread of its own, so that a signal can end it."""
    return generator.start(phase).wait()


def search(good: Callable[[float], bool], high: float) -> float:
    """The highest rate that is good, to RESOLUTION; 0 when none was."""
    low, trials = 0.0, 0
    while trials < TRIALS and high - low > RESOLUTION * high:
        rate = high if trials == 0 else (low + high) / 2
        trials += 1
        if good(rate):
            low = rate
        else:
            high = rate
    return low


def open_all(generator: Generator, pace: float, check_every: int = 16) -> Result:
    """Each flow once, and those of which nothing came back again, slower each time. The first pass."""
    first: Result | None = None
    missing: NDArray[Any] = np.arange(generator.flows.count)
    for once in range(PASSES):
        only = None if once == 0 else missing
        found = _run(
            generator,
            Phase(
                What.OUT,
                Order.EACH_ONCE,
                rate=pace / 2**once,
                packets=len(missing),
                only=only,
                check_every=check_every,
            ),
        )
        first = first or found
        missing = np.flatnonzero(generator.mappings() == 0)
        if not len(missing):
            break
    assert first
    return first


def set_up_rate(generator: Generator, high: float, clear: Callable[[], object] | None) -> dict[str, Any]:
    """New flows per second of which each came through, and is found by a packet from outside afterwards.

    A trial begins with a table that is empty for its flows: ``clear`` has emptied it, or they were never there before.
    """
    at, flows = 0, generator.flows.count // TRIALS  # with either way, so that figures can be compared

    def good(rate: float) -> bool:
        nonlocal at
        if clear:
            clear()
            generator.forget()
        opening = Phase(What.OUT, Order.EACH_ONCE, rate=rate, packets=flows, first=at, flows=flows)
        opened = _run(generator, opening)
        found = _run(generator, replace(opening, what=What.IN, rate=min(rate, PROBES)))
        at += 0 if clear else flows
        return _lossless(opened) and _lossless(found) and sum(found.sent) == flows

    rate = round(search(good, high))
    return {
        "figure": "RFC 9693: set-up rate",
        "unit": "flows/s",
        "median": rate,
        "flows": flows,
        "emptied": clear is not None,
    }


def _lossless(found: Result) -> bool:
    return found.lost == 0 and not found.wrong and found.counters["not_sent"] == 0


def capacity(generator: Generator, pace: float) -> dict[str, Any]:
    """Flows that exist at once: opened one after the other, then each is asked from outside."""
    open_all(generator, pace)
    count = generator.flows.count
    asked = _run(generator, Phase(What.IN, Order.EACH_ONCE, rate=min(pace, PROBES), packets=count))
    lives = sum(asked.received)
    return {"figure": "RFC 9693: capacity", "unit": "flows", "median": lives, "more": lives == count}


def throughput(generator: Generator, high: float, seconds: float, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Packets per second, both ways in random order, of flows that are there, without a loss."""

    def good(rate: float) -> bool:
        found = _run(
            generator, Phase(What.OUT | What.IN, Order.RANDOM, rate=rate, seconds=seconds, sizes=sizes)
        )
        return _lossless(found)

    return {
        "figure": "RFC 9693: throughput",
        "unit": "packets/s",
        "median": round(search(good, high)),
        "sizes": sizes,
    }


def tear_down_rate(generator: Generator, clear: Callable[[], object]) -> dict[str, Any]:
    """``clear`` empties the NAT's table, out of band; until no flow is answered from outside."""
    lives = int((generator.mappings() != 0).sum())
    begin = time.monotonic()
    clear()
    last = time.monotonic()
    while time.monotonic() - begin < PATIENCE:
        now = time.monotonic()
        probe = Phase(What.IN, Order.RANDOM, rate=PROBES, seconds=GONE, drain=0.005, check_every=0)
        if not sum(_run(generator, probe).received):
            break
        last = now + GONE
    took = max(last - begin, 1e-3)
    return {
        "figure": "RFC 9693: tear-down rate",
        "unit": "flows/s",
        "median": round(lives / took),
        "flows": lives,
    }


def all_phases(
    generator: Generator,
    high: float,
    seconds: float,
    sizes: tuple[int, ...],
    clear: Callable[[], object] | None,
) -> Iterator[dict[str, Any]]:
    yield set_up_rate(generator, high, clear)
    yield capacity(generator, high)
    yield throughput(generator, high, seconds, sizes)
    if clear:
        yield tear_down_rate(generator, clear)
