# SPDX-License-Identifier: Apache-2.0
"""Rules read back as sessions: whatever order a switch gives their fields in, and nothing worse than ProtocolError."""

import contextlib
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from os_ken.ofproto import ofproto_v1_3_parser as parser

from nat_fastpath.engine import RECORD, TCP_STATES
from switch_agent import channel, recovery
from switch_agent.codec import ProtocolError
from switch_agent.compile import INWARD, OUTWARD
from switch_agent.pipeline import INBOUND, Output, Rule, SetField
from tests.switch.net import pipeline, random_records


def entry(rule: Rule, rng: random.Random | None = None) -> bytes:
    """One flow of a statistics reply, as this rule stands on the switch; its match in any order."""
    match, tail = bytearray(), bytearray()
    parser.OFPMatch(**rule.match).serialize(match, 0)
    if rng:
        match = _shuffled(match, rng)
    actions = [channel._action(action) for action in rule.actions]
    parser.OFPInstructionActions(4, actions).serialize(tail, 0)
    size = 48 + len(match) + len(tail)
    head = struct.pack("!HBxIIHHHH4xQQQ", size, 0, 9, 0, rule.priority, 0, 0, 0, rule.cookie, 7, 7 * 114)
    return head + bytes(match) + bytes(tail)


def _shuffled(match: bytearray, rng: random.Random) -> bytearray:
    (length,) = struct.unpack_from("!H", match, 2)
    fields, at = [], 4
    while at < length:
        fields.append(match[at : at + 4 + match[at + 3]])
        at += 4 + match[at + 3]
    rng.shuffle(fields)
    return match[:4] + b"".join(fields) + match[length:]


def rules_of(records: np.ndarray) -> list[Rule]:
    found = []
    for row in records:
        for inbound, fields in ((False, OUTWARD), (True, INWARD)):
            value = {name: int(row[of]) for name, of in fields.items()}
            found.append(
                pipeline().session(
                    int(row["protocol"]),
                    inbound,
                    cookie=int(row["id"]) | (INBOUND if inbound else 0),
                    source=(value["source"], value["source_port"]),
                    destination=(value["destination"], value["destination_port"]),
                    translated=(value["translated"], value["translated_port"]),
                    group_id=int(row["id"]) % 1000 + 1000 * inbound,
                )
            )
    return found


@pytest.mark.parametrize("shuffled", [False, True])
def test_sessions_come_back_from_their_rules(shuffled: bool) -> None:
    records = random_records(40)
    rng = random.Random(5) if shuffled else None
    rules = rules_of(records)
    (rng or random.Random(1)).shuffle(rules)
    stranger = Rule(
        300, {"in_port": 1, "eth_type": 0x806}, (SetField("eth_src", "02:00:00:00:00:01"), Output(2)), 9
    )
    body = b"".join(entry(rule, rng) for rule in [*rules[:30], stranger, *rules[30:]])
    found = recovery.rules(body)
    assert len(found) == 81
    left = recovery.sessions(found, (14, 18))
    for name in RECORD.names or ():
        if name.endswith(("_addr", "_port")) or name in ("id", "protocol"):
            assert np.array_equal(left.records[name], records[name]), name
    assert np.array_equal(left.external, records["id"] % 1000)
    assert np.array_equal(left.internal, records["id"] % 1000 + 1000)
    assert (left.records["packets_in"] == 7).all()
    assert (left.records["bytes_out"] == 7 * 100).all()
    assert (left.records["bytes_in"] == 7 * 96).all()
    assert (left.records["age_ms"] == 9000).all()
    tcp = records["protocol"] == 6
    assert {TCP_STATES[state] for state in left.records["tcp_state"][tcp]} == {"established"}
    assert not left.records["tcp_state"][~tcp].any()


@pytest.mark.parametrize("inbound", [False, True])
def test_one_rule_of_two_says_all(inbound: bool) -> None:
    [outward, inward] = rules_of(record := random_records(1))
    [found], internal, external = recovery.sessions(
        recovery.rules(entry(inward if inbound else outward)), (14, 14)
    )
    for name in (
        "internal_addr",
        "internal_port",
        "external_addr",
        "external_port",
        "remote_addr",
        "remote_port",
    ):
        assert found[name] == record[0][name]
    assert bool(internal[0]) is inbound
    assert bool(external[0]) is not inbound


def test_where_groups_send_to() -> None:
    """As Open vSwitch encodes them: a bucket's actions are padded, groups follow each other."""

    def description(group: int, actions: list[parser.OFPAction]) -> bytes:
        data = bytearray()
        for action in actions:
            action.serialize(data, len(data))
        bucket = struct.pack("!HHII4x", 16 + len(data), 0, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(data)
        return struct.pack("!HBxI", 8 + len(bucket), 2, group) + bucket

    macs = [
        parser.OFPActionSetField(eth_src="02:00:00:00:00:01"),
        parser.OFPActionSetField(eth_dst="02:00:00:00:00:02"),
    ]
    output = parser.OFPActionOutput(3, 0)
    body = description(7, [*macs, output]) + description(9, [output]) + struct.pack("!HBxI", 8, 2, 11)
    assert recovery.group_macs(body).tolist() == [(7, 0x020000000002), (9, 0), (11, 0)]
    for cut in range(1, len(body)):
        with contextlib.suppress(ProtocolError):
            recovery.group_macs(body[:cut])


whole = b"".join(entry(rule) for rule in rules_of(random_records(3)))


@given(st.data())
def test_nothing_but_an_error_comes_of_bad_statistics(data: st.DataObject) -> None:
    body = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(body[: data.draw(st.integers(0, len(body)))])
    with contextlib.suppress(ProtocolError):
        recovery.sessions(recovery.rules(cut), (14, 14))
    with contextlib.suppress(ProtocolError):
        recovery.group_macs(cut)
