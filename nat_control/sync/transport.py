# SPDX-License-Identifier: Apache-2.0
"""The sync protocol's shell: one TCP connection at a time, and the data plane, around the pure machine.

It decides nothing. Bytes go through the codec, actions to the socket or the plane, results back to the machine.
Every queue is bounded: a plane that is behind stops the reading, a peer that is behind stops InitState.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import cast

import numpy as np

from nat_control.dataplane import NO_IDS, NO_RECORDS, Changes, DataPlane, Front, Ids, NextHops, Records
from nat_control.straight import Straight
from nat_control.sync import actions as do
from nat_control.sync.codec import Carried, CodecError, Decoder, Error, Hello, Received, VersionError, encode
from nat_control.sync.digest import Summary, within, without
from nat_control.sync.hearsay import Hearsay
from nat_control.sync.protocol import Protocol
from nat_control.tls import reason
from nat_fastpath.tables import chosen, joined

READ_BYTES = 1 << 18
QUEUED_RECORDS = 1 << 17  # of the peer, not yet given to the plane
STEP_RECORDS = 64  # that an operation of the plane counts for by itself, even one of no record
QUEUED_BYTES = 64 << 20  # written and not taken by the kernel; a peer that far behind is lost
PACE_BYTES = 1 << 20  # more than that unsent, and InitState waits
BACKOFF = (0.05, 2.0)  # seconds between two attempts to connect, first and longest
GOODBYE = 1.0  # seconds for the last bytes to leave
TICK = 0.5
COMMITS = 8  # that the plane has at a time; what may go meanwhile goes as one
NEWCOMERS = 4  # connections beside the peer's that may wait for their Hello to be read
HELLO = 2.0  # seconds that they have for it
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 8000}

Step = Callable[[], Awaitable[object]]
Answer = Callable[[float], list[do.Action]]


class Transport:
    """Runs one side of a pair; call ``run`` as a task.

    ``clock``: seconds, monotonic. ``drain``: takes the plane's events and passes them to ``events``; called
    before the machine is told that an operation is done. ``notice``: every StateChanged, Conflicts,
    DigestCompared, Mended, Gap, Carry, CarrierTold, FrontMoved and FrontSeen, for logs, metrics and takeover. ``front``
    moves sessions in front of the peer, where there is a switch that can.
    """

    def __init__(
        self,
        protocol: Protocol,
        plane: DataPlane,
        *,
        clock: Callable[[], float],
        drain: Callable[[], object],
        notice: Callable[[do.Action], None],
        listen: tuple[str, int] | None = None,
        connect: tuple[str, int] | None = None,
        tls: ssl.SSLContext | None = None,
        front: Front | None = None,
    ) -> None:
        if (listen is None) == (connect is None):
            raise ValueError("one side listens, the other connects")
        self.protocol = protocol
        self._plane = plane
        self._clock = clock
        self._drain = drain
        self._notice = notice
        self._listen = listen
        self._connect = connect
        self._tls = tls
        self._front = front
        self._unreachable = ""
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._connection: asyncio.Task[None] | None = None
        self._work: asyncio.Queue[tuple[int, Step]] = asyncio.Queue()
        self._records = 0  # in _work
        self._room = asyncio.Event()
        self._room.set()
        self._paging: asyncio.Task[None] | None = None
        self._todo: deque[do.Action] = deque()
        self._carrying = False
        self._held: list[Records] = []  # may go, once the plane has fewer commits
        self._commits: set[asyncio.Task[int]] = set()
        self._incoming: _Incoming | None = None
        self._running = False
        self._tasks = asyncio.TaskGroup()
        self._leaving = False
        self._newcomers = 0
        self.hearsay = Hearsay(self._clock())
        self.address: tuple[str, int] | None = None  # where it listens, once it does

    # -- what the owner says

    def events(self, changes: Changes) -> None:
        """What our own plane did."""
        self._carry_out(self.protocol.events(changes, self._clock()))

    def next_hops(self, next_hops: NextHops) -> None:
        """What our own plane knows of them."""
        self._carry_out(self.protocol.next_hops(next_hops, self._clock()))

    def hand_over(self, carrier: int, *, lasting: bool = False) -> None:
        """This instance shall carry, which the peer decides; ``notice`` gets CarrierTold."""
        self._carry_out(self.protocol.hand_over(carrier, self._clock(), lasting=lasting))

    def carries(self, carrier: int, *, lasting: bool = False, why: str = "") -> None:
        """Who carries, by our decision, also after ``notice`` got Carry; ``why`` nothing came of that."""
        self._carry_out(self.protocol.carries(carrier, self._clock(), lasting=lasting, why=why))

    def ask_front(self, txid: int, ids: Ids, front: bool) -> None:
        """The peer's switch shall carry these; ``notice`` gets FrontMoved, unless the connection ends."""
        self._carry_out(self.protocol.ask_front(txid, ids, front, self._clock()))

    def tell_front(self, ms: int, room: int, carried: Carried) -> None:
        """All that our switch carries in front of the peer."""
        self._carry_out(self.protocol.tell_front(ms, room, carried, self._clock()))

    def verify(self) -> None:
        """A digest soon, if there is a peer; ``notice`` gets DigestCompared."""
        if self.protocol.state is do.State.OPERATIONAL:
            self._carry_out(self.protocol.verify(self._clock()))

    def ready(self) -> None:
        """The plane is ready; connections are accepted from here on."""
        self._carry_out(self.protocol.plane_ready())

    def fileno(self) -> int:
        """The connection's descriptor, for whoever watches its end. Raises OSError when there is none."""
        if self._writer is None:
            raise OSError("no connection")
        return int(self._writer.get_extra_info("socket").fileno())

    def lose(self) -> None:
        """The peer is known to be dead: its connection ends now, and not when the kernel notices."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def stop(self) -> None:
        """Says goodbye, and connects no more; ``run`` may be cancelled then."""
        self._leaving = True
        self._carry_out(self.protocol.stop(self._clock()))
        if self._connection is not None:
            await asyncio.wait([self._connection], timeout=2 * GOODBYE)

    async def listen(self) -> None:
        """Takes its address, where it is the side that listens; nobody is served before ``run``. Raises OSError."""
        if self._listen is not None and self._server is None:
            self._server = await asyncio.start_server(
                self._accepted,
                *self._listen,
                limit=READ_BYTES,
                start_serving=False,
                ssl=self._tls,
                ssl_handshake_timeout=HELLO if self._tls else None,
            )

    async def _serve(self, server: asyncio.Server) -> None:
        await server.start_serving()  # until here a connection is refused
        self.address = server.sockets[0].getsockname()[:2]
        await server.serve_forever()

    async def run(self) -> None:
        """Until cancelled. Raises OSError when it cannot listen, an ExceptionGroup of what the plane raises."""
        await self.listen()
        link = self._dial if self._server is None else partial(self._serve, self._server)
        async with self._tasks:
            for work in (self._operate, self._tick, link):
                self._tasks.create_task(work())
            self._running = True
            self._commit()
            try:
                await asyncio.Future()
            finally:
                self._running = False

    # -- connections

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A new connection takes the place of an old one, whose end may not have been noticed yet: once it has said Hello.

        Whoever merely connects must not cost a pair its peer.
        """
        first = b""
        if self.protocol.peer is not None:
            if self._newcomers >= NEWCOMERS:
                writer.transport.abort()
                return
            self._newcomers += 1
            try:
                async with asyncio.timeout(HELLO):
                    first = await _first_hello(reader, self.protocol.peer)
            except (CodecError, OSError, TimeoutError) as error:
                if isinstance(error, CodecError):
                    writer.write(encode(Error(do.ErrorCode.MALFORMED, str(error)), 0))
                writer.close()
                return
            finally:
                self._newcomers -= 1
        if (old := self._connection) is not None:
            await _ended(old)
            if self._connection is old:  # ended before it began
                self._connection = None
        if self._connection is not None or self._leaving:
            writer.transport.abort()
            return
        self._connection = self._tasks.create_task(self._talk(reader, writer, first))

    async def _dial(self) -> None:
        assert self._connect is not None
        pause = BACKOFF[0]
        while not self._leaving:
            try:
                reader, writer = await asyncio.open_connection(
                    *self._connect,
                    limit=READ_BYTES,
                    ssl=self._tls,
                    ssl_handshake_timeout=HELLO if self._tls else None,
                )
            except OSError as error:
                self._not_reached(error)
            else:
                began = self._clock()
                self._connection = self._tasks.create_task(self._talk(reader, writer))
                await asyncio.wait([self._connection])
                if self._clock() - began > BACKOFF[1]:
                    pause = BACKOFF[0]
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF[1])

    def _not_reached(self, error: OSError) -> None:
        why = reason(error)
        if why != self._unreachable:
            self._unreachable = why
            self._notice(do.Unreachable(why))

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = b""
    ) -> None:
        """One connection from its beginning to its end; ``first`` was read already."""
        why = "the peer closed the connection"
        try:
            _prepare(writer)
            self._writer = writer
            self._unreachable = ""
            self._carry_out(self.protocol.connected(self._clock()))
            await self._read(reader, writer, first)
            writer.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), GOODBYE)
        except OSError as error:
            why = reason(error)
        finally:
            writer.transport.abort()
            if self._paging is not None:
                self._paging.cancel()
            self._writer = self._connection = self._incoming = None
            self._carry_out(self.protocol.disconnected(self._clock(), why))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        incoming = self._incoming = _Incoming(writer, self._take)
        incoming.straight.data_received(first)
        try:
            await incoming.straight.ended(reader)
            while self._writer is not None and incoming.paused:
                await self._room.wait()
                incoming.paused = False
                self._take()
            if self._writer is not None:
                incoming.decoder.end()
        except CodecError as error:
            code = do.ErrorCode.VERSION if isinstance(error, VersionError) else do.ErrorCode.MALFORMED
            self._carry_out(self.protocol.broken(str(error), self._clock(), code))
        # What lies unread at a close is answered with a reset, which overtakes our Error.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(incoming.straight.over.wait(), GOODBYE)

    def _take(self) -> None:
        """What has come, in order, until the plane is too far behind. Raises CodecError."""
        incoming = self._incoming
        while incoming is not None and self._writer is not None and (found := incoming.next()) is not None:
            self._carry_out(self.protocol.received(*found, self._clock()))
            if not self._room.is_set():
                incoming.pause()
                return

    # -- actions

    def _carry_out(self, actions: list[do.Action]) -> None:
        """In their order, whatever ``notice`` and ``drain`` call meanwhile."""
        self._todo.extend(actions)
        if self._carrying:
            return
        self._carrying = True
        try:
            while self._todo:
                self._do(self._todo.popleft())
        finally:
            self._carrying = False

    def _do(self, action: do.Action) -> None:
        match action:
            case do.Send(epoch, message):
                self._send(encode(message, epoch), last=isinstance(message, Error))
            case do.Close():
                self._close()
            case do.Commit(records):
                self._held.append(records)
                self._commit()
            case (
                do.StateChanged()
                | do.Conflicts()
                | do.DigestCompared()
                | do.Mended()
                | do.Gap()
                | do.Carry()
                | do.CarrierTold()
                | do.FrontMoved()
                | do.FrontSeen()
            ):
                self._notice(action)
            case do.Learn(next_hops):
                self._queue(partial(self._plane.learn, next_hops), len(next_hops))
            case do.Install(op, records):
                self._queue(partial(self._install, op, records), len(records))
            case do.Delete(op, records):
                self._queue(partial(self._delete, op, records), len(records))
            case do.Update(records):
                self._queue(partial(self._update, records), len(records))
            case do.TakeOwnership():
                self._queue(self._plane.adopt)
            case do.Cede(instance, besides):
                self._queue(partial(self._plane.cede, instance, besides))
            case do.SendState(txid):
                self._queue(partial(self._begin_paging, txid))
            case do.TakeDigest(at, besides):
                self._queue(partial(self._sum_up, at, besides))
            case do.TakeBuckets(at, buckets, besides):
                self._queue(partial(self._gather_buckets, at, buckets, besides))
            case do.Fetch(op, ids):
                self._queue(partial(self._fetch, op, ids), len(ids))
            case do.Move(op, ids, front):
                self._queue(partial(self._move, op, ids, front), len(ids))

    def _send(self, data: bytes, *, last: bool) -> None:
        writer = self._writer
        if writer is None or writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > QUEUED_BYTES and not last:
            writer.transport.abort()
            return
        writer.write(data)

    def _close(self) -> None:
        """What is written still goes out; the reader then sees the end."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                if writer.can_write_eof():
                    writer.write_eof()
                else:  # TLS has no half of an end: all that is written still goes out
                    writer.close()
            asyncio.get_running_loop().call_later(GOODBYE, writer.transport.abort)

    # -- the plane, one operation after the other

    def _queue(self, step: Step, records: int = 0) -> None:
        records += STEP_RECORDS
        self._work.put_nowait((records, step))
        self._records += records
        if self._records > QUEUED_RECORDS:
            self._room.clear()

    async def _operate(self) -> None:
        while True:
            records, step = await self._work.get()
            await step()
            self._records -= records
            if self._records <= QUEUED_RECORDS and not self._room.is_set():
                self._room.set()
                if self._incoming is not None:
                    self._incoming.resume()
            await asyncio.sleep(0)  # a plane that answers at once must not keep the sockets waiting

    def _commit(self) -> None:
        """Packets that are held wait for no other operation of the plane, and not until one knows how many it has released."""
        if self._running and self._held and len(self._commits) < COMMITS:
            records, self._held = joined(*self._held), []
            few = len(records) <= self._plane.capabilities.max_batch
            work = self._plane.commit(records) if few else self._in_parts(self._plane.commit, records)
            task = self._tasks.create_task(work)
            self._commits.add(task)
            task.add_done_callback(self._committed)

    def _committed(self, task: asyncio.Task[int]) -> None:
        self._commits.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._commit()

    async def _in_parts(self, call: Callable[[Records], Awaitable[int]], records: Records) -> int:
        step = self._plane.capabilities.max_batch
        return sum([await call(records[i : i + step]) for i in range(0, len(records), step)])

    async def _install(self, op: int, records: Records) -> None:
        refused: Ids = NO_IDS
        records = self.protocol.prevailing(op, records)
        self.hearsay.heard(records, self._clock())
        if await self._in_parts(self._plane.install, records) < len(records):
            refused = records["id"][~await self._plane.holds(records)]
        self._done(lambda now: self.protocol.plane_done(op, now, refused))

    async def _update(self, records: Records) -> None:
        self.hearsay.heard(records, self._clock())
        await self._in_parts(self._plane.update, records)

    async def _delete(self, op: int, records: Records) -> None:
        await self._in_parts(self._plane.delete, records)
        self._done(lambda now: self.protocol.plane_done(op, now))

    async def _begin_paging(self, txid: int) -> None:
        """The sessions of now; sending them does not keep the plane from its work."""
        if self._paging is not None:
            await _ended(self._paging)
        self._paging = self._tasks.create_task(self._page(txid))

    async def _page(self, txid: int) -> None:
        async for page in self._plane.sessions():
            self._done(partial(self._state_page, txid, page, False))
            if self._writer is None:
                return
            with contextlib.suppress(OSError):
                await self._writer.drain()
            await asyncio.sleep(0)
        self._done(partial(self._state_page, txid, NO_RECORDS, True))

    def _state_page(self, txid: int, records: Records, last: bool, now: float) -> list[do.Action]:
        return self.protocol.state_page(txid, records, last, now)

    async def _sum_up(self, at: do.Position, besides: Ids) -> None:
        summary = Summary()
        async for page in self._plane.sessions():
            summary.add(without(page, besides))
        self._done(lambda now: self.protocol.digest_taken(at, summary.buckets, summary.count, now))

    async def _gather(self, choose: Callable[[Records], Records]) -> Records:
        return joined(NO_RECORDS, *[choose(page) async for page in self._plane.sessions()])

    async def _gather_buckets(self, at: do.Position, buckets: tuple[int, ...], besides: Ids) -> None:
        found = await self._gather(lambda page: within(without(page, besides), buckets))
        self._done(lambda now: self.protocol.buckets_taken(at, buckets, found, now))

    async def _fetch(self, op: int, ids: Ids) -> None:
        found = await self._gather(lambda page: chosen(page, np.isin(page["id"], ids)))
        self._done(lambda now: self.protocol.fetched(op, found, now))

    async def _move(self, op: int, ids: Ids, front: bool) -> None:
        there, room = (NO_IDS, 0) if self._front is None else await self._front.move(ids, front)
        self._done(lambda now: self.protocol.front_moved(op, there, room, now))

    def _done(self, answer: Answer) -> None:
        self._drain()
        self._carry_out(answer(self._clock()))

    async def _tick(self) -> None:
        while True:
            self._carry_out(self.protocol.tick(self._clock()))
            await asyncio.sleep(TICK)


class _Incoming:
    """What comes on one connection: ``take`` is told, and takes it message by message."""

    def __init__(self, writer: asyncio.StreamWriter, take: Callable[[], None]) -> None:
        self.decoder = Decoder()
        self.unread: deque[bytes] = deque()  # what comes while ``take`` rests, after ``pause`` little
        self.paused = False
        self._messages: Iterator[Received] = iter(())
        self._reading = cast(asyncio.Transport, writer.transport)
        self._take = take
        self.straight = Straight(writer, self._received)

    def _received(self, data: bytes) -> None:
        self.unread.append(data)
        if not self.paused:
            self._take()

    def next(self) -> Received | None:
        """Raises CodecError."""
        while (found := next(self._messages, None)) is None and self.unread:
            self._messages = self.decoder.feed(self.unread.popleft())
        return found

    def pause(self) -> None:
        self.paused = True
        with contextlib.suppress(RuntimeError):  # it has ended
            self._reading.pause_reading()

    def resume(self) -> None:
        self.paused = False
        with contextlib.suppress(RuntimeError):
            self._reading.resume_reading()
        self.straight.data_received(b"")


async def _first_hello(reader: asyncio.StreamReader, peer: Hello | None) -> bytes:
    """What has come by the time that a Hello, of ``peer`` again if there is one, is whole.

    Raises CodecError when it begins otherwise, OSError at the end.
    """
    data, decoder = b"", Decoder()
    while part := await reader.read(READ_BYTES):
        data += part
        for _, message in decoder.feed(part):
            if not isinstance(message, Hello):
                raise CodecError(f"{type(message).__name__} is not expected before Hello")
            if peer is not None and message.instance != peer.instance:
                raise CodecError(f"instance {peer.instance} is the peer, and not {message.instance}")
            return data
    raise ConnectionError("the connection ended before its Hello")


def _prepare(writer: asyncio.StreamWriter) -> None:
    """A small message leaves at once, and a peer that is gone without a word is noticed."""
    writer.transport.set_write_buffer_limits(high=PACE_BYTES)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
