# SPDX-License-Identifier: Apache-2.0
"""What must hold, by name. ``python -m tests.sim.mutants`` shows that each can fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nat_control.sync.actions import ErrorCode, State
from nat_control.sync.codec import HEADER, MAX_PAYLOAD, Error
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_PENDING
from tests.memory_plane import key_of, outside
from tests.sim.scenario import BROKEN

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

RULES = {
    "released": "in synchronous mode no packet leaves before the peer's plane holds its session",
    "protected": "what was acknowledged is not lost with one instance",
    "endpoint": "an external endpoint has one inside endpoint within what one side holds",
    "live": "no session that carries packets is ended by its owner's timer, whoever carries",
    "alone": "who is alone owns all sessions",
    "bounded": "queues, windows and messages keep to their limits",
    "bytes": "what is sent can be read",
    "held": "no packet waits longer than the limits say",
    "operational": "with a healthy network both become operational in bounded time",
    "rest": "nothing is under way forever",
    "given up": "nobody gives up a connection without a fault of it, unless too much waits",
    "equal": "at rest both sides hold the same, but for refused sessions that both can name, and know it",
    "content": "at rest what both hold has the same endpoints and TCP state",
    "owner": "at rest each session has one owner",
    "ports": "at rest no port is taken without a session",
    "digest": "digests differ for a reason only",
    "asked": "nobody carries, or is told so, without being asked",
    "refused": "in its first connection, with room enough, each side takes what the other has",
    "front": "what is taken for carried in front of the server is carried there, and there is room for it",
    "next hops": "at rest both know the same next hops",
}
HELD = 30.0  # seconds that a packet waits at most: acknowledgement, and what is told again
OPERATIONAL = (
    60.0  # seconds from the end of all faults: a plane that hung, an exchange that ends for it, the next
)
REFUSING = frozenset(("full", "refuse", "split", "freeze", *BROKEN))
# What lets a connection be, or ends it without an error.
HARMLESS = frozenset(("crash", "cut", "leave", "split", "full", "refuse"))
CROSSING = 2.0  # seconds that news may be on its way, and looks as much younger than it is
UNSURE = frozenset(("slow", "mute", *BROKEN))  # activity may be told too late


class Violation(AssertionError):
    """A rule is broken; the message says which."""

    def __init__(self, rule: str, what: str) -> None:
        assert rule in RULES
        super().__init__(f"{rule}: {what}")
        self.rule = rule


class Flow:
    """The packets of one session, whoever carried them."""

    def __init__(self, now: float) -> None:
        self.since = -1e9  # that no two packets were far apart
        self.last = now
        self.changed = now  # by the last packet that was news

    def packet(self, now: float, apart: float, *, news: bool) -> None:
        if now - self.last > apart:
            self.since = now
        self.last = now
        if news:
            self.changed = now


class Rules:
    """Of one world: what it must remember to judge."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.conflicting: set[int] = set()  # ids that were refused somewhere
        self.ended: set[int] = set()  # ids of sessions that a plane has ended by itself or on purpose
        self.on_purpose: set[int] = set()
        self.flows: dict[int, Flow] = {}
        self.overlapped = (
            False  # traffic moved with a new session on its way: as in a split, both may open it
        )
        self.crossings: list[float] = []  # when traffic moved with news on its way
        self.undeleted = False  # a plane still has what it was told to delete
        self.disturbed = -1e9  # when somebody stood still, or a clock jumped

    def must(self, good: bool, rule: str, what: str) -> None:
        if not good:
            raise Violation(rule, f"{what}, at {self.world.now:.3f}")

    # -- at any time

    def holds(self, node: Node, record: np.void, rule: str, what: str) -> None:
        number = int(record["id"])
        held = node.plane.held.get(key_of(record))
        known = held is not None and held["id"] == number
        excused = number in self.conflicting or number in self.ended
        self.must(known or excused, rule, f"session {number:x} {what}")

    def refuse(self, node: Node, ids: list[int]) -> None:
        """A plane has not taken these, as this node hears."""
        faults = self.world.scenario.faults
        # While it was alone a side may have used again what the other one still held, or what the dead had sent.
        bereft = node.link is None or not node.peer.alive or node.link is not node.peer.link
        reason = (
            faults & REFUSING or self.overlapped or self.undeleted or bereft or self.world.connections > 1
        )
        self.must(bool(reason), "refused", f"{len(ids)} sessions are refused without a reason")
        self.conflicting.update(ids)

    def released(self, node: Node, record: np.void) -> None:
        """After the peer's acknowledgement."""
        if self.world.scenario.lies:
            return
        assert node.link is not None
        guard = node.link.incarnations[node.peer.index]
        if node.peer.alive and node.peer.incarnation == guard:
            self.holds(node.peer, record, "released", "leaves before the peer holds it")
        node.protected[int(record["id"])] = guard

    def fails(self, node: Node) -> None:
        """This one alone: all that its peer has acknowledged is there."""
        if self.world.scenario.lies or not node.peer.alive:
            return
        for held in node.plane.held.values():
            if node.protected.get(int(held["id"])) == node.peer.incarnation:
                self.holds(node.peer, held, "protected", "is lost with its instance")

    def is_live(self, number: int) -> bool:
        """It has packets, none far apart, and for so long that its owner knows."""
        world, flow = self.world, self.flows.get(number)
        timeout = world.scenario.timeout
        if flow is None or world.now - self.disturbed < 2 * timeout or world.scenario.faults & UNSURE:
            return False
        return world.now - flow.last < timeout / 2 and world.now - flow.since > timeout / 2 + 2

    def ends(self, node: Node, record: np.void, *, ordered: bool) -> None:
        """A plane ends this session: by its timer, or as the peer has ordered."""
        number = int(record["id"])
        excused = number in self.on_purpose or number in self.conflicting
        serves = self.world.paired() and (self.world.carrying(node) or not ordered)
        live = serves and not excused and self.is_live(number)
        self.must(not live, "live", f"{node.index} ends {number:x}, which carries packets")
        if not ordered:
            self.ended.add(number)

    def ends_on_purpose(self, number: int) -> None:
        self.on_purpose.add(number)
        self.ended.add(number)

    def queues(self, node: Node) -> None:
        p = node.protocol
        self.must(p.waiting <= p.limits.waiting, "bounded", "too much waits for the peer")
        self.must(p.outstanding <= p.limits.window, "bounded", "the window is exceeded")
        kept = node.decoder.kept
        self.must(kept <= HEADER.size + MAX_PAYLOAD, "bounded", "the decoder keeps too much")

    def gives_up(self, node: Node, error: Error) -> None:
        """A side tells the other what is wrong, or nobody: who died before it accepted cannot answer a Hello."""
        alone = node.link is not node.peer.link
        reason = error.code == ErrorCode.SLOW or alone or not self.world.scenario.faults <= HARMLESS
        self.must(reason, "given up", error.text)

    def ticks(self, node: Node) -> None:
        if node.protocol.state is State.ALONE and not node.operations and not node.working:
            foreign = [held for held in node.plane.held.values() if held["flags"] & FLAG_FOREIGN]
            self.must(not foreign, "alone", f"{node.index} does not own {len(foreign)} of its sessions")
        if self.world.scenario.faults & {"forgetful", "clock", "stall", "freeze", "hang", "mute"}:
            return
        for held in node.plane.held.values():
            waits = (
                held["flags"] & FLAG_PENDING and self.world.now - node.plane.opened[int(held["id"])] > HELD
            )
            self.must(not waits, "held", f"the packets of {int(held['id']):x} wait too long")

    def compared(self, differing: bool) -> None:
        reason = bool(self.conflicting) or self.world.scenario.broken or "mute" in self.world.scenario.faults
        self.must(not differing or reason, "digest", "digests differ without a reason")

    # -- at rest

    def merged(self) -> bool:
        """What was refused may be offered now and again, and then differs for a moment."""
        late = any(node.late for node in self.world.nodes)
        if late or not self.world.at_rest() or not all(map(self.proven, self.world.nodes)):
            return False
        a, b = ({int(held["id"]) for held in node.plane.held.values()} for node in self.world.nodes)
        named, heard = self.refused()
        return a ^ b == named == heard and (
            bool(self.world.scenario.faults & {"full", "refuse", "forgetful"})
            or all(map(self.contradict, self.world.nodes))
        )

    @staticmethod
    def contradict(node: Node) -> bool:
        """What the peer lacks cannot be held beside what it has. (Who loses the event of an end does not know of room.)"""
        theirs = {int(held["id"]) for held in node.peer.plane.held.values()}
        lacking = [held for held in node.plane.held.values() if int(held["id"]) not in theirs]
        return all(node.peer.plane.taken(held) for held in lacking)

    @staticmethod
    def proven(node: Node) -> bool:
        refused = set(node.protocol.refused_there.tolist())
        ours = sum(int(held["id"]) not in refused for held in node.plane.held.values())
        told = node.protocol.comparison
        return node.compared == () and told is not None and told.ours == told.theirs == ours

    def refused(self) -> tuple[set[int], set[int]]:
        """What each side names as refused there, and here."""
        sides = [node.protocol for node in self.world.nodes]
        return (
            {number for side in sides for number in side.refused_there.tolist()},
            {number for side in sides for number in side.refused_here["id"].tolist()},
        )

    def same_next_hops(self) -> bool:
        one, other = ({hop: mac for hop, (mac, _) in node.macs.items()} for node in self.world.nodes)
        return one == other

    def agreement(self) -> None:
        a, b = ({int(held["id"]): held for held in node.plane.held.values()} for node in self.world.nodes)
        faults = self.world.scenario.faults
        different = set(a) ^ set(b)
        self.must(different <= self.conflicting, "equal", f"one side lacks {different - self.conflicting}")
        if faults <= {"crash", "slow"} and not self.overlapped:
            self.must(not different, "equal", f"without a split one side lacks {different}")
        for number in set(a) & set(b):
            one, other = a[number], b[number]
            owners = [held for held in (one, other) if not held["flags"] & FLAG_FOREIGN]
            self.must(len(owners) == 1, "owner", f"session {number:x} has {len(owners)} owners")
            same = key_of(one) == key_of(other) and outside(one) == outside(other)
            self.must(same, "content", f"id {number:x} is two sessions")
            # A reconnection does not tell the state of what both hold; and news that is slow looks younger than it is.
            changed = self.flows[number].changed
            crossed = any(abs(changed - moved) < CROSSING for moved in self.crossings)
            slow = self.world.connections > 1 or "slow" in faults or crossed
            if not self.world.scenario.broken and not slow:
                states = int(one["tcp_state"]), int(other["tcp_state"])
                self.must(states[0] == states[1], "content", f"TCP states of {number:x}: {states}")
        for held in (*a.values(), *b.values()):
            # A plane that loses the event of its opening gives its packets up in its own time.
            waits = held["flags"] & FLAG_PENDING and "forgetful" not in faults
            self.must(not waits, "held", f"the packets of {int(held['id']):x} wait forever")
        for number in different:
            foreign = (a | b)[number]["flags"] & FLAG_FOREIGN
            self.must(not foreign, "owner", f"nobody owns {number:x}")
        for node in self.world.nodes:
            used = {outside(held) for held in node.plane.held.values()}
            self.must(used == set(node.plane.owner), "ports", "a port is never given back")
