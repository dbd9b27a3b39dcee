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
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import figures, hugepages, suite_report
from bench.core import ROOT
from bench.figures import Figure, tell

RESULTS = ROOT / "bench" / "results"
MILLION = 1_000_000
LONGEST = {"quick": 900, "full": 4 * 3600, "smoke": 120}  # seconds of a part, before it is given up
GRACE = 10  # seconds
PARTS: dict[str, dict[str, str]] = {
    "quick": {
        "scales": "scales",
        "micro": "micro",
        "newflows": "newflows",
        "latency": "latency",
        "cores": "cores",
        "io": f"io --devices replay ring --flows 1 1024 28000 {MILLION} --seconds 1",
        "memif": f"io --devices memif --flows 1 1024 28000 {MILLION}",
        "links": "io --devices memif-zc vhost af_packet af_xdp --flows 28000",
        "rfc9693": "io --devices memif --flows 12000 --seconds 0.5 --rfc9693 5e6",
        "peers": f"peers --flows 1 28000 {MILLION} --seconds 1",
    },
    "full": {
        "scales": "scales --everything --rounds 61 --sessions 1 1024 28672 262144 1048576 4194304 14000000",
        "options": "options",
        "micro": "micro --rounds 101",
        "newflows": "newflows --rounds 9 --seconds 5",
        "latency": "latency --rounds 9 --seconds 3 --pair",
        "cores": "cores --rounds 9 --flows 1048576",
        "io": "io --devices replay ring --flows 1 1024 28000 1000000 4000000",
        "memif": "io --devices memif memif-zc --flows 1 1024 28000 1000000 4000000 14000000 --seconds 3",
        "links": "io --devices memif-zc vhost af_packet af_xdp --flows 1 1024 28000 1000000",
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
        "hugepages_mb": hugepages.total_mb(),
        "load": round(os.getloadavg()[0], 1),
        "commit": said("rev-parse", "--short", "HEAD") + changed,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def part(name: str, words: str, longest: float = 900) -> Iterator[Figure]:
    """The figures of one part, as they come; at its end why it failed, if it did. It ends when we do, and takes its labs along."""
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "bench", *words.split(), "--json"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        late = threading.Event()

        def give_up() -> None:
            late.set()
            _end(process)

        timer = threading.Timer(longest, give_up)
        timer.start()
        try:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("{"):
                    found = json.loads(line)
                    yield (
                        found
                        if "figure" in found
                        else {"figure": f"{name}: {next(iter(found.values()))}", "other": found}
                    )
            process.wait()
        finally:
            timer.cancel()
            _end(process)
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            why = (
                f"no end after {longest:g} s"
                if late.is_set()
                else said[-1]
                if said
                else f"exit code {process.returncode}"
            )
            yield figures.missing(name, f"failed: {why}")


def _end(process: subprocess.Popen[str]) -> None:
    """One that is in the middle of a long phase does not hear it."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measure(scale: str, only: list[str], out: Path) -> Path:
    """Adds lines to ``out``/figures.jsonl; the path of the report."""
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "figures.jsonl"
    lines.touch()
    for name, words in PARTS[scale].items():
        if only and name not in only:
            continue
        tell(f"-- {name}")
        _part(name, words, scale, lines)
    return suite_report.write(suite_report.latest(lines), out)


def _part(name: str, words: str, scale: str, lines: Path) -> None:
    """Each line is in the file as soon as it is there."""
    for found in part(name, words, LONGEST[scale]):
        with lines.open("a") as file:
            file.write(json.dumps({**environment(), **found, "part": name, "scale": scale}) + "\n")
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
