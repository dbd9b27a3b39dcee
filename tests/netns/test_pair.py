# SPDX-License-Identifier: Apache-2.0
"""The pair on a real Open vSwitch: the server dies in several ways, and what runs through it goes on."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from nat_control.client import Client
from nat_control.lab import Lab, until
from nat_control.lab_stream import Record
from switch_agent.pair_lab import CLIENT, OUTSIDE, PairLab
from tests.netns.test_server import UDP_ASK, UDP_ECHO
from tests.stopped_thread import stopped_thread

SESSION_RULES = "cookie=0x1000000000000000/0x7000000000000000"


@pytest.fixture
def net() -> Iterator[PairLab]:
    with Lab() as lab:
        net = PairLab(lab)
        net.start_agent()
        yield net


def pings(net: PairLab, count: int = 5) -> int:
    """How many of them were answered."""
    said = net.client.attempt("ping", "-q", "-i", "0.1", "-W", "1", "-c", str(count), OUTSIDE).stdout
    return int(said.split(" received")[0].split(", ")[-1])


def passes(net: PairLab) -> None:
    """Traffic goes through, soon: right after a change the switch's cache may still act by the rules before."""
    until("five pings in a row are answered", lambda: pings(net) == 5, 10)


def test_agent_alone(net: PairLab) -> None:
    """New flows by packet-in, then rules; answers ping and ARP for what is ours."""
    assert net.show("agent")["carrier"] == "switch"
    passes(net)
    assert net.client.attempt("ping", "-c", "1", "-W", "1", "10.0.0.1").returncode == 0
    net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", name="iperf3").ready("Server listening")
    done = net.client.attempt("iperf3", "-c", OUTSIDE, "-t", "1", "--json")
    assert json.loads(done.stdout)["end"]["sum_received"]["bytes"] > 1 << 20
    assert any("tcp,in_port=1" in flow and "10.0.0.10" in flow for flow in net.ovs.flows())


def test_fragments_through_the_agent_alone(net: PairLab) -> None:
    """A switch shows fragments without ports, so they match no session: the agent's core carries them."""
    said = net.client.run("ping", "-q", "-i", "0.2", "-W", "2", "-c", "3", "-s", "4000", OUTSIDE)
    assert " 3 received" in said
    net.outside.start(sys.executable, "-u", "-c", UDP_ECHO, OUTSIDE, name="echo").ready("bound")
    sizes = ("8000", "1400", "20000")
    assert net.client.run(sys.executable, "-c", UDP_ASK, OUTSIDE, *sizes).split() == [*sizes]
    verdicts = net.show("agent", "stats")["verdicts"]
    assert verdicts["forward"] + verdicts["held"] >= 2 * (3 * 3 + 6 + 14)
    assert not {name for name, n in verdicts.items() if n and "fragment" in name}


def test_kill_under_traffic_and_return(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", name="tcp").ready("Server listening")
    net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", "-p", "5202", name="udp").ready(
        "Server listening"
    )
    stream = ["-u", "-l", "100", "-b", "800k", "-t", "9"]  # 1000 packets per second
    udp = net.client.start("iperf3", "-c", OUTSIDE, "-p", "5202", *stream, "--json", name="stream")
    tcp = net.client.start("iperf3", "-c", OUTSIDE, "-t", "9", "--json", name="download")
    until("both streams run", lambda: net.show("server")["sessions"] >= 4)
    known = {row["id"]: row for row in net.show("agent", "sessions")}
    assert known, "the switch holds what the server has opened"

    net.server.popen.kill()
    net.server.popen.wait()
    net.carrier("switch")
    takeover = net.show("agent")["takeover"]
    assert takeover["reason"] in ("TCP end", "silence")
    assert takeover["written"] >= takeover["detected"]
    assert {row["id"] for row in net.show("agent", "sessions")} >= set(known), "sessions are lost"
    # somebody new, whose neighbour table knows nothing of us
    net.client.ip("neigh", "flush", "all")
    passes(net)

    net.start_server()
    net.carrier("server")
    for process in (udp, tcp):
        assert process.wait(30) == 0, process.output
    lost = json.loads(udp.output)["end"]["sum"]["lost_packets"]
    assert lost < 1000, f"{lost} packets of 9000 lost: more than a second's worth"
    assert json.loads(tcp.output)["end"]["sum_received"]["bytes"] > 1 << 20
    passes(net)
    assert net.server.alive
    assert net.agent.alive


def test_both_prove_that_they_hold_the_same(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    passes(net)
    for name in ("server", "agent"):
        peer = Client(net.lab.directory / f"{name}.sock").peer()
        assert peer["verified"] is True
        assert peer["digest"]["equal"] is True
        assert peer["digest"]["ours"] == peer["digest"]["theirs"] >= 1
        assert (peer["refused"], peer["differed"]) == ([], [])
        assert peer["messages"]["sent"]["Hello"] == 1


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGTERM])
def test_hung_or_ended(net: PairLab, how: signal.Signals) -> None:
    net.start_server()
    net.carrier("server")
    passes(net)
    net.server.signal(how)
    net.carrier("switch")
    passes(net)
    if how is signal.SIGSTOP:
        assert net.show("agent")["takeover"]["reason"] == "silence"
        # it comes back to itself: until the return its packets are fenced off, then it carries again
        net.server.signal(signal.SIGCONT)
        net.carrier("server")
        passes(net)


def test_hung_without_the_takeover_connection(net: PairLab) -> None:
    """The watch has nowhere to write; the agent hears of the death, and writes on the connection that it has."""
    net.start_server()
    net.carrier("server")
    net.ovs.set_controllers("tcp:127.0.0.1:6653")
    until(
        "the connection is gone", lambda: "is not connected to" in json.dumps(net.show("agent")["degraded"])
    )
    net.server.signal(signal.SIGSTOP)
    net.carrier("switch", timeout=2)  # its connection would stand for longer
    takeover = net.show("agent")["takeover"]
    assert (takeover["reason"], takeover["written"]) == ("silence", None)
    passes(net)
    net.server.signal(signal.SIGCONT)
    net.carrier("server")


def test_agent_killed_and_back(net: PairLab) -> None:
    """The server goes on; the agent finds its rules again."""
    net.start_server()
    net.carrier("server")
    passes(net)
    net.agent.popen.kill()
    net.agent.popen.wait()
    passes(net)
    net.start_agent()
    net.carrier("server")
    passes(net)
    until("the server has told it all", lambda: CLIENT in json.dumps(net.show("agent", "sessions")))


def test_agent_back_while_the_switch_carries(net: PairLab) -> None:
    """Nobody has the records any more; the switch's rules tell them, and the server takes them over in the end."""

    def sessions(of: str) -> dict[int, tuple[str, ...]]:
        rows = net.show(of, "sessions")
        return {row["id"]: (row["internal"], row["external"]) for row in rows if row["protocol"] == "tcp"}

    net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", name="tcp").ready("Server listening")
    tcp = net.client.start("iperf3", "-c", OUTSIDE, "-t", "8", "--json", name="download")
    until("it has its rules", lambda: net.show("agent")["offloaded"] >= 2)
    known = sessions("agent")
    net.agent.popen.kill()
    net.agent.popen.wait()
    net.start_agent()
    assert sessions("agent").items() >= known.items()
    assert f"{len(known)} sessions are known by the rules" in net.agent.output
    assert "0 restored, 0 deleted" in net.agent.output
    passes(net)
    net.start_server()
    net.carrier("server")
    assert sessions("server").items() >= known.items()
    assert tcp.wait(30) == 0, tcp.output
    assert json.loads(tcp.output)["end"]["sum_received"]["bytes"] > 1 << 20


def test_a_stopped_agent_holds_nobody_up(net: PairLab) -> None:
    """Its connection stands, and acknowledges nothing: the server notices by the heartbeat, and goes on alone."""
    net.start_server()
    net.carrier("server")
    net.agent.signal(signal.SIGSTOP)
    until("the server is alone", lambda: net.show("server")["peer"] != "operational", 5, 0.05)
    assert pings(net, 10) >= 9
    net.agent.signal(signal.SIGCONT)
    until("they are a pair again", lambda: net.show("server")["peer"] == "operational")
    net.carrier("server")
    passes(net)


def test_the_switch_is_lost_while_sessions_open(net: PairLab) -> None:
    """Every OpenFlow connection ends, again and again, under new flows: the agent lives, and rules are right in the end."""
    net.start_server()
    net.carrier("server")
    listener = net.outside.start(sys.executable, "-u", "-c", UDP_ECHO, OUTSIDE, name="echo").ready("bound")
    asking = net.client.start(sys.executable, "-c", MANY_FLOWS, OUTSIDE, "400", name="flows")
    for _ in range(5):
        time.sleep(0.3)
        net.switch.run("ss", "-K", "sport", "=", ":6653")
    assert asking.wait(30) == 0, asking.output
    assert listener.alive
    assert net.agent.alive
    sessions = net.show("agent")["sessions"]
    assert sessions >= 300
    until("all have both their rules", lambda: len(net.ovs.flows(SESSION_RULES)) == 2 * sessions, 30)
    net.carrier("server")


MANY_FLOWS = """
import socket, sys, time
for i in range(int(sys.argv[2])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x" * 100, (sys.argv[1], 9000))
    time.sleep(0.004)
"""


def stream(net: PairLab, seconds: float, rate: int = 1000, flows: int = 1) -> Callable[..., Record]:
    """Numbered datagrams from the client to the outside; what is returned waits for their end."""
    sent, received = (net.lab.directory / name for name in ("sent.npy", "received.npz"))
    module = [sys.executable, "-m", "nat_control.lab_stream"]
    receiver = net.outside.start(
        *module, "receive", OUTSIDE, "9000", "--flows", str(flows), "--out", str(received)
    )
    until("it listens", lambda: ":9000" in net.outside.run("ss", "-Hlun"))
    arguments = ["--rate", str(rate), "--flows", str(flows), "--seconds", str(seconds), "--out", str(sent)]
    sender = net.client.start(*module, "send", OUTSIDE, "9000", *arguments)

    def record(*, now: bool = False) -> Record:
        if now:
            sender.signal(signal.SIGTERM)
        assert sender.wait(seconds + 20) == 0, sender.output
        time.sleep(0.2)
        receiver.stop()
        return Record.load(sent, received)

    return record


def test_only_the_worker_stops(net: PairLab) -> None:
    """The process answers, its sockets stand, and yet nothing is forwarded."""
    net.start_server()
    net.carrier("server")
    passes(net)
    with stopped_thread(net.server.pid, "nat-worker"):
        net.carrier("switch")
        assert net.show("agent")["takeover"]["reason"] == "stalled worker"
        passes(net)


def test_the_gateway_changes_its_mac_while_the_switch_carries(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    record = stream(net, 5, rate=200)
    until("its session is known", lambda: net.show("agent")["sessions"] >= 1)
    net.server.popen.kill()
    net.carrier("switch")
    net.outside.run("sysctl", "-qw", "net.ipv4.conf.eth0.arp_notify=1")
    changed = time.monotonic_ns()
    net.outside.ip("link", "set", "eth0", "down")
    net.outside.ip("link", "set", "eth0", "address", "02:00:00:00:99:99")
    net.outside.ip("link", "set", "eth0", "up")
    seen = record()
    late = changed + 2 * 10**9
    assert (seen.sent > late).sum() > 100
    assert not len(seen.lost(late)), "two seconds after the change they still go to the old MAC"


def test_a_link_goes_down_and_comes_back(net: PairLab) -> None:
    """Seen by the switch: nobody waits for a heartbeat that still comes."""
    net.start_server()
    net.carrier("server")
    net.nat.ip("link", "set", "nat-in", "down")
    net.carrier("switch")
    assert "is down" in net.agent.output
    passes(net)
    net.nat.ip("link", "set", "nat-in", "up")
    net.carrier("server")
    passes(net)


def test_a_link_down_is_told_by_the_kernel_before_the_switch(net: PairLab) -> None:
    """The takeover is written while the switch is not able to say anything, by the heartbeat's thread; the peer stays."""
    net.start_server()
    net.carrier("server")
    net.ovs.daemon.signal(signal.SIGSTOP)
    try:
        net.nat.ip("link", "set", "nat-in", "down")
        until("the takeover is written", lambda: net.show("agent")["takeover"].get("written"), 4, 0.01)
        takeover = net.show("agent")["takeover"]
    finally:
        net.ovs.daemon.signal(signal.SIGCONT)
    assert takeover["reason"] == "port 3 (inner) is down"
    assert takeover["barrier"] is None
    assert takeover["last_heartbeat"]  # only the thread knows
    net.carrier("switch")
    assert net.show("agent")["peer"] == "operational"
    assert net.show("agent")["takeover"]["barrier"] > takeover["written"] >= takeover["detected"]


def test_a_planned_end_hands_over(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    record = stream(net, 3)
    until("its session is known", lambda: net.show("agent")["sessions"] >= 1)
    before = time.monotonic_ns()
    net.server.signal(signal.SIGTERM)
    assert net.server.popen.wait(10) == 0
    assert "the peer carries" in net.server.output
    assert "the server hands over" in net.agent.output
    lost = len(record().lost(before - 10**8))
    assert lost < 100, f"{lost} lost: more than the machine's own hiccups"


def test_agent_back_after_both_died(net: PairLab) -> None:
    """The switch still forwards to the server that is not there any more."""
    net.start_server()
    net.carrier("server")
    for process in (net.agent, net.server):
        process.popen.kill()
        process.popen.wait()
    net.start_agent()
    until("the agent sees it", lambda: "a server that is not there" in net.agent.output)
    passes(net)


def test_the_server_dies_before_a_new_agent_has_heard_its_sessions(net: PairLab) -> None:
    """Its heartbeat comes, its sync channel does not: the sessions are those of the rules, and it comes back later."""
    net.start_server()
    net.carrier("server")
    record = stream(net, 8, rate=200)
    until("its session has its rules", lambda: net.show("agent")["offloaded"] >= 1)
    [session] = [row for row in net.show("agent", "sessions") if row["protocol"] == "udp"]
    net.agent.popen.kill()
    net.agent.popen.wait()
    barred = ("ipproto", "tcp", "dport", "7000", "prohibit")
    net.nat.ip("rule", "add", "prio", "10", *barred)
    net.start_agent()
    until("it hears the server", lambda: net.show("agent")["watch"]["alive"])
    assert net.show("agent")["carrier"] == "server"
    assert net.show("agent")["sessions"] == 0
    net.server.popen.kill()
    net.carrier("switch")
    known = {row["id"]: row["external"] for row in net.show("agent", "sessions")}
    assert known[session["id"]] == session["external"]
    net.nat.ip("rule", "del", "prio", "10")
    net.start_server()
    net.carrier("server")
    assert {row["id"]: row["external"] for row in net.show("server", "sessions")}.items() >= known.items()
    assert len(record().lost()) < 800
    passes(net)


def test_a_link_that_is_down_when_the_agent_starts(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    net.agent.popen.kill()
    net.agent.popen.wait()
    net.nat.ip("link", "set", "nat-in", "down")
    net.start_agent()
    net.carrier("switch")
    passes(net)
    net.nat.ip("link", "set", "nat-in", "up")
    net.carrier("server")
    passes(net)


def test_a_return_under_steady_new_flows(net: PairLab) -> None:
    """No two digests are of the same moment; the server gets the traffic all the same."""
    net.start_server()
    net.carrier("server")
    net.outside.start(sys.executable, "-u", "-c", UDP_ECHO, OUTSIDE, name="echo").ready("bound")
    net.client.start(sys.executable, "-c", MANY_FLOWS, OUTSIDE, "5000", name="flows")
    net.server.popen.kill()
    net.carrier("switch")
    net.start_server()
    net.carrier("server", 30)


@pytest.mark.long
def test_what_the_switch_carries_does_not_age() -> None:
    """The agent's core sees none of these packets; flow statistics tell it of them."""
    with Lab() as lab:
        net = PairLab(lab, nat={"timeouts": {"udp": 10}})
        net.start_agent()
        record = stream(net, 18, rate=50)
        until("it has its rules", lambda: net.show("agent")["offloaded"] >= 1)
        [session] = net.show("agent", "sessions")
        seen = record()
        [still] = net.show("agent", "sessions")
        assert still["id"] == session["id"]
        assert still["packets_out"] > 300
        assert len(seen.lost()) < 20
