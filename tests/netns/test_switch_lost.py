# SPDX-License-Identifier: Apache-2.0
"""Switch and agent go away and come back under traffic: one flow that everybody knows, and new ones all the time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab, Process, until
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_pair import MANY_FLOWS, SESSION_RULES, passes, stream
from tests.netns.test_server import UDP_ECHO

SECOND = 10**9
RATE = 1000  # packets per second of the known flow

pytestmark = pytest.mark.long


@pytest.fixture(params=["server", "switch"])
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def net(carrier: str) -> Iterator[PairLab]:
    """The server has opened sessions; then it carries, or has died."""
    with Lab() as lab:
        net = PairLab(lab)
        net.start_agent()
        net.start_server()
        net.carrier("server")
        net.outside.start(sys.executable, "-u", "-c", UDP_ECHO, OUTSIDE, name="echo").ready("bound")
        flows(net, 100).wait(30)
        # some first packets find the peer too slow on a busy machine; these sessions are gone again
        until("both hold the same", lambda: len(sessions(net, "server")) == len(sessions(net, "agent")) >= 20)
        if carrier == "switch":
            net.server.popen.kill()
            net.server.popen.wait()
            net.carrier("switch")
        yield net


def flows(net: PairLab, count: int) -> Process:
    """New ones, about 200 per second."""
    return net.client.start(sys.executable, "-c", MANY_FLOWS, OUTSIDE, str(count))


def sessions(net: PairLab, of: str) -> dict[int, tuple[str, str]]:
    return {row["id"]: (row["internal"], row["external"]) for row in net.show(of, "sessions")}


def settled(net: PairLab, carrier: str, known: dict[int, tuple[str, str]]) -> None:
    """Nobody has lost a session, every one has its two rules and no other has."""
    net.carrier(carrier, 30)
    holders = ("server", "agent") if carrier == "server" else ("agent",)
    until(
        "all sessions are there",
        lambda: all(sessions(net, of).items() >= known.items() for of in holders),
        30,
    )

    def right() -> bool:
        ruled = net.ovs.flows(SESSION_RULES)
        return len(ruled) == 2 * net.show("agent")["offloaded"] == 2 * net.show("agent")["sessions"]

    until("rules are those of the sessions", right, 30)
    passes(net)


def test_the_switch_daemon_is_restarted(net: PairLab, carrier: str) -> None:
    """All its rules are lost. What is lost of the traffic is what comes until the agent has written them again."""
    known = sessions(net, "agent")
    record = stream(net, 8, RATE)
    until("the flow is known", lambda: len(sessions(net, "agent")) > len(known))
    opening = flows(net, 600)
    time.sleep(0.5)
    began = time.monotonic_ns()
    net.ovs.restart()
    back = time.monotonic_ns()
    settled(net, carrier, known)
    opening.wait(30)
    seen = record()
    arrived = seen.received[seen.received > back]
    assert len(arrived), "nothing passes any more"
    print(
        f"\nswitch restarted, the {carrier} carries: away for {(back - began) / 1e6:.0f} ms, "
        f"traffic {(arrived[0] - back) / 1e6:.0f} ms later, {len(seen.lost())} packets of {len(seen.sent)} lost"
    )
    assert arrived[0] - back < 5 * SECOND
    assert net.agent.alive


def test_the_agent_is_killed_and_started_again(net: PairLab, carrier: str) -> None:
    """Who is known passes all the while, by the server or by rules; new flows pass with the server alone."""
    known = sessions(net, "agent")
    record = stream(net, 8, RATE)
    until("the flow has its rules", lambda: net.show("agent")["offloaded"] > len(known))
    known = sessions(net, "agent")
    opening = flows(net, 600)
    time.sleep(0.5)
    began = time.monotonic_ns()
    net.agent.popen.kill()
    net.agent.popen.wait()
    net.start_agent()
    back = time.monotonic_ns()
    settled(net, carrier, known)
    opening.wait(30)
    seen = record()
    lost = len(seen.lost(began - SECOND // 10, back))
    print(
        f"\nagent restarted, the {carrier} carries: away for {(back - began) / 1e6:.0f} ms, {lost} packets of "
        f"{((seen.sent >= began) & (seen.sent < back)).sum()} of the known flow lost"
    )
    assert lost < 100, "more than a busy machine's own hiccups"
    assert "0 deleted" in net.agent.output


def test_the_connection_is_cut_again_and_again(net: PairLab, carrier: str) -> None:
    """Twelve times in four seconds, while sessions open."""
    known = sessions(net, "agent")
    record = stream(net, 8, RATE)
    until("the flow has its rules", lambda: net.show("agent")["offloaded"] > len(known))
    known = sessions(net, "agent")
    opening = flows(net, 600)
    for _ in range(12):
        time.sleep(0.3)
        net.switch.run("ss", "-K", "sport", "=", ":6653")
    opening.wait(30)
    settled(net, carrier, known)
    seen = record()
    print(f"\nconnection cut, the {carrier} carries: {len(seen.lost())} packets of {len(seen.sent)} lost")
    assert len(seen.lost()) < 100, "more than a busy machine's own hiccups"
    assert net.agent.alive
