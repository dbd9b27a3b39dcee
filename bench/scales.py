# SPDX-License-Identifier: Apache-2.0
"""The core from 1 to 14 million sessions, one line for each figure: established packets, look-up, what nobody asked for.

These are the measurements of core.c and lookup.c, with the goals of the project beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from bench import core, figures
from bench.figures import Figure
from bench.replay import Replay, core_config

QUICK = (1, 1024, 28_672, 1 << 20, 1 << 22, 14_000_000)
MANY = 1 << 20  # sessions, at most, of what is no question of scale
BATCHES = (1, 8, 32, 128)
LOOKUP_FROM = 1 << 18  # sessions from which the goal holds


def _goal(sessions: int) -> str:
    return "<= 4.5 x floor, good 3.2" if sessions == 28_672 else "<= 4.2 x floor, good 3.2"


def established(sessions: int, rounds: int, goal: str, **choices: Any) -> Figure:
    """ns per packet beside the floor of the same run; ``choices`` are core.measure's."""
    found = core.measure(sessions, rounds=rounds, **choices)
    name = f"core, {sessions:,} sessions" + "".join(
        f", {choices[key]}" for key in ("direction", "order") if key in choices
    )
    name += f", batch {choices['batch']}" if "batch" in choices else ""
    name += ", endpoint-dependent" if choices.get("mapping") == "dependent" else ""
    return {
        **_figure(name, "ns", found["nat_ns"], found["ratio"], found["floor_ns"]["median"], found), "goal": goal, "kind": "core",
        "sessions": sessions, "direction": found["direction"], "order": found["order"], "batch": found["batch"],
        "swap_ns": found["swap_ns"]["median"], "floor_name": "the floor",
    }  # fmt: skip


def look_up(sessions: int, rounds: int) -> Figure:
    """ns per key; the ratio is how much longer rte_hash takes."""
    found = core.lookup(sessions, rounds=rounds)
    goal = ">= 2 x as fast" if sessions >= LOOKUP_FROM else ""
    one = _figure(
        f"look-up, {sessions:,} sessions",
        "ns",
        found["ours_ns"],
        found["ratio"],
        found["rte_hash_ns"]["median"],
        found,
    )
    return {
        **one,
        "goal": goal,
        "kind": "look-up",
        "sessions": sessions,
        "floor_name": "(rte_hash / ours), rte_hash",
    }


def _figure(
    name: str,
    unit: str,
    values: dict[str, float],
    ratio: dict[str, float],
    floor: float,
    found: dict[str, Any],
) -> Figure:
    three = ("median", "min", "max")
    return {
        "figure": name,
        "unit": unit,
        **{key: values[key] for key in three},
        "rounds": found["rounds"],
        "dropped": found["dropped"],
        "floor": floor,
        "ratio": {key: ratio[key] for key in three},
        "drowned": found["drowned"]
        or ratio["three_quarters"] - ratio["quarter"] > figures.DROWNED * ratio["median"],
    }


def unsolicited(sessions: int, rounds: int) -> Figure:
    """A packet from outside that nobody asked for, beside one that is forwarded, over the replay device."""
    with Replay(core_config(sessions), sessions) as replay:
        replay.open(0, sessions)

        def one(forged: bool) -> float:
            replay.draw(unsolicited=forged)
            done = replay.run(seconds=0.2, has_known=True)
            return done.wall_ns / max(done.packets[0], 1)

        values, speeds = figures.interleaved(
            {"dropped": lambda: one(True), "forwarded": lambda: one(False)}, rounds
        )
    return figures.figure(
        f"unsolicited, {sessions:,} sessions", "ns", values["dropped"], floor=values["forwarded"], speeds=speeds,
        floor_name="forwarding", goal="< 1 x", kind="unsolicited", sessions=sessions,
    )  # fmt: skip


def without_hugepages(sessions: int, rounds: int) -> Figure:
    """What a packet costs where the kernel has only small pages to give, beside the same with huge ones."""

    def one(**more: int) -> float:
        return float(core.measure(sessions, rounds=5, **more)["nat_ns"]["median"])

    values, speeds = figures.interleaved({"small": lambda: one(small_pages=1), "huge": one}, rounds)
    return figures.figure(
        f"core, {sessions:,} sessions, pages of 4 KB", "ns", values["small"], floor=values["huge"], speeds=speeds,
        floor_name="huge pages", kind="pages", sessions=sessions,
    )  # fmt: skip


def measure(scales: tuple[int, ...], rounds: int, everything: bool) -> Iterator[Figure]:
    for sessions in scales:
        yield established(sessions, rounds, _goal(sessions), direction="both")
        yield established(sessions, rounds, _goal(sessions), direction="out")
        if everything:
            yield established(sessions, rounds, "", direction="both", order="zipf")
            yield established(sessions, rounds, _goal(sessions), direction="both", mapping="dependent")
    some = min(scales[-1], MANY)
    for batch in BATCHES:
        yield established(some, rounds, "", batch=batch)
    for sessions in scales:
        yield look_up(sessions, max(rounds // 2, figures.ROUNDS))
    yield unsolicited(some, figures.ROUNDS)
    yield without_hugepages(some, figures.ROUNDS)


def add(what: Any) -> None:
    parser = what.add_parser(
        "scales", help="core, look-up and unsolicited packets at all scales, a figure each"
    )
    parser.add_argument("--sessions", type=int, nargs="+", default=list(QUICK))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--everything", action="store_true", help="Zipf order and endpoint-dependent mapping too"
    )
    parser.add_argument("--json", action="store_true")


def run(given: argparse.Namespace) -> None:
    figures.say(measure(tuple(given.sessions), given.rounds, given.everything), given.json)
