# SPDX-License-Identifier: Apache-2.0
"""Proofs by probes: what the channel believes of a switch that acknowledges and may not have done it."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Dot1Q, Ether

from switch_agent import channel as openflow
from switch_agent import codec
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import Error, PacketIn, Ready
from switch_agent.pipeline import (
    ALL_PEER,
    FIN,
    FORWARD_PRIORITY,
    NEW_AT_PEER,
    Kind,
    Output,
    Partition,
    Rule,
    ToController,
    by_protocol,
    mac_text,
)
from switch_agent.probe import Probes, frame_of, random_mac
from tests.switch.net import pipeline
from tests.switch.test_channel import FakeSwitch, listening, next_event
from tests.switch.test_codec import IN_PORT, match, message, oxm, packet_in
from tests.switch.test_pipeline import winner

CONTROLLER = (0, codec.CONTROLLER_PORT.to_bytes(4, "big"))


def returned(frame: bytes, cookie: int, port: tuple[int, bytes] = CONTROLLER) -> bytes:
    """A packet-in by the rule with this cookie."""
    head = struct.pack("!IHBBQ", codec.NO_BUFFER, len(frame), 1, 0, cookie)
    return message(codec.PACKET_IN, head + match(oxm(port)) + bytes(2) + frame)


@asynccontextmanager
async def proving(**limits: Any) -> AsyncIterator[tuple[Channel, FakeSwitch]]:
    async with listening(**limits) as (channel, connect):
        channel.prove = True
        switch = await connect()
        await switch.greet()
        await next_event(channel, Ready)
        yield channel, switch


async def acknowledge(switch: FakeSwitch) -> tuple[int, int, bytes]:
    """Answers the barrier at once; the transaction id, and the cookie and frame by which it is to be proved."""
    await switch.read(codec.BARRIER_REQUEST)  # it keeps the rule of the probe behind the others
    xid, version = await switch.read(codec.FLOW_MOD)
    barrier, _ = await switch.read(codec.BARRIER_REQUEST)
    assert barrier == xid
    _, out = await switch.read(codec.PACKET_OUT)
    switch.send(message(codec.BARRIER_REPLY, xid=xid))
    return xid, int.from_bytes(version[:8], "big"), out[32:]


def test_a_barrier_is_not_believed_and_a_later_version_proves_all_before_it() -> None:
    async def body() -> None:
        async with proving() as (channel, switch):
            tasks = [asyncio.create_task(channel.transact(b"", i)) for i in (11, 12, 13)]
            first, second, third = [await acknowledge(switch) for _ in tasks]
            assert (first[0], second[0], third[0]) == (11, 12, 13)
            assert first[2] == second[2]
            _, again = await switch.read(codec.PACKET_OUT)
            assert again[32:] == first[2], "it is sent again while it does not come back"
            assert not any(task.done() for task in tasks)
            strangers = [
                returned(first[2], first[1] ^ 1 << 45),  # of an earlier connection
                returned(bytes(60), third[1]),  # not our frame
                returned(first[2], third[1], IN_PORT),  # from a customer's port
                returned(first[2], Kind.REST.cookie),
            ]
            switch.send(b"".join(strangers) + returned(first[2], second[1]))
            assert await asyncio.wait_for(asyncio.gather(*tasks[:2]), 5) == [(), ()]
            assert not tasks[2].done()
            switch.send(returned(first[2], third[1]))
            assert await tasks[2] == ()
            # what came from a customer's port is a packet like any other
            assert (await next_event(channel, PacketIn)).in_port == 3

    asyncio.run(asyncio.wait_for(body(), 30))


def test_what_never_comes_back_is_an_error_of_the_whole_batch() -> None:
    async def body() -> None:
        async with proving(proof=0.2) as (channel, switch):
            task = asyncio.create_task(channel.transact(b"", 11))
            await acknowledge(switch)
            [error] = await task
            assert (error.txid, error.cookie) == (11, None)
            assert error.text == "acknowledged, but not there 0.2 s later"
            assert channel.connected
            # the next one has a chance of its own
            task = asyncio.create_task(channel.transact(b"", 12))
            _, cookie, frame = await acknowledge(switch)
            switch.send(returned(frame, cookie))
            assert await task == ()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_switch_without_room_for_the_probe_is_full() -> None:
    async def body() -> None:
        async with proving() as (channel, switch):
            task = asyncio.create_task(channel.transact(b"", 11))
            await switch.read(codec.BARRIER_REQUEST)
            xid, version = await switch.read(codec.FLOW_MOD)
            quoted = message(codec.FLOW_MOD, version, xid)[:64]
            switch.send(message(1, struct.pack("!HH", *openflow.TABLE_FULL) + quoted, xid))
            switch.send(message(codec.BARRIER_REPLY, xid=xid))
            assert [(e.type, e.code, e.cookie) for e in await task] == [(*openflow.TABLE_FULL, None)]

    asyncio.run(asyncio.wait_for(body(), 30))


def test_errors_of_what_was_proved_name_their_rules() -> None:
    async def body() -> None:
        async with proving() as (channel, switch):
            task = asyncio.create_task(channel.transact(b"", 11))
            quoted = message(codec.FLOW_MOD, (0xAB).to_bytes(8, "big") + bytes(40))
            switch.send(message(1, struct.pack("!HH", 5, 1) + quoted, 11))
            _, cookie, frame = await acknowledge(switch)
            switch.send(returned(frame, cookie))
            [error] = await task
            assert isinstance(error, Error)
            assert error.cookie == 0xAB

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_lost_connection_ends_the_waiting() -> None:
    async def body() -> None:
        async with proving() as (channel, switch):
            tasks = [
                asyncio.create_task(channel.transact(b"", 11)),
                asyncio.create_task(channel.comes_back(bytes(60), 1)),
            ]
            await acknowledge(switch)
            switch.writer.close()
            for task in tasks:
                with pytest.raises(ChannelLost):
                    await task

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_frame_comes_back_or_does_not() -> None:
    async def body() -> None:
        async with proving(proof=0.3) as (channel, switch):
            task = asyncio.create_task(channel.comes_back(b"our frame", 1))
            _, out = await switch.read(codec.PACKET_OUT)
            assert out[4:8] == (1).to_bytes(4, "big")
            switch.send(packet_in(b"another", oxm((0, (1).to_bytes(4, "big")))))
            switch.send(packet_in(b"our frame", oxm(IN_PORT)))
            assert not await task
            task = asyncio.create_task(channel.comes_back(b"our frame", 1))
            switch.send(packet_in(b"our frame", oxm((0, (1).to_bytes(4, "big")))))
            assert await task

    asyncio.run(asyncio.wait_for(body(), 30))


def test_numbers_go_round() -> None:
    """After 2^32 versions; and a version that is older proves nothing."""

    async def body() -> None:
        probes = Probes(openflow.flow_mod)
        probes._sequence = 0xFFFF_FFFE
        versions = [probes.version(1) for _ in range(3)]
        assert [number for _, number in versions] == [0xFFFF_FFFF, 0, 1]
        waiting = [probes.numbered(number) for _, number in versions]
        cookie = int.from_bytes(versions[1][0][8:16], "big")
        assert probes.returned(PacketIn(codec.CONTROLLER_PORT, probes._own, 1, cookie))
        assert [one.done() for one in waiting] == [True, True, False]

    asyncio.run(body())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"eth_type": 0x800},
        {"eth_type": 0x800, "ip_proto": 6, "tcp_flags": (FIN, FIN)},
        {"eth_type": 0x800, "ip_proto": 17, "eth_dst": "02:00:5e:00:01:01", "vlan_vid": 0x1005},
    ],
)
def test_a_frame_that_a_rule_matches(more: dict[str, Any]) -> None:
    """As scapy reads it, down to the header's checksum."""
    source = random_mac()
    rule = Rule(FORWARD_PRIORITY, {"in_port": 1, **more}, (Output(3),), Kind.TO_SERVER.cookie)
    frame = Ether(frame_of(rule, source))
    assert int(frame.src.replace(":", ""), 16) == source
    assert frame_of(rule, source) != frame_of(rule, source)
    if "vlan_vid" in more:
        assert (frame.dst, frame[Dot1Q].vlan) == (more["eth_dst"], 5)
    if "eth_type" in more:
        assert frame[IP].proto == more.get("ip_proto", 6)
        checksum = frame[IP].chksum
        if "tcp_flags" in more:
            assert (frame[TCP].flags, frame[TCP].dataofs) == (FIN, 5)
        del frame[IP].chksum
        assert IP(bytes(frame[IP])).chksum == checksum


@pytest.mark.parametrize("partition", [ALL_PEER, NEW_AT_PEER, by_protocol(frozenset((6,)))])
def test_a_takeovers_frames_come_back_when_nothing_forwards(partition: Partition) -> None:
    """Of each port: they go to the server while it carries, and past the fence to the agent when it does not."""
    pipe = pipeline(probe_mac=random_mac(), partition=partition)
    below = (*pipe.base(), *pipe.guard())
    above = (*pipe.forward(), *pipe.tcp_to_server())
    for rule in above:
        fields = {**rule.match, "eth_src": mac_text(pipe.probe_mac)}
        assert winner((*below, *above), fields).actions == rule.actions  # type: ignore[arg-type]
        assert winner(below, fields).actions == (ToController(),)  # type: ignore[arg-type]
