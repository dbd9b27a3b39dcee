# SPDX-License-Identifier: Apache-2.0
"""Coroutines that begin at once: what they do before they wait, and that the rest is as any other."""

from __future__ import annotations

import asyncio

import pytest

from nat_control.eager import begun


def test_what_waits_for_nothing_is_done_at_once() -> None:
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    assert begun(work()) is None
    assert done == [1]


def test_the_rest_goes_on_when_what_it_waits_for_is_there() -> None:
    async def scene() -> list[object]:
        said: list[object] = []
        first, second = (asyncio.get_running_loop().create_future() for _ in range(2))

        async def work() -> str:
            said.append("begun")
            said.append(await first)
            await asyncio.sleep(0)
            try:
                await second
            except ValueError as error:
                said.append(str(error))
            return "end"

        rest = begun(work())
        assert rest is not None
        assert said == ["begun"]
        first.set_result("first")  # before anybody waits for it
        asyncio.get_running_loop().call_later(0.001, second.set_exception, ValueError("second"))
        return [*said, await rest, *said[1:]]

    assert asyncio.run(scene()) == ["begun", "end", "first", "second"]


def test_what_it_raises_at_once_comes_with_the_rest() -> None:
    async def work() -> None:
        raise ValueError("at once")

    rest = begun(work())
    assert rest is not None

    async def scene() -> None:
        await rest

    with pytest.raises(ValueError, match="at once"):
        asyncio.run(scene())


def test_whoever_cancels_the_rest_cancels_what_was_begun() -> None:
    async def scene() -> list[str]:
        said: list[str] = []

        async def work() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                said.append("cancelled")
                raise

        rest = begun(work())
        assert rest is not None
        task = asyncio.ensure_future(rest)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return said

    assert asyncio.run(scene()) == ["cancelled"]
