# SPDX-License-Identifier: Apache-2.0
"""What more cores give: one and two with a perfect spread, the cost of handing a packet over, and a model of more.

A core's own work is counted in instructions with callgrind, which no neighbour disturbs: the count per packet must be the
same however many cores there are, so what two of them lose is the memory and the hand-off, and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from bench import core, figures
from bench.figures import Figure
from bench.io import ring
from bench.replay import Outcome, Replay, core_config
from nat_control.lab import LabError, call

MODELLED = (1, 2, 4, 8, 16)
RING = 16_384  # packets of a round of core.c


def _parallel(replays: list[Replay], seconds: float) -> float:
    """Mpps of all together, each on a CPU of its own."""
    cpus = sorted(os.sched_getaffinity(0))
    done: list[Outcome | None] = [None] * len(replays)

    def one(i: int) -> None:
        os.sched_setaffinity(0, {cpus[-1 - i % len(cpus)]})
        done[i] = replays[i].run_alone(seconds=seconds, has_known=True)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(replays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(one.packets[0] / one.wall_ns * 1e3 for one in done if one)


def spread(flows: int, rounds: int, seconds: float) -> Figure:
    """Two cores with half of the flows each, as RSS would give them, beside one with all."""
    with (
        Replay(core_config(flows), flows) as one,
        Replay(core_config(flows), flows // 2) as two,
        Replay(core_config(flows), flows // 2) as three,
    ):
        for replay, count in ((one, flows), (two, flows // 2), (three, flows // 2)):
            replay.open(0, count)
            replay.draw()
        values, speeds = figures.interleaved(
            {"two": lambda: _parallel([two, three], seconds), "one": lambda: _parallel([one], seconds)},
            rounds,
        )
    return figures.figure(
        "cores: two with a perfect spread", "Mpps", values["two"], floor=values["one"], floor_name="one core", speeds=speeds,
        flows=flows, kind="cores",
    )  # fmt: skip


def workers(flows: int, rounds: int, seconds: float) -> Iterator[Figure]:
    """Two workers of a server between ring devices that cannot spread: each gives the other what is its own."""
    if len(os.sched_getaffinity(0)) < 2:
        yield figures.missing("cores: two workers, software spread", "there is one CPU")
        return
    try:
        values, speeds = ring("workers", flows, seconds, rounds, "64")
    except LabError as error:
        yield figures.missing("cores: two workers, software spread", str(error))
        return
    calm = len(os.sched_getaffinity(0)) < 3
    shared = {"generator_shares_a_cpu": calm, "kind": "cores"}
    if calm:
        why = "there are two CPUs, and the generator needs one: what a packet costs is measured at a low rate"
        yield figures.missing("cores: two workers, software spread: rate", why)
    for name, unit, key in (("rate", "Mpps", ""), ("CPU time of a packet", "ns", "_ns")):
        if calm and name == "rate":
            continue
        yield figures.figure(
            f"cores: two workers, software spread: {name}", unit, values[f"two{key}"], floor=values[f"one{key}"],
            floor_name="one worker", speeds=speeds, **shared,
        )  # fmt: skip
    yield figures.figure(
        "cores: share that was handed off", "of packets", values["handed_off"], counted=True, **shared
    )


def hand_off(rounds: int) -> Figure:
    """ns of giving a packet to another core through a ring, and of finding whose it is; half of them with two cores."""
    library = figures.library(
        "handoff", sources=tuple(path.name for path in sorted(core.CORE.glob("*.c"))), extra=tuple(_dpdk())
    )
    library.handoff_ns.restype = ctypes.c_double
    values, speeds = figures.interleaved({"ns": lambda: float(library.handoff_ns(200_000))}, rounds)
    if min(values["ns"]) < 0:
        return figures.missing("cores: hand-off", "no memory for the ring")
    return figures.figure("cores: hand-off", "ns", values["ns"], speeds=speeds, kind="cores")


def _dpdk() -> list[str]:
    said = subprocess.run(["pkg-config", "--cflags", "libdpdk"], check=True, capture_output=True, text=True)
    return [flag.replace("-I", "-isystem") for flag in said.stdout.split()] + ["-lrte_ring", "-lrte_eal"]


def instructions(sessions: int = 1024) -> float | None:
    """Of a packet of an established session, within nat_burst and all that it calls; None without callgrind.

    Of two runs that differ by two rounds: what opening the sessions takes is in both.
    """
    if not (shutil.which("valgrind") and shutil.which("callgrind_annotate")):
        return None
    return (_counted(sessions, 3) - _counted(sessions, 1)) / (2 * RING)


def _counted(sessions: int, rounds: int) -> int:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        out = f"{folder}/callgrind.out"
        tool = ["valgrind", "--tool=callgrind", "--toggle-collect=nat_burst", f"--callgrind-out-file={out}"]
        call([*tool, str(core.build()), str(sessions), f"rounds={rounds}"], timeout=300)
        total = re.search(r"([\d,]+) \(100\.0%\)\s+PROGRAM TOTALS", call(["callgrind_annotate", out]))
    if not total:
        raise LabError("callgrind has counted nothing")
    return int(total[1].replace(",", ""))


def measure(flows: int, rounds: int, seconds: float) -> Iterator[Figure]:
    two = spread(flows, rounds, seconds)
    yield two
    given = hand_off(rounds)
    yield given
    yield from workers(flows, rounds, seconds)
    counted = instructions()
    if counted is None:
        yield figures.missing("cores: instructions per packet", "valgrind is not installed")
    else:
        yield figures.figure("cores: instructions per packet", "instructions", [counted], kind="cores")
    if two["rounds"] and given.get("rounds"):
        yield from model(1e3 / two["floor"], two["ratio"]["median"] / 2, given["median"], counted)


def model(ns: float, memory: float, handed: float, counted: float | None) -> Iterator[Figure]:
    """``ns`` of a packet on one core; ``memory``: the share that each of two keeps; ``handed``: ns of a hand-off.

    RSS spreads for nothing; in software, (n - 1) / n of the packets come to the wrong core first. What cores take from each
    other's memory is taken as that of two: more of them on other memory channels lose less.
    """
    for n in MODELLED:
        share = memory if n > 1 else 1.0
        rss = n * share * 1e3 / ns
        software = n * 1e3 / (ns / share + handed * (n - 1) / n)
        yield figures.figure(
            f"cores: {n} by the model", "Mpps with RSS", [rss], software=round(software, 2), kind="model", cores=n,
            instructions=counted,
        )  # fmt: skip


def add(what: Any) -> None:
    parser = what.add_parser(
        "cores", help="one and two cores, the hand-off between them, and a model of more"
    )
    parser.add_argument("--flows", type=int, default=1 << 18)
    parser.add_argument("--rounds", type=int, default=figures.ROUNDS)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--json", action="store_true")


def run(given: argparse.Namespace) -> None:
    figures.say(measure(given.flows, given.rounds, given.seconds), given.json)
