# SPDX-License-Identifier: Apache-2.0
"""The rules of one link to the server, tried in a small model of one flow table: what is on it, and what comes out."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from switch_agent.link import OneLink
from switch_agent.pipeline import (
    FORWARD_COOKIE,
    FORWARD_MASK,
    Kind,
    Output,
    PopVlan,
    PushVlan,
    SetField,
    Side,
    ToController,
    by_protocol,
)
from tests.switch.net import mac_number

Packet = dict[str, Any]
SERVER = 3
ARP, IPV4, IPV6 = 0x806, 0x800, 0x86DD


def one_link(tags: tuple[int, int] | None, inside: int = 0, outside: int = 0, **more: Any) -> OneLink:
    return OneLink(
        Side(1, SERVER, inside),
        Side(2, SERVER, outside),
        mac_number("02:00:5e:00:01:01"),
        tags=tags,
        inside=IPv4Network("10.0.0.0/24"),
        **more,
    )


def fits(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, tuple) and isinstance(value, int):
        return value & wanted[1] == wanted[0]
    if isinstance(wanted, tuple):
        return IPv4Address(value) in IPv4Network("/".join(wanted))
    return wanted == value


def through(pipe: OneLink, packet: Packet) -> Packet:
    """The packet after the one rule that takes it; ``out`` is where to, None for nowhere."""
    rules = [*pipe.base(), *pipe.guard(), *pipe.tcp_to_server(), *pipe.forward()]
    taking = [
        rule
        for rule in rules
        if all(name in packet and fits(v, packet[name]) for name, v in rule.match.items())
    ]
    best = max(rule.priority for rule in taking)
    rule, *same = [rule for rule in taking if rule.priority == best]
    assert all(other.actions == rule.actions for other in same)
    after: Packet = {**packet, "out": None}
    for action in rule.actions:
        match action:
            case Output(port):
                after["out"] = port
            case SetField(name, value):
                assert name != "vlan_vid" or after["vlan_vid"], "a tag that is not there"
                after[name] = value
            case PushVlan():
                after["vlan_vid"] = 0x1000
            case PopVlan():
                assert after["vlan_vid"]
                after["vlan_vid"] = 0
    return after


def frame(port: int, vlan: int, eth_type: int = IPV4, **fields: Any) -> Packet:
    return {"in_port": port, "vlan_vid": vlan | 0x1000 if vlan else 0, "eth_type": eth_type, **fields}


LINKS = [
    (None, 0, 0),
    (None, 5, 0),
    (None, 5, 6),
    ((101, 102), 0, 0),
    ((5, 6), 5, 6),
    ((101, 0), 0, 7),
    ((6, 5), 5, 6),
]


@pytest.mark.parametrize(("tags", "inside", "outside"), LINKS)
def test_codepoints_both_ways(tags: tuple[int, int] | None, inside: int, outside: int) -> None:
    """On the link each side is known; off it all is as it was, but for the bit of the mark."""
    pipe = one_link(tags, inside, outside)
    for codepoint in range(64):
        on_link = []
        for at, (port, vlan) in enumerate(((1, inside), (2, outside))):
            there = through(pipe, frame(port, vlan, ip_dscp=codepoint))
            assert there["out"] == SERVER
            on_link.append((there["vlan_vid"], there["ip_dscp"]))
            if tags is None:
                assert on_link[-1] == (0, codepoint & ~1 | (at == 0))
            else:
                assert on_link[-1] == (tags[at] | 0x1000 if tags[at] else 0, codepoint)
            back = through(pipe, {**there, "in_port": SERVER})
            assert back["out"] == port
            assert back["vlan_vid"] == frame(port, vlan)["vlan_vid"]
            assert back["ip_dscp"] == (codepoint if tags else codepoint & ~1)
        assert on_link[0] != on_link[1]


def test_arp_tells_by_its_addresses() -> None:
    pipe = one_link(None)
    inside, outside, none = {"arp_spa": "10.0.0.7"}, {"arp_spa": "198.51.100.254"}, {"arp_spa": "0.0.0.0"}
    asked: list[tuple[int, Packet, int | None]] = [
        (1, {**inside, "arp_tpa": "10.0.0.1"}, SERVER),
        (1, {**none, "arp_tpa": "10.0.0.1"}, SERVER),
        (1, {**outside, "arp_tpa": "198.51.100.1"}, None),
        (1, {**none, "arp_tpa": "198.51.100.1"}, None),
        (2, {**outside, "arp_tpa": "198.51.100.1"}, SERVER),
        (2, {**none, "arp_tpa": "198.51.100.1"}, SERVER),
        (2, {**inside, "arp_tpa": "10.0.0.1"}, None),
        (2, {**none, "arp_tpa": "10.0.0.1"}, None),
        (SERVER, {"arp_spa": "10.0.0.1", "arp_tpa": "10.0.0.7"}, 1),
        (SERVER, {"arp_spa": "198.51.100.10", "arp_tpa": "198.51.100.254"}, 2),
    ]
    for port, addresses, out in asked:
        assert through(pipe, frame(port, 0, ARP, **addresses))["out"] == out, (port, addresses)


@pytest.mark.parametrize("port", [1, 2, SERVER])
def test_what_tells_no_side_is_dropped(port: int) -> None:
    pipe = one_link(None)
    assert through(pipe, frame(port, 0, IPV6))["out"] is None
    assert through(pipe, frame(port, 9, ip_dscp=0))["out"] is None


@pytest.mark.parametrize("tags", [None, (101, 102)])
def test_marks_of_what_is_above_and_of_a_part(tags: tuple[int, int] | None) -> None:
    """The ends of TCP connections go to the server above sessions in front; and of the rest some protocols only."""
    pipe = one_link(tags, partition=by_protocol(frozenset({17})))
    for at, port in enumerate((1, 2)):
        syn = frame(port, 0, ip_proto=6, ip_dscp=46, tcp_flags=2 | 16, eth_dst="02:00:5e:00:01:01")
        for packet in (syn, {**syn, "tcp_flags": 16}):
            there = through(pipe, packet)
            assert there["out"] == SERVER
            wanted = (0, 46 | (at == 0)) if tags is None else (tags[at] | 0x1000, 46)
            assert (there["vlan_vid"], there["ip_dscp"]) == wanted
        assert through(pipe, frame(port, 0, ip_proto=17, ip_dscp=46))["out"] is None


@pytest.mark.parametrize(("tags", "inside", "outside"), LINKS)
def test_the_agent_hears_arp_with_the_tag_of_its_side(
    tags: tuple[int, int] | None, inside: int, outside: int
) -> None:
    pipe = one_link(tags, inside, outside, partition=by_protocol(frozenset({17})))
    heard = [rule for rule in pipe.forward() if ToController() in rule.actions]
    assert {rule.match["in_port"] for rule in heard} == {1, 2}
    assert all(rule.actions[0] == ToController() for rule in heard)


def test_a_takeover_hits_all_of_them() -> None:
    for tags in (None, (101, 102)):
        pipe = one_link(tags)
        assert all(rule.cookie & FORWARD_MASK == FORWARD_COOKIE for rule in pipe.forward())
        assert [rule.match for rule in pipe.fence()] == [{"in_port": SERVER}]
        assert pipe.fence()[0] in pipe.base()
        kinds = [Kind(rule.cookie & 0xFF) for rule in pipe.forward()]
        assert {Kind.TO_SERVER, Kind.FROM_SERVER} == set(kinds)
    assert len(one_link(None).forward()) < 120
    assert len(one_link((101, 102)).forward()) == 4
