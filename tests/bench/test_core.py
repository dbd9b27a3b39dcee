# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and says what it promises; how fast is not a test's matter."""

from __future__ import annotations

import pytest

from bench.core import OPTIONS
from tests.bench.command import bench


@pytest.mark.parametrize("mapping", ["independent", "dependent"])
def test_core(mapping: str) -> None:
    results = bench("core", "--sessions", "1", "500", "--rounds", "2", "--mapping", mapping, timeout=60)
    for result, sessions in zip(results, (1, 500), strict=True):
        assert result["sessions"] == sessions
        assert result["min"] <= result["ns_per_packet"] <= result["max"]
        assert result["floor_ns"] > 0


def test_options() -> None:
    """What every option costs, on packets that are all forwarded: core.c ends at one that is not."""
    results = bench("options", "--sessions", "500", "--pairs", "1", timeout=60)
    assert [result["option"] for result in results] == list(OPTIONS)
    assert all(
        result[f"{what}_ratio"]["min"] > 0 for result in results for what in ("packet", "open", "close")
    )


def test_lookup() -> None:
    (result,) = bench("lookup", "--sessions", "500", "--rounds", "3", timeout=60)
    assert result["sessions"] == 500
    assert result["ratio"]["min"] > 0
