# SPDX-License-Identifier: Apache-2.0
"""``python -m bench [core | options | failover | newflow | relay | pair | deaths | rules | sync]``: measures; the last line is JSON with ``--json``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import (
    core,
    cores,
    failover,
    first_packet,
    io,
    latency,
    micro,
    newflows,
    pair_commands,
    peers,
    relay,
    scales,
    suite,
)
from nat_control.lab import LabError

# What `make bench-failover` measures: the figures that a release states.
CASES = [
    failover.Case("kill", rate, 1, known, 25) for rate in (1000, 10_000) for known in (0, 1000, 10_000)
] + [failover.Case(how, 1000, 1, 0, 10) for how in ("stop", "failback", "planned", "link")]

# commands that have a module of their own, with `add` and `run`
MODULES = {
    "scales": scales,
    "micro": micro,
    "newflows": newflows,
    "latency": latency,
    "io": io,
    "peers": peers,
    "cores": cores,
    "suite": suite,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measurements beside their floors.")
    what = parser.add_subparsers(dest="what")
    of_core = what.add_parser("core", help="ns per packet of established sessions")
    of_core.add_argument("--sessions", type=int, nargs="*", default=list(core.SESSIONS))
    of_core.add_argument("--direction", choices=["out", "in", "both"], default="both")
    of_core.add_argument("--mapping", choices=["independent", "dependent"], default="independent")
    of_core.add_argument("--order", choices=["uniform", "zipf", "sequential"], default="uniform")
    of_core.add_argument("--batch", type=int, default=32, help="packets at once: a power of two to 16384")
    of_core.add_argument("--rounds", type=int, default=61, help="of 16384 packets each")
    of_options = what.add_parser("options", help="what each option costs: packet, opening, closing; a ratio")
    of_options.add_argument("--of", nargs="+", choices=core.OPTIONS, default=core.OPTIONS)
    of_options.add_argument("--sessions", type=int, default=1 << 17)
    of_options.add_argument("--pairs", type=int, default=7)
    of_lookup = what.add_parser("lookup", help="ns per key of a batch look-up, beside DPDK's rte_hash")
    of_lookup.add_argument("--sessions", type=int, nargs="*", default=[28 * 1024, 1 << 18, 1 << 20, 1 << 22])
    of_lookup.add_argument("--order", choices=["uniform", "zipf"], default="uniform")
    of_lookup.add_argument("--rounds", type=int, default=31)
    of_failover = what.add_parser("failover", help="packets and sessions lost when the server ends (root)")
    of_failover.add_argument("--how", choices=failover.HOWS, default="kill")
    of_failover.add_argument("--rate", type=int, default=1000, help="packets per second")
    of_failover.add_argument("--flows", type=int, default=1, help="of the stream")
    of_failover.add_argument("--known", type=int, default=0, help="sessions besides")
    of_failover.add_argument("--trials", type=int, default=5)
    of_failover.add_argument("--mode", choices=["synchronous", "asynchronous"], default="synchronous")
    of_failover.add_argument("--nat", choices=["rules", "conntrack"], default="rules", help="see switch.nat")
    of_failover.add_argument("--all", action="store_true", help="every case that a release states")
    of_latency = what.add_parser("newflow", help="latency that a new flow's first packet takes more (root)")
    of_latency.add_argument("--flows", type=int, default=500)
    of_relay = what.add_parser("relay", help="what TLS adds to the bytes of a takeover")
    of_relay.add_argument("--rounds", type=int, default=1000)
    pair_commands.add(what)
    for module in MODULES.values():
        module.add(what)
    for one in (of_core, of_options, of_lookup, of_failover, of_latency, of_relay):
        one.add_argument("--json", action="store_true")
    arguments = parser.parse_args(sys.argv[1:] or ["core"])
    for number in (signal.SIGTERM, signal.SIGHUP):  # who is told to end gives back what the machine lent
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        chosen = {
            "core": _core,
            "options": _options,
            "lookup": _lookup,
            "failover": _failover,
            "newflow": _newflow,
            "relay": _relay,
            **pair_commands.COMMANDS,
            **{name: module.run for name, module in MODULES.items()},
        }
        chosen[arguments.what](arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except LabError as error:
        sys.exit(f"bench: {error}")


def _print(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A column for each key of the first row."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{one:.3g}" for one in value.values())
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _relay(arguments: argparse.Namespace) -> None:
    found = relay.measure(arguments.rounds)
    _print("µs until the switch has the takeover", [{"by": name, **row} for name, row in found.items()])
    if arguments.json:
        print(json.dumps(found))


def _core(arguments: argparse.Namespace) -> None:
    results = [
        core.measure(
            sessions,
            rounds=arguments.rounds,
            **{key: getattr(arguments, key) for key in ("direction", "mapping", "order", "batch")},
        )
        for sessions in arguments.sessions
    ]
    if arguments.json:
        for result in results:
            print(json.dumps(core.summary(result)))
        return
    rows = [
        {
            "sessions": result["sessions"],
            **{
                name: f"{result['nat_ns'][key]:.1f}"
                for name, key in (("NAT", "median"), ("min", "min"), ("max", "max"))
            },
            "parse + MAC swap": f"{result['swap_ns']['median']:.1f}",
            "and two lines": f"{result['floor_ns']['median']:.1f}",
            "ratio": f"{result['ratio']['median']:.1f}",
            "new session": f"{result['new_session_ns']:.0f}",
            "bytes per session": f"{result['bytes_per_session']:.0f}",
        }
        for result in results
    ]
    _print(f"core: ns per packet, {arguments.direction}, endpoint-{arguments.mapping} mapping", rows)


def _options(arguments: argparse.Namespace) -> None:
    results = [core.option_cost(name, arguments.sessions, arguments.pairs) for name in arguments.of]
    if arguments.json:
        for result in results:
            print(json.dumps(result))
    else:
        rows = [
            {
                "option": result["option"],
                **{
                    f"{what}{unit}": _cell(result[f"{what}_{key}"])
                    for what in ("packet", "open", "close")
                    for unit, key in ((", ns", "ns"), (" with it", "ratio"))
                },
            }
            for result in results
        ]
        _print(f"{arguments.sessions} sessions: ns, and the ratio with an option (median / min / max)", rows)


def _lookup(arguments: argparse.Namespace) -> None:
    results = [
        core.lookup(sessions, rounds=arguments.rounds, order=arguments.order)
        for sessions in arguments.sessions
    ]
    if arguments.json:
        for result in results:
            print(json.dumps(result))
    else:
        _print("batch look-up: ns per key, and how much longer rte_hash takes (median / min / max)", results)


def _failover(arguments: argparse.Namespace) -> None:
    cases = CASES
    if not arguments.all:
        cases = [
            failover.Case(
                arguments.how,
                arguments.rate,
                arguments.flows,
                arguments.known,
                arguments.trials,
                arguments.mode,
                nat=arguments.nat,
            )
        ]
    results = []
    for case in cases:
        results.append(failover.measure(case, lambda line: print(line, file=sys.stderr, flush=True)))
        if arguments.json:
            print(json.dumps(results[-1]), flush=True)
    if not arguments.json:
        _print("failover: minimum / median / maximum, ms from the server's end", results)


def _newflow(arguments: argparse.Namespace) -> None:
    results = first_packet.measure(
        arguments.flows, tell=lambda line: print(line, file=sys.stderr, flush=True)
    )
    if arguments.json:
        for result in results:
            print(json.dumps(result))
    else:
        shown = [{key: row[key] for key in row if not key.endswith("percent")} for row in results]
        _print("new flows: ms that the first packet takes more than the second (p50 / p99 / max)", shown)


if __name__ == "__main__":
    main()
