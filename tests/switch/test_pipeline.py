# SPDX-License-Identifier: Apache-2.0
"""The rules of the switch, tried in a small model of one flow table."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import numpy as np
import pytest
import yaml

from nat_control.config import parse, to_core
from nat_fastpath.engine import FLAG_OFFLOAD
from switch_agent.activity import ACTIVITY, applied
from switch_agent.agent import pipeline_of
from switch_agent.failover import WithGroup
from switch_agent.nexthops import NextHops, key
from switch_agent.pipeline import (
    CLASS_MASK,
    FORWARD_COOKIE,
    FORWARD_MASK,
    INBOUND,
    SESSION_CLASS,
    Group,
    Kind,
    NextHop,
    Output,
    PopVlan,
    PushVlan,
    Rule,
    SetField,
    Side,
    ToController,
    by_protocol,
)
from tests.switch.net import GATEWAY_KEY, next_hops, pipeline, random_records, record

Fields = dict[str, int | str]
INSIDE: Fields = {"in_port": 1, "vlan_vid": 0, "eth_type": 0x800, "eth_dst": "02:00:5e:00:01:01"}
OUTSIDE: Fields = {"in_port": 2, "vlan_vid": 0, "eth_type": 0x800, "eth_dst": "02:00:5e:00:01:01"}


def matches(rule: Rule, packet: Fields) -> bool:
    for name, wanted in rule.match.items():
        if name not in packet:
            return False
        value = packet[name]
        if name == "tcp_flags":  # flags and mask
            if value[0] & wanted[1] != wanted[0]:  # type: ignore[index, operator]
                return False
        elif isinstance(wanted, tuple) or name in ("ipv4_dst", "arp_tpa"):
            text = "/".join(wanted) if isinstance(wanted, tuple) else str(wanted)
            if IPv4Address(value) not in IPv4Network(text):
                return False
        elif value != wanted:
            return False
    return True


def winner(rules: Sequence[Rule], packet: Fields) -> Rule:
    return max((rule for rule in rules if matches(rule, packet)), key=lambda rule: rule.priority)


SESSION = pipeline().session(
    17,
    False,
    cookie=SESSION_CLASS | 1,
    source=(0x0A000005, 5000),
    destination=(0xCB007107, 53),
    translated=(0xC633640A, 33333),
    group_id=9,
)
FLOW: Fields = {"ip_proto": 17, "ipv4_src": 0x0A000005, "udp_src": 5000, "udp_dst": 53}
KNOWN = {**INSIDE, **FLOW, "ipv4_dst": 0xCB007107}


def known(rules: Sequence[Rule]) -> Rule:
    """The session's rule has its addresses as numbers; the model compares networks."""
    numbers = {**SESSION.match, "ipv4_dst": "203.0.113.7"}
    session = Rule(SESSION.priority, numbers, SESSION.actions, SESSION.cookie)
    return winner([*rules, session], KNOWN)


def test_the_server_in_front_gets_everything() -> None:
    rules = [*pipeline().base(), *pipeline().forward()]
    assert known(rules).actions == (Output(3),)
    for port, other in ((1, 3), (3, 1), (2, 4), (4, 2)):
        assert winner(rules, {"in_port": port, "eth_type": 0x88CC}).actions == (Output(other),)


def test_alone_the_switch_translates_and_asks_the_agent() -> None:
    rules = pipeline().base()
    assert known(rules).cookie == SESSION.cookie
    asked = {
        Kind.NEW_FLOW: {**INSIDE, **FLOW, "ipv4_dst": 1},
        Kind.ICMP: {**INSIDE, "ip_proto": 1, "ipv4_dst": 1},
        Kind.ARP: {**INSIDE, "eth_type": 0x806, "arp_tpa": "10.0.0.1"},
        Kind.UNSOLICITED: {**OUTSIDE, "ip_proto": 6, "ipv4_dst": "198.51.100.13"},
    }
    for kind, packet in asked.items():
        rule = winner(rules, packet)
        assert (rule.cookie, rule.actions, rule.meter) == (kind.cookie, (ToController(),), kind.value)
    dropped = [
        {**INSIDE, "eth_type": 0x806, "arp_tpa": "10.0.0.2"},
        {**OUTSIDE, "ip_proto": 6, "ipv4_dst": "198.51.100.14"},
        {**INSIDE, "eth_dst": "02:00:00:00:00:09", "ip_proto": 17, "ipv4_dst": 1},
        {**INSIDE, "vlan_vid": 0x1005, "ip_proto": 17, "ipv4_dst": 1},
    ]
    for packet in dropped:
        assert winner(rules, packet).actions == ()


def test_the_server_is_fenced_without_the_forward_rules() -> None:
    for port in (3, 4):
        rule = winner(pipeline().base(), {**INSIDE, "in_port": port})
        assert (rule.cookie, rule.actions) == (Kind.FENCE.cookie, ())


def test_the_takeover_hits_the_forward_rules_alone() -> None:
    assert all(rule.cookie & FORWARD_MASK == FORWARD_COOKIE for rule in pipeline().forward())
    assert len(pipeline().forward()) == 4
    others = [SESSION.cookie, SESSION.cookie | INBOUND, *(rule.cookie for rule in pipeline().base())]
    assert all(cookie & FORWARD_MASK != FORWARD_COOKIE for cookie in others)


def test_cookies_of_sessions_are_a_class_of_their_own() -> None:
    assert SESSION.cookie & CLASS_MASK == SESSION_CLASS
    assert all(rule.cookie & CLASS_MASK != SESSION_CLASS for rule in pipeline().base() + pipeline().forward())


def test_a_server_without_tcp_gets_none_of_it() -> None:
    """Not even what begins and ends a connection, when UDP alone is in front."""
    for local, count in (({6}, 0), ({17}, len(pipeline().guard()))):
        part = by_protocol(frozenset(local))
        pipe = pipeline(partition=part)
        assert len(pipe.tcp_to_server()) == count
        failover = WithGroup(pipe.internal, pipe.external, pipe.mac, partition=part)
        assert len([rule for rule in failover.base() if "tcp_flags" in rule.match and rule.table]) == count


def test_without_a_server_nothing_is_forwarded() -> None:
    pipe = pipeline(internal=Side(1), external=Side(2))
    assert pipe.forward() == pipe.fence() == ()


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        (0, 0, ()),
        (5, 5, ()),
        (5, 0, (PopVlan(),)),
        (0, 6, (PushVlan(), SetField("vlan_vid", 0x1006))),
        (5, 6, (SetField("vlan_vid", 0x1006),)),
    ],
)
def test_tags_change_with_the_side(inside: int, outside: int, expected: tuple[object, ...]) -> None:
    pipe = pipeline(internal=Side(1, 3, inside), external=Side(2, 4, outside))
    rule = pipe.session(6, False, cookie=1, source=(1, 2), destination=(3, 4), translated=(5, 6), group_id=7)
    assert rule.match["vlan_vid"] == (inside | 0x1000 if inside else 0)
    assert rule.actions[3:] == (*expected, Group(7))


# -- next hops ---------------------------------------------------------------------------------------------


def hops() -> NextHops:
    return next_hops(pipeline())


def test_the_longest_prefix_wins_and_hairpins_have_no_way() -> None:
    records = np.concatenate(
        [
            record(),
            record(remote_addr=int(IPv4Address("198.51.100.77"))),
            record(remote_addr=int(IPv4Address("198.51.100.11"))),
        ]
    )
    inside, outside = hops().keys(records)
    assert outside.tolist() == [GATEWAY_KEY, key("external", IPv4Address("198.51.100.77")), 0]
    assert inside.tolist() == [key("internal", mac=int(records["internal_mac"][0]))] * 3


def test_a_next_hop_has_its_mac_or_none() -> None:
    found = hops()
    assert found.hop(GATEWAY_KEY).mac == 0x0200000001FE
    found.learn(GATEWAY_KEY, None)
    assert found.hop(GATEWAY_KEY) == NextHop("external", None)
    assert found.hop(key("internal", mac=5)) == NextHop("internal", 5)
    found.learn(key("internal", mac=5), 6)
    assert found.hop(key("internal", mac=5)).mac == 6
    assert pipeline().next_hop(NextHop("internal", None)) == (ToController(),)


def test_one_has_the_groups_that_many_have() -> None:
    records = random_records(400)
    rng = np.random.default_rng(3)
    pool = int(IPv4Address("198.51.100.9"))
    records["internal_mac"][::2] = 0
    records["internal_addr"] = rng.choice([0x0A000001, 0x0AFFFFFF, 0xC0A80001], 400)
    records["remote_addr"] = rng.choice([0x0A000001, 0x08080808, *range(pool - 9, pool + 6)], 400)
    one = hops()
    keys = one.keys(records)
    one.add(np.concatenate(keys)[::2])
    groups = one.of(*keys)
    assert [one.groups_of(record) for record in records.tolist()] == list(
        zip(*map(np.ndarray.tolist, groups), strict=True)
    )
    assert len(np.unique(groups.external)) > 4


def test_groups_are_the_same_after_a_restart_and_never_shared() -> None:
    records = random_records(3000)
    records["internal_mac"] = np.arange(1, 3001)
    first, second = hops(), hops()
    keys = np.concatenate(first.keys(records))
    assert len(first.add(keys)) == 3001
    assert first.add(keys) == []
    for part in np.array_split(keys, 7):
        second.add(part)
    assert first.groups == second.groups
    assert len(set(first.groups.values())) == 3001
    assert (first.of(*first.keys(records)).internal != 0).all()


def test_beyond_the_limit_there_is_no_group() -> None:
    few = NextHops(pipeline(), {}, limit=2)
    assert len(few.add(np.array([1, 2, 3], np.uint64))) == 2
    assert few.group_ids(np.array([1, 2, 3, 0], np.uint64)).tolist().count(0) == 2


def test_vlans_are_the_switchs_and_not_the_cores() -> None:
    """The agent's core sees untagged frames; the tags are in its rules and its packet-outs."""
    document = yaml.safe_load((Path(__file__).parents[2] / "examples" / "pair-switch.yaml").read_text())
    document["ports"]["internal"]["vlan"] = 10
    document["ports"]["external"]["vlan"] = 20
    config = parse(document)
    made = pipeline_of(config)
    assert (made.internal.vlan, made.external.vlan) == (10, 20)
    assert [port.vlan for port in to_core(config, []).ports] == [0, 0]


def test_activity_counts_ip_bytes_of_both_sides() -> None:
    """What comes from a side with a VLAN has four bytes more."""
    records, carried = random_records(1), np.zeros(1, ACTIVITY)
    carried["id"] = records["id"]
    for name, value in (("packets", 2), ("frame_bytes", 200)):
        carried[f"{name}_out"] = carried[f"{name}_in"] = value
    [found] = applied(records, carried, [18, 14])
    assert (found["packets_out"], found["packets_in"]) == (2, 2)
    assert (found["bytes_out"], found["bytes_in"]) == (200 - 2 * 18, 200 - 2 * 14)
    assert found["flags"] & FLAG_OFFLOAD
