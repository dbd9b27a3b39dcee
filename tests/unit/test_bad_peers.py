# SPDX-License-Identifier: Apache-2.0
"""Peers that break the protocol, over real TCP: each hears why, is let go, and costs nobody anything.

The side under test has a real core with sessions, which translates all the while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from nat_control.core_plane import CorePlane
from nat_control.dataplane import NO_RECORDS, Changes, Records, changes
from nat_control.lab import Lab
from nat_control.sync import transport as shell
from nat_control.sync.actions import ErrorCode, Limits, Mode, State
from nat_control.sync.codec import (
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    VERSION,
    Decoder,
    DeleteComplete,
    Digest,
    Error,
    Hello,
    InitState,
    InstallComplete,
    InstallEntries,
    Message,
    NextHopsKnown,
    PoolRange,
    Ready,
    UpdateEntries,
    encode,
)
from nat_control.sync.protocol import Protocol
from nat_control.sync.transport import Transport
from nat_fastpath.engine import NEIGHBOUR
from tests.entered import entered
from tests.packets import CLIENT, INSIDE, POOL, SERVER, Nat, frame, number, udp
from tests.planes.subjects import sessions

HERE, PEER = 1, 2
PATIENCE = 30.0  # seconds; a busy machine may be slow
EPOCH = 77
ADDRESS = number(POOL[0])
OURS, ITS = PoolRange(ADDRESS, ADDRESS, 1024, 31999), PoolRange(ADDRESS, ADDRESS, 32000, 65535)
HELLO = Hello(PEER, EPOCH, 0, (ITS,))
IMPATIENT = Limits(handshake=0.6, exchange=0.6, acknowledge=0.6)
FLOWS = 50


@pytest.fixture(scope="module", autouse=True)
def loopback() -> Iterator[None]:
    with Lab() as lab, entered(lab.namespace("pair")):
        yield


class Side:
    """The side under test."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.nat = Nat(instance=HERE, max_sessions=65536)
        self.plane = CorePlane(self.nat.core, own=True)
        self.protocol = Protocol(HERE, (OURS,), Mode.ASYNCHRONOUS, limits=limits or Limits())
        self.transport = Transport(
            self.protocol,
            self.plane,
            clock=time.monotonic,
            drain=self.drain,
            notice=lambda action: None,
            listen=("127.0.0.1", 0),
        )
        self.packets = [frame(udp(CLIENT, 4000 + i, SERVER, 53)) for i in range(FLOWS)]
        self.forwarded = 0
        self.forward()
        self.drain()
        self.before = self.nat.sessions()

    def drain(self) -> None:
        self.transport.events(changes(self.nat.core.events()))

    def forward(self) -> None:
        results = self.nat.burst([(INSIDE, data) for data in self.packets])
        assert {result.verdict.name for result in results} == {"FORWARD"}
        self.forwarded += len(results)

    async def forwarding(self) -> None:
        while True:
            self.forward()
            await asyncio.sleep(0.002)

    def untouched(self) -> None:
        now = self.nat.sessions()
        assert np.array_equal(now["id"], self.before["id"])
        assert np.array_equal(now["external_port"], self.before["external_port"])
        assert not now["flags"].any(), "all are ours"


@contextlib.asynccontextmanager
async def side(limits: Limits | None = None) -> AsyncIterator[Side]:
    """Runs, and forwards, while this is entered."""
    made = Side(limits)
    async with asyncio.timeout(60):
        running = [asyncio.create_task(made.transport.run()), asyncio.create_task(made.forwarding())]
        await until(lambda: made.transport.address is not None)
        made.transport.ready()
        try:
            yield made
        finally:
            for task in running:
                failed = task.done() and not task.cancelled() and task.exception()
                task.cancel()
                await asyncio.wait([task])
                assert not failed, failed


async def until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not probe():
            await asyncio.sleep(0.005)


class Peer:
    """A peer that says what the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._decoder = Decoder()
        self.heard: list[Message] = []

    @classmethod
    async def connect(cls, of: Side) -> Peer:
        assert of.transport.address is not None
        return cls(*await asyncio.open_connection(*of.transport.address))

    def say(self, *messages: Message, epoch: int = EPOCH) -> None:
        self.writer.write(b"".join(encode(message, epoch) for message in messages))

    async def hear(self, kind: type) -> Message:
        async with asyncio.timeout(PATIENCE):
            while True:
                for at, message in enumerate(self.heard):
                    if isinstance(message, kind):
                        del self.heard[: at + 1]
                        return message
                data = await self.reader.read(1 << 16)
                assert data, f"the connection ends before {kind.__name__}; {self.heard}"
                self.heard += [message for _, message in self._decoder.feed(data)]

    async def come_to(self, state: State, records: Records = NO_RECORDS) -> None:
        await self.hear(Hello)
        if state is State.HANDSHAKE:
            return
        self.say(HELLO)
        init = await self.hear(InitState)
        while not init.last:
            init = await self.hear(InitState)
        if state is State.EXCHANGING:
            return
        self.say(InitState(1, 0, True, records), Ready(init.txid))
        await self.hear(Ready)

    async def end(self) -> None:
        """Reads until the other side has closed."""
        async with asyncio.timeout(PATIENCE):
            while data := await self.reader.read(1 << 16):
                self.heard += [message for _, message in self._decoder.feed(data)]
        self._decoder.end()
        self.writer.close()


async def good(of: Side) -> None:
    """The next good peer has a working pair, with sessions of its own here."""
    peer = await Peer.connect(of)
    await peer.come_to(State.OPERATIONAL, sessions(5, 900, PEER, external_addr=ADDRESS))
    await until(lambda: of.protocol.state is State.OPERATIONAL)
    peer.say(InstallEntries(1, sessions(5, 950, PEER, external_addr=ADDRESS)))
    done = await peer.hear(InstallComplete)
    assert isinstance(done, InstallComplete)
    assert len(done.refused) == 0
    assert len(of.nat.sessions()) == FLOWS + 10
    peer.writer.close()


def header(
    length: int, kind: int = 4, *, magic: int = MAGIC, version: int = VERSION, epoch: int = EPOCH
) -> bytes:
    return HEADER.pack(magic, version, kind, epoch, length)


@dataclass(frozen=True)
class Bad:
    state: State  # in which it comes
    data: bytes
    code: ErrorCode
    ends: bool = False  # the peer ends its side behind it


def said(*messages: Message, epoch: int = EPOCH) -> bytes:
    return b"".join(encode(message, epoch) for message in messages)


GARBAGE = np.random.default_rng(1).bytes(4 << 20)
INSTALL = said(InstallEntries(1, sessions(3)))
BAD = {
    "cut in a header": Bad(State.HANDSHAKE, said(HELLO)[:5], ErrorCode.MALFORMED, ends=True),
    "cut in a record": Bad(State.OPERATIONAL, INSTALL[:-40], ErrorCode.MALFORMED, ends=True),
    "a length too short for it": Bad(State.OPERATIONAL, header(7) + bytes(7), ErrorCode.MALFORMED),
    "no whole records": Bad(State.OPERATIONAL, header(100) + bytes(100), ErrorCode.MALFORMED),
    "too long": Bad(State.OPERATIONAL, header(MAX_PAYLOAD + 1), ErrorCode.MALFORMED),
    "4 GiB": Bad(State.HANDSHAKE, header(0xFFFFFFFF) + GARBAGE, ErrorCode.MALFORMED),
    "another version": Bad(State.HANDSHAKE, header(12, 1, version=VERSION + 1), ErrorCode.VERSION),
    "another protocol": Bad(State.HANDSHAKE, b"GET / HTTP/1.1\r\nHost: nat\r\n\r\n", ErrorCode.MALFORMED),
    "garbage": Bad(State.HANDSHAKE, GARBAGE, ErrorCode.MALFORMED),
    "garbage later": Bad(State.OPERATIONAL, INSTALL + GARBAGE, ErrorCode.MALFORMED),
    "an unknown type": Bad(State.EXCHANGING, header(0, 200), ErrorCode.MALFORMED),
    "another epoch": Bad(State.OPERATIONAL, said(InstallEntries(1, sessions(3)), epoch=76), ErrorCode.EPOCH),
    "another epoch early": Bad(
        State.EXCHANGING, said(InitState(1, 0, True, NO_RECORDS), epoch=76), ErrorCode.EPOCH
    ),
    "nothing before Hello": Bad(State.HANDSHAKE, INSTALL, ErrorCode.PROTOCOL),
    "a second Hello": Bad(State.EXCHANGING, said(HELLO), ErrorCode.PROTOCOL),
    "Hello in the middle": Bad(State.OPERATIONAL, said(HELLO), ErrorCode.PROTOCOL),
    "a gap in InitState": Bad(State.EXCHANGING, said(InitState(1, 1, True, NO_RECORDS)), ErrorCode.PROTOCOL),
    "changes too early": Bad(State.EXCHANGING, INSTALL, ErrorCode.PROTOCOL),
    "Ready for nothing": Bad(State.EXCHANGING, said(Ready(4711)), ErrorCode.PROTOCOL),
    "acknowledges nothing": Bad(State.OPERATIONAL, said(DeleteComplete(4711)), ErrorCode.PROTOCOL),
    "too much at once": Bad(
        State.OPERATIONAL, said(*(InstallEntries(i, sessions(1)) for i in range(1000))), ErrorCode.PROTOCOL
    ),
    "other records": Bad(State.HANDSHAKE, said(replace(HELLO, record_size=88)), ErrorCode.RECORD),
    "our own instance": Bad(State.HANDSHAKE, said(replace(HELLO, instance=HERE)), ErrorCode.INSTANCE),
    "our own ports": Bad(State.HANDSHAKE, said(replace(HELLO, pools=(OURS,))), ErrorCode.POOLS),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_peer_hears_why_and_costs_nobody_anything(what: str) -> None:
    bad = BAD[what]

    async def scenario() -> None:
        async with side() as of:
            peer = await Peer.connect(of)
            await peer.come_to(bad.state)
            before = of.forwarded
            peer.writer.write(bad.data)
            if bad.ends:
                peer.writer.write_eof()
            await peer.end()
            last = peer.heard[-1]
            assert isinstance(last, Error), peer.heard
            assert last.code == bad.code, last
            assert last.text
            await until(lambda: of.protocol.state is State.ALONE)
            assert of.protocol.last_error == last.text
            await until(lambda: of.forwarded > before and not of.transport._work.qsize())
            mine = of.nat.sessions()
            its = mine["id"] >> np.uint64(52) & np.uint64(0xFF) == PEER
            assert of.nat.core.delete(mine[its]) == its.sum()  # what it installed before it went wrong
            of.untouched()
            await good(of)

    asyncio.run(scenario())


def test_strangers_do_not_take_a_peers_place() -> None:
    """Whoever merely connects, or is somebody else; but the peer itself may come again before its end was noticed."""

    async def scenario() -> None:
        async with side() as of:
            peer = await Peer.connect(of)
            await peer.come_to(State.OPERATIONAL)
            await until(lambda: of.protocol.state is State.OPERATIONAL)
            silent = await Peer.connect(of)
            silent.writer.close()
            for data in (b"GET / HTTP/1.1\r\n\r\n", INSTALL, said(replace(HELLO, instance=9))):
                stranger = await Peer.connect(of)
                stranger.writer.write(data)
                await stranger.end()
                assert isinstance(stranger.heard[-1], Error), stranger.heard
            assert of.protocol.state is State.OPERATIONAL
            peer.say(InstallEntries(1, sessions(5, 900, PEER, external_addr=ADDRESS)))
            await peer.hear(InstallComplete)
            again = await Peer.connect(of)
            again.say(HELLO)
            await again.hear(InitState)
            await peer.end()

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"", said(HELLO)[:-1]])
def test_a_peer_that_takes_its_time_is_let_go(data: bytes) -> None:
    """One byte at a time, or none at all."""

    async def scenario() -> None:
        async with side(IMPATIENT) as of:
            peer = await Peer.connect(of)
            slow = asyncio.create_task(trickle(peer, data))
            await peer.end()
            slow.cancel()
            last = peer.heard[-1]
            assert isinstance(last, Error)
            assert last.code == ErrorCode.TIMEOUT
            of.untouched()
            await good(of)

    asyncio.run(scenario())


async def trickle(peer: Peer, data: bytes) -> None:
    for at in range(len(data)):
        peer.writer.write(data[at : at + 1])
        await asyncio.sleep(0.1)


def buffered(of: Side) -> int:
    writer = of.transport._writer
    return writer.transport.get_write_buffer_size() if writer else 0


@contextlib.asynccontextmanager
async def watched(of: Side, look: Callable[[Side], int]) -> AsyncIterator[list[int]]:
    """What ``look`` sees as long as this is entered."""
    seen = [0]

    async def keep_looking() -> None:
        while True:
            seen.append(look(of))
            await asyncio.sleep(0)

    task = asyncio.create_task(keep_looking())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.wait([task])


MANY = 40_000  # sessions, 4 MB on the wire: more than the sockets take


@pytest.mark.parametrize("state", [State.EXCHANGING, State.OPERATIONAL])
def test_a_peer_that_never_reads_costs_little_memory_and_is_let_go(
    monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """It is given as much as the window allows; InitState waits for it, changes are counted."""
    monkeypatch.setattr(shell, "GOODBYE", 0.2)
    most = shell.PACE_BYTES + MAX_PAYLOAD

    async def scenario() -> None:
        async with side(IMPATIENT) as of:
            if state is State.EXCHANGING:
                of.nat.core.install(sessions(MANY, 100, HERE))
            peer = await Peer.connect(of)
            async with watched(of, buffered) as seen:
                if state is State.EXCHANGING:
                    await peer.hear(Hello)
                    peer.say(HELLO)
                else:
                    await peer.come_to(State.OPERATIONAL)
                    of.nat.core.install(sessions(MANY, 100, HERE))
                    records = sessions(MANY, 100, HERE)
                    for at in range(0, MANY, 1000):
                        of.transport.events(Changes(opened=records[at : at + 1000]))
                peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
                await until(lambda: of.protocol.state is State.ALONE)
            assert max(seen) <= most
            assert "TimeoutError" not in of.protocol.last_error
            assert "no progress" in of.protocol.last_error or "not acknowledged" in of.protocol.last_error
            peer.writer.transport.abort()
            assert of.nat.core.holds(of.before).all()

    asyncio.run(scenario())


def test_updates_to_a_peer_that_never_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody acknowledges them; so much unsent, and the connection ends."""
    monkeypatch.setattr(shell, "QUEUED_BYTES", 1 << 20)

    async def scenario() -> None:
        async with side() as of:
            peer = await Peer.connect(of)
            await peer.come_to(State.OPERATIONAL)
            peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
            records = sessions(5000)
            async with watched(of, buffered) as seen:
                for _ in range(100):
                    of.transport.events(Changes(updated=records))
                    await asyncio.sleep(0)
                await until(lambda: of.protocol.state is State.ALONE)
            assert max(seen) <= (1 << 20) + MAX_PAYLOAD
            of.untouched()
            await good(of)

    asyncio.run(scenario())


FLOODS = {
    "empty updates": said(UpdateEntries(NO_RECORDS)) * 3000,
    "updates": said(UpdateEntries(sessions(1000))) * 100,
    "next hops": said(NextHopsKnown(np.zeros(20_000, NEIGHBOUR))) * 20,
    "digests": said(Digest(0, np.zeros(256, np.uint64))) * 1500,
}


@pytest.mark.parametrize("what", FLOODS)
def test_a_peer_that_never_stops_waits_for_the_plane(what: str) -> None:
    """Nothing of this is acknowledged, so only the reading can hold it back."""

    most = shell.QUEUED_RECORDS // shell.STEP_RECORDS + 2

    async def scenario() -> None:
        async with side() as of:
            peer = await Peer.connect(of)
            await peer.come_to(State.OPERATIONAL)
            async with watched(of, lambda of: of.transport._work.qsize()) as seen:
                for _ in range(2):
                    peer.writer.write(FLOODS[what])
                    async with asyncio.timeout(PATIENCE):
                        await peer.writer.drain()
                peer.say(InstallEntries(1, sessions(3, 900, PEER, external_addr=ADDRESS)))
                await peer.hear(InstallComplete)
            assert max(seen) <= most
            assert of.protocol.state is State.OPERATIONAL
            peer.writer.close()
            await until(lambda: of.protocol.state is State.ALONE)

    asyncio.run(scenario())
