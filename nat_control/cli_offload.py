# SPDX-License-Identifier: Apache-2.0
"""The commands `offload add`, `remove` and `list`: sessions that the switch carries in front of the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from nat_control.cli_live import ConfigOption, SocketOption
from nat_control.cli_output import FAILED, Json, complain, print_json, table, user_errors
from nat_control.client import Client, Filters, find_socket

offload = typer.Typer(help="Sessions that the switch carries in front of the server.", no_args_is_help=True)
Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", help="As `show sessions` shows them.", show_default=False),
]
Internal = Annotated[str, typer.Option(help="ADDRESS, NETWORK/LENGTH, :PORT or ADDRESS:PORT.")]
External = Annotated[str, typer.Option(help="The same of the external endpoint.")]
Remote = Annotated[str, typer.Option(help="The same of the remote endpoint.")]
Protocol = Annotated[str, typer.Option(help="udp or tcp.")]


def register(app: typer.Typer) -> None:
    app.add_typer(offload, name="offload")


def _move(
    what: Literal["add", "remove"], ids: list[str] | None, given: Filters, client: Client, as_json: bool
) -> None:
    wanted: Filters = {key: value for key, value in given.items() if value}  # type: ignore[assignment]
    told = client.offload(what, ids or [], **wanted)
    if as_json:
        print_json(told)
    else:
        n, where = len(told["moved"]), "carried by the switch" if what == "add" else "left to the server"
        print(
            f"{n} session{'s' * (n != 1)} now {where}; {told['in_front']} in front, room for {told['room']} more"
        )
    complain(*(f"session {one['id']}: {one['why']}" for one in told["refused"]))
    if told["refused"]:
        raise typer.Exit(FAILED)


def _command(what: Literal["add", "remove"]) -> Callable[..., None]:
    def move(
        ids: Ids = None,
        internal: Internal = "",
        external: External = "",
        remote: Remote = "",
        protocol: Protocol = "",
        config: ConfigOption = None,
        socket: SocketOption = None,
        as_json: Json = False,
    ) -> None:
        given: Filters = {"internal": internal, "external": external, "remote": remote, "protocol": protocol}
        with user_errors():
            _move(what, ids, given, Client(find_socket(config, socket)), as_json)

    return move


offload.command(
    "add",
    help="The switch carries these sessions, and the policy does not take them back. Ends with 1 when one could not be moved.",
)(_command("add"))
offload.command(
    "remove", help="The server carries these sessions again; the policy leaves them alone for ten minutes."
)(_command("remove"))


@offload.command("list")
def list_them(config: ConfigOption = None, socket: SocketOption = None, as_json: Json = False) -> None:
    """What is in front: by policy or by hand, and its packets per second."""
    with user_errors():
        rows, told = Client(find_socket(config, socket)).offloaded()
    if as_json:
        print_json({"sessions": rows, **told})
        return
    names = ("id", "protocol", "internal", "external", "remote", "by", "rate", "packets_out", "packets_in")
    shown = [name for name in names if not rows or name in rows[0]]
    table(
        "offloaded", ["packets/s" if n == "rate" else n for n in shown], [[r[n] for n in shown] for r in rows]
    )
    room = f", room for {told['room']} more" if "room" in told else ""
    print(f"{told['in_front']} in front{room}{_policy(told)}")


def _policy(told: dict[str, Any]) -> str:
    if "policy" not in told:
        return "; the server decides"
    return "; heavy ones move by themselves" if told["policy"] else "; no section `offload`: only by hand"
