# SPDX-License-Identifier: Apache-2.0
"""Connections that live through everything: ``serve ADDRESS PORT``, ``keep ADDRESS PORT CONNECTIONS`` until SIGTERM.

Each connection says numbered lines and must hear them again, in order, for as long as it lives. ``keep`` prints a line for
each connection that breaks, and at its end how many lines came back.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

PAUSE = 0.05  # seconds between two lines of a connection


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    writer.close()


async def _serve(address: str, port: int) -> None:
    server = await asyncio.start_server(_echo, address, port)
    print("listening", flush=True)
    async with server:
        await server.serve_forever()


async def _talk(address: str, port: int, name: int, heard: list[int]) -> None:
    try:
        reader, writer = await asyncio.open_connection(address, port)
        while True:
            writer.write(b"%d\n" % heard[name])
            answer = await reader.readline()
            if answer != b"%d\n" % heard[name]:
                raise ConnectionError(f"said {heard[name]}, heard {answer!r}")
            heard[name] += 1
            await asyncio.sleep(PAUSE)
    except OSError as error:
        print(f"broken: connection {name} after {heard[name]} lines: {error}", flush=True)


async def _keep(address: str, port: int, connections: int) -> None:
    heard = [0] * connections
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    talks = [asyncio.ensure_future(_talk(address, port, i, heard)) for i in range(connections)]
    print("talking", flush=True)
    await ended.wait()
    for talk in talks:
        talk.cancel()
    print(f"heard {sum(heard)} lines, {min(heard)} at least in each connection", flush=True)


if __name__ == "__main__":
    what, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    asyncio.run(_serve(address, port) if what == "serve" else _keep(address, port, int(sys.argv[4])))
