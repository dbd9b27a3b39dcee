# SPDX-License-Identifier: Apache-2.0
"""``python -m bench [core]``: measures; the last line is JSON with ``--json``."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from bench import core


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measurements beside their floors.")
    parser.add_argument("what", nargs="?", default="core", choices=["core"])
    parser.add_argument("--sessions", type=int, nargs="*", default=list(core.SESSIONS))
    parser.add_argument("--direction", choices=["out", "in", "both"], default="both")
    parser.add_argument("--mapping", choices=["independent", "dependent"], default="independent")
    parser.add_argument("--rounds", type=int, default=61, help="of 16384 packets each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    table = Table(title=f"core: ns per packet, {arguments.direction}, endpoint-{arguments.mapping} mapping")
    for column in (
        "sessions",
        "NAT",
        "min",
        "max",
        "parse + MAC swap",
        "ratio",
        "new session",
        "bytes per session",  # of words, so that it wraps and is not cut where the line is short
    ):
        table.add_column(column, justify="right")
    results = []
    for sessions in arguments.sessions:
        result = core.measure(
            sessions, direction=arguments.direction, mapping=arguments.mapping, rounds=arguments.rounds
        )
        results.append(result)
        nat, floor = result["nat_ns"], result["floor_ns"]
        table.add_row(
            f"{sessions:,}",
            *(f"{nat[key]:.1f}" for key in ("median", "min", "max")),
            f"{floor['median']:.1f}",
            f"{result['ratio']:.1f}",
            f"{result['new_session_ns']:.0f}",
            f"{result['bytes_per_session']:.0f}",
        )
    if not arguments.json:
        Console().print(table)
        return
    for result in results:
        print(json.dumps(core.summary(result)))


if __name__ == "__main__":
    main()
