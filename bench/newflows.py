# SPDX-License-Identifier: Apache-2.0
"""New flows: how fast sessions come and go, what that does to those that are there, the longest burst, and 14 million of them.

The profile is that of churn: no quarantine, since ports that rest two minutes stop millions per second whatever the core
does; endpoint-independent mappings, all events read by the control loop. The device is that of replay.h.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from bench import figures
from bench.figures import Figure
from bench.replay import PER_HOST, Outcome, Replay, core_config
from nat_fastpath.engine import Core, memory_for

PROFILE = "churn: quarantine off, endpoint-independent, events read by the control loop"
HALF = 0.5  # of capacity, at which established traffic runs
TIMEOUT = 3.0  # seconds after which new flows go, while established ones run
SETTLED = 1.02  # times the established sessions: the new ones are gone
BURSTS = 500  # that are looked at for their steps
CHUNKS = 56  # of the sessions that fill a table: its steps show whether anything stops new flows meanwhile
POLLS = 512  # between two looks at the events: no more sessions close than the ring has room for
MICRO = 1e3


def measure(sessions: int, rounds: int, seconds: float, many: int, new_rate: float) -> Iterator[Figure]:
    """``sessions`` in the table; ``many`` of them for start and ageing; ``new_rate`` beside established ones."""
    yield from set_up_and_tear_down(sessions, rounds)
    yield from beside_established(sessions, rounds, seconds, new_rate)
    yield from many_sessions(many)


def set_up_and_tear_down(sessions: int, rounds: int) -> Iterator[Figure]:
    opened: list[Outcome] = []
    closed: list[float] = []
    worst_poll, machine, lost, speeds = 0.0, 0.0, 0, [figures.probe()]
    for _ in range(rounds):
        with Replay(core_config(sessions)) as replay:
            opened.append(replay.open(0, sessions))
            took, worst, _ = _age(replay)
            closed.append(sessions / took)
            worst_poll = max(worst_poll, worst)
            machine = max(machine, replay.machine_worst(0.1))
            lost += replay.events_lost + abs(replay.events - 2 * sessions)
        speeds.append(figures.probe())
    more: dict[str, Any] = {"sessions": sessions, "profile": PROFILE, "events_lost": lost}
    more["refused"] = sum(one.refused[1] for one in opened)
    for name, values, goal in (
        ("set-up in the core", [one.opened / one.core_ns * MICRO for one in opened], ">= 4"),
        ("set-up with all events read", [one.opened / one.wall_ns * MICRO for one in opened], ">= 4"),
        ("tear-down in the core", [value * MICRO for value in closed], ""),
    ):
        yield figures.figure(f"new flows: {name}", "M/s", values, speeds=speeds, goal=goal, **more)
    bursts = [one.worst_ns / MICRO for one in opened]
    beside = {
        "machine_worst_us": round(machine / MICRO, 1),
        "interrupted": sum(one.interrupted for one in opened),
    }
    yield figures.figure("new flows: longest burst", "µs", bursts, speeds=speeds, goal="<= 50", **beside)
    yield figures.figure(
        "new flows: longest poll while ageing", "µs", [worst_poll / MICRO], goal="<= 50", **beside
    )
    yield _steps(sessions)


def _steps(sessions: int) -> Figure:
    """Of bursts that fill the last of a table: what a burst can touch at most, whatever the clock says."""
    last = min(BURSTS * 32, sessions // 2)
    with Replay(core_config(sessions)) as replay:
        replay.open(0, sessions - last)
        steps = replay.steps_of_bursts(sessions - last, last // 32)
    return figures.figure(
        "new flows: index buckets looked at by a burst of 32, table nearly full", "buckets", steps.tolist(),
        bound="32 x 4 indexes x 24", counted=True,
    )  # fmt: skip


def _age(replay: Replay) -> tuple[float, float, int]:
    """Until no session is left: ns within the core, the longest turn, and how many polls it took."""
    spent, worst, polls, ahead = 0.0, 0.0, 0, 4000.0
    while replay.core.counters()["sessions"]:
        turn = replay.age(ahead, 1e-5, POLLS)
        ahead, polls = 0, polls + turn.polls
        spent, worst = spent + turn.core_ns, max(worst, turn.worst_ns)
    return spent, worst, polls


def beside_established(sessions: int, rounds: int, seconds: float, new_rate: float) -> Iterator[Figure]:
    """Established flows at half of what goes, alone and while new ones come and go: their latency and loss."""
    room = sessions + int(new_rate * (TIMEOUT + seconds + 2))
    alone: list[Outcome] = []
    both: list[Outcome] = []
    speeds = [figures.probe()]
    with Replay(core_config(room, udp_timeout=TIMEOUT), sessions) as replay:
        replay.open(0, sessions)
        replay.draw()
        full = replay.run(seconds=seconds, has_known=True)
        rate = HALF * full.packets[0] / full.wall_ns * 1e9
        next_flow = sessions
        for _ in range(rounds):
            while replay.core.counters()["sessions"] > SETTLED * sessions:
                replay.run(seconds=0.5, has_known=True, known_rate=rate)
            alone.append(replay.run(seconds=seconds, has_known=True, known_rate=rate))
            asked = {"new_rate": new_rate, "new_first": next_flow}
            both.append(replay.run(seconds=seconds, has_known=True, known_rate=rate, **asked))
            next_flow += both[-1].packets[1] + both[-1].lost[1] + 64
            speeds.append(figures.probe())
        lost = replay.events_lost
    common = {"sessions": sessions, "profile": PROFILE, "events_lost": lost, "known_rate": round(rate)}
    yield figures.figure(
        "new flows: p99.9 of established ones beside them", "µs", [one.p(0.999) / MICRO for one in both],
        floor=[one.p(0.999) / MICRO for one in alone], floor_name="alone", speeds=speeds, goal="<= 2 x alone",
        lost=[one.lost[0] + one.refused[0] for one in both], lost_alone=[one.lost[0] + one.refused[0] for one in alone],
        asked_per_second=round(new_rate), **common,
    )  # fmt: skip
    yield figures.figure(
        "new flows: opened beside established ones", "M/s", [one.opened / one.wall_ns * MICRO for one in both],
        speeds=speeds, refused=[one.refused[1] + one.lost[1] for one in both], **common,
    )  # fmt: skip


def many_sessions(many: int) -> Iterator[Figure]:
    """Start with room for so many, bytes of each, how they open, and their ageing."""
    config = core_config(many)
    took = []
    for _ in range(figures.ROUNDS):
        begin = time.perf_counter()
        Core(config).close()
        took.append(time.perf_counter() - begin)
    yield figures.figure(f"start with max_sessions {many:,}", "s", took, goal="< 3")
    for mapping, goal in (("endpoint-independent", "<= 150"), ("endpoint-dependent", "<= 110")):
        memory = memory_for(core_config(many, mapping=mapping))
        each = sum(memory[part] for part in ("sessions", "index", "mappings")) / many
        yield figures.figure(
            f"bytes per session, {mapping}", "bytes", [each], goal=goal,
            pool_bytes=memory["pool"], hosts_bytes=memory["hosts"], per_host=PER_HOST,
        )  # fmt: skip
    rates, speeds = [], [figures.probe()]
    with Replay(config) as replay:
        for at in range(CHUNKS):
            first, last = many * at // CHUNKS, many * (at + 1) // CHUNKS
            opened = replay.open(first, last - first)
            rates.append(opened.opened / opened.core_ns * MICRO)
            speeds.append(figures.probe())
        begin = time.perf_counter()
        spent, worst, polls = _age(replay)
        wall = time.perf_counter() - begin
    yield figures.figure(
        f"new flows: set-up while {many:,} sessions open, in {CHUNKS} steps", "M/s", rates, speeds=speeds,
        kind="filling", sessions=many, curve=[round(rate, 3) for rate in rates],
    )  # fmt: skip
    name = f"ageing of {many:,} sessions"
    yield figures.figure(f"{name}: in the core", "s", [spent / 1e9], wall_s=round(wall, 2), polls=polls)
    yield figures.figure(f"{name}: per poll", "µs", [spent / polls / MICRO], worst_us=round(worst / MICRO, 1))


def add(what: Any) -> None:
    parser = what.add_parser(
        "newflows", help="set-up and tear-down rates, established traffic beside them, ageing"
    )
    parser.add_argument("--sessions", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=figures.ROUNDS)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--many", type=int, default=14_000_000, help="sessions for start and ageing")
    parser.add_argument(
        "--new-rate", type=float, default=1e6, help="new flows per second beside established ones"
    )
    parser.add_argument("--json", action="store_true")


def run(given: argparse.Namespace) -> None:
    figures.say(measure(given.sessions, given.rounds, given.seconds, given.many, given.new_rate), given.json)
