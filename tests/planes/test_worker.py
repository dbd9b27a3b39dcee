# SPDX-License-Identifier: Apache-2.0
"""The same suite over a core that a DPDK worker runs: in a process and a namespace of their own."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from nat_control.lab import Lab
from tests.planes.conftest import WORKER_ONLY

HERE = Path(__file__).parent


@pytest.mark.skipif(WORKER_ONLY in os.environ, reason="this is that process")
@pytest.mark.timeout(300)
def test_the_suite_with_a_running_worker() -> None:
    suite = [str(path) for path in sorted(HERE.glob("test_*.py")) if path.name != Path(__file__).name]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite]
    with Lab() as lab:
        done = lab.namespace("worker").attempt(
            "env", f"--chdir={HERE.parents[1]}", f"{WORKER_ONLY}=1", *pytest_, timeout=280
        )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed, done.stdout
    assert int(passed[1]) > 25
    assert "skipped" not in done.stdout
