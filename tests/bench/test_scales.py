# SPDX-License-Identifier: Apache-2.0
"""Scales, latency and cores run and say what they promise; how fast is not a test's matter."""

from __future__ import annotations

import os
import shutil

import pytest

from bench import cores
from tests.bench.command import bench


def test_scales() -> None:
    found = bench("scales", "--sessions", "500", "--rounds", "3")
    assert [one["kind"] for one in found].count("core") == 6
    assert {"look-up", "unsolicited", "pages"} <= {one["kind"] for one in found}
    for one in found:
        assert one["rounds"] == 0 or min(one["median"], one["floor"], one["ratio"]["median"]) > 0, one


def test_latency() -> None:
    found = bench("latency", "--flows", "2000", "--rounds", "2", "--seconds", "0.1")
    assert [(one["kind"], one["share"]) for one in found] == [
        (kind, share) for kind in ("known", "new") for share in (0.1, 0.5, 0.9)
    ]
    for one in found:
        assert one["refused"] == 0
        assert 0 < one["p50"] <= one["p99.99"]
        times, shares = zip(*one["curve"], strict=True)
        assert list(times) == sorted(times)
        assert shares[-1] == 1


def test_the_model_of_cores() -> None:
    """Without a loss n cores are n times as fast with RSS, and less in software, where a share of n - 1 is handed over."""
    found = list(cores.model(20.0, 1.0, 10.0, None))
    assert [one["median"] for one in found] == [50.0 * n for n in cores.MODELLED]
    assert [one["software"] for one in found[:2]] == [50.0, round(2e3 / 25, 2)]


@pytest.mark.skipif(shutil.which("callgrind_annotate") is None, reason="apt install valgrind")
def test_instructions_are_counted() -> None:
    assert 100 < (cores.instructions(64) or 0) < 1000


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two CPUs")
def test_two_workers() -> None:
    """Rings have one queue, so half of what comes is the other worker's."""
    rate, each, share = cores.workers(2000, 2, 0.2)
    assert ("missing" in rate) == (len(os.sched_getaffinity(0)) < 3)  # the generator needs a CPU of its own
    assert each["rounds"] == 0 or min(each["median"], each["floor"]) > 0, each
    assert 0.2 < share["median"] < 0.8  # few hosts, and slices of them are as chance has it


def test_cores() -> None:
    two, ring = (cores.spread(2000, 2, 0.05), cores.hand_off(2))
    assert two["rounds"] == 0 or two["ratio"]["median"] > 0
    assert ring["rounds"] == 0 or ring["median"] > 0
