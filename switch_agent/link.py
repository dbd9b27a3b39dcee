# SPDX-License-Identifier: Apache-2.0
"""One link between switch and server for both sides: what is on it says of which side it is.

By VLAN tags, which the switch puts on and takes off; or by the lowest bit of the DSCP, set in the inside's packets in either
direction (mark.h is the server's half of it). OpenFlow cannot set one bit, so there is a rule for each codepoint that changes. ARP
has no DSCP: it tells by its addresses, so neither side may send what looks like the other's. All else is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network

from switch_agent.pipeline import (
    ARP,
    FORWARD_PRIORITY,
    IPV4,
    VLAN_PRESENT,
    Action,
    Kind,
    Match,
    Output,
    Pipeline,
    Rule,
    SetField,
    Side,
    ToController,
    masked,
    retag,
)

CODEPOINTS = range(64)
INSIDE_MARK = 1  # of a codepoint


@dataclass(frozen=True, slots=True)
class OneLink(Pipeline):
    """``tags`` (inside, outside; 0: untagged) are those on the link; None: it is marked by DSCP. ``inside`` is that subnet."""

    tags: tuple[int, int] | None = None
    inside: IPv4Network = field(default=IPv4Network(0))

    def forward(self) -> tuple[Rule, ...]:
        back = self._from_server() if self.tags is None else self._tagged_from_server()
        there = (rule for rule in Pipeline.forward(self) if rule.cookie == Kind.TO_SERVER.cookie)
        return (*back, *self._to_server(there))

    def tcp_to_server(self) -> tuple[Rule, ...]:
        return tuple(self._to_server(Pipeline.tcp_to_server(self)))

    def fence(self) -> tuple[Rule, ...]:
        return Pipeline.fence(self)[:1]

    def _to_server(self, rules: Iterable[Rule]) -> Iterator[Rule]:
        """These, which send to the server what they match, so that it says of which side it is."""
        for rule in rules:
            is_inside = rule.match["in_port"] == self.internal.port
            side = self.internal if is_inside else self.external
            rule = replace(rule, match={**rule.match, "vlan_vid": side.vlan_match})
            if self.tags is not None:
                actions = retag(side.vlan, self.tags[0 if is_inside else 1])
                yield _changed(rule, actions)
                continue
            rule = _changed(rule, retag(side.vlan, 0))
            for kind, make in ((IPV4, self._marked), (ARP, self._arp_of)):
                if rule.match.get("eth_type", kind) == kind:
                    yield from make(replace(rule, match={**rule.match, "eth_type": kind}), is_inside)

    def _marked(self, rule: Rule, is_inside: bool) -> Iterator[Rule]:
        """Codepoints that have the bit already, inside, or not, outside, go as they are."""
        yield rule
        for codepoint in CODEPOINTS:
            if codepoint & INSIDE_MARK != is_inside:
                mark = SetField("ip_dscp", codepoint ^ INSIDE_MARK)
                yield _above(rule, {"ip_dscp": codepoint}, (mark, *rule.actions))

    def _arp_of(self, rule: Rule, is_inside: bool) -> Iterator[Rule]:
        """Inside what comes from its subnet, outside what does not; who has no address yet asks for it (RFC 5227)."""
        yield rule if not is_inside else replace(rule, actions=())
        for match in self._inside_arp():
            yield _above(rule, match, rule.actions if is_inside else ())

    def _inside_arp(self) -> tuple[Match, ...]:
        where = masked(self.inside)
        return {"arp_spa": where}, {"arp_spa": "0.0.0.0", "arp_tpa": where}

    def _from_server(self) -> Iterator[Rule]:
        match = {"in_port": self.internal.server_port, "vlan_vid": 0}
        ip, arp = (self._back({**match, "eth_type": kind}, self.external, 0) for kind in (IPV4, ARP))
        yield from (ip, arp)
        actions = self._back({}, self.internal, 0).actions
        for codepoint in CODEPOINTS:
            if codepoint & INSIDE_MARK:
                mark = SetField("ip_dscp", codepoint ^ INSIDE_MARK)
                yield _above(ip, {"ip_dscp": codepoint}, (mark, *actions))
        yield _above(arp, {"arp_spa": masked(self.inside)}, actions)  # the server's own address there

    def _tagged_from_server(self) -> Iterator[Rule]:
        assert self.tags
        for side, tag in zip((self.internal, self.external), self.tags, strict=True):
            match = {"in_port": side.server_port, "vlan_vid": tag | VLAN_PRESENT if tag else 0}
            yield self._back(match, side, tag)

    def _back(self, match: Match, side: Side, tag: int) -> Rule:
        actions = (*retag(tag, side.vlan), Output(side.port))
        return Rule(FORWARD_PRIORITY, match, actions, Kind.FROM_SERVER.cookie)


def _changed(rule: Rule, actions: Sequence[Action]) -> Rule:
    """The copy to the controller comes first: it is read by the tag of its side."""
    at = rule.actions[0] == ToController()
    return replace(rule, actions=(*rule.actions[:at], *actions, *rule.actions[at:]))


def _above(rule: Rule, match: Match, actions: tuple[Action, ...]) -> Rule:
    """What differs for some of the packets of ``rule``."""
    return replace(rule, priority=rule.priority + 1, match={**rule.match, **match}, actions=actions)
