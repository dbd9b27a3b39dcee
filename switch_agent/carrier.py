# SPDX-License-Identifier: Apache-2.0
"""Who carries the traffic, the switch or the server: takeover, hand-over and return, decided here for both.

The agent is the arbiter, since every packet passes the switch. What a takeover changes on the switch a C thread has
written before anything here is told (nat_fastpath.watch); all else is done in order, as operations of the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from nat_control.config import Config
from nat_control.loop import monotonic_ns
from nat_control.pair import Pair
from nat_control.peer import StateLog, line_of
from nat_control.sync import actions as do
from nat_control.sync.actions import Precedence, State
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import Lost, PortDescription, Ready, TransactionComplete
from switch_agent.kept import Kept, file_of
from switch_agent.ovs_control import Caretaker
from switch_agent.pipeline import Kind
from switch_agent.plane import GONE_OVER, TAKEOVER_TXID, OpenFlowDataPlane, SwitchError

# Seconds between the rules of one direction and those of the other, when the traffic moves on purpose: the server sends what
# it has, and a switch that goes by its cache for some milliseconds after a barrier (Open vSwitch) forgets the rules before.
DRAIN = 0.05
GRACE = 0.25  # seconds at least that the server of an earlier agent has to show that it lives
PROOFS = 3  # attempts to have the forward rules gone where that is to be proved
AGAIN = 1.0  # seconds until what the switch has refused is tried again, and after a link is back
BUSY = 10.0  # seconds after which a return no longer waits for a moment without new sessions, to compare digests in


class Carrier:
    """The state between switch, agent and server.

    ``later`` puts an operation behind those that change the switch already, ``first`` before them; ``prepared`` hears of each preparation of the
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
        first: Callable[[Callable[[], Awaitable[object]]], None],
        announce: Callable[[], None],
        prepared: Callable[[], None],
        known: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        assert config.switch
        self._switch = config.switch
        self._number = config.number
        self._ovs = Caretaker(config.switch.ovs, say)
        self._heartbeat = config.heartbeat
        self._plane = plane
        self._takeover_channel = takeover_channel
        self._later, self._first = later, first
        self._announce = announce
        self._prepared = prepared
        self._tell_known = known
        self._say = say
        self.pair: Pair | None = None
        self.ready = False  # the switch is connected and prepared
        self.settled = asyncio.Event()  # it was so once
        self._forwarding = False  # the server carries
        self._states = StateLog()
        self.takeovers = 0
        self.last_takeover: dict[str, Any] = {}
        self.unproved = ""  # why the switch may still forward to the server
        self._barrier = 0  # when it has acknowledged a takeover last, ns
        # Which sessions an earlier agent has left: its rules were read, or the peer has told us of all there are. Until
        # then no packet opens a session, and no rule is taken for a stranger's.
        self.known = False
        self._returning = False
        self._going_back = False  # rules that lead to the server are being written
        self._connected = False
        self._timer: asyncio.TimerHandle | None = None
        self._leaving = False  # the server has handed the traffic over, and ends
        self._kept = Kept(file_of(config), say)  # an operator wants the switch to carry
        self._reconciled = False  # rules and sessions were compared since the peer came
        self._down: dict[int, str] = {}  # ports to the server without a link, and their names
        self._bytes = plane.prepared_takeover()  # always the same, and 1 ms of work
        self._differ = False  # the last digests did

    @property
    def forwarding(self) -> bool:
        """The server carries."""
        return self._forwarding

    @forwarding.setter
    def forwarding(self, server: bool) -> None:
        self._forwarding = server
        if self.pair is not None:
            self.pair.protocol.precedence = Precedence.STANDS_BY if server else Precedence.DECIDES

    @property
    def faults(self) -> dict[str, str]:
        """What an operator should mend, by name, one line each."""
        found = {}
        if self.unproved:
            found["takeover"] = self.unproved
        if self.pair is None or self.pair.state is not State.OPERATIONAL or not self.ready:
            return found
        if not self._takeover_channel.connected:
            why = "".join(f": {line}" for line in list(self._takeover_channel.refusals)[-1:])
            found["takeover connection"] = (
                f"the switch is not connected to {self._switch.takeover}: a takeover waits for the agent's loop{why}"
            )
        if not self.pair.watch.stats()["alive"]:
            found["heartbeat"] = "no heartbeats come from the server, although it is connected"
        return found

    # -- the switch ----------------------------------------------------------------------------------------

    def connected(self, event: Ready) -> None:
        self._down.clear()
        for port in event.ports:
            self.link(port, port.up)
        self._connected = True
        self._later(self._prepare)

    def lost(self) -> None:
        self._connected = self.ready = False

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
            asyncio.get_running_loop().call_later(AGAIN, self._prepare_again)
            return
        self.ready = True
        self.settled.set()
        self._say("the switch is ready")
        self._announce()
        self._arm()
        self._look_at_links()
        self._ovs.prepared()
        if self.forwarding:
            beat = self._heartbeat
            grace = max(GRACE, 2 * beat.interval_ms * beat.misses / 1000) if beat else GRACE
            asyncio.get_running_loop().call_later(grace, self._is_anybody_there)
            if self._kept:
                self._later(partial(self._carry, "it keeps the traffic", drain=True))

    def _prepare_again(self) -> None:
        if self._connected and not self.ready:
            self._later(self._prepare)

    def _is_anybody_there(self) -> None:
        """The switch forwards to the server as an earlier agent, or connection, has left it: is it alive?"""
        if self.pair is None or not self.pair.watch.stats()["alive"]:
            self._take_over("the switch forwards to a server that is not there")

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
        self._later(self.look_at_latch)  # it may have been down for a moment of which nobody tells
        if up:
            if self._down.pop(port.number, None):
                self._look_for_return(AGAIN)
        elif port.number not in self._down:
            self._down[port.number] = port.name
            self._look_at_links()

    def _look_at_links(self) -> None:
        if self._down and (self.forwarding or self._going_back):
            self._take_over(f"port {self._ports_down} is down")

    async def look_at_latch(self) -> None:
        """The switch may have gone over without us: it watches more of a link than it tells."""
        try:
            if self.ready and self.forwarding and self._plane.may_latch and await self._plane.latched():
                self._take_over(GONE_OVER)
        except ChannelLost:
            pass  # looked at when the switch is back

    @property
    def _ports_down(self) -> str:
        return ", ".join(f"{number} ({name})" for number, name in sorted(self._down.items()))

    async def _reconcile(self, *, refresh: bool = False) -> None:
        found = await self._plane.reconcile(refresh=refresh)
        self._say(f"rules: {found.right} right, {found.restored} restored, {found.deleted} deleted")

    async def compare(self) -> None:
        """What the switch holds with what it should, if there is one; else that is done when it is back."""
        try:
            if self.ready and self.known:
                await self._reconcile()
        except (ChannelLost, SwitchError) as error:
            self._say(f"rules cannot be compared: {error}")

    async def takeover_events(self) -> None:
        """The connection that only the watch writes on."""
        while True:
            for event in await self._takeover_channel.events():
                if isinstance(event, Ready):
                    self._arm()
                elif event == TransactionComplete(TAKEOVER_TXID):
                    self._barrier = monotonic_ns()
                    if self.last_takeover and not self.last_takeover["barrier"]:
                        self.last_takeover["barrier"] = self._barrier
                elif isinstance(event, Lost) and self.pair is not None and self.pair.watch.disarm():
                    self._arm()  # without bytes: the descriptor will be another one's

    # -- the pair ------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """The watch may take over once the server carries; without its connection it tells us, and we do."""
        wanted = (
            self.forwarding or not self._plane.partition.forwards
        )  # there it changes nothing, and notices all the same
        if self.pair is None or self._plane.overtaken or not (wanted and self.ready):
            return
        there = self._takeover_channel.connected
        fileno = self._takeover_channel.fileno() if there else None
        self.pair.watch.arm(self._bytes, fileno)

    def _take_over(self, why: str) -> None:
        """The bytes are written before this returns; the rest of a takeover is done as soon as what is under way has ended."""
        if self.forwarding or self._going_back:
            detected = monotonic_ns()
            if self.pair is None or self.pair.watch.disarm():  # else its thread has written them
                with contextlib.suppress(ChannelLost):
                    self._takeover_channel.write(self._bytes)
                    if not self._plane.overtaken:  # else it is the second link that goes
                        times = {"last_heartbeat": None, "detected": detected, "written": monotonic_ns()}
                        self.last_takeover = {"reason": why, **times, "barrier": None, "proved": None}
            self._plane.take_over()
        self._first(partial(self._carry, why))

    def fired(self) -> None:
        assert self.pair is not None
        os.read(self.pair.watch.eventfd, 8)
        found = self.pair.watch.fired
        if found is None:
            return
        reason = f"port {self._ports_down} is down" if found == "link down" and self._down else found
        times = self.pair.watch.times
        barrier = self._barrier if self._barrier > (times["detected"] or 0) else None
        self.last_takeover = {"reason": reason, **times, "barrier": barrier, "proved": None}
        if times["written"] is not None and self.forwarding:
            what = reason if found == "link down" else f"the server is dead ({reason})"
            self._say(f"{what}; written {(times['written'] - (times['detected'] or 0)) / 1e3:.0f} µs later")
        if found != "link down":  # else it lives, and may be reached by another way
            self.pair.transport.lose()
        if not self._plane.overtaken:  # else the link was told before, and this is under way
            self._take_over(reason)  # also if the peer was not operational yet

    def notice(self, action: do.Action) -> None:
        match action:
            case do.StateChanged(before, after, why):
                if line := self._states.line_of(action):
                    self._say(line)
                if after is State.OPERATIONAL:
                    self._all_known()
                    self._differ = self._leaving = False
                    self._arm()
                    self._tell()
                    self._look_for_return(BUSY)
                if before is State.OPERATIONAL:
                    self._reconciled = False
                    self._take_over(why)
            case do.DigestCompared(differing):
                assert self.pair is not None
                self._differ = bool(differing) or self.pair.protocol.apart
                if not self._differ and not self._returning and not (self.forwarding and self._reconciled):
                    self._returning = True
                    self._later(self._give_back)
            case do.Carry(carrier, lasting):
                self._later(partial(self._asked, carrier == self._number, lasting))
        if line := line_of(action):
            self._say(line)

    def _look_for_return(self, seconds: float) -> None:
        """In so long, and then again and again: under steady new sessions no two digests are of the same moment, and what
        spoiled a return may be over."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._return_uncompared)

    def _return_uncompared(self) -> None:
        """Both sides have acknowledged everything."""
        if self.pair is None or self.pair.state is not State.OPERATIONAL:
            return
        if not (self.forwarding or self._returning or self._differ):
            self._returning = True
            self._later(self._give_back)
        self._look_for_return(BUSY)

    # -- who carries on purpose; see nat_control.traffic.Arbiter ---------------------------------------------

    @property
    def here(self) -> bool:
        return not self.forwarding

    @property
    def kept(self) -> bool:
        return bool(self._kept)

    @property
    def forcible(self) -> bool:
        """A switch carries by itself once its server is dead."""
        return False

    async def move(self, here: bool, *, lasting: bool) -> str:
        """Behind what changes the switch already."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def moved() -> None:
            why = await self._move(here, lasting, "asked for by an operator")
            if not done.cancelled():
                done.set_result(why)

        self._later(moved)
        return await done

    def let_go(self) -> None:
        self._kept.set(False)
        self._leaving = False
        self._tell()
        self._look_for_return(BUSY)

    async def _asked(self, here: bool, lasting: bool) -> None:
        """By the server, which goes on with what it has been sent, and hears when no more comes."""
        self._tell(
            await self._move(here, lasting, "the server asks for it" if not here else "the server hands over")
        )

    def _tell(self, why: str = "") -> None:
        """The server hears who carries, and why nothing came of what it has asked for."""
        if self.pair is not None and (peer := self.pair.protocol.peer) is not None:
            carrier = peer.instance if self.forwarding else self._number
            self.pair.transport.carries(carrier, lasting=self.kept, why=why)

    async def _move(self, here: bool, lasting: bool, why: str) -> str:
        """Returns why nothing came of it."""
        if not self.ready:
            return "the switch is not connected, or not prepared"
        if not here:
            if self.forwarding:
                return ""
            self._leaving, before = False, self.kept
            self._kept.set(False)
            if failed := await self._return():
                self._kept.set(before)
            return failed
        if failed := await self._carry(why, drain=True):
            return failed
        self._leaving = not lasting
        if lasting:
            self._kept.set(True)
            self._tell()
        return ""

    async def _carry(self, why: str, *, drain: bool = False) -> str:
        """The switch carries; returns what it said against that. The watch may have seen to it already; then this changes
        nothing on the switch."""
        self._returning, failed = False, ""
        self._plane.overtaken = False
        if not self.forwarding:
            return failed
        self.forwarding = False
        if self.pair is not None:
            self.pair.watch.disarm()
        try:
            try:
                if drain:
                    await self._plane.delete_static_peer_rules(Kind.TO_SERVER)
                    await self._drained()
            except SwitchError as error:
                self._say(f"takeover: {error}")
            try:
                await self._plane.delete_static_peer_rules()
            except SwitchError as error:
                failed = str(error)
                self._say(f"takeover: {failed}")
            await self._recover()
            await self._prove()
            failed = failed or self.unproved
        except (ChannelLost, SwitchError) as error:
            failed = str(error)
            self._say(f"takeover: {failed}")
        self.takeovers += 1
        self._say(f"the switch carries: {why}")
        self._announce()
        self._tell()
        return failed

    async def _drained(self) -> None:
        """Until the rules before the last barrier count for no packet any more, nor for one that is at the server."""
        await self._ovs.ask("revalidator/wait")
        await asyncio.sleep(DRAIN)

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

    async def _stay(self) -> None:
        """Nothing of a return that came to nothing may be left: nobody would take it away when the server dies."""
        try:
            await self._plane.delete_static_peer_rules()
        except (ChannelLost, SwitchError) as error:
            self._say(f"the switch may forward to the server in part: {error}")

    async def _give_back(self) -> None:
        """Both hold the same sessions: the server carries again, unless the switch keeps the traffic.

        To compare the rules costs a switch without a CPU to spare some packets: once is enough.
        """
        try:
            if not (self._kept or self._leaving or (self.forwarding and self._reconciled)):
                await self._return()
        finally:
            self._returning = False

    def _unfit(self) -> str:
        """Why the server cannot carry."""
        assert self.pair is not None
        if not self._plane.partition.forwards:
            return "the switch carries all traffic by choice (peer.partition: all_local)"
        if self.pair.state is not State.OPERATIONAL:
            return f"the server is not in step ({self.pair.state.value})"
        if not self.ready:
            return "the switch is not connected, or not prepared"
        if self._down:
            return f"port {self._ports_down} has no link"
        if not self.pair.watch.stats()["alive"]:
            return "no heartbeats come from the server"
        return ""

    async def _return(self) -> str:
        """The server carries; why not."""
        if why := self._unfit():
            return why
        try:
            await self._reconcile(refresh=True)
            self._reconciled = True
            if self.forwarding:
                return ""
            self._going_back = True
            # what comes from the server passes before anything goes to it
            await self._plane.install_static_peer_rules(Kind.FROM_SERVER)
            await self._drained()
            if why := self._unfit():  # it has died meanwhile
                await self._stay()
                return why
            await self._plane.install_static_peer_rules(Kind.TO_SERVER)
        except (ChannelLost, SwitchError) as error:
            self._say(f"return: {error}")
            await self._stay()
            return str(error)
        finally:
            self._going_back = False
        self.forwarding = True
        self.unproved = ""
        self._arm()
        self._look_at_links()
        self._say("the server carries")
        self._tell()
        await self._ovs.returned()
        return ""
