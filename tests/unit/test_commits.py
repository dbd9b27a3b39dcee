# SPDX-License-Identifier: Apache-2.0
"""Packets that may leave wait for nothing: not for a task, nor until the plane has counted those before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from nat_control.core_plane import CorePlane
from nat_control.dataplane import Records, changes
from nat_control.sync import transport as shell
from nat_control.sync.actions import Mode
from nat_control.sync.protocol import Protocol
from nat_control.sync.transport import Transport
from nat_fastpath.engine import Verdict
from tests.packets import CLIENT, SERVER, Nat, udp


class Slow(CorePlane):
    """Releases packets at once, and says how many after ``counted``."""

    def __init__(self, nat: Nat) -> None:
        super().__init__(nat.core, own=True)
        self.counted = asyncio.Event()
        self.begun: list[int] = []

    def commit(self, records: Records) -> Coroutine[Any, Any, int]:
        self.begun.append(len(records))
        return self._later(super().commit(records))

    async def _later(self, count: Coroutine[Any, Any, int]) -> int:
        await self.counted.wait()
        return await count


def opened(nat: Nat, transport: Transport, flow: int) -> None:
    assert nat.send(udp(CLIENT, 4000 + flow, SERVER, 53)).verdict == Verdict.HELD
    transport.events(changes(nat.core.events()))


async def until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not probe():
            await asyncio.sleep(0)


def test_the_core_has_a_commit_before_anybody_waits_for_it() -> None:
    nat = Nat(synchronous=True)
    assert nat.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.HELD
    count = CorePlane(nat.core, own=True).commit(nat.sessions())
    assert [result.verdict for result in nat.core.take()] == [Verdict.FORWARD]
    assert asyncio.run(count) == 1


def test_commits_do_not_wait_for_each_others_count() -> None:
    async def scenario() -> None:
        nat = Nat(synchronous=True)
        plane = Slow(nat)
        transport = Transport(
            Protocol(1, (), Mode.SYNCHRONOUS),
            plane,
            clock=time.monotonic,
            drain=lambda: None,
            notice=lambda action: None,
            listen=("127.0.0.1", 0),
        )
        transport.ready()
        for flow in range(3):  # nobody runs yet
            opened(nat, transport, flow)
        assert plane.begun == []
        running = asyncio.create_task(transport.run())
        await until(lambda: plane.begun == [3])
        for flow in range(3, 3 + 2 * shell.COMMITS):
            opened(nat, transport, flow)
        few = [3, *[1] * (shell.COMMITS - 1)]
        assert plane.begun == few
        assert len(nat.core.take()) == sum(few)
        plane.counted.set()
        await until(lambda: len(plane.begun) > len(few))
        assert plane.begun == [*few, shell.COMMITS + 1]
        assert len(nat.core.take()) == shell.COMMITS + 1
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(scenario())
