# SPDX-License-Identifier: Apache-2.0
"""What one figure is: rounds of the same run, a floor measured in turn with them, and whether noise has drowned it.

A line of JSON for each: ``figure`` (its name), ``unit``, ``median``, ``min``, ``max``, ``rounds``, ``dropped`` (noisy rounds),
``speed`` (that of the others, as a share of the CPU's best),
``floor`` and ``ratio`` where something was measured beside it, ``goal``, ``drowned``, and what else is worth knowing.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from bench.core import CFLAGS, CORE, HERE, MARCH, compiled

Figure = dict[str, Any]
ROUNDS = 5  # at least, of what is said as a median
SLOW = 1.15  # times: probes that are further apart are of different speeds of the core, which its neighbours change
DROWNED = 0.3  # of the median, between the quartiles


@functools.cache
def library(name: str, extra: tuple[str, ...] = (), sources: tuple[str, ...] = ()) -> ctypes.CDLL:
    """``bench/NAME.c`` as a library, compiled as the core is."""
    files = [HERE / f"{name}.c", *(CORE / source for source in sources)]
    headers = [*sorted(HERE.glob("*.h")), *sorted(CORE.glob("*.[ch]"))]
    flags = [*CFLAGS, *MARCH, "-fPIC", "-shared", f"-I{CORE}", "-lm", *extra]
    return ctypes.CDLL(str(compiled(f"libbench-{name}", files, headers, flags)))


def probe() -> float:
    """Nanoseconds of a fixed piece of work: how fast this CPU is just now."""
    function = library("probe").speed_probe
    function.restype = ctypes.c_double
    return float(function())


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    return {
        name: float(f"{value:.{digits}g}")
        for name, value in (("median", median(values)), ("min", min(values)), ("max", max(values)))
    }


def figure(
    name: str,
    unit: str,
    values: Sequence[float],
    *,
    floor: Sequence[float] | None = None,
    speeds: Sequence[float] | None = None,
    counted: bool = False,
    **more: Any,
) -> Figure:
    """``values`` of the rounds, ``floor`` those of the same rounds; ``speeds`` the probes before each and one after the last.

    What was ``counted`` is not measured by a clock, and noise does not touch it.
    """
    kept = calm(speeds) if speeds else list(range(len(values)))
    if floor is not None:
        kept = [i for i in kept if floor[i] > 0]  # one that had nothing to say is none to compare with
    found: Figure = {"figure": name, "unit": unit}
    if not kept:
        return {**found, "rounds": 0, "dropped": len(values), "drowned": True, **more}
    chosen = [values[i] for i in kept]
    if speeds:
        found["speed"] = round(min(speeds) / median(speeds[i] for i in kept), 2)  # of the CPU's best
    found |= {**spread(chosen), "rounds": len(kept), "dropped": len(values) - len(kept)}
    judged = chosen
    if floor is not None:
        judged = [values[i] / floor[i] for i in kept]
        found |= {"floor": spread([floor[i] for i in kept])["median"], "ratio": spread(judged)}
    return {**found, "drowned": not counted and is_drowned(judged), **more}


def calm(speeds: Sequence[float]) -> list[int]:
    """The rounds at the CPU's prevailing speed, before and after: it has several, and stays at each for seconds."""
    around = [(min(pair), max(pair)) for pair in itertools.pairwise(speeds)]

    def at(speed: float) -> list[int]:
        return [i for i, (low, high) in enumerate(around) if speed <= low and high <= SLOW * speed]

    return max(map(at, sorted(speeds)), key=len)


def is_drowned(values: Sequence[float]) -> bool:
    """Whether the rounds differ by so much that their median says little. One value alone is what it is."""
    if len(values) < 2:
        return False
    if len(values) < ROUNDS:
        return max(values) - min(values) > DROWNED * abs(median(values))
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low > DROWNED * abs(median(values))


def interleaved(
    ways: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """A B A B: each way once per round. The values of each, and the probes around the rounds."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    speeds = [probe()]
    for _ in range(rounds):
        for name, run in ways.items():
            values[name].append(run())
        speeds.append(probe())
    return values, speeds


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say(found: Iterator[Figure], as_json: bool) -> None:
    """Prints each as soon as it is there: JSON, or a line to read."""
    for one in found:
        print(json.dumps(one) if as_json else line(one), flush=True)


def line(one: Figure) -> str:
    if "missing" in one:
        return f"{one['figure']}: {one['missing']}"
    if not one["rounds"]:
        return f"{one['figure']}: drowned in noise, no two probes alike"
    text = f"{one['figure']}: {one['median']:,g} {one['unit']} ({one['min']:,g} to {one['max']:,g}; {one['rounds']} rounds)"
    if "ratio" in one:
        text += f", {one['ratio']['median']:.3g} x {one.get('floor_name', 'the floor')} of {one['floor']:,g}"
    if one.get("goal"):
        text += f"; goal {one['goal']}"
    return text + ("  DROWNED IN NOISE" if one["drowned"] else "")


def missing(name: str, why: str) -> Figure:
    """A figure that cannot be had here, and why."""
    return {"figure": name, "missing": why}
