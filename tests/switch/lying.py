# SPDX-License-Identifier: Apache-2.0
"""A switch that acknowledges early: between a real one and its controller, answers barriers at once and writes later."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from switch_agent import codec

MODS = {codec.FLOW_MOD, 15, 17}  # and of groups and meters


class LyingSwitch:
    """Takes connections at ``here`` and makes one to ``there`` for each; both are paths of unix sockets, or ADDRESS:PORT.

    What changes a table is passed on ``delay`` seconds late, in order, or never when ``lost`` is set; all else at once.
    """

    def __init__(self, here: str, there: str, delay: float = 0.2) -> None:
        self.here, self.there, self.delay = here, there, delay
        self.lost = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        if self.here.startswith("/"):
            self._server = await asyncio.start_unix_server(self._switch, self.here)
        else:
            host, port = self.here.split(":")
            self._server = await asyncio.start_server(self._switch, host, int(port))

    async def stop(self) -> None:
        assert self._server
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _switch(self, reader: asyncio.StreamReader, switch: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            if self.there.startswith("/"):
                commands, agent = await asyncio.open_unix_connection(self.there)
            else:
                host, port = self.there.split(":")
                commands, agent = await asyncio.open_connection(host, int(port))
            both = asyncio.gather(_copy(reader, agent), self._orders(commands, agent, switch))
            try:
                await both
            finally:
                both.cancel()
                for writer in (agent, switch):
                    writer.transport.abort()
        self._tasks.discard(task)

    async def _orders(
        self, commands: asyncio.StreamReader, agent: asyncio.StreamWriter, switch: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        greeted = False
        while True:
            head = await commands.readexactly(8)
            _, kind, length, xid = codec.HEADER.unpack(head)
            data = head + await commands.readexactly(length - 8)
            if kind == codec.BARRIER_REQUEST and greeted:
                agent.write(codec.HEADER.pack(codec.VERSION, codec.BARRIER_REPLY, 8, xid))
            elif kind in MODS:
                if not self.lost:
                    loop.call_later(self.delay, switch.write, data)
            else:
                switch.write(data)
            greeted = greeted or kind == codec.BARRIER_REQUEST  # that of the greeting waits for its answers


async def _copy(reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        to.write(data)
    raise ConnectionResetError


async def main() -> None:
    """HERE THERE DELAY [HERE THERE]: until it is killed."""
    here, there, delay, *more = sys.argv[1:]
    for one, other in zip([here, *more[::2]], [there, *more[1::2]], strict=True):
        await LyingSwitch(one, other, float(delay)).start()
    print("it lies", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
