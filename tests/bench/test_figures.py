# SPDX-License-Identifier: Apache-2.0
"""What is said of the rounds of a figure: medians, ratios of the same round, noise."""

from __future__ import annotations

import pytest

from bench import figures


def test_a_ratio_is_of_the_same_round() -> None:
    """The machine got slower on the way: the ratio knows nothing of it, and the median of times does."""
    found = figures.figure("x", "ns", [10, 20, 40, 80, 160], floor=[5, 10, 20, 40, 80])
    assert (found["median"], found["min"], found["max"], found["floor"]) == (40, 10, 160, 20)
    assert found["ratio"] == {"median": 2, "min": 2, "max": 2}
    assert not found["drowned"]
    assert figures.figure("x", "ns", [10, 20, 40, 80, 160])["drowned"]


def test_rounds_at_another_speed_are_dropped() -> None:
    speeds = [100, 101, 160, 102, 100, 99, 100]  # the second and third round touch the slow probe
    found = figures.figure("x", "ns", [1, 9, 9, 1, 1, 1], speeds=speeds)
    assert (found["median"], found["max"], found["rounds"], found["dropped"]) == (1, 1, 4, 2)
    assert found["speed"] == 0.99
    slow = figures.figure(
        "x", "ns", [1, 2, 2, 2], speeds=[100, 160, 160, 161, 160]
    )  # it was fast for a moment
    assert (slow["median"], slow["rounds"], slow["speed"]) == (2, 3, 0.62)
    none = figures.figure("x", "ns", [1, 2], speeds=[100, 200, 100])
    assert (none["rounds"], none["drowned"]) == (0, True)
    assert "drowned in noise" in figures.line(none)


@pytest.mark.parametrize(
    ("values", "drowned"),
    [([5], False), ([5, 6], False), ([5, 9], True), ([5, 5, 5, 5, 90], False), ([1, 2, 3, 4, 5], True)],
)
def test_noise(values: list[float], drowned: bool) -> None:
    assert figures.is_drowned(values) is drowned


def test_ways_take_turns() -> None:
    order: list[str] = []

    def way(name: str) -> float:
        order.append(name)
        return len(order)

    values, speeds = figures.interleaved({name: lambda name=name: way(name) for name in "AB"}, 3)
    assert "".join(order) == "ABABAB"
    assert values == {"A": [1, 3, 5], "B": [2, 4, 6]}
    assert len(speeds) == 4
    assert min(speeds) > 0
