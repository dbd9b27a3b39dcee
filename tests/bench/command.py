# SPDX-License-Identifier: Apache-2.0
"""A benchmark as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def bench(*arguments: str, timeout: float = 115) -> list[dict[str, Any]]:
    """The figures that ``python -m bench ... --json`` says. It must end with 0."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]
