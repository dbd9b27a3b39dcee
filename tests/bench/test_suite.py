# SPDX-License-Identifier: Apache-2.0
"""The suite: a line for each figure with machine and commit, and a report that tells what it does not know."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import figures, suite, suite_report
from nat_control.lab import until
from tests.bench.command import bench

WITH = {"machine": "m", "hugepages_mb": 0, "commit": "c", "load": 0.1}


def planted() -> list[dict[str, Any]]:
    core = [
        {**figures.figure(f"core, {n} sessions, {way}", "ns", [20.0 + n] * 5, floor=[10.0] * 5, goal="<= 4.2 x"), "part": "scales",
         "kind": "core", "sessions": n, "direction": way, "order": "uniform", "batch": 32}
        for n in (1, 1000) for way in ("both", "out")
    ]  # fmt: skip
    curve = {"curve": [[1.0, 0.5], [9.0, 1.0]], "share": 0.5, "rate": 1e6, "p50": 1.0, "lost": 0}
    rest = [
        figures.figure("unsolicited, 5 sessions", "ns", [9.0], floor=[10.0], kind="unsolicited", sessions=5) | {"part": "scales"},
        figures.figure("latency: known", "µs (p99)", [9.0], kind="known", **curve) | {"part": "latency"},
        figures.figure("latency: new", "µs (p99)", [9.0], kind="new", **curve) | {"part": "latency"},
        figures.figure("new flows: set-up", "M/s", [4.0, 4.1]) | {"part": "newflows"},
        figures.figure("micro: hash", "ns", [1.0, 1.1]) | {"part": "micro"},
        figures.figure("peers: VPP, 1,024 flows over memif", "Mpps", [4.0], floor=[2.0], floor_name="VPP") | {"part": "peers"},
        figures.figure("noise", "ns", [1.0, 5.0, 9.0, 20.0, 40.0]) | {"part": "micro"},
        figures.missing("peers: other", "not installed") | {"part": "peers"},
    ]  # fmt: skip
    return [{**row, **WITH} for row in (*core, *rest)]


def test_the_report_tells_figures_floors_and_what_it_does_not_know(tmp_path: Path) -> None:
    text = suite_report.write(planted(), tmp_path).read_text()
    assert (
        "| core, 1 sessions, both | 21 ns (21 … 21) | floor 10 | 2.1 (2.1 … 2.1) | <= 4.2 x | 5 (0) | 0.1 |"
        in text
    )
    assert "| noise | *drowned in noise* |" in text
    assert "| peers: other | **not installed** |" in text
    assert "## scales" in text
    assert "## micro" in text


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = suite_report.write(planted(), tmp_path).read_text()
    for name in (
        "throughput",
        "unsolicited",
        "directions",
        "latency-known",
        "latency-new",
        "new-flows",
        "devices",
        "micro",
    ):
        assert f"]({name}.png)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 3000


def test_the_latest_of_each_figure_counts(tmp_path: Path) -> None:
    lines = tmp_path / "figures.jsonl"
    told = [("a", 1), ("b", 2), ("a", 3)]
    lines.write_text("".join(json.dumps({"figure": name, "median": value}) + "\n" for name, value in told))
    assert [(row["figure"], row["median"]) for row in suite_report.latest(lines)] == [("b", 2), ("a", 3)]


def test_a_part_that_fails_says_why() -> None:
    (found,) = suite.part("broken", "scales --sessions nothing")
    assert found["figure"] == "broken"
    assert "failed: " in found["missing"]
    assert "nothing" in found["missing"]


def test_a_part_that_does_not_end_is_given_up() -> None:
    *_, last = suite.part("long", "newflows --sessions 4096 --seconds 60 --many 10000", longest=2)
    assert last == {"figure": "long", "missing": "failed: no end after 2 s"}


def test_a_suite_that_is_told_to_end_takes_its_part_along(tmp_path: Path) -> None:
    words = ["suite", "--scale", "quick", "--only", "newflows", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-m", "bench", *words], stderr=subprocess.DEVNULL) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        (child,) = until("it has begun", lambda: children.read_text().split())
        running.terminate()
        assert running.wait(20) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()


def test_a_part_of_the_suite(tmp_path: Path) -> None:
    (told,) = bench("suite", "--scale", "smoke", "--only", "io", "--out", str(tmp_path))
    assert told["report"] == str(tmp_path / "report.md")
    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert {"figure", "unit", "machine", "commit", "load", "at", "part", "scale"} <= set(row)
    assert set(suite.PARTS["quick"]) <= set(suite.PARTS["full"])
