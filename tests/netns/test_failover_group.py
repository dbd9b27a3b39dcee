# SPDX-License-Identifier: Apache-2.0
"""`switch.failover: group`: a link to the server is lost while no agent lives, and the switch goes over by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab, until
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_one_link import ECHO, EF, classes
from tests.netns.test_pair import SESSION_RULES, passes

PORT = 4321


def carried(net: PairLab) -> int:
    """Packets that rules of sessions have carried."""
    return sum(int(re.search(r"n_packets=(\d+)", flow)[1]) for flow in net.ovs.flows(SESSION_RULES))  # type: ignore[index]


def goes_on(net: PairLab) -> None:
    """The flow that was there before is answered by the same mapping, and its class of service is what it was."""
    until("the known flow is answered", lambda: classes(net, PORT, EF) == [[EF, EF]], 20)


def by_rules(net: PairLab) -> None:
    before = carried(net)
    goes_on(net)
    until("the rules of sessions count", lambda: carried(net) >= before + 2)


@pytest.fixture(params=["", pytest.param("dscp", marks=pytest.mark.long)])
def net(request: pytest.FixtureRequest) -> Iterator[PairLab]:
    with Lab() as lab:
        barrier = "probe" if request.param else "trusted"
        net = PairLab(lab, mark=request.param, switch={"failover": "group", "barrier": barrier})
        net.mark = request.param
        net.start_agent()
        net.outside.start("python3", "-u", "-c", ECHO, OUTSIDE, name="echo").ready("bound")
        net.start_server()
        net.carrier("server")
        passes(net)
        goes_on(net)
        yield net


def test_a_dead_agent_and_a_lost_link(net: PairLab) -> None:
    known = {row["id"] for row in net.show("agent", "sessions")}
    net.agent.popen.kill()
    net.agent.popen.wait()
    before = carried(net)
    goes_on(net)
    assert carried(net) == before, "the server carries without the agent"
    link = "inner" if net.mark else "outer"  # one of the two takes both directions with it
    net.switch.ip("link", "set", link, "down")
    by_rules(net)
    # the server ends, and another one comes with the link: it has no session, and nobody has looked at it
    net.server.popen.kill()
    net.server.popen.wait()
    net.switch.ip("link", "set", link, "up")
    net.start_server()
    by_rules(net)
    assert net.show("server")["sessions"] == 0

    net.start_agent()
    assert "the switch has gone over by itself" in net.agent.output
    net.carrier("server")
    assert {row["id"] for row in net.show("server", "sessions") if row["protocol"] == "udp"} & known
    before = carried(net)
    passes(net)
    goes_on(net)
    assert carried(net) == before


def test_with_an_agent_it_is_a_takeover_as_any(net: PairLab) -> None:
    net.switch.ip("link", "set", "inner", "down")
    net.carrier("switch")
    by_rules(net)
    passes(net)
    net.switch.ip("link", "set", "inner", "up")
    net.carrier("server")
    passes(net)
    net.server.popen.kill()
    net.server.popen.wait()
    net.carrier("switch")
    by_rules(net)
    passes(net)
    net.start_server()
    net.carrier("server")
    goes_on(net)
    passes(net)
