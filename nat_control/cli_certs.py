# SPDX-License-Identifier: Apache-2.0
"""The command `certs`: what the two halves of a pair know each other by."""

from __future__ import annotations

from pathlib import Path
from re import fullmatch
from typing import Annotated

import typer

from nat_control.cli_output import fail
from nat_control.tls import TlsError


def register(app: typer.Typer) -> None:
    app.command()(certs)


def certs(
    directory: Annotated[Path, typer.Argument(help="Where the files shall be; made where it is not there.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="One for each half.", show_default="server switch"),
    ] = None,
    openflow: Annotated[
        bool,
        typer.Option(
            "--openflow", help="For agent and switch (agent, ovs), with what Open vSwitch is to be told."
        ),
    ] = False,
) -> None:
    """Make the certificates of a pair: an authority of its own, and NAME.pem and NAME.key for each half.

    Each half needs ca.pem and its own two files. The authority's key (ca.key) makes further certificates, and belongs on
    neither: who has it can pass for either half. A switch must not pass for a half: with --openflow, in a directory of its own.
    """
    from nat_control.certificates import AUTHORITY, make_certificates  # for nobody else: it takes its time

    chosen = tuple(names or (("agent", "ovs") if openflow else ("server", "switch")))
    if bad := next(
        (name for name in chosen if name == AUTHORITY or not fullmatch(r"[\w-][\w.-]*", name)), None
    ):
        raise typer.BadParameter(f"{bad!r} is no name for files beside {AUTHORITY}.pem")
    if len(set(chosen)) < len(chosen):
        raise typer.BadParameter("a name stands twice")
    try:
        made = make_certificates(directory, chosen)
    except TlsError as error:
        raise fail(str(error)) from None
    for path in made:
        print(path)
    if openflow:
        key, certificate, ca = (f"{chosen[-1]}.key", f"{chosen[-1]}.pem", f"{AUTHORITY}.pem")
        print("ovs-vsctl set-ssl", *((directory / name).resolve() for name in (key, certificate, ca)))
