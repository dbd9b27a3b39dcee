# SPDX-License-Identifier: Apache-2.0
"""The commands `show peer`, whether both halves of a pair hold the same, and `peer takeover|release`, who carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nat_control.cli_live import ConfigOption, SocketOption
from nat_control.cli_output import FAILED, Json, complain, print_json, table, user_errors
from nat_control.client import Client, find_socket


def register(app: typer.Typer, show: typer.Typer) -> None:
    show.command("peer")(show_peer)
    peer = typer.Typer(help="Who of a pair carries the traffic.", no_args_is_help=True)
    app.add_typer(peer, name="peer")
    peer.command()(takeover)
    peer.command()(release)


Force = Annotated[
    bool, typer.Option(help="Also when both do not hold the same sessions: those that differ break.")
]


def takeover(
    force: Force = False, config: ConfigOption = None, socket: SocketOption = None, as_json: Json = False
) -> None:
    """This side takes the traffic from the other, without losing a packet.

    A switch keeps it, whatever happens to the server, until it is released.
    """
    _move("takeover", config, socket, as_json, force=force)


def release(
    force: Force = False,
    later: Annotated[
        bool, typer.Option(help="Not now: once the other side is there and both hold the same.")
    ] = False,
    config: ConfigOption = None,
    socket: SocketOption = None,
    as_json: Json = False,
) -> None:
    """This side gives the traffic to the other, without losing a packet.

    A switch that gets it so keeps it, whatever happens to the server, until it is taken back.
    """
    _move("release", config, socket, as_json, force=force, later=later)


def _move(verb: str, config: Path | None, socket: Path | None, as_json: bool, **options: bool) -> None:
    with user_errors():
        moved = Client(find_socket(config, socket)).move(verb, **options)
    if as_json:
        print_json(moved)
    elif moved["result"] == "refused":
        complain(f"peer {verb}: {moved['why']}")
    else:
        print(_moved(moved))
    if moved["result"] == "refused":
        raise typer.Exit(FAILED)


def _moved(moved: dict[str, Any]) -> str:
    who = "this side" if moved["carrier"] == "here" else "the other side"
    kept = ", and keeps the traffic until it is taken back or released" if moved["kept"] else ""
    if moved["result"] == "later":
        return f"{who} carries; the other side gets the traffic once it is there and both hold the same"
    if moved["result"] == "unchanged":
        return f"{who} carries already{kept}"
    proof = {True: "proven equal", False: "not proven equal", None: "not compared"}[moved["proven"]]
    return f"{who} carries{kept}: {moved['ms']:.0f} ms, {moved['sessions']} sessions, {proof}"


def show_peer(
    verify: Annotated[
        bool, typer.Option("--verify/--last", help="Compare now, or show what the last digest said.")
    ] = True,
    config: ConfigOption = None,
    socket: SocketOption = None,
    as_json: Json = False,
) -> None:
    """Whether both sides hold the same sessions, by a digest taken now; else which differ.

    Ends with 1 when it could not be proven, or sessions are refused at one side.
    """
    with user_errors():
        peer = Client(find_socket(config, socket)).peer(verify=verify)
    if as_json:
        print_json(peer)
    else:
        _print(peer)
    digest = peer["digest"]
    equal = peer["verified"] if verify else digest is not None and digest["equal"]
    if not equal or peer["refused_total"]:
        raise typer.Exit(FAILED)


def _carrier(peer: dict[str, Any]) -> str:
    who = {"here": "this side", "peer": "the peer", None: "not known"}[peer["carrier"]]
    return f"{who}, and keeps the traffic" if peer["kept"] else who


def _digest(digest: dict[str, Any] | None) -> str:
    if digest is None:
        return "none of this connection yet"
    result = "equal" if digest["equal"] else f"{digest['differing']} of 256 buckets differ"
    theirs = "?" if digest["theirs"] is None else digest["theirs"]
    return f"{result}, {digest['seconds_ago']:.1f} s ago: {digest['ours']} sessions here, {theirs} there"


def _print(peer: dict[str, Any]) -> None:
    rows = [
        ("state", f"{peer['state']}, {peer['mode']}"),
        ("peer", f"instance {peer['instance']}" if peer["instance"] is not None else "-"),
        ("carrier", _carrier(peer)),
        ("digest", _digest(peer["digest"])),
        *([("proven equal", peer["verified"])] if peer["verified"] is not None else []),
        (
            "refused",
            f"{peer['refused_total']} held at one side alone, {peer['counts']['conflicts']} refusals ever",
        ),
        ("mended", f"{peer['counts']['mended']} sessions, {peer['counts']['gaps']} gaps in changes"),
        ("under way", f"{peer['under_way']['batches']} batches, {peer['under_way']['records']} records wait"),
        ("connection", f"epoch {peer['epoch']}, term {peer['term']}"),
        ("last error", peer["last_error"] or "none"),
    ]
    table("peer", ("", ""), rows)
    for what, title in (
        ("differed", "differed, and told or ended since"),
        ("refused", "refused at the other side"),
    ):
        if peer[what]:
            names = ("id", "protocol", "internal", "external", "remote", "held")
            table(title, ("session", *names[1:]), [[row.get(name) for name in names] for row in peer[what]])
    messages = peer["messages"]
    kinds = sorted(set(messages["sent"]) | set(messages["received"]))
    lines = [(kind, *(messages[way].get(kind, 0) for way in ("sent", "received"))) for kind in kinds]
    table("messages", ("message", "sent", "received"), lines)
