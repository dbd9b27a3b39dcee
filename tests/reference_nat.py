# SPDX-License-Identifier: Apache-2.0
"""A source NAT in plain Python, written from the RFCs: what the core must agree with.

Behaviour: RFC 2663 (terms), RFC 4787 (UDP), RFC 5382 and RFC 7857 (TCP), RFC 5508 (ICMP).  It is slow, knows
no bytes, no MACs and no ARP, and tells nothing about which external port is chosen: whoever runs it beside
the core says by ``chosen`` what the core took, and the model checks that this was legal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

Endpoint = tuple[str, int]  # address, port; for ICMP queries port is the identifier, of a remote 0
FORWARD, REPLY = "FORWARD", "REPLY"


class IllegalChoice(AssertionError):
    """The core chose an external endpoint that no NAT may choose."""


@dataclass(frozen=True, slots=True)
class Datagram:
    """A packet without its bytes. ``kind``: "udp", "tcp", "query", "answer" (ICMP), "error" (ICMP)."""

    kind: str
    source: Endpoint
    destination: Endpoint
    flags: str = ""  # TCP: letters as scapy writes them
    ttl: int = 64
    quoted: Datagram | None = None

    @property
    def protocol(self) -> str:
        return "icmp" if self.kind in ("query", "answer") else self.kind


@dataclass(slots=True)
class Tcp:
    """A connection as somebody on the path sees it; sides are "in" (of the NAT) and "out"."""

    opener: str
    synced: set[str] = field(default_factory=set)
    answered: bool = False  # the opener has acknowledged the other side's SYN
    finished: set[str] = field(default_factory=set)
    reset: bool = False

    def see(self, flags: str, side: str) -> None:
        if "R" in flags:
            # RFC 6146, 3.5.2.2: before there is a connection a reset changes nothing; after it, it may be forged
            if self.established:
                self.reset, self.finished = True, set()
        elif "S" in flags and "A" not in flags and self._may_begin_anew(side):
            self.opener, self.synced, self.finished = side, {side}, set()
            self.answered = self.reset = False
        elif "S" in flags and not self.answered:
            self.synced.add(side)
        elif len(self.synced) == 2 and (self.answered or side == self.opener):
            self.answered, self.reset = True, False
            if "F" in flags:
                self.finished.add(side)

    def _may_begin_anew(self, side: str) -> bool:
        return self.reset or len(self.finished) == 2 or side in self.finished

    @property
    def established(self) -> bool:
        """RFC 5382, REQ-5: both SYNs seen and answered, and not closed by both or by a reset."""
        return self.answered and len(self.finished) < 2 and not self.reset


@dataclass(slots=True)
class Session:
    mapping: Mapping
    remote: Endpoint
    last: float
    tcp: Tcp | None
    hairpin: bool


@dataclass(slots=True, eq=False)
class Mapping:
    protocol: str
    internal: Endpoint
    external: Endpoint
    sessions: dict[Endpoint, Session] = field(default_factory=dict)


@dataclass(slots=True)
class ReferenceNat:
    """``pool`` gives the ports of each address; the limits are 0 for none. Times are seconds."""

    pool: dict[str, range]
    own: frozenset[str]
    mapping: str = "endpoint-independent"
    filtering: str = "address-and-port-dependent"
    udp_timeout: float = 300
    tcp_established_timeout: float = 7440
    tcp_transitory_timeout: float = 240
    icmp_timeout: float = 60
    max_sessions: int = 0
    sessions_per_host: int = 0
    mappings_per_host: int = 0
    mappings: dict[tuple[str, Endpoint], Mapping] = field(default_factory=dict)  # by protocol and external
    homes: dict[str, str] = field(default_factory=dict)  # external address of each inside host

    # -- what there is -----------------------------------------------------------------------------------

    def sessions(self) -> list[Session]:
        return [session for mapping in self.mappings.values() for session in mapping.sessions.values()]

    def of_host(self, address: str) -> list[Mapping]:
        return [m for m in self.mappings.values() if m.internal[0] == address]

    def outbound_session(self, protocol: str, internal: Endpoint, remote: Endpoint) -> Session | None:
        for m in self.of_host(internal[0]):
            if m.protocol == protocol and m.internal == internal and remote in m.sessions:
                return m.sessions[remote]
        return None

    def inbound_session(self, protocol: str, remote: Endpoint, external: Endpoint) -> Session | None:
        found = self.mappings.get((protocol, external))
        return found.sessions.get(remote) if found else None

    def free_ports(self, protocol: str, address: str) -> int:
        used = sum(p == protocol and e[0] == address and e[1] in self.pool[address] for p, e in self.mappings)
        return len(self.pool[address]) - used

    # -- time ----------------------------------------------------------------------------------------------

    def timeout(self, session: Session) -> float:
        if session.mapping.protocol == "udp":
            return self.udp_timeout
        if session.tcp is None:
            return self.icmp_timeout
        return self.tcp_established_timeout if session.tcp.established else self.tcp_transitory_timeout

    def expire(self, now: float) -> None:
        """Ends what has been idle for its timeout, and mappings that have no session left."""
        for key, mapping in list(self.mappings.items()):
            for remote, session in list(mapping.sessions.items()):
                if now - session.last >= self.timeout(session):
                    del mapping.sessions[remote]
            if not mapping.sessions:
                del self.mappings[key]
        with_mapping = {m.internal[0] for m in self.mappings.values()}
        self.homes = {host: home for host, home in self.homes.items() if host in with_mapping}

    # -- packets -------------------------------------------------------------------------------------------

    def outbound(
        self, packet: Datagram, now: float, chosen: Callable[[Datagram], Endpoint]
    ) -> tuple[str, Datagram | None]:
        """What becomes of a packet from inside: a verdict, and for FORWARD the translated packet.

        ``chosen`` is asked for the external endpoint when the packet needs a new mapping; IllegalChoice if
        that endpoint is not one a NAT may take.
        """
        if packet.destination[0] in self.own:
            return (REPLY if packet.kind == "query" else "DROP_LOCAL"), None
        if packet.kind == "error":
            return self._error_outbound(packet, now)
        if packet.kind == "answer":
            return "DROP_ICMP_NO_SESSION", None
        to_pool = packet.destination[0] in self.pool
        if to_pool and packet.kind == "query":
            return REPLY, None
        session = self.outbound_session(packet.protocol, packet.source, packet.destination)
        if packet.ttl <= 1:
            return REPLY, None  # time exceeded
        if session is None:
            if packet.kind == "tcp" and not opens(packet):
                return "DROP_TCP_NOT_SYN", None
            why, session = self._open_outbound(packet, now, chosen, to_pool)
            if session is None:
                return why, None
        self._touch(session, packet, now, "in")
        translated = replace(packet, source=session.mapping.external)
        if to_pool:
            return self.inbound(translated, now, hairpinned=True)
        return FORWARD, replace(translated, ttl=packet.ttl - 1)

    def inbound(self, packet: Datagram, now: float, hairpinned: bool = False) -> tuple[str, Datagram | None]:
        """What becomes of a packet from outside, or of one that turned round inside (RFC 4787, REQ-9)."""
        if packet.destination[0] in self.own:
            return (REPLY if packet.kind == "query" else "DROP_LOCAL"), None
        if packet.destination[0] not in self.pool:
            return "DROP_NOT_POOL", None
        if packet.source[0] in self.pool and not hairpinned:
            return "DROP_ADDRESS", None
        if packet.kind == "error":
            return self._error_inbound(packet, now)
        if packet.kind == "query":
            return REPLY, None
        session = self.inbound_session(packet.protocol, packet.source, packet.destination)
        if session is None and packet.kind == "answer":
            return "DROP_ICMP_NO_SESSION", None
        if session is None:
            why, session = self._open_inbound(packet, now, hairpinned)
            if session is None:
                return why, None
        elif packet.ttl <= 1:
            return ("DROP_TTL" if hairpinned else REPLY), None
        self._touch(session, packet, now, "out")
        return FORWARD, replace(packet, destination=session.mapping.internal, ttl=packet.ttl - 1)

    def _touch(self, session: Session, packet: Datagram, now: float, side: str) -> None:
        session.last = now
        if session.tcp is not None:
            session.tcp.see(packet.flags, side)

    def _refused(self, host: str, new_mapping: bool) -> str | None:
        mappings = self.of_host(host)
        sessions = sum(len(m.sessions) for m in mappings)
        if self.sessions_per_host and sessions >= self.sessions_per_host:
            return "DROP_QUOTA"
        if new_mapping and self.mappings_per_host and len(mappings) >= self.mappings_per_host:
            return "DROP_QUOTA"
        if self.max_sessions and len(self.sessions()) >= self.max_sessions:
            return "DROP_TABLE_FULL"
        return None

    def _open_outbound(
        self, packet: Datagram, now: float, chosen: Callable[[Datagram], Endpoint], hairpin: bool
    ) -> tuple[str, Session | None]:
        mapping = None
        if self.mapping == "endpoint-independent":
            known = (m for m in self.of_host(packet.source[0]) if m.internal == packet.source)
            mapping = next((m for m in known if m.protocol == packet.protocol), None)
        refused = self._refused(packet.source[0], mapping is None)
        if refused:
            return refused, None
        if mapping is None:
            if not any(self.free_ports(packet.protocol, address) for address in self.pool):
                return "DROP_NO_PORT", None
            mapping = Mapping(packet.protocol, packet.source, chosen(packet))
            self._check_choice(mapping)
            self.mappings[packet.protocol, mapping.external] = mapping
        return FORWARD, self._add(mapping, packet.destination, packet, now, "in", hairpin)

    def _check_choice(self, mapping: Mapping) -> None:
        address, port = mapping.external
        if address not in self.pool or port not in self.pool[address]:
            raise IllegalChoice(f"{mapping.external} is not in the pool")
        if (mapping.protocol, mapping.external) in self.mappings:
            raise IllegalChoice(f"{mapping.protocol} {mapping.external} belongs to another mapping")
        # RFC 4787, REQ-2: one external address for all of a host, as long as that one has ports
        home = self.homes.setdefault(mapping.internal[0], address)
        if address != home and self.free_ports(mapping.protocol, home):
            raise IllegalChoice(
                f"{mapping.internal} is at home on {home}, which has ports, and not on {address}"
            )

    def _open_inbound(self, packet: Datagram, now: float, hairpin: bool) -> tuple[str, Session | None]:
        mapping = self.mappings.get((packet.protocol, packet.destination))
        if mapping is None:
            return "DROP_NO_MAPPING", None
        if not self._admits(mapping, packet.source):
            return "DROP_FILTERED", None
        # The answer would leave by the mapping that this pair has already, and never reach who sent this.
        if self.outbound_session(packet.protocol, mapping.internal, packet.source):
            return "DROP_FILTERED", None
        if packet.kind == "tcp" and not opens(packet):
            return "DROP_TCP_NOT_SYN", None
        if packet.ttl <= 1:
            return ("DROP_TTL" if hairpin else REPLY), None
        refused = self._refused(mapping.internal[0], False)
        if refused:
            return refused, None
        return FORWARD, self._add(mapping, packet.source, packet, now, "out", hairpin)

    def _admits(self, mapping: Mapping, source: Endpoint) -> bool:
        """RFC 4787, section 5. Whom the inside sent to has a session already and is not asked about here."""
        if self.filtering == "endpoint-independent":
            return True
        if self.filtering == "address-dependent":
            return any(remote[0] == source[0] for remote in mapping.sessions)
        return False

    def _add(
        self, mapping: Mapping, remote: Endpoint, packet: Datagram, now: float, opener: str, hairpin: bool
    ) -> Session:
        tcp = Tcp(opener) if packet.kind == "tcp" else None
        session = mapping.sessions[remote] = Session(mapping, remote, now, tcp, hairpin)
        return session

    # -- ICMP errors: RFC 5508, section 4. They do not keep a session alive (REQ-6) --------------------------

    def _error_inbound(self, packet: Datagram, now: float) -> tuple[str, Datagram | None]:
        assert packet.quoted is not None
        quoted = packet.quoted
        if quoted.source[0] != packet.destination[0]:
            return "DROP_ICMP_EMBEDDED", None
        session = self.inbound_session(quoted.protocol, quoted.destination, quoted.source)
        if session is None:
            return "DROP_ICMP_NO_SESSION", None
        inside = session.mapping.internal
        return FORWARD, replace(
            packet,
            destination=(inside[0], packet.destination[1]),
            quoted=replace(quoted, source=inside),
            ttl=packet.ttl - 1,
        )

    def _error_outbound(self, packet: Datagram, now: float) -> tuple[str, Datagram | None]:
        assert packet.quoted is not None
        quoted = packet.quoted
        if quoted.source[0] != packet.destination[0]:
            return "DROP_ICMP_EMBEDDED", None
        session = self.outbound_session(quoted.protocol, quoted.destination, quoted.source)
        if session is None:
            return "DROP_ICMP_NO_SESSION", None
        outside = session.mapping.external
        translated = replace(
            packet,
            source=(outside[0], packet.source[1]),
            quoted=replace(quoted, destination=outside),
        )
        if session.hairpin:
            return self._error_inbound(translated, now)
        return FORWARD, replace(translated, ttl=packet.ttl - 1)


def opens(packet: Datagram) -> bool:
    """A SYN and nothing that belongs to a later step."""
    return "S" in packet.flags and not set(packet.flags) & set("ARF")
