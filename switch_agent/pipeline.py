# SPDX-License-Identifier: Apache-2.0
"""The flow table of the switch as data: which rules there are, at which priority, for which traffic.

One table. From the top down (thesis 5.2 and 7.2):

====  ======================  ===========================================================================
 600  TCP control to server   SYN, FIN, RST; while the server carries and anything is in front
 590  TCP control to agent    the same, seen once those above are gone; while anything is in front
 500  session in front        two exact rules per session, which translate although the server lives
 400  forward to server       a port's traffic to the server and back; there while the server carries
 350  TCP control to agent    SYN, FIN, RST, so that its core knows in which state a connection is
 300  session behind          as those in front; they wait below the rules above
 200  agent's business        ARP and ICMP for our addresses, new flows: to the agent, each by its own meter
 150  probe                   what the agent sends through the table as a proof, and gets back (probe.py)
 100  fence                   what comes from the server's ports, once it is not forwarded any more
   0  rest                    dropped
====  ======================  ===========================================================================

A session has rules at one of the two priorities. Which, and what is forwarded, is the partition's choice, while both
halves live:

=============  =================================  ======================================================
all_peer       all traffic is forwarded           sessions wait behind; those that are offloaded go in front
new_at_peer    all traffic is forwarded           settled sessions are in front: UDP at once, TCP once established
by_protocol    but for the protocols chosen,      those of the chosen protocols are at work where they are, the
               which never see the server         others wait
all_local      nothing                            all are at work where they are
=============  =================================  ======================================================

A takeover only deletes rules (400, 600); all that is needed then stands already below them, whatever the partition. An
agent without a peer never installs them. Wide rules above narrow ones, in one table, is what a switch with one hardware
table can do too, and what Open vSwitch turns over fastest. Each field that any rule above a packet's own looks at makes
its cache entries narrower there: so rules at 500 and above exist only while something is in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, summarize_address_range

CONTROL_TO_SERVER_PRIORITY, CONTROL_FRONT_PRIORITY, CONTROL_PRIORITY = 600, 590, 350
FRONT_PRIORITY, FORWARD_PRIORITY, SESSION_PRIORITY = 500, 400, 300
AGENT_PRIORITY, FENCE_PRIORITY, REST_PRIORITY = 200, 100, 0
PROBE_PRIORITY = 150  # below what a takeover deletes, above the fence

ARP, IPV4 = 0x0806, 0x0800
PROBE_TYPE = 0x88B5  # for experiments on a local network (IEEE 802)
ICMP, TCP, UDP = 1, 6, 17
PORT_FIELDS = {TCP: ("tcp_src", "tcp_dst"), UDP: ("udp_src", "udp_dst")}
VLAN_PRESENT = 0x1000  # OFPVID_PRESENT; vlan_vid 0 matches untagged frames only

# Cookies: session ids have class 1 (see nat_id in nat.h), static rules class 7 with their kind below.
CLASS_MASK = 7 << 60
SESSION_CLASS = 1 << 60
STATIC_CLASS = 7 << 60
INBOUND = 1 << 63  # direction bit: external to internal
ALL_BITS = (1 << 64) - 1

FIN, SYN, RST, ACK = 1, 2, 4, 16


class Kind(IntEnum):
    """What a static rule is for: the low bits of its cookie."""

    TO_SERVER = 0x10
    FROM_SERVER = 0x11
    TCP_TO_SERVER = 0x12
    LATCH = 0x13  # the switch has found a link lost: failover.py
    DECIDE = 0x14
    FENCE = 0x20
    ARP = 0x30
    ICMP = 0x31
    NEW_FLOW = 0x32
    UNSOLICITED = 0x33
    TCP_OUT = 0x34  # SYN, FIN and RST from inside
    TCP_IN = 0x35  # and from outside, but a SYN only with ACK
    TCP_OUT_FRONT = 0x36  # the same above the sessions in front
    TCP_IN_FRONT = 0x37
    REST = 0x40
    RETURN = 0x50
    TRACK = 0x60  # of conntrack.py
    TOWARDS = 0x61  # and those of its next hops, with the group in the bits above

    @property
    def cookie(self) -> int:
        return STATIC_CLASS | self.value


FORWARD_COOKIE = STATIC_CLASS | 0x10
FORWARD_MASK = ALL_BITS & ~1  # both directions of forwarding
PROBE_COOKIE = STATIC_CLASS | 0x51  # of the rule whose version is in the bits between
PROBE_MASK = INBOUND | CLASS_MASK | 0xFF
# What a takeover deletes, the latch last: without it the forward rules would be in force again.
TAKEN_OVER = (Kind.TO_SERVER, Kind.FROM_SERVER, Kind.TCP_TO_SERVER, Kind.LATCH)


# -- actions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Output:
    port: int


@dataclass(frozen=True, slots=True)
class ToController:
    """The whole packet as a PacketIn."""


@dataclass(frozen=True, slots=True)
class Group:
    group_id: int


@dataclass(frozen=True, slots=True)
class SetField:
    """``name`` as in OpenFlow's OXM fields, in os-ken's spelling."""

    name: str
    value: int | str


@dataclass(frozen=True, slots=True)
class DecTtl:
    """A packet whose TTL would become 0 goes to the controller as it was matched."""


@dataclass(frozen=True, slots=True)
class PushVlan:
    pass


@dataclass(frozen=True, slots=True)
class PopVlan:
    pass


@dataclass(frozen=True, slots=True)
class LoadRegister:
    """Open vSwitch's register 0, which begins as 0."""

    value: int


@dataclass(frozen=True, slots=True)
class Resubmit:
    """Open vSwitch: the packet as it is now also goes through ``table``."""

    table: int


@dataclass(frozen=True, slots=True)
class Learn:
    """Open vSwitch: from now on ``table`` has a rule with this cookie that loads ``value`` into the register."""

    table: int
    cookie: int
    value: int


@dataclass(frozen=True, slots=True)
class Track:
    """Open vSwitch: goes on in ``table``, translated if the connection tracking of ``zone`` knows it (conntrack.py)."""

    zone: int
    table: int


Action = (
    Output
    | ToController
    | Group
    | SetField
    | DecTtl
    | PushVlan
    | PopVlan
    | LoadRegister
    | Resubmit
    | Learn
    | Track
)
Match = Mapping[str, int | str | tuple[str, str] | tuple[int, int]]  # a pair: value and mask


@dataclass(frozen=True, slots=True)
class Rule:
    """A flow entry; no ``actions`` drops. ``idle_timeout`` in seconds, 0 is none. ``table``: see failover.py."""

    priority: int
    match: Match
    actions: tuple[Action, ...]
    cookie: int
    meter: int = 0
    idle_timeout: int = 0
    table: int = 0


@dataclass(frozen=True, slots=True)
class Indirect:
    """A group with one bucket."""

    group_id: int
    actions: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class FastFailover:
    """A group: what happens while ``port`` has a link; else the group ``otherwise``."""

    group_id: int
    port: int
    live: tuple[Action, ...]
    otherwise: int


StaticGroup = Indirect | FastFailover


@dataclass(frozen=True, slots=True)
class NextHop:
    """An ``indirect`` group: ``mac`` is 48 bits; None sends to the agent, which resolves it."""

    side: str
    mac: int | None


# -- what a pipeline is made from --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the NAT on the switch.

    ``port`` and ``server_port`` are OpenFlow ports, ``server_port`` 0 without a server; ``vlan`` 0 is
    untagged; ``addresses`` are those that the NAT answers for on that side (pool included outside), ``gateways`` those
    whose ARP is listened to, whoever it is for.
    """

    port: int
    server_port: int = 0
    vlan: int = 0
    addresses: tuple[tuple[IPv4Address, IPv4Address], ...] = ()
    gateways: tuple[IPv4Address, ...] = ()

    @property
    def vlan_match(self) -> int:
        return self.vlan | VLAN_PRESENT if self.vlan else 0

    @property
    def networks(self) -> list[IPv4Network]:
        """``addresses`` as the fewest prefixes."""
        found = [net for first, last in self.addresses for net in summarize_address_range(first, last)]
        return sorted(set(found))


DEFAULT_RATES: Mapping[Kind, int] = {
    Kind.ARP: 1000,
    Kind.ICMP: 1000,
    Kind.NEW_FLOW: 5000,
    Kind.UNSOLICITED: 1000,
    Kind.TCP_OUT: 5000,
    Kind.TCP_IN: 5000,
}


@dataclass(frozen=True, slots=True)
class Partition:
    """Who carries what while both halves live: the protocols that the server gets, and whether settled sessions
    are put in front of it."""

    forwarded: frozenset[int]
    settled_in_front: bool = False

    @property
    def forwards(self) -> bool:
        return bool(self.forwarded)

    @property
    def forwards_all(self) -> bool:
        return self.forwarded == EVERYTHING


# Rules of one meter: their packets come by one of the two.
METER_OF = {Kind.TCP_OUT_FRONT: Kind.TCP_OUT, Kind.TCP_IN_FRONT: Kind.TCP_IN}
EVERYTHING = frozenset((ICMP, TCP, UDP))
ALL_PEER = Partition(EVERYTHING)
NEW_AT_PEER = Partition(EVERYTHING, settled_in_front=True)
ALL_LOCAL = Partition(frozenset())


def by_protocol(local: frozenset[int]) -> Partition:
    """``local``: the IP protocols that the server never sees."""
    return Partition(EVERYTHING - local)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """All rules of one switch. ``mac`` is the virtual MAC (48 bits), ``rates`` packets per second to the agent."""

    internal: Side
    external: Side
    mac: int
    rates: Mapping[Kind, int] = field(default_factory=lambda: DEFAULT_RATES)
    session_idle_timeout: int = 0
    probe_mac: int = 0  # whose frames come back to the agent once nothing forwards them; 0: there are none
    partition: Partition = ALL_PEER

    def meters(self) -> dict[int, int]:
        """Meter id → packets per second; the burst is a tenth of a second's worth."""
        return {kind.value: rate for kind, rate in self.rates.items()}

    def base(self) -> tuple[Rule, ...]:
        """All static rules but the forwarding ones."""
        rules = [Rule(REST_PRIORITY, {}, (), Kind.REST.cookie), *self.fence()]
        for side in (self.internal, self.external):
            for network in side.networks:
                where = masked(network)
                arp = self._inside(side, eth_type=ARP, arp_tpa=where)
                icmp = self._inside(side, eth_type=IPV4, ip_proto=ICMP, ipv4_dst=where)
                rules.append(self._to_agent(Kind.ARP, arp))
                if side is self.external:
                    rules.append(self._to_agent(Kind.ICMP, icmp, above=1))
                    any_ip = self._inside(side, eth_type=IPV4, ipv4_dst=where)
                    rules.append(self._to_agent(Kind.UNSOLICITED, any_ip))
            for gateway in side.gateways:  # one that announces a new MAC asks for nobody
                news = self._inside(side, eth_type=ARP, arp_spa=str(gateway))
                rules.append(self._to_agent(Kind.ARP, news, above=1))
        # What inside hosts send goes anywhere; only what is sent to our MAC is ours.
        ours = self._ours
        icmp = self._inside(self.internal, eth_type=IPV4, ip_proto=ICMP, **ours)
        rules.append(self._to_agent(Kind.ICMP, icmp, above=1))
        rules.append(self._to_agent(Kind.NEW_FLOW, self._inside(self.internal, eth_type=IPV4, **ours)))
        if self.probe_mac:
            for port in sorted({int(str(rule.match["in_port"])) for rule in self.forward()}):
                match: Match = {"in_port": port, "eth_src": mac_text(self.probe_mac)}
                rules.append(Rule(PROBE_PRIORITY, match, (ToController(),), Kind.RETURN.cookie))
        return tuple(rules)

    def forward(self) -> tuple[Rule, ...]:
        """The rules that put the server in front; those from the server first, so that no answer is lost."""
        sides = [side for side in (self.internal, self.external) if side.server_port]
        back = [
            Rule(
                FORWARD_PRIORITY,
                {"in_port": side.server_port},
                (Output(side.port),),
                Kind.FROM_SERVER.cookie,
            )
            for side in sides
        ]
        there = [rule for side in sides for rule in _forwarded(side, self.partition.forwarded)]
        return tuple(back + there)

    def forward_of_others(self) -> tuple[Rule, ...]:
        """The rules to the server that other partitions have, and this one has not."""
        chosen = (EVERYTHING, *(frozenset((protocol,)) for protocol in sorted(EVERYTHING)))
        ours = [(rule.priority, rule.match) for rule in self.forward()]
        others = [rule for one in chosen for rule in replace(self, partition=Partition(one)).forward()]
        return tuple(rule for rule in others if (rule.priority, rule.match) not in ours)

    def tcp_control(self) -> tuple[Rule, ...]:
        """What begins and ends a connection, to the agent, where only rules carry the session."""
        return self._tcp_control(CONTROL_PRIORITY, Kind.TCP_OUT, Kind.TCP_IN)

    def guard(self) -> tuple[Rule, ...]:
        """The same above the sessions in front; there while there are any."""
        return self._tcp_control(CONTROL_FRONT_PRIORITY, Kind.TCP_OUT_FRONT, Kind.TCP_IN_FRONT)

    def tcp_to_server(self) -> tuple[Rule, ...]:
        """And above those, to the server, which owns most connections: there while it carries, if it has TCP at all."""
        if TCP not in self.partition.forwarded:
            return ()
        return tuple(
            Rule(
                CONTROL_TO_SERVER_PRIORITY, rule.match, (Output(side.server_port),), Kind.TCP_TO_SERVER.cookie
            )
            for rule in self.guard()
            for side in (self.internal, self.external)
            if side.port == rule.match["in_port"] and side.server_port
        )

    def _tcp_control(self, priority: int, out: Kind, into: Kind) -> tuple[Rule, ...]:
        """Outside a SYN alone is left out: anybody can send many, and a session that it belongs to is rare."""
        flags = {out: ((FIN, FIN), (SYN, SYN), (RST, RST)), into: ((FIN, FIN), (SYN | ACK,) * 2, (RST, RST))}
        return tuple(
            Rule(
                priority,
                self._inside(side, eth_type=IPV4, ip_proto=TCP, **self._ours, tcp_flags=flag),
                (ToController(),),
                kind.cookie,
                METER_OF.get(kind, kind).value,
            )
            for side, kind in ((self.internal, out), (self.external, into))
            for flag in flags[kind]
        )

    def groups(self) -> tuple[StaticGroup, ...]:
        """Those that it needs besides next hops, each after those that it names: failover.py."""
        return ()

    def fence(self) -> tuple[Rule, ...]:
        """What drops, and counts, the packets of a server that is thought dead."""
        ports = [side.server_port for side in (self.internal, self.external) if side.server_port]
        return tuple(Rule(FENCE_PRIORITY, {"in_port": port}, (), Kind.FENCE.cookie) for port in ports)

    def session(
        self,
        protocol: int,
        inbound: bool,
        *,
        cookie: int,
        source: tuple[int, int],
        destination: tuple[int, int],
        translated: tuple[int, int],
        group_id: int,
        priority: int = SESSION_PRIORITY,
    ) -> Rule:
        """One direction of a session: the packet's endpoints (address, port) before, and the one that changes.

        Outbound the source becomes ``translated``, inbound the destination. ``protocol`` is TCP or UDP.
        """
        here, there = (self.external, self.internal) if inbound else (self.internal, self.external)
        source_port, destination_port = PORT_FIELDS[protocol]
        match = self._inside(
            here,
            eth_type=IPV4,
            ip_proto=protocol,
            ipv4_src=source[0],
            ipv4_dst=destination[0],
            **{source_port: source[1], destination_port: destination[1]},
        )
        changed = ("ipv4_dst", destination_port) if inbound else ("ipv4_src", source_port)
        actions = (
            DecTtl(),  # first: what goes to the agent because of its TTL is then as it came
            *(SetField(name, value) for name, value in zip(changed, translated, strict=True)),
            *retag(here.vlan, there.vlan),
            Group(group_id),
        )
        return Rule(priority, match, actions, cookie, idle_timeout=self.session_idle_timeout)

    def next_hop(self, hop: NextHop) -> tuple[Action, ...]:
        """The actions of a next hop's only bucket."""
        if hop.mac is None:
            return (ToController(),)
        side = self.internal if hop.side == "internal" else self.external
        macs = (SetField("eth_src", mac_text(self.mac)), SetField("eth_dst", mac_text(hop.mac)))
        return (*macs, Output(side.port))

    def _to_agent(self, kind: Kind, match: Match, above: int = 0) -> Rule:
        meter = kind.value if kind in self.rates else 0
        return Rule(AGENT_PRIORITY + above, match, (ToController(),), kind.cookie, meter)

    @property
    def _ours(self) -> dict[str, str]:
        return {"eth_dst": mac_text(self.mac)}

    @staticmethod
    def _inside(
        side: Side, **fields: int | str | tuple[str, str] | tuple[int, int]
    ) -> dict[str, int | str | tuple[str, str] | tuple[int, int]]:
        return {"in_port": side.port, "vlan_vid": side.vlan_match, **fields}


def _forwarded(side: Side, chosen: frozenset[int]) -> tuple[Rule, ...]:
    """What of a side goes to the server, by IP protocols. If some do not, both halves hear ARP: both need next hops."""
    to_server = (Output(side.server_port),)
    if chosen == EVERYTHING:
        return (Rule(FORWARD_PRIORITY, {"in_port": side.port}, to_server, Kind.TO_SERVER.cookie),)
    if not chosen:
        return ()
    tag = {"in_port": side.port, "vlan_vid": side.vlan_match}
    both = (ToController(), *to_server)  # as it came: who sends it to the server may change its tag
    arp = Rule(FORWARD_PRIORITY, {**tag, "eth_type": ARP}, both, Kind.TO_SERVER.cookie, Kind.ARP.value)
    return arp, *(
        Rule(FORWARD_PRIORITY, {**tag, "eth_type": IPV4, "ip_proto": one}, to_server, Kind.TO_SERVER.cookie)
        for one in sorted(chosen)
    )


def retag(here: int, there: int) -> Sequence[Action]:
    """The VLAN tag of one side becomes that of the other; 0: there is none."""
    if here == there:
        return ()
    if not there:
        return (PopVlan(),)
    tag = SetField("vlan_vid", there | VLAN_PRESENT)
    return (tag,) if here else (PushVlan(), tag)


def masked(network: IPv4Network) -> str | tuple[str, str]:
    address = str(network.network_address)
    return address if network.prefixlen == 32 else (address, str(network.netmask))


def mac_text(mac: int) -> str:
    return mac.to_bytes(6, "big").hex(":")
