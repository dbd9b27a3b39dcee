# SPDX-License-Identifier: Apache-2.0
"""The rules and groups by which the switch goes over by itself, tried in a model of tables, a register and links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from switch_agent.failover import OneLinkWithGroup, WithGroup
from switch_agent.link import OneLink
from switch_agent.pipeline import (
    STATIC_CLASS,
    TAKEN_OVER,
    Action,
    Group,
    Indirect,
    Kind,
    Learn,
    LoadRegister,
    Output,
    Pipeline,
    Resubmit,
    Rule,
    SetField,
    Side,
    ToController,
)
from tests.switch.net import mac_number, pipeline
from tests.switch.test_link import IPV4, fits, frame

SESSION = Rule(300, {"in_port": 1, "eth_type": IPV4}, (Output(2),), 1 << 60)


class Model:
    """A switch with these rules, all links up."""

    def __init__(self, pipe: Pipeline) -> None:
        self.rules = [*pipe.base(), *pipe.forward(), SESSION]
        self.groups = {group.group_id: group for group in pipe.groups()}
        self.down: set[int] = set()

    def __call__(self, packet: dict[str, Any]) -> list[int]:
        """Where it goes to."""
        out: list[int] = []
        self._table(0, {**packet, "reg0": 0}, out)
        return out

    def _table(self, table: int, packet: dict[str, Any], out: list[int]) -> None:
        taking = [rule for rule in self.rules if rule.table == table]
        taking = [r for r in taking if all(n in packet and fits(v, packet[n]) for n, v in r.match.items())]
        if taking:
            self._act(max(taking, key=lambda rule: rule.priority).actions, packet, out)

    def _act(self, actions: Sequence[Action], packet: dict[str, Any], out: list[int]) -> None:
        for action in actions:
            match action:
                case Output(port):
                    out.append(port)
                case SetField(name, value):
                    packet[name] = value
                case LoadRegister(value):
                    packet["reg0"] = value
                case Resubmit(table):
                    self._table(table, packet, out)
                case Learn(table, cookie, value):
                    self.rules.append(Rule(1, {}, (LoadRegister(value),), cookie, table=table))
                case Group(group_id):
                    self._act(self._bucket(group_id), dict(packet), out)
                case ToController():
                    out.append(-1)

    def _bucket(self, group_id: int) -> Sequence[Action]:
        group = self.groups[group_id]
        if isinstance(group, Indirect):
            return group.actions
        return group.live if group.port not in self.down else self._bucket(group.otherwise)


def with_group() -> WithGroup:
    return WithGroup(Side(1, 3), Side(2, 4), mac_number("02:00:5e:00:01:01"))


@pytest.mark.parametrize("lost", [3, 4])
def test_one_lost_link_takes_both_directions_and_stays(lost: int) -> None:
    switch = Model(with_group())
    assert [switch(frame(port, 0)) for port in (1, 2, 3, 4)] == [[3], [4], [1], [2]]
    switch.down = {lost}
    assert switch(frame(1, 0)) == [2], "the session's rule, and the server nothing"
    assert switch(frame(2, 0)) == []
    switch.down = set()
    assert switch(frame(1, 0)) == [2], "a link that comes back proves nothing of what is behind it"
    # a takeover takes the latch away too, and the return finds none
    switch.rules = [rule for rule in switch.rules if rule.cookie not in {kind.cookie for kind in TAKEN_OVER}]
    assert switch(frame(1, 0)) == [2]
    switch.rules += with_group().forward()
    assert switch(frame(1, 0)) == [3]


def test_the_latch_goes_last() -> None:
    assert TAKEN_OVER[-1] is Kind.LATCH
    made = with_group()
    assert {rule.table for rule in made.forward()} == {0}
    assert STATIC_CLASS | Kind.LATCH not in {rule.cookie for rule in (*made.base(), *made.forward())}


def test_marks_are_put_on_behind_the_decision() -> None:
    """What the switch translates after all must be as it came."""
    one = OneLink(Side(1, 3), Side(2, 3), mac_number("02:00:5e:00:01:01"))
    made = OneLinkWithGroup(one.internal, one.external, one.mac, inside=one.inside)
    assert len(made.groups()) == 2
    assert not any(
        isinstance(a, SetField)
        for r in made.forward()
        for a in r.actions
        if r.cookie == Kind.TO_SERVER.cookie
    )
    switch = Model(made)
    packet = frame(1, 0, ip_dscp=46)
    assert switch(packet) == [3]
    there = [rule for rule in made.base() if rule.match.get("ip_dscp") == 46 and rule.match["in_port"] == 1]
    assert there[0].actions == (SetField("ip_dscp", 47), Output(3))
    switch.down = {3}
    assert switch(packet) == [2]


def test_without_it_there_are_no_groups_and_one_table() -> None:
    plain = pipeline()
    assert plain.groups() == ()
    assert {rule.table for rule in (*plain.base(), *plain.forward(), *plain.tcp_to_server())} == {0}
