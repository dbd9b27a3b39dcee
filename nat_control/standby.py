# SPDX-License-Identifier: Apache-2.0
"""Which of two servers carries: what one of them knows, and what it does about it. Pure, without a clock.

Both decide by the same rules, each by its own view. What must not wait is prepared: ``at_death`` is what the heartbeat's
thread makes of STANDBY in the moment of a death (nat_fastpath/heartbeat_role.h), and PROBING becomes ACTIVE or STANDBY in the
core (nat_fastpath/core/standby.c).
"""

from __future__ import annotations

from dataclasses import dataclass

from nat_fastpath.role import RoleState

# Seconds. A server that starts, until it takes an unheard peer for absent; the secondary lets the primary be first.
START = {True: 1.0, False: 5.0}
AGAIN = 1.0  # between two probes while a peer that is not heard answers on the ports
SETTLED = 0.25  # that nothing has changed, before somebody takes what nobody carries
LATE = 3.0  # for whom it is the turn, while both are not in step
LAST = 6.0  # for the other one
# Two that carry, and do not get in step: when one stands down all the same. The first by its term and with nothing of the
# other one's, then the last by its term if it is that one, for it has not what the pair had, then the first in any case.
MERGE, MERGE_NEW, MERGE_LAST = 5.0, 7.5, 10.0
# That nobody has carried while this one stood by, whatever has changed meanwhile: then it asks on the ports.
NOBODY = {True: 10.0, False: 15.0}
STEADY = 5.0  # that the secondary carries in step, before the primary takes it back by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one server knows. ``quiet``: seconds since any of state, alive, synced, fit and what the peer tells has changed."""

    state: RoleState
    term: int
    primary: bool
    both: bool = False  # on_split
    automatic: bool = False  # return
    fit: bool = True  # all ports have a link, and all workers move
    seen: bool = True  # the peer was heard since we have started
    alive: bool = True  # it is heard
    lost: float = 0.0  # seconds since it was heard, or since we have started
    carries: bool = False  # what it tells
    peer_fit: bool = True
    peer_term: int = 0
    synced: bool = True  # each holds the other's sessions
    stepped: bool = True  # that was so once since we have started
    equal: bool = True  # and no digest and no refusal says otherwise
    quiet: float = 0.0
    uncarried: float = 0.0  # seconds that this one has stood by, and heard of nobody who carries


Decision = tuple[RoleState | None, str]  # what to become, and why; None: what it is
STAY: Decision = None, ""


def decide(v: View) -> Decision:
    if v.state is RoleState.PROBING:
        return STAY
    if v.uncarried >= NOBODY[v.primary]:
        return RoleState.PROBING, f"nobody has carried for {NOBODY[v.primary]:g} s"
    if not v.alive:
        return STAY if v.state is RoleState.ACTIVE else _alone(v)
    if v.state is RoleState.ACTIVE:
        return _two_carry(v) if v.carries else STAY
    return _other_carries(v) if v.carries else _nobody_carries(v)


def _alone(v: View) -> Decision:
    """Standing by, without a peer that is heard."""
    if v.both and v.stepped:  # else it may lack every session: who answers on the ports is believed
        return RoleState.ACTIVE, "the peer is not heard"
    if v.quiet < AGAIN or v.lost < (AGAIN if v.seen else START[v.primary]):
        return STAY
    return RoleState.PROBING, "no peer is heard" if v.seen else "no peer is heard since the start"


def _two_carry(v: View) -> Decision:
    """After a split, or when one was stopped for a while: the later takeover stays, in doubt the primary."""
    if (v.term, v.primary) > (v.peer_term, not v.primary):
        if v.stepped or v.quiet < MERGE_NEW:
            return STAY
        return RoleState.STANDBY, "the peer carries too, and this one was never in step since its start"
    if not v.synced and v.quiet < (MERGE_LAST if v.stepped else MERGE):
        return STAY
    return RoleState.STANDBY, f"the peer carries too, since a later takeover ({v.peer_term}, ours {v.term})"


def _other_carries(v: View) -> Decision:
    if not (v.synced and v.fit):
        return STAY
    if not v.peer_fit and v.quiet >= SETTLED:
        return RoleState.ACTIVE, "a port of the peer has no link"
    if v.primary and v.automatic and v.equal and v.quiet >= STEADY:
        return RoleState.ACTIVE, "the primary is back"
    return STAY


def _nobody_carries(v: View) -> Decision:
    turn = (v.fit, v.primary) > (v.peer_fit, not v.primary)
    wait = LAST if not turn else SETTLED if v.synced else LATE
    return (RoleState.ACTIVE, "nobody carries") if v.quiet >= wait else STAY


def at_death(v: View) -> RoleState:
    """What STANDBY becomes when the peer dies."""
    return RoleState.ACTIVE if v.both and v.synced else RoleState.PROBING
