# SPDX-License-Identifier: Apache-2.0
"""OpenFlow over TLS: who is let in, who is not and hears why, and the process that encrypts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nat_control.certificates import make_certificates
from nat_control.tls import Tls, TlsError, context
from switch_agent import codec, relay
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import Lost, PacketIn, Ready
from tests.switch.test_channel import FakeSwitch, next_event
from tests.switch.test_codec import IN_PORT, message, oxm, packet_in


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("openflow")
    make_certificates(directory, ("agent", "ovs"))
    return directory


def files(directory: Path, name: str) -> Tls:
    return Tls(directory / "ca.pem", directory / f"{name}.pem", directory / f"{name}.key")


@asynccontextmanager
async def listening(ours: Path) -> AsyncIterator[tuple[Channel, int]]:
    channel = Channel(1)
    where = await channel.listen("tls:127.0.0.1:0", files(ours, "agent"), urgent=True)
    try:
        yield channel, int(where.rpartition(":")[2])
    finally:
        await channel.close()


async def connect(port: int, tls: ssl.SSLContext | None) -> FakeSwitch:
    return FakeSwitch(*await asyncio.open_connection("127.0.0.1", port, ssl=tls))


async def joined(channel: Channel, port: int, tls: ssl.SSLContext | None) -> FakeSwitch:
    """One that has been greeted."""
    switch = await connect(port, tls)
    await switch.greet()
    await next_event(channel, Ready)
    return switch


async def refused(channel: Channel, text: str) -> None:
    for _ in range(1000):
        if any(text in line for line in channel.refusals):
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{text!r} is not among {list(channel.refusals)}")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_switch_with_our_certificate_is_one(ours: Path, version: ssl.TLSVersion) -> None:
    """Every byte arrives, both ways, however much it is."""

    async def body() -> None:
        tls = context(files(ours, "ovs"), listens=False, minimum=version)
        tls.maximum_version = version
        async with listening(ours) as (channel, port):
            switch = await joined(channel, port, tls)
            blob = os.urandom(3 << 20)
            messages = b"".join(codec.echo(99, 5, blob[i : i + 4096]) for i in range(0, len(blob), 4096))
            task = asyncio.create_task(channel.transact(messages, 5))
            got = b"".join([(await switch.read(99))[1] for _ in range(0, len(blob), 4096)])
            assert got == blob
            xid, _ = await switch.read(codec.BARRIER_REQUEST)
            switch.send(message(codec.BARRIER_REPLY, xid=xid))
            assert await task == ()
            switch.send(packet_in(blob[:60_000], oxm(IN_PORT)))
            assert (await next_event(channel, PacketIn)).frame == blob[:60_000]
            # what a thread writes on the descriptor arrives as it is
            os.write(channel.fileno(), codec.barrier(77))
            assert (await switch.read(codec.BARRIER_REQUEST))[0] == 77
            switch.writer.close()
            assert "closed the connection" in (await next_event(channel, Lost)).reason

    asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_strangers_are_turned_away_and_named(ours: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path, ("ovs",))
    unsigned = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unsigned.check_hostname = False
    unsigned.verify_mode = ssl.CERT_NONE
    # old enough to be refused by us, and not by itself
    old = context(files(ours, "ovs"), listens=False, minimum=ssl.TLSVersion.TLSv1_2)
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    foreign = context(files(tmp_path, "ovs"), listens=False)
    foreign.load_verify_locations(ours / "ca.pem")

    async def body() -> None:
        async with listening(ours) as (channel, port):
            for tls, why in (
                (unsigned, "peer did not return a certificate"),
                (foreign, "the switch's certificate is refused"),
                (old, "TLS: "),
            ):
                channel.refusals.clear()
                with contextlib.suppress(OSError):
                    await (await connect(port, tls)).ended()
                await refused(channel, why)
            plain = await connect(port, None)
            plain.send(message(0))
            await plain.ended()
            await refused(channel, "TLS: ")
            assert not channel.connected
            await joined(channel, port, context(files(ours, "ovs"), listens=False))

    asyncio.run(asyncio.wait_for(body(), 60))


def test_those_who_only_connect_are_few(ours: Path) -> None:
    """So many wait for their handshake; the next one is turned away at once, and they do not wait for ever."""

    async def body() -> None:
        async with listening(ours) as (channel, port):
            waiting = [await connect(port, None) for _ in range(relay.CONNECTIONS)]
            await asyncio.sleep(0)
            one_more = await connect(port, None)
            await one_more.ended()
            await refused(channel, "8 TLS connections stand already")
            await refused(channel, "no TLS handshake within 5 s")
            for switch in waiting:
                await switch.ended()
            switch = await joined(channel, port, context(files(ours, "ovs"), listens=False))

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_relay_that_dies_is_started_again(ours: Path) -> None:
    async def body() -> None:
        async with listening(ours) as (channel, port):
            tls = context(files(ours, "ovs"), listens=False)
            await joined(channel, port, tls)
            assert channel._relay
            before = channel._relay.pid
            os.kill(before, signal.SIGKILL)
            await next_event(channel, Lost)
            with pytest.raises(ChannelLost):
                channel.fileno()
            await joined(channel, port, tls)  # waits in the listener's queue until the next one is there
            assert channel._relay.pid != before

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_relay_ends_with_its_agent(ours: Path) -> None:
    """By the end of its descriptor; signals for the whole group leave it alone until then."""

    async def body() -> None:
        async with listening(ours) as (channel, port):
            tls = context(files(ours, "ovs"), listens=False)
            switch = await joined(channel, port, tls)
            assert channel._relay
            pid = channel._relay.pid
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
            task = asyncio.create_task(channel.transact(b"", 5))
            xid, _ = await switch.read(codec.BARRIER_REQUEST)
            switch.send(message(codec.BARRIER_REPLY, xid=xid))
            assert await task == ()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(asyncio.wait_for(body(), 60))


def test_files_that_are_not_there_are_named(ours: Path) -> None:
    async def body() -> None:
        with pytest.raises(TlsError, match=r"nobody\.pem: No such file"):
            await Channel(1).listen("tls:127.0.0.1:0", files(ours, "nobody"))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            where = f"tls:127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(OSError, match="in use"):
                await Channel(1).listen(where, files(ours, "agent"))

    asyncio.run(body())
