# SPDX-License-Identifier: Apache-2.0
"""Stops one thread of another process, while the others go on: no signal can do that, ptrace(2) can."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH, WALL = 0x4206, 0x4207, 17, 0x40000000


@contextlib.contextmanager
def stopped_thread(pid: int, name: str) -> Iterator[None]:
    """The thread that is called ``name`` stands still in here. Raises OSError, LookupError when there is none."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    found = [int(task.name) for task in threads if (task / "comm").read_text().strip() == name]
    if not found:
        raise LookupError(f"process {pid} has no thread {name}")
    _ptrace(PTRACE_SEIZE, found[0])
    try:
        _ptrace(PTRACE_INTERRUPT, found[0])
        os.waitpid(found[0], WALL)
        yield
    finally:
        try:
            _ptrace(PTRACE_DETACH, found[0])
        except OSError:  # the process has ended, and is not gone before this is taken note of
            with contextlib.suppress(ChildProcessError):
                os.waitpid(found[0], WALL)


def _ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, thread, None, None) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
