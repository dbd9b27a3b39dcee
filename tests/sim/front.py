# SPDX-License-Identifier: Apache-2.0
"""What a node has in front of its peer, where it is the switch, and what it knows of its peer's, where it is the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nat_control.dataplane import Events
from nat_control.offload import FrontView
from nat_control.sync import actions as do
from nat_control.sync.actions import State
from nat_control.sync.codec import CARRIED, Moved
from nat_fastpath.engine import EVENT_CLOSE

if TYPE_CHECKING:
    from tests.sim.node import Node

ROOM = 5  # sessions that the switch has room for in front of the server


class Front:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.there: set[int] = set()  # sessions that our switch carries
        self.view = FrontView()  # of the peer's

    @property
    def room(self) -> int:
        return ROOM - len(self.there)

    def ended(self, events: Events) -> None:
        ids = events["id"][events["type"] == EVENT_CLOSE]
        self.view.ended(ids)
        self.there.difference_update(ids.tolist())

    def tick(self) -> list[do.Action]:
        """The server asks, the switch reports, whatever the state is."""
        node, world = self.node, self.node.world
        if node.index:
            return self.tell() if not world.healed or world.rng.random() < 0.5 else []
        return [] if world.healed else self.ask()

    def tell(self) -> list[do.Action]:
        carried = np.zeros(len(self.there), CARRIED)
        carried["id"], carried["packets"] = sorted(self.there), 1
        return self.node.protocol.tell_front(1000, self.room, carried, self.node.clock())

    def ask(self) -> list[do.Action]:
        """Sessions go to the peer's switch, or come back; one question at a time."""
        node, rng = self.node, self.node.world.rng
        front = rng.random() < 0.6
        ids = np.sort(node.plane.records()["id"] if front else self.view.ids)[: rng.randint(0, ROOM)]
        if self.view.asked:
            return []
        txid = self.view.ask(ids, front) if node.protocol.state is State.OPERATIONAL else 1
        return node.protocol.ask_front(txid, ids, front, node.clock())

    def move(self, action: do.Move) -> None:
        node = self.node
        held = set(np.intersect1d(action.ids, node.plane.records()["id"]).tolist())
        if action.front:
            self.there |= set(sorted(held - self.there)[: self.room])
        else:
            self.there -= held
        there, room = action.ids[np.isin(action.ids, list(self.there))], self.room
        node.report(lambda: node.protocol.front_moved(action.op, there, room, node.clock()))

    def notice(self, action: do.Action) -> None:
        node, now = self.node, self.node.clock()
        match action:
            case do.Send(_, Moved(_, _, ids)):
                claimed = set(ids.tolist()) - self.there - node.plane.ended
                node.rules.must(not claimed, "front", f"said to be in front, and is not: {claimed}")
            case do.StateChanged(before, after):
                if before is State.OPERATIONAL:
                    self.view.lost()
                elif after is State.OPERATIONAL:
                    node.run(self.tell())
            case do.FrontMoved(txid, room, ids):
                self.view.moved(txid, room, ids, now)
                assert node.link is not None
                if node.peer.alive and node.peer.incarnation == node.link.incarnations[node.peer.index]:
                    known = node.peer.front.there | node.peer.plane.ended
                    node.rules.must(
                        set(self.view.ids.tolist()) <= known, "front", "taken for in front, and is not"
                    )
            case do.FrontSeen(ms, room, carried):
                self.view.seen(ms, room, carried, now, 1)

    def known(self) -> bool:
        """Whether the server knows what the peer has in front."""
        there = self.node.peer.front.there
        self.node.rules.must(len(there) <= ROOM, "front", "more in front than there is room for")
        return set(self.view.ids.tolist()) == there and not self.view.asked
