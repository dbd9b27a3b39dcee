# SPDX-License-Identifier: Apache-2.0
"""Hugepages of 2 MB for a while: one process at a time, and as many as before afterwards, even if it was killed meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
NUMBER, FREE = POOL / "nr_hugepages", POOL / "free_hugepages"
BEFORE = Path("/run/tandem-nat-hugepages")  # the lock; while some are reserved, how many there were before
MB = 2


class NoHugepages(Exception):
    """One line."""


def free_mb() -> int:
    return int(FREE.read_text()) * MB if FREE.exists() else 0


def total_mb() -> int:
    return int(NUMBER.read_text()) * MB if NUMBER.exists() else 0


@contextlib.contextmanager
def reserved(mb: int) -> Iterator[None]:
    """So many are free in here; waits until nobody else is in here. Raises NoHugepages."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(BEFORE.open("a+"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            _put_back(lock)  # for one that was killed
            lock.write(NUMBER.read_text())
            lock.flush()
            stack.callback(_put_back, lock)
            missing = (mb - free_mb()) // MB
            if missing > 0:
                NUMBER.write_text(str(int(NUMBER.read_text()) + missing))
        except OSError as error:
            raise NoHugepages(
                f"no hugepages can be reserved here: {error.filename}: {error.strerror}"
            ) from None
        if (free := free_mb()) < mb:
            raise NoHugepages(f"{mb} MB of hugepages are needed, and memory for only {free} is in one piece")
        yield


@contextlib.contextmanager
def if_there_are(mb: int) -> Iterator[None]:
    """The same where they can be had."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NoHugepages):
            stack.enter_context(reserved(mb))
        yield


def _put_back(lock: TextIO) -> None:
    lock.seek(0)
    if before := lock.read().strip():
        with contextlib.suppress(OSError):
            NUMBER.write_text(before)
        lock.truncate(0)
