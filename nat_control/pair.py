# SPDX-License-Identifier: Apache-2.0
"""One half of a pair: sync and heartbeat put together, as the server and the switch agent both need them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import socket
from collections.abc import Callable, Sequence

import numpy as np

from nat_control.config import Config
from nat_control.dataplane import NO_RECORDS, Changes, DataPlane, Events, Front, Mask, Records, changes
from nat_control.peer import PeerView
from nat_control.sync import actions as do
from nat_control.sync.actions import Limits, Mode, State
from nat_control.sync.codec import PoolRange
from nat_control.sync.protocol import Protocol
from nat_control.sync.transport import Transport
from nat_control.tls import TlsError, context, reason
from nat_fastpath.watch import Watch

DIGEST_PERIOD = 2.0  # seconds; what a return waits for at most once nothing is under way
ACTIVITY_SHARE = 8  # the owner of a session hears of its traffic so many times per timeout
ACTIVITY_PERIOD = 5.0  # seconds at least, if that is a third of the timeout at most
NEXT_HOPS_PERIOD = 0.25  # seconds between two looks at next hops
NEXT_HOPS_AGAIN = (
    10.0  # seconds that a MAC was confirmed later than the peer has heard; it asks itself after 30
)
# ms that a worker may stand still. A process that does is silent, and found by that; but a worker that shares its CPU waits
# for its turn now and then, and the heartbeat, which has a higher priority, tells of it.
STALLED = 100.0
HAND_OVER = 2.0  # seconds that the peer has to take the traffic


def pools(config: Config) -> tuple[PoolRange, ...]:
    """What this instance hands out, as Hello tells it."""
    return tuple(
        PoolRange(int(first), int(last), low, high)
        for first, last in config.nat.pool.ranges
        for low, high in config.nat.pool.port_ranges
    )


def _ports(ranges: Sequence[PoolRange]) -> set[int]:
    return {port for one in ranges for port in range(one.port_first, one.port_last + 1)}


def heartbeat_key(config: Config) -> bytes:
    """The configured key; with TLS one that the side which listens derives from its private key, and Hello tells the other:
    so it stays the same when that side starts anew. Without either both derive the same, which keeps strays out and nobody else.
    """
    assert config.peer
    assert config.heartbeat
    assert config.virtual
    if tls := config.peer.tls:
        private = tls.key.read_bytes() if config.peer.listen else os.urandom(16)
        return hashlib.blake2b(private, digest_size=16, person=b"heartbeat").digest()
    return (
        config.heartbeat.key
        or hashlib.blake2b(config.virtual.mac, digest_size=16, key=b"tandem-nat").digest()
    )


class PairError(Exception):
    """An address of the pair cannot be used; one line."""


def unusable(where: str, error: OSError, who: str = "another instance") -> str:
    """Why an address cannot be listened at, in one line; ``who`` perhaps does already."""
    hint = f": does {who} listen there?" if error.errno == errno.EADDRINUSE else ""
    return f"{where}: {reason(error)}{hint}"


class Pair:
    """``drain`` takes the plane's events and gives them to ``events``; ``notice`` is told what happens.

    ``guard``: a peer that the heartbeat finds dead loses its connection at once. An owner that arms the watch for bytes of
    its own sees to that itself. ``ours``: sessions of which all packets are seen here, so that what we know is news to the
    peer. ``front``: the switch's side. Raises PairError, here and from ``run``.
    """

    def __init__(
        self,
        config: Config,
        plane: DataPlane,
        *,
        epoch: int,
        clock: Callable[[], float],
        drain: Callable[[], object],
        notice: Callable[[do.Action], None],
        counters: Sequence[int] = (),
        guard: bool = False,
        ours: Callable[[Records], Mask] | None = None,
        front: Front | None = None,
    ) -> None:
        assert config.peer
        assert config.heartbeat
        peer, heartbeat = config.peer, config.heartbeat
        self._listen = peer.listen
        try:
            tls = context(peer.tls, listens=peer.listen is not None) if peer.tls else None
        except TlsError as error:
            raise PairError(f"peer.tls: {error}") from None
        self._plane = plane
        self._ours = ours
        self._clock = clock
        self._notice = notice
        self._timeouts = config.nat.timeouts
        self._shorter = asyncio.Event()  # timeouts were changed
        self.protocol = Protocol(
            config.number,
            pools(config),
            Mode(peer.mode),
            epoch=epoch,
            slices=config.slices,
            kind=0 if peer.twin is None else 1 if peer.twin.primary else 2,
            limits=Limits(digest=DIGEST_PERIOD),
        )
        self.transport = Transport(
            self.protocol,
            plane,
            clock=clock,
            drain=drain,
            notice=self._noticed,
            listen=peer.listen,
            connect=peer.connect,
            tls=tls,
            front=front,
        )
        self.view = PeerView(self.protocol, self.transport, plane, clock)
        key = heartbeat_key(config)
        if peer.tls:
            self.protocol.heartbeat_key = key
        try:
            self.watch = Watch(
                heartbeat.listen,
                heartbeat.connect,
                key,
                instance=config.number,
                epoch=epoch,
                interval_ms=heartbeat.interval_ms,
                misses=heartbeat.misses,
                patience_ms=max(STALLED, heartbeat.interval_ms * heartbeat.misses),
                counters=counters,
            )
        except OSError as error:
            ends = [f"{host}:{port}" for host, port in filter(None, (heartbeat.listen, heartbeat.connect))]
            raise PairError(unusable(f"heartbeat {' to '.join(ends)}", error)) from None
        self.refused = ""  # why the last greeting came to nothing
        self.differing = 0  # digests of 256, when they were last compared
        self._takes_key = peer.tls is not None and peer.connect is not None  # that of the side that listens
        self._told = self.protocol.pools  # in our last Hello
        self._told_carrier: asyncio.Queue[do.CarrierTold] = asyncio.Queue(16)
        self._asking = asyncio.Lock()
        # Who has nothing to write at the peer's death must notice it all the same: held packets wait for the peer.
        self._bell = socket.socketpair() if guard else None

    @property
    def state(self) -> State:
        return self.protocol.state

    def refuses(self, config: Config) -> str:
        """Why a changed pool cannot be used now; "": it can.

        Only a Hello compares pools. Until the next one nobody hands out a port that the other may hand out at any
        address: the peer, too, keeps to those of its Hello.
        """
        new, peer = pools(config), self.protocol.peer
        if new == self.protocol.pools or self.state in (State.STARTING, State.ALONE, State.FAILED):
            return ""
        if self.state is not State.OPERATIONAL or peer is None:
            return "nat.pool: the peer is being greeted: try again in a moment"
        ports, told, its = _ports(new), _ports(self._told), _ports(peer.pools)
        if ports <= told and not ports & its:
            return ""
        return (
            "nat.pool.ports: while the peer is connected only ports that it was told of, and hands out nowhere, can be "
            "used: needs a restart"
        )

    def reconfigured(self, config: Config) -> None:
        """This configuration, which was not refused, is in force."""
        self.protocol.pools = pools(config)
        self._timeouts = config.nat.timeouts
        self._shorter.set()

    def events(self, events: Events) -> None:
        """What our own plane did."""
        self.transport.events(changes(events))

    def carried(self, records: Records) -> None:
        """What our rules have carried of sessions whose other packets the peer sees: DataPlane.update with FLAG_OFFLOAD."""
        if self.state is State.OPERATIONAL:
            self.transport.events(Changes(NO_RECORDS, records, NO_RECORDS))

    def _noticed(self, action: do.Action) -> None:
        if isinstance(action, do.StateChanged):
            if self._takes_key and (it := self.protocol.peer) is not None:
                self.watch.rekey(it.heartbeat_key)
            if action.before is State.OPERATIONAL:
                self._hear_carrier(do.CarrierTold(0, False, f"the peer is lost: {action.why}"))
            if action.after in (State.FAILED, State.OPERATIONAL):
                self.refused = action.why if action.after is State.FAILED else ""
            self.differing = 0
            if action.after is State.HANDSHAKE:
                self._told = self.protocol.pools
            # A descriptor must be out of the watch before the transport closes it.
            operational = action.after is State.OPERATIONAL
            self.watch.watch_tcp(self.transport.fileno() if operational else None)
            if self._bell is not None and operational:
                self.watch.arm(b"\0", self._bell[0].fileno())
            elif self._bell is not None:
                self.watch.disarm()
        elif isinstance(action, do.DigestCompared):
            self.differing = len(action.differing)
        elif isinstance(action, do.CarrierTold):
            self._hear_carrier(action)
        self.view.notice(action)
        self._notice(action)

    def _hear_carrier(self, told: do.CarrierTold) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # nobody waits, or the answer is among them
            self._told_carrier.put_nowait(told)

    async def listen(self) -> None:
        """Takes the address of the sync channel; who runs the pair later shall hear at once that it is taken."""
        try:
            await self.transport.listen()
        except OSError as error:
            where = "peer.listen {}:{}".format(*(self._listen or ()))
            raise PairError(unusable(where, error)) from None

    async def run(self) -> None:
        """Until cancelled: the sync channel, the heartbeat, and what the peer must hear of our traffic."""
        await self.listen()
        with self.watch, contextlib.ExitStack() as undo:
            if self._bell is not None:
                loop = asyncio.get_running_loop()
                loop.add_reader(self.watch.eventfd, self._peer_died)
                undo.callback(loop.remove_reader, self.watch.eventfd)
                for end in self._bell:
                    undo.callback(end.close)
            self.transport.ready()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.transport.run())
                tasks.create_task(self._tell_activity())
                tasks.create_task(self._tell_next_hops())

    def _peer_died(self) -> None:
        """Told by the watch; its connection may stand for long, and nobody acknowledges anything any more."""
        os.read(self.watch.eventfd, 8)
        if self.watch.fired is not None:
            self.transport.lose()

    async def hand_over(
        self, *, here: bool = False, lasting: bool = False, timeout: float = HAND_OVER
    ) -> str:
        """Asks the peer, who decides, that it, or we, carry the traffic. Returns why it does not come to that; "": done.

        Packets must be forwarded until this returns. ``lasting``: until one side asks for something else.
        """
        async with self._asking:
            peer = self.protocol.peer
            if self.state is not State.OPERATIONAL or peer is None:
                return f"the peer is not in step ({self.state.value})"
            wanted = self.protocol.instance if here else peer.instance
            while not self._told_carrier.empty():
                self._told_carrier.get_nowait()
            self.transport.hand_over(wanted, lasting=lasting)
            try:
                async with asyncio.timeout(timeout):
                    while True:
                        told = await self._told_carrier.get()
                        if told.why or (told.carrier == wanted and told.lasting >= (lasting and not here)):
                            return told.why
            except TimeoutError:
                return f"the peer has not answered for {timeout:g} s"

    async def stop(self) -> None:
        """We leave on purpose: the peer hears it before anything is closed."""
        with contextlib.suppress(ValueError):
            self.watch.disarm()
            self.watch.leave()
        await self.transport.stop()

    async def _tell_next_hops(self) -> None:
        """All to a new peer, then what is news or was confirmed anew: who stands by cannot ask for itself."""
        told: dict[
            tuple[int, int], tuple[int, float]
        ] = {}  # port and address → MAC, and when it was confirmed
        peer = None
        while True:
            await asyncio.sleep(NEXT_HOPS_PERIOD)
            if self.protocol.peer is None:
                continue
            if peer is not self.protocol.peer:
                told, peer = {}, self.protocol.peer
            known = await self._plane.next_hops()
            now = self._clock()
            earlier, told = told, {}
            news = np.zeros(len(known), np.bool_)
            for i, row in enumerate(known[["port", "address", "mac", "confirmed_ms"]].tolist()):
                hop, mac, confirmed = (row[0], row[1]), row[2], now - row[3] / 1000
                told[hop] = earlier.get(hop, (0, 0.0))
                if told[hop][0] != mac or confirmed - told[hop][1] > NEXT_HOPS_AGAIN:
                    told[hop], news[i] = (mac, confirmed), True
            if news.any():
                self.transport.next_hops(known[news])

    @property
    def activity_period(self) -> float:
        """Seconds between two looks at what was carried."""
        shortest = min(self._timeouts.udp, self._timeouts.icmp, self._timeouts.tcp_transitory)
        return min(max(shortest / ACTIVITY_SHARE, ACTIVITY_PERIOD), shortest / 3)

    async def activity_pause(self, most: float | None = None) -> None:
        """Until it is time to look at what was carried, or ``most`` seconds; shorter timeouts ask for a look at once."""
        with contextlib.suppress(TimeoutError):
            period = self.activity_period
            await asyncio.wait_for(self._shorter.wait(), min(period, most or period))
        self._shorter.clear()

    async def _tell_activity(self) -> None:
        """The owner ages a session, but only the carrier sees its packets."""
        while True:
            await self.activity_pause()
            self.transport.hearsay.look(self._clock())
            if self.state is not State.OPERATIONAL:
                continue
            async for page in self._plane.sessions():
                if self._ours is not None:
                    page = page[self._ours(page)]
                if len(active := self.transport.hearsay.carried(page)):
                    self.transport.events(Changes(updated=active))
