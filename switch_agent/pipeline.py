# SPDX-License-Identifier: Apache-2.0
"""The flow table of the switch as data: which rules there are, at which priority, for which traffic.

One table. From the top down (thesis 5.2 and 7.2, partition mode "all peer"):

====  ===================  ==============================================================================
 400  forward to server    a port's whole traffic to the server and back; there while the server carries
 300  session              two exact rules per session, which translate; they wait below the rules above
 200  agent's business     ARP and ICMP for our addresses, new flows: to the agent, each by its own meter
 150  probe                what the agent sends through the table as a proof, and gets back (probe.py)
 100  fence                what comes from the server's ports, once it is not forwarded any more
   0  rest                 dropped
====  ===================  ==============================================================================

A takeover only deletes the rules at the top; all that is needed then stands already below them. An agent
without a peer never installs them. Wide rules above narrow ones, in one table, is what a switch with one
hardware table can do too, and what Open vSwitch turns over fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, summarize_address_range

FORWARD_PRIORITY, SESSION_PRIORITY, AGENT_PRIORITY, FENCE_PRIORITY, REST_PRIORITY = 400, 300, 200, 100, 0
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


class Kind(IntEnum):
    """What a static rule is for: the low bits of its cookie."""

    TO_SERVER = 0x10
    FROM_SERVER = 0x11
    FENCE = 0x20
    ARP = 0x30
    ICMP = 0x31
    NEW_FLOW = 0x32
    UNSOLICITED = 0x33
    REST = 0x40
    RETURN = 0x50

    @property
    def cookie(self) -> int:
        return STATIC_CLASS | self.value


FORWARD_COOKIE = STATIC_CLASS | 0x10
FORWARD_MASK = ALL_BITS & ~1  # both directions of forwarding
PROBE_COOKIE = STATIC_CLASS | 0x51  # of the rule whose version is in the bits between
PROBE_MASK = INBOUND | CLASS_MASK | 0xFF


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


Action = Output | ToController | Group | SetField | DecTtl | PushVlan | PopVlan
Match = Mapping[str, int | str | tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A flow entry of table 0; no ``actions`` drops. ``idle_timeout`` in seconds, 0 is none."""

    priority: int
    match: Match
    actions: tuple[Action, ...]
    cookie: int
    meter: int = 0
    idle_timeout: int = 0


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
}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """All rules of one switch. ``mac`` is the virtual MAC (48 bits), ``rates`` packets per second to the agent."""

    internal: Side
    external: Side
    mac: int
    rates: Mapping[Kind, int] = field(default_factory=lambda: DEFAULT_RATES)
    session_idle_timeout: int = 0
    probe_mac: int = 0  # whose frames come back to the agent once nothing forwards them; 0: there are none

    def meters(self) -> dict[int, int]:
        """Meter id → packets per second; the burst is a tenth of a second's worth."""
        return {kind.value: rate for kind, rate in self.rates.items()}

    def base(self) -> tuple[Rule, ...]:
        """All static rules but the forwarding ones."""
        rules = [Rule(REST_PRIORITY, {}, (), Kind.REST.cookie), *self.fence()]
        for side in (self.internal, self.external):
            for network in side.networks:
                where = _masked(network)
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
        ours = {"eth_dst": mac_text(self.mac)}
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
        there = [
            Rule(FORWARD_PRIORITY, {"in_port": side.port}, (Output(side.server_port),), Kind.TO_SERVER.cookie)
            for side in sides
        ]
        return tuple(back + there)

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
            *_retag(here, there),
            Group(group_id),
        )
        return Rule(SESSION_PRIORITY, match, actions, cookie, idle_timeout=self.session_idle_timeout)

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

    @staticmethod
    def _inside(side: Side, **fields: int | str | tuple[str, str]) -> dict[str, int | str | tuple[str, str]]:
        return {"in_port": side.port, "vlan_vid": side.vlan_match, **fields}


def _retag(here: Side, there: Side) -> Sequence[Action]:
    """The VLAN tag of one side becomes that of the other."""
    if here.vlan == there.vlan:
        return ()
    if not there.vlan:
        return (PopVlan(),)
    tag = SetField("vlan_vid", there.vlan_match)
    return (tag,) if here.vlan else (PushVlan(), tag)


def _masked(network: IPv4Network) -> str | tuple[str, str]:
    address = str(network.network_address)
    return address if network.prefixlen == 32 else (address, str(network.netmask))


def mac_text(mac: int) -> str:
    return mac.to_bytes(6, "big").hex(":")
