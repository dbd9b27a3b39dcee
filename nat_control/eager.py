# SPDX-License-Identifier: Apache-2.0
"""Coroutines that begin at once, and not when the loop comes to their task: what Python 3.12 calls eager tasks."""

from __future__ import annotations

import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any


def begun(work: Coroutine[Any, Any, object]) -> Awaitable[object] | None:
    """Runs ``work`` until it waits for something. Returns the rest, to be awaited by a task, or None when it is done.

    Until then it must ask for no task of its own, as asyncio.timeout does. What it raises comes with the rest.
    """
    try:
        waits_for = work.send(None)
    except StopIteration:
        return None
    except Exception as error:
        return _raised(error)
    return _rest(work, waits_for)


async def _raised(error: Exception) -> object:
    raise error


@types.coroutine
def _rest(work: Coroutine[Any, Any, object], waits_for: Any) -> Generator[Any, Any, object]:
    while True:
        try:
            try:
                answer = yield waits_for
            except BaseException as error:  # of what it waits for, or it is cancelled
                waits_for = work.throw(error)
            else:
                waits_for = work.send(answer)
        except StopIteration as end:
            return end.value
