# SPDX-License-Identifier: Apache-2.0
"""One simulated instance: the real protocol, codec and digest, the reference plane, and the shell between them."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nat_control.dataplane import NO_IDS, Changes, Records, changes
from nat_control.sync import actions as do
from nat_control.sync.actions import Mode, State
from nat_control.sync.codec import (
    HEADER,
    MAX_PAYLOAD,
    CodecError,
    Decoder,
    DeleteComplete,
    DeleteEntries,
    Error,
    Hello,
    InitState,
    InstallComplete,
    InstallEntries,
    Message,
    PoolRange,
    Ready,
    encode,
)
from nat_control.sync.digest import Summary, within
from nat_control.sync.hearsay import Hearsay
from nat_control.sync.protocol import Protocol
from nat_fastpath.engine import FLAG_PENDING, NEIGHBOUR
from tests.memory_plane import key_of
from tests.sim.front import Front
from tests.sim.link import Link
from tests.sim.plane import AgeingPlane
from tests.sim.rules import Violation

if TYPE_CHECKING:
    from tests.sim.world import World

ADDRESS = 0xC6336410
PORTS = 7  # of each side; few, so that they are used again soon
REMEMBERED = 20  # messages that may come again
NUMBERED = (Hello, InitState, Ready, InstallEntries, DeleteEntries, InstallComplete, DeleteComplete)


class Node:
    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.scenario = world.scenario
        self.rules = world.rules
        self.index = index
        self.instance = index + 1
        self.incarnation = 0
        self.alive = False
        self.asks = self.answers = self.carries = 0  # of the peer, its answers, and what it has asked for
        self.past: deque[tuple[int, Message]] = deque(maxlen=REMEMBERED)
        self.start()

    @property
    def peer(self) -> Node:
        return self.world.nodes[1 - self.index]

    def start(self) -> None:
        rng = self.world.rng
        self.incarnation += 1
        self.alive = True
        clocks = "clock" in self.scenario.faults
        self.pace = rng.choice([0.98, 1.0, 1.02]) if clocks else 1.0
        self.ahead = rng.uniform(0, 1e6)  # seconds since the start of whatever the clock counts from
        self.stalled_until = 0.0  # neither the program nor its clock's timers go on
        self.frozen_until = 0.0  # as are its packets
        self.hung_until = 0.0  # its data plane does nothing until then
        first = 1024 + self.index * PORTS
        self.plane = AgeingPlane(
            self.instance,
            [(ADDRESS, first + i) for i in range(PORTS)],
            epoch=self.incarnation,
            synchronous=self.scenario.mode is Mode.SYNCHRONOUS,
            rng=rng,
            clock=self.clock,
            yielded=self.rules.conflicting,
            ends=lambda record, ordered: self.rules.ends(self, record, ordered=ordered),
        )
        self.protocol = Protocol(
            self.instance,
            (PoolRange(ADDRESS, ADDRESS, first, first + PORTS - 1),),
            self.scenario.mode,
            epoch=self.incarnation << 16,
            limits=self.scenario.limits,
        )
        self.hearsay = Hearsay(self.clock())
        self.link: Link | None = None
        self.decoder = Decoder()
        self.protected: dict[int, int] = {}  # acknowledged by the peer: id -> its incarnation
        self.paged: set[int] = set()  # ids of our InitState
        self.macs: dict[int, tuple[int, float]] = {}  # next hop → its MAC, and when that was confirmed
        self.operations: deque[do.Action] = deque()
        self.partly: dict[int, tuple[Records, int]] = {}  # what is installed in parts, or waits for its probe
        self.late = 0  # writes that were acknowledged and are not done
        self.writing_until = 0.0  # the probe comes back then
        self.working = False
        self.answered = 0.0  # when the last operation is
        self.compared: tuple[int, ...] | None = None
        self.front = Front(self)
        self.does(rng.uniform(0, 0.1), lambda: self.run(self.protocol.plane_ready()))
        self.does(1.0, self.tick)
        self.does(self.activity_period, self.activity)

    def clock(self) -> float:
        return self.ahead + self.pace * self.world.now

    def does(self, delay: float, what: Callable[[], None]) -> None:
        """Later, unless it dies before; and not while it stands still."""
        incarnation = self.incarnation

        def then() -> None:
            if not self.alive or self.incarnation != incarnation:
                return
            if self.stalled:
                self.world.later(self.stalled_until - self.world.now, then)
            else:
                what()

        self.world.later(delay, then)

    @property
    def stalled(self) -> bool:
        return self.world.now < self.stalled_until

    @property
    def frozen(self) -> bool:
        return self.world.now < self.frozen_until

    def crash(self) -> None:
        self.alive = False
        self.world.note(f"{self.index} crashes")
        self.rules.fails(self)
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

    # -- connection

    def connect(self, link: Link) -> None:
        if self.link is not None:
            self.lose(self.link)
        self.link = link
        self.decoder = Decoder()
        self.protocol.precedence = self.world.rng.choice(list(do.Precedence))
        link.ends[self.index] = self
        self.run(self.protocol.connected(self.clock()))
        link.deliver(self.index)

    def lose(self, link: Link) -> None:
        if self.link is not link:
            return
        link.ends[self.index] = None
        self.link = None
        self.world.note(f"{self.index} loses the connection")
        if not link.finished[1 - self.index]:
            link.finish(self.index)
        self.run(self.protocol.disconnected(self.clock()))

    def receive(self, data: bytes) -> None:
        decoder, link = self.decoder, self.link
        try:
            for epoch, message in decoder.feed(data):
                self.world.note(f"{self.index} receives {type(message).__name__}")
                self.run(self.protocol.received(epoch, message, self.clock()))
                if not self.alive or self.link is not link:
                    return
        except CodecError as error:
            raise Violation("bytes", str(error)) from None

    def send(self, epoch: int, message: Message) -> None:
        world, link = self.world, self.link
        if link is None:
            return
        if isinstance(message, InstallEntries | DeleteEntries) and world.strikes("gaps", 0.05):
            world.note(f"{self.index} loses {type(message).__name__} {message.txid}")
            return
        if isinstance(message, InstallComplete | DeleteComplete | Ready) and world.strikes("ack", 0.02):
            world.note(f"lost: {type(message).__name__} of {self.index}")
            if world.rng.random() < 0.3:
                self.crash()
            else:
                link.lose()
            return
        sent = [(epoch, message)]
        if world.strikes("replay", 0.02):
            sent = self.repeated(epoch, message)
        self.past.append((epoch, message))
        for epoch, message in sent:
            data = encode(message, epoch)
            self.rules.must(len(data) <= HEADER.size + MAX_PAYLOAD, "bounded", "a message is too long")
            link.send(1 - self.index, data)

    def repeated(self, epoch: int, message: Message) -> list[tuple[int, Message]]:
        """With an earlier one, before or after it. TCP does no such thing, a confused peer may: what has a number or
        an epoch is found out."""
        mine = [
            past
            for past in (*self.past, (epoch, message))
            if past[0] != epoch or isinstance(past[1], NUMBERED)
        ]
        sent = [(epoch, message)]
        if mine:
            again = self.world.rng.choice(mine)
            self.world.note(f"{self.index} sends {type(again[1]).__name__} of epoch {again[0]} again")
            sent.insert(self.world.rng.randrange(2), again)
        return sent

    def tick(self) -> None:
        self.drain()
        world, protocol = self.world, self.protocol
        if not self.alive:
            return
        if world.carrying(self) and not world.healed and world.rng.random() < 0.3:
            world.renumber()
            for router, mac in world.macs.items():
                self.macs[router] = mac, world.now
        self.rules.ticks(self)
        if self.hung_until <= world.now and not world.healed:
            self.plane.age(self.scenario.timeout)
        self.run(protocol.next_hops(self.next_hops(), self.clock()))
        if self.alive and self.scenario.hands_over and not world.healed and world.rng.random() < 0.05:
            self.asks += protocol.state is State.OPERATIONAL
            self.run(protocol.hand_over(world.rng.choice((1, 2)), self.clock()))
        if self.alive:
            self.run(self.front.tick())
        if self.alive:
            self.run(protocol.tick(self.clock()))
            self.does(1.0, self.tick)

    @property
    def activity_period(self) -> float:
        return self.scenario.timeout / 3  # as Pair's, for timeouts as short as these

    def activity(self) -> None:
        """The owner ages a session, but only the carrier sees its packets."""
        self.hearsay.look(self.clock())
        if self.protocol.state is State.OPERATIONAL:
            active = self.hearsay.carried(self.plane.records())
            if len(active):
                self.run(self.protocol.events(Changes(updated=active), self.clock()))
        if self.alive:
            self.does(self.activity_period, self.activity)

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
        if not self.plane.has_events:
            return
        events = self.plane.events()
        self.front.ended(events)
        if self.world.strikes("forgetful", 0.1):
            self.world.note(f"{self.index} loses {len(events)} events of its plane")
        else:
            self.run(self.protocol.events(changes(events), self.clock()))

    def run(self, actions: list[do.Action]) -> None:
        rate = 0.0 if self.world.healed else self.scenario.crash_rate
        for action in actions:
            if not self.alive:
                return
            if rate and self.world.rng.random() < rate:
                self.crash()
                return
            self.carry_out(action)
        self.rules.queues(self)

    def carry_out(self, action: do.Action) -> None:
        world, protocol = self.world, self.protocol
        self.front.notice(action)
        match action:
            case do.Send(epoch, message):
                if isinstance(message, Error):
                    self.rules.gives_up(self, message)
                self.send(epoch, message)
            case do.Close(reason):
                world.note(f"{self.index} closes: {reason}")
                if self.link is not None:
                    self.link.finish(self.index)
            case do.Commit(records):
                self.commit(records)
            case do.StateChanged(_, after, why):
                world.note(f"{self.index} is {after.value}: {why}")
                if after is State.OPERATIONAL and self.link is not None:
                    self.protected |= dict.fromkeys(self.paged, self.link.incarnations[self.peer.index])
            case do.Conflicts(ids):
                self.rules.refuse(self, ids.tolist())
            case do.DigestCompared(buckets):
                self.compared = buckets
                self.rules.compared(bool(buckets))
                world.failed_back(not buckets)
            case do.FrontMoved() | do.FrontSeen():
                pass
            case do.Mended() | do.Gap():
                world.note(f"{self.index}: {action}")
            case do.Carry(carrier, lasting):
                self.carries += 1
                self.rules.must(self.carries <= self.peer.asks, "asked", "nobody wants anyone to carry")
                world.primary = carrier - 1
                if not world.at_rest():
                    self.rules.crossings.append(world.now)
                for node in world.nodes:
                    if node.protocol.busy or node.plane.has_events or node.operations:
                        self.rules.overlapped = True
                self.does(0.01, lambda: self.run(protocol.carries(carrier, self.clock(), lasting=lasting)))
            case do.CarrierTold():
                self.answers += 1
                self.rules.must(
                    self.answers <= self.asks, "asked", "it is told who carries, and has not asked"
                )
            case _:
                self.operations.append(action)
                self.work()

    def commit(self, records: Records) -> None:
        """The packets of these leave now."""
        for record in records:
            held = self.plane.held.get(key_of(record))
            waits = held is not None and held["id"] == record["id"] and held["flags"] & FLAG_PENDING
            if waits and self.protocol.state is State.OPERATIONAL:
                self.rules.released(self, record)
        self.plane.commit(records)

    # -- the data plane

    def work(self) -> None:
        """One operation of the plane after the other, each in its own time."""
        if self.working or not self.operations:
            return
        self.working = True

        def done() -> None:
            self.working = False
            self.operate(self.operations.popleft())
            self.work()

        hung = max(0.0, max(self.hung_until, self.writing_until) - self.world.now)
        pace = [0.001, 0.05, 0.4] if "slow" in self.scenario.faults else [0.0, 0.001, 0.05]
        self.does(hung + self.world.rng.choice(pace), done)

    def operate(self, action: do.Action) -> None:
        plane, protocol, world = self.plane, self.protocol, self.world
        if isinstance(action, do.Install | do.Update):
            self.hearsay.heard(action.records, self.clock())
        match action:
            case do.Install(op, records) if op not in self.partly and world.strikes("early", 0.1):
                self.writes_late(action)
            case do.Install() | do.Delete() if world.strikes("mute", 0.02):
                world.note(f"{self.index} never hears from its plane")
                self.rules.undeleted |= isinstance(action, do.Delete)
            case do.Install(op, records) if len(records) > 1 and world.strikes("slow", 0.5):
                half = world.rng.randrange(1, len(records))
                whole, done = self.partly.get(op, (records, 0))
                self.partly[op] = whole, done + plane.install(protocol.prevailing(op, records[:half]))
                self.operations.appendleft(dataclasses.replace(action, records=records[half:]))
            case do.Install(op, records):
                whole, done = self.partly.pop(op, (records, 0))
                installed = done + plane.install(protocol.prevailing(op, records))
                refused = whole["id"][~plane.holds(whole)] if installed < len(whole) else NO_IDS
                self.report(lambda: protocol.plane_done(op, self.clock(), refused))
            case do.Delete(op, records):
                plane.delete(records)
                self.report(lambda: protocol.plane_done(op, self.clock()))
            case do.Update(records):
                plane.update(records)
            case do.Learn(next_hops):
                self.learn(next_hops)
            case do.TakeOwnership():
                plane.adopt()
            case do.Cede(instance, besides):
                plane.cede(instance, besides)
            case do.SendState(txid):
                self.paged = set()
                self.page(txid, self.paged)
            case do.TakeDigest(at, besides):
                summary, records = Summary(), plane.records()
                summary.add(records[~np.isin(records["id"], besides)])
                self.report(lambda: protocol.digest_taken(at, summary.buckets, summary.count, self.clock()))
            case do.TakeBuckets(at, buckets, besides):
                records = plane.records()
                found = within(records[~np.isin(records["id"], besides)], buckets)
                self.report(lambda: protocol.buckets_taken(at, buckets, found, self.clock()))
            case do.Move():
                self.front.move(action)
            case do.Fetch(op, ids):
                found = plane.among(ids)
                self.report(lambda: protocol.fetched(op, found, self.clock()))
            case _:
                raise TypeError(f"unknown action {action}")

    def writes_late(self, action: do.Install) -> None:
        """The switch says that it has these, and has not. Who asks the rules themselves waits until it has."""
        protocol, epoch = self.protocol, self.protocol.epoch
        late = self.world.rng.choice([0.01, 2.0])
        if self.scenario.probe:
            self.partly[action.op] = action.records, 0
            self.operations.appendleft(action)
            self.writing_until = self.world.now + late
            return
        self.report(lambda: protocol.plane_done(action.op, self.clock()))

        self.late += 1

        def write() -> None:
            """Or never, if the connection has ended meanwhile."""
            self.late -= 1
            if protocol.state is State.OPERATIONAL and protocol.epoch == epoch:
                self.plane.install(action.records)

        self.does(late, write)

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
        held = self.plane.records()
        left = held[[number not in sent for number in held["id"].tolist()]]
        part = left[: self.world.rng.randint(1, 5)]
        sent.update(part["id"].tolist())
        last = len(part) == len(left)
        self.drain()
        if self.alive:
            self.run(self.protocol.state_page(txid, part, last, self.clock()))
            if not last and self.protocol.state is State.EXCHANGING:
                self.does(self.world.rng.choice([0.0, 0.01]), lambda: self.page(txid, sent))
