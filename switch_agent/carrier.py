# SPDX-License-Identifier: Apache-2.0
"""Who carries the traffic, the switch or the server: takeover, hand-over and return, decided here for both.

The agent is the arbiter, since every packet passes the switch. What a takeover changes on the switch a C thread has
written before anything here is told (nat_fastpath.watch); all else is done in order, as operations of the agent.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from nat_control.config import Config
from nat_control.loop import monotonic_ns
from nat_control.pair import Pair
from nat_control.peer import line_of
from nat_control.sync import actions as do
from nat_control.sync.actions import State
from switch_agent import ovs_control
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import Lost, PortDescription, Ready, TransactionComplete
from switch_agent.pipeline import Kind
from switch_agent.plane import TAKEOVER_TXID, OpenFlowDataPlane, SwitchError

DRAIN = 0.03  # seconds that the server has to send what it has, at a planned hand-over
GRACE = 0.25  # seconds at least that the server of an earlier agent has to show that it lives
PROOFS = 3  # attempts to have the forward rules gone where that is to be proved
BUSY = 10.0  # seconds after which a return no longer waits for a moment without new sessions, to compare digests in


class Carrier:
    """The state between switch, agent and server.

    ``later`` puts an operation behind those that change the switch already; ``prepared`` hears of each preparation of the
    switch, ``known`` once that all sessions of an earlier agent are known; ``announce`` makes the agent's core tell its addresses
    to the network.
    """

    def __init__(
        self,
        config: Config,
        plane: OpenFlowDataPlane,
        takeover_channel: Channel,
        *,
        later: Callable[[Callable[[], Awaitable[object]]], None],
        announce: Callable[[], None],
        prepared: Callable[[], None],
        known: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        assert config.switch
        self._switch = config.switch
        self._heartbeat = config.heartbeat
        self._plane = plane
        self._takeover_channel = takeover_channel
        self._later = later
        self._announce = announce
        self._prepared = prepared
        self._tell_known = known
        self._say = say
        self.pair: Pair | None = None
        self.ready = False  # the switch is connected and prepared
        self.settled = asyncio.Event()  # it was so once
        self.forwarding = False  # the server carries
        self.takeovers = 0
        self.last_takeover: dict[str, Any] = {}
        self.unproved = ""  # why the switch may still forward to the server
        self._barrier = 0  # when it has acknowledged a takeover last, ns
        # Which sessions an earlier agent has left: its rules were read, or the peer has told us of all there are. Until
        # then no packet opens a session, and no rule is taken for a stranger's.
        self.known = False
        self._returning = False
        self._kept = False  # the peer has handed the traffic over, and does not want it back
        self._reconciled = False  # rules and sessions were compared since the peer came
        self._down: dict[int, str] = {}  # ports to the server without a link, and their names
        self._differ = False  # the last digests did

    # -- the switch ----------------------------------------------------------------------------------------

    def connected(self, event: Ready) -> None:
        self._down.clear()
        for port in event.ports:
            self.link(port, port.up)
        self._later(self._prepare)

    def lost(self) -> None:
        self.ready = False

    async def _prepare(self) -> None:
        try:
            await self._plane.prepare()
            self._prepared()
            self.forwarding = await self._plane.forwards()
            if not self.forwarding:
                await self._recover()
            if self.known:
                await self._reconcile()
        except (ChannelLost, SwitchError) as error:
            self._say(f"the switch cannot be prepared: {error}")
            return
        self.ready = True
        self.settled.set()
        self._say("the switch is ready")
        self._announce()
        self._arm()
        self._look_at_links()
        if self.forwarding:
            beat = self._heartbeat
            grace = max(GRACE, 2 * beat.interval_ms * beat.misses / 1000) if beat else GRACE
            asyncio.get_running_loop().call_later(grace, self._is_anybody_there)

    def _is_anybody_there(self) -> None:
        """The switch forwards to the server as an earlier agent, or connection, has left it: is it alive?"""
        if self.pair is None or not self.pair.watch.stats()["alive"]:
            self._later(partial(self._carry, "the switch forwards to a server that is not there"))

    async def _recover(self) -> None:
        """Sessions of an earlier agent, from its rules. Raises ChannelLost."""
        if not self.known and (found := await self._plane.recover()):
            self._say(f"{found} sessions are known by the rules that an earlier agent has left")
        self._all_known()

    def _all_known(self) -> None:
        if not self.known:
            self.known = True
            self._tell_known()

    def link(self, port: PortDescription, up: bool) -> None:
        """A server behind a port without a link carries nothing."""
        ports = self._switch.ports
        if port.number not in (ports.server_internal, ports.server_external):
            return
        if up:
            self._down.pop(port.number, None)
        elif port.number not in self._down:
            self._down[port.number] = port.name
            self._look_at_links()

    def _look_at_links(self) -> None:
        if self.forwarding and self._down:
            ports = ", ".join(f"{number} ({name})" for number, name in sorted(self._down.items()))
            self._later(partial(self._carry, f"port {ports} is down"))

    async def _reconcile(self) -> None:
        found = await self._plane.reconcile()
        self._say(f"rules: {found.right} right, {found.restored} restored, {found.deleted} deleted")

    async def takeover_events(self) -> None:
        """The connection that only the watch writes on."""
        while True:
            for event in await self._takeover_channel.events():
                if isinstance(event, Ready):
                    self._arm()
                elif event == TransactionComplete(TAKEOVER_TXID):
                    self._barrier = monotonic_ns()
                    if self.last_takeover:
                        self.last_takeover["barrier"] = self._barrier
                elif isinstance(event, Lost) and self.pair is not None:
                    self.pair.watch.disarm()  # its descriptor will be another one's

    # -- the pair ------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """The watch may take over once the server carries and both connections stand."""
        if self.pair is None or not (self.forwarding and self.ready and self._takeover_channel.connected):
            return
        self.pair.watch.arm(self._plane.prepared_takeover(), self._takeover_channel.fileno())

    def fired(self) -> None:
        assert self.pair is not None
        os.read(self.pair.watch.eventfd, 8)
        reason = self.pair.watch.fired
        if reason is None:
            return
        times = self.pair.watch.times
        barrier = self._barrier if self._barrier > (times["detected"] or 0) else None
        self.last_takeover = {"reason": reason, **times, "barrier": barrier, "proved": None}
        if times["written"] is not None and self.forwarding:
            self._say(
                f"the server is dead ({reason}); written {(times['written'] - (times['detected'] or 0)) / 1e3:.0f} µs later"
            )
        self.pair.transport.lose()
        self._later(partial(self._carry, reason))  # also if the peer was not operational yet

    def notice(self, action: do.Action) -> None:
        match action:
            case do.StateChanged(before, after, why):
                self._say(f"peer: {before.value} -> {after.value}: {why}")
                if after is State.OPERATIONAL:
                    self._all_known()
                    self._differ = False
                    asyncio.get_running_loop().call_later(BUSY, self._return_uncompared)
                if before is State.OPERATIONAL:
                    self._reconciled = self._kept = False
                    self._later(partial(self._carry, why))
            case do.DigestCompared(differing):
                assert self.pair is not None
                self._differ = bool(differing) or self.pair.protocol.apart
                if not self._differ and not self._returning and not (self.forwarding and self._reconciled):
                    self._returning = True
                    self._later(self._give_back)
            case do.Carry():
                self._later(self._take)
        if line := line_of(action):
            self._say(line)

    def _return_uncompared(self) -> None:
        """Under steady new sessions no two digests are of the same moment; both sides have acknowledged everything."""
        if not (self.forwarding or self._returning or self._differ):
            self._returning = True
            self._later(self._give_back)

    async def _take(self) -> None:
        """The server hands over: it goes on with what it has been sent, and hears when no more comes."""
        assert self.pair is not None
        if not self.ready:
            return
        self._kept = True
        await self._carry("the server hands over", drain=True)
        self.pair.transport.handed_over()

    async def _carry(self, why: str, *, drain: bool = False) -> None:
        """The switch carries. The watch may have seen to that already; then this changes nothing on it."""
        self._returning = False
        if not self.forwarding:
            return
        self.forwarding = False
        if self.pair is not None:
            self.pair.watch.disarm()
        try:
            if drain:
                await self._plane.delete_static_peer_rules(Kind.TO_SERVER)
                await asyncio.sleep(DRAIN)
            try:
                await self._plane.delete_static_peer_rules()
            except SwitchError as error:
                self._say(f"takeover: {error}")
            await self._recover()
            await self._prove()
        except (ChannelLost, SwitchError) as error:
            self._say(f"takeover: {error}")
        self.takeovers += 1
        self._say(f"the switch carries: {why}")
        self._announce()

    async def _prove(self) -> None:
        """The switch forwards no more when frames show it that come back, and not when it says so. Raises ChannelLost."""
        if self._switch.barrier != "probe":
            return
        self.unproved = ""
        for left in reversed(range(PROOFS)):
            if await self._plane.forwarded_no_more():
                if self.last_takeover:
                    self.last_takeover["proved"] = monotonic_ns()
                return
            if left:
                self._say(
                    "the switch has acknowledged the takeover and still forwards to the server: told again"
                )
                self._plane.repeat_takeover()
        self.unproved = "the switch has acknowledged the takeover, and still forwards to the server"
        self._say(self.unproved)

    async def _give_back(self) -> None:
        """Both hold the same sessions: the server carries again."""
        assert self.pair is not None
        self._returning = False
        if self.pair.state is not State.OPERATIONAL or not self.ready or self._kept or self._down:
            return
        try:
            await self._plane.refresh()
            await self._reconcile()
            self._reconciled = True
            if self.forwarding:
                return
            await self._plane.install_static_peer_rules()
        except (ChannelLost, SwitchError) as error:
            self._say(f"return: {error}")
            return
        self.forwarding = True
        self.unproved = ""
        self._arm()
        self._look_at_links()
        await self._purge()
        self._say("the server carries")

    async def _purge(self) -> None:
        """Of an Open vSwitch that we may manage: see ovs_control."""
        if self._switch.ovs is None:
            return
        try:
            await ovs_control.purge(self._switch.ovs)
        except ovs_control.OvsError as error:
            self._say(f"the switch's cache stays as it is: {error}")
