# SPDX-License-Identifier: Apache-2.0
"""The C core as a data plane: the server's fast path, and what the switch agent keeps its records in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nat_control.dataplane import Capabilities, Ids, Mask, NextHops, Records
from nat_fastpath.cores import AnyCore, AnyPosted
from nat_fastpath.engine import NEIGHBOUR_STATES
from nat_fastpath.errors import EventRingFull

P = ParamSpec("P")
T = TypeVar("T")

BATCH = 4096
SHORT = 0.0005  # seconds between two looks at a command that the worker has
PAUSE = 0.001  # seconds between two looks at a full event ring
KNOWN = [NEIGHBOUR_STATES.index(name) for name in ("reachable", "probe", "static")]


class CorePlane:
    """A DataPlane around ``core``.

    With a worker a command waits for it, and is given to a thread meanwhile; a core that belongs to the calling
    thread (``own``) carries it out at once.
    """

    def __init__(self, core: AnyCore, name: str = "fastpath", *, own: bool = False) -> None:
        self.core = core
        self._own = own
        self.capabilities = Capabilities(name, core.config.max_sessions, core.config.synchronous, BATCH)

    async def _call(self, command: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        if self._own:
            return command(*arguments, **options)
        return await asyncio.to_thread(command, *arguments, **options)

    async def install(self, records: Records) -> int:
        return await self._call(self.core.install, records)

    async def holds(self, records: Records) -> Mask:
        return await self._call(self.core.holds, records)

    async def update(self, records: Records) -> int:
        return await self._call(self.core.update, records)

    async def delete(self, records: Records) -> int:
        ended = 0
        while True:
            try:
                return ended + await self._call(self.core.delete, records)
            except EventRingFull as full:  # whoever drives this plane takes its events meanwhile
                ended, records = ended + full.result, full.rest
                await asyncio.sleep(PAUSE)

    def commit(self, records: Records) -> Coroutine[Any, Any, int]:
        """See DataPlane. Packets wait for this one: the worker has it before anybody waits for the answer."""
        posted: AnyPosted | TimeoutError
        try:
            posted = self.core.post_commit(records)
        except TimeoutError as error:
            posted = error
        return self._released(posted)

    async def _released(self, posted: AnyPosted | TimeoutError) -> int:
        if isinstance(posted, TimeoutError):
            raise posted
        while (released := posted.result()) is None:
            await asyncio.sleep(SHORT)
        return released

    async def adopt(self) -> int:
        return await self._call(self.core.adopt)

    async def cede(self, instance: int, besides: Ids) -> int:
        return await self._call(self.core.cede, instance, besides)

    async def next_hops(self) -> NextHops:
        found = await self._call(self.core.neighbours)
        return np.asarray(found[(found["address"] != 0) & np.isin(found["state"], KNOWN)])

    async def learn(self, next_hops: NextHops) -> int:
        return await self._call(self.core.learn, next_hops)

    async def sessions(self) -> AsyncIterator[Records]:
        cursor = 0
        while True:
            page, cursor = await self._call(self.core.sessions, cursor, BATCH)
            yield page
            if not cursor:
                return
