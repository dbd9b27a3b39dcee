# SPDX-License-Identifier: Apache-2.0
"""`switch.failover: group`: the switch itself goes over to its session rules when a link to the server is lost.

It needs nobody for that, so it covers an agent that is dead or cut off. OpenFlow's fast-failover groups watch ports, but a
bucket cannot go on in a table; Open vSwitch's can (resubmit, and a register that says why a packet comes again):

    table 0      a forward rule, for packets that have not been here (register 0)
    LATCH        empty; or, once a link was lost, one rule: register WITHOUT_SERVER
    DECIDE       0: to the group. Both links live: register WITH_SERVER, else LINK_LOST, and here again
                 WITH_SERVER: to the server, as the forward rule would have done
                 LINK_LOST: writes the rule in LATCH (learn), then as WITHOUT_SERVER
                 WITHOUT_SERVER: in table 0 again, where the forward rules do not match any more

The latch makes it a decision that only the agent takes back: with a link comes, for all the switch knows, a new server process,
without any session, and no agent has looked at it.
"""

from __future__ import annotations

from dataclasses import replace

from switch_agent.link import OneLink
from switch_agent.pipeline import (
    Action,
    FastFailover,
    Group,
    Indirect,
    Kind,
    Learn,
    LoadRegister,
    Pipeline,
    Resubmit,
    Rule,
    StaticGroup,
)

LATCH, DECIDE = 1, 2  # tables
FRESH, WITHOUT_SERVER, LINK_LOST, WITH_SERVER = 0, 1, 2, 3  # values of the register
LOST_GROUP, FIRST_GROUP = (
    0xFFFF_FE00,
    0xFFFF_FE01,
)  # above those of next hops; of two links, the second has the next
PRIORITY = 10


class WithGroup(Pipeline):
    """A pipeline whose forward rules ask the group first."""

    __slots__ = ()

    def base(self) -> tuple[Rule, ...]:
        # Those for all traffic serve TCP's beginnings and ends too, and look at nothing that would make the cache narrow.
        control = () if self.partition.forwards_all else super().tcp_to_server()
        there = [*control, *(rule for rule in super().forward() if rule.cookie == Kind.TO_SERVER.cookie)]
        decisions: dict[int, tuple[Action, ...]] = {
            FRESH: (Group(FIRST_GROUP),),
            LINK_LOST: (
                Learn(LATCH, Kind.LATCH.cookie, WITHOUT_SERVER),
                LoadRegister(WITHOUT_SERVER),
                Resubmit(0),
            ),
            WITHOUT_SERVER: (Resubmit(0),),
        }
        cookie = Kind.DECIDE.cookie
        return (
            *super().base(),
            *(
                Rule(PRIORITY, {"reg0": value}, actions, cookie, table=DECIDE)
                for value, actions in decisions.items()
            ),
            *(
                replace(rule, match={**rule.match, "reg0": WITH_SERVER}, cookie=cookie, table=DECIDE)
                for rule in there
            ),
        )

    def forward(self) -> tuple[Rule, ...]:
        back = (rule for rule in super().forward() if rule.cookie == Kind.FROM_SERVER.cookie)
        there = (rule for rule in Pipeline.forward(self) if rule.cookie == Kind.TO_SERVER.cookie)
        return (*back, *map(_asking, there))

    def forward_of_others(self) -> tuple[Rule, ...]:
        """Those without a group too: an agent may have been started with another ``failover``."""
        plain = (rule for rule in super().forward() if rule.cookie == Kind.TO_SERVER.cookie)
        return (*super().forward_of_others(), *plain)

    def tcp_to_server(self) -> tuple[Rule, ...]:
        return tuple(map(_asking, Pipeline.tcp_to_server(self)))

    def groups(self) -> tuple[StaticGroup, ...]:
        """One that watches each link, and asks the next one; and where to go when one of them is lost."""
        ports = list(dict.fromkeys((self.internal.server_port, self.external.server_port)))
        again = Resubmit(DECIDE)
        made: list[StaticGroup] = [Indirect(LOST_GROUP, (LoadRegister(LINK_LOST), again))]
        live: tuple[Action, ...] = LoadRegister(WITH_SERVER), again
        for i, port in reversed(list(enumerate(ports))):
            made.append(FastFailover(FIRST_GROUP + i, port, live, LOST_GROUP))
            live = (Group(FIRST_GROUP + i),)
        return tuple(made)


class OneLinkWithGroup(WithGroup, OneLink):
    __slots__ = ()


def _asking(rule: Rule) -> Rule:
    return replace(rule, match={**rule.match, "reg0": FRESH}, actions=(Resubmit(LATCH), Resubmit(DECIDE)))
