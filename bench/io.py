# SPDX-License-Identifier: Apache-2.0
"""Generator, NAT and sink over one kind of device after the other, each beside plain forwarding on the very same ports.

``replay`` and ``ring`` are in one process, and show the NAT's own cost; the others have `tandem-nat server` or `dpdk-testpmd`
(macswap) between two links, with `tandem-nat pktgen` around them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import numpy as np

from bench import ends, figures, hugepages
from bench.ends import Asked, Box
from bench.figures import Figure
from bench.replay import Replay, core_config
from nat_control.lab import LabError

T = TypeVar("T")
TRIES = 4
DEVICES = ("replay", "ring", *ends.LINKS)
UNPRESSED = 0.02  # of what a generator had to send: who refuses and loses less than that could have done more
# Mpps ÷ testpmd's over the same memif, must and good (performance.md)
SHARES = {1: ">= 0.64, good 0.85", 1024: ">= 0.59, good 0.81", 28_000: ">= 0.60, good 0.90", 1_000_000: ">= 0.51, good 0.68",
          4_000_000: ">= 0.48, good 0.60", 14_000_000: ">= 0.45, good 0.63"}  # fmt: skip


def measure(device: str, flows: int, rounds: int, seconds: float, size: str) -> Iterator[Figure]:
    name = f"io {device}, {flows:,} flows" + (f", {size} bytes" if size != "64" else "")
    try:
        if device == "replay":
            yield from _replay(name, flows, rounds, seconds)
        elif device == "ring":
            yield from _ring(name, flows, rounds, seconds, size)
        else:
            yield from _links(name, device, flows, rounds, seconds, size)
    except LabError as error:
        yield figures.missing(name, str(error))


def _replay(name: str, flows: int, rounds: int, seconds: float) -> Iterator[Figure]:
    with Replay(core_config(flows), flows) as replay:
        replay.open(0, flows)
        replay.draw()

        def one(swap: bool) -> float:
            done = replay.run(seconds=seconds / 4, has_known=True, swap=swap)
            return done.wall_ns / max(done.packets[0], 1)

        values, speeds = figures.interleaved({"nat": lambda: one(False), "plain": lambda: one(True)}, rounds)
    yield _per_packet(name, values["nat"], values["plain"], speeds)
    yield _rate(name, [1e3 / ns for ns in values["nat"]], [1e3 / ns for ns in values["plain"]], speeds)


def _per_packet(name: str, nat: list[float], plain: list[float], speeds: list[float]) -> Figure:
    return figures.figure(
        f"{name}: per packet", "ns", nat, floor=plain, speeds=speeds, floor_name="plain forwarding"
    )


def _rate(name: str, nat: list[float], plain: list[float], speeds: list[float], **more: Any) -> Figure:
    return figures.figure(
        f"{name}: rate", "Mpps", nat, floor=plain, speeds=speeds, floor_name="plain forwarding", **more
    )


def ring(
    what: str, flows: int, seconds: float, rounds: int, size: str
) -> tuple[dict[str, list[float]], list[float]]:
    """``values`` and ``speeds`` of io_ring.py. Raises LabError."""
    asked = [what, *(str(word) for word in (flows, seconds, rounds, size))]
    done = subprocess.run(
        [sys.executable, "-m", "bench.io_ring", *asked], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"io_ring: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["values"], found["speeds"]


def _ring(name: str, flows: int, rounds: int, seconds: float, size: str) -> Iterator[Figure]:
    values, speeds = ring("plain", flows, seconds, rounds, size)
    yield _per_packet(name, values["nat_ns"], values["plain_ns"], speeds)
    yield _rate(name, values["nat"], values["plain"], speeds)


def _again(run: Callable[[], T]) -> T:
    """testpmd polls a memif while DPDK connects it, which ends it now and then: that says nothing of anybody's speed."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(LabError):
            return run()
    return run()


@dataclass
class Around:
    """What the generator says of one box, round by round."""

    wrong: list[str] = field(default_factory=list)
    pressed: list[float] = field(default_factory=list)  # share that the box refused or lost
    ns: list[float] = field(default_factory=list)  # of its CPU, for each packet; NaN: it does not say

    @property
    def generator_bound(self) -> bool:
        """The box was never full: its figure is the generator's."""
        return bool(self.pressed) and median(self.pressed) < UNPRESSED


def mpps(kind: str, box: Box, flows: int, asked: Asked, around: Around) -> float:
    """Of packets that came through; what was wrong with them, and how much was too much, is told to ``around``."""
    found = (
        _again(lambda: ends.once(kind, box, flows, asked))
        if box is ends.testpmd
        else ends.once(kind, box, flows, asked)
    )
    if asked.translated and found["wrong"]:
        around.wrong.append(str(found["wrong"]))
    around.ns.append(found["box_ns"] or float("nan"))
    around.pressed.append((found["not_sent"] + found["lost"]) / max(found["not_sent"] + found["sent"], 1))
    return float(found["packets_per_second"]) / 1e6


def _links(name: str, kind: str, flows: int, rounds: int, seconds: float, size: str) -> Iterator[Figure]:
    ours, its = Around(), Around()
    nat, plain = Asked(seconds, size=size), Asked(seconds, resolve=False, translated=False, size=size)
    values, speeds = figures.interleaved(
        {
            "nat": lambda: mpps(kind, ends.tandem, flows, nat, ours),
            "plain": lambda: mpps(kind, ends.testpmd, min(flows, 1 << 20), plain, its),
        },
        rounds,
    )
    goal = {"goal": f"{SHARES[flows]} of testpmd"} if "memif" in kind and flows in SHARES else {}
    more = {**goal, "floor_name": "testpmd macswap", "hugepages_mb": hugepages.total_mb()}
    yield {
        **_rate(name, values["nat"], values["plain"], speeds, wrong=ours.wrong),
        **bound(ours, its),
        **more,
    }
    if np.isfinite(
        ours.ns + its.ns
    ).all():  # the same without the generator: what a CPU that never waits would do
        could = [[1e3 / ns for ns in one.ns] for one in (ours, its)]
        yield {
            **figures.figure(
                f"{name}: by the time of its CPU", "Mpps", could[0], floor=could[1], speeds=speeds
            ),
            **more,
        }


def bound(ours: Around, its: Around) -> dict[str, list[str]]:
    """Whose figure is only what the generator could send: the truth is above it."""
    found = [words for one, words in ((ours, "ours"), (its, "what is beside it")) if one.generator_bound]
    return {"generator_bound": found} if found else {}


def phases(device: str, flows: int, high: float, seconds: float) -> Iterator[Figure]:
    """RFC 9693 around our server; each is searched for once."""
    try:
        for found in ends.rfc9693(device, flows, high, seconds):
            name = f"{found['figure']} over {device}, {flows:,} flows"
            if "missing" in found:
                yield figures.missing(name, found["missing"])
            else:
                yield figures.figure(name, found["unit"], [found["median"]], below=high)
    except LabError as error:
        yield figures.missing(f"RFC 9693 over {device}, {flows:,} flows", str(error))


def add(what: Any) -> None:
    parser = what.add_parser(
        "io", help="the NAT over devices, beside plain forwarding on the same ports (root)"
    )
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument("--flows", type=int, nargs="+", default=[1, 1024, 28_000])
    parser.add_argument("--rounds", type=int, default=figures.ROUNDS)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument(
        "--size", default="64", help="bytes of a frame, with the checksum of Ethernet; or imix"
    )
    parser.add_argument(
        "--rfc9693",
        type=float,
        metavar="PPS",
        help="the phases around our server, below this rate, and no more",
    )
    parser.add_argument("--json", action="store_true")


def run(given: argparse.Namespace) -> None:
    shared = any(device in ends.LINKS for device in given.devices)
    with hugepages.if_there_are(ends.HUGEPAGES_MB) if shared else contextlib.nullcontext():
        for device in given.devices:
            for flows in given.flows:
                figures.say(_of(device, flows, given), given.json)


def _of(device: str, flows: int, given: argparse.Namespace) -> Iterator[Figure]:
    if not given.rfc9693:
        return measure(device, flows, given.rounds, given.seconds, given.size)
    return phases(device, flows, given.rfc9693, given.seconds) if device in ends.LINKS else iter(())
