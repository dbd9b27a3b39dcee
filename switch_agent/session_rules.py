# SPDX-License-Identifier: Apache-2.0
"""Pairs of rules for sessions: which have some, at which of the two priorities, and what they have carried.

*Behind* the rules that forward to the server a pair waits for the takeover; *in front* of them the switch carries its session
although the server lives. See pipeline.py.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import numpy as np

from nat_control.dataplane import NO_IDS, DataPlane, Ids, Mask, Records
from nat_fastpath.engine import RECORD
from nat_fastpath.tables import chosen, taken
from switch_agent import activity as traffic
from switch_agent import channel as openflow
from switch_agent import nexthops, recovery
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import Error
from switch_agent.compile import FEW, Compiler, NextHopGroups, Numbers
from switch_agent.pipeline import (
    CLASS_MASK,
    FRONT_PRIORITY,
    INBOUND,
    SESSION_CLASS,
    SESSION_PRIORITY,
    TCP,
    UDP,
    Kind,
    Partition,
    Pipeline,
    Rule,
)
from switch_agent.transaction import Rows

CHUNK = 2000  # sessions per transaction
BUSIER = 2  # a session without rules takes the place of one that has carried less than half as much
SWAPPED = 2000  # at most at one look
LATER = 32  # looks at most until a table that was full is tried again
_ID = (RECORD.names or ()).index("id")


class Reconciled(NamedTuple):
    """Rules by what was found: right, missing or wrong and put right, unknown and deleted."""

    right: int
    restored: int
    deleted: int


class SwitchError(Exception):
    """The switch refused what this NAT cannot do without; the message has its words."""


class SessionRules(ABC):
    """``refused`` counts the sessions whose rules the switch would not have (``rules``; of these ``table_full``),
    and those for whose next hop there was no group (``next_hops``).
    """

    _swapped = SWAPPED

    def __init__(
        self,
        channel: Channel,
        pipeline: Pipeline,
        next_hops: nexthops.NextHops,
        store: DataPlane,
        max_flows: int,
        report: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._pipeline = pipeline
        self._hops = next_hops
        self._store = store
        self._report = report
        self._compiler = Compiler(
            pipeline,
            openflow.flow_mod,
            openflow.delete_by_cookie,
            add=openflow.ADD,
            delete_strict=openflow.DELETE_STRICT,
        )
        self._most = max_flows // 2
        self._room = self._most  # sessions that the switch takes; less once it has said that it is full
        self._later = 0  # looks until it is asked again, and how many it was the last time
        self._waited = 1
        self._ruled: dict[int, int] = {}  # id → group towards the inside << 32 | towards the outside
        self._front: set[int] = set()  # those of them that are in front
        self._moving: set[int] = set()  # those that may have rules at both priorities
        self._front_lock = asyncio.Lock()
        self._guarded = False  # the rules that stand above those in front are there
        self._seen = traffic.NO_ACTIVITY  # when `refresh` last looked
        self._counts = np.zeros((2, 0), np.uint64)  # ids and packets, when `rerank` last looked
        self.server_carries = False  # the forward rules are there
        self.tcp_control = True  # the switch takes rules on TCP flags
        # Hears what the rules of sessions have carried whose other packets the server sees: see DataPlane.update.
        self.tell: Callable[[Records], None] = lambda records: None
        self._left_rules = False  # there are rules to delete when the switch is back
        self.refused: Counter[str] = Counter()

    @property
    def offloaded(self) -> int:
        """Sessions that have their rules on the switch."""
        return len(self._ruled)

    @property
    def in_front(self) -> Ids:
        """Ids of the sessions that the switch carries although the server lives, ascending."""
        return np.array(sorted(self._front), np.uint64)

    @property
    def partition(self) -> Partition:
        return self._pipeline.partition

    @property
    def room_in_front(self) -> int:
        """For how many more there is room in front, whether they have rules behind or none."""
        return max(self._room - len(self._front), 0)

    @property
    def fronts_by_choice(self) -> bool:
        """Whether nothing is in front but what ``set_front`` has put there."""
        return self.partition.forwards and not self.partition.settled_in_front

    @property
    def full_at(self) -> int | None:
        """How many sessions have room in the switch's table, since it said that it is full; None: all that may."""
        return self._room if self._room < self._most else None

    @property
    def carries_some(self) -> bool:
        """Whether the switch has anything to do that its counters tell."""
        return not self.server_carries or bool(self._front) or not self.partition.forwards_all

    def has_rules(self, records: Records) -> Mask:
        """Which of these sessions the switch translates by itself, shape (n,); the others are record-only."""
        return np.array([one in self._ruled for one in records["id"].tolist()], np.bool_)

    def is_front(self, records: Records) -> Mask:
        """Which of these sessions are in front, shape (n,)."""
        return np.array([one in self._front for one in records["id"].tolist()], np.bool_)

    def seen_here_alone(self, records: Records) -> Mask:
        """Sessions of which the server sees no packet, so that all we know of them is news to it; shape (n,)."""
        if not self.server_carries:
            return np.ones(len(records), np.bool_)
        return ~np.isin(records["protocol"], list(self.partition.forwarded))

    # -- what the rest of the plane does -------------------------------------------------------------------

    @abstractmethod
    def sessions(self) -> AsyncIterator[Records]: ...

    @property
    @abstractmethod
    def _groups_stand(self) -> bool:
        """Whether the switch has all groups that there are, and rules of sessions are flow-mods."""

    @abstractmethod
    async def _groups(self, records: Records) -> NextHopGroups: ...

    @abstractmethod
    async def _rules(self, rules: tuple[Rule, ...], unless: Callable[[], bool] | None = None) -> None: ...

    @abstractmethod
    async def _delete_kinds(self, *kinds: Kind) -> None: ...

    @staticmethod
    def _insist(errors: tuple[Error, ...], what: str) -> None:
        if errors:
            raise SwitchError(f"the switch refuses {what}: {errors[0].text}")

    @property
    def _headers(self) -> tuple[int, int]:
        """Bytes of Ethernet, by where frames came from: inside, outside; what is padded to 60 bytes counts as such."""
        sides = self._pipeline.internal, self._pipeline.external
        inside, outside = (18 if side.vlan else 14 for side in sides)
        return inside, outside

    # -- rules come and go ---------------------------------------------------------------------------------

    async def _offer(self, records: Records, *, front: bool = False) -> None:
        """Rules for these sessions; where the switch is lost meanwhile they come when it is back and reconciled."""
        try:
            await self._offload(records, front=front)
            await self._settle(records)
        except ChannelLost:
            pass  # its owner has an event for that
        except SwitchError as error:
            self._report(f"rules of {len(records)} sessions: {error}")

    async def _settle(self, records: Records) -> None:
        """To the front with those that the partition wants there, and that still wait behind."""
        if self.partition.settled_in_front:
            due = records[traffic.settled(records)]
            due = due[self.has_rules(due) & ~self.is_front(due)]
            if len(due):
                await self._move(due, front=True)

    async def _offload(self, records: Records, *, front: bool = False) -> None:
        """Rules for these sessions, the busiest first, while there is room. ``front``: new ones go there in any case."""
        if not front and (data := self._plain(records, txid := self._channel.next_txid())):
            if len(failed := await self._send(records, data, txid)):
                await self.withdraw(failed)
            return
        protocol = records["protocol"]
        records = chosen(records, (protocol == TCP) | (protocol == UDP))  # others pass through the agent
        if not len(records):
            return
        groups = await self._groups(records)
        ids = records["id"].tolist()
        pairs = [
            inside << 32 | outside if inside and outside else None
            for inside, outside in zip(groups.internal.tolist(), groups.external.tolist(), strict=True)
        ]
        due = [i for i, pair in enumerate(pairs) if pair is not None and self._ruled.get(ids[i]) != pair]
        again = [i for i in due if ids[i] in self._ruled]
        new = [i for i in due if ids[i] not in self._ruled]
        if len(new) > (room := max(self._room - len(self._ruled), 0)):
            rank = (records["packets_out"] + records["packets_in"])[new]
            new = [new[i] for i in np.argsort(rank, kind="stable")[::-1][:room].tolist()]
        if front or self.partition.settled_in_front:
            first = [i for i in new if front or traffic.settled(records[i : i + 1])[0]]
            if first:
                if not self._guarded:
                    async with self._front_lock:
                        await self._guard()
                self._front.update(ids[i] for i in first)
        wanted = again + new
        self._ruled.update((ids[i], pair) for i in wanted if (pair := pairs[i]) is not None)
        if len(wanted) < len(records):
            which = np.array(wanted, np.intp)
            records = taken(records, which)
            groups = NextHopGroups(groups.internal[which], groups.external[which])
        parts = [slice(at, at + CHUNK) for at in range(0, len(records), CHUNK)]
        works = [
            self._install_rules(records[part], NextHopGroups(groups.internal[part], groups.external[part]))
            for part in parts
        ]
        if len(works) == 1:  # the first packet of a new flow waits for this: no task for it
            await works[0]
        else:
            await asyncio.gather(*works)

    def _plain(self, records: Records, txid: int) -> bytes:
        """The rules of a few sessions that are as most are: new ones, behind, with room, and groups for their next hops.
        b"": they are not. The first packet of each waits.
        """
        if len(records) > FEW or self.partition.settled_in_front or not self._groups_stand:
            return b""
        pairs, parts = {}, []
        for record in records.tolist():
            inside, outside = self._hops.groups_of(record)
            rules = self._compiler.one(record, txid, inside, outside)
            if not (inside and outside and rules) or record[_ID] in self._ruled:
                return b""
            pairs[record[_ID]] = inside << 32 | outside
            parts.append(rules)
        if len(self._ruled) + len(pairs) > self._room:
            return b""
        self._ruled.update(pairs)
        return b"".join(parts)

    def _priorities(self, records: Records) -> Numbers | int:
        """At which their rules are: shape (n,), or one for all."""
        if not self._front:
            return SESSION_PRIORITY
        return np.where(self.is_front(records), FRONT_PRIORITY, SESSION_PRIORITY)

    async def _install_rules(self, records: Records, groups: NextHopGroups) -> None:
        failed = await self._add(records, groups, self._priorities(records))
        if len(failed):
            await self.withdraw(failed)  # one of the two rules may be there

    async def _add(self, records: Records, groups: NextHopGroups, priority: Numbers | int) -> Records:
        """Adds rules; returns the records of those that the switch refuses, perhaps one of two."""
        txid = self._channel.next_txid()
        return await self._send(records, self._compiler.install(records, groups, txid, priority), txid)

    async def _send(self, records: Records, data: bytes, txid: int) -> Records:
        errors = await self._channel.transact(data, txid)
        if not errors:
            return records[:0]
        named = {error.cookie & ~INBOUND for error in errors if error.cookie is not None}
        if any(error.cookie is None for error in errors):  # it does not say which: none of them counts
            named = set(records["id"].tolist())
        failed = records[np.isin(records["id"], np.array(sorted(named), np.uint64))]
        self.refused["rules"] += len(failed)
        full = any((error.type, error.code) == openflow.TABLE_FULL for error in errors)
        if full:
            self.refused["table_full"] += len(failed)
            there = len(self._ruled.keys() - named)
            if self._room > there:
                self._room = there
                self._later = self._waited
                self._waited = min(2 * self._waited, LATER)
        self._report(f"the switch refuses the rules of {len(failed)} sessions: {errors[0].text}")
        return failed

    async def withdraw(self, records: Records) -> None:
        """Deletes the rules of these sessions: of those that the store itself has closed."""
        ruled = records[self.has_rules(records)]
        priority = self._priorities(ruled)
        moving = ruled[[one in self._moving for one in ruled["id"].tolist()]] if self._moving else ruled[:0]
        for one in records["id"].tolist():
            self._ruled.pop(one, None)
            self._front.discard(one)
        try:
            await self._delete(ruled, priority)
            for either in (SESSION_PRIORITY, FRONT_PRIORITY):
                await self._delete(moving, either)
            if self._guarded and not (self._front or self._moving):  # who moves looks, and holds the lock
                async with self._front_lock:
                    if self._guarded and not (self._front or self.partition.settled_in_front):
                        await self._unguard()
        except (ChannelLost, SwitchError) as error:
            if not self._left_rules:  # once, and not for each session that ends until then
                self._report(f"rules stay on the switch until it is back: {error}")
            self._left_rules = True

    async def _delete(self, records: Records, priority: Numbers | int) -> None:
        for at in range(0, len(records), CHUNK):
            part = slice(at, at + CHUNK)
            of = priority if isinstance(priority, int) else priority[part]
            txid = self._channel.next_txid()
            errors = await self._channel.transact(self._compiler.delete(records[part], txid, of), txid)
            if errors:
                self._report(f"the switch refuses to delete rules: {errors[0].text}")

    async def _delete_cookies(self, cookies: Numbers) -> None:
        for at in range(0, len(cookies), CHUNK):
            txid = self._channel.next_txid()
            data = self._compiler.delete_cookies(cookies[at : at + CHUNK], txid)
            self._insist(await self._channel.transact(data, txid), "deletion of unknown rules")

    # -- in front and behind -------------------------------------------------------------------------------

    async def set_front(self, ids: Ids, front: bool) -> Ids:
        """Puts these sessions in front of the server, or behind it; returns those that are as asked now, ascending.

        Who has no rules yet gets them, if there is room. No packet finds a gap.
        """
        wanted = np.unique(ids)
        try:
            async for page in self.sessions():
                some = page[np.isin(page["id"], wanted)]
                if front and not (has := self.has_rules(some)).all():
                    await self._offload(some[~has], front=True)
                await self._move(some, front=front)
        except (ChannelLost, SwitchError) as error:
            self._report(f"sessions stay where they are: {error}")
        there = self._front.intersection(self._ruled)
        return wanted[np.array([(one in there) is front for one in wanted.tolist()], np.bool_)]

    async def _move(self, records: Records, *, front: bool) -> None:
        """One pair is added before the other is deleted; where the table has no room for both, the other way
        round: then the server has its packets meanwhile, or the agent. Raises ChannelLost, SwitchError."""
        old, new = (SESSION_PRIORITY, FRONT_PRIORITY) if front else (FRONT_PRIORITY, SESSION_PRIORITY)
        async with self._front_lock:
            for at in range(0, len(records), CHUNK):
                part = records[at : at + CHUNK]
                part = part[self.has_rules(part) & (self.is_front(part) != front)]
                if not len(part):
                    continue
                if front:
                    await self._guard()
                ids = part["id"].tolist()
                self._moving.update(ids)
                try:
                    await self._move_part(part, old, new)
                finally:
                    self._moving.difference_update(ids)
            if self._guarded and not self._front:
                await self._unguard()

    async def _move_part(self, part: Records, old: int, new: int) -> None:
        first = len(part) > self._room - len(self._ruled)
        if first:
            await self._last_count(old)
            await self._delete(part, old)
        pairs = np.array([self._ruled.get(one, 0) for one in part["id"].tolist()], np.uint64)
        part, pairs = part[pairs != 0], pairs[pairs != 0]  # others have ended meanwhile
        groups = NextHopGroups(pairs >> np.uint64(32), pairs & np.uint64(0xFFFF_FFFF))
        failed = await self._add(part, groups, new)
        if len(failed):
            if first:
                await self.withdraw(failed)
            else:
                await self._delete(failed, new)
        moved = part[~np.isin(part["id"], failed["id"]) & self.has_rules(part)]
        if new == FRONT_PRIORITY:
            self._front.update(moved["id"].tolist())
        else:
            self._front.difference_update(moved["id"].tolist())
        if not first:
            await self._last_count(old)
            await self._delete(moved, old)

    async def _last_count(self, old: int) -> None:
        """Rules that go take their counters with them."""
        if old == FRONT_PRIORITY or not self.server_carries:
            await self.refresh()

    async def _guard(self) -> None:
        """Before the first session is in front: what begins and ends a connection goes to who owns it. The lock is held."""
        if self._guarded or not self.tcp_control:
            return
        await self._rules(self._pipeline.guard())
        if self.server_carries:
            await self._rules(self._pipeline.tcp_to_server(), lambda: not self.server_carries)
        self._guarded = True

    async def _unguard(self) -> None:
        """Nothing is in front any more: packets to the server are looked at no closer than its port."""
        self._guarded = False
        await self._delete_kinds(Kind.TCP_TO_SERVER, Kind.TCP_OUT_FRONT, Kind.TCP_IN_FRONT)

    # -- what an earlier agent, or connection, has left ----------------------------------------------------

    async def _found(self) -> Rows:
        """All rules of sessions on the switch: the fields of codec.FLOW_STAT. Raises ChannelLost."""
        return await self._channel.statistics(SESSION_CLASS, CLASS_MASK)

    async def _left(self) -> Rows:
        """The same, with all that they say: dtype recovery.RULE."""
        return await self._channel.statistics(SESSION_CLASS, CLASS_MASK, recovery.rules)

    async def recover(self) -> int:
        """Puts the sessions whose rules an earlier agent has left into the store, beside those that it knows.

        Returns how many it holds now; rules of others are unknown to ``reconcile``. Raises ChannelLost.
        """
        found = await self._left()
        if not len(found):
            return 0
        macs = dict((await self._channel.groups(recovery.group_macs)).tolist())
        records, *groups = recovery.sessions(found, self._headers)
        front = set((found["cookie"][found["priority"] == FRONT_PRIORITY] & ~np.uint64(INBOUND)).tolist())
        # A next hop that its rule knows by its MAC has the group of that MAC.
        named = np.array([macs.get(group, 0) for group in groups[0].tolist()], np.uint64)
        by_mac = [
            mac != 0 and nexthops.first_group_id(nexthops.key("internal", mac=mac)) == group
            for mac, group in zip(named.tolist(), groups[0].tolist(), strict=True)
        ]
        records["internal_mac"] = np.where(by_mac, named, 0)
        inside, outside = self._hops.keys(records)
        self._hops.adopt(np.concatenate((inside, outside)), np.concatenate(groups), macs)
        self._seen = traffic.by_pair(found)
        of = self._hops.of(inside, outside)
        held = 0
        for at in range(0, len(records), step := self._store.capabilities.max_batch):
            part = slice(at, at + step)
            count = await self._store.install(records[part])
            held += count
            mask = (of.internal[part] != 0) & (of.external[part] != 0)
            if count < len(records[part]):
                mask &= await self._store.holds(records[part])
            pairs = of.internal[part].astype(np.uint64) << np.uint64(32) | of.external[part]
            ids = records["id"][part][mask].tolist()
            self._ruled.update(zip(ids, pairs[mask].tolist(), strict=True))
            self._front.update(front.intersection(ids))
        return held

    async def reconcile(self, *, refresh: bool = False) -> Reconciled:
        """Makes the switch hold the rules that it should, and no others. Raises ChannelLost, SwitchError.

        Called after ``prepare`` on a new connection, and once the store is whole. ``refresh``: does that too, with what is read anyway.
        """
        found = await self._found()
        if refresh:
            await self._refresh(traffic.by_pair(found))
        known = await self._known()
        async with self._front_lock:
            self._guarded = False
            await (self._guard() if self._front else self._unguard())
        ids = np.fromiter(self._ruled, np.uint64, len(self._ruled))
        pairs = np.fromiter(self._ruled.values(), np.uint64, len(self._ruled))
        priority = np.where([one in self._front for one in self._ruled], FRONT_PRIORITY, SESSION_PRIORITY)
        cookies = np.concatenate([ids, ids | np.uint64(INBOUND)])
        groups = np.concatenate([pairs & np.uint64(0xFFFF_FFFF), pairs >> np.uint64(32)])
        order = np.argsort(cookies)
        cookies, groups = cookies[order], groups[order]
        unknown, misplaced, right = recovery.compared(found, cookies, groups, np.tile(priority, 2)[order])
        await self._delete_cookies(found["cookie"][unknown])
        wrong = np.unique(cookies[~right] & ~np.uint64(INBOUND))
        front = wrong[[one in self._front for one in wrong.tolist()]]
        for one in wrong.tolist():
            self._ruled.pop(one, None)
        self._front.difference_update(front.tolist())
        if len(front):
            await self._each(front, lambda records: self._offload(records, front=True))
        # those that were wrong, and those that came while there was no switch
        due = np.array([one for one in known if one not in self._ruled], np.uint64)
        if len(due) and len(self._ruled) < self._room:
            await self._each(due, self._offload)
        for at in (SESSION_PRIORITY, FRONT_PRIORITY):
            stale = found["cookie"][misplaced & (found["priority"] == at)] & ~np.uint64(INBOUND)
            stale = stale[[(one in self._front) != (at == FRONT_PRIORITY) for one in stale.tolist()]]
            if len(stale):
                await self._each(stale, lambda records, at=at: self._delete(records, at))  # type: ignore[misc]
        # one of two may be left
        bare = np.array([one for one in wrong.tolist() if one not in self._ruled], np.uint64)
        await self._delete_cookies(np.concatenate((bare, bare | np.uint64(INBOUND))))
        await self._known()  # what ended while it was given rules
        return Reconciled(int(right.sum()), int((~right).sum()), int((unknown | misplaced).sum()))

    async def _known(self) -> set[int]:
        """Ids of all sessions; rules of those that have ended are forgotten here, and go from the switch.

        A page of records may be older than a session's end, so that it was given rules behind it.
        """
        before, known = set(self._ruled), set()
        async for page in self.sessions():
            known.update(page["id"].tolist())
        if ended := before - known:
            for one in ended:
                self._ruled.pop(one, None)
            self._front -= ended
            cookies = np.array(sorted(ended), np.uint64)
            await self._delete_cookies(np.concatenate((cookies, cookies | np.uint64(INBOUND))))
        return known

    async def _each(self, ids: Ids, work: Callable[[Records], Awaitable[object]]) -> None:
        """Does ``work`` with the records of these sessions, in pages."""
        async for page in self.sessions():
            if len(some := page[np.isin(page["id"], ids)]):
                await work(some)

    # -- what the rules have carried -----------------------------------------------------------------------

    async def activity(self) -> traffic.Activity:
        """What each session's rules have carried since they were installed; dtype ACTIVITY. Raises ChannelLost."""
        return traffic.by_session(traffic.by_pair(await self._found()))

    async def refresh(self) -> int:
        """Tells the store, and who listens to ``tell``, what the switch has carried since the last call.

        Returns for how many sessions. Raises ChannelLost.
        """
        return await self._refresh(traffic.by_pair(await self._found()))

    async def _refresh(self, now: traffic.Activity) -> int:
        self._seen, carried = now, traffic.by_session(traffic.since(self._seen, now))
        refreshed = 0
        async for page in self._store.sessions():
            active = traffic.applied(page, carried, self._headers)
            if not len(active):
                continue
            if not self.tcp_control:
                await self._store.update(traffic.taken_for_established(page, active))
            refreshed += await self._store.update(active)
            if len(told := active[self.is_front(active) & ~self.seen_here_alone(active)]):
                self.tell(told)
        return refreshed

    async def rerank(self) -> tuple[int, int]:
        """Gives the room on the switch to the sessions that carry most; returns how many came and went.

        Called from time to time, after ``refresh``; looks at the packets since the last call, by rule or through the agent. A table
        that was full is tried again now and then. Raises ChannelLost.
        """
        ids, total = [NO_IDS], [np.zeros(0, np.uint64)]
        async for page in self.sessions():
            page = page[np.isin(page["protocol"], (TCP, UDP))]
            ids.append(page["id"].copy())
            total.append((page["packets_out"] + page["packets_in"]).astype(np.uint64))
        all_ids, all_packets = np.concatenate(ids), np.concatenate(total)
        order = np.argsort(all_ids)
        all_ids, all_packets = all_ids[order], all_packets[order]
        recent = traffic.packets_of(self._counts, all_ids, all_packets)
        self._counts = np.stack((all_ids, all_packets))
        if self._room < self._most:
            self._later -= 1
            if self._later <= 0:
                self._room = self._most
        has = np.array([one in self._ruled for one in all_ids.tolist()], np.bool_)
        heavy = np.flatnonzero(~has)[np.argsort(-recent[~has].astype(np.int64), kind="stable")]
        light = np.flatnonzero(has & ~np.isin(all_ids, self.in_front))
        light = light[np.argsort(recent[light], kind="stable")]
        free = max(self._room - len(self._ruled), 0)
        coming, rest = heavy[:free], heavy[free : free + self._swapped]
        rest, light = rest[: len(light)], light[: len(rest)]
        swap = recent[rest] > BUSIER * recent[light]
        leaving: Ids = all_ids[light[swap]]
        arriving: Ids = np.concatenate((all_ids[coming], all_ids[rest[swap]]))
        if len(leaving):
            await self._each(leaving, self.withdraw)
        before, room = len(self._ruled), self._room
        if len(arriving):
            await self._each(arriving, self._offload)
            await self._known()
        if len(arriving) and self._room == room == self._most:
            self._waited = 1
        return len(self._ruled) - before, len(leaving)
