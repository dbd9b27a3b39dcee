# SPDX-License-Identifier: Apache-2.0
"""The commands that talk with a running server: `explain`, `trace`, `top` and `reload`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from nat_control.api import PROTOCOLS, ApiError
from nat_control.cli_output import FAILED, USAGE, Json, complain, print_json, user_errors
from nat_control.client import Client, find_socket
from nat_control.top import Snapshot, figures, picture

ConfigOption = Annotated[
    Path | None,
    typer.Option("-c", "--config", help="Configuration that names the server's socket.", readable=False),
]
SocketOption = Annotated[
    Path | None, typer.Option("--socket", help="The server's socket itself.", readable=False)
]


def register(app: typer.Typer) -> None:
    app.command()(explain)
    app.command()(trace)
    app.command()(top)
    app.command()(reload)


# -- explain --------------------------------------------------------------------------------------------------


def explain(
    source: Annotated[str, typer.Argument(metavar="ADDRESS:PORT", help="Who sends it.", show_default=False)],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS:PORT/PROTOCOL", help="To whom: udp, tcp or icmp.", show_default=False
        ),
    ],
    side: Annotated[
        str,
        typer.Option("--from", metavar="internal|external", help="Where it comes from; else by its source."),
    ] = "",
    flags: Annotated[
        str, typer.Option(help="TCP flags, such as SA; else a SYN, or an ACK of a session.")
    ] = "",
    length: Annotated[int | None, typer.Option(help="Bytes of the IP packet.")] = None,
    ttl: Annotated[int, typer.Option(help="Time to live.")] = 64,
    dont_fragment: Annotated[bool, typer.Option("--df", help="Don't fragment.")] = False,
    config: ConfigOption = None,
    socket: SocketOption = None,
    as_json: Json = False,
) -> None:
    """What would happen to this packet now, step by step, and why; nothing is sent or changed.

    For icmp, a ping: the port of the source (from outside: of the destination) is its identifier.
    """
    with user_errors():
        to, slash, protocol = destination.partition("/")
        if not slash:
            raise ApiError(f"{destination!r} has no protocol: write {to}/udp, {to}/tcp or {to}/icmp")
        more: dict[str, Any] = {"flags": flags, "ttl": ttl, "dont_fragment": dont_fragment, "side": side}
        if length is not None:
            more["length"] = length
        told = Client(find_socket(config, socket)).explain(source, to, protocol, **more)
    if as_json:
        return print_json(told)
    packet = told["packet"]
    tcp = f" {packet['flags']}" if packet["flags"] else ""
    print(
        f"packet: {packet['protocol']}{tcp} {packet['source']} -> {packet['destination']}, "
        f"from {packet['from']}, MAC {packet['mac']}"
    )
    for step in told["steps"]:
        print(f"{step['step'].replace('_', ' ')}: {step['text']}")
    if told["becomes"]:
        left = told["becomes"]
        print(f"becomes: {left['source']} -> {left['destination']}, ttl {left['ttl']}, to {left['to']}")
    if told["answer"]:
        back = told["answer"]
        print(f"answer: {back['message']}, {back['source']} -> {back['destination']}, to {back['to']}")
    print(f"verdict: {told['verdict']} ({told['meaning']})")


# -- trace ----------------------------------------------------------------------------------------------------


def _flow(words: list[str]) -> dict[str, str]:
    """{"internal": "10.0.0.7:5000", "protocol": "udp"} of "internal=10.0.0.7:5000", "udp"."""
    flow: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and word in PROTOCOLS:
            key, value = "protocol", word
        elif not equals:
            key, value = "internal", word
        if key not in ("internal", "external", "remote", "protocol"):
            raise ApiError(
                f"{word!r}: a flow is [internal=|external=|remote=]ADDRESS[:PORT] and udp, tcp or icmp"
            )
        if key in flow:
            raise ApiError(f"{word!r}: {key} is given twice")
        flow[key] = value
    return flow


def _trace_line(row: dict[str, Any], start: float) -> str:
    what = " ".join(filter(None, (row["protocol"], row["flags"])))
    after = row["after"]
    became = f" => {after['source']} -> {after['destination']}" if after and not row["was_held"] else ""
    left = f", to {row['to']} {row['next_hop']}" if row["to"] else ""
    state = f", {row['state']}" if row["state"] else ""
    held = "after waiting: " if row["was_held"] else f"from {row['from']}: "
    return (
        f"{row['time'] - start:9.6f} {held}{what} {row['source']} -> {row['destination']}{became}: "
        f"{row['verdict']}{left}{state}, ttl {row['ttl']}, {row['length']} bytes"
    )


def trace(
    flow: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FLOW...",
            help="[internal=]ADDRESS[:PORT], external=..., remote=..., :PORT alone, udp, tcp or icmp; none: all.",
            show_default=False,
        ),
    ] = None,
    packets: Annotated[int, typer.Option(help="End after so many packets.")] = 20,
    seconds: Annotated[float, typer.Option(help="End after so many seconds.")] = 10,
    config: ConfigOption = None,
    socket: SocketOption = None,
    as_json: Json = False,
) -> None:
    """The decisions for the next packets of a real flow; Ctrl-C ends it. While it runs, all packets go the slow way."""
    with user_errors():
        asked = {"packets": packets, "seconds": seconds, **_flow(flow or [])}
        start: float | None = None
        for answer in Client(find_socket(config, socket)).trace_lines({"trace": asked}):
            for row in answer.get("rows", ()):
                start = row["time"] if start is None else start
                print(json.dumps(row) if as_json else _trace_line(row, start), flush=True)
            if "end" in answer:
                end = answer["end"]
                missed = f", {end['missed']} more came too fast to be kept" if end["missed"] else ""
                why = {"packets": "all", "time": "time is over"}.get(end["why"], end["why"])
                print(f"{end['packets']} packets{missed}: {why}", file=sys.stderr)


# -- top ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _keys() -> Iterator[bool]:
    """Keys come one by one, while this lasts; false when there is no keyboard."""
    if not sys.stdin or not sys.stdin.isatty():
        yield False
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _wants_to_leave(seconds: float, keyboard: bool) -> bool:
    """Waits so long, or for a key; true when it is q, or escape alone, with which those of arrows begin."""
    if not select.select([sys.stdin] if keyboard else [], [], [], seconds)[0]:
        return False
    typed = os.read(sys.stdin.fileno(), 64)
    return typed in (b"", b"\x1b") or (b"q" in typed.lower() and b"\x1b" not in typed)


def top(
    every: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One look over this time, as text.")] = False,
    config: ConfigOption = None,
    socket: SocketOption = None,
    as_json: Json = False,
) -> None:
    """Rates, sessions, verdicts, the worker's load and the busiest hosts, live; q or Ctrl-C ends it.

    --json prints one line for each look, with --once only one.
    """
    console = Console(highlight=False)
    live = console.is_terminal and not once and not as_json
    with user_errors():
        client = Client(find_socket(config, socket))
        before = Snapshot.take(client)
        with _keys() if live else contextlib.nullcontext(False) as keyboard, contextlib.ExitStack() as stack:
            screen = (
                stack.enter_context(Live(console=console, screen=True, auto_refresh=False)) if live else None
            )
            if screen:
                screen.update(picture(figures(before, before), console.size), refresh=True)
            while not _wants_to_leave(every, keyboard):
                now = Snapshot.take(client)
                seen = figures(before, now)
                before = now
                if screen:
                    screen.update(picture(seen, console.size), refresh=True)
                elif as_json:
                    print(json.dumps(seen), flush=True)
                else:
                    console.print(picture(seen, console.size))
                if once:
                    return


# -- reload -----------------------------------------------------------------------------------------------------


def reload(
    drain: Annotated[
        bool, typer.Option("--drain", help="Addresses with mappings leave the pool when these have ended.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Their sessions are ended.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say what would happen.")] = False,
    config: ConfigOption = None,
    socket: SocketOption = None,
    as_json: Json = False,
) -> None:
    """The server reads its configuration again, and takes what is different, whole or not at all; sessions survive."""
    with user_errors():
        told = Client(find_socket(config, socket)).reload(drain=drain, force=force, check=check)
    if as_json:
        print_json(told)
    elif told["result"] in ("invalid", "refused"):
        complain(*told["lines"])
    else:
        print("\n".join(told["lines"]))
    if told["result"] in ("invalid", "refused"):
        raise typer.Exit(USAGE if told["result"] == "invalid" else FAILED)
