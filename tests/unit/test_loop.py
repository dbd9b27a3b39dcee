# SPDX-License-Identifier: Apache-2.0
"""The control loop over the events of several cores: each ring has its own order, and tells its own losses."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nat_control import loop
from nat_control.loop import ControlLoop, pause
from nat_fastpath.cores import AnyCore, make, parts
from nat_fastpath.engine import EVENT_OPEN, slice_of
from tests.packets import INSIDE, SERVER, config, frame, udp

HOSTS = [f"10.0.0.{i}" for i in range(20, 60)]


def open_sessions(core: AnyCore, port: int) -> int:
    """One of each host; how many."""
    cores = parts(core)
    for host in HOSTS:
        data = frame(udp(host, port, SERVER, 53))
        cores[slice_of(data, "internal", len(cores))].burst([(INSIDE, data)], time.monotonic_ns())
    return len(HOSTS)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_events_of_all_cores_are_taken_and_losses_are_counted(n: int) -> None:
    core, seen = make(config(), n), []
    turns = ControlLoop(core, 2, lambda: None, sink=seen.append)
    assert turns.drain() is False
    for port in (1000, 1001):
        opened = open_sessions(core, port)
        assert turns.drain() is False
    assert turns.events == 2 * opened
    assert turns.events_lost == 0
    assert len(
        {(int(event["internal_addr"]), int(event["internal_port"])) for batch in seen for event in batch}
    ) == (2 * opened)
    assert all((batch["type"] == EVENT_OPEN).all() for batch in seen)
    assert all((np.diff(batch["sequence"].astype(np.int64)) == 1).all() for batch in seen)

    open_sessions(core, 1002)
    stolen = len(parts(core)[-1].events())
    assert 0 < stolen <= opened
    open_sessions(core, 1003)
    turns.drain()
    assert turns.events_lost == stolen
    assert turns.events + stolen == 4 * opened
    core.close()


def test_one_full_batch_says_that_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make(config(), 2)
    turns = ControlLoop(core, 2, lambda: None)
    open_sessions(core, 1000)
    monkeypatch.setattr(loop, "EVENTS", parts(core)[0].counters()["events"])
    assert turns.drain() is True
    assert turns.drain() is False
    core.close()


def test_looks_come_faster_than_new_sessions_fill_the_ring() -> None:
    assert pause(0.01, 0, 0.01) == 0.01
    assert pause(0.01, 100, 0.01) == 0.01
    for rate in (1e6, 5e6, 20e6):
        assert rate * pause(0.01, int(rate * 0.01), 0.01) <= loop.EVENTS
    assert loop.STEP * 5e6 < 65536 * 7 / 8  # a flood that begins between two looks
