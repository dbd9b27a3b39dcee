# SPDX-License-Identifier: Apache-2.0
"""One of two servers: keeps its role as standby.py decides, and answers the peer and the operator who want to move it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nat_control.config import Config
from nat_control.pair import Pair
from nat_control.standby import View, at_death, decide
from nat_control.sync import actions as do
from nat_control.sync.actions import Precedence, State
from nat_fastpath.role import Role, RoleState

TICK = 0.01  # seconds
LOOK_AT_LINKS = 5  # ticks
MOVE = 2.0  # seconds until a role that was asked for is there
WORDS = {
    RoleState.ACTIVE: "carries",
    RoleState.STANDBY: "stands by",
    RoleState.PROBING: "asks on the ports whether another one carries",
}


def role_of(config: Config) -> Role | None:
    """A role for a server whose peer is a server; it begins silent."""
    if (
        config.peer is None
        or config.peer.mode == "off"
        or config.peer.twin is None
        or config.heartbeat is None
    ):
        return None
    twin = config.peer.twin
    return Role(RoleState.STANDBY, probe=twin.probe_ms / 1000, both=twin.on_split == "both")


class Twin:
    """``fit``: whether all ports have a link. ``bind`` it to the pair before ``run``. The operator's Arbiter, too."""

    def __init__(
        self,
        config: Config,
        role: Role,
        *,
        clock: Callable[[], float],
        say: Callable[[str], None],
        fit: Callable[[], bool],
    ) -> None:
        assert config.peer
        assert config.peer.twin
        assert config.heartbeat
        self._config, self._silence = (
            config.peer.twin,
            config.heartbeat.interval_ms * config.heartbeat.misses / 1000,
        )
        self._role = role
        self._clock = clock
        self._say = say
        self._fit = fit
        self._pair: Pair | None = None
        self._told: tuple[object, ...] = ()
        self._since = self._heard = self._carried = clock()
        self._seen = self._stepped = self._left = False
        self._links = True
        self._at_death: RoleState | None = None
        self._said = self._wanted = role.state
        self._reason = ""
        self.why = "it has just started"

    def bind(self, pair: Pair) -> None:
        self._pair = pair
        pair.protocol.precedence = Precedence.STANDS_BY

    async def run(self) -> None:
        turn = 0
        while True:
            if turn % LOOK_AT_LINKS == 0:
                self._links = self._fit()
            turn += 1
            self._step()
            await asyncio.sleep(TICK)

    def view(self) -> View:
        assert self._pair
        pair, now, heard = self._pair, self._clock(), self._pair.watch.stats()
        alive = bool(heard["alive"])
        synced = pair.state is State.OPERATIONAL
        if alive:
            self._seen, self._heard = True, now
        self._stepped |= synced
        fit = self._links and not heard["stalled"]
        if self._role.state is not RoleState.STANDBY or (alive and heard["peer_carries"]):
            self._carried = now
        told = (
            self._role.state,
            fit,
            alive,
            heard["peer_carries"],
            heard["peer_unfit"],
            heard["peer_term"],
            synced,
        )
        if told != self._told:
            self._told, self._since = told, now
        return View(
            state=self._role.state,
            term=self._role.term,
            primary=self._config.primary,
            both=self._config.on_split == "both",
            automatic=self._config.returns == "automatic",
            fit=fit,
            seen=self._seen,
            alive=alive,
            lost=now - self._heard,
            carries=bool(heard["peer_carries"]),
            peer_fit=not heard["peer_unfit"],
            peer_term=heard["peer_term"],
            synced=synced,
            stepped=self._stepped,
            equal=not pair.differing and not pair.protocol.apart,
            quiet=now - self._since,
            uncarried=now - self._carried,
        )

    def _step(self) -> None:
        assert self._pair
        if self._left:
            return
        view = self.view()
        self._role.unfit = not view.fit
        # who was in step has all that the other one needs, or has given it; else half a NAT is better than none
        self._role.yields = view.alive and view.stepped and view.peer_fit
        if (prepared := at_death(view)) is not self._at_death:
            self._at_death = prepared
            self._pair.watch.follow(self._role.address, prepared)
        if self._seen:  # who has never met anybody has nobody to give way to
            self._role.fence = min(self._silence, self._its_silence or self._silence)
        wanted, why = decide(view)
        if wanted is not None:
            self._become(wanted, why, view)
        self._notice_state()

    def _become(self, wanted: RoleState, why: str, view: View) -> None:
        if wanted is RoleState.ACTIVE:
            self._role.term = max(view.term, view.peer_term) + 1
        self._since = self._clock()  # a probe may be answered before the next look
        self._wanted, self._reason = wanted, why
        self._role.state = wanted

    def _notice_state(self) -> None:
        """Heartbeat and core change it as well."""
        assert self._pair
        protocol, state = self._pair.protocol, self._role.state
        here = state is RoleState.ACTIVE
        if here and self._wanted is RoleState.PROBING:  # a takeover like any other
            self._role.term = max(self._role.term, self._pair.watch.stats()["peer_term"]) + 1
        protocol.precedence = Precedence.CARRIES if here else Precedence.STANDS_BY
        if protocol.peer is None:
            protocol.term = self._role.term
        if state in (RoleState.PROBING, self._said):
            return
        self._said = state
        self.why = self._reason if state is self._wanted else self._changed_by_others(state)
        self._wanted = state
        self._say(f"role: {WORDS[state]}: {self.why}")
        if here:
            self._tell("")

    def _changed_by_others(self, state: RoleState) -> str:
        assert self._pair
        if state is RoleState.STANDBY and self._pair.watch.stats()["stalled"]:
            return "a worker stands still, and the peer can carry"
        if state is RoleState.STANDBY:
            return "this process stood still, and another one answers on the ports since"
        fired = self._pair.watch.fired
        why = f"the peer is dead ({fired})" if fired else self._reason
        return why if self._config.on_split == "both" and fired else f"{why}, and nobody answers on the ports"

    def _tell(self, why: str) -> None:
        """The peer hears who carries, or why nothing came of what it has asked for."""
        assert self._pair
        protocol = self._pair.protocol
        if protocol.peer is not None:
            carrier = protocol.instance if self.here else protocol.peer.instance
            self._pair.transport.carries(carrier, lasting=False, why=why)

    @property
    def _its_silence(self) -> float:
        """Seconds without a heartbeat of ours after which the peer takes over; 0: it has not told."""
        assert self._pair
        return self._pair.watch.stats()["peer_silence_us"] / 1e6

    def leave(self) -> None:
        """This process ends: from here on it is silent, and answers nobody who asks on the ports."""
        self._left = True
        self._role.yields = False
        self._role.state = RoleState.STANDBY

    # -- the peer, and the operator

    def notice(self, action: do.Action) -> None:
        """The peer wants one of us to carry; one that has just come must hear who does."""
        if isinstance(action, do.StateChanged) and action.after is State.OPERATIONAL and self.here:
            self._tell("")
        if isinstance(action, do.Carry) and self._pair is not None:
            wanted = action.carrier == self._pair.protocol.instance
            if wanted and not self.here:
                self._become(RoleState.ACTIVE, "the peer has asked for it", self.view())
                self._notice_state()  # which tells it
            elif wanted:
                self._tell("")
            else:
                self._tell("the other one takes what it wants by itself")

    @property
    def here(self) -> bool:
        return self._role.state is RoleState.ACTIVE

    @property
    def kept(self) -> bool:
        """Nothing but a failure moves it."""
        return not (self._config.returns == "automatic" and self.here is not self._config.primary)

    @property
    def forcible(self) -> bool:
        return True

    async def move(self, here: bool, *, lasting: bool) -> str:
        """Who is not heard, or not in step, is not waited for: of two that carry one stands down later."""
        assert self._pair
        if here:
            self._stepped = True  # the operator says that what is here is enough
            self._become(RoleState.ACTIVE, "takeover by the operator", self.view())
            self._notice_state()
        elif why := await self._pair.hand_over():
            return why
        try:
            async with asyncio.timeout(MOVE):
                while self._peer_carries_in_step is here or self.here is not here:
                    await asyncio.sleep(TICK)
        except TimeoutError:
            return "the peer has not changed its role"
        return ""

    @property
    def _peer_carries_in_step(self) -> bool | None:
        view = self.view()
        return view.carries if view.alive and view.synced else None

    def let_go(self) -> None:
        """Nothing is kept: the other one takes over when this one fails, and not before."""

    def status(self) -> dict[str, Any]:
        view = self.view()
        return {
            "role": WORDS[view.state],
            "why": self.why,
            "configured": "primary" if view.primary else "secondary",
            "on_split": self._config.on_split,
            "term": view.term,
            "peer": (WORDS[RoleState.ACTIVE if view.carries else RoleState.STANDBY])
            if view.alive
            else "not heard",
            "peer_term": view.peer_term,
            "seconds": round(view.quiet, 3),
            "links": view.fit,
            "probes": self._role.counts(),
        }

    def conditions(self) -> dict[str, str]:
        """What should not be, by name."""
        assert self._pair
        view, found = self.view(), {}
        if view.alive and self._its_silence and round(self._its_silence / self._silence, 3) != 1:
            found["silence"] = (
                f"the peer waits {self._its_silence * 1000:g} ms for our heartbeats, and we {self._silence * 1000:g} ms for its: "
                "make interval_ms and misses of `heartbeat` the same in both files"
            )
        its = "both" if self._pair.watch.stats()["peer_both"] else "primary"
        if view.alive and self._its_silence and its != self._config.on_split:
            found["on_split"] = (
                f"peer.on_split is {its} at the peer, and {self._config.on_split} here: make it the same in both files"
            )
        if view.alive and view.carries and view.state is RoleState.ACTIVE:
            found["role"] = "both servers carry: one stands down once both are in step"
        elif view.alive and not view.carries and view.state is RoleState.STANDBY:
            found["role"] = "neither server carries"
        elif not view.alive and view.state is not RoleState.ACTIVE:
            found["role"] = (
                "the peer is not heard, and another one answers on the ports: this server stays silent"
            )
        return found
