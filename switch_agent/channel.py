# SPDX-License-Identifier: Apache-2.0
"""The connection to a switch: listens for it, greets it, and carries transactions and events.

This is the only place that knows os-ken, as a codec for what is sent seldom: rules, groups, meters. What
comes often is read by codec.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from os_ken.ofproto import ofproto_v1_3 as ofp
from os_ken.ofproto import ofproto_v1_3_parser as parser
from os_ken.ofproto.ofproto_protocol import ProtocolDesc

from nat_control.straight import Straight
from nat_control.tls import Tls
from switch_agent import codec, pipeline, probe
from switch_agent.codec import Error, Event, Lost, ProtocolError, Ready, TransactionComplete
from switch_agent.limits import Limits
from switch_agent.relay import Relay
from switch_agent.transaction import Decode, Pending, Rows

_OPENFLOW = ProtocolDesc(ofp.OFP_VERSION)
_ORDER = 0x8000_0002  # transaction id of the barrier before a probe's rule; nobody waits for its answer
_RESENT = (0.002, 0.1)  # seconds until a probe is sent again, first and longest
ADD, DELETE, DELETE_STRICT = ofp.OFPFC_ADD, ofp.OFPFC_DELETE, ofp.OFPFC_DELETE_STRICT
TABLE_FULL = (ofp.OFPET_FLOW_MOD_FAILED, ofp.OFPFMFC_TABLE_FULL)
GROUP_EXISTS = (ofp.OFPET_GROUP_MOD_FAILED, ofp.OFPGMFC_GROUP_EXISTS)
METER_EXISTS = (ofp.OFPET_METER_MOD_FAILED, ofp.OFPMMFC_METER_EXISTS)


# -- encoding ----------------------------------------------------------------------------------------------


def _bytes(message: Any, txid: int) -> bytes:
    message.set_xid(txid)
    message.serialize()
    return bytes(message.buf)


def _action(action: pipeline.Action) -> Any:
    match action:
        case pipeline.Output(port):
            return parser.OFPActionOutput(port, 0)
        case pipeline.ToController():
            return parser.OFPActionOutput(ofp.OFPP_CONTROLLER, ofp.OFPCML_NO_BUFFER)
        case pipeline.Group(group_id):
            return parser.OFPActionGroup(group_id)
        case pipeline.SetField(name, value):
            return parser.OFPActionSetField(**{name: value})
        case pipeline.DecTtl():
            return parser.OFPActionDecNwTtl()
        case pipeline.PushVlan():
            return parser.OFPActionPushVlan(0x8100)
        case pipeline.PopVlan():
            return parser.OFPActionPopVlan()
        case pipeline.LoadRegister(value):
            return parser.NXActionRegLoad(ofs_nbits=31, dst="reg0", value=value)
        case pipeline.Resubmit(table):
            return parser.NXActionResubmitTable(table_id=table)
        case pipeline.Learn(table, cookie, value):
            return parser.NXActionLearn(table, [parser.NXFlowSpecLoad(value, ("reg0", 0), 32)], cookie=cookie)
        case pipeline.Track(zone, table):
            return parser.NXActionCT(0, "", zone, table, 0, [parser.NXActionNAT(0)])


def flow_mod(rule: pipeline.Rule, command: int = ADD, txid: int = 0) -> bytes:
    """Adds ``rule``, or deletes exactly it: by match, priority and whole cookie."""
    instructions = []
    if command == ADD and rule.meter:
        instructions.append(parser.OFPInstructionMeter(rule.meter))
    if command == ADD and rule.actions:
        actions = [_action(action) for action in rule.actions]
        instructions.append(parser.OFPInstructionActions(ofp.OFPIT_APPLY_ACTIONS, actions))
    message = parser.OFPFlowMod(
        _OPENFLOW,
        cookie=rule.cookie,
        cookie_mask=0 if command == ADD else pipeline.ALL_BITS,
        command=command,
        table_id=rule.table,
        idle_timeout=rule.idle_timeout if command == ADD else 0,
        priority=rule.priority,
        out_port=ofp.OFPP_ANY,
        out_group=ofp.OFPG_ANY,
        flags=ofp.OFPFF_SEND_FLOW_REM if command == ADD and rule.idle_timeout else 0,
        match=parser.OFPMatch(**rule.match),
        instructions=instructions,
    )
    return _bytes(message, txid)


def delete_by_cookie(cookie: int, mask: int = pipeline.ALL_BITS, txid: int = 0) -> bytes:
    """Deletes all rules whose cookie has the bits of ``cookie`` under ``mask``."""
    message = parser.OFPFlowMod(
        _OPENFLOW,
        cookie=cookie,
        cookie_mask=mask,
        table_id=ofp.OFPTT_ALL,
        command=DELETE,
        out_port=ofp.OFPP_ANY,
        out_group=ofp.OFPG_ANY,
        match=parser.OFPMatch(),
        instructions=[],
    )
    return _bytes(message, txid)


def group_mod(
    group_id: int, actions: Sequence[pipeline.Action], txid: int = 0, *, modify: bool = False
) -> bytes:
    """An ``indirect`` group with one bucket."""
    bucket = parser.OFPBucket(
        watch_port=ofp.OFPP_ANY, watch_group=ofp.OFPG_ANY, actions=[_action(action) for action in actions]
    )
    command = ofp.OFPGC_MODIFY if modify else ofp.OFPGC_ADD
    return _bytes(parser.OFPGroupMod(_OPENFLOW, command, ofp.OFPGT_INDIRECT, group_id, [bucket]), txid)


def static_group(group: pipeline.StaticGroup, txid: int = 0, *, modify: bool = False) -> bytes:
    if isinstance(group, pipeline.Indirect):
        return group_mod(group.group_id, group.actions, txid, modify=modify)
    live = parser.OFPBucket(
        watch_port=group.port, watch_group=ofp.OFPG_ANY, actions=[_action(one) for one in group.live]
    )
    last = [parser.OFPActionGroup(group.otherwise)]
    lost = parser.OFPBucket(watch_port=ofp.OFPP_ANY, watch_group=group.otherwise, actions=last)
    command = ofp.OFPGC_MODIFY if modify else ofp.OFPGC_ADD
    return _bytes(parser.OFPGroupMod(_OPENFLOW, command, ofp.OFPGT_FF, group.group_id, [live, lost]), txid)


def delete_group(group_id: int = ofp.OFPG_ALL, txid: int = 0) -> bytes:
    """One group or all, and with them the flows that use them."""
    return _bytes(parser.OFPGroupMod(_OPENFLOW, ofp.OFPGC_DELETE, ofp.OFPGT_INDIRECT, group_id, []), txid)


def meter_mod(meter_id: int, rate: int, txid: int = 0, *, modify: bool = False) -> bytes:
    """``rate`` packets per second pass, with a burst of a tenth of a second's worth; the others are dropped."""
    band = parser.OFPMeterBandDrop(rate, max(rate // 10, 1))
    command = ofp.OFPMC_MODIFY if modify else ofp.OFPMC_ADD
    flags = ofp.OFPMF_PKTPS | ofp.OFPMF_BURST
    return _bytes(parser.OFPMeterMod(_OPENFLOW, command, flags, meter_id, [band]), txid)


def _statistics_request(cookie: int, mask: int, txid: int) -> bytes:
    request = parser.OFPFlowStatsRequest(
        _OPENFLOW, 0, ofp.OFPTT_ALL, ofp.OFPP_ANY, ofp.OFPG_ANY, cookie, mask, parser.OFPMatch()
    )
    return _bytes(request, txid)


def _greeting(txid: int) -> bytes:
    """What a switch gets once it has said hello; it answers with features, ports and a barrier reply.

    Without a miss_send_len it sends no port status, and without the mask no packet whose TTL is too low.
    """
    packet_in = 1 << ofp.OFPR_NO_MATCH | 1 << ofp.OFPR_ACTION | 1 << ofp.OFPR_INVALID_TTL
    ports, removed = 0b111, 0b1111
    return b"".join(
        _bytes(message, txid)
        for message in (
            parser.OFPFeaturesRequest(_OPENFLOW),
            parser.OFPSetConfig(_OPENFLOW, ofp.OFPC_FRAG_NORMAL, ofp.OFPCML_NO_BUFFER),
            parser.OFPSetAsync(_OPENFLOW, [packet_in, 0], [ports, ports], [removed, 0]),
            parser.OFPPortDescStatsRequest(_OPENFLOW, 0),
            parser.OFPBarrierRequest(_OPENFLOW),
        )
    )


def _error_name(kind: int, code: int) -> str:
    return f"{ofp.ofp_error_type_to_str(kind)} {ofp.ofp_error_code_to_str(kind, code)}"


# -- the connection ----------------------------------------------------------------------------------------


class ChannelLost(ConnectionError):
    """There is no connection to the switch, or it ended before the answer came."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.decoder = codec.Decoder(_error_name)
        self.pending: dict[int, Pending] = {}
        self.probes = probe.Probes(flow_mod)
        self.heard = 0.0
        self.lost = False


class Channel:
    """One switch. ``datapath_id`` None takes any; another than the given one is turned away.

    With ``prove`` the answer to a barrier counts for nothing until a probe has come back: see probe.py.
    Events are taken in batches by ``events()``; a Ready begins each connection and a Lost ends it. Of two
    connections of the same switch the newer one counts. ``refusals`` has the last lines about connections
    that came to nothing.
    """

    def __init__(
        self, datapath_id: int | None = None, limits: Limits | None = None, *, prove: bool = False
    ) -> None:
        self.datapath_id = datapath_id
        self.prove = prove
        self.limits = limits or Limits()
        self.packets_dropped = 0  # packet-ins, for want of room
        self.packet_outs_dropped = 0
        self.refusals: deque[str] = deque(maxlen=16)
        self._server: asyncio.Server | None = None
        self._relay: Relay | None = None
        self._connection: _Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: deque[Event] = deque()
        self._packets = self._packet_bytes = 0
        self._newcomers = 0
        self._arrived = asyncio.Event()
        self._slots = asyncio.Semaphore(self.limits.outstanding)
        self._txid = 0

    async def listen(self, where: str, tls: Tls | None = None, *, urgent: bool = False) -> str:
        """Lets the switch connect to ``ADDRESS:PORT``, ``unix:PATH`` or, with ``tls``, ``tls:ADDRESS:PORT``; returns where it is.

        ``urgent``: see Relay. Raises OSError, TlsError.
        """
        if where.startswith("unix:"):
            self._server = await asyncio.start_unix_server(self._accept, where.removeprefix("unix:"))
            return where
        host, _, port = where.removeprefix("tls:").rpartition(":")
        if tls:
            self._relay = Relay(tls, urgent=urgent, taken=self._take, refused=self._refuse)
            return f"tls:{host}:{await self._relay.start(host, int(port))}"
        self._server = await asyncio.start_server(self._accept, host, int(port))
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server:
            self._server.close()
        if self._relay:
            await self._relay.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def fileno(self) -> int:
        """The socket's descriptor, for a thread that writes prepared bytes on it. Raises ChannelLost."""
        return int(self._current().writer.get_extra_info("socket").fileno())

    def next_txid(self) -> int:
        """A transaction id that is not in use: 1 to 2^31 - 1."""
        self._txid = self._txid % 0x7FFF_FFFF + 1
        return self._txid

    async def events(self) -> list[Event]:
        """All events that have come since the last call, at least one."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        found = list(self._events)
        self._events.clear()
        self._packets = self._packet_bytes = 0
        return found

    async def transact(
        self,
        data: bytes | bytearray | memoryview,
        txid: int,
        unless: Callable[[], bool] | None = None,
    ) -> tuple[Error, ...]:
        """Sends messages that all have ``txid``, then a barrier; returns what the switch refused of them.

        ``unless`` is asked in the moment of sending: then nothing is sent.

        What it has acknowledged and not done, where that is to be proved, is an error that names no rule. At most
        ``limits.outstanding`` wait for their barrier, and their proof, at a time, the others here. Raises ChannelLost.
        """
        async with self._slots:
            if unless is not None and unless():
                return ()
            if not self.prove:
                return tuple((await self._ask(data, codec.barrier(txid), txid, 0)).errors)
            connection = self._current()
            version, number = connection.probes.version(txid)
            end = (codec.barrier(_ORDER), version, codec.barrier(txid), connection.probes.packet_out)
            returned = connection.probes.numbered(number)
            try:
                errors = (await self._ask(data, b"".join(end), txid, 0)).errors
                if any(probe.refused(error.cookie) for error in errors):
                    return tuple(replace(e, cookie=None) if probe.refused(e.cookie) else e for e in errors)
                if await self._returns(connection, returned, connection.probes.packet_out):
                    return tuple(errors)
            finally:
                connection.probes.forget(returned)
        text = f"acknowledged, but not there {self.limits.proof:g} s later"
        return (*errors, Error(txid, 0xFFFF, 0, text))

    async def comes_back(self, frame: bytes, in_port: int) -> bool:
        """Whether a frame that enters the table as if from a port comes back as it is, in time. Raises ChannelLost."""
        connection = self._current()
        sent = codec.packet_out(frame, port=codec.TABLE_PORT, in_port=in_port)
        returned = connection.probes.frame(in_port, frame)
        try:
            connection.writer.write(sent)
            return await self._returns(connection, returned, sent)
        finally:
            connection.probes.forget(returned)

    async def statistics(self, cookie: int, mask: int, decode: Decode = codec.flow_statistics) -> Rows:
        """The flows with these bits of the cookie, as ``decode`` reads them (codec.FLOW_STAT). Raises ChannelLost."""
        txid = self.next_txid()
        return await self._parts(_statistics_request(cookie, mask, txid), txid, codec.FLOW_STATISTICS, decode)

    async def groups(self, decode: Decode) -> Rows:
        """The descriptions of all groups, as ``decode`` reads them. Raises ChannelLost."""
        txid = self.next_txid()
        request = _bytes(parser.OFPGroupDescStatsRequest(_OPENFLOW, 0), txid)
        return await self._parts(request, txid, codec.GROUP_DESCRIPTIONS, decode)

    async def _parts(self, request: bytes, txid: int, kind: int, decode: Decode) -> Rows:
        async with self._slots:
            pending = await self._ask(request, b"", txid, kind, decode)
        if pending.errors:
            raise ChannelLost(f"no statistics: {pending.errors[0].text}")
        return np.concatenate([decode(b""), *pending.parts])

    def write(self, data: bytes) -> None:
        """Sends as it is, without waiting for anything. Raises ChannelLost."""
        self._current().writer.write(data)

    def packet_out(self, frame: bytes, *, port: int = 0, group: int = 0) -> bool:
        """Sends a frame out of ``port`` or through ``group``; False when it was dropped, and counted."""
        connection = self._connection
        if connection is None or self._full(connection):
            self.packet_outs_dropped += 1
            return False
        connection.writer.write(codec.packet_out(frame, port=port, group=group))
        return True

    # -- inside --------------------------------------------------------------------------------------------

    def _full(self, connection: _Connection) -> bool:
        return connection.writer.transport.get_write_buffer_size() > self.limits.write_buffer

    def _echo(self, connection: _Connection, xid: int, body: bytes) -> None:
        if self._full(connection):
            raise ProtocolError("the switch asks, and takes no answers")
        connection.writer.write(codec.echo(codec.ECHO_REPLY, xid, body))

    def _current(self) -> _Connection:
        if self._connection is None:
            raise ChannelLost("the switch is not connected")
        return self._connection

    async def _ask(
        self,
        data: bytes | bytearray | memoryview,
        end: bytes,
        txid: int,
        kind: int,
        decode: Decode = codec.flow_statistics,
    ) -> Pending:
        connection = self._current()
        loop = asyncio.get_running_loop()
        pending = Pending(self.limits, loop.create_future(), loop.time(), decode, kind)
        connection.pending[txid] = pending
        guard = loop.call_at(pending.due, self._look_at, connection, txid)
        try:
            connection.writer.write(b"".join((data, end)))  # at once: the switch begins with what it has
            await connection.writer.drain()
            await pending.done
        except ConnectionError as error:
            told = pending.done.exception() if pending.done.done() else None
            raise ChannelLost(str(told or error) or "the connection to the switch broke") from None
        finally:
            guard.cancel()
            connection.pending.pop(txid, None)
            if pending.done.done() and not pending.done.cancelled():
                pending.done.exception()  # looked at, so that nobody warns about it
        return pending

    def _look_at(self, connection: _Connection, txid: int) -> None:
        """Whether an answer is overdue."""
        loop = asyncio.get_running_loop()
        if (pending := connection.pending.get(txid)) is None:
            return
        if loop.time() < pending.due:
            loop.call_at(pending.due, self._look_at, connection, txid)
        else:
            self._lose(connection, pending.overdue)

    async def _returns(self, connection: _Connection, returned: asyncio.Future[None], sent: bytes) -> bool:
        """Whether a probe that was sent comes back in time; it is sent again from time to time."""
        pause, longest = _RESENT
        loop = asyncio.get_running_loop()
        end = loop.time() + self.limits.proof
        while not returned.done() and loop.time() < end:
            await asyncio.wait([returned], timeout=pause)
            pause = min(2 * pause, longest)
            if not returned.done() and self._connection is connection:
                connection.writer.write(sent)
        if returned.done():
            returned.result()
        return returned.done()

    def _take(self, connection: socket.socket) -> None:
        """One that has passed TLS."""

        async def accept() -> None:
            await self._accept(*await asyncio.open_connection(sock=connection))

        task = asyncio.get_running_loop().create_task(accept())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refuse(self, reason: str) -> None:
        if reason not in self.refusals:
            self.refusals.append(reason)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        connection = _Connection(reader, writer)
        reason = "closed"
        try:
            early = await self._welcome(connection)
            self._handle(connection, early)
            await self._read(connection)
        except (ProtocolError, ConnectionError) as error:
            reason = str(error) or "the switch closed the connection"
        except TimeoutError:
            reason = f"no greeting within {self.limits.answer:g} s"
        except asyncio.CancelledError:
            reason = "closed by us"
        finally:
            self._lose(connection, reason)
            self._tasks.discard(task)

    async def _welcome(self, connection: _Connection) -> list[Event]:
        if self._newcomers >= self.limits.newcomers:
            raise ProtocolError(f"{self._newcomers} connections have not said yet who they are")
        self._newcomers += 1
        try:
            async with asyncio.timeout(self.limits.answer):
                return await self._greet(connection)
        finally:
            self._newcomers -= 1

    async def _greet(self, connection: _Connection) -> list[Event]:
        """Hello, settings, identity; after it the connection is the current one. Returns what came besides."""
        hello = parser.OFPHello(_OPENFLOW, [parser.OFPHelloElemVersionBitmap([ofp.OFP_VERSION])])
        connection.writer.write(_bytes(hello, 0))
        txid = self.next_txid()
        greeted, features, found, rest = False, None, list[codec.PortDescription](), list[Event]()
        while True:
            batch = connection.decoder.feed(await _some(connection))
            for i, event in enumerate(batch):
                match event:
                    case codec.Hello() if greeted:
                        raise ProtocolError("the switch says hello twice")
                    case codec.Hello():
                        greeted = True
                        connection.writer.write(_greeting(txid))
                    case _ if not greeted:
                        raise ProtocolError("the switch does not begin with a hello")
                    case codec.Features():
                        features = event
                        if self.datapath_id not in (None, event.datapath_id):
                            expected = f"{self.datapath_id:016x} was expected"
                            raise ProtocolError(
                                f"the switch is datapath {event.datapath_id:016x}; {expected}"
                            )
                    case codec.Multipart(_, codec.PORT_DESCRIPTIONS, _, body):
                        found += codec.ports(body)
                    case codec.Echo(xid, body):
                        self._echo(connection, xid, body)
                    case Error(text=text):
                        raise ProtocolError(f"the switch refuses the greeting: {text}")
                    case TransactionComplete(done) if done == txid:
                        if features is None:
                            raise ProtocolError("the switch has not said which one it is")
                        self._adopt(connection, Ready(features.datapath_id, features.tables, tuple(found)))
                        return rest + batch[i + 1 :]
                    case _:
                        rest.append(event)
            size = sum(len(event.frame) for event in rest if isinstance(event, codec.PacketIn))
            if len(rest) > self.limits.packets or size > self.limits.packet_bytes:
                raise ProtocolError("the switch talks without answering the greeting")
            if len(found) > self.limits.ports:
                raise ProtocolError(f"the switch has more than {self.limits.ports} ports")

    def _adopt(self, connection: _Connection, ready: Ready) -> None:
        if self._connection:
            self._lose(self._connection, "the switch has made a new connection")
        self._connection = connection
        self._emit(ready)

    async def _read(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()

        def received(data: bytes) -> None:
            connection.heard = loop.time()
            self._handle(connection, connection.decoder.feed(data))

        connection.heard = loop.time()
        loop.call_later(self.limits.idle, self._look_for_life, connection, False)
        await Straight(connection.writer, received).ended(connection.reader)
        raise ConnectionError("the switch closed the connection")

    def _look_for_life(self, connection: _Connection, asked: bool) -> None:
        if connection.lost:
            return
        loop = asyncio.get_running_loop()
        due = connection.heard + self.limits.idle
        if loop.time() < due:
            loop.call_at(due, self._look_for_life, connection, False)
        elif asked:
            self._lose(connection, f"the switch has been silent for {2 * self.limits.idle:g} s")
        else:
            connection.writer.write(codec.echo(codec.ECHO_REQUEST, 0))
            loop.call_later(self.limits.idle, self._look_for_life, connection, True)

    def _handle(self, connection: _Connection, events: list[Event]) -> None:
        for event in events:
            match event:
                case codec.PacketIn() if self.prove and connection.probes.returned(event):
                    pass
                case codec.PacketIn():
                    size = self._packet_bytes + len(event.frame)
                    if self._packets >= self.limits.packets or size > self.limits.packet_bytes:
                        self.packets_dropped += 1
                    else:
                        self._packets += 1
                        self._packet_bytes = size
                        self._emit(event)
                case TransactionComplete(txid) if pending := connection.pending.get(txid):
                    pending.complete()
                case TransactionComplete(txid) if txid == _ORDER:
                    pass
                case Error(txid) if pending := connection.pending.get(txid):
                    pending.refused(event)
                case codec.Multipart(txid, kind, more, body):
                    pending = connection.pending.get(txid)
                    if pending is None or pending.kind != kind:
                        raise ProtocolError("the switch sends statistics that nobody asked for")
                    pending.add(body, more, connection.heard)
                case codec.Echo(xid, body):
                    self._echo(connection, xid, body)
                case codec.Hello() | codec.Features():
                    raise ProtocolError("the switch greets in the middle of a connection")
                case _:
                    if len(self._events) >= self.limits.events:
                        raise ProtocolError(f"{self.limits.events} events wait, and the switch sends more")
                    self._emit(event)

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    def _lose(self, connection: _Connection, reason: str) -> None:
        """Once: what comes of it later is no news."""
        if connection.lost:
            return
        connection.lost = True
        for pending in connection.pending.values():
            if not pending.done.done():
                pending.done.set_exception(ChannelLost(reason))
        connection.probes.fail(ChannelLost(reason))
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            connection.writer.transport.abort()
        if self._connection is connection:
            self._connection = None
            self._emit(Lost(reason))
        else:
            self._refuse(reason)


async def _some(connection: _Connection) -> bytes:
    data = await connection.reader.read(1 << 18)
    if not data:
        raise ConnectionError("the switch closed the connection")
    return data
