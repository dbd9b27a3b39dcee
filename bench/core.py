# SPDX-License-Identifier: Apache-2.0
"""Nanoseconds per packet of the core on established sessions, beside the floor of the same run: see core.c."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
CORE = ROOT / "nat_fastpath" / "core"
# those of setup.py
CFLAGS = ["-O3", "-std=gnu11", "-g", "-DNAT_HEADER_HASH=1ULL", "-Wall", "-Wextra", "-Werror"]
SESSIONS = (1, 1024, 28 * 1024, 1 << 20)


def compiled(name: str, sources: list[Path], headers: list[Path], flags: list[str]) -> Path:
    """The program of these sources, made once per state of them and their headers."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, *headers])).hexdigest()[:16]
    program = BUILD / f"{name}-{digest}"
    program.parent.mkdir(exist_ok=True)
    if not program.exists():
        subprocess.run(["gcc", *flags, "-o", str(program), *map(str, sources)], check=True)
    return program


def build() -> Path:
    """The core and its bench."""
    march = ["-march=x86-64-v2"] if platform.machine() == "x86_64" else []
    sources = [ROOT / "bench" / "core.c", *sorted(CORE.glob("*.c"))]
    return compiled("bench-core", sources, sorted(CORE.glob("*.h")), [*CFLAGS, *march, f"-I{CORE}"])


def measure(
    sessions: int,
    *,
    direction: str = "both",
    mapping: str = "independent",
    rounds: int = 61,
    options: Sequence[str] = (),
) -> Any:
    """One measurement; the dictionary that core.c prints. Times in ns: median, min and max over the rounds."""
    command = [str(build()), str(sessions), str(rounds), direction, mapping, *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


OPTIONS = ("aes", "parity", "preservation", "quarantine", "vlan", "dependent")


def option_cost(option: str, sessions: int, pairs: int) -> dict[str, Any]:
    """What an option costs: runs without and with it in turn; ``pairs`` of them, medians, and ratios of each pair."""

    def run(*chosen: str) -> tuple[float, float, float]:
        mapping = "dependent" if "dependent" in chosen else "independent"
        one = measure(
            sessions, mapping=mapping, rounds=21, options=[name for name in chosen if name != "dependent"]
        )
        return one["nat_ns"]["median"], one["new_session_ns"], one["close_ns"]

    both = [(run(), run(option)) for _ in range(pairs)]
    out: dict[str, Any] = {"option": option, "sessions": sessions}
    for i, what in enumerate(("packet", "open", "close")):
        ratios = sorted(with_it[i] / without[i] for without, with_it in both)
        out[f"{what}_ns"] = round(median(without[i] for without, _ in both), 1)
        out[f"{what}_ratio"] = {
            "median": round(median(ratios), 3),
            "min": round(ratios[0], 3),
            "max": round(ratios[-1], 3),
        }
    return out


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The short form: ``ns_per_packet``, ``floor_ns``, ``min`` and ``max``."""
    nat, floor = result["nat_ns"], result["floor_ns"]
    return {
        "sessions": result["sessions"],
        "ns_per_packet": nat["median"],
        "floor_ns": floor["median"],
        "min": nat["min"],
        "max": nat["max"],
    }
