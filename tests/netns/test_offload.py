# SPDX-License-Identifier: Apache-2.0
"""Heavy sessions on a real Open vSwitch: in front of the server by threshold and by hand, and back, under traffic."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nat_control.client import ApiError, Client
from nat_control.lab import Lab, until
from nat_control.lab_stream import Record
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_pair import SESSION_RULES, passes, stream

HEAVY = {"packets_per_second": 200, "age_seconds": 1, "interval_seconds": 1}
SHORT = {"timeouts": {"udp": 12, "tcp_transitory": 12}}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def pair(lab: Lab, **options: Any) -> PairLab:
    net = PairLab(lab, **options)
    net.start_agent()
    net.start_server()
    net.carrier("server")
    return net


def client(net: PairLab, name: str = "server") -> Client:
    return Client(net.lab.directory / f"{name}.sock")


def in_front(net: PairLab) -> int:
    return int(net.show("server")["offload"]["in_front"])


def session(net: PairLab, protocol: str = "udp", name: str = "server") -> Any:
    """The busiest one."""
    rows = [row for row in net.show(name, "sessions") if row["protocol"] == protocol]
    return max(rows, key=lambda row: row["packets_out"] + row["packets_in"], default=None)


def first(net: PairLab) -> None:
    """What carries the stream comes before all else on this machine: a server that waits for a CPU lets packets overtake."""
    for pid in (net.server.pid, net.ovs.daemon.pid):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), -20)


def known(net: PairLab) -> str:
    """The id of the stream's session, once the peer holds it."""

    def held() -> Any:
        row = session(net)
        return row and "pending" not in row["flags"] and row["packets_out"] > 1 and row["id"]

    return str(until("its session is known", held))


def keeps_order(seen: Record, moves: int, begin: int) -> None:
    """1 ms apart, none is overtaken by the next one; where all wait for a CPU, as many as were on the server's way when it moved."""
    arrived = seen.arrival()[seen.sent < begin]
    ways = (arrived - seen.sent[: len(arrived)])[arrived > 0]
    slowest = np.percentile(ways, 99) / 1e6
    assert len(seen.reordered()) <= (0 if slowest < 1 else moves * np.ceil(slowest)), slowest


def received(net: PairLab) -> int:
    counters = net.show("server", "stats")["counters"]
    return int(counters["rx_packets.0"] + counters["rx_packets.1"])


def test_a_heavy_stream_does_without_the_server(lab: Lab) -> None:
    """By threshold to the switch; the server sees none of it, counts all of it, and may die and come back."""
    net = pair(lab, offload=HEAVY)
    record = stream(net, 24)
    until("it is in front", lambda: in_front(net) == 1)
    moved = time.monotonic_ns()
    assert "offload" in session(net)["flags"]
    assert session(net)["id"] == session(net, name="agent")["id"]
    time.sleep(0.5)
    before = received(net)
    time.sleep(2)
    assert received(net) - before < 100, "2000 of the stream have come by"
    counted = session(net)["packets_out"]
    until("the server counts what the switch carries", lambda: session(net)["packets_out"] > counted + 1000)
    status = net.show("server")["offload"]
    assert (status["there"], status["back"], status["refused"]) == (1, 0, 0)

    net.server.popen.kill()
    net.server.popen.wait()
    net.carrier("switch")
    net.start_server()
    net.carrier("server")
    until("the new server knows it", lambda: in_front(net) == 1)
    passes(net)
    seen = record()
    assert not len(seen.lost(moved)), f"{len(seen.lost(moved))} lost of a stream that needs no server"
    keeps_order(seen, 1, moved)
    until("it comes back when it is over", lambda: in_front(net) == 0)
    until(
        "to the rules behind",
        lambda: not any("priority=500" in rule for rule in net.ovs.flows(SESSION_RULES)),
    )


@pytest.mark.long
def test_a_heavy_connection_ends_at_both(lab: Lab) -> None:
    net = pair(lab, offload=HEAVY, nat=SHORT)
    net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", name="tcp").ready("Server listening")
    tcp = net.client.start("iperf3", "-c", OUTSIDE, "-t", "8", "--json", name="transfer")
    until("it is in front", lambda: in_front(net) >= 1)
    data = session(net, "tcp")
    assert data["state"] == "established"
    assert tcp.wait(30) == 0, tcp.output
    sent = json.loads(tcp.output)["end"]["sum_sent"]["bytes"]
    assert sent > 1 << 20

    def now() -> Any:
        return next((row for row in net.show("server", "sessions") if row["id"] == data["id"]), None)

    until("its end is seen", lambda: now() is None or now()["state"] in ("closing", "reset"))
    until(
        "both have ended it",
        lambda: not net.show("server", "sessions") and not net.show("agent", "sessions"),
        40,
    )
    until("no rule is left", lambda: not net.ovs.flows(SESSION_RULES))
    assert in_front(net) == 0


@pytest.mark.long
def test_there_and_back_by_hand_reorders_and_loses_nothing(lab: Lab) -> None:
    net = pair(lab)
    operator = client(net)
    record = stream(net, 16)
    number = known(net)
    first(net)
    begin = time.monotonic_ns()
    for _ in range(10):
        for what, n in (("add", 1), ("remove", 0)):
            told = operator.offload(what, [number])
            assert (told["moved"], told["refused"], told["in_front"]) == ([number], [], n)
            time.sleep(0.3)
    seen = record()
    assert not len(seen.lost(begin))
    keeps_order(seen, 10, begin)
    # each look is half a second old at most, on its way back
    counted = session(net)["packets_out"]
    assert len(seen.sent) - 10 * 600 <= counted <= len(seen.sent)
    assert session(net)["bytes_out"] == counted * 128


@pytest.mark.long
def test_what_is_in_front_ages_by_its_traffic(lab: Lab) -> None:
    net = pair(lab, nat=SHORT)
    operator = client(net)
    record = stream(net, 24, rate=50)
    number = known(net)
    assert operator.offload("add", remote=f"{OUTSIDE}:9000", protocol="udp")["moved"] == [number]
    rows, told = operator.offloaded()
    assert [(row["id"], row["by"]) for row in rows] == [(number, "hand")]
    assert told["policy"] is False
    seen = record()
    assert not len(seen.lost())
    assert session(net)["id"] == number, "twice its timeout old, and busy"
    until("idle, it ends", lambda: session(net) is None and session(net, name="agent") is None, 30)
    until("no rule is left", lambda: not net.ovs.flows(SESSION_RULES))
    assert in_front(net) == 0


@pytest.mark.long
def test_the_agent_starts_anew_with_a_session_in_front(lab: Lab) -> None:
    net = pair(lab)
    operator = client(net)
    record = stream(net, 14)
    number = known(net)
    assert operator.offload("add", [number])["moved"] == [number]
    time.sleep(1)
    begin = time.monotonic_ns()
    net.agent.popen.kill()
    net.agent.popen.wait()
    until("nobody carries for the server", lambda: in_front(net) == 0)
    net.start_agent()
    net.carrier("server")
    until("it is in front", lambda: in_front(net) == 1, 30)
    assert [row["id"] for row in client(net, "agent").offloaded()[0]] == [number]
    seen = record()
    assert not len(seen.lost(begin))


@pytest.mark.long
def test_what_cannot_be_is_said_in_a_line(lab: Lab) -> None:
    net = pair(lab, max_flows=2)
    operator = client(net)
    passes(net)
    with pytest.raises(ApiError, match=r"^session 00000000000000ff: there is none$"):
        operator.offload("add", ["ff"])
    with pytest.raises(ApiError, match="there is no such session"):
        operator.offload("add", protocol="tcp")
    with pytest.raises(ApiError, match="Name them by their ids"):
        operator.offload("remove")
    with pytest.raises(ApiError, match="no ids of sessions"):
        operator.offload("add", ["what"])
    ping = session(net, "icmp")["id"]
    assert operator.offload("add", [ping])["refused"] == [
        {"id": ping, "why": "a switch cannot translate ICMP"}
    ]
    assert operator.offload("remove", [ping])["refused"] == [{"id": ping, "why": "it is not offloaded"}]
    with pytest.raises(ApiError, match="the server decides what is offloaded: ask there"):
        client(net, "agent").offload("add", [ping])
    two = [sys.executable, "-c", TWO, OUTSIDE]
    net.client.run(*two)
    told = operator.offload("add", remote=f"{OUTSIDE}:9000")
    assert len(told["moved"]) == 1
    assert [one["why"] for one in told["refused"]] == ["the switch has room for 1 more"]
    net.agent.popen.kill()
    until("it is alone", lambda: net.show("server")["peer"] == "alone")
    with pytest.raises(ApiError, match="there is no peer now"):
        operator.offload("add", [ping])


TWO = """
import socket, sys
for i in range(2):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x" * 100, (sys.argv[1], 9000))
"""
