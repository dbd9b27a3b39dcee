# SPDX-License-Identifier: Apache-2.0
"""A memif whose other end comes and goes under load, hundreds of times: DPDK unmaps its rings in a thread of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dpdk import memif_process
from tests.dpdk.dpdk_process import run


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("role", ["server", "client"])
def test_workers_outlive_the_other_end(tmp_path: Path, role: str, n: int) -> None:
    said = run(memif_process.come_and_go, str(tmp_path), role, n, 4)
    assert said["times"] > 20
    assert said["received"] > 1000
    assert said.get("sent", 1) > 0
    assert said["in_use"] == 0, "buffers are lost"
