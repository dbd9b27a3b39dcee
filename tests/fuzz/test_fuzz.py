# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzers; ``make fuzz`` runs them longer."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(240)
def test_fuzzers_find_nothing_in_a_short_run() -> None:
    done = subprocess.run(["make", "-C", str(HERE), "smoke"], capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("nothing found") == 7, done.stdout
