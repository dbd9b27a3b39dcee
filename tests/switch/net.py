# SPDX-License-Identifier: Apache-2.0
"""A real Open vSwitch between a client, an outside and a server's two ports, with our side of OpenFlow."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import time
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

import numpy as np
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from nat_control.dataplane import Records
from nat_control.lab import Lab, Namespace, until
from nat_fastpath.engine import RECORD
from switch_agent.channel import Channel
from switch_agent.codec import Event, PacketIn
from switch_agent.nexthops import NextHops, Route, key
from switch_agent.ovs import OpenVSwitch
from switch_agent.pipeline import Pipeline, Side
from switch_agent.plane import OpenFlowDataPlane
from tests.entered import entered
from tests.memory_plane import AsyncMemoryPlane, MemoryPlane

T = TypeVar("T")

VIRTUAL_MAC = "02:00:5e:00:01:01"
CLIENT_MAC, GATEWAY_MAC, NEW_GATEWAY_MAC = "02:00:0a:00:00:05", "02:00:00:00:01:fe", "02:00:00:00:02:fe"
CLIENT, REMOTE, EXTERNAL = "10.0.0.5", "203.0.113.7", "198.51.100.10"
INTERNAL_PORT, EXTERNAL_PORT, REMOTE_PORT = 5000, 33333, 53
GATEWAY = IPv4Address("198.51.100.254")
DEVICES = {"client": 1, "outside": 2, "inner": 3, "outer": 4}  # interfaces of the switch and their ports


def mac_number(mac: str) -> int:
    return int(mac.replace(":", ""), 16)


def address(text: str) -> int:
    return int(IPv4Address(text))


def pipeline(**changed: Any) -> Pipeline:
    one = IPv4Address("10.0.0.1")
    pool = (IPv4Address("198.51.100.1"),) * 2, (IPv4Address("198.51.100.10"), IPv4Address("198.51.100.13"))
    sides = {"internal": Side(1, 3, 0, ((one, one),)), "external": Side(2, 4, 0, pool)}
    return Pipeline(**{**sides, "mac": mac_number(VIRTUAL_MAC), **changed})


ROUTES = {
    "internal": [Route(IPv4Network("10.0.0.0/8"))],
    "external": [Route(IPv4Network("0.0.0.0/0"), GATEWAY), Route(IPv4Network("198.51.100.0/24"))],
}


def next_hops(pipe: Pipeline, limit: int = 4096) -> NextHops:
    hops = NextHops(pipe, ROUTES, limit)
    hops.learn(GATEWAY_KEY, mac_number(GATEWAY_MAC))
    return hops


GATEWAY_KEY = key("external", GATEWAY)


def record(protocol: int = 17, number: int = 1, **fields: Any) -> Records:
    """One session of the client; shape (1,)."""
    one = np.zeros(1, RECORD)
    values = {
        "id": 1 << 60 | 1 << 52 | number,
        "protocol": protocol,
        "internal_addr": address(CLIENT),
        "internal_port": INTERNAL_PORT,
        "external_addr": address(EXTERNAL),
        "external_port": EXTERNAL_PORT,
        "remote_addr": address(REMOTE),
        "remote_port": REMOTE_PORT,
        "internal_mac": mac_number(CLIENT_MAC),
        **fields,
    }
    for name, value in values.items():
        one[name] = value
    return one


def random_records(n: int, seed: int = 1, internal_mac: int = mac_number(CLIENT_MAC)) -> Records:
    """Sessions of different inside endpoints, each with an external endpoint of its own."""
    rng = np.random.default_rng(seed)
    found = np.zeros(n, RECORD)
    found["id"] = 1 << 60 | 1 << 52 | np.arange(1, n + 1)
    number = np.arange(n)
    found["internal_addr"] = address("10.0.0.0") + 1000 + number // 60000
    found["external_addr"] = address("198.51.100.10") + number // 60000
    found["internal_port"] = found["external_port"] = 1024 + number % 60000
    found["remote_addr"] = rng.integers(address("203.0.113.0"), address("203.0.113.255"), n)
    found["remote_port"] = rng.integers(1, 65536, n)
    found["protocol"] = rng.choice([6, 17], n)
    found["internal_mac"] = internal_mac
    return found


class Wire:
    """Raw frames on an interface of a namespace."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        with entered(namespace):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self.socket.bind((device, 0))
        self.socket.setblocking(False)

    def send(self, packet: Packet) -> bytes:
        frame = bytes(packet)
        self.socket.send(frame)
        return frame

    def clear(self) -> None:
        while self._one() is not None:
            pass

    def receive(self, timeout: float = 3) -> bytes | None:
        """The next frame that came from the switch; None when none comes in time."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0] and (frame := self._one()):
                return frame
        return None

    def _one(self) -> bytes | None:
        """b"" for what was sent here itself."""
        try:
            frame, sender = self.socket.recvfrom(65536)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENETDOWN:  # that the interface was down is told once
                raise
            return b""
        return b"" if sender[2] == socket.PACKET_OUTGOING else frame


class Net:
    """The switch, the wires at its ports and the channel, with one event loop for all tests of a module."""

    def __init__(self, lab: Lab, runner: asyncio.Runner) -> None:
        self.lab = lab
        self.runner = runner
        self.switch, *others = (lab.namespace(name) for name in ("switch", "client", "outside", "server"))
        self.client, self.outside, self.server = others
        ends = {"client": self.client, "outside": self.outside, "inner": self.server, "outer": self.server}
        for device, end in ends.items():
            lab.cable(end, f"to-{device}", self.switch, device)
        self.wires = {device: Wire(end, f"to-{device}") for device, end in ends.items()}
        self.ovs = OpenVSwitch(self.switch, DEVICES)
        self.channel = Channel(1)
        self.events: list[Event] = []
        self.run(self.channel.listen(f"unix:{self.ovs.controller_socket}"))
        self.second = Channel(1)
        self.second_socket = f"unix:{self.ovs.controller_socket}-takeover"
        self.run(self.second.listen(self.second_socket))
        # the loop runs only where a test asks something of it
        self.ovs.set_controllers(f"unix:{self.ovs.controller_socket}", self.second_socket, probe_ms=0)
        self.run(self.expect(lambda event: type(event).__name__ == "Ready"))
        self.lines: list[str] = []
        self.fresh()

    def purge(self) -> None:
        """Packets go by the rules as they are now, and not by what the datapath has cached. One purge may miss some."""
        until("the datapath has forgotten the rules before", self._purged)

    def _purged(self) -> bool:
        self.ovs.appctl("revalidator/purge")
        return "actions:" not in self.ovs.appctl("dpctl/dump-flows")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 30))

    def fresh(self, **options: Any) -> OpenFlowDataPlane:
        """A plane with nothing in it, on a switch that has only the static rules."""
        self.lines.clear()
        self.store = MemoryPlane(1, [])
        pipe = options.pop("pipeline", pipeline())
        self.plane = options.pop("make", OpenFlowDataPlane)(
            self.channel,
            pipe,
            next_hops(pipe, options.pop("groups", 4096)),
            AsyncMemoryPlane(self.store),
            report=self.lines.append,
            **options,
        )
        self.run(self.plane.wipe())
        self.run(self.plane.prepare())
        self.purge()
        self.run(self.drop_events())
        for wire in self.wires.values():
            wire.clear()
        return self.plane

    async def expect(self, wanted: Callable[[Event], bool], channel: Channel | None = None) -> Event:
        """The next event that is wanted; the others are dropped."""
        while True:
            for event in await (channel or self.channel).events():
                if wanted(event):
                    return event

    async def drop_events(self) -> None:
        """What has come so far, of the test before."""
        with contextlib.suppress(TimeoutError):
            while True:
                await asyncio.wait_for(self.channel.events(), 0.01)

    def asked(self, side: int, frame: bytes) -> PacketIn:
        """Waits until exactly this frame reaches the agent from this side; others are dropped."""
        event = self.run(
            self.expect(
                lambda event: isinstance(event, PacketIn) and self.plane.arrived(event) == (side, frame)
            )
        )
        assert isinstance(event, PacketIn)
        return event

    def install(self, records: Records) -> int:
        async def batches() -> int:
            most = self.plane.capabilities.max_batch
            return sum(
                [await self.plane.install(records[at : at + most]) for at in range(0, len(records), most)]
            )

        return self.run(batches())

    def passes(self, device: str, packet: Packet, to: str, expected: bytes) -> None:
        """Sends until it arrives as expected: for a few ms the datapath may act by rules that are gone."""

        def once() -> bool:
            self.wires[device].send(packet)
            return self.wires[to].receive(0.05) == expected

        until(f"{packet.summary()} from {device} to {to}", once)

    def session_flows(self) -> list[str]:
        return self.ovs.flows("cookie=0x1000000000000000/0x7000000000000000")


def outward(packet: Packet, mac: str = CLIENT_MAC) -> Packet:
    return Ether(src=mac, dst=VIRTUAL_MAC) / packet


def inward(packet: Packet) -> Packet:
    return Ether(src=GATEWAY_MAC, dst=VIRTUAL_MAC) / packet


def left(destination_mac: str, packet: Packet) -> bytes:
    """A frame as it must leave the switch, with the checksums that scapy computes."""
    return bytes(Ether(src=VIRTUAL_MAC, dst=destination_mac) / packet)


def ip(source: str, destination: str, ttl: int = 64) -> Packet:
    return IP(src=source, dst=destination, ttl=ttl, id=7)
