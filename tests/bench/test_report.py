# SPDX-License-Identifier: Apache-2.0
"""The report of the pair's figures, from planted rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import pair, report
from bench.failover import ARRIVAL, Case, endpoints, evaluate

KILL: dict[str, Any] = {
    "figure": "kill, 1 flow at 1000 pps",
    "must": "median ≤ 3",
    "good": "≤ 1",
    "how": "kill",
    "rate": 1000,
    "flows": 1,
    "trials": 3,
    "server_mb": 100,
    "sessions_lost": 0,
    "packets_lost": {"min": 0, "median": 1, "max": 2},
    "detect_ms": {"min": 0.2, "median": 0.3, "max": 0.4},
    "each": [
        {"lost": n, "delivered_first_second": 1 - n / 1000, "lost_after": n, "sessions_lost": 0, "detect_ms": 0.3, "reaction_ms": 0.02,
         "first_good_ms": 1.0 + n, "timeline": [10] * 190 if n != 1 else None}
        for n in range(3)
    ],
}  # fmt: skip
NEW = {"figure": "new flow, off", "must": "", "good": "", "mode": "off", "added_ms": {"p50": 0.01, "p99": 0.2, "max": 1.0},
       "added_ms_by_percent": [n / 1e4 for n in range(101)], "known_ms_by_percent": [n / 1e4 for n in range(101)]}  # fmt: skip
SPLIT = {"figure": "split processing", "must": "", "good": "", "partition": "new_at_peer", "flows": 1024, "rate": 1000,
         "server_s": [0.0, 0.1, 0.2], "server_packets": [0, 90, 100], "received_bin_s": 0.05, "received": [50, 50, 50]}  # fmt: skip
FAILED = {"figure": "link down, 1000 pps", "must": "≤ 2", "good": "0", "failed": "the switch ended"}


def test_a_report_has_a_line_for_each_figure_and_plots_where_it_can(tmp_path: Path) -> None:
    rows = [KILL, FAILED, NEW, SPLIT]
    (tmp_path / "figures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.write(report.read(tmp_path / "figures.jsonl"), tmp_path).read_text()
    assert "| kill, 1 flow at 1000 pps | median ≤ 3 | ≤ 1 | 3 | lost 0 / 1 / 2; " in text
    assert "failover 1: 1.00000 of first second, 0 lost once it was noticed, 0 sessions" in text
    assert "failover 3: 0.99800 of first second, 2 lost once it was noticed, 0 sessions" in text
    assert "**failed**: the switch ended" in text
    assert "p50 0.01, p99 0.2" in text


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = report.write([KILL, NEW, SPLIT], tmp_path).read_text()
    for name in ("split-processing", "new-flows", "failover-steps", "failover-timeline"):
        assert f"![{name}.png]({name}.png)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_trial_counts_what_was_lost_before_the_end_apart() -> None:
    """1000 packets in a second; the end after half of it; 3 lost long before, 5 from the end on."""
    sent = np.arange(1000, dtype=np.uint64) * np.uint64(10**6)
    gone = np.zeros(1000, np.bool_)
    gone[10:13] = gone[500:505] = True
    arrivals = np.zeros(int((~gone).sum()), ARRIVAL)
    arrivals["sequence"] = np.flatnonzero(~gone)
    arrivals["sent"] = sent[~gone]
    arrivals["arrived"] = arrivals["sent"] + np.uint64(100_000)
    ended = 500_000_000
    took = {"detected": ended + 300_000, "written": ended + 320_000, "reason": "TCP end"}
    trial = evaluate(sent, arrivals, ended, {"takeover": took}, Case())
    assert (trial.lost, trial.lost_before, trial.lost_after) == (8, 3, 4)
    assert (trial.detect, trial.written) == (0.3, 0.32)
    assert trial.first_good == 5.1
    assert trial.first_second == pytest.approx(1 - 4 / 499, abs=1e-6)
    assert sum(trial.timeline) == 992


def test_a_flow_is_where_it_came_from_last() -> None:
    arrivals = np.zeros(4, ARRIVAL)
    arrivals["sequence"] = [0, 1, 4, 3]  # 4 is flow 0 again, and flow 2 never comes
    arrivals["port"] = [1000, 1001, 2000, 1003]
    assert endpoints(arrivals, 4).tolist() == [2000, 1001, 0, 1003]


def test_figures_have_names_of_their_own() -> None:
    names = [figure.name for figure in pair.FIGURES]
    assert len(set(names)) == len(names)
