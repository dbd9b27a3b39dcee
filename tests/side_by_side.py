# SPDX-License-Identifier: Apache-2.0
"""The core and the reference model on the same packets: every difference is an AssertionError."""

from __future__ import annotations

from functools import cache
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Packet, Raw

from nat_fastpath.engine import Core, Verdict
from tests.packets import (
    INSIDE,
    OUR_ADDRESS,
    check_sums,
    external,
    frame,
    internal,
    number,
    parse,
    remote,
    text,
)
from tests.reference_nat import Datagram, Endpoint, ReferenceNat, Session

NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17}
PROTOCOLS = {number: name for name, number in NUMBERS.items()}
PAYLOAD = b"as it was sent"


def to_packet(datagram: Datagram, payload: bytes = PAYLOAD) -> Packet:
    """The scapy packet of a datagram, without link header."""
    (source, sport), (destination, dport) = datagram.source, datagram.destination
    head = IP(src=source, dst=destination, ttl=datagram.ttl, id=1)
    if datagram.kind == "udp":
        return head / UDP(sport=sport, dport=dport) / Raw(payload)
    if datagram.kind == "tcp":
        return head / TCP(sport=sport, dport=dport, flags=datagram.flags, seq=9) / Raw(payload)
    if datagram.kind == "query":
        return head / ICMP(type=8, id=sport, seq=3) / Raw(payload)
    if datagram.kind == "answer":
        return head / ICMP(type=0, id=dport, seq=3) / Raw(payload)
    assert datagram.quoted is not None
    return head / ICMP(type=3, code=1) / Raw(bytes(to_packet(datagram.quoted, payload)))


def to_datagram(packet: Packet) -> tuple[Datagram, bytes]:
    """A parsed packet as a datagram, and its innermost payload."""
    source, destination, ttl = packet.src, packet.dst, packet.ttl
    body = bytes(packet.payload)
    if packet.proto in (6, 17):
        # a quotation may end after eight bytes, before the flags
        transport = TCP(body.ljust(20, b"\0")) if packet.proto == 6 else UDP(body)
        ends = (source, transport.sport), (destination, transport.dport)
        flags = str(transport.flags) if packet.proto == 6 else ""
        return Datagram(PROTOCOLS[packet.proto], *ends, flags=flags, ttl=ttl), body[
            20 if packet.proto == 6 else 8 :
        ]
    message = ICMP(body)
    if message.type == 8:
        return Datagram("query", (source, message.id), (destination, 0), ttl=ttl), bytes(message.payload)
    if message.type == 0:
        return Datagram("answer", (source, 0), (destination, message.id), ttl=ttl), bytes(message.payload)
    quoted, payload = to_datagram(IP(body[8:]))
    return Datagram("error", (source, 0), (destination, 0), ttl=ttl, quoted=quoted), payload


def model_of(core: Core) -> ReferenceNat:
    """The model with the configuration of this core."""
    config = core.config
    pool = {}
    for part in config.pool:
        first, last = part.own or part.ports
        for address in range(int(part.first), int(part.last) + 1):
            pool[text(address)] = range(first, last + 1)
    return ReferenceNat(
        pool=pool,
        own=frozenset(text(port.address) for port in config.ports),
        mapping=config.mapping,
        filtering=config.filtering,
        udp_timeout=config.udp_timeout,
        tcp_established_timeout=config.tcp_established_timeout,
        tcp_transitory_timeout=config.tcp_transitory_timeout,
        icmp_timeout=config.icmp_timeout,
        max_sessions=config.max_sessions,
        sessions_per_host=config.sessions_per_host,
        mappings_per_host=config.mappings_per_host,
    )


class Pair:
    """Sends every packet to both. The core must have a static neighbour for whoever is meant to answer."""

    def __init__(self, core: Core, now_ns: int) -> None:
        self.core, self.model, self.now = core, model_of(core), now_ns

    @property
    def seconds(self) -> float:
        return self.now / 1e9

    def _chosen(self, datagram: Datagram) -> Endpoint:
        (source, sport), (destination, dport) = datagram.source, datagram.destination
        ends = (number(source), sport), (number(destination), dport)
        record = self.core.find(NUMBERS[datagram.protocol], *ends)
        assert record is not None, f"the core has no session for {datagram}"
        return external(record)

    def expected(self, datagram: Datagram, port: int) -> tuple[str, Datagram | None]:
        """What the model says, once the core has had the packet."""
        if port == INSIDE:
            return self.model.outbound(datagram, self.seconds, self._chosen)
        return self.model.inbound(datagram, self.seconds)

    def send(
        self, datagram: Datagram, port: int, payload: bytes = PAYLOAD
    ) -> tuple[Verdict, Datagram | None]:
        """The packet through both; returns what both say became of it."""
        result = self.core.burst([(port, frame(to_packet(datagram, payload), port))], self.now)[0]
        verdict, translated = self.expected(datagram, port)
        assert result.verdict.name == verdict, (
            f"{datagram} is {result.verdict.name}, the model says {verdict}"
        )
        if result.verdict > Verdict.REPLY:
            return result.verdict, None
        check_sums(result.frame)
        if result.verdict == Verdict.REPLY:
            answer = parse(result.frame)
            assert (answer.dst, result.port) == (datagram.source[0], port), "an answer goes back to who asked"
            return result.verdict, None
        got, got_payload = to_datagram(parse(result.frame))
        assert got == translated, f"{datagram} became {got}, the model says {translated}"
        assert got_payload == payload
        side = (
            1 - INSIDE
            if got.source[0] in self.model.pool and not self._is_inside(got.destination[0])
            else INSIDE
        )
        assert result.port == side, "out by the wrong interface"
        return result.verdict, got

    def _is_inside(self, address: str) -> bool:
        return address.rpartition(".")[0] == OUR_ADDRESS[INSIDE].rpartition(".")[0]

    def wait(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)
        self.core.settle(self.now)
        self.model.expire(self.seconds)

    def compare(self) -> None:
        """All sessions of both, with the timeout that each is under; and what must hold of any NAT."""

        def of_model(s: Session) -> tuple[Any, ...]:
            m = s.mapping
            return m.protocol, m.internal, m.external, s.remote, round(1000 * self.model.timeout(s))

        records, cursor = self.core.sessions(0, 1 << 16)
        assert cursor == 0
        mine = {
            (PROTOCOLS[int(r["protocol"])], internal(r), external(r), remote(r), int(r["timeout_ms"]))
            for r in records
        }
        assert len(mine) == len(records), "a session stands twice in the core's table"
        assert mine == {of_model(s) for s in self.model.sessions()}
        inside_of: dict[Any, Any] = {}
        outside_of: dict[Any, Any] = {}
        for protocol, inside, outside, _, _ in mine:
            assert inside_of.setdefault((protocol, outside), inside) == inside, (
                "an external endpoint used twice"
            )
            if self.core.config.mapping == "endpoint-independent":
                assert outside_of.setdefault((protocol, inside), outside) == outside, "two external endpoints"
        counters = self.core.counters()
        assert counters["sessions"] == len(mine)
        assert counters["hosts"] == len({inside[0] for _, inside, _, _, _ in mine})
        assert counters["sessions_opened"] - counters["sessions_closed"] == len(mine)
        assert counters["mappings_opened"] - counters["mappings_closed"] == len(inside_of)

    def empty(self) -> None:
        """Ages everything, and proves the pool whole: every port of it can be taken again."""
        self.wait(10_000)
        assert self.core.counters()["sessions"] == 0
        for protocol in ("udp", "tcp", "query"):
            self._take_all(protocol)
        self.wait(10_000)
        assert self.core.counters()["sessions"] == 0

    def _take_all(self, kind: str) -> None:
        ports = sum(len(of_address) for of_address in self.model.pool.values())
        hosts = [text(int(n.address)) for n in self.core.config.neighbours]
        remote_end = "203.0.113.99", 0 if kind == "query" else 99
        sources = [(hosts[at % len(hosts)], 1 + at // len(hosts)) for at in range(ports + 1)]
        results = self.core.burst(
            [(INSIDE, opening(kind, source, remote_end)) for source in sources], self.now
        )
        verdicts = [result.verdict for result in results]
        assert verdicts == [Verdict.FORWARD] * ports + [Verdict.DROP_NO_PORT], "the pool has lost ports"
        at = 38 if kind == "query" else 34  # the external identifier or port, behind the address
        taken = {(r.frame[26:30], r.frame[at : at + 2]) for r in results[:-1]}
        assert len(taken) == ports, "a port was given twice"


@cache
def opening(kind: str, source: Endpoint, destination: Endpoint) -> bytes:
    """The frame from inside that opens a session."""
    return frame(to_packet(Datagram(kind, source, destination, flags="S" * (kind == "tcp"))))
