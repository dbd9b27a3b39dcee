# SPDX-License-Identifier: Apache-2.0
"""Two instances and the network between them, in virtual time, from one seed.

A run has traffic and faults for a while; then everything is healed, and both sides must come to rest and agree.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable

from nat_control.sync.actions import State
from nat_fastpath.engine import FLAG_FOREIGN
from tests.memory_plane import COMMAND, UDP, Endpoint, key_of
from tests.sim.link import Link
from tests.sim.node import Node
from tests.sim.rules import OPERATIONAL, Flow, Rules
from tests.sim.scenario import draw

CLIENTS: list[Endpoint] = [(UDP, 0x0A000001 + i, 5000) for i in range(6)]
ROUTERS = (0xC63364FE, 0x0A0000FE)  # one of each side
REMOTES = [(0xCB007101 + i, 53) for i in range(3)]
BUSY = 45.0  # seconds of traffic and faults
PATIENCE = 150.0  # seconds until all must be at rest after that


class World:
    def __init__(self, seed: int, *, log: Callable[[str], None] | None = None) -> None:
        self.rng = random.Random(seed)
        self.log = log
        self.now = 0.0
        self.turn = 0
        self.later_on: list[tuple[float, int, Callable[[], None]]] = []
        self.scenario = draw(seed, self.rng)
        self.rules = Rules(self)
        self.struck: Counter[str] = Counter()
        self.macs = dict.fromkeys(ROUTERS, 1)  # of the routers, as they are
        self.primary = 0
        self.apart_until = 0.0  # no connection comes about
        self.busy_clients = CLIENTS
        self.connections = 0
        self.healed = False
        self.nodes: list[Node] = []
        self.nodes += [Node(self, 0), Node(self, 1)]
        self.note(self.scenario.text)

    # -- time

    def note(self, what: str) -> None:
        if self.log:
            self.log(f"{self.now:8.3f} {what}")

    def later(self, delay: float, what: Callable[[], None]) -> None:
        self.turn += 1
        heapq.heappush(self.later_on, (self.now + delay, self.turn, what))

    def until(self, end: float, enough: Callable[[], bool] = lambda: False) -> bool:
        while self.later_on and self.later_on[0][0] <= end:
            self.now, _, what = heapq.heappop(self.later_on)
            what()
            if enough():
                return True
        self.now = end
        return False

    def strikes(self, fault: str, rate: float) -> bool:
        struck = fault in self.scenario.faults and not self.healed and self.rng.random() < rate
        self.struck[fault] += struck
        return struck

    def renumber(self) -> None:
        self.macs[self.rng.choice(ROUTERS)] += 1

    # -- who carries

    def carrying(self, node: Node) -> bool:
        """Whether its packets are the traffic's; in a split both sides' may be."""
        both = all(one.alive for one in self.nodes)
        split = both and "split" in self.scenario.faults and not self.paired()
        return node.alive and (split or node.index == self.primary)

    def carrier(self) -> Node:
        return self.rng.choice([node for node in self.nodes if self.carrying(node)] or self.nodes)

    def took_over(self, node: Node) -> None:
        if node.alive:
            self.primary = node.index

    def failed_back(self, equal: bool) -> None:
        if equal and self.at_rest():
            self.primary = self.rng.randrange(2)

    def paired(self) -> bool:
        return all(node.alive and node.protocol.state is State.OPERATIONAL for node in self.nodes)

    def at_rest(self) -> bool:
        """Both operational, and nothing under way anywhere."""
        return self.paired() and all(
            node.link is not None
            and node.link is node.peer.link
            and not node.link.flying[node.index]
            and not node.protocol.busy
            and not node.operations
            and not node.plane.has_events
            for node in self.nodes
        )

    # -- what happens

    def traffic(self) -> None:
        """Sessions open, change and carry packets, wherever the traffic goes."""
        if self.healed:
            return
        node, rng = self.carrier(), self.rng
        if node.alive and not node.frozen:
            client, remote = rng.choice(self.busy_clients), rng.choice(REMOTES)
            held = node.plane.held.get((*client, *remote))
            if news := held is None:
                held = node.plane.open(client, remote)
            elif news := rng.random() < 0.5:
                node.plane.touch(key_of(held), rng.randint(0, 5))
            else:
                node.plane.carried(key_of(held))
            if held is not None:
                flow = self.rules.flows.setdefault(int(held["id"]), Flow(self.now))
                flow.packet(self.now, self.scenario.timeout / 2, news=news)
            if rng.random() < 0.3 and not node.stalled:
                node.drain()
        self.later(rng.expovariate(8), self.traffic)

    def moods(self) -> None:
        """Some clients fall silent for a while, and their sessions age."""
        self.busy_clients = self.rng.sample(CLIENTS, self.rng.randint(1, len(CLIENTS)))
        self.later(self.rng.uniform(3, 20), self.moods)

    def ending(self) -> None:
        """A session may be ended on purpose at its owner, whoever carries it."""
        if self.healed:
            return
        node = self.rng.choice(self.nodes)
        own = [key for key, held in node.plane.held.items() if not held["flags"] & FLAG_FOREIGN]
        if node.alive and own and not node.frozen:
            key = self.rng.choice(own)
            self.rules.ends_on_purpose(int(node.plane.held[key]["id"]))
            node.plane.close(key, COMMAND)
        self.later(self.rng.expovariate(self.scenario.purpose), self.ending)

    def connecting(self) -> None:
        a, b = self.nodes
        able = a.alive and b.alive and not a.stalled and not b.stalled and self.now >= self.apart_until
        ready = able and State.STARTING not in (a.protocol.state, b.protocol.state)
        one_sided = (a.link is None) != (b.link is None)
        if ready and (a.link is None or b.link is None) and (not one_sided or self.rng.random() < 0.3):
            link = Link(self)
            self.connections += 1
            first, second = self.rng.sample(self.nodes, 2)
            first.connect(link)
            second.does(self.rng.uniform(0, 0.1), lambda: self.accept(second, link))
        self.later(self.rng.uniform(0.05, 1.0), self.connecting)

    def accept(self, node: Node, link: Link) -> None:
        alive = link.ends[1 - node.index] is not None
        if alive and not link.cut and not link.finished[node.index]:
            node.connect(link)
        else:
            link.finish(node.index)

    def failing(self) -> None:
        if self.healed:
            return
        kinds = [kind for kind in FAILURES if kind in self.scenario.faults]
        node = self.rng.choice(self.nodes)
        if kinds and node.alive and not node.stalled:
            kind = self.rng.choice(kinds)
            self.note(f"{kind} at {node.index}")
            self.struck[kind] += 1
            FAILURES[kind](self, node)
        self.later(self.rng.expovariate(0.4), self.failing)

    def cut(self, node: Node) -> None:
        if node.link is not None:
            node.link.lose()

    def split(self, node: Node) -> None:
        self.cut(node)
        self.apart_until = self.now + self.rng.choice([1.0, 6.0, 30.0])

    def hang(self, node: Node) -> None:
        node.hung_until = self.now + self.rng.choice([3.0, 15.0, 40.0])
        self.rules.disturbed = node.hung_until

    def stall(self, node: Node) -> None:
        node.stalled_until = self.now + self.rng.choice([0.5, 3.0, 12.0])
        self.rules.disturbed = node.stalled_until

    def freeze(self, node: Node) -> None:
        """As SIGSTOP does; if it lasts, the peer's heartbeat finds it dead, and carries."""
        self.stall(node)
        node.frozen_until = node.stalled_until
        if node.peer.alive and self.rng.random() < 0.8:
            self.rules.fails(node)
            self.took_over(node.peer)
            if node.link is not None:
                node.link.tell(node.peer.index)

    def room(self, node: Node) -> None:
        node.plane.room = self.rng.choice([4, 8, 12, 1 << 20])

    def refuse(self, node: Node) -> None:
        node.plane.refuses = self.rng.choice([0, 2, 3])

    def jump(self, node: Node) -> None:
        node.ahead += self.rng.choice([0.5, 4.0, 20.0])
        self.rules.disturbed = self.now

    def heal(self) -> None:
        self.note("healed")
        self.healed = True
        self.apart_until = 0.0
        for node in self.nodes:
            node.hung_until = 0.0
            node.plane.refuses = 0
            node.plane.room = max(node.plane.room, self.rng.choice([8, 1 << 20]))

    def run(self) -> None:
        for begin in (self.moods, self.traffic, self.ending, self.connecting):
            begin()
        self.later(self.rng.uniform(0.5, 5), self.failing)
        must = self.rules.must
        self.until(BUSY)
        self.heal()
        must(self.until(BUSY + OPERATIONAL, self.paired), "operational", "the sides do not find each other")
        must(self.until(BUSY + PATIENCE, self.at_rest), "rest", "something waits forever")
        must(self.until(BUSY + 2 * PATIENCE, self.rules.same_next_hops), "next hops", "they differ")
        for node in self.nodes:
            node.compared = None
        must(self.until(BUSY + 3 * PATIENCE, self.rules.merged), "equal", "the sides never become equal")
        must(self.until(BUSY + 4 * PATIENCE, self.nodes[0].front.known), "front", "it is not as known")
        self.rules.agreement()


# What happens to one instance now and then; other faults strike where they belong.
FAILURES: dict[str, Callable[[World, Node], None]] = {
    "crash": lambda world, node: node.crash(),
    "cut": World.cut,
    "leave": lambda world, node: node.run(node.protocol.stop(node.clock())),
    "split": World.split,
    "hang": World.hang,
    "stall": World.stall,
    "freeze": World.freeze,
    "full": World.room,
    "refuse": World.refuse,
    "clock": World.jump,
}


def simulate(seed: int, log: Callable[[str], None] | None = None) -> World:
    """Runs one world to its end. Raises Violation, or what the code itself raises."""
    world = World(seed, log=log)
    world.run()
    return world
