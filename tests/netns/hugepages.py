# SPDX-License-Identifier: Apache-2.0
"""Hugepages for a test, and put back afterwards."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@contextlib.contextmanager
def hugepages(mb: int) -> Iterator[None]:
    """``mb`` of them are free in here, for one test of this machine at a time. Skips where there are none to be had."""
    wanted = mb // 2
    number = POOL / "nr_hugepages"
    try:
        lock = number.open("r+")
    except OSError as error:
        pytest.skip(f"no hugepages can be reserved here: {number}: {error.strerror}")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(number.read_text())
        try:
            free = int((POOL / "free_hugepages").read_text())
            try:
                number.write_text(str(before + max(0, wanted - free)))
            except OSError as error:
                pytest.skip(f"no hugepages can be reserved here: {number}: {error.strerror}")
            free = int((POOL / "free_hugepages").read_text())
            if free < wanted:
                pytest.skip(
                    f"{wanted} hugepages of 2 MB are needed, and memory for only {free} is in one piece"
                )
            yield
        finally:
            with contextlib.suppress(OSError):
                number.write_text(str(before))
