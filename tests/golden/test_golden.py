# SPDX-License-Identifier: Apache-2.0
"""Every golden case: what is recorded goes in, and what is recorded comes out, bytes and counters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.cases import CASES
from tests.golden.record import HERE, core_of, counted, load, send
from tests.packets import OUR_MAC, START, mac_bytes

FOLDERS = sorted(path.parent for path in HERE.glob("*/in.pcap"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_golden(folder: Path) -> None:
    core = core_of(json.loads((folder / "config.json").read_text()))
    out, last = [], START
    for now, frame in load(folder / "in.pcap"):
        if now > last:
            core.settle(now)
            last = now
        out += [(now, one) for result in send(core, port_of(frame), frame, now) for one in result.frames]
    assert out == load(folder / "expected.pcap")
    assert counted(core) == json.loads((folder / "expected.json").read_text())


def port_of(frame: bytes) -> int:
    """By our MAC as destination; by the sender when the frame is a broadcast."""
    if frame[:6] == b"\xff" * 6:
        return 0 if frame[8] == 0x0A else 1
    return [mac_bytes(mac) for mac in OUR_MAC].index(frame[:6])


def test_every_case_is_recorded() -> None:
    assert [folder.name for folder in FOLDERS] == sorted(CASES)
