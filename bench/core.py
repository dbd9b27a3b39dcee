# SPDX-License-Identifier: Apache-2.0
"""Nanoseconds per packet of the core on established sessions, beside the floor of the same run: see core.c."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build"
CORE = ROOT / "nat_fastpath" / "core"
# those of setup.py
CFLAGS = ["-O3", "-std=gnu11", "-g", "-DNAT_HEADER_HASH=1ULL", "-Wall", "-Wextra", "-Werror"]
MARCH = ["-march=x86-64-v2"] if platform.machine() == "x86_64" else []
SESSIONS = (1, 1024, 28 * 1024, 1 << 20)


def compiled(name: str, sources: list[Path], headers: list[Path], flags: list[str]) -> Path:
    """The program of these sources, made once per state of them and their headers."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, *headers])).hexdigest()[:16]
    program = BUILD / f"{name}-{digest}"
    program.parent.mkdir(exist_ok=True)
    if not program.exists():
        made = program.with_suffix(f".{os.getpid()}")  # others may be making it too
        subprocess.run(["gcc", "-o", str(made), *map(str, sources), *flags], check=True)
        made.rename(program)
    return program


def build() -> Path:
    """The core and its bench."""
    sources = [HERE / "core.c", *sorted(CORE.glob("*.c"))]
    headers = [HERE / "frames.h", HERE / "known.h", *sorted(CORE.glob("*.h"))]
    return compiled("bench-core", sources, headers, [*CFLAGS, *MARCH, f"-I{CORE}", "-lm"])


def measure(sessions: int, *, rounds: int = 61, **choices: object) -> Any:
    """One measurement; the dictionary that core.c prints. Times in ns: median, min and max over the rounds.

    ``choices`` are core.c's: direction, mapping, order, batch, and options (``aes=1``).
    """
    command = [
        str(build()),
        str(sessions),
        f"rounds={rounds}",
        *(f"{key}={value}" for key, value in choices.items()),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def lookup(sessions: int, *, rounds: int = 31, order: str = "uniform") -> Any:
    """Batch look-up beside rte_hash: what lookup.c prints; ``ratio`` is how much longer rte_hash takes."""
    flags = subprocess.run(["pkg-config", "--cflags", "libdpdk"], check=True, capture_output=True, text=True)
    others = [path for path in sorted(CORE.glob("*.c")) if path.name != "pipeline.c"]  # which it includes
    headers = [HERE / "frames.h", HERE / "known.h", CORE / "pipeline.c", *sorted(CORE.glob("*.h"))]
    dpdk = [flag.replace("-I", "-isystem") for flag in flags.stdout.split()]
    program = compiled(
        "bench-lookup",
        [HERE / "lookup.c", *others],
        headers,
        [*CFLAGS, *dpdk, f"-I{CORE}", "-lrte_eal", "-lrte_hash", "-lm"],
    )
    command = [str(program), str(sessions), str(rounds), order]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


VALUES = {"dependent": "dependent"}  # of what is a choice and no flag
OPTIONS = ("aes", "parity", "preservation", "quarantine", "vlan", "dependent", "small_pages")


def option_cost(option: str, sessions: int, pairs: int) -> dict[str, Any]:
    """What an option costs: runs without and with it in turn; ``pairs`` of them, medians, and ratios of each pair."""

    def run(*chosen: str) -> tuple[float, float, float]:
        one = measure(
            sessions,
            rounds=21,
            **{"mapping" if name == "dependent" else name: VALUES.get(name, 1) for name in chosen},
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
    """The short form: ``ns_per_packet``, ``floor_ns`` with the spread of the first, and the ratio of the same rounds."""
    nat = result["nat_ns"]
    return {
        **{
            key: result[key]
            for key in ("sessions", "direction", "mapping", "order", "batch", "rounds", "dropped", "drowned")
        },
        "ns_per_packet": nat["median"],
        "floor_ns": result["floor_ns"]["median"],
        "min": nat["min"],
        "max": nat["max"],
        "ratio": result["ratio"]["median"],
        "swap_ns": result["swap_ns"]["median"],
        "bytes_per_session": result["bytes_per_session"],
    }
