# SPDX-License-Identifier: Apache-2.0
"""The server's side of offloading: looks at its sessions, asks the peer's switch to carry the heavy ones, and what the
operator wants. What it has asked for is true when the switch's side says so.

A look at a million sessions is 245 commands to the workers, as one digest is, and as much numpy (docs/switch.md says how long).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from nat_control.api import ApiError, Conversation, Pages, count, parse_filter, rows_of
from nat_control.config import Config
from nat_control.dataplane import NO_IDS, NO_RECORDS, DataPlane, Events, Ids, Records
from nat_control.offload import REFUSED, FrontView, Policy, may_move, why_not
from nat_control.sync import actions as do
from nat_control.sync.actions import State
from nat_control.sync.codec import MAX_FRONT
from nat_control.sync.protocol import Protocol
from nat_control.sync.transport import Transport
from nat_fastpath.engine import EVENT_CLOSE, FLAG_OFFLOAD

PATIENCE = 20.0  # seconds for an answer; a switch has 10 for each of its barriers
INTERVAL = 5.0  # seconds between two looks at what was moved by hand, without a policy
BY_HAND = 4096  # sessions of one command
LEAVE = 600.0  # seconds that the policy leaves alone what was taken back by hand
ROWS = 256  # in a line of an answer
NO_PEER = "no switch could carry anything: there is no peer now"


def marked_pages(pages: Pages, front: Callable[[], Ids]) -> Pages:
    """``pages``, with FLAG_OFFLOAD for the sessions that are in front."""

    def marked(cursor: int, maximum: int) -> tuple[Records, int]:
        records, following = pages(cursor, maximum)
        if len(ids := front()):
            records["flags"][np.isin(records["id"], ids)] |= FLAG_OFFLOAD
        return records, following

    return marked


def ids_of(body: dict[str, Any]) -> Ids:
    """Of ``"ids": ["1010000200000007", …]``. Raises ApiError."""
    given = body.get("ids", [])
    try:
        if not isinstance(given, list):
            raise TypeError
        return np.array([int(one, 16) for one in given], np.uint64)
    except (TypeError, ValueError, OverflowError):
        raise ApiError(f"offload: {given!r} are no ids of sessions, as `show sessions` shows them") from None


async def send_rows(conversation: Conversation, rows: list[dict[str, Any]]) -> None:
    for at in range(0, len(rows), ROWS):
        await conversation.send({"rows": rows[at : at + ROWS]})


async def listed(
    body: object, conversation: Conversation, plane: DataPlane, front: Ids, **more: object
) -> None:
    """The verb of whoever does not decide: the sessions in front, and nothing else."""
    if body != {"list": {}}:
        raise ApiError("the server decides what is offloaded: ask there")
    async for page in plane.sessions():
        await send_rows(conversation, rows_of(page[np.isin(page["id"], front)]))
    await conversation.send({"offload": {"in_front": len(front), **more}})


class Offloader:
    """Its owner passes on what the transport tells (``notice``) and the plane's events, and calls ``run`` as a task.
    ``clock``: seconds, monotonic."""

    def __init__(
        self,
        config: Config,
        protocol: Protocol,
        transport: Transport,
        plane: DataPlane,
        clock: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._protocol = protocol
        self._transport = transport
        self._plane = plane
        self._clock = clock
        self._say = say
        self.view = FrontView()
        self.policy = Policy(config.offload) if config.offload else None
        self.pinned = NO_IDS  # moved by hand
        self.counts: Counter[str] = Counter()
        self._answers: dict[int, asyncio.Future[Ids | None]] = {}
        self._lock = asyncio.Lock()  # one move after the other
        self._again = 0.0  # when those of the pinned are asked for again that are not in front

    def reconfigured(self, config: Config) -> None:
        """Another configuration is in force."""
        if config.offload and self.policy:
            self.policy.wanted = config.offload
        else:
            self.policy = Policy(config.offload) if config.offload else None

    # -- what happens --------------------------------------------------------------------------------------

    def notice(self, action: do.Action) -> None:
        match action:
            case do.StateChanged(before) if before is State.OPERATIONAL:
                self.view.lost()
                self._again = 0.0
                for answer in self._answers.values():
                    if not answer.done():
                        answer.set_result(None)
            case do.FrontMoved(txid, room, ids):
                stays = self.view.moved(txid, room, ids, self._clock())
                if (waiting := self._answers.get(txid)) is not None and not waiting.done():
                    waiting.set_result(stays)
            case do.FrontSeen(ms, room, carried):
                keep = self.policy.wanted.keep_packets_per_second if self.policy else 0
                self.view.seen(ms, room, carried, self._clock(), keep)

    def events(self, events: Events) -> None:
        """What ends is not in front any more: its rules go with it."""
        if len(self.view.ids) or len(self.pinned) or self.view.asked:
            ended = events["id"][events["type"] == EVENT_CLOSE]
            self.view.ended(ended)
            self.pinned = np.setdiff1d(self.pinned, ended)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.policy.wanted.interval_seconds if self.policy else INTERVAL)
            # while the switch carries everything there is nothing to be in front of, and rates come in jumps
            if (
                self._protocol.state is State.OPERATIONAL
                and self._protocol.carrier == self._protocol.instance
            ):
                await self._turn()

    async def _turn(self) -> None:
        now, missing = self._clock(), np.setdiff1d(self.pinned, self.view.ids)
        if len(missing) and now >= self._again:  # the connection was lost, or the switch
            self._again = now + REFUSED
            await self._move(missing[: self.view.room], True)
        if self.policy is None:
            await self._move(np.setdiff1d(self.view.ids, self.pinned), False)
            return
        async for page in self._plane.sessions():
            self.policy.look(page, self._clock())
        choice = self.policy.choose(self.view, self.pinned, self._clock())
        await self._move(choice.back, False)
        if stays := await self._move(choice.there, True):
            self.policy.rest(np.array(stays, np.uint64), self._clock() + REFUSED)

    async def _move(self, ids: Ids, front: bool) -> list[int] | None:
        """Those that did not move; None when nobody answers."""
        if not len(ids):
            return []
        async with self._lock:
            if self._protocol.state is not State.OPERATIONAL:
                return None
            txid = self.view.ask(ids, front)
            self._answers[txid] = asyncio.get_running_loop().create_future()
            self._transport.ask_front(txid, ids, front)
            stays = None
            with contextlib.suppress(TimeoutError):
                stays = await asyncio.wait_for(self._answers[txid], PATIENCE)
            del self._answers[txid]
        if stays is not None:
            self.counts["there" if front else "back"] += len(ids) - len(stays)
            self.counts["refused"] += len(stays)
            if len(stays):
                self._say(f"offload: the switch leaves {count(len(stays), 'session')} where it is")
        return None if stays is None else stays.tolist()

    def marked(self, pages: Pages) -> Pages:
        """``pages`` of sessions, with FLAG_OFFLOAD for those in front."""
        return marked_pages(pages, lambda: self.view.ids)

    # -- the operator --------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return {
            "in_front": len(self.view.ids),
            "by_hand": len(np.intersect1d(self.view.ids, self.pinned)),
            "room": self.view.room,
            "policy": self.policy is not None,
            **{name: self.counts[name] for name in ("there", "back", "refused")},
        }

    async def verb(self, body: object, conversation: Conversation) -> None:
        """``{"offload": {"list": {}}}``, ``{"offload": {"add": {"ids": [...], "filter": {...}}}}``, ``remove`` likewise."""
        if not isinstance(body, dict) or len(body) != 1 or not {"list", "add", "remove"} & set(body):
            raise ApiError("offload: takes one of list, add and remove")
        ((what, asked),) = body.items()
        if not isinstance(asked, dict) or set(asked) - {"ids", "filter"}:
            raise ApiError(f"offload: {what} takes ids and a filter")
        if what == "list":
            await self._list(conversation)
        else:
            await conversation.send({"offload": await self._by_hand(asked, front=what == "add")})

    async def _list(self, conversation: Conversation) -> None:
        async for page in self._plane.sessions():
            await send_rows(conversation, self._rows(page[np.isin(page["id"], self.view.ids)]))
        await conversation.send({"offload": self.status()})

    def _rows(self, records: Records) -> list[dict[str, Any]]:
        rates = dict(zip(self.view.ids.tolist(), self.view.fronts["rate"].tolist(), strict=True))
        pinned = set(self.pinned.tolist())
        rows = []
        for number, row in zip(records["id"].tolist(), rows_of(records), strict=True):
            rate = rates.get(number, np.inf)
            known = {"rate": None if np.isinf(rate) else round(rate, 1)}
            rows.append({**row, "by": "hand" if number in pinned else "policy", **known})
        return rows

    async def _by_hand(self, asked: dict[str, Any], *, front: bool) -> dict[str, Any]:
        records = await self._chosen(ids_of(asked), asked.get("filter", {}))
        if self._protocol.state is not State.OPERATIONAL:
            raise ApiError(NO_PEER)
        there = np.isin(records["id"], self.view.ids)
        can = may_move(records) | there if front else there
        refused = [(row, why_not(row) if front else "it is not offloaded") for row in records[~can]]
        due = records["id"][can & ~there if front else can]
        if front:
            self.pinned = np.union1d(self.pinned, records["id"][there])
        else:
            self.pinned = np.setdiff1d(self.pinned, records["id"])
            if self.policy:
                self.policy.rest(due, self._clock() + LEAVE)
        room = self.view.room if front else len(due)
        stays = await self._move(due, front)
        if stays is None:
            raise ApiError("the peer has not answered: `offload list` tells what is so")
        moved = due[~np.isin(due, np.array(stays, np.uint64))]
        if front:
            self.pinned = np.union1d(self.pinned, moved)
        if not front:
            why = "the switch would not move it"
        elif len(due) > room:
            why = f"the switch has room for {room} more"
        else:
            why = "the switch has no rules for it: no room, or its next hop is not known"
        refused += [(row, why) for row in records[np.isin(records["id"], np.array(stays, np.uint64))]]
        return {
            **self.status(),
            "moved": [f"{number:016x}" for number in moved.tolist()],
            "refused": [{"id": f"{int(row['id']):016x}", "why": why} for row, why in refused],
        }

    async def _chosen(self, ids: Ids, wanted: object) -> Records:
        """The sessions of these ids, or all that there are, which the filter lets through. Raises ApiError."""
        matches = parse_filter(wanted)
        if not len(ids) and not wanted:
            raise ApiError("offload: which sessions? Name them by their ids, or by a filter")
        found, n = [NO_RECORDS], 0
        async for page in self._plane.sessions():
            mask = matches(page)
            if len(ids):
                mask &= np.isin(page["id"], ids)
            found.append(page[mask])
            n += len(found[-1])
            if n > min(BY_HAND, MAX_FRONT):
                raise ApiError(f"offload: more than {BY_HAND} sessions are meant: say it more closely")
        records = np.concatenate(found)
        if len(unknown := np.setdiff1d(ids, records["id"])) and not wanted:
            raise ApiError(f"session {int(unknown[0]):016x}: there is none")
        if not len(records):
            raise ApiError("offload: there is no such session")
        return records


async def no_switch(body: object, conversation: Conversation) -> None:
    """The verb of an instance without a peer."""
    raise ApiError("this instance has no peer whose switch could carry anything, or peer.mode is off")
