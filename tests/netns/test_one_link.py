# SPDX-License-Identifier: Apache-2.0
"""One cable between switch and server for both sides, by VLAN tags and by DSCP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab, until
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_pair import passes

EF, AF41, LOCAL = 46 << 2, 34 << 2, 0b000111 << 2  # the last one of RFC 2474's pool 2: it has the lowest bit
ECN = 2

# Answers with the type of service that it has received, and says which that was.
ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
s.bind((sys.argv[1], 7))
print("bound", flush=True)
while True:
    data, control, _, peer = s.recvmsg(9000, 64)
    tos = control[0][2][0]
    s.sendmsg([b"%d" % tos], [(socket.IPPROTO_IP, socket.IP_TOS, bytes([tos, 0, 0, 0]))], 0, peer)
"""
# Sends with each type of service; prints what arrived there, and of the answer here.
ASK = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
s.bind(("", int(sys.argv[2])))
s.settimeout(1)
found = []
for tos in map(int, sys.argv[4:]):
    s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    for attempt in range(5):
        s.sendto(bytes(int(sys.argv[3])), (sys.argv[1], 7))
        try:
            data, control, _, _ = s.recvmsg(9000, 64)
        except TimeoutError:
            continue
        found.append((int(data), control[0][2][0]))
        break
print(found)
"""


@pytest.fixture(params=["vlan", pytest.param("dscp", marks=pytest.mark.long)])
def net(request: pytest.FixtureRequest) -> Iterator[PairLab]:
    with Lab() as lab:
        net = PairLab(lab, mark=request.param, switch={"barrier": "probe"})
        net.mark = request.param
        net.start_agent()
        yield net


def classes(net: PairLab, port: int, *sent: int, size: int = 100) -> list[tuple[int, int]]:
    """Of each type of service: what arrived outside, and what came back."""
    words = [OUTSIDE, str(port), str(size), *map(str, sent)]
    return json.loads(net.client.run("python3", "-c", ASK, *words).replace("(", "[").replace(")", "]"))


def unchanged(net: PairLab, port: int) -> None:
    """Two standard codepoints, with ECN, small and in fragments."""
    sent = [EF, AF41 | ECN]
    assert classes(net, port, *sent) == [[tos, tos] for tos in sent]
    assert classes(net, port, *sent, size=4000) == [[tos, tos] for tos in sent]


def test_both_sides_by_one_cable(net: PairLab) -> None:
    net.outside.start("python3", "-u", "-c", ECHO, OUTSIDE, name="echo").ready("bound")
    passes(net)
    unchanged(net, 4000)
    assert classes(net, 4000, LOCAL) == [[LOCAL, LOCAL]], "the switch itself loses nothing"
    net.start_server()
    net.carrier("server")
    passes(net)
    assert net.client.attempt("ping", "-c", "1", "-W", "1", "10.0.0.1").returncode == 0
    unchanged(net, 4001)
    lost = 0 if net.mark == "vlan" else 4
    assert classes(net, 4001, LOCAL) == [[LOCAL & ~lost] * 2]
    hops = net.client.run("traceroute", "-n", "-q", "1", "-w", "2", "-m", "4", OUTSIDE).splitlines()[1:]
    assert [hop.split()[1] for hop in hops] == ["10.0.0.1", OUTSIDE]
    # those that know nothing of us ask, on both sides, and are answered by the server
    for end in (net.client, net.outside):
        end.ip("neigh", "flush", "all")
    passes(net)
    rx = net.show("server", "stats")["counters"]
    assert rx["rx_packets.0"] >= 10 <= rx["rx_packets.1"]

    net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", name="tcp").ready("Server listening")
    tcp = net.client.start("iperf3", "-c", OUTSIDE, "-t", "6", "--json", "-S", str(AF41), name="download")
    until("the stream runs", lambda: net.show("server")["sessions"] >= 3)
    net.server.popen.kill()
    net.server.popen.wait()
    net.carrier("switch")
    passes(net)
    unchanged(net, 4001)
    net.start_server()
    net.carrier("server")
    assert tcp.wait(30) == 0, tcp.output
    assert json.loads(tcp.output)["end"]["sum_received"]["bytes"] > 1 << 20
    passes(net)
    unchanged(net, 4001)
    verdicts = net.show("server", "stats")["verdicts"]
    assert not verdicts["drop_ip_checksum"]
    assert not verdicts["drop_vlan"]


def test_the_links_loss_is_a_takeover(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    passes(net)
    net.switch.ip("link", "set", "inner", "down")
    net.carrier("switch")
    passes(net)
    net.switch.ip("link", "set", "inner", "up")
    net.carrier("server")
    passes(net)
