# SPDX-License-Identifier: Apache-2.0
"""The switch as a data plane: sessions become pairs of rules, as many as it has room for.

Which sessions there are is the business of ``store``, another DataPlane in the agent (its NAT core): it keeps
every record, and knows what contradicts what. This class keeps the switch like it: rules for the sessions
that matter most, up to ``max_flows`` rules; the others pass through the agent ("record-only") while it carries.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import numpy as np

from nat_control.dataplane import Capabilities, DataPlane, Ids, Mask, NextHops, Records
from switch_agent import channel as openflow
from switch_agent import codec, nexthops, recovery
from switch_agent.activity import ACTIVITY, NO_ACTIVITY, Activity, applied, since
from switch_agent.channel import Channel, ChannelLost
from switch_agent.codec import Error, PacketIn
from switch_agent.compile import Compiler, NextHopGroups, Numbers
from switch_agent.nexthops import NO_ROUTE
from switch_agent.pipeline import (
    CLASS_MASK,
    FORWARD_COOKIE,
    FORWARD_MASK,
    INBOUND,
    SESSION_CLASS,
    TCP,
    UDP,
    Kind,
    Pipeline,
    Rule,
    Side,
)
from switch_agent.probe import frame_of

CHUNK = 2000  # sessions per transaction
TAKEOVER_TXID = 0x8000_0001  # beyond those that a channel gives
_MISSING_GROUP = 0xFFFF_FFFF


class Reconciled(NamedTuple):
    """Rules by what was found: right, missing or wrong and put right, unknown and deleted."""

    right: int
    restored: int
    deleted: int


class SwitchError(Exception):
    """The switch refused what this NAT cannot do without; the message has its words."""


class OpenFlowDataPlane:
    """A DataPlane over one switch. ``report`` gets a line whenever the switch refuses something.

    ``refused`` counts the sessions whose rules the switch would not have (``rules``; of these ``table_full``),
    and those for whose next hop there was no group (``next_hops``).
    """

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
        self._ruled: dict[int, int] = {}  # id → group towards the inside << 32 | towards the outside
        self._group_lock = asyncio.Lock()
        self._seen = NO_ACTIVITY  # when `refresh` last looked
        self.refused: Counter[str] = Counter()

    @property
    def capabilities(self) -> Capabilities:
        of = self._store.capabilities
        return Capabilities("openflow", of.max_sessions, of.holds_packets, of.max_batch)

    @property
    def offloaded(self) -> int:
        """Sessions that have their rules on the switch."""
        return len(self._ruled)

    def has_rules(self, records: Records) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of these sessions the switch translates by itself, shape (n,); the others are record-only."""
        return np.array([one in self._ruled for one in records["id"].tolist()], np.bool_)

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
        txid = self._channel.next_txid()
        earlier = openflow.delete_by_cookie(
            Kind.RETURN.cookie, txid=txid
        )  # of an agent that had another MAC for it
        base = b"".join(openflow.flow_mod(rule, txid=txid) for rule in self._pipeline.base())
        self._insist(await self._channel.transact(earlier + base, txid), "static rules")

    async def install_static_peer_rules(self, *kinds: Kind) -> None:
        """The server carries from here on: first what comes from it may pass, then all goes to it."""
        for kind in kinds or (Kind.FROM_SERVER, Kind.TO_SERVER):
            await self._rules(tuple(rule for rule in self._pipeline.forward() if rule.cookie == kind.cookie))

    async def delete_static_peer_rules(self, *kinds: Kind) -> None:
        """The switch carries from here on. A planned hand-over deletes TO_SERVER, waits, and FROM_SERVER."""
        txid = self._channel.next_txid()
        chosen = kinds or (Kind.TO_SERVER, Kind.FROM_SERVER)
        data = b"".join(openflow.delete_by_cookie(kind.cookie, txid=txid) for kind in chosen)
        self._insist(await self._channel.transact(data, txid), "forward rules")

    def prepared_takeover(self) -> bytes:
        """What makes the switch carry, for any OpenFlow connection that has been greeted.

        Deletes the forward rules, sets the fence anew (it also counts from here on), and asks for a barrier
        with TAKEOVER_TXID. Each cookie is named whole: a switch finds that at once, and for a mask may look at every rule
        (Open vSwitch: 8 ms for 20 000).
        """
        fence = [openflow.flow_mod(rule, openflow.ADD, TAKEOVER_TXID) for rule in self._pipeline.fence()]
        delete = [
            openflow.delete_by_cookie(kind.cookie, txid=TAKEOVER_TXID)
            for kind in (Kind.TO_SERVER, Kind.FROM_SERVER)
        ]
        return b"".join((*delete, *fence, codec.barrier(TAKEOVER_TXID)))

    async def forwarded_no_more(self) -> bool:
        """Whether frames that each forward rule would take come back to us instead, in time. Raises ChannelLost.

        Needs a pipeline with a MAC for probes.
        """
        source = self._pipeline.probe_mac
        asked = [
            self._channel.comes_back(frame_of(rule, source), int(str(rule.match["in_port"])))
            for rule in self._pipeline.forward()
        ]
        return all(await asyncio.gather(*asked))

    def repeat_takeover(self) -> None:
        """Writes the prepared bytes once more, on this connection. Raises ChannelLost."""
        self._channel.write(self.prepared_takeover())

    async def wipe(self) -> None:
        """Everything off the switch: rules, groups. Sessions stay in the store. Raises ChannelLost."""
        txid = self._channel.next_txid()
        data = openflow.delete_by_cookie(0, 0, txid) + openflow.delete_group(txid=txid)
        self._insist(await self._channel.transact(data, txid), "wipe")
        self._ruled.clear()
        self._room = self._most

    async def _rules(self, rules: tuple[Rule, ...]) -> None:
        txid = self._channel.next_txid()
        data = b"".join(openflow.flow_mod(rule, openflow.ADD, txid) for rule in rules)
        self._insist(await self._channel.transact(data, txid), "static rules")

    @staticmethod
    def _insist(errors: tuple[Error, ...], what: str) -> None:
        if errors:
            raise SwitchError(f"the switch refuses {what}: {errors[0].text}")

    async def _ensure(self, encode: Callable[[int, bool], bytes], exists: tuple[int, int], what: str) -> None:
        """Adds, or changes what is there from an earlier connection."""
        txid = self._channel.next_txid()
        errors = await self._channel.transact(encode(txid, False), txid)
        if any((error.type, error.code) == exists for error in errors):
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

    async def _write_group(self, key: int) -> None:
        group_id = self._hops.groups[key]
        actions = self._pipeline.next_hop(self._hops.hop(key))
        await self._ensure(
            lambda txid, modify: openflow.group_mod(group_id, actions, txid, modify=modify),
            openflow.GROUP_EXISTS,
            f"group {group_id}",
        )

    async def _groups(self, records: Records) -> NextHopGroups:
        """Groups of these records, made where they are new."""
        inside, outside = self._hops.keys(records)
        keys = np.concatenate((inside, outside))
        async with self._group_lock:
            new = self._hops.add(keys)
            if self._hops.full:
                await self._drop_unused_groups(set(keys.tolist()))
                new += self._hops.add(keys)
            written = 0
            try:
                for key in new:
                    await self._write_group(key)
                    written += 1
            except SwitchError as error:
                self._report(str(error))
            finally:
                self._hops.forget(new[written:])
        groups = self._hops.of(inside, outside)
        if without := int(
            ((keys != NO_ROUTE) & (np.concatenate((groups.internal, groups.external)) == 0)).sum()
        ):
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

    # -- rules of sessions ---------------------------------------------------------------------------------

    async def _offer(self, records: Records) -> None:
        """Rules for these sessions; where the switch is lost meanwhile they come when it is back and reconciled."""
        try:
            await self._offload(records)
        except ChannelLost:
            pass  # its owner has an event for that
        except SwitchError as error:
            self._report(f"rules of {len(records)} sessions: {error}")

    async def _offload(self, records: Records) -> None:
        """Rules for these sessions, the busiest first, while there is room."""
        protocol = records["protocol"]
        records = records[(protocol == TCP) | (protocol == UDP)]  # others pass through the agent
        if not len(records):
            return
        groups = await self._groups(records)
        wanted = groups.internal.astype(np.uint64) << np.uint64(32) | groups.external.astype(np.uint64)
        ids = records["id"].tolist()
        pairs = wanted.tolist()
        reachable = (groups.internal != 0) & (groups.external != 0)
        due = [
            i
            for i in np.flatnonzero(reachable).tolist()
            if self._ruled.get(ids[i], _MISSING_GROUP) != pairs[i]
        ]
        again = [i for i in due if ids[i] in self._ruled]
        new = [i for i in due if ids[i] not in self._ruled]
        if len(new) > (room := max(self._room - len(self._ruled), 0)):
            rank = (records["packets_out"] + records["packets_in"])[new]
            new = [new[i] for i in np.argsort(rank, kind="stable")[::-1][:room].tolist()]
        chosen = np.array(again + new, np.intp)
        self._ruled.update((ids[i], pairs[i]) for i in chosen.tolist())
        chunks = [chosen[at : at + CHUNK] for at in range(0, len(chosen), CHUNK)]
        works = [
            self._install_rules(records[part], NextHopGroups(groups.internal[part], groups.external[part]))
            for part in chunks
        ]
        if len(works) == 1:  # the first packet of a new flow waits for this: no task for it
            await works[0]
        else:
            await asyncio.gather(*works)

    async def _install_rules(self, records: Records, groups: NextHopGroups) -> None:
        txid = self._channel.next_txid()
        errors = await self._channel.transact(self._compiler.install(records, groups, txid), txid)
        if not errors:
            return
        named = {error.cookie & ~INBOUND for error in errors if error.cookie is not None}
        if any(error.cookie is None for error in errors):  # it does not say which: none of them counts
            named = set(records["id"].tolist())
        failed = records[np.isin(records["id"], np.array(sorted(named), np.uint64))]
        full = any((error.type, error.code) == openflow.TABLE_FULL for error in errors)
        self.refused["rules"] += len(failed)
        self._report(f"the switch refuses the rules of {len(failed)} sessions: {errors[0].text}")
        await self.withdraw(failed)  # one of the two rules may be there
        if full:
            self.refused["table_full"] += len(failed)
            self._room = min(self._room, len(self._ruled))

    async def withdraw(self, records: Records) -> None:
        """Deletes the rules of these sessions: of those that the store itself has closed."""
        ids = records["id"].tolist()
        ruled = records[self.has_rules(records)]
        for one in ids:
            self._ruled.pop(one, None)
        try:
            for at in range(0, len(ruled), CHUNK):
                txid = self._channel.next_txid()
                errors = await self._channel.transact(
                    self._compiler.delete(ruled[at : at + CHUNK], txid), txid
                )
                if errors:
                    self._report(f"the switch refuses to delete rules: {errors[0].text}")
        except ChannelLost as error:
            self._report(f"rules stay on the switch until it is back: {error}")

    async def forwards(self) -> bool:
        """Whether the switch has the rules that forward to the server, from whenever. Raises ChannelLost."""
        return bool(len(await self._channel.statistics(FORWARD_COOKIE, FORWARD_MASK)))

    async def recover(self) -> int:
        """Puts the sessions whose rules an earlier agent has left into the store, beside those that it knows.

        Returns how many it holds now; rules of others are unknown to ``reconcile``. Raises ChannelLost.
        """
        found = await self._channel.statistics(SESSION_CLASS, CLASS_MASK, recovery.rules)
        if not len(found):
            return 0
        macs = dict((await self._channel.groups(recovery.group_macs)).tolist())
        records, *groups = recovery.sessions(found, self._headers)
        # A next hop that its rule knows by its MAC has the group of that MAC.
        named = np.array([macs.get(group, 0) for group in groups[0].tolist()], np.uint64)
        by_mac = [
            mac != 0 and nexthops.first_group_id(nexthops.key("internal", mac=mac)) == group
            for mac, group in zip(named.tolist(), groups[0].tolist(), strict=True)
        ]
        records["internal_mac"] = np.where(by_mac, named, 0)
        inside, outside = self._hops.keys(records)
        self._hops.adopt(np.concatenate((inside, outside)), np.concatenate(groups), macs)
        self._seen = _carried(found)
        of = self._hops.of(inside, outside)
        held = 0
        for at in range(0, len(records), step := self.capabilities.max_batch):
            part = slice(at, at + step)
            count = await self._store.install(records[part])
            held += count
            mask = (of.internal[part] != 0) & (of.external[part] != 0)
            if count < len(records[part]):
                mask &= await self._store.holds(records[part])
            pairs = of.internal[part].astype(np.uint64) << np.uint64(32) | of.external[part]
            self._ruled.update(zip(records["id"][part][mask].tolist(), pairs[mask].tolist(), strict=True))
        return held

    async def refresh(self) -> int:
        """Tells the store what the switch has carried since the last call; returns for how many sessions."""
        now = await self.activity()
        self._seen, carried = now, since(self._seen, now)
        refreshed = 0
        async for page in self._store.sessions():
            if len(active := applied(page, carried, self._headers)):
                refreshed += await self._store.update(active)
        return refreshed

    async def activity(self) -> Activity:
        """What each session's rules have carried since they were installed; dtype ACTIVITY. Raises ChannelLost."""
        return _carried(await self._channel.statistics(SESSION_CLASS, CLASS_MASK))

    @property
    def _headers(self) -> tuple[int, int]:
        """Bytes of Ethernet, by where frames came from: inside, outside; what is padded to 60 bytes counts as such."""
        inside, outside = (18 if side.vlan else 14 for side in self._sides)
        return inside, outside

    async def rerank(self) -> tuple[int, int]:
        """Gives the room on the switch to the busiest sessions; returns how many came and went.

        Looks at packets since the sessions were opened, by rule or through the agent. Raises ChannelLost.
        """
        carried = await self.activity()
        self._room = self._most
        ids, packets = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        async for page in self.sessions():
            count = (page["packets_out"] + page["packets_in"]).astype(np.uint64)
            if len(carried):
                at = np.minimum(np.searchsorted(carried["id"], page["id"]), len(carried) - 1)
                ours = carried["id"][at] == page["id"]
                count += np.where(ours, (carried["packets_out"] + carried["packets_in"])[at], 0).astype(
                    np.uint64
                )
            ids.append(page["id"].copy())
            packets.append(count)
        all_ids, all_packets = np.concatenate(ids), np.concatenate(packets)
        # Who has a rule keeps it against one that is not busier.
        has = np.array([one in self._ruled for one in all_ids.tolist()], np.bool_)
        order = np.lexsort((has, all_packets))[::-1]
        top = all_ids[order[: self._room]]
        leaving = np.setdiff1d(all_ids[has], top)
        coming = np.setdiff1d(top, all_ids[has])
        if len(leaving):
            await self._each(leaving, self.withdraw)
        before = len(self._ruled)
        if len(coming):
            await self._each(coming, self._offload)
        return len(self._ruled) - before, len(leaving)

    async def reconcile(self) -> Reconciled:
        """Makes the switch hold the rules that it should, and no others. Raises ChannelLost.

        Called after ``prepare`` on a new connection, and once the store is whole.
        """
        found = await self._channel.statistics(SESSION_CLASS, CLASS_MASK)
        known = set()
        async for page in self.sessions():
            known.update(page["id"].tolist())
        for one in [one for one in self._ruled if one not in known]:
            del self._ruled[one]
        ids = np.fromiter(self._ruled, np.uint64, len(self._ruled))
        pairs = np.fromiter(self._ruled.values(), np.uint64, len(self._ruled))
        cookies = np.concatenate([ids, ids | np.uint64(INBOUND)])
        groups = np.concatenate([pairs & np.uint64(0xFFFF_FFFF), pairs >> np.uint64(32)])
        order = np.argsort(cookies)
        cookies, groups = cookies[order], groups[order]
        extra, right = _compare(found, cookies, groups)
        await self._delete_cookies(found["cookie"][extra])
        wrong = np.unique(cookies[~right] & ~np.uint64(INBOUND))
        for one in wrong.tolist():
            del self._ruled[one]
        # those that were wrong, and those that came while there was no switch
        due = np.array([one for one in known if one not in self._ruled], np.uint64)
        if len(due) and len(self._ruled) < self._room:
            await self._each(due, self._offload)
        return Reconciled(int(right.sum()), int((~right).sum()), int(extra.sum()))

    async def _delete_cookies(self, cookies: Numbers) -> None:
        for at in range(0, len(cookies), CHUNK):
            txid = self._channel.next_txid()
            data = self._compiler.delete_cookies(cookies[at : at + CHUNK], txid)
            self._insist(await self._channel.transact(data, txid), "deletion of unknown rules")

    async def _each(self, ids: Ids, work: Callable[[Records], Any]) -> None:
        """Does ``work`` with the records of these sessions, in pages."""
        async for page in self.sessions():
            if len(some := page[np.isin(page["id"], ids)]):
                await work(some)


def _carried(flows: np.ndarray[Any, np.dtype[np.void]]) -> Activity:
    """By session what flows with the fields of codec.FLOW_STAT have carried."""
    ids, where = np.unique(flows["cookie"] & ~np.uint64(INBOUND), return_inverse=True)
    found = np.zeros(len(ids), ACTIVITY)
    found["id"] = ids
    inbound = flows["cookie"] & np.uint64(INBOUND) != 0
    for direction, chosen in (("out", ~inbound), ("in", inbound)):
        np.add.at(found[f"packets_{direction}"], where[chosen], flows["packets"][chosen])
        np.add.at(found[f"frame_bytes_{direction}"], where[chosen], flows["bytes"][chosen])
    return found


def _compare(
    found: np.ndarray[Any, np.dtype[np.void]], cookies: Numbers, groups: Numbers
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Which found flows are unknown, and which of the (sorted) expected ones are there with the right group."""
    right = np.zeros(len(cookies), np.bool_)
    if not len(cookies):
        return np.ones(len(found), np.bool_), right
    at = np.minimum(np.searchsorted(cookies, found["cookie"]), len(cookies) - 1)
    known = cookies[at] == found["cookie"]
    same = known & (groups[at] == found["group"])
    right[at[same]] = True
    return ~known, right
