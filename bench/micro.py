# SPDX-License-Identifier: Apache-2.0
"""The steps of a packet's way, and of a session's into the peer and the switch, one by one: nanoseconds per item.

The steps of the core are those of micro.c; those in Python take numpy batches of ``BATCH`` sessions, as the product does.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench import figures, rules
from bench.core import CORE
from bench.figures import Figure
from nat_control.sync import codec
from switch_agent import channel as openflow
from switch_agent.compile import Compiler, NextHopGroups
from switch_agent.pipeline import Pipeline, Side

SESSIONS = 1 << 18
BATCH = 4096
GOALS = {"hash, avx2": "<= 1 ns"}


@dataclass(frozen=True, slots=True)
class Step:
    """``run`` does ``items`` of them at once, after ``prepare``."""

    name: str
    items: int
    prepare: Callable[[], object]
    run: Callable[[], object]


@functools.cache
def steps(sessions: int = SESSIONS) -> tuple[Step, ...]:
    """All that this CPU can do."""
    return (*_of_the_core(sessions), *_of_the_codec(), _of_the_switch())


def _of_the_core(sessions: int) -> Iterator[Step]:
    included = {"pipeline.c", "flow_hash.c"}
    sources = tuple(sorted(path.name for path in CORE.glob("*.c") if path.name not in included))
    library = figures.library("micro", sources=sources)
    library.micro_name.restype, library.micro_can.restype = ctypes.c_char_p, ctypes.c_bool
    library.micro_start(sessions)
    for i in range(library.micro_steps()):
        if library.micro_can(i):
            yield Step(
                library.micro_name(i).decode(),
                library.micro_items(i),
                functools.partial(library.micro_prepare, i),
                functools.partial(library.micro_run, i),
            )


def _of_the_codec() -> Iterator[Step]:
    records = rules.sessions(BATCH)
    message = codec.InstallEntries(1, records)
    encoded = codec.encode(message, 1)
    yield Step("sync codec, encode", BATCH, lambda: None, lambda: codec.encode(message, 1))
    yield Step("sync codec, decode", BATCH, lambda: None, lambda: list(codec.Decoder().feed(encoded)))


def _of_the_switch() -> Step:
    compiler = Compiler(
        Pipeline(Side(1, 3), Side(2, 4), mac=0x02005E000101),
        openflow.flow_mod,
        openflow.delete_by_cookie,
        add=openflow.ADD,
        delete_strict=openflow.DELETE_STRICT,
    )
    records = rules.sessions(BATCH)
    groups = NextHopGroups(np.ones(BATCH, np.uint32), np.full(BATCH, 2, np.uint32))
    return Step("flow-mod compile", BATCH, lambda: None, lambda: compiler.install(records, groups, 1))


def _once(step: Step) -> float:
    step.prepare()
    begin = time.perf_counter_ns()
    step.run()
    return (time.perf_counter_ns() - begin) / step.items


def measure(rounds: int = 31, sessions: int = SESSIONS) -> Iterator[Figure]:
    """ns per item of each step; all take turns, round by round."""
    chosen = steps(sessions)
    values, speeds = figures.interleaved(
        {step.name: functools.partial(_once, step) for step in chosen}, rounds
    )
    for step in chosen:
        goal: dict[str, Any] = {"goal": GOALS[step.name]} if step.name in GOALS else {}
        yield figures.figure(
            f"micro: {step.name}", "ns", values[step.name], speeds=speeds, items=step.items, **goal
        )


def add(what: Any) -> None:
    of_micro = what.add_parser("micro", help="ns of each step of a packet's and a session's way")
    of_micro.add_argument("--rounds", type=int, default=31)
    of_micro.add_argument("--sessions", type=int, default=SESSIONS)
    of_micro.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    figures.say(measure(arguments.rounds, arguments.sessions), arguments.json)
