# SPDX-License-Identifier: Apache-2.0
"""The commands of `python -m bench` for the pair as a whole; each prints a line of JSON for each figure."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import deaths, pair, report, rules, sync


def add(what: Any) -> None:
    """``what`` are the subcommands of a parser."""
    of_pair = what.add_parser("pair", help="every figure of the pair, with a report and plots (root)")
    of_pair.add_argument("--trials", type=int, default=25)
    of_pair.add_argument("--out", type=Path, default=Path("build/bench-pair"))
    of_pair.add_argument("--only", nargs="*", default=[], help="figures whose names contain one of these")
    of_deaths = what.add_parser("deaths", help="false deaths of a pair on a busy machine (root)")
    of_deaths.add_argument("--minutes", type=float, default=10)
    of_deaths.add_argument("--sessions", type=int, default=1_000_000)
    of_rules = what.add_parser("rules", help="flow-mods per second of the agent's plane (root)")
    of_rules.add_argument("--sessions", type=int, default=100_000)
    of_sync = what.add_parser("sync", help="an InitState, and sessions synchronised per second (root)")
    of_sync.add_argument("--sessions", type=int, default=1_000_000)
    of_sync.add_argument("--new", type=int, default=400_000)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _line(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def _pair(arguments: argparse.Namespace) -> None:
    """Each figure goes to figures.jsonl at once, which a later run adds to; the report has the latest of each."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = arguments.out / "figures.jsonl"
    for row in pair.measure(arguments.trials, arguments.only, tell):
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        _line({key: value for key, value in row.items() if key != "each"})
    latest = {row["figure"]: row for row in report.read(lines)}
    rows = [latest[figure.name] for figure in pair.FIGURES if figure.name in latest]
    tell(f"report: {report.write(rows, arguments.out)}")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pair": _pair,
    "deaths": lambda given: _line(deaths.measure(given.minutes, given.sessions, tell)),
    "rules": lambda given: _line(rules.measure(given.sessions)),
    "sync": lambda given: _line(sync.measure(given.sessions, given.new)),
}
