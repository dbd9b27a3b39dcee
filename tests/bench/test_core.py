# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and says what it promises; how fast is not a test's matter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.core import OPTIONS


@pytest.mark.parametrize("mapping", ["independent", "dependent"])
def test_core(mapping: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *f"bench core --sessions 1 500 --rounds 2 --mapping {mapping} --json".split()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for line, sessions in zip(done.stdout.splitlines(), (1, 500), strict=True):
        result = json.loads(line)
        assert result["sessions"] == sessions
        assert result["min"] <= result["ns_per_packet"] <= result["max"]
        assert result["floor_ns"] > 0


def test_options() -> None:
    """What every option costs, on packets that are all forwarded: core.c ends at one that is not."""
    done = subprocess.run(
        [sys.executable, "-m", *["bench", "options", "--sessions", "500", "--pairs", "1", "--json"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["option"] for result in results] == list(OPTIONS)
    assert all(
        result[f"{what}_ratio"]["min"] > 0 for result in results for what in ("packet", "open", "close")
    )


def test_lookup() -> None:
    done = subprocess.run(
        [sys.executable, "-m", *["bench", "lookup", "--sessions", "500", "--rounds", "3", "--json"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    result = json.loads(done.stdout)
    assert result["sessions"] == 500
    assert result["ratio"]["min"] > 0
