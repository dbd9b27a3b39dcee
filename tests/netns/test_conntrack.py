# SPDX-License-Identifier: Apache-2.0
"""`switch.nat: conntrack`: server and agent are killed and come back, under traffic, and no flow is lost."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab, until
from switch_agent.conntrack import ZONE
from switch_agent.pair_lab import CLI, OUTSIDE, PairLab
from tests.netns.test_pair import SESSION_RULES, passes, stream
from tests.netns.test_server import UDP_ECHO
from tests.netns.test_switch_lost import flows, sessions

SECOND = 10**9


@pytest.fixture
def net() -> Iterator[PairLab]:
    with Lab() as lab:
        net = PairLab(lab, switch={"nat": "conntrack"})
        net.start_agent()
        net.start_server()
        net.carrier("server")
        net.outside.start(sys.executable, "-u", "-c", UDP_ECHO, OUTSIDE, name="echo").ready("bound")
        yield net


def entries(net: PairLab) -> set[str]:
    """Ids of the sessions that the tracker has."""
    dump = net.ovs.appctl("dpctl/dump-conntrack", f"zone={ZONE}")
    return {f"{int(label, 16) & (1 << 64) - 1:016x}" for label in re.findall(r"labels=0x([0-9a-f]+)", dump)}


def ruled(net: PairLab) -> set[str]:
    """Those that must have one."""
    return {row["id"] for row in net.show("agent", "sessions") if row["protocol"] in ("tcp", "udp")}


def test_the_server_dies_and_returns_and_so_does_the_agent(net: PairLab) -> None:
    flows(net, 100).wait(30)
    record = stream(net, 20, 1000)
    until("sessions have entries", lambda: entries(net) == ruled(net) and len(entries(net)) >= 20, 20)
    known = sessions(net, "agent")
    died = time.monotonic_ns()
    net.server.popen.kill()
    net.server.popen.wait()
    net.carrier("switch")
    passes(net)
    assert net.ovs.flows(SESSION_RULES) == []
    alone = time.monotonic_ns()

    # an agent that knows nothing finds the sessions in the tracker, and new flows get entries
    net.agent.popen.kill()
    net.agent.popen.wait()
    net.start_agent()
    assert re.search(r"(\d+) sessions are known by the rules", net.agent.output)
    assert "0 restored, 0 deleted" in net.agent.output
    assert sessions(net, "agent").items() >= known.items()
    flows(net, 50).wait(30)
    until("new sessions have entries", lambda: entries(net) == ruled(net) > set(known), 20)

    # the server returns, learns all, and carries
    back = time.monotonic_ns()
    net.start_server()
    net.carrier("server", 30)
    passes(net)
    assert sessions(net, "server").items() >= known.items()
    returned = time.monotonic_ns()
    seen = record()
    lost = {
        "takeover": len(seen.lost(died - SECOND // 10, alone)),
        "agent away": len(seen.lost(alone, back)),
        "return": len(seen.lost(back, returned)),
    }
    print(f"\nlost of 1000 packets per second: {lost}")
    assert max(lost.values()) < 100, "more than a busy machine's own hiccups"
    until("entries are those of the sessions", lambda: entries(net) == ruled(net), 20)


@pytest.mark.long
def test_what_the_switch_carries_lives_and_what_is_quiet_ends() -> None:
    """The tracker's own idle times are all that is known of it."""
    with Lab() as lab:
        net = PairLab(lab, switch={"nat": "conntrack"}, nat={"timeouts": {"udp": 10}})
        net.start_agent()
        record = stream(net, 18, rate=50)
        until("it has an entry", lambda: len(entries(net)) == 1)
        [session] = net.show("agent", "sessions")
        seen = record()
        [still] = net.show("agent", "sessions")
        assert still["id"] == session["id"]
        assert entries(net) == {session["id"]}
        assert len(seen.lost()) < 20
        until("the quiet session has ended", lambda: not net.show("agent", "sessions"), 40)
        until("and its entry", lambda: not entries(net))


def test_the_daemon_is_restarted(net: PairLab) -> None:
    """All entries are lost, the timeout policy is in the database; the agent writes them again."""
    flows(net, 100).wait(30)
    net.server.popen.kill()
    net.server.popen.wait()
    net.carrier("switch")
    until("sessions have entries", lambda: entries(net) == ruled(net) and len(entries(net)) >= 20, 20)
    net.ovs.restart()
    until("all have entries again", lambda: entries(net) == ruled(net) and len(entries(net)) >= 20, 30)
    dump = net.ovs.appctl("dpctl/dump-conntrack", "-s", f"zone={ZONE}")
    assert all(int(left) > 900_000 for left in re.findall(r"timeout=(\d+)", dump))
    passes(net)


def test_the_directory_is_of_no_open_vswitch(net: PairLab) -> None:
    """One clear line, and a switch that is not prepared."""
    net.agent.popen.kill()
    net.agent.popen.wait()
    path = net.lab.directory / "agent.yaml"
    path.write_text(path.read_text().replace(str(net.ovs.directory), "/nowhere"))
    agent = net.switch.start(*CLI, "switch", str(path), name="agent")
    agent.ready("cannot be prepared", timeout=30)
    assert "switch.nat: conntrack" in agent.output
    assert "/nowhere" in agent.output
