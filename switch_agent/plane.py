# SPDX-License-Identifier: Apache-2.0
"""The switch as a data plane: sessions become pairs of rules, as many as it has room for.

Which sessions there are is the business of ``store``, another DataPlane in the agent (its NAT core): it keeps
every record, and knows what contradicts what. This class keeps the switch like it: rules for the sessions
that matter most, up to ``max_flows`` rules; the others pass through the agent ("record-only") while it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace

import numpy as np

from nat_control.dataplane import Capabilities, DataPlane, Ids, Mask, NextHops, Records
from switch_agent import channel as openflow
from switch_agent import codec, nexthops
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import PacketIn
from switch_agent.compile import NextHopGroups, Numbers
from switch_agent.pipeline import (
    ALL_BITS,
    CLASS_MASK,
    FORWARD_COOKIE,
    FORWARD_MASK,
    INBOUND,
    SESSION_CLASS,
    SESSION_PRIORITY,
    STATIC_CLASS,
    TAKEN_OVER,
    Kind,
    Pipeline,
    Rule,
    Side,
)
from switch_agent.probe import frame_of
from switch_agent.session_rules import Reconciled, SessionRules, SwitchError

__all__ = ["OpenFlowDataPlane", "Reconciled", "SwitchError"]

MARK = 0x80  # of a static rule's cookie, beside its kind, while they are written
GONE_OVER = "the switch has gone over by itself: a link to the server was lost"
TAKEOVER_TXID = 0x8000_0001  # beyond those that a channel gives


def _marked(rule: Rule) -> Rule:
    return replace(rule, cookie=rule.cookie | MARK)


def _deletions(kinds: Iterable[Kind], txid: int) -> bytes:
    return b"".join(openflow.delete_by_cookie(kind.cookie, txid=txid) for kind in kinds)


class OpenFlowDataPlane(SessionRules):
    """A DataPlane over one switch. ``report`` gets a line whenever the switch refuses something."""

    # What `prepare` leaves to others: it comes and goes with what it serves.
    _passing = frozenset((*TAKEN_OVER, Kind.TCP_OUT_FRONT, Kind.TCP_IN_FRONT, Kind.TOWARDS))

    def __init__(
        self,
        channel: Channel,
        pipeline: Pipeline,
        next_hops: nexthops.NextHops,
        store: DataPlane,
        *,
        max_flows: int = 100_000,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(channel, pipeline, next_hops, store, max_flows, report)
        self._group_lock = asyncio.Lock()
        self._reshaped = False  # the rules of sessions are those of another configuration
        self.overtaken = False  # nothing may lead to the server any more, whatever is under way

    @property
    def capabilities(self) -> Capabilities:
        of = self._store.capabilities
        return Capabilities("openflow", of.max_sessions, of.holds_packets, of.max_batch)

    # -- DataPlane -----------------------------------------------------------------------------------------

    async def install(self, records: Records) -> int:
        """See DataPlane; a session without room on the switch, or without a switch, is held as well."""
        held = await self._store.install(records)
        if held < len(records):
            records = records[await self._store.holds(records)]
        await self._offer(records)
        return held

    async def holds(self, records: Records) -> Mask:
        return await self._store.holds(records)

    async def update(self, records: Records) -> int:
        """See DataPlane. Rules are written anew where the next hop inside is another one now."""
        held = await self._store.update(records)
        ruled = records[self.has_rules(records)]
        if len(ruled) and held < len(records):
            ruled = ruled[await self._store.holds(ruled)]
        await self._offer(ruled)
        return held

    async def delete(self, records: Records) -> int:
        """See DataPlane. Without a connection the rules go when the switch is reconciled."""
        await self.withdraw(records[await self._store.holds(records)])
        return await self._store.delete(records)

    async def commit(self, records: Records) -> int:
        return await self._store.commit(records)

    async def adopt(self) -> int:
        return await self._store.adopt()

    async def cede(self, instance: int, besides: Ids) -> int:
        return await self._store.cede(instance, besides)

    async def next_hops(self) -> NextHops:
        return await self._store.next_hops()

    async def learn(self, next_hops: NextHops) -> int:
        """See DataPlane. The owner passes on what the store knows by ``set_next_hop``."""
        return await self._store.learn(next_hops)

    def sessions(self) -> AsyncIterator[Records]:
        return self._store.sessions()

    # -- static rules --------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Meters, next hops and all static rules but those that forward. Raises ChannelLost, SwitchError."""
        self._left_rules = False
        for meter, rate in self._pipeline.meters().items():
            await self._ensure(
                lambda txid, modify, meter=meter, rate=rate: openflow.meter_mod(  # type: ignore[misc]
                    meter, rate, txid, modify=modify
                ),
                openflow.METER_EXISTS,
                f"meter {meter}",
            )
        for key in list(self._hops.groups):
            await self._write_group(key)
        for group in self._pipeline.groups():
            await self._ensure(
                lambda txid, modify, group=group: openflow.static_group(group, txid, modify=modify),  # type: ignore[misc]
                openflow.GROUP_EXISTS,
                "a fast-failover group that goes on in a table (`switch.failover: group` is for Open vSwitch)",
            )
        await self._write_static()

    def _static(self) -> tuple[Rule, ...]:
        """What a switch must take."""
        return self._pipeline.base()

    async def _write_static(self) -> None:
        """Makes the static rules ours, whatever an agent with another configuration has left, without a moment that has none.

        A rule takes the place of one with its match. So ours are written with a mark in their cookies first: what has none then
        has no place among them, and goes; and then as they shall be.
        """
        rules = self._static()
        await self._rules(tuple(map(_marked, rules)))
        self.tcp_control = True
        try:
            await self._rules(tuple(map(_marked, self._pipeline.tcp_control())))
            rules += self._pipeline.tcp_control()
        except SwitchError as error:
            self.tcp_control = False
            self._report(
                f"{error} (on TCP flags): TCP ages by its established timer while the switch carries"
            )
        found = await self._channel.statistics(STATIC_CLASS, CLASS_MASK | MARK)
        cookies = set(found["cookie"].tolist())
        left = {kind for kind in Kind if kind.cookie in cookies} - self._passing
        # these match what sessions' rules do: another port, VLAN or MAC is theirs, too
        self._reshaped = self._reshaped or not left.isdisjoint((Kind.NEW_FLOW, Kind.TCP_OUT, Kind.TCP_IN))
        if left:
            await self._delete_kinds(*left)
        await self._rules(rules)
        txid = self._channel.next_txid()
        marked = openflow.delete_by_cookie(STATIC_CLASS | MARK, CLASS_MASK | MARK, txid)
        self._insist(await self._channel.transact(marked, txid), "deletion of static rules")

    async def install_static_peer_rules(self, *kinds: Kind) -> None:
        """The server carries from here on: first what comes from it may pass, then it gets what is its own."""
        if self._pipeline.groups():
            await self._delete_kinds(Kind.LATCH)
        async for page in self.sessions():
            await self._settle(page)
        for kind in kinds or (Kind.FROM_SERVER, Kind.TO_SERVER):
            if kind is Kind.TO_SERVER:
                async with self._front_lock:
                    self.server_carries = not self.overtaken
                    if self._guarded:
                        await self._rules(self._pipeline.tcp_to_server(), lambda: self.overtaken)
            forward = tuple(rule for rule in self._pipeline.forward() if rule.cookie == kind.cookie)
            await self._rules(forward, lambda: self.overtaken)
            if self.overtaken:
                raise SwitchError("the switch takes over meanwhile")

    async def delete_static_peer_rules(self, *kinds: Kind) -> None:
        """The switch carries from here on. A planned hand-over deletes TO_SERVER, waits, and FROM_SERVER."""
        chosen = (*kinds, Kind.TCP_TO_SERVER) if kinds else TAKEN_OVER
        self.server_carries = False
        await self._delete_kinds(*chosen)

    async def _delete_kinds(self, *kinds: Kind) -> None:
        txid = self._channel.next_txid()
        self._insist(await self._channel.transact(_deletions(kinds, txid), txid), "deletion of static rules")

    async def forwards(self) -> bool:
        """Whether the switch has the rules that forward to the server, from whenever; then they are those of this partition. Raises
        ChannelLost, SwitchError."""
        found = await self._channel.statistics(FORWARD_COOKIE, FORWARD_MASK)
        self.server_carries = bool(len(found)) and self._pipeline.partition.forwards and not self.overtaken
        if await self.latched():
            self._report(GONE_OVER)
            self.server_carries = False
        if (
            self.server_carries
        ):  # what an agent with another partition has left goes, but not before ours is there
            txid = self._channel.next_txid()
            forward = self._pipeline.forward()
            ours = b"".join(openflow.flow_mod(rule, txid=txid) for rule in forward)
            others = b"".join(
                openflow.flow_mod(rule, openflow.DELETE_STRICT, txid)
                for rule in self._pipeline.forward_of_others()
            )
            errors = await self._channel.transact(ours + others, txid, lambda: self.overtaken)
            self._insist(errors, "forward rules")
            if len(await self._channel.statistics(FORWARD_COOKIE, FORWARD_MASK)) > len(forward):
                # of other ports or tags; sessions' rules carry for the moment that it takes
                delete = _deletions((Kind.TO_SERVER, Kind.FROM_SERVER, Kind.TCP_TO_SERVER), txid)
                errors = await self._channel.transact(delete + ours, txid, lambda: self.overtaken)
                self._insist(errors, "forward rules")
            self.server_carries = not self.overtaken
        else:
            await self.delete_static_peer_rules()
        return self.server_carries

    async def latched(self) -> bool:
        """Whether the switch has gone over by itself (failover.py), and nobody has taken note yet. Raises ChannelLost."""
        return len(await self._channel.statistics(Kind.LATCH.cookie, ALL_BITS)) > 0

    @property
    def may_latch(self) -> bool:
        return bool(self._pipeline.groups())

    def take_over(self) -> None:
        """The switch carries, now: what has been sent is undone ahead of all that waits, and nothing of what is under way leads
        to the server any more until ``overtaken`` is taken back."""
        self.overtaken, self.server_carries = True, False
        with contextlib.suppress(ChannelLost):
            self._channel.write(_deletions(TAKEN_OVER, TAKEOVER_TXID))

    def prepared_takeover(self) -> bytes:
        """What makes the switch carry, for any OpenFlow connection that has been greeted.

        Deletes the forward rules, and those that show the server what begins and ends a connection; sets the fence anew (it
        also counts from here on), and asks for a barrier with TAKEOVER_TXID. Each cookie is named whole: a switch finds that at
        once, and for a mask may look at every rule (Open vSwitch: 8 ms for 20 000).
        """
        fence = [openflow.flow_mod(rule, openflow.ADD, TAKEOVER_TXID) for rule in self._pipeline.fence()]
        return b"".join((_deletions(TAKEN_OVER, TAKEOVER_TXID), *fence, codec.barrier(TAKEOVER_TXID)))

    async def forwarded_no_more(self) -> bool:
        """Whether frames that each rule which leads to the server would take come back to us instead, in time. Raises ChannelLost.

        Needs a pipeline with a MAC for probes.
        """
        source = self._pipeline.probe_mac
        asked = [
            self._channel.comes_back(frame_of(rule, source), int(str(rule.match["in_port"])))
            for rule in (*self._pipeline.forward(), *self._pipeline.tcp_to_server())
        ]
        return all(await asyncio.gather(*asked))

    def repeat_takeover(self) -> None:
        """Writes the prepared bytes once more, on this connection. Raises ChannelLost."""
        self._channel.write(self.prepared_takeover())

    async def reconcile(self, *, refresh: bool = False) -> Reconciled:
        """See SessionRules. Rules of sessions that match by other ports or VLANs than ours go first, though their cookies are right."""
        if self._reshaped:
            async with self._front_lock:
                await self._unguard()
            txid = self._channel.next_txid()
            data = openflow.delete_by_cookie(SESSION_CLASS, CLASS_MASK, txid)
            self._insist(await self._channel.transact(data, txid), "deletion of rules")
            self._reshaped = False
        return await super().reconcile(refresh=refresh)

    async def wipe(self) -> None:
        """Everything off the switch: rules, groups. Sessions stay in the store. Raises ChannelLost."""
        txid = self._channel.next_txid()
        data = openflow.delete_by_cookie(0, 0, txid) + openflow.delete_group(txid=txid)
        self._insist(await self._channel.transact(data, txid), "wipe")
        self._ruled.clear()
        self._front.clear()
        self._guarded = self.server_carries = False
        self._room = self._most

    async def _rules(self, rules: tuple[Rule, ...], unless: Callable[[], bool] | None = None) -> None:
        txid = self._channel.next_txid()
        data = b"".join(openflow.flow_mod(rule, openflow.ADD, txid) for rule in rules)
        errors = await self._channel.transact(data, txid, unless)
        full = any((error.type, error.code) == openflow.TABLE_FULL for error in errors)
        if full and await self._make_room(len(rules)):  # what all go by comes before what one session does
            errors = await self._channel.transact(data, txid, unless)
        self._insist(errors, "static rules")

    async def _make_room(self, rules: int) -> int:
        """In a full table, for so many: the newest of the sessions behind lose theirs, and pass through the agent. Returns how many."""
        behind = [one for one in self._ruled if one not in self._front and one not in self._moving]
        chosen = np.array(behind[-rules:], np.uint64)
        if not len(chosen):
            return 0
        for one in chosen.tolist():
            del self._ruled[one]
        self._room, self._later = len(self._ruled), max(self._later, 1)
        await self._each(chosen, lambda records: self._delete(records, SESSION_PRIORITY))
        self._report(
            f"the switch's table is full: {len(chosen)} sessions leave their rules' room to static ones"
        )
        return len(chosen)

    async def _ensure(
        self,
        encode: Callable[[int, bool], bytes],
        exists: tuple[int, int],
        what: str,
        *,
        keep: bool = False,
    ) -> None:
        """Adds, or changes what is there from an earlier connection; ``keep``: leaves it."""
        txid = self._channel.next_txid()
        errors = await self._channel.transact(encode(txid, False), txid)
        if any((error.type, error.code) == exists for error in errors):
            if keep:
                return
            txid = self._channel.next_txid()
            errors = await self._channel.transact(encode(txid, True), txid)
        self._insist(errors, what)

    # -- next hops -----------------------------------------------------------------------------------------

    async def set_next_hop(self, key: int, mac: int | None) -> None:
        """The next hop ``key`` (nexthops.key) has this MAC now; one group-mod moves all its sessions.

        Without a MAC its packets go to the agent, translated already. Raises ChannelLost, SwitchError.
        """
        async with self._group_lock:
            self._hops.learn(key, mac)
            if key in self._hops.groups:
                await self._write_group(key)

    async def _write_group(self, key: int, *, new: bool = False) -> None:
        """One that an earlier agent has left for a ``new`` next hop keeps its MAC until we know one: rules in front use it."""
        group_id, hop = self._hops.groups[key], self._hops.hop(key)
        actions = self._pipeline.next_hop(hop)
        await self._ensure(
            lambda txid, modify: openflow.group_mod(group_id, actions, txid, modify=modify),
            openflow.GROUP_EXISTS,
            f"group {group_id}",
            keep=new and hop.mac is None,
        )

    @property
    def _groups_stand(self) -> bool:
        return not self._group_lock.locked()

    async def _groups(self, records: Records) -> NextHopGroups:
        """Groups of these records, made where they are new."""
        inside, outside = self._hops.keys(records)
        groups = self._hops.of(inside, outside)
        if _count(groups) == _count((inside, outside)) and not self._group_lock.locked():
            return groups
        keys = np.concatenate((inside, outside))
        async with self._group_lock:
            new = self._hops.add(keys)
            if self._hops.full:
                await self._drop_unused_groups(set(keys.tolist()))
                new += self._hops.add(keys)
            written = 0
            try:
                for key in new:
                    await self._write_group(key, new=True)
                    written += 1
            except SwitchError as error:
                self._report(str(error))
            finally:
                self._hops.forget(new[written:])
        groups = self._hops.of(inside, outside)
        if without := _count((inside, outside)) - _count(groups):
            self.refused["next_hops"] += without
            self._report(f"{without} sessions have no rules: no more groups for their next hops")
        return groups

    async def _drop_unused_groups(self, wanted: set[int]) -> None:
        """Makes room among the groups; the lock is held, so that nobody begins to use one meanwhile."""
        used = {half for pair in self._ruled.values() for half in (pair >> 32, pair & 0xFFFF_FFFF)}
        idle = [one for one, group in self._hops.groups.items() if group not in used and one not in wanted]
        if idle:
            txid = self._channel.next_txid()
            data = b"".join(openflow.delete_group(self._hops.groups[one], txid) for one in idle)
            self._insist(await self._channel.transact(data, txid), "deletion of groups")
            self._hops.forget(idle)

    # -- packets -------------------------------------------------------------------------------------------

    def packet_out(self, frame: bytes, side: int) -> bool:
        """Sends an untagged frame out of a side (0 internal, 1 external); False when it was dropped."""
        there = self._sides[side]
        if there.vlan:
            frame = frame[:12] + b"\x81\x00" + there.vlan.to_bytes(2, "big") + frame[12:]
        return self._channel.packet_out(frame, port=there.port)

    def arrived(self, event: PacketIn) -> tuple[int, bytes] | None:
        """The side and the untagged frame; None when it is none of ours."""
        for index, side in enumerate(self._sides):
            if event.in_port != side.port:
                continue
            if not side.vlan:
                return index, event.frame
            if event.frame[12:14] == b"\x81\x00":
                return index, event.frame[:12] + event.frame[16:]
        return None

    def without_next_hop(self, event: PacketIn) -> tuple[int, int] | None:
        """The side and IPv4 address of the next hop whose MAC is missing, if a session's rule sent this up for that."""
        if event.cookie & CLASS_MASK != SESSION_CLASS or event.reason == codec.INVALID_TTL:
            return None
        pair = self._ruled.get(event.cookie & ~INBOUND, 0)
        key = self._hops.key_of(pair >> 32 if event.cookie & INBOUND else pair & 0xFFFF_FFFF)
        return nexthops.place(key) if key else None

    @property
    def _sides(self) -> tuple[Side, Side]:
        return self._pipeline.internal, self._pipeline.external


def _count(halves: tuple[Numbers, Numbers]) -> int:
    """Of keys, or groups: those that are there, and not NO_ROUTE."""
    return sum(map(np.count_nonzero, halves))
