# SPDX-License-Identifier: Apache-2.0
"""The command `show peer`: whether both halves of a pair hold the same."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nat_control.cli_live import ConfigOption, SocketOption
from nat_control.cli_output import FAILED, Json, print_json, table, user_errors
from nat_control.client import Client, find_socket


def register(show: typer.Typer) -> None:
    show.command("peer")(show_peer)


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
