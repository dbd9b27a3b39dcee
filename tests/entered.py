# SPDX-License-Identifier: Apache-2.0
"""This thread in another network namespace: its new sockets are of that one."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from nat_control.lab import Namespace

CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def entered(namespace: Namespace) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int) -> None:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace.full_name}") as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())
