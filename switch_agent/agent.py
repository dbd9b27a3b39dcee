# SPDX-License-Identifier: Apache-2.0
"""`tandem-nat switch`: the NAT on the switch, alone or as half of a pair.

The agent's core keeps every session and decides like the server's; the switch gets rules for them. While the server
carries, the wide forward rules stand above those rules. When the server dies, a C thread has deleted them already
(see nat_fastpath.watch) before anything here is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import numpy as np

from nat_control import config as configuration
from nat_control.api import Api, ApiError
from nat_control.config import Config
from nat_control.core_plane import CorePlane
from nat_control.dataplane import Events, Records, changes, sessions_of
from nat_control.health import RISING, Health, drops_of, state_of, states_of
from nat_control.live import Live
from nat_control.loop import (
    ControlLoop,
    ending_cleanly,
    monotonic,
    monotonic_ns,
    no_more_signals,
    start_epoch,
)
from nat_control.offloader import marked_pages
from nat_control.pair import ACTIVITY_PERIOD, Pair, PairError, unusable
from nat_control.pair_config import PROTOCOLS
from nat_control.peer import no_peer
from nat_control.reload import Reload
from nat_control.sync import actions as do
from nat_control.tls import Tls, TlsError
from nat_control.traffic import NO_PEER, Traffic
from nat_fastpath.engine import EVENT_CLOSE, NEIGHBOUR, VERDICT_NAMES, Core, CoreError, Result
from switch_agent.carrier import Carrier
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import Lost, PacketIn, PortStatus, Ready
from switch_agent.conntrack_plane import ConntrackPlane
from switch_agent.devices import Devices
from switch_agent.failover import OneLinkWithGroup, WithGroup
from switch_agent.front import SwitchFront
from switch_agent.link import OneLink
from switch_agent.nexthops import NextHops, Route, key
from switch_agent.pipeline import ALL_LOCAL, ALL_PEER, NEW_AT_PEER, Partition, Pipeline, Side, by_protocol
from switch_agent.plane import OpenFlowDataPlane, SwitchError
from switch_agent.probe import random_mac

STEP = 0.005  # seconds between two looks at the core: ARP, ageing, events
EARLY = 1024  # frames that wait until what an earlier agent has left is known
OPERATIONS = 4096  # that wait for the switch
GONE = 1  # OFPPR_DELETE
Operation = Callable[[], Awaitable[object]]


def say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, flush=True)


class AgentError(Exception):
    """The agent cannot start, or could not go on; one line."""


def serve(config: Config, path: Path) -> None:
    """Runs until SIGTERM or SIGINT; SIGHUP reads ``path`` again, where ``config`` comes from. Raises AgentError."""
    if config.switch is None:
        raise AgentError("the configuration has no section `switch`: see docs/switch.md")
    with ending_cleanly():
        try:
            say(f"ended by {asyncio.run(Agent(config, path).run())}")
        except (CoreError, ApiError, PairError) as error:
            raise AgentError(str(error)) from None
        except MemoryError:
            raise AgentError(
                "the system gives no memory: see `ulimit -v`, and the limits of the service"
            ) from None
        finally:
            no_more_signals()


async def _listen(channel: Channel, where: str, tls: Tls | None, *, urgent: bool) -> None:
    try:
        await channel.listen(where, tls if where.startswith("tls:") else None, urgent=urgent)
    except OSError as error:
        raise AgentError(unusable(where, error, "another agent, or controller,")) from None
    except TlsError as error:
        raise AgentError(f"switch.tls: {error}") from None


def pipeline_of(config: Config) -> Pipeline:
    """The switch's table for this configuration."""
    assert config.switch
    assert config.virtual
    internal, external = config.ports
    ports = config.switch.ports
    own = ((internal.address.ip, internal.address.ip),)
    beyond = ((external.address.ip, external.address.ip), *config.nat.pool.ranges)
    gateways = [
        tuple(sorted({route.gateway for route in port.routes} | ({port.gateway} if port.gateway else set())))
        for port in config.ports
    ]
    inside = Side(ports.internal, ports.server_internal, internal.vlan, own, gateways[0])
    outside = Side(ports.external, ports.server_external, external.vlan, beyond, gateways[1])
    mac = int.from_bytes(config.virtual.mac, "big")
    probe_mac = random_mac() if config.switch.barrier == "probe" else 0
    partition = partition_of(config)
    group = config.switch.failover == "group"
    if not ports.one_link:
        make = WithGroup if group else Pipeline
        return make(inside, outside, mac, probe_mac=probe_mac, partition=partition)
    tags = config.switch.tags if any(config.switch.tags) else (internal.vlan, external.vlan)
    return (OneLinkWithGroup if group else OneLink)(
        inside,
        outside,
        mac,
        probe_mac=probe_mac,
        partition=partition,
        tags=tags if config.switch.mark == "vlan" else None,
        inside=internal.address.network,
    )


def partition_of(config: Config) -> Partition:
    name = config.peer.partition if config.peer else "all_peer"
    if name == "by_protocol":
        assert config.peer
        return by_protocol(frozenset(PROTOCOLS[one] for one in config.peer.local_protocols))
    return {"all_peer": ALL_PEER, "new_at_peer": NEW_AT_PEER, "all_local": ALL_LOCAL}[name]


def next_hops_of(config: Config, pipeline: Pipeline) -> NextHops:
    routes: dict[str, list[Route]] = {}
    for port in config.ports:
        found = [Route(port.address.network), *(Route(r.prefix, r.gateway) for r in port.routes)]
        if port.gateway:
            found.append(Route(IPv4Network("0.0.0.0/0"), port.gateway))
        routes[port.side] = found
    return NextHops(pipeline, dict(routes))


class AgentPlane(OpenFlowDataPlane):
    """Sessions that the agent itself opens: their packets leave after the switch has their rules (output commit)."""

    async def commit(self, records: Records) -> int:
        records = records[await self.holds(records)]
        await self._offer(records)
        return await super().commit(records)


class ConntrackAgentPlane(AgentPlane, ConntrackPlane):
    """The same, where sessions are entries of Open vSwitch's connection tracking."""


class Agent:
    """One switch, one core, and perhaps a peer."""

    def __init__(self, config: Config, path: Path) -> None:
        assert config.switch
        assert config.virtual
        self.config = config
        self.health = Health(say)
        self.epoch = start_epoch()
        self.core = Core(configuration.to_core(config, [], epoch=self.epoch))
        self.store = CorePlane(self.core, "agent", own=True)
        self.channel = Channel(config.switch.datapath_id, prove=config.switch.barrier == "probe")
        self.takeover_channel = Channel(config.switch.datapath_id)
        pipeline = pipeline_of(config)
        make: Callable[..., AgentPlane] = AgentPlane
        if config.switch.nat == "conntrack":
            assert config.switch.ovs
            make = partial(ConntrackAgentPlane, ovs=config.switch.ovs)
        self.plane = make(
            self.channel,
            pipeline,
            next_hops_of(config, pipeline),
            self.store,
            max_flows=config.switch.max_flows,
            report=say,
        )
        self.counts: Counter[str] = Counter()
        self._macs: dict[int, int] = {}
        self._early: list[tuple[int, bytes]] = []  # frames from before all sessions were known
        # of the switch, one after the other; those that are 0 go before the others
        self._work: asyncio.PriorityQueue[tuple[int, int, Operation]] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._behind = False  # operations were dropped since the rules were compared
        self.carrier = Carrier(
            config,
            self.plane,
            self.takeover_channel,
            later=self._later,
            first=partial(self._later, urgency=0),
            announce=self.core.announce,
            prepared=self._macs.clear,
            known=self._all_known,
            say=say,
        )
        self.devices = Devices(self.carrier.link)
        self.live = Live(self.core, [port.name for port in config.ports])
        self.front = SwitchFront(self.plane, monotonic, chosen=self.plane.fronts_by_choice)
        self.pair: Pair | None = None
        if config.peer and config.peer.mode != "off":
            self.pair = self.carrier.pair = self.front.pair = Pair(
                config,
                self.plane,
                epoch=self.epoch,
                clock=monotonic,
                drain=self._drain,
                notice=self._notice,
                ours=self.plane.seen_here_alone,
                front=self.front,
            )
        self.reload = Reload(
            config,
            path,
            [self.core],
            lambda new: [configuration.to_core(new, [], epoch=self.epoch)],
            taken=self._reloaded,
            say=say,
            pair=self.pair,
            threads=False,
        )
        self.loop = ControlLoop(
            self.core,
            2,
            self._every_second,
            sink=self._events,
            step=STEP,
            hang_up=self.reload.hang_up,
        )

    # -- life ----------------------------------------------------------------------------------------------

    async def run(self) -> str:
        """Until a signal; returns its name."""
        assert self.config.switch
        answers = {"status": self.status, "stats": self.stats, "hosts": self.live.hosts}
        # no threads: the core is this one's
        verbs = {**self.live.verbs, "reload": self.reload.verb, "peer": no_peer, **NO_PEER}
        verbs["offload"] = self.front.verb
        if self.pair:
            traffic = Traffic(
                self.pair, sessions=lambda: self.core.counters()["sessions"], arbiter=self.carrier
            )
            verbs |= {"peer": self.pair.view.verb, **traffic.verbs}
        sessions = marked_pages(self.core.sessions, lambda: self.front.ids)
        api = Api(answers, sessions, verbs, threads=False)
        asyncio.get_running_loop().set_exception_handler(self.health.unhandled)
        await api.start(self.config.control.socket)
        try:
            switch = self.config.switch
            await _listen(self.channel, switch.openflow, switch.tls, urgent=False)
            await _listen(self.takeover_channel, switch.takeover, switch.tls, urgent=True)
            if self.pair is not None:
                await self.pair.listen()
            say(
                f"tandem-nat {version('tandem-nat')}: instance {self.config.instance}, waiting for switch "
                f"{self.config.switch.datapath_id:016x} at {self.config.switch.openflow}"
            )
            tasks = [
                self._switch_events(),
                self.carrier.takeover_events(),
                self._packets(),
                self._operations(),
            ]
            tasks.append(self._activity())
            asyncio.get_running_loop().add_reader(self.devices.fileno(), self.devices.read)
            if self.pair is not None:
                asyncio.get_running_loop().add_reader(self.pair.watch.eventfd, self._fired)
                tasks.append(self._pair(self.pair))
            running = [asyncio.ensure_future(task) for task in tasks]
            loop = asyncio.ensure_future(self.loop.run(ready=lambda: say("ready")))
            done, _ = await asyncio.wait([loop, *running], return_when=asyncio.FIRST_COMPLETED)
            if loop not in done:
                for task in done:
                    task.result()  # its exception ends us
            if self.pair is not None:
                asyncio.get_running_loop().remove_reader(self.pair.watch.eventfd)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.pair.stop(), 2)
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            return await loop
        finally:
            asyncio.get_running_loop().remove_reader(self.devices.fileno())
            self.devices.close()
            await api.close()
            await self.channel.close()
            await self.takeover_channel.close()

    async def _pair(self, pair: Pair) -> None:
        """Not before the switch is known: a peer that heard of no sessions would open others on their ports."""
        await self.carrier.settled.wait()
        await pair.run()

    def _reloaded(self, config: Config) -> None:
        self.config = config

    def _every_second(self) -> None:
        states = states_of(self.core) | state_of(self.pair)
        if not self.carrier.ready:
            states["switch"] = "the switch is not connected, or not prepared"
            if self.channel.refusals:
                states["switch"] += f"; the last attempt: {self.channel.refusals[-1]}"
        if (full := self.plane.full_at) is not None:
            states["rules"] = (
                f"the switch's table is full: {full} sessions have rules, the others pass through the agent"
            )
        states |= self.carrier.faults
        refused = {
            f"refused_{name}": n for name, n in self.plane.refused.items() if f"refused_{name}" in RISING
        }
        self.health.look(states, {**drops_of(self.core), "events_lost": self.loop.events_lost, **refused})

    # -- the core's events ---------------------------------------------------------------------------------

    def _drain(self) -> None:
        self.loop.drain()

    def _events(self, events: Events) -> None:
        self.live.publish(events)
        found = changes(events)
        if self.pair is not None:
            self.pair.events(events)
        elif len(found.opened):
            self._change(partial(self.plane.commit, found.opened))
        # also those of the peer that have ended for others
        if len(closed := sessions_of(events[events["type"] == EVENT_CLOSE])):
            self._change(partial(self.plane.withdraw, closed))

    def _later(self, operation: Operation, urgency: int = 1) -> None:
        self._work.put_nowait((urgency, next(self._numbers), operation))

    def _change(self, operation: Operation) -> None:
        """Of rules of sessions: put behind the others; where the switch is too far behind, all are compared later instead."""
        if self._work.qsize() < OPERATIONS:
            self._later(operation)
        elif not self._behind:
            self._behind = True
            say(f"the switch is {OPERATIONS} operations behind: rules are compared when it has caught up")

    async def _operations(self) -> None:
        """What changes the switch, one after the other."""
        while True:
            await (await self._work.get())[2]()
            self._send_held()
            if self._behind and self._work.empty():
                self._behind = False
                await self.carrier.compare()

    # -- packets -------------------------------------------------------------------------------------------

    def _send(self, result: Result) -> None:
        for frame in result.frames:
            self.counts["packet_outs"] += 1
            self.plane.packet_out(frame, result.port)

    def _send_held(self) -> None:
        for result in self.core.take():
            self._send(result)
        if not (
            self.carrier.forwarding and self.plane.partition.forwards_all
        ):  # what we asked while the server carries would be dropped, and answered to it
            for port, frame in self.core.outbox():
                self.plane.packet_out(frame, port)

    async def _packets(self) -> None:
        """Time for the core: ARP, ageing, held packets; and what it has learned of next hops."""
        turn = 0
        while True:
            for _ in range(4):
                if not self.core.poll(monotonic_ns()):
                    break
            self._send_held()
            turn += 1
            if self.carrier.ready and turn % 20 == 0:
                await self._tell_next_hops()
            await asyncio.sleep(STEP)

    async def _tell_next_hops(self) -> None:
        """A MAC that is not known any more stays what it was: the server may see what we do not."""
        for row in await self.store.next_hops():
            side = self.config.ports[int(row["port"])].side
            hop, mac = key(side, IPv4Address(int(row["address"]))), int(row["mac"])
            if self._macs.get(hop) == mac:
                continue
            with contextlib.suppress(ChannelLost, SwitchError):
                await self.plane.set_next_hop(hop, mac)
                self._macs[hop] = mac

    def _ask_for(self, port: int, address: int) -> None:
        """A session's rule has no MAC for its next hop: the packet is lost, the next ones need not be."""
        self.counts["without_next_hop"] += 1
        wanted = np.zeros(1, NEIGHBOUR)
        wanted["port"], wanted["address"] = port, address
        self.core.learn(wanted)

    async def _activity(self) -> None:
        """Of what the switch carries only its counters tell which sessions live, and which deserve its rules."""
        ranked = monotonic()
        while True:
            if self.pair:
                await self.pair.activity_pause(self.front.period)
            else:
                await asyncio.sleep(ACTIVITY_PERIOD)
            if self.plane.may_latch:
                self._change(self.carrier.look_at_latch)
            if self._worth_a_look:
                due = monotonic() - ranked >= (self.pair.activity_period if self.pair else ACTIVITY_PERIOD)
                ranked = monotonic() if due else ranked
                done = asyncio.Event()  # a look that waits behind others is not asked for twice
                self._later(partial(self._refresh, done, rank=due))
                await done.wait()

    @property
    def _worth_a_look(self) -> bool:
        return self.carrier.ready and (self.plane.carries_some or self.plane.full_at is not None)

    async def _refresh(self, done: asyncio.Event, *, rank: bool) -> None:
        try:
            # Behind a return there is nothing to see. Open vSwitch has just thrown away the entries of all flows then, and in a heap
            # with as many holes statistics of 100 000 rules take it seconds, in which it forwards nothing.
            if not self._worth_a_look:
                return
            await self.front.look()
            if rank and self.core.counters()["sessions"] > self.plane.offloaded:
                await self.plane.rerank()
        except ChannelLost:
            pass
        except SwitchError as error:
            say(str(error))
        finally:
            done.set()

    def _notice(self, action: do.Action) -> None:
        self.carrier.notice(action)
        if isinstance(action, do.StateChanged) and action.after is do.State.OPERATIONAL:
            self.front.greet()

    # -- the switch ----------------------------------------------------------------------------------------

    async def _switch_events(self) -> None:
        while True:
            frames: list[tuple[int, bytes]] = []
            for event in await self.channel.events():
                if isinstance(event, PacketIn):
                    if (hop := self.plane.without_next_hop(event)) is not None:
                        self._ask_for(*hop)
                    elif (arrived := self.plane.arrived(event)) is not None:
                        frames.append(arrived)
                elif isinstance(event, Ready):
                    say(f"switch {event.datapath_id:016x} is connected")
                    self._watch_links(event)
                    self.carrier.connected(event)
                elif isinstance(event, PortStatus):
                    self.carrier.link(event.port, event.port.up and event.reason != GONE)
                elif isinstance(event, Lost):
                    say(f"the switch is lost: {event.reason}")
                    self.carrier.lost()
            if not self.carrier.known:
                self._early += frames[: EARLY - len(self._early)]
            elif frames:
                self._arrived(frames)

    def _watch_links(self, event: Ready) -> None:
        assert self.config.switch
        self.devices.watch(event.ports)
        if self.pair is not None:
            ports = self.config.switch.ports
            self.pair.watch.watch_links(self.devices.of((ports.server_internal, ports.server_external)))

    def _fired(self) -> None:
        self.devices.read()  # which link, if it is one that went
        self.carrier.fired()

    def _all_known(self) -> None:
        early, self._early = self._early, []
        if early:
            self._arrived(early)

    def _arrived(self, frames: list[tuple[int, bytes]]) -> None:
        self.counts["packet_ins"] += len(frames)
        for result in self.core.burst(frames, monotonic_ns()):
            self._send(result)
        self._send_held()
        self.loop.drain()

    # -- show ----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        counters = self.core.counters()
        return {
            "instance": self.config.instance,
            "version": version("tandem-nat"),
            "pid": os.getpid(),
            "uptime": round(self.loop.uptime, 3),
            "degraded": self.health.lines,
            "switch": "ready" if self.carrier.ready else "not connected",
            "carrier": "server" if self.carrier.forwarding else "switch",
            "kept": self.carrier.kept,
            "peer": self.pair.state.value if self.pair else "none",
            "partition": self.config.peer.partition if self.config.peer else "none",
            "offloaded": self.plane.offloaded,
            "in_front": len(self.plane.in_front),
            "tcp_ages": "by its state" if self.plane.tcp_control else "by its established timer",
            "offload": self.front.status(),
            **{name: counters[name] for name in ("sessions", "mappings", "hosts", "neighbours", "held")},
            "takeover": self.carrier.last_takeover,
            "counts": {**self.counts, "takeovers": self.carrier.takeovers},
            "refused": dict(self.plane.refused),
            "watch": self.pair.watch.stats() if self.pair else {},
        }

    def stats(self) -> dict[str, Any]:
        return {
            "verdicts": dict(zip(VERDICT_NAMES, self.core.verdicts().tolist(), strict=True)),
            "counters": self.core.counters(),
        }
