# SPDX-License-Identifier: Apache-2.0
"""A process that can open nothing more still looks at its links, and believes what it saw last."""

from __future__ import annotations

import resource

import pytest

from nat_fastpath.dpdk.kernel_interface import Interface


@pytest.mark.parametrize("last", [False, True])
def test_links_without_a_descriptor(last: bool) -> None:
    interface = Interface.__new__(Interface)
    interface.name = "lo"
    interface._running = last
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert interface.is_running is last
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
