# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and says what it promises; how fast is not a test's matter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


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
