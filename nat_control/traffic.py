# SPDX-License-Identifier: Apache-2.0
"""The operator's verbs `takeover` and `release`: this side takes the traffic of a pair, or gives it to the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from nat_control.api import ApiError, Conversation
from nat_control.loop import monotonic
from nat_control.pair import Pair
from nat_control.sync.actions import State

ASK = 10.0  # seconds that the peer has to move the traffic
OPTIONS = {"takeover": {"force"}, "release": {"force", "later"}}


class Arbiter(Protocol):
    """Who decides which side carries. Whatever it keeps, it keeps until it is moved."""

    @property
    def here(self) -> bool: ...

    @property
    def kept(self) -> bool: ...

    @property
    def forcible(self) -> bool:
        """Whether this side may be told to carry though the peer is not in step."""

    async def move(self, here: bool, *, lasting: bool) -> str:
        """Returns why nothing came of it; "": this side carries, or does not."""

    def let_go(self) -> None:
        """The other side gets the traffic once it can carry."""


class Traffic:
    """Without an ``arbiter`` the peer is asked, who decides. ``sessions``: how many there are here."""

    def __init__(self, pair: Pair, *, sessions: Callable[[], int], arbiter: Arbiter | None = None) -> None:
        self._pair = pair
        self._sessions = sessions
        self._arbiter = arbiter

    @property
    def verbs(self) -> dict[str, Callable[[object, Conversation], Awaitable[None]]]:
        return {"takeover": self._takeover, "release": self._release}

    async def _takeover(self, body: object, conversation: Conversation) -> None:
        options = _options("takeover", body)
        await conversation.send({"takeover": await self._moved(here=True, **options)})

    async def _release(self, body: object, conversation: Conversation) -> None:
        options = _options("release", body)
        await conversation.send({"release": await self._moved(here=False, **options)})

    async def _moved(self, *, here: bool, force: bool = False, later: bool = False) -> dict[str, Any]:
        began, proven = monotonic(), None
        if later:
            if self._arbiter is None:
                return self._answer(
                    "refused", why="the other side decides when it gives the traffic: ask there"
                )
            self._arbiter.let_go()
            return self._answer("later")
        moves, lasting = self._here is not here, here is (self._arbiter is not None)
        unasked = force and here and self._arbiter is not None and self._arbiter.forcible
        # A switch that carries may be told to keep the traffic whoever is there.
        if self._pair.state is not State.OPERATIONAL and (moves or self._arbiter is None) and not unasked:
            hint = (
                "; `peer release --later` gives it the traffic once it is"
                if self._arbiter and not here
                else ""
            )
            return self._answer("refused", why=f"the peer is not in step ({self._pair.state.value}){hint}")
        if moves and not (unasked and self._pair.state is not State.OPERATIONAL):
            proven = await self._pair.view.prove()
            if not force and (why := self._differ(proven)):
                return self._answer("refused", why=why)
            began = monotonic()
        unchanged = not moves and self._kept >= lasting
        if unchanged:
            why = ""
        elif self._arbiter:
            why = await self._arbiter.move(here, lasting=lasting)
        else:
            why = await self._pair.hand_over(here=here, lasting=lasting, timeout=ASK)
        if why:
            return self._answer("refused", why=why)
        ms = round((monotonic() - began) * 1000, 3)
        return self._answer("unchanged" if unchanged else "done", proven=proven, ms=ms)

    @property
    def _here(self) -> bool:
        protocol = self._pair.protocol
        return self._arbiter.here if self._arbiter else protocol.carrier == protocol.instance

    @property
    def _kept(self) -> bool:
        return self._arbiter.kept if self._arbiter else self._pair.protocol.lasting

    def _differ(self, proven: bool) -> str:
        """Why the traffic must not move. Refused sessions are in no digest; without a proof, whether there is one of the
        contrary: under steady new sessions no moment may be quiet enough."""
        protocol = self._pair.protocol
        if protocol.state is not State.OPERATIONAL:
            return f"the peer is not in step ({protocol.state.value})"
        differ = protocol.comparison is not None and protocol.comparison.differing
        if protocol.apart or (differ and not proven):
            return "both sides do not hold the same sessions: `show peer` names them, --force breaks them"
        return ""

    def _answer(self, result: str, *, why: str = "", **more: Any) -> dict[str, Any]:
        return {
            "result": result,
            "why": why,
            "carrier": "here" if self._here else "peer",
            "kept": self._kept,
            "sessions": self._sessions(),
            "proven": None,
            "ms": None,
            **more,
        }


def _options(verb: str, body: object) -> dict[str, bool]:
    if not isinstance(body, dict) or not set(body) <= OPTIONS[verb]:
        raise ApiError(f"{verb}: takes nothing but {' and '.join(sorted(OPTIONS[verb]))}")
    if not all(isinstance(value, bool) for value in body.values()):
        raise ApiError(f"{verb}: options are true or false")
    return body


async def _none(body: object, conversation: Conversation) -> None:
    raise ApiError("this instance has no peer, or peer.mode is off")


NO_PEER = {"takeover": _none, "release": _none}
