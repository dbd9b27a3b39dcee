# SPDX-License-Identifier: Apache-2.0
"""What an operator sees of the peer: whether both sides hold the same, by a digest of now, and which sessions differ."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nat_control.api import ApiError, Conversation, count, rows_of
from nat_control.dataplane import NO_IDS, NO_RECORDS, DataPlane, Ids, Records
from nat_control.sync import actions as do
from nat_control.sync.actions import State
from nat_control.sync.protocol import Protocol
from nat_control.sync.transport import Transport

SHOWN = 100  # sessions of a kind in an answer
VERIFY = 5.0  # seconds to prove that both are equal; what differs is mended meanwhile
AGAIN = 1.0  # seconds until a digest that did not come about is tried again
NAMES = ("id", "protocol", "internal", "external", "remote")


class StateLog:
    """What the log says of states; a greeting that fails again for the same reason is not told again."""

    def __init__(self) -> None:
        self._why = ""
        self._again = False  # this attempt may end like the one before

    def line_of(self, change: do.StateChanged) -> str | None:
        if (change.before, change.after) == (State.HANDSHAKE, State.FAILED):
            told, self._why = self._why == change.why, change.why
            self._again = True
            if told:
                return None
        elif self._again and change.after in (State.ALONE, State.HANDSHAKE):
            return None
        else:
            self._why, self._again = "", False
        return f"peer: {change.before.value} -> {change.after.value}: {change.why}"


def line_of(action: do.Action) -> str | None:
    """What the log says of what both sides hold; None: nothing, or not this module's."""
    match action:
        case do.Conflicts(ids, here):
            return f"peer: {count(len(ids), 'session')} refused {'here' if here else 'there'}: contradicted, or no room"
        case do.DigestCompared(differing) if differing:
            return f"peer: {len(differing)} of 256 digests differ"
        case do.Mended(told, ended, wanted):
            return (
                f"peer: of what differed {len(told)} told, {len(ended)} ended here, {len(wanted)} asked for"
            )
        case do.Gap(first, last):
            return f"peer: changes {first}-{last} never came: asked for again"
    return None


class PeerView:
    """Of a pair, whose owner passes on to ``notice`` what the transport tells. ``clock``: that of the machine, in seconds."""

    def __init__(
        self, protocol: Protocol, transport: Transport, plane: DataPlane, clock: Callable[[], float]
    ) -> None:
        self._protocol = protocol
        self._transport = transport
        self._plane = plane
        self._clock = clock
        self._news = asyncio.Event()
        self._here, self._there = NO_RECORDS, NO_IDS  # what differed since a verification began

    def notice(self, action: do.Action) -> None:
        if isinstance(action, do.Mended):
            self._here = np.concatenate([self._here, self._protocol.only_ours])[:SHOWN]
            self._there = np.concatenate([self._there, action.wanted])[:SHOWN]
        if isinstance(action, do.DigestCompared):
            self._news.set()

    async def prove(self) -> bool:
        """Whether a digest that is taken now, or after a mend, is equal."""
        self._here, self._there = NO_RECORDS, NO_IDS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(VERIFY):
                while self._protocol.state is State.OPERATIONAL:
                    self._news.clear()
                    self._transport.verify()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), AGAIN)
                    told = self._protocol.comparison
                    if self._news.is_set() and told is not None and not told.differing:
                        return True
        return False

    async def _held(self, ids: Ids) -> Records:
        found = [NO_RECORDS]
        if len(ids):
            async for page in self._plane.sessions():
                found.append(page[np.isin(page["id"], ids)])
        return np.concatenate(found)

    async def verb(self, body: object, conversation: Conversation) -> None:
        """``{"peer": {}}`` compares first, ``{"peer": {"verify": false}}`` does not."""
        verify = body.get("verify", True) if isinstance(body, dict) and set(body) <= {"verify"} else None
        if not isinstance(verify, bool):
            raise ApiError('peer: takes nothing but {"verify": true or false}')
        proven = await self.prove() if verify else None
        await conversation.send({"peer": await self._answer(proven)})

    async def _answer(self, proven: bool | None) -> dict[str, Any]:
        protocol, told = self._protocol, self._protocol.comparison
        differed = _names(self._here, "here")
        differed += [{"id": f"{number:016x}", "held": "there"} for number in self._there.tolist()]
        refused = _names((await self._held(protocol.refused_there[:SHOWN])), "here")
        refused += _names(protocol.refused_here[:SHOWN], "there")
        return {
            "state": protocol.state.value,
            "mode": protocol.mode.value,
            "instance": protocol.peer.instance if protocol.peer else None,
            "carrier": None
            if protocol.carrier is None
            else "here"
            if protocol.carrier == protocol.instance
            else "peer",
            "kept": protocol.lasting,
            "epoch": protocol.epoch,
            "term": protocol.term,
            "last_error": protocol.last_error,
            "verified": proven,
            "digest": None
            if told is None
            else {
                "seconds_ago": round(self._clock() - told.when, 3),
                "equal": not told.differing,
                "differing": len(told.differing),
                "ours": told.ours,
                "theirs": told.theirs,
            },
            "differed": differed,
            "refused": refused,
            "refused_total": len(protocol.refused_there) + len(protocol.refused_here),
            "counts": {name: getattr(protocol, name) for name in ("conflicts", "mended", "gaps")},
            "under_way": {"batches": protocol.outstanding, "records": protocol.waiting},
            "messages": {way: dict(counter) for way, counter in protocol.messages.items()},
        }


def _names(records: Records, held: str) -> list[dict[str, Any]]:
    return [{**{name: row[name] for name in NAMES}, "held": held} for row in rows_of(records)]


async def no_peer(body: object, conversation: Conversation) -> None:
    """The verb of an instance without a pair."""
    raise ApiError("this instance has no peer, or peer.mode is off")
