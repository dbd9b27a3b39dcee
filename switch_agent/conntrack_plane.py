# SPDX-License-Identifier: Apache-2.0
"""The switch as a data plane whose sessions are entries of Open vSwitch's connection tracking: see conntrack.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nat_control.dataplane import NO_IDS, DataPlane, Ids, Records
from nat_fastpath.engine import FLAG_OFFLOAD
from switch_agent import channel as openflow
from switch_agent import conntrack, nexthops, ovs_tracker
from switch_agent.channel import Channel
from switch_agent.codec import PacketIn
from switch_agent.compile import NextHopGroups, Numbers
from switch_agent.conntrack import Entries
from switch_agent.ovs_control import OvsError
from switch_agent.pipeline import CLASS_MASK, INBOUND, SESSION_CLASS, SESSION_PRIORITY, Pipeline, Rule
from switch_agent.plane import OpenFlowDataPlane
from switch_agent.session_rules import CHUNK, Reconciled, SwitchError
from switch_agent.transaction import Rows

T = TypeVar("T")
_WHOLE = 1000  # ms: the tracker tells when an entry was used last in whole seconds


class ConntrackPlane(OpenFlowDataPlane):
    """``ovs`` is the run directory, or control socket, of the switch; ``max_flows`` counts sessions.

    What each session has carried is not known, only when it was used last; and all sessions are behind the server.
    """

    _swapped = 0  # nobody knows which carry most

    def __init__(
        self,
        channel: Channel,
        pipeline: Pipeline,
        next_hops: nexthops.NextHops,
        store: DataPlane,
        *,
        ovs: Path,
        max_flows: int = 100_000,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(channel, pipeline, next_hops, store, max_flows=2 * max_flows, report=report)
        self._ovs = ovs
        self._owners = conntrack.Owners()
        self._compiler = conntrack.EntryCompiler(pipeline)

    async def prepare(self) -> None:
        await self._asked(ovs_tracker.prepare(self._ovs, self._most))
        await super().prepare()
        self._owners.adopt(await self._entries())

    def _static(self) -> tuple[Rule, ...]:
        return (*super()._static(), *conntrack.rules(self._pipeline))

    async def wipe(self) -> None:
        await super().wipe()
        txid = self._channel.next_txid()
        self._insist(await self._channel.transact(conntrack.flush_all(txid), txid), "wipe of its tracker")
        self._owners = conntrack.Owners()

    async def _asked(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except OvsError as error:
            raise SwitchError(
                f"no connection tracking (`switch.nat: conntrack` is for an Open vSwitch with datapath_type=netdev): {error}"
            ) from None

    # -- next hops -----------------------------------------------------------------------------------------

    @property
    def _groups_stand(self) -> bool:
        return False

    async def _write_group(self, key: int, *, new: bool = False) -> None:
        await super()._write_group(key, new=new)
        group, hop = self._hops.groups[key], self._hops.hop(key)
        await self._rules((conntrack.towards(self._pipeline, hop, group),))

    def without_next_hop(self, event: PacketIn) -> tuple[int, int] | None:
        group = conntrack.group_of(event.cookie)
        key = self._hops.key_of(group) if group is not None else nexthops.NO_ROUTE
        return nexthops.place(key) if key else None

    # -- nothing is in front -------------------------------------------------------------------------------

    @property
    def room_in_front(self) -> int:
        return 0

    async def set_front(self, ids: Ids, front: bool) -> Ids:
        return NO_IDS if front else np.unique(ids)

    # -- entries -------------------------------------------------------------------------------------------

    async def _entries(self) -> Entries:
        return await self._asked(ovs_tracker.dump(self._ovs))

    async def _found(self) -> Rows:
        return conntrack.as_rules(await self._entries())

    async def _left(self) -> Rows:
        """Of an agent whose sessions were rules, too."""
        return np.concatenate((await super()._left(), await self._found()))

    async def recover(self) -> int:
        held = await super().recover()
        hops = [(self._hops.hop(key), group) for key, group in self._hops.groups.items()]
        await self._rules(tuple(conntrack.towards(self._pipeline, hop, group) for hop, group in hops))
        return held

    async def _add(self, records: Records, groups: NextHopGroups, priority: Numbers | int) -> Records:
        before, stay = self._owners.enter(records)
        await self._flush(before)
        return await super()._add(
            records[stay], NextHopGroups(groups.internal[stay], groups.external[stay]), SESSION_PRIORITY
        )

    async def _delete(self, records: Records, priority: Numbers | int) -> None:
        """But for those whose 5-tuple is another session's by now."""
        await super()._delete(records[self._owners.leave(records)], SESSION_PRIORITY)

    async def _delete_cookies(self, cookies: Numbers) -> None:
        if not len(cookies):
            return
        found = await self._entries()
        found = found[np.isin(found["id"], cookies & ~np.uint64(INBOUND))]
        self._owners.leave(found)
        await self._flush(found)

    async def _flush(self, tuples: Rows) -> None:
        for at in range(0, len(tuples), CHUNK):
            txid = self._channel.next_txid()
            data = conntrack.flushes(tuples[at : at + CHUNK], txid)
            self._insist(await self._channel.transact(data, txid), "deletion of entries")

    async def reconcile(self, *, refresh: bool = False) -> Reconciled:
        self._reshaped = False  # an entry knows no port
        if refresh:
            await self.refresh()
        done = await super().reconcile()
        txid = self._channel.next_txid()
        rules = openflow.delete_by_cookie(SESSION_CLASS, CLASS_MASK, txid)  # see _left
        self._insist(await self._channel.transact(rules, txid), "deletion of rules of sessions")
        return done

    async def refresh(self) -> int:
        """Tells the store which sessions were used; those without the entry that they should have get it.

        Returns how many were used. Raises ChannelLost, SwitchError.
        """
        ruled = np.fromiter(self._ruled, np.uint64, len(self._ruled))
        found = await self._entries()
        found = found[np.argsort(found["id"])]
        used, wrong = 0, [NO_IDS]
        async for page in self._store.sessions():
            if not len(found):
                break
            at = np.minimum(np.searchsorted(found["id"], page["id"]), len(found) - 1)
            known = found["id"][at] == page["id"]
            same = [
                found[name][at] == page[name] for name in ("external_addr", "external_port", "internal_addr")
            ]
            wrong.append(page["id"][known & ~np.all(same, axis=0)])
            idle = found["idle"][at].astype(np.uint64) * np.uint64(1000)
            later = known & (idle + np.uint64(_WHOLE) < page["idle_ms"])
            if later.any():
                active: Any = page[later].copy()
                active["idle_ms"] = idle[later]
                active["flags"] |= FLAG_OFFLOAD
                for name in ("packets_out", "packets_in", "bytes_out", "bytes_in"):
                    active[name] = 0
                used += await self._store.update(active)
        await self._flush(found[np.isin(found["id"], np.concatenate(wrong))])
        lost = np.concatenate((np.setdiff1d(ruled, found["id"]), *wrong)).tolist()
        lost = [one for one in lost if one in self._ruled]
        if lost:
            for one in lost:
                del self._ruled[one]
            self.refused["entries"] += len(lost)
            self._report(f"the switch has no entries of {len(lost)} sessions: they are made again")
            await self._each(np.array(lost, np.uint64), self._offload)
            await self._known()
        return used
