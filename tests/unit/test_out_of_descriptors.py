# SPDX-License-Identifier: Apache-2.0
"""A process that can open nothing more still looks at its links, and believes what it saw last."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from nat_fastpath.dpdk.binding import Port
from nat_fastpath.dpdk.kernel_interface import Interface


@contextlib.contextmanager
def nothing_more() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("last", [False, True])
def test_links_without_a_descriptor(last: bool) -> None:
    interface = Interface.__new__(Interface)
    interface.name = "lo"
    interface._running = last
    with nothing_more():
        assert interface.is_running is last


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("names", [True, False])
def test_taps_without_a_descriptor(last: bool, names: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``names``: not even the names of interfaces can be had."""
    port = Port.__new__(Port)
    port._tap, port._tap_files, port._tap_up = "away", (Path("/proc/self/fdinfo/0"),), last
    if not names:
        monkeypatch.setattr("nat_fastpath.dpdk.binding.interface_names", list)
    assert port._tap_link(True) is False, "nobody has a tap open there"
    with nothing_more():
        assert port._tap_link(not last) is last
