# SPDX-License-Identifier: Apache-2.0
"""What comes and goes is counted right; how fast is not a test's matter."""

from __future__ import annotations

from bench.replay import Replay, core_config
from tests.bench.command import bench

FLOWS = 2000


def test_sessions_come_carry_packets_and_go() -> None:
    with Replay(core_config(FLOWS), FLOWS) as replay:
        opened = replay.open(0, FLOWS)
        assert (opened.opened, opened.refused, opened.packets) == (FLOWS, (0, 0), (0, FLOWS))
        assert replay.core.counters()["sessions"] == replay.events == FLOWS
        replay.draw()
        known = replay.run(seconds=0.1, has_known=True, known_rate=100_000)
        assert known.refused == (0, 0)
        assert 0 < known.packets[0] <= 10_000
        assert known.latency[0].sum() == known.packets[0]
        assert 0 < known.p(0.5) <= known.p(0.999)
        table = replay.open(FLOWS, 10)
        assert (table.opened, table.refused) == (0, (0, 10))  # there is no room
        while replay.core.counters()["sessions"]:
            replay.age(4000, 1e-5, 64)
        assert (replay.events, replay.events_lost) == (2 * FLOWS, 0)


def test_packets_that_come_too_fast_are_lost_and_counted() -> None:
    with Replay(core_config(FLOWS), FLOWS) as replay:
        replay.open(0, FLOWS)
        replay.draw()
        flood = replay.run(seconds=0.05, has_known=True, known_rate=1e9)
        assert flood.lost[0] > flood.packets[0] > 0


def test_steps_of_bursts() -> None:
    """Two indexes of a session, those of its mapping and now and then of its host: at least three buckets for each."""
    with Replay(core_config(FLOWS)) as replay:
        steps = replay.steps_of_bursts(0, 10)
        assert replay.core.counters()["sessions"] == 320
    assert len(steps) == 10
    assert 3 * 32 <= steps.min() <= steps.max() <= 4 * 32 * 24


def test_all_figures() -> None:
    around = "--sessions 4096 --rounds 2 --seconds 0.2 --many 10000 --new-rate 1000"
    found = {one["figure"]: one for one in bench("newflows", *around.split(), timeout=110)}
    assert found["new flows: set-up in the core"]["events_lost"] == 0
    assert found["new flows: set-up in the core"]["refused"] == 0
    assert found["bytes per session, endpoint-dependent"]["median"] <= 110
    assert found["bytes per session, endpoint-independent"]["median"] <= 150
    assert "start with max_sessions 10,000" in found
    assert "ageing of 10,000 sessions: per poll" in found
    assert "new flows: p99.9 of established ones beside them" in found
