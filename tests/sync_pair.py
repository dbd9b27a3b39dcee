# SPDX-License-Identifier: Apache-2.0
"""Both sides of a pair in one process, over real TCP: ``python -m tests.sync_pair [CERTIFICATES]``, within a namespace.

Prints one line of JSON about what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nat_control.dataplane import changes
from nat_control.peer import PeerView
from nat_control.sync import actions as do
from nat_control.sync.actions import Limits, Mode, State
from nat_control.sync.codec import PoolRange
from nat_control.sync.protocol import Protocol
from nat_control.sync.transport import Transport
from nat_control.tls import Tls, context
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_PENDING
from tests.memory_plane import UDP, AsyncMemoryPlane, MemoryPlane, key_of

ADDRESS = 0xC6336410
SESSIONS = 5000
PATIENCE = 20.0


class Told:
    """Hears an answer, as the operator's socket would."""

    async def send(self, answer: dict[str, Any]) -> None:
        self.answer = answer["peer"]


class Side:
    def __init__(
        self,
        instance: int,
        *,
        listen: int | None = None,
        connect: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        first, last = (1024, 31999) if instance == 1 else (32000, 62975)
        self.plane = MemoryPlane(
            instance, [(ADDRESS, port) for port in range(first, last + 1)], synchronous=True
        )
        self.protocol = Protocol(
            instance,
            (PoolRange(ADDRESS, ADDRESS, first, last),),
            Mode.SYNCHRONOUS,
            # who asks mends, and only one asks: what the other one mended, its operator would not be told
            limits=Limits(digest=0.2 if instance == 1 else 60),
        )
        self.told: list[do.Action] = []
        self.transport = Transport(
            self.protocol,
            AsyncMemoryPlane(self.plane, page=500),
            clock=time.monotonic,
            drain=self.drain,
            notice=self.notice,
            listen=None if listen is None else ("127.0.0.1", listen),
            connect=None if connect is None else ("127.0.0.1", connect),
            tls=tls,
        )
        self.view = PeerView(self.protocol, self.transport, AsyncMemoryPlane(self.plane), time.monotonic)
        self.task = asyncio.create_task(self.transport.run())

    def notice(self, action: do.Action) -> None:
        self.told.append(action)
        self.view.notice(action)

    def drain(self) -> None:
        events = self.plane.events()
        if len(events):
            self.transport.events(changes(events))

    def open(self, n: int, host: int) -> None:
        for i in range(n):
            assert self.plane.open((UDP, host + i, 5000), (0xCB007101, 53)) is not None
        self.drain()

    @property
    def ids(self) -> set[int]:
        return {int(held["id"]) for held in self.plane.held.values()}

    @property
    def held(self) -> int:
        """Sessions whose packets wait."""
        return sum(bool(record["flags"] & FLAG_PENDING) for record in self.plane.held.values())

    @property
    def equal_digests(self) -> bool:
        compared = [action for action in self.told if isinstance(action, do.DigestCompared)]
        return bool(compared) and not compared[-1].differing

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not probe():
            await asyncio.sleep(0.005)


def tls_of(name: str, *, listens: bool) -> ssl.SSLContext | None:
    if len(sys.argv) < 2:
        return None
    where = Path(sys.argv[1])
    return context(Tls(where / "ca.pem", where / f"{name}.pem", where / f"{name}.key"), listens=listens)


async def main() -> None:
    a = Side(1, listen=0, tls=tls_of("server", listens=True))
    await until(lambda: a.transport.address is not None)
    assert a.transport.address is not None
    port = a.transport.address[1]
    b = Side(2, connect=port, tls=tls_of("switch", listens=False))

    def paired() -> bool:
        return a.protocol.state is State.OPERATIONAL and b.protocol.state is State.OPERATIONAL

    def rest() -> bool:
        return paired() and not a.protocol.busy and not b.protocol.busy

    a.open(SESSIONS, 0x0A000000)
    for side in (a, b):
        side.transport.ready()
    await until(paired)
    found: dict[str, object] = {"exchanged": a.ids == b.ids and len(b.ids) == SESSIONS}

    a.open(2000, 0x0A100000)
    b.open(2000, 0x0A200000)
    a.plane.close(key_of(next(iter(a.plane.held.values()))))
    a.drain()
    found["held_at_first"] = a.held
    await until(rest)
    await until(lambda: a.held + b.held == 0)
    found["followed"] = a.ids == b.ids and len(a.ids) == SESSIONS + 3999
    await until(lambda: a.equal_digests and b.equal_digests)
    # b has asked once, and has its answer
    await until(lambda: b.protocol.messages["sent"]["Digest"] > 0 and b.protocol._own_digest is None)

    # One side loses a session of the other's, and the event of an end of its own: the digest finds both.
    lost, ended = ([held for held in a.plane.held.values() if int(held["id"]) >> 52 & 0xFF == 1])[:2]
    for side, record in ((b, lost), (a, ended)):
        side.plane.close(key_of(record))
        side.plane.events()
    told = Told()
    await a.view.verb({}, told)  # type: ignore[arg-type]
    found["proven"] = [told.answer["verified"], a.ids == b.ids, told.answer["digest"]["equal"]]
    found["differed"] = sorted(
        (int(row["id"], 16) - int(lost["id"]), row["held"]) for row in told.answer["differed"]
    )
    found["ended"] = int(ended["id"]) not in b.ids

    # The connecting side dies without a word, and comes back empty.
    await b.end()
    await until(lambda: a.protocol.state is State.ALONE)
    found["survivor_owns_all"] = not any(r["flags"] & FLAG_FOREIGN for r in a.plane.held.values())
    a.open(10, 0x0A300000)
    await until(lambda: a.held == 0)
    b = Side(2, connect=port, tls=tls_of("switch", listens=False))
    b.transport.ready()
    await until(paired)
    found["returned"] = a.ids == b.ids

    # Strange bytes end their connection, and nothing else.
    before = a.ids
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(np.random.default_rng(1).bytes(1000))
    await reader.read()
    writer.close()
    await until(paired)
    found["untouched"] = a.ids == before

    await b.transport.stop()
    await until(lambda: a.protocol.state is State.ALONE)
    found["left"] = a.protocol.last_error
    for side in (a, b):
        await side.end()
    found["tasks_left"] = len(asyncio.all_tasks()) - 1
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
