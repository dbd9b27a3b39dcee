# SPDX-License-Identifier: Apache-2.0
"""Every DataPlane there is, each with what the conformance suite needs besides: packets, events, and a second look.

The network is that of tests/packets.py, the instance 1, and the mode synchronous, so that sessions wait for ``commit``.
"""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scapy.layers.inet import TCP, UDP

from nat_control.core_plane import CorePlane
from nat_control.dataplane import DataPlane, Events, Records, sessions_of
from nat_control.lab import until
from nat_fastpath.core_config import CoreConfig
from nat_fastpath.cores import Cores
from nat_fastpath.engine import (
    EVENT,
    EVENT_CLOSE,
    FLAG_PENDING,
    RECORD,
    TCP_STATES,
    Core,
    Verdict,
    slice_of,
    slice_of_hosts,
)
from switch_agent.agent import AgentPlane, ConntrackAgentPlane
from switch_agent.pipeline import Pipeline
from tests.memory_plane import AsyncMemoryPlane, MemoryPlane, key_of
from tests.packets import (
    CLIENT,
    INSIDE,
    OUTSIDE,
    POOL,
    SERVER,
    config,
    frame,
    host_mac,
    number,
    parse,
    tcp,
    text,
    udp,
)
from tests.switch.net import Net, next_hops, pipeline

T = TypeVar("T")

INSTANCE, PEER = 1, 2
PROTOCOLS = (6, 17)
# Two and two of them belong to one of two cores, as their ports do: see ``sessions``.
_BY_CORE = [
    [host for host in (f"10.0.0.{i}" for i in range(20, 60)) if slice_of_hosts(number(host), 2) == core]
    for core in range(2)
]
HOSTS = [_BY_CORE[i // 2 % 2][i // 4 * 2 + i % 2] for i in range(40)]
POOL_FIRST = number(POOL[0])
PORTS_FIRST = 2000
SERVER_PORT = 53


def session(n: int, instance: int = PEER, **fields: int) -> Records:
    """Session ``n``; shape (1,)."""
    return sessions(1, n, instance, **fields)


def sessions(n: int, first: int = 1, instance: int = PEER, **fields: int) -> Records:
    """``n`` sessions from number ``first`` on; each number has endpoints and an id of its own."""
    made = np.zeros(n, RECORD)
    at = np.arange(first, first + n)
    macs = np.array([int(host_mac(host).replace(":", ""), 16) for host in HOSTS])
    values = {
        "id": 1 << 60 | instance << 52 | 7 << 32 | at,
        "protocol": np.array(PROTOCOLS)[at % 2],
        "internal_addr": np.array([number(host) for host in HOSTS])[at % len(HOSTS)],
        "internal_port": PORTS_FIRST + at,
        "internal_mac": macs[at % len(HOSTS)],
        "external_addr": POOL_FIRST + at % 4,
        "external_port": PORTS_FIRST + at,
        "remote_addr": number(SERVER),
        "remote_port": SERVER_PORT,
        **fields,
    }
    for name, value in values.items():
        made[name] = value
    return made


class Subject(ABC):
    """One plane. ``carries``: it sees packets, so that what was held can be seen to leave."""

    carries = True
    cores = 1  # of several, each has its share of the room, and its events in its own order
    plane: DataPlane

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(work, 30))

    @abstractmethod
    def events(self) -> Events:
        """All that there are; those of a call that has returned are among them."""

    @abstractmethod
    def open(self, port: int) -> None:
        """An inside host begins a TCP connection from this port; its session is there on return."""

    @abstractmethod
    def answer(self, port: int) -> None:
        """The server answers it (SYN, ACK), which changes the TCP state."""

    def left(self) -> int:
        """Held packets that have left since the last call."""
        return 0

    def held(self) -> Records:
        """All sessions of the plane; a session that is in two pages fails here."""

        async def pages() -> list[Records]:
            return [page async for page in self.plane.sessions()]

        found = np.concatenate([np.empty(0, RECORD), *self.run(pages())])
        assert len(np.unique(found["id"])) == len(found), "a session stands in two pages"
        return found

    @abstractmethod
    def check(self) -> None:
        """A look at the plane from elsewhere: it must agree."""

    def close(self) -> None:
        """Everything that was started ends."""
        return


class Memory(Subject):
    carries = False

    def __init__(self, runner: asyncio.Runner, max_sessions: int) -> None:
        super().__init__(runner)
        own = [(POOL_FIRST, port) for port in range(1024, 1100)]
        self.memory = MemoryPlane(INSTANCE, own, synchronous=True, max_sessions=max_sessions)
        self.plane = AsyncMemoryPlane(self.memory)

    def events(self) -> Events:
        return self.memory.events()

    def open(self, port: int) -> None:
        assert self.memory.open((6, number(CLIENT), port), (number(SERVER), 80)) is not None

    def answer(self, port: int) -> None:
        key = next(key for key, one in self.memory.held.items() if one["internal_port"] == port)
        self.memory.touch(key, TCP_STATES.index("syn_both"))

    def check(self) -> None:
        assert [key_of(one) for one in self.memory.held.values()] == list(self.memory.held)


def core_config(max_sessions: int) -> CoreConfig:
    return config(
        max_sessions=max_sessions, synchronous=True, instance=INSTANCE, hold=3600.0, event_ring=8192
    )


def connect(port: int) -> bytes:
    return frame(tcp(CLIENT, port, SERVER, 80))


def accept(records: Records, port: int) -> bytes:
    (one,) = records[records["internal_port"] == port]
    return frame(tcp(SERVER, 80, text(one["external_addr"]), int(one["external_port"]), "SA"), OUTSIDE)


class OwnCore(Subject):
    """A core that belongs to this thread, as in the switch agent."""

    def __init__(self, runner: asyncio.Runner, max_sessions: int) -> None:
        super().__init__(runner)
        self.core = Core(core_config(max_sessions))
        self.core.poll(time.monotonic_ns())
        self.store = CorePlane(self.core, own=True)
        self.plane = self.store

    def events(self) -> Events:
        return self.core.events()

    def open(self, port: int) -> None:
        self.core.burst([(INSIDE, connect(port))], time.monotonic_ns())

    def answer(self, port: int) -> None:
        self.core.burst([(OUTSIDE, accept(self.held(), port))], time.monotonic_ns())

    def left(self) -> int:
        return sum(result.verdict.name == "FORWARD" for result in self.core.take())

    def check(self) -> None:
        assert self.core.counters()["sessions"] == len(self.held())

    def close(self) -> None:
        self.core.close()


class TwoCores(Subject):
    """Two cores that share hosts and ports, as those of a server's workers."""

    cores = 2

    def __init__(self, runner: asyncio.Runner, max_sessions: int) -> None:
        super().__init__(runner)
        self.core = Cores(core_config(max_sessions), 2)
        for core in self.core.cores:
            core.poll(time.monotonic_ns())
        self.plane = CorePlane(self.core, own=True)

    def events(self) -> Events:
        return self.core.events()

    def _send(self, port: int, data: bytes) -> None:
        owner = self.core.cores[slice_of(data, self.core.config.ports[port].side, 2)]
        (result,) = owner.burst([(port, data)], time.monotonic_ns())
        assert result.verdict in (Verdict.HELD, Verdict.FORWARD)

    def open(self, port: int) -> None:
        self._send(INSIDE, connect(port))

    def answer(self, port: int) -> None:
        self._send(OUTSIDE, accept(self.held(), port))

    def left(self) -> int:
        taken = [result for core in self.core.cores for result in core.take()]
        return sum(result.verdict.name == "FORWARD" for result in taken)

    def check(self) -> None:
        assert self.core.counters()["sessions"] == len(self.held())
        assert all(core.counters()["sessions"] <= len(self.held()) for core in self.core.cores)

    def close(self) -> None:
        self.core.close()


class Switch(OwnCore):
    """A real Open vSwitch, with a core as the store; its rules must be those of the sessions, and no others."""

    def __init__(self, runner: asyncio.Runner, max_sessions: int, net: Net, *, prove: bool = False) -> None:
        super().__init__(runner, max_sessions)
        net.fresh()
        self.net = net
        net.channel.prove = prove
        pipe = pipeline()
        self.lines: list[str] = []
        self.closed: list[Records] = []
        self.plane = self.make(pipe)
        self.run(self.plane.prepare())

    def make(self, pipe: Pipeline) -> AgentPlane:
        return AgentPlane(self.net.channel, pipe, next_hops(pipe), self.store, report=self.lines.append)

    def expected(self, ruled: Records) -> None:
        """Of these sessions there are rules, and of no others."""
        assert sorted(map(rule_of, self.net.session_flows())) == sorted(
            rule for one in ruled for rule in rules(one)
        )

    def close(self) -> None:
        self.net.channel.prove = False
        super().close()

    def events(self) -> Events:
        found = super().events()
        self.closed.append(sessions_of(found[found["type"] == EVENT_CLOSE]))
        return found

    def check(self) -> None:
        super().check()
        for closed in self.closed:  # as the agent does: what the store itself has ended loses its rules
            self.run(self.plane.withdraw(closed))
        self.closed.clear()
        ruled = self.held()
        ruled = ruled[ruled["flags"] & FLAG_PENDING == 0]
        self.expected(ruled)
        assert self.lines == []


class ConntrackSwitch(Switch):
    """The same with entries of its connection tracking; they are read with Open vSwitch's own tool."""

    def make(self, pipe: Pipeline) -> AgentPlane:
        plane = ConntrackAgentPlane(
            self.net.channel,
            pipe,
            next_hops(pipe),
            self.store,
            ovs=self.net.ovs.directory,
            report=self.lines.append,
        )
        self.run(plane.wipe())
        return plane

    def expected(self, ruled: Records) -> None:
        assert self.net.session_flows() == []
        found = set(map(entry_of, self.net.ovs.appctl("dpctl/dump-conntrack").splitlines()))
        wanted = set(map(entry, ruled))
        assert (found - wanted, wanted - found) == (set(), set())


def entry(one: np.void) -> tuple[Any, ...]:
    """Id, protocol, inside, remote and external endpoint, as ``entry_of`` reads them."""
    ends = [
        (str(IPv4Address(int(one[f"{end}_addr"]))), int(one[f"{end}_port"]))
        for end in ("internal", "remote", "external")
    ]
    return (int(one["id"]), "tcp" if one["protocol"] == 6 else "udp", *ends)


def entry_of(line: str) -> tuple[Any, ...]:
    """A line of dpctl/dump-conntrack."""
    tuples = re.findall(r"src=([\d.]+),dst=([\d.]+),sport=(\d+),dport=(\d+)", line)
    label = re.search(r"zone=20033,labels=0x([0-9a-f]+)", line)
    assert label, line
    (inside, remote, inside_port, remote_port), (_, external, _, external_port) = tuples
    ends = (inside, int(inside_port)), (remote, int(remote_port)), (external, int(external_port))
    return (int(label[1], 16) & (1 << 64) - 1, line[:3], *ends)


def rules(one: np.void) -> list[tuple[Any, ...]]:
    """Cookie, match and translation of a session's two rules, as ``rule_of`` reads them."""
    inside, outside, remote = (
        (str(IPv4Address(int(one[f"{end}_addr"]))), int(one[f"{end}_port"]))
        for end in ("internal", "external", "remote")
    )
    identity, protocol = int(one["id"]), "tcp" if one["protocol"] == 6 else "udp"
    return [
        (identity, protocol, *inside, *remote, *outside),
        (identity | 1 << 63, protocol, *remote, *outside, *inside),
    ]


def rule_of(line: str) -> tuple[Any, ...]:
    """A line of ovs-ofctl dump-flows."""

    def field(pattern: str) -> str:
        found = re.search(pattern, line)
        assert found, (pattern, line)
        return found[1]

    source, destination = (field(rf"nw_{end}=([\d.]+)") for end in ("src", "dst"))
    ports = [int(field(rf"tp_{end}=(\d+)")) for end in ("src", "dst")]
    address, port = field(r"set_field:([\d.]+)->ip_"), int(field(r"set_field:(\d+)->(?:tcp|udp)_"))
    protocol = field(r",(tcp|udp)[,_ ]")
    return (
        int(field("cookie=0x([0-9a-f]+)"), 16), protocol, source, ports[0], destination, ports[1], address, port
    )  # fmt: skip


DEVICES = ("inner", "outer")
OTHER_ENDS = ("client", "outside")


class Dpdk:
    """EAL and two AF_PACKET ports in this process and network namespace; starts once per process."""

    def __init__(self, directory: Path) -> None:
        from nat_fastpath.dpdk import Eal, Mempool, Port

        for one, other in zip(DEVICES, OTHER_ENDS, strict=True):
            subprocess.run(["ip", "link", "add", one, "type", "veth", "peer", "name", other], check=True)
            for device in (one, other):
                subprocess.run(["ip", "link", "set", device, "up"], check=True)
        Eal(memory_mb=256)
        self.pool = Mempool("buffers", 8192)
        self.ports = [
            Port(device, self.pool, index=i, mac=core_config(64).ports[i].mac, state_dir=directory)
            for i, device in enumerate(DEVICES)
        ]
        self.client, self.outside = (_raw_socket(device) for device in OTHER_ENDS)

    def close(self) -> None:
        for port in self.ports:
            port.close()


def _raw_socket(device: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    made.bind((device, 0))
    made.setblocking(False)
    return made


class Running(Subject):
    """A core that a DPDK worker runs between two interfaces."""

    def __init__(self, runner: asyncio.Runner, max_sessions: int, dpdk: Dpdk) -> None:
        from nat_fastpath.dpdk import Worker

        super().__init__(runner)
        self.dpdk = dpdk
        self.core = Core(core_config(max_sessions))
        self.plane = CorePlane(self.core)
        self.worker = Worker(self.core, dpdk.ports, dpdk.pool)
        self.worker.start()
        self._known: list[Events] = []
        self._left()

    def events(self) -> Events:
        found = np.concatenate([np.empty(0, EVENT), *self._known, self.core.events()])
        self._known.clear()
        return found

    def _send(self, end: socket.socket, data: bytes) -> None:
        """Waits for the event of it."""
        end.send(data)
        self._known.append(until("the worker tells what a packet did", self._some_events))

    def _some_events(self) -> Any:
        found = self.core.events()
        return found if len(found) else None

    def open(self, port: int) -> None:
        self._send(self.dpdk.client, connect(port))

    def answer(self, port: int) -> None:
        self._send(self.dpdk.outside, accept(self.held(), port))

    def left(self) -> int:
        """What comes late is waited for: a packet behind them that is not held shows that all are through."""
        marker = frame(udp(CLIENT, 9, SERVER, 9))
        self.run(
            self.plane.install(
                session(0, internal_addr=number(CLIENT), internal_port=9, remote_port=9, protocol=17)
            )
        )
        self.dpdk.client.send(marker)
        seen = 0
        end = time.monotonic() + 10
        while time.monotonic() < end:
            for packet in self._left():
                if UDP in packet and packet[UDP].dport == 9:
                    self.run(self.plane.delete(self.held()[self.held()["remote_port"] == 9]))
                    self.events()
                    return seen
                seen += TCP in packet
            time.sleep(0.005)
        raise AssertionError("the worker forwards nothing")

    def _left(self) -> list[Any]:
        found = []
        while True:
            try:
                data, sender = self.dpdk.outside.recvfrom(2048)
            except BlockingIOError:
                return found
            if sender[2] != socket.PACKET_OUTGOING:
                found.append(parse(data))

    def check(self) -> None:
        assert self.worker.running
        assert self.core.counters()["sessions"] == len(self.held())

    def close(self) -> None:
        self.worker.stop()
        self.core.close()
