# SPDX-License-Identifier: Apache-2.0
"""One input for a side of the sync protocol: Decoder, Protocol and a real core, driven by a bad peer and by time.

The input is a script. Each step is a byte ``kind | flags``, and for a message 2 bytes of length and its payload:

    0       bytes as they are (length, bytes)
    1..21   a message of this type (length, payload); flags: FOREIGN of another epoch, LYING with a length that is a
            power of two too large, HALVED in two parts with a step of the plane between them
    22      time passes: 1 byte, in quarters of a second
    23      the plane carries out the next operation
    24      an inside host opens a session (1 byte names it)
    25      one of our sessions ends
    26      the connection ends, and a new one begins
    27      the pair hands over, we leave on purpose, or ask the peer's switch to carry (1 byte chooses)

Whatever comes: nothing is raised, what is sent can be sent, an Error ends the connection, nobody's packets stay
held, and our own sessions go on but for those that the peer was told of and deleted.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import numpy as np

from nat_control.dataplane import NO_IDS, NO_RECORDS, Ids, Records, changes
from nat_control.sync import actions as do
from nat_control.sync.actions import Limits, Mode, State
from nat_control.sync.codec import (
    CARRIED,
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    VERSION,
    BucketEntries,
    CodecError,
    Decoder,
    DeleteComplete,
    DeleteEntries,
    Digest,
    Error,
    HandOver,
    Hello,
    InFront,
    InitState,
    InstallComplete,
    InstallEntries,
    Message,
    Moved,
    NextHopsKnown,
    Offload,
    PoolRange,
    Ready,
    Recall,
    Resync,
    UpdateEntries,
    WantEntries,
    encode,
)
from nat_control.sync.digest import Summary, within
from nat_control.sync.protocol import Protocol
from nat_fastpath.engine import FLAG_PENDING, FLAG_PREVAILS, NEIGHBOUR, RECORD, Core
from tests.packets import CLIENT, INSIDE, POOL, SERVER, START, config, frame, number, small_pool, udp

RAW, LAST_MESSAGE, TIME, PLANE, OPEN, END, RECONNECT, ELSE = 0, 21, 22, 23, 24, 25, 26, 27
KIND, FOREIGN, LYING, HALVED = 0x1F, 0x20, 0x40, 0x80
EPOCH = 7  # the peer's
ADDRESS = number(POOL[0])
OURS, ITS = PoolRange(ADDRESS, ADDRESS, 2000, 2031), PoolRange(ADDRESS, ADDRESS, 2032, 2063)
MOST, RING = 64, 1024  # sessions, events
CONFIGS = {
    mode: config(
        instance=1, synchronous=mode is Mode.SYNCHRONOUS, hold=3600.0, max_sessions=MOST, event_ring=RING,
        max_neighbours=64, pool=small_pool(64)
    )
    for mode in Mode
}  # fmt: skip
FRAMES = [frame(udp(CLIENT, 4000 + i, SERVER, 53)) for i in range(8)]
LIMITS = Limits(batch=4, window=2, waiting=32, digest=1.0)


class Script:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, n: int) -> bytes:
        part = self._data[self._at : self._at + n]
        self._at += n
        return part

    def byte(self) -> int:
        return self.take(1)[0] if self else 0

    def block(self) -> bytes:
        return self.take(int.from_bytes(self.take(2), "little"))


class Side:
    def __init__(self, mode: Mode) -> None:
        self.core = Core(CONFIGS[mode])
        self.protocol = Protocol(1, (OURS,), mode, limits=LIMITS)
        self.decoder = Decoder()
        self.now = 0.0
        self.work: deque[partial[object]] = deque()
        self.ended: set[int] = set()  # ids that somebody has ended on purpose
        self.opened: set[int] = set()
        self.closing = False
        self.carry_out(self.protocol.plane_ready())
        self.connect()

    def sessions(self) -> Records:
        found, cursor = self.core.sessions(0, MOST + 1)
        assert cursor == 0
        return found

    # -- the shell, as in nat_control/sync/transport.py

    def connect(self) -> None:
        self.decoder, self.closing = Decoder(), False
        self.carry_out(self.protocol.connected(self.now))

    def disconnect(self) -> None:
        self.carry_out(self.protocol.disconnected(self.now))

    def feed(self, data: bytes) -> None:
        if self.closing:
            return
        try:
            for epoch, message in self.decoder.feed(data):
                self.carry_out(self.protocol.received(epoch, message, self.now))
            if self.decoder.kept >= HEADER.size:  # nothing is waited for that may not come
                assert HEADER.unpack_from(self.decoder._kept)[-1] <= MAX_PAYLOAD
        except CodecError as error:
            self.carry_out(self.protocol.broken(one_line(error), self.now))
            if not self.closing:
                raise AssertionError("broken bytes do not end the connection") from error

    def drain(self) -> None:
        events = self.core.events(RING)
        if len(events):
            self.carry_out(self.protocol.events(changes(events), self.now))

    def carry_out(self, actions: list[do.Action]) -> None:
        for at, action in enumerate(actions):
            match action:
                case do.Send(epoch, message):
                    assert not self.closing, "something is sent after the end"
                    encode(message, epoch)
                    if isinstance(message, Error):
                        assert isinstance(actions[at + 1], do.Close)
                        assert self.protocol.state is State.FAILED
                case do.Close():
                    self.closing = True
                case do.Commit(records):
                    self.core.commit(records)
                case do.Install(op, records):
                    self.work.append(partial(self.install, op, records))
                case do.Delete(op, records):
                    self.work.append(partial(self.delete, op, records))
                case do.Update(records):
                    self.work.append(partial(self.core.update, records))
                case do.Learn(next_hops):
                    self.work.append(partial(self.core.learn, next_hops))
                case do.TakeOwnership():
                    self.work.append(partial(self.core.adopt))
                case do.Cede(instance, besides):
                    self.work.append(partial(self.core.cede, instance, besides))
                case do.SendState(txid):
                    self.work.append(partial(self.page, txid))
                case do.TakeDigest(at_position, besides):
                    self.work.append(partial(self.sum_up, at_position, besides))
                case do.TakeBuckets(at_position, buckets, besides):
                    self.work.append(partial(self.gather, at_position, buckets, besides))
                case do.Fetch(op, ids):
                    self.work.append(partial(self.fetch, op, ids))
                case do.Move(op, ids, _):
                    self.work.append(partial(self.move, op, ids))
                case do.Carry():
                    self.carry_out(self.protocol.carries(1, self.now))

    def install(self, op: int, records: Records) -> None:
        before = self.sessions()
        held = self.core.install(records := self.protocol.prevailing(op, records))
        self.ended |= displaced(before, self.sessions(), records)
        refused = records["id"][~self.core.holds(records)] if held < len(records) else NO_IDS
        self.drain()
        self.carry_out(self.protocol.plane_done(op, self.now, refused))

    def delete(self, op: int, records: Records) -> None:
        self.ended |= set(records["id"].tolist())
        self.core.delete(records)
        self.drain()
        self.carry_out(self.protocol.plane_done(op, self.now))

    def page(self, txid: int) -> None:
        self.drain()
        self.carry_out(self.protocol.state_page(txid, self.sessions(), True, self.now))

    def sum_up(self, at: do.Position, besides: Ids) -> None:
        summary, found = Summary(), self.sessions()
        summary.add(found[~np.isin(found["id"], besides)])
        self.drain()
        self.carry_out(self.protocol.digest_taken(at, summary.buckets, summary.count, self.now))

    def gather(self, at: do.Position, buckets: tuple[int, ...], besides: Ids) -> None:
        found = self.sessions()
        found = within(found[~np.isin(found["id"], besides)], buckets)
        self.drain()
        self.carry_out(self.protocol.buckets_taken(at, buckets, found, self.now))

    def fetch(self, op: int, ids: Ids) -> None:
        found = self.sessions()
        self.drain()
        self.carry_out(self.protocol.fetched(op, found[np.isin(found["id"], ids)], self.now))

    def move(self, op: int, ids: Ids) -> None:
        self.drain()
        self.carry_out(self.protocol.front_moved(op, ids[::2], 3, self.now))

    def ask_front(self) -> list[do.Action]:
        return self.protocol.ask_front(1, self.sessions()["id"], True, self.now)

    def plane(self) -> None:
        if self.work:
            self.work.popleft()()

    # -- what happens

    def open(self, which: int) -> None:
        self.core.burst([(INSIDE, FRAMES[which % len(FRAMES)])], START)
        events = self.core.events(RING)
        opened, *_ = found = changes(events)
        self.opened |= set(opened["id"].tolist())
        self.carry_out(self.protocol.events(found, self.now))

    def end_one(self, which: int) -> None:
        found = self.sessions()
        if len(found):
            one = found[which % len(found)]
            self.ended.add(int(one["id"]))
            self.core.delete(one)
            self.drain()

    def step(self, script: Script) -> None:
        first = script.byte()
        kind = first & KIND
        if kind == RAW:
            self.feed(script.block())
        elif kind <= LAST_MESSAGE:
            payload = script.block()
            length = len(payload)
            if first & LYING:
                length = (length + (1 << int.from_bytes(payload[:1], "little") % 32)) & 0xFFFFFFFF
            epoch = EPOCH + bool(first & FOREIGN)
            data = HEADER.pack(MAGIC, VERSION, kind, epoch, length) + payload
            if first & HALVED:
                self.feed(data[: len(data) // 2])
                self.plane()
                data = data[len(data) // 2 :]
            self.feed(data)
        elif kind == TIME:
            self.now += script.byte() / 4
            self.carry_out(self.protocol.tick(self.now))
        elif kind == PLANE:
            self.plane()
        elif kind == OPEN:
            self.open(script.byte())
        elif kind == END:
            self.end_one(script.byte())
        elif kind == RECONNECT:
            self.disconnect()
            self.connect()
        elif kind == ELSE:
            self.carry_out(
                (
                    lambda: self.protocol.hand_over(2, self.now),
                    lambda: self.protocol.stop(self.now),
                    self.ask_front,
                )[script.byte() % 3]()
            )

    def finish(self) -> None:
        """The peer is lost, and everything comes to rest."""
        self.disconnect()
        while self.work:
            self.plane()
        self.drain()
        assert self.protocol.state is State.ALONE
        assert not self.protocol.busy
        found = self.sessions()
        assert not (found["flags"] & FLAG_PENDING).any(), "packets stay held"
        lost = self.opened - self.ended - set(found["id"].tolist())
        assert not lost, f"own sessions are gone: {lost}"
        assert self.core.counters()["sessions"] == len(found)
        triple = ["protocol", "external_addr", "external_port"]
        used = np.unique(found[[*triple, "internal_addr", "internal_port"]])
        assert len(used) == len(np.unique(used[triple])), "an external endpoint has two inside"


# What two sessions cannot both be: one 5-tuple inside, or one outside.
INNER = ["protocol", "internal_addr", "internal_port", "remote_addr", "remote_port"]
OUTER = ["protocol", "external_addr", "external_port", "remote_addr", "remote_port"]


def displaced(before: Records, after: Records, installed: Records) -> set[int]:
    """Sessions that made room for such as prevail over them, and only for such."""
    gone = before[~np.isin(before["id"], after["id"])]
    prevailing = installed[installed["flags"] & FLAG_PREVAILS != 0]
    for one in gone:
        assert any((one[fields] == prevailing[fields]).any() for fields in (INNER, OUTER)), (
            "ended for nothing"
        )
    return set(gone["id"].tolist())


def one_line(error: Exception) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def one_input(data: bytes) -> None:
    script = Script(data)
    side = Side(Mode.SYNCHRONOUS if script.byte() & 1 else Mode.ASYNCHRONOUS)
    try:
        for which in range(3):
            side.open(which)
        while script:
            side.step(script)
        side.finish()
    finally:
        side.core.close()


# -- the first inputs --------------------------------------------------------------------------------------


def step(message: Message, flags: int = 0) -> bytes:
    data = encode(message, EPOCH)
    payload = data[HEADER.size :]
    return bytes((data[3] | flags,)) + len(payload).to_bytes(2, "little") + payload


def records(n: int, first: int = 0) -> Records:
    made = np.zeros(n, RECORD)
    at = np.arange(first, first + n)
    made["id"] = 1 << 60 | 2 << 52 | EPOCH << 32 | at + 1
    made["protocol"], made["internal_addr"], made["remote_addr"] = 17, number(CLIENT), number(SERVER)
    made["internal_port"], made["external_port"] = 6000 + at, 2032 + at
    made["external_addr"], made["remote_port"] = ADDRESS, 53
    return made


def contradicting(n: int) -> Records:
    """Their inside endpoints are those of our own sessions."""
    made = records(n, 10)
    made["internal_port"] = 4000 + np.arange(n)
    return made


def seeds() -> list[bytes]:
    plane, opened = bytes((PLANE,)), bytes((OPEN, 5))
    hello = step(Hello(2, EPOCH, 3, (ITS,)))
    ready = [hello, plane, step(InitState(1, 0, True, records(3))), plane, step(Ready(1)), plane * 3]
    hops = np.zeros(2, NEIGHBOUR)
    hops["address"], hops["mac"] = number("10.0.0.99") + np.arange(2), 0x02_00_00_00_00_10
    carried = np.ones(2, CARRIED)
    stories = [
        ready,
        [*ready, opened, step(InstallComplete(1)), bytes((END, 0)), step(DeleteComplete(2)), plane],
        [*ready, step(InstallEntries(1, records(4, 8))), plane, step(UpdateEntries(records(2))), plane,
         step(DeleteEntries(2, records(2))), plane],
        [*ready, step(InstallEntries(1, contradicting(3))), plane, step(NextHopsKnown(hops)), plane],
        [*ready, bytes((TIME, 8)), plane, step(Digest(0, np.zeros(256, np.uint64))), plane * 2, step(HandOver(1))],
        [*ready, step(InstallComplete(1)), bytes((TIME, 8)), plane, step(BucketEntries(1, tuple(range(256)))), plane * 3],
        [*ready, step(InstallEntries(3, records(4, 8))), plane, step(WantEntries(records(9)["id"])), plane * 2,
         step(Resync(1, 1)), plane],
        [*ready, step(InstallComplete(1)), bytes((ELSE, 2)), step(Moved(1, 5, records(1)["id"])), step(InFront(2000, 4, carried)),
         step(Offload(1, records(5)["id"])), plane, step(Recall(2, records(2)["id"])), plane, *[step(Offload(3, NO_IDS))] * 9],
        [hello, plane, step(InitState(9, 0, False, records(2))), step(InitState(9, 1, True, contradicting(2))),
         plane * 2, step(Ready(1, records(1)["id"])), plane * 2, opened, bytes((RECONNECT,)), *ready],
        [hello, step(Error(2, "no")), bytes((RECONNECT,)), *ready, bytes((ELSE, 0, ELSE, 1))],
        [*ready[:-1], opened, bytes((TIME, 255)), plane * 2],
        [hello, step(InitState(1, 0, True, NO_RECORDS), FOREIGN)],
        [*ready, step(InstallEntries(1, records(2)), HALVED), step(InstallEntries(2, records(2)), LYING)],
        [bytes((RAW, 14, 0)), b"GET / HTTP/1.1"],
    ]  # fmt: skip
    return [bytes((mode,)) + b"".join(story) for story in stories for mode in (0, 1)]
