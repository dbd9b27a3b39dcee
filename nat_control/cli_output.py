# SPDX-License-Identifier: Apache-2.0
"""What the modules of the command share: exit codes, errors of users, tables, JSON.

A module of commands (cli_host.py is one) has a function ``register(app)``, which cli.py calls.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nat_control import api
from nat_control.config import ConfigError

FAILED, USAGE, NOT_RUNNING, WARNED, INTERRUPTED = 1, 2, 3, 4, 130
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns what a user can cause into lines on stderr and an exit code."""
    try:
        yield
    except ConfigError as error:
        complain(*str(error).splitlines())
        raise typer.Exit(USAGE) from None
    except api.NotRunning as error:
        complain(str(error))
        raise typer.Exit(NOT_RUNNING) from None
    except api.ApiError as error:
        complain(str(error))
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def complain(*lines: str) -> None:
    with contextlib.suppress(OSError):  # whoever cannot be told is not told
        for line in lines:
            print(f"tandem-nat: {line}", file=sys.stderr)


def words(error: OSError) -> str:
    return ": ".join(map(str, filter(None, (error.filename, error.strerror)))) or repr(error)


def fail(error: Exception | str) -> typer.Exit:
    complain(words(error) if isinstance(error, OSError) else str(error))
    return typer.Exit(FAILED)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A rich table for people, aligned columns for anything else. Numbers stand at the right."""
    cells = [[cell(value) for value in row] for row in rows]
    numeric = [all(text[:1].isdigit() for text in column) for column in zip(*cells, strict=True)] or [False]
    console = Console(highlight=False)
    if console.is_terminal:
        table = Table(title=title, title_justify="left", header_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if numeric[min(i, len(numeric) - 1)] else "left")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        return
    lines = [list(columns), *cells] if any(columns) else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"# {title}")
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
