# SPDX-License-Identifier: Apache-2.0
"""Each partition of the traffic between switch and server, with real clients, a kill -9 and a return."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from nat_control.lab import Lab, until
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_pair import SESSION_RULES, passes, stream

TALKER = """
import socket, sys
with socket.create_connection((sys.argv[1], 9100)) as s:
    print("connected", flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            break
        for _ in range(int(line)):
            s.sendall(b"x" * 1000)
            got = 0
            while got < 1000:
                got += len(s.recv(1000 - got))
        print("said", flush=True)
"""
ECHO = """
import socket, sys, threading
def serve(one):
    with one:
        while data := one.recv(65536):
            one.sendall(data)
with socket.create_server((sys.argv[1], 9100)) as s:
    print("bound", flush=True)
    while True:
        threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"""


def pair(lab: Lab, **options: Any) -> PairLab:
    net = PairLab(lab, **options)
    net.start_agent()
    net.start_server()
    return net


def row(net: PairLab, of: str, protocol: str) -> dict[str, Any] | None:
    found = [one for one in net.show(of, "sessions") if one["protocol"] == protocol]
    return found[0] if found else None


def packets_at(net: PairLab, port: int) -> int:
    """What the switch has sent out of this port."""
    said = net.ovs.ofctl("dump-ports", str(port))
    return int(said.split("tx pkts=")[1].split(",")[0])


def talk(net: PairLab) -> Callable[[str], None]:
    """A TCP connection that says so many kilobytes when told, or ends."""
    net.outside.start(sys.executable, "-u", "-c", ECHO, OUTSIDE, name="echo").ready("bound")
    pipe = net.lab.directory / "talk"
    pipe.write_text("")
    command = f"tail -f -n +1 {pipe} | {sys.executable} -u -c '{TALKER}' {OUTSIDE}"
    talker = net.client.start("sh", "-c", command, name="talker").ready("connected")
    said = 0

    def say(what: str) -> None:
        nonlocal said
        with pipe.open("a") as file:
            file.write(f"{what}\n")
        if what != "end":
            said += 1
            until("it has answered", lambda: talker.output.count("said") == said, 20)

    return say


def test_new_at_peer_a_known_flow_loses_nothing() -> None:
    """The server has opened it, and the switch carries it: the server's death is none of its business."""
    with Lab() as lab:
        net = pair(lab, peer={"partition": "new_at_peer"})
        net.carrier("server")
        record = stream(net, 6)
        until("it is in front", lambda: net.show("agent")["in_front"] >= 1)
        before = packets_at(net, 3)
        known = row(net, "server", "udp")
        assert known
        assert known["id"] in {one["id"] for one in net.show("agent", "sessions")}
        say = talk(net)
        until("TCP is in front as well", lambda: net.show("agent")["in_front"] >= 2)
        say("100")
        assert packets_at(net, 3) - before < 100, "the server has seen more than handshakes"

        net.server.popen.kill()
        net.server.popen.wait()
        net.carrier("switch")
        say("100")
        seen = record()
        lost = seen.lost()
        assert len(lost) == 0, f"{len(lost)} datagrams of {len(seen.sent)} lost"
        passes(net)

        net.start_server()
        net.carrier("server")
        until("both are in front again", lambda: net.show("agent")["in_front"] >= 2)
        say("100")
        passes(net)
        say("end")
        for name in ("agent", "server"):
            until(f"{name}: it has ended", lambda name=name: _tcp_state(net, name) == "closing")  # type: ignore[misc]


def _tcp_state(net: PairLab, of: str) -> str | None:
    found = row(net, of, "tcp")
    return found and found["state"]


@pytest.mark.long
def test_new_at_peer_counts_and_ages_right() -> None:
    """The server sees only the first packet, and still knows how many there were, and that it must not end it."""
    with Lab() as lab:
        net = pair(
            lab, peer={"partition": "new_at_peer"}, nat={"timeouts": {"udp": 10, "tcp_transitory": 10}}
        )
        net.carrier("server")
        say = talk(net)
        until("it is in front", lambda: net.show("agent")["in_front"] >= 1)
        record = stream(net, 18, rate=50)
        for _ in range(4):
            say("50")
        known = until("the server has it", lambda: row(net, "server", "udp"))
        seen = record()
        assert len(seen.lost()) == 0
        still = row(net, "server", "udp")
        assert still
        assert still["id"] == known["id"]
        sent = len(seen.sent)

        def counted() -> bool:
            found = row(net, "server", "udp")
            return bool(found and sent - 5 <= found["packets_out"] <= sent)

        until("each datagram is counted once", counted, 8, 0.2)
        tcp = row(net, "server", "tcp")
        assert tcp
        assert tcp["state"] == "established"
        assert tcp["bytes_in"] > 4 * 50 * 1000
        say("end")
        until("it is closing", lambda: _tcp_state(net, "server") == "closing")
        until("and gone by its short timer", lambda: row(net, "server", "tcp") is None, 30, 0.2)
        until("at the agent too", lambda: row(net, "agent", "tcp") is None)
        until("with its rules", lambda: not any("tcp" in one for one in net.ovs.flows(SESSION_RULES)))


def test_by_protocol() -> None:
    """UDP never sees the server, TCP and pings do; whoever dies."""
    with Lab() as lab:
        net = pair(lab, peer={"partition": "by_protocol", "local_protocols": ["udp"]})
        net.carrier("server")
        say = talk(net)
        say("10")
        before = packets_at(net, 3)
        record = stream(net, 5)
        until("the switch has it", lambda: row(net, "agent", "udp"))
        known = until("and the server stands by", lambda: row(net, "server", "udp"))
        assert int(known["external"].rpartition(":")[2]) >= 32768, "a port of the agent"
        tcp = row(net, "server", "tcp")
        assert tcp
        assert int(tcp["external"].rpartition(":")[2]) < 32768, "a port of the server"
        assert packets_at(net, 3) - before < 200
        net.server.popen.kill()
        net.server.popen.wait()
        net.carrier("switch")
        say("10")
        passes(net)
        assert len(record().lost()) == 0
        net.start_server()
        net.carrier("server")
        say("10")
        passes(net)


@pytest.mark.long
def test_all_local() -> None:
    """The server stands by with all sessions; its death is nothing, and the agent gets them back from it."""
    with Lab() as lab:
        net = pair(lab, peer={"partition": "all_local"})
        until("they are a pair", lambda: net.show("agent")["peer"] == "operational")
        say = talk(net)
        say("10")
        record = stream(net, 6)
        until("the server holds both", lambda: net.show("server")["sessions"] >= 2)
        assert not net.ovs.flows("cookie=0x7000000000000010/-1"), "nothing is forwarded"
        assert net.show("agent")["carrier"] == "switch"
        net.server.popen.kill()
        net.server.popen.wait()
        until("it is missed", lambda: net.show("agent")["peer"] != "operational")
        say("10")
        assert len(record().lost()) == 0
        net.start_server()
        until("they are a pair again", lambda: net.show("agent")["peer"] == "operational")
        until("the server holds them", lambda: net.show("server")["sessions"] >= 1)
        # the switch goes on while the agent is away, which then knows all of it again
        net.agent.popen.kill()
        net.agent.popen.wait()
        say("10")
        net.start_agent()
        until("they are a pair once more", lambda: net.show("agent")["peer"] == "operational")
        say("10")
        assert net.show("agent")["carrier"] == "switch"
        passes(net)


@pytest.mark.parametrize("ends", ["by its client", pytest.param("by a reset", marks=pytest.mark.long)])
def test_tcp_states_are_right_while_the_switch_carries(ends: str) -> None:
    with Lab() as lab:
        net = PairLab(lab)
        net.start_agent()
        say = talk(net)
        say("50")
        until("its handshake is known", lambda: _tcp_state(net, "agent") == "established", 15)
        assert net.show("agent")["tcp_ages"] == "by its state"
        if ends == "by its client":
            say("end")
            until("it is closing", lambda: _tcp_state(net, "agent") == "closing")
        else:
            net.outside.run("ss", "-K", "sport", "=", ":9100")
            until("it is reset", lambda: _tcp_state(net, "agent") == "reset")
