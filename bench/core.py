# SPDX-License-Identifier: Apache-2.0
"""Nanoseconds per packet of the core on established sessions, beside the floor of the same run: see core.c."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path
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


def measure(sessions: int, *, direction: str = "both", mapping: str = "independent", rounds: int = 61) -> Any:
    """One measurement; the dictionary that core.c prints. Times in ns: median, min and max over the rounds."""
    command = [str(build()), str(sessions), str(rounds), direction, mapping]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


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
