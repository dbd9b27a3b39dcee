# SPDX-License-Identifier: Apache-2.0
"""The steps one by one. ``pytest tests/bench/test_micro.py --benchmark-enable`` measures them, without it they run once.

Each is on batches, so Python is not measured: divide by ``items``. `python -m bench micro` has them in turns, which is what a
comparison needs.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import micro
from tests.bench.command import bench

SESSIONS = 1 << 17
STEPS = {step.name: step for step in micro.steps(SESSIONS)}


@pytest.mark.parametrize("name", STEPS)
def test_step(name: str, benchmark: BenchmarkFixture) -> None:
    step = STEPS[name]
    benchmark.extra_info["items"] = step.items
    benchmark.pedantic(step.run, setup=lambda: step.prepare() and None, rounds=31, warmup_rounds=2)


def test_all_steps_in_turns() -> None:
    found = bench("micro", "--rounds", "2", "--sessions", str(SESSIONS), timeout=100)
    assert [one["figure"].removeprefix("micro: ") for one in found] == list(STEPS)
    for one in found:
        assert one["rounds"] + one["dropped"] == 2
        assert one["rounds"] == 0 or 0 < one["min"] <= one["median"] <= one["max"]
    wanted = {"parse", "look-up", "insert", "delete", "allocate", "rewrite", "event"}
    assert wanted | {"sync codec, encode", "flow-mod compile"} <= set(STEPS)
