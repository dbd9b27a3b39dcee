# SPDX-License-Identifier: Apache-2.0
"""Everything: `make bench` in minutes, `make bench-full` at all scales. A line of JSON per figure, and a report.

Each part is a process of its own, ``python -m bench PART --json``; one that fails says why, and the others go on. Lines are added
to ``bench/results/figures.jsonl`` with machine and commit; the report has the latest of each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import figures, suite_report
from bench.core import ROOT
from bench.ends import hugepages_mb, reserved_hugepages
from bench.figures import Figure, tell

RESULTS = ROOT / "bench" / "results"
MILLION = 1_000_000
HUGEPAGES_MB = 2048  # for those whose memory is shared between processes, while they run
SHARED = ("links", "imix", "memif-14M", "rfc9693", "peers")
PARTS: dict[str, dict[str, str]] = {
    "quick": {
        "scales": "scales",
        "micro": "micro",
        "newflows": f"newflows --many {MILLION}",
        "latency": "latency",
        "cores": "cores",
        "io": "io --devices replay ring --flows 1 1024 28000 --seconds 1",
        "links": "io --devices memif vhost af_packet af_xdp --flows 28000 --seconds 1",
        "rfc9693": "io --devices memif --flows 12000 --seconds 0.5 --rfc9693 5e6",
        "peers": "peers --flows 28000 --seconds 1",
    },
    "full": {
        "scales": "scales --everything --rounds 61 --sessions 1 1024 28672 262144 1048576 4194304 14000000",
        "options": "options",
        "micro": "micro --rounds 101",
        "newflows": "newflows --rounds 9 --seconds 5",
        "latency": "latency --rounds 9 --seconds 3 --pair",
        "cores": "cores --rounds 9 --flows 1048576",
        "io": "io --devices replay ring --flows 1 1024 28000 1000000 4000000",
        "links": "io --devices memif vhost af_packet af_xdp --flows 1 1024 28000 1000000",
        "memif-14M": "io --devices memif --flows 14000000 --seconds 5",
        "imix": "io --devices ring memif --flows 28000 --size imix",
        "rfc9693": "io --devices memif vhost af_packet --flows 120000 --seconds 2 --rfc9693 20e6",
        "peers": "peers --flows 1 1024 28000 262144 1000000",
    },
    # that all of it works, in a minute; no figure of it means anything
    "smoke": {
        "scales": "scales --sessions 500 --rounds 3",
        "micro": "micro --rounds 2 --sessions 131072",
        "newflows": "newflows --sessions 4096 --rounds 2 --seconds 0.1 --many 10000 --new-rate 1000",
        "latency": "latency --flows 2000 --rounds 2 --seconds 0.1",
        "io": "io --devices replay --flows 100 --rounds 2 --seconds 0.2",
    },
}


def environment() -> dict[str, Any]:
    """What every figure is told with."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]

    def said(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = "+" if said("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} CPUs, Linux {platform.release()}",
        "hugepages_mb": hugepages_mb(),
        "load": round(os.getloadavg()[0], 1),
        "commit": said("rev-parse", "--short", "HEAD") + changed,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def part(name: str, words: str) -> Iterator[Figure]:
    """The figures of one part, as they come; at its end why it failed, if it did."""
    command = [sys.executable, "-m", "bench", *words.split(), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    for line in process.stdout:
        if line.startswith("{"):
            found = json.loads(line)
            yield (
                found
                if "figure" in found
                else {"figure": f"{name}: {next(iter(found.values()))}", "other": found}
            )
    why = process.stderr.read().strip().splitlines()
    if process.wait():
        yield figures.missing(name, f"failed: {why[-1] if why else f'exit code {process.returncode}'}")


def measure(scale: str, only: list[str], out: Path) -> Path:
    """Adds lines to ``out``/figures.jsonl; the path of the report."""
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "figures.jsonl"
    lines.touch()
    for name, words in PARTS[scale].items():
        if only and name not in only:
            continue
        tell(f"-- {name}")
        with reserved_hugepages(HUGEPAGES_MB if name in SHARED else 0):
            _part(name, words, scale, lines)
    return suite_report.write(suite_report.latest(lines), out)


def _part(name: str, words: str, scale: str, lines: Path) -> None:
    """Each line is in the file as soon as it is there."""
    for found in part(name, words):
        with lines.open("a") as file:
            file.write(json.dumps({**found, "part": name, "scale": scale, **environment()}) + "\n")
        if "other" not in found:
            tell(figures.line(found))


def add(what: Any) -> None:
    parser = what.add_parser("suite", help="everything, with a report and plots in bench/results (root)")
    parser.add_argument("--scale", choices=PARTS, default="quick")
    parser.add_argument("--only", nargs="*", default=[], help="parts by name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="of what was measured before, and no more")
    parser.add_argument("--json", action="store_true", help="the report's path as JSON")


def run(given: argparse.Namespace) -> None:
    if given.report:
        path = suite_report.write(suite_report.latest(given.out / "figures.jsonl"), given.out)
    else:
        path = measure(given.scale, given.only, given.out)
    print(json.dumps({"report": str(path)}) if given.json else f"report: {path}")
