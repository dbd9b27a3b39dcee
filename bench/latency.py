# SPDX-License-Identifier: Apache-2.0
"""How long packets take at 10, 50 and 90 % of what goes: of known flows, and the first ones of new flows.

Packets come at a fixed rate whether the last ones are done or not, and are due when the clock says so, so that a stall costs
all that come meanwhile. In this process the device is replay.h, which shows the core; with ``--pair`` also the pair, whose
new flows wait for the peer in synchronous mode, and how the load is split (the thesis's figures 8.5 to 8.8).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import figures, first_packet, histogram, pair
from bench.figures import Figure
from bench.replay import Outcome, Replay, core_config
from nat_control.lab import LabError

SHARES = (0.1, 0.5, 0.9)


def _told(
    name: str, outcomes: list[Outcome], side: int, rate: float, speeds: list[float], **more: Any
) -> Figure:
    """The median is that of the rounds' p99; the curve is of all rounds together."""
    total = np.sum([one.latency[side] for one in outcomes], axis=0)
    return figures.figure(
        name, "µs (p99)", [one.p(0.99, side) / 1e3 for one in outcomes], speeds=speeds, **histogram.quantiles(total),
        rate=round(rate), lost=sum(one.lost[side] for one in outcomes), refused=sum(one.refused[side] for one in outcomes),
        curve=histogram.curve(total), **more,
    )  # fmt: skip


def known(flows: int, rounds: int, seconds: float) -> Iterator[Figure]:
    """Of flows that are there; ``floor`` is plain forwarding at the same rate."""
    with Replay(core_config(flows), flows) as replay:
        replay.open(0, flows)
        replay.draw()
        full = max(
            done.packets[0] / done.wall_ns * 1e9
            for done in (replay.run(seconds=seconds, has_known=True) for _ in range(3))
        )
        for share in SHARES:
            rate, runs, plain, speeds = share * full, list[Outcome](), list[Outcome](), [figures.probe()]
            for _ in range(rounds):
                runs.append(replay.run(seconds=seconds, has_known=True, known_rate=rate))
                plain.append(replay.run(seconds=seconds, has_known=True, known_rate=rate, swap=True))
                speeds.append(figures.probe())
            yield _told(
                f"latency: known flows ({flows:,}) at {share:.0%}", runs, 0, rate, speeds, share=share, kind="known",
                plain=histogram.quantiles(np.sum([one.latency[0] for one in plain], axis=0)),
            )  # fmt: skip


def new(flows: int, rounds: int, seconds: float) -> Iterator[Figure]:
    """Of the first packets of flows that nobody knows; all events are read."""
    with Replay(core_config(flows)) as replay:
        opened = replay.open(0, flows)
        full = opened.opened / opened.wall_ns * 1e9
    for share in SHARES:
        rate, runs, speeds = share * full, list[Outcome](), [figures.probe()]
        for _ in range(rounds):
            with Replay(core_config(flows)) as replay:
                runs.append(replay.run(seconds=seconds, new_rate=rate, new_flows=flows - 64))
            speeds.append(figures.probe())
        yield _told(f"latency: new flows at {share:.0%}", runs, 1, rate, speeds, share=share, kind="new")


def of_the_pair(flows: int) -> Iterator[Figure]:
    """New flows in the three modes, and who forwards what while new flows begin; in namespaces."""
    try:
        for found in first_packet.measure(flows):
            name = f"latency: new flows of a pair, {found['mode']}"
            median = found["added_ms"]["p50"]
            yield figures.figure(
                name, "ms more than a known one (p50)", [median], **{**found, "kind": "pair"}
            )
    except LabError as error:
        yield figures.missing("latency: new flows of a pair", str(error))
    try:
        yield figures.figure("split processing", "", [0.0], **pair.split_processing())
    except LabError as error:
        yield figures.missing("split processing", str(error))


def measure(flows: int, rounds: int, seconds: float, with_pair: bool) -> Iterator[Figure]:
    yield from known(flows, rounds, seconds)
    yield from new(flows, rounds, seconds)
    if with_pair:
        yield from of_the_pair(100)


def add(what: Any) -> None:
    parser = what.add_parser("latency", help="known and new flows at 10, 50 and 90 % of capacity")
    parser.add_argument("--flows", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=figures.ROUNDS)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--pair", action="store_true", help="also new flows in the three sync modes (root)")
    parser.add_argument("--json", action="store_true")


def run(given: argparse.Namespace) -> None:
    figures.say(measure(given.flows, given.rounds, given.seconds, given.pair), given.json)
