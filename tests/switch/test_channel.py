# SPDX-License-Identifier: Apache-2.0
"""The channel against switches that break the rules: each is turned away with one line, and nothing hangs."""

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from switch_agent import codec
from switch_agent.channel import Channel, ChannelLost, Limits
from switch_agent.codec import Lost, PacketIn, Ready, TransactionComplete
from tests.switch.test_codec import IN_PORT, SAMPLES, flow_stat, message, oxm, packet_in

FEATURES = message(6, struct.pack("!QIBB2xII", 1, 0, 254, 0, 0x4F, 0))
PORTS = message(19, struct.pack("!HH4x", codec.PORT_DESCRIPTIONS, 0))


class FakeSwitch:
    """A switch's side of one connection, as well or as badly behaved as a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self, kind: int) -> tuple[int, bytes]:
        """The transaction id and body of the next message of this kind; others are skipped."""
        while True:
            head = await self.reader.readexactly(8)
            _, found, length, xid = codec.HEADER.unpack(head)
            body = await self.reader.readexactly(length - 8)
            if found == kind:
                return xid, body

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def greet(self, features: bytes = FEATURES) -> None:
        self.send(message(0))
        xid, _ = await self.read(codec.BARRIER_REQUEST)
        self.send(features + PORTS + message(codec.BARRIER_REPLY, xid=xid))

    async def ended(self) -> bool:
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            return True
        return True


@asynccontextmanager
async def listening(**limits: Any) -> AsyncIterator[tuple[Channel, Callable[[], Awaitable[FakeSwitch]]]]:
    channel = Channel(1, Limits(**limits))
    where = await channel.listen("127.0.0.1:0")
    switches = []

    async def connect() -> FakeSwitch:
        host, port = where.split(":")
        switches.append(FakeSwitch(*await asyncio.open_connection(host, int(port))))
        return switches[-1]

    try:
        yield channel, connect
    finally:
        for switch in switches:
            switch.writer.close()
        await channel.close()


async def next_event(channel: Channel, kind: type) -> Any:
    while True:
        for event in await asyncio.wait_for(channel.events(), 10):
            if isinstance(event, kind):
                return event


BAD_GREETINGS = {
    "not openflow": (b"GET / HTTP/1.1\r\n\r\n", "OpenFlow version 0x47"),
    "too old": (message(0, version=1), "version 0x1 at most"),
    "no hello": (message(21), "does not begin with a hello"),
    "another switch": (
        message(0) + message(6, struct.pack("!QIBB2xII", 2, 0, 254, 0, 0, 0)),
        "the switch is datapath 0000000000000002; 0000000000000001 was expected",
    ),
    "refuses": (
        message(0) + message(1, struct.pack("!HH", 0, 0)),
        "refuses the greeting: OFPET_HELLO_FAILED",
    ),
    "goes away": (b"", "closed the connection|reset by peer"),
    "talks on and on": (message(0) + SAMPLES["packet-in"][0] * 5000, "without answering"),
}


@pytest.mark.parametrize("name", BAD_GREETINGS)
def test_bad_greetings(name: str) -> None:
    data, said = BAD_GREETINGS[name]

    async def body() -> None:
        async with listening() as (channel, connect):
            switch = await connect()
            switch.send(data)
            if not data:
                switch.writer.close()
            await switch.ended()
            while not channel.refusals:
                await asyncio.sleep(0.01)
            assert re.search(said, channel.refusals[0])
            assert not channel.connected
            # it is no hindrance for the right one
            await (await connect()).greet()
            assert (await next_event(channel, Ready)).datapath_id == 1

    asyncio.run(asyncio.wait_for(body(), 30))


def test_silence_instead_of_a_greeting() -> None:
    async def body() -> None:
        async with listening(answer=0.1) as (channel, connect):
            await (await connect()).ended()
            assert "no greeting within 0.1 s" in channel.refusals[0]

    asyncio.run(asyncio.wait_for(body(), 30))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (message(0), "greets in the middle"),
        (message(21, version=3), "OpenFlow version 0x3"),
        (SAMPLES["statistics"][0], "nobody asked for"),
        (SAMPLES["port status"][0] * 20, "10 events wait"),
        (message(codec.FEATURES_REPLY), "ends after 8 bytes"),
    ],
)
def test_a_switch_that_breaks_the_protocol_loses_its_connection(data: bytes, said: str) -> None:
    async def body() -> None:
        async with listening(events=10) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            waiting = asyncio.create_task(channel.transact(b"", 1))
            await switch.read(codec.BARRIER_REQUEST)
            switch.send(data)
            with pytest.raises(ChannelLost, match=said):
                await waiting
            assert said in (await next_event(channel, Lost)).reason
            with pytest.raises(ChannelLost, match="not connected"):
                await channel.transact(b"", 2)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_transactions_are_bounded_and_answered_each_by_its_own_barrier() -> None:
    async def body() -> None:
        async with listening(outstanding=2) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            tasks = [asyncio.create_task(channel.transact(b"", i)) for i in (11, 12, 13)]
            first, _ = await switch.read(codec.BARRIER_REQUEST)
            second, _ = await switch.read(codec.BARRIER_REQUEST)
            assert (first, second) == (11, 12)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(switch.read(codec.BARRIER_REQUEST), 0.05)
            switch.send(message(1, struct.pack("!HH", 5, 1), xid=12) + message(codec.BARRIER_REPLY, xid=12))
            assert [error.txid for error in await tasks[1]] == [12]
            assert (await switch.read(codec.BARRIER_REQUEST))[0] == 13
            switch.send(message(codec.BARRIER_REPLY, xid=13) + message(codec.BARRIER_REPLY, xid=11))
            assert await tasks[0] == await tasks[2] == ()
            # one that nobody waits for is told as an event
            switch.send(message(codec.BARRIER_REPLY, xid=99))
            assert await next_event(channel, TransactionComplete) == TransactionComplete(99)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_barrier_without_an_answer_ends_the_connection() -> None:
    async def body() -> None:
        async with listening(answer=0.2) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            with pytest.raises(ChannelLost, match=r"has not answered for 0.2 s"):
                await channel.transact(b"", 1)
            assert not channel.connected

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_silent_switch_is_asked_and_then_given_up() -> None:
    async def body() -> None:
        async with listening(idle=0.1) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await switch.read(codec.ECHO_REQUEST)
            switch.send(message(codec.ECHO_REPLY) + message(codec.ECHO_REQUEST, b"you too?"))
            assert (await switch.read(codec.ECHO_REPLY))[1] == b"you too?"
            assert "silent" in (await next_event(channel, Lost)).reason

    asyncio.run(asyncio.wait_for(body(), 30))


def test_the_newer_connection_counts() -> None:
    async def body() -> None:
        async with listening() as (channel, connect):
            first = await connect()
            await first.greet()
            await next_event(channel, Ready)
            second = await connect()
            await second.greet()
            assert "new connection" in (await next_event(channel, Lost)).reason
            await first.ended()
            task = asyncio.create_task(channel.transact(b"", 5))
            switch_xid, _ = await second.read(codec.BARRIER_REQUEST)
            second.send(message(codec.BARRIER_REPLY, xid=switch_xid))
            assert await task == ()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_packet_ins_beyond_the_bound_are_dropped_and_counted() -> None:
    async def body() -> None:
        async with listening(packets=10) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            switch.send(packet_in(b"frame", oxm(IN_PORT)) * 25 + message(codec.BARRIER_REPLY, xid=99))
            while channel.packets_dropped < 15:
                await asyncio.sleep(0.01)
            found = await channel.events()
            assert sum(isinstance(event, PacketIn) for event in found) == 10
            switch.send(packet_in(b"frame", oxm(IN_PORT)))
            assert await next_event(channel, PacketIn)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_packet_outs_without_room_are_dropped_and_counted() -> None:
    async def body() -> None:
        async with listening(write_buffer=100_000) as (channel, connect):
            assert not channel.packet_out(b"frame", port=1)
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            sent = 0
            while channel.packet_out(bytes(1400), port=1):
                sent += 1
            assert channel.packet_outs_dropped == 2
            for _ in range(sent):
                assert (await switch.read(codec.PACKET_OUT))[1][-1400:] == bytes(1400)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_who_does_not_say_who_he_is_waits_in_a_short_queue() -> None:
    async def body() -> None:
        async with listening(newcomers=2, answer=0.3) as (channel, connect):
            waiting = [await connect() for _ in range(2)]
            for switch in waiting:
                await switch.read(0)
            await (await connect()).ended()
            assert channel.refusals[0] == "2 connections have not said yet who they are"
            for switch in waiting:
                await switch.ended()
            await (await connect()).greet()
            assert (await next_event(channel, Ready)).datapath_id == 1

    asyncio.run(asyncio.wait_for(body(), 30))


GREETED_FOR_EVER = {
    "ports": (
        message(
            codec.MULTIPART_REPLY,
            struct.pack("!HH4x", codec.PORT_DESCRIPTIONS, 1) + struct.pack("!I60x", 1) * 20,
        ),
        "more than 64 ports",
    ),
    "hellos": (message(0), "says hello twice"),
    "echoes": (message(codec.ECHO_REQUEST, bytes(60_000)), "asks, and takes no answers"),
    "frames": (packet_in(bytes(9000), oxm(IN_PORT)), "without answering the greeting"),
}


@pytest.mark.parametrize("what", GREETED_FOR_EVER)
def test_a_greeting_without_end(what: str) -> None:
    """It sends on and on, and reads nothing."""
    data, said = GREETED_FOR_EVER[what]

    async def body() -> None:
        async with listening(ports=64, packet_bytes=100_000, write_buffer=100_000) as (channel, connect):
            switch = await connect()
            switch.send(message(0))
            while not channel.refusals:
                switch.send(data)
                await asyncio.sleep(0)
            assert said in channel.refusals[0]

    asyncio.run(asyncio.wait_for(body(), 30))


def test_frames_beyond_the_bound_are_dropped_and_counted() -> None:
    async def body() -> None:
        async with listening(packet_bytes=200_000) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            for _ in range(10):
                switch.send(packet_in(bytes(60_000), oxm(IN_PORT)))
            while channel.packets_dropped < 7:
                await asyncio.sleep(0.01)
            assert sum(isinstance(event, PacketIn) for event in await channel.events()) == 3
            switch.send(packet_in(bytes(60_000), oxm(IN_PORT)))
            assert await next_event(channel, PacketIn)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_switch_that_asks_and_never_reads() -> None:
    async def body() -> None:
        async with listening(write_buffer=100_000) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            while channel.connected:
                switch.send(message(codec.ECHO_REQUEST, bytes(60_000)))
                await asyncio.sleep(0)
            assert "asks, and takes no answers" in (await next_event(channel, Lost)).reason

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_switch_that_never_reads_gets_no_more_than_a_window() -> None:
    """Transactions wait behind the window, and the barrier's time ends them all."""

    async def body() -> None:
        async with listening(answer=0.5, outstanding=2) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            switch.reader._transport.pause_reading()  # type: ignore[attr-defined]
            data = codec.echo(codec.ECHO_REPLY, 1, bytes(60_000)) * 100
            tasks = [asyncio.create_task(channel.transact(data, i)) for i in range(1, 10)]
            connection = channel._connection
            assert connection
            most = 0
            while not all(task.done() for task in tasks):
                most = max(most, connection.writer.transport.get_write_buffer_size())
                await asyncio.sleep(0.01)
            assert most <= 2 * (len(data) + 8)
            assert all(isinstance(task.exception(), ChannelLost) for task in tasks)

    asyncio.run(asyncio.wait_for(body(), 30))


def statistics(xid: int, body: bytes, more: bool) -> bytes:
    return message(codec.MULTIPART_REPLY, struct.pack("!HH4x", codec.FLOW_STATISTICS, more) + body, xid)


STATISTICS_FOR_EVER = {
    "empty parts": (b"", "say nothing and do not end"),
    "flows": (flow_stat(1, 1, oxm(IN_PORT), 1) * 100, "more than 1000 flows"),
}


@pytest.mark.parametrize("what", STATISTICS_FOR_EVER)
def test_statistics_without_end(what: str) -> None:
    part, said = STATISTICS_FOR_EVER[what]

    async def body() -> None:
        async with listening(flows=1000) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            task = asyncio.create_task(channel.statistics(0, 0))
            xid, _ = await switch.read(18)
            while not task.done():
                switch.send(statistics(xid, part, True))
                await asyncio.sleep(0)
            with pytest.raises(ChannelLost, match=said):
                await task

    asyncio.run(asyncio.wait_for(body(), 30))


def test_statistics_that_come_in_drops_have_an_end_too() -> None:
    async def body() -> None:
        async with listening(answer=0.3, statistics=0.8) as (channel, connect):
            switch = await connect()
            await switch.greet()
            await next_event(channel, Ready)
            task = asyncio.create_task(channel.statistics(0, 0))
            xid, _ = await switch.read(18)
            while not task.done():
                switch.send(statistics(xid, flow_stat(1, 1, oxm(IN_PORT), 1), True))
                await asyncio.sleep(0.05)
            with pytest.raises(ChannelLost, match=r"have no end for 0.8 s"):
                await task

    asyncio.run(asyncio.wait_for(body(), 30))
