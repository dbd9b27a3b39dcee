# SPDX-License-Identifier: Apache-2.0
"""Two instances and the network between them, in virtual time, from one seed.

The protocol, the codec and the digest are the real ones; planes are the reference in memory. A run ends with
everything healed, and both sides must then agree.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from nat_control.dataplane import NO_IDS, Records, changes
from nat_control.sync import actions as do
from nat_control.sync.actions import Limits, Mode, State
from nat_control.sync.codec import (
    HEADER,
    MAX_PAYLOAD,
    CodecError,
    Decoder,
    DeleteEntries,
    InstallEntries,
    PoolRange,
    encode,
)
from nat_control.sync.digest import Summary, within
from nat_control.sync.protocol import Protocol
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_PENDING, FLAG_PREVAILS, NEIGHBOUR
from tests.memory_plane import UDP, Endpoint, MemoryPlane, key_of, outside, together
from tests.sim.front import Front
from tests.sim.link import Link

FAULTS = ("none", "crash", "loss", "split", "full", "forgetful", "gaps", "early", "mute")
# What a peer or a plane must not do; both sides must agree in the end all the same.
BROKEN = ("forgetful", "gaps", "early")
ADDRESS = 0xC6336410
PORTS = 12  # of each side
CLIENTS: list[Endpoint] = [(UDP, 0x0A000001 + i, 5000) for i in range(6)]
ROUTERS = (0xC63364FE, 0x0A0000FE)  # one of each side
REMOTES = [(0xCB007101 + i, 53) for i in range(3)]
BUSY = 60.0  # seconds of traffic and faults
PATIENCE = 150.0  # seconds until all must be at rest after that


class Violation(AssertionError):
    """A rule is broken; the message says which."""


class Node:
    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.index = index
        self.instance = index + 1
        self.incarnation = 0
        self.alive = False
        self.start()

    @property
    def peer(self) -> Node:
        return self.world.nodes[1 - self.index]

    def start(self) -> None:
        world = self.world
        self.incarnation += 1
        self.alive = True
        first = 1024 + self.index * PORTS
        self.plane = MemoryPlane(
            self.instance,
            [(ADDRESS, first + i) for i in range(PORTS)],
            epoch=self.incarnation,
            synchronous=world.mode is Mode.SYNCHRONOUS,
            max_sessions=world.room if self.index else 1 << 20,
            rng=world.rng,
        )
        self.protocol = Protocol(
            self.instance,
            (PoolRange(ADDRESS, ADDRESS, first, first + PORTS - 1),),
            world.mode,
            epoch=self.incarnation << 16,
            limits=world.limits,
        )
        self.link: Link | None = None
        self.decoder = Decoder()
        self.protected: dict[
            int, int
        ] = {}  # released after an acknowledgement: id -> incarnation of the peer
        self.macs: dict[int, tuple[int, float]] = {}  # next hop → its MAC, and when that was confirmed
        self.asked = False  # the peer to carry, and it has not answered
        self.operations: deque[Callable[[], None]] = deque()
        self.working = False
        self.answered = 0.0  # when the last operation is
        self.hung_until = 0.0  # its data plane does nothing until then
        self.compared: tuple[int, ...] | None = None
        self.front = Front(self)
        self.does(world.rng.uniform(0, 0.1), lambda: self.run(self.protocol.plane_ready()))
        self.does(1.0, self.tick)

    def does(self, delay: float, what: Callable[[], None]) -> None:
        """Later, unless it dies before."""
        incarnation = self.incarnation

        def then() -> None:
            if self.alive and self.incarnation == incarnation:
                what()

        self.world.later(delay, then)

    def crash(self) -> None:
        self.alive = False
        self.world.note(f"{self.index} crashes")
        self.check_protected()
        self.plane.held.clear()
        link, self.link = self.link, None
        self.operations.clear()
        if link is not None:
            link.ends[self.index] = None
            flying = link.flying[1 - self.index]
            del flying[self.world.rng.randint(0, len(flying)) :]
            link.finish(self.index)
        self.world.took_over(self.peer)
        self.world.later(self.world.rng.uniform(0.01, 3), self.start)

    def check_protected(self) -> None:
        """At our death: what left after an acknowledgement is at the peer, unless that died itself."""
        for held in self.plane.held.values():
            if self.peer.alive and self.protected.get(int(held["id"])) == self.peer.incarnation:
                self.world.check_held(self.peer, held, "lost with its instance")

    # -- connection

    def connect(self, link: Link) -> None:
        if self.link is not None:
            self.lose(self.link)
        self.link = link
        self.decoder = Decoder()
        self.protocol.precedence = self.world.rng.choice(list(do.Precedence))
        link.ends[self.index] = self
        self.run(self.protocol.connected(self.world.now))
        link.deliver(self.index)

    def lose(self, link: Link) -> None:
        if self.link is not link:
            return
        link.ends[self.index] = None
        self.link = None
        self.world.note(f"{self.index} loses the connection")
        if not link.finished[1 - self.index]:
            link.finish(self.index)
        self.run(self.protocol.disconnected(self.world.now))

    def receive(self, data: bytes) -> None:
        decoder, link = self.decoder, self.link
        try:
            for epoch, message in decoder.feed(data):
                self.world.note(f"{self.index} receives {type(message).__name__}")
                self.run(self.protocol.received(epoch, message, self.world.now))
                if not self.alive or self.link is not link:
                    return
        except CodecError as error:
            raise Violation(f"bytes of a peer that are no message: {error}") from None
        self.world.must(decoder.kept <= HEADER.size + MAX_PAYLOAD, "the decoder keeps too much")

    def tick(self) -> None:
        self.drain()
        world, protocol = self.world, self.protocol
        if self.alive and world.carrier() is self and not world.healed and world.rng.random() < 0.3:
            world.macs[world.rng.choice(ROUTERS)] += 1
            for router, mac in world.macs.items():
                self.macs[router] = mac, world.now
        if protocol.state is State.ALONE and not self.operations and not self.working:
            foreign = [key for key, held in self.plane.held.items() if held["flags"] & FLAG_FOREIGN]
            world.must(not foreign, f"alone, {self.index} does not own {len(foreign)} of its sessions")
        if self.alive:
            self.run(protocol.next_hops(self.next_hops(), world.now))
        if self.alive and world.hands_over and not world.healed and world.rng.random() < 0.05:
            self.asked = protocol.state is State.OPERATIONAL
            self.run(protocol.hand_over(world.rng.choice((1, 2)), world.now))
        self.run(self.front.tick())
        if self.alive:
            self.run(protocol.tick(world.now))
            self.does(1.0, self.tick)

    def next_hops(self) -> np.ndarray[Any, np.dtype[np.void]]:
        rows = np.zeros(len(self.macs), NEIGHBOUR)
        for row, (router, (mac, confirmed)) in zip(rows, self.macs.items(), strict=True):
            row["address"], row["mac"], row["confirmed_ms"] = router, mac, (self.world.now - confirmed) * 1000
        return rows

    def learn(self, rows: np.ndarray[Any, np.dtype[np.void]]) -> None:
        for row in rows:
            confirmed = self.world.now - int(row["confirmed_ms"]) / 1000
            if confirmed > self.macs.get(int(row["address"]), (0, -1.0))[1]:
                self.macs[int(row["address"])] = int(row["mac"]), confirmed

    # -- actions

    def drain(self) -> None:
        events = self.plane.events()
        self.front.ended(events)
        if len(events) and self.world.strikes("forgetful", 0.1):
            self.world.note(f"{self.index} loses {len(events)} events of its plane")
        elif len(events):
            self.run(self.protocol.events(changes(events), self.world.now))

    def run(self, actions: list[do.Action]) -> None:
        for action in actions:
            if not self.alive:
                return
            if self.world.rng.random() < self.world.crash_rate:
                self.crash()
                return
            self.carry_out(action)
        p = self.protocol
        self.world.must(p.waiting <= p.limits.waiting, "too much waits for the peer")
        self.world.must(p.outstanding <= p.limits.window, "the window is exceeded")

    def carry_out(self, action: do.Action) -> None:
        self.front.notice(action)
        match action:
            case do.Send(epoch, message):
                change = isinstance(message, InstallEntries | DeleteEntries)
                if change and self.world.strikes("gaps", 0.05):
                    self.world.note(f"{self.index} loses {type(message).__name__} {message.txid}")
                elif self.link is not None:
                    self.link.send(1 - self.index, encode(message, epoch))
            case do.Close(reason):
                self.world.note(f"{self.index} closes: {reason}")
                if self.link is not None:
                    self.link.finish(self.index)
            case do.Commit(records):
                self.commit(records)
            case do.StateChanged(_, after, why):
                self.world.note(f"{self.index} is {after.value}: {why}")
            case do.FrontMoved() | do.FrontSeen():
                pass
            case do.Conflicts(ids):
                self.world.conflicting.update(ids.tolist())
            case do.DigestCompared(buckets):
                self.compared = buckets
                self.world.must(
                    not buckets or bool(self.world.conflicting) or self.world.faults in BROKEN,
                    "digests differ without a reason",
                )
                self.world.failed_back(not buckets)
            case do.Mended() | do.Gap():
                self.world.note(f"{self.index}: {action}")
            case do.Carry(carrier, lasting):
                self.world.primary = carrier - 1
                self.does(
                    0.01, lambda: self.run(self.protocol.carries(carrier, self.world.now, lasting=lasting))
                )
            case do.CarrierTold():
                self.world.must(self.asked, "nobody has asked the peer who carries")
                self.asked = False
            case _:
                self.operations.append(lambda: self.operate(action))
                self.work()

    def commit(self, records: Records) -> None:
        """The packets of these leave now."""
        for record in records:
            held = self.plane.held.get(key_of(record))
            if held is None or held["id"] != record["id"] or not held["flags"] & FLAG_PENDING:
                continue
            if self.protocol.state is State.OPERATIONAL and self.world.faults not in BROKEN:
                assert self.link is not None
                guard = self.link.incarnations[self.peer.index]
                if self.peer.alive and self.peer.incarnation == guard:
                    self.world.check_held(self.peer, record, "released before the peer held it")
                self.protected[int(record["id"])] = guard
        self.plane.commit(records)

    def work(self) -> None:
        """One operation of the plane after the other, each in its own time."""
        if self.working or not self.operations:
            return
        self.working = True

        def done() -> None:
            self.working = False
            self.operations.popleft()()
            self.work()

        hung = max(0.0, self.hung_until - self.world.now)
        self.does(hung + self.world.rng.choice([0.0, 0.001, 0.05]), done)

    def operate(self, action: do.Action) -> None:
        plane, protocol, world = self.plane, self.protocol, self.world
        match action:
            case do.Install(op, records) if world.strikes("early", 0.1):
                self.report(lambda: protocol.plane_done(op, world.now))
                epoch = protocol.epoch

                def late() -> None:
                    """Or never, if the connection has ended meanwhile."""
                    if protocol.state is State.OPERATIONAL and protocol.epoch == epoch:
                        plane.install(records)

                self.does(world.rng.choice([0.01, 2.0]), late)
            case do.Install() | do.Delete() if world.strikes("mute", 0.02):
                world.note(f"{self.index} never hears from its plane")
            case do.Install(op, records):
                before, records = dict(plane.held), protocol.prevailing(op, records)
                installed = plane.install(records)
                ended = {key for key, held in before.items() if plane.held.get(key) is not held}
                world.conflicting.update(int(before[key]["id"]) for key in ended)
                taken = {key_of(record) for record in records if record["flags"] & FLAG_PREVAILS}
                world.must(ended <= taken, "a session has ended for one beside which it can be held")
                refused = records["id"][~plane.holds(records)] if installed < len(records) else NO_IDS
                self.report(lambda: protocol.plane_done(op, world.now, refused))
            case do.Delete(op, records):
                plane.delete(records)
                self.report(lambda: protocol.plane_done(op, world.now))
            case do.Update(records):
                plane.update(records)
            case do.Learn(next_hops):
                self.learn(next_hops)
            case do.TakeOwnership():
                plane.adopt()
            case do.Cede(instance, besides):
                plane.cede(instance, besides)
            case do.SendState(txid):
                self.page(txid, set())
            case do.TakeDigest(at, besides):
                summary, records = Summary(), plane.records()
                summary.add(records[~np.isin(records["id"], besides)])
                self.report(lambda: protocol.digest_taken(at, summary.buckets, summary.count, world.now))
            case do.TakeBuckets(at, buckets, besides):
                records = plane.records()
                found = within(records[~np.isin(records["id"], besides)], buckets)
                self.report(lambda: protocol.buckets_taken(at, buckets, found, world.now))
            case do.Move():
                self.front.move(action)
            case do.Fetch(op, ids):
                records = plane.records()
                found = records[np.isin(records["id"], ids)]
                self.report(lambda: protocol.fetched(op, found, world.now))
            case _:
                raise Violation(f"unknown action {action}")

    def report(self, answer: Callable[[], list[do.Action]]) -> None:
        """Some time after it was done, after the events of before and the answers to earlier operations."""

        def tell() -> None:
            self.drain()
            if self.alive:
                self.run(answer())

        self.answered = max(self.answered, self.world.now + self.world.rng.choice([0.0, 0.01]))
        self.does(self.answered - self.world.now, tell)

    def page(self, txid: int, sent: set[int]) -> None:
        """Pages at different times: what opens meanwhile may be in a later one."""
        left = [held for held in self.plane.held.values() if int(held["id"]) not in sent]
        part = together(left[: self.world.rng.randint(1, 5)])
        sent.update(part["id"].tolist())
        last = len(part) == len(left)

        def tell() -> None:
            self.drain()
            if self.alive:
                self.run(self.protocol.state_page(txid, part, last, self.world.now))
                if not last and self.protocol.state is State.EXCHANGING:
                    self.does(self.world.rng.choice([0.0, 0.01]), lambda: self.page(txid, sent))

        tell()


class World:
    def __init__(self, seed: int, *, log: Callable[[str], None] | None = None) -> None:
        self.rng = random.Random(seed)
        self.log = log
        self.now = 0.0
        self.turn = 0
        self.later_on: list[tuple[float, int, Callable[[], None]]] = []
        self.faults = FAULTS[seed % len(FAULTS)]
        self.mode = self.rng.choice([Mode.SYNCHRONOUS, Mode.SYNCHRONOUS, Mode.ASYNCHRONOUS])
        self.limits = Limits(
            batch=self.rng.choice([1, 3, 64]),
            window=self.rng.choice([1, 2, 8]),
            waiting=self.rng.choice([20, 400]),
            digest=3.0,
            offer=5.0,
        )
        self.crash_rate = self.rng.choice([0.0, 0.005, 0.02]) if self.faults != "none" else 0.0
        self.room = 8 if self.faults == "full" else 1 << 20  # sessions at one side
        self.conflicting: set[int] = set()
        self.macs = dict.fromkeys(ROUTERS, 1)  # of the routers, as they are
        self.primary = 0
        self.hands_over = seed % 5 == 0
        self.healed = False
        self.nodes: list[Node] = []
        self.nodes += [Node(self, 0), Node(self, 1)]

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

    # -- rules

    def must(self, good: bool, what: str) -> None:
        if not good:
            raise Violation(f"at {self.now:.3f}: {what}")

    def check_held(self, node: Node, record: np.void, what: str) -> None:
        number = int(record["id"])
        held = node.plane.held.get(key_of(record))
        known = held is not None and held["id"] == number
        self.must(
            known or number in self.conflicting or number in node.plane.ended, f"session {number:x} {what}"
        )

    def strikes(self, fault: str, rate: float) -> bool:
        return self.faults == fault and not self.healed and self.rng.random() < rate

    # -- who carries

    def carrier(self) -> Node:
        both = all(node.alive for node in self.nodes)
        if both and self.faults == "split" and not self.paired():
            return self.rng.choice(self.nodes)
        return self.nodes[self.primary]

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
        if self.healed:
            return
        node, rng = self.carrier(), self.rng
        if node.alive:
            client, remote = rng.choice(CLIENTS), rng.choice(REMOTES)
            held = node.plane.held.get((*client, *remote))
            if held is None:
                node.plane.open(client, remote)
            elif rng.random() < 0.5:
                node.plane.touch(key_of(held), rng.randint(0, 5))
            if rng.random() < 0.3:
                node.drain()
        self.later(rng.expovariate(8), self.traffic)

    def ageing(self) -> None:
        """A session may end at its owner, whoever carries it."""
        if self.healed:
            return
        node = self.rng.choice(self.nodes)
        own = [key for key, held in node.plane.held.items() if not held["flags"] & FLAG_FOREIGN]
        if node.alive and own:
            node.plane.close(self.rng.choice(own))
        self.later(self.rng.expovariate(3), self.ageing)

    def connecting(self) -> None:
        a, b = self.nodes
        ready = a.alive and b.alive and State.STARTING not in (a.protocol.state, b.protocol.state)
        one_sided = (a.link is None) != (b.link is None)
        if ready and (a.link is None or b.link is None) and (not one_sided or self.rng.random() < 0.3):
            link = Link(self)
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
        rng = self.rng
        node = rng.choice([node for node in self.nodes if node.alive] or self.nodes)
        kinds = {"crash": ["crash"], "loss": ["cut", "cut", "hang", "leave"]}
        kind = rng.choice(kinds.get(self.faults) or [*kinds["loss"], "crash"])
        if not node.alive:
            pass
        elif kind == "crash":
            node.crash()
        elif kind == "hang":
            node.hung_until = self.now + rng.choice([3.0, 15.0, 40.0])
        elif kind == "leave":
            node.run(node.protocol.stop(self.now))
        elif node.link is not None:
            self.note("the network loses the connection")
            node.link.lose()
        self.later(rng.expovariate(0.4), self.failing)

    def run(self) -> None:
        self.traffic()
        self.ageing()
        self.connecting()
        if self.faults != "none":
            self.later(self.rng.uniform(0.5, 5), self.failing)
        self.until(BUSY)
        self.note("healed")
        self.healed = True
        self.crash_rate = 0.0
        for node in self.nodes:
            node.hung_until = 0.0
        self.must(self.until(BUSY + PATIENCE, self.at_rest), "something waits forever")
        for node in self.nodes:
            node.compared = None
        self.must(self.until(BUSY + 2 * PATIENCE, self.merged), "the sides never become equal")
        self.must(self.until(BUSY + 3 * PATIENCE, self.same_next_hops), "next hops differ")
        self.must(self.until(BUSY + 4 * PATIENCE, self.nodes[0].front.known), "the front is not as known")
        self.check_agreement()

    def merged(self) -> bool:
        """What was refused may be offered now and again, and then differs for a moment. A forgotten end is told to nobody."""
        a, b = ({int(held["id"]) for held in node.plane.held.values()} for node in self.nodes)
        named, heard = self.refused()
        heard = heard & (a | b) if self.faults == "forgetful" else heard
        if not self.at_rest() or not all(map(self.proven, self.nodes)) or not a ^ b == named == heard:
            return False
        lacking = [
            (n.peer, held) for n in self.nodes for held in n.plane.held.values() if held["id"] in a ^ b
        ]
        return self.faults == "full" or all(peer.plane.taken(held) for peer, held in lacking)

    def proven(self, node: Node) -> bool:
        told, ours = node.protocol.comparison, len(node.plane.held) - len(node.protocol.refused_there)
        return node.compared == () and told is not None and told.ours == told.theirs == ours

    def refused(self) -> tuple[set[int], set[int]]:
        """What each side names as refused there, and here."""
        sides = [node.protocol for node in self.nodes]
        return (
            {number for side in sides for number in side.refused_there.tolist()},
            {number for side in sides for number in side.refused_here["id"].tolist()},
        )

    def same_next_hops(self) -> bool:
        one, other = ({router: mac for router, (mac, _) in node.macs.items()} for node in self.nodes)
        return one == other

    def check_agreement(self) -> None:
        a, b = ({int(held["id"]): held for held in node.plane.held.values()} for node in self.nodes)
        different = set(a) ^ set(b)
        self.must(different <= self.conflicting, f"at rest one side lacks {different - self.conflicting}")
        for number in set(a) & set(b):
            owners = [held for held in (a[number], b[number]) if not held["flags"] & FLAG_FOREIGN]
            self.must(len(owners) == 1, f"session {number:x} has {len(owners)} owners")
            self.must(key_of(a[number]) == key_of(b[number]), "one id, two sessions")
        for held in (*a.values(), *b.values()):
            waits = held["flags"] & FLAG_PENDING and self.faults != "forgetful"
            self.must(not waits, f"the packets of {int(held['id']):x} wait forever")
        for number in different:
            self.must(not (a | b)[number]["flags"] & FLAG_FOREIGN, f"nobody owns {number:x}")
        for node in self.nodes:
            used = {outside(held) for held in node.plane.held.values()}
            self.must(used == set(node.plane.owner), "a port is never given back")


def simulate(seed: int, log: Callable[[str], None] | None = None) -> None:
    """Runs one world to its end. Raises Violation, or what the code itself raises."""
    World(seed, log=log).run()
