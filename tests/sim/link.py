# SPDX-License-Identifier: Apache-2.0
"""The network between two simulated instances."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World


class Link:
    """One connection: bytes in both directions, in order, in any pieces."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ends: list[Node | None] = [None, None]
        self.incarnations = [node.incarnation for node in world.nodes]
        self.flying: list[bytearray] = [bytearray(), bytearray()]  # towards node 0, 1
        self.finished = [False, False]  # no more bytes come towards this side
        self.cut = False

    def send(self, towards: int, data: bytes) -> None:
        if self.cut or self.finished[towards]:
            return
        self.flying[towards] += data
        self.world.later(self.world.rng.expovariate(50), lambda: self.deliver(towards))

    def deliver(self, towards: int) -> None:
        node, flying, rng = self.ends[towards], self.flying[towards], self.world.rng
        if node is None or self.cut:
            return
        if node.stalled:
            self.world.later(node.stalled_until - self.world.now, lambda: self.deliver(towards))
            return
        if flying:
            n = rng.choice([len(flying), rng.randint(1, len(flying)), min(len(flying), rng.randint(1, 40))])
            part = bytes(flying[:n])
            del flying[:n]
            if flying or self.finished[towards]:
                self.world.later(rng.expovariate(100), lambda: self.deliver(towards))
            node.receive(part)
        elif self.finished[towards]:
            node.lose(self)

    def finish(self, side: int) -> None:
        """This side closes: the other gets what is under way, and the end."""
        other = 1 - side
        self.finished[other] = True
        self.world.later(self.world.rng.expovariate(50), lambda: self.deliver(other))
        self.world.later(self.world.rng.uniform(0, 1), lambda: self.tell(side))

    def tell(self, side: int) -> None:
        node = self.ends[side]
        if node is not None and node.stalled:
            self.world.later(node.stalled_until - self.world.now, lambda: self.tell(side))
        elif node is not None:
            node.lose(self)

    def lose(self) -> None:
        """Nothing gets through any more; each side notices in its own time."""
        self.cut = True
        for side in (0, 1):
            self.world.later(self.world.rng.choice([0.0, 0.05, 3.0]), lambda side=side: self.tell(side))
