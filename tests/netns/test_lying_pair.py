# SPDX-License-Identifier: Apache-2.0
"""The pair on a switch that acknowledges 30 ms before it writes, under traffic."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab, until
from switch_agent.pair_lab import PairLab
from tests.netns.test_pair import SESSION_RULES, passes, stream

LATE = 0.03


@pytest.fixture
def net() -> Iterator[PairLab]:
    with Lab() as lab:
        net = PairLab(lab, switch={"barrier": "probe", "openflow": "127.0.0.1:6753"})
        ways = ["127.0.0.1:6653", "127.0.0.1:6753", str(LATE), "127.0.0.1:6654", "127.0.0.1:6754"]
        liar = net.switch.start(sys.executable, "-m", "tests.switch.lying", *ways, name="liar")
        liar.ready("it lies")
        net.start_agent()
        yield net


def test_a_takeover_is_proved(net: PairLab) -> None:
    """The packet of a new flow leaves when its rules are there; the dead server's forward rules are gone when it is said."""
    net.start_server()
    net.carrier("server")
    record = stream(net, 4)
    until("it has its rules", lambda: len(net.ovs.flows(SESSION_RULES)) >= 2, 5, 0.05)
    net.server.popen.kill()
    net.carrier("switch")
    until("the takeover is proved", lambda: net.show("agent")["takeover"]["proved"], 10, 0.01)
    takeover = net.show("agent")["takeover"]
    assert takeover["written"] <= takeover["barrier"] < takeover["written"] + LATE * 1e9
    assert takeover["proved"] >= takeover["written"] + LATE * 1e9
    assert not net.ovs.flows("cookie=0x7000000000000010/-2")
    seen = record()
    assert seen.received[0] >= seen.sent[0] + LATE * 1e9, "the first packet left before its rules were there"
    assert len(seen.lost()) < 1000, f"{len(seen.lost())} of 4000"
    passes(net)
    assert not [line for line in net.show("agent")["degraded"] if "takeover" in line]
    net.start_server()
    net.carrier("server")
    passes(net)
