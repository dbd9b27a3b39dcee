# SPDX-License-Identifier: Apache-2.0
"""What carries the server's ports: AF_XDP and AF_PACKET, with real traffic through the NAT."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from nat_control import api
from nat_control.demo import SERVER
from nat_control.lab import Lab, until
from tests.netns.test_server import Net


@pytest.fixture
def net() -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab)


def begin(net: Net, internal: dict[str, Any] | None = None, external: dict[str, Any] | None = None) -> None:
    path = net.write()
    content = yaml.safe_load(path.read_text())
    content["ports"]["internal"] |= internal or {}
    content["ports"]["external"] |= external or {}
    path.write_text(yaml.safe_dump(content))
    net.begin(path)


def transfer(net: Net, seconds: int = 2) -> float:
    """Mbit/s of TCP that arrive outside."""
    listener = net.outside.start("iperf3", "-s", "-1", "--forceflush", name="iperf3").ready("listening")
    said = net.client.run("iperf3", "-c", SERVER, "-t", str(seconds), "-J")
    listener.wait(10)
    return float(json.loads(said)["end"]["sum_received"]["bits_per_second"]) / 1e6


def drivers(net: Net) -> dict[str, tuple[str, str | None]]:
    ports = json.loads(net.show("ports", "--json"))
    return {name: (port["driver"], port["not_af_xdp"]) for name, port in ports.items()}


@pytest.mark.parametrize("driver", ["af_xdp", "af_packet"])
def test_tcp_through_a_kernel_interface(net: Net, driver: str) -> None:
    before = net.state()
    wanted = {} if driver == "af_xdp" else {"driver": driver}  # AF_XDP comes first unasked
    begin(net, wanted, wanted)
    assert {name for name, _ in drivers(net).values()} == {f"net_{driver}"}
    net.ping()
    assert "libbpf" not in net.server.output
    assert "libxdp" not in net.server.output
    assert transfer(net) > 20, "checksums left to hardware, or merged segments, make TCP crawl"
    assert net.server.stop() == 0, net.server.output
    assert net.state() == before


FLOOD = """
import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
for host in range(20, 170):
    for _ in range(70):
        s.sendto(b"x", (f"198.51.100.{host}", 9))
"""


def test_many_packets_held_on_af_xdp(net: Net) -> None:
    """150 next hops that nobody has keep 64 packets each: of the pool's buffers the kernel sees each once, and again later."""
    path = net.write()
    content = yaml.safe_load(path.read_text())
    content["peer"] = {
        "listen": "127.0.0.1:7000",
        "mode": "asynchronous",
        "hold": {"packets": 12000, "ms": 2000},
    }
    content["heartbeat"] = {"listen": "127.0.0.1:7001"}
    content["virtual"] = {"mac": "02:00:00:00:00:0a"}
    path.write_text(yaml.safe_dump(content))
    net.begin(path)
    assert {name for name, _ in drivers(net).values()} == {"net_af_xdp"}

    def held() -> int:  # asked in this process: another one may take longer to start than they are held
        return int(next(api.ask(net.socket, {"show": "status"}))["status"]["held"])

    most = 0
    for _ in range(3):
        net.client.run(sys.executable, "-c", FLOOD)
        most = max(most, held())
        until("none is held any more", lambda: held() == 0)
    assert most > 8000
    net.ping()
    assert transfer(net) > 20


def test_without_af_xdp_it_says_why(net: Net) -> None:
    for namespace, device in ((net.nat, "nat-in"), (net.client, "eth0")):
        namespace.ip("link", "set", device, "mtu", "9000")
    before = net.state()
    begin(net, {"mtu": 9000})
    found = drivers(net)
    why = "the buffers for an MTU of 9000 are larger than AF_XDP takes"  # both ports share them
    assert found == {"internal": ("net_af_packet", why), "external": ("net_af_packet", why)}
    assert f"internal: not by AF_XDP: {why}" in net.server.output
    assert "not by AF_XDP" in net.show("ports")
    net.ping()
    assert transfer(net) > 20
    assert net.server.stop() == 0, net.server.output
    assert net.state() == before


def test_the_xdp_program_goes_after_a_kill(net: Net) -> None:
    before = net.state()
    begin(net, {"driver": "af_xdp"}, {"driver": "af_xdp"})
    net.server.popen.kill()
    net.server.popen.wait()
    assert net.state() != before, "AF_XDP's program outlives its process"
    begin(net, {"driver": "af_xdp"}, {"driver": "af_xdp"})
    assert "repaired: nat-in: put back" in net.server.output
    net.ping()
    assert net.server.stop() == 0, net.server.output
    assert net.state() == before


def test_several_queues_become_one(net: Net) -> None:
    net.nat.run("ethtool", "-L", "nat-in", "rx", "2", "tx", "2")
    before = net.nat.run("ethtool", "-l", "nat-in")
    begin(net)
    assert drivers(net)["internal"] == ("net_af_xdp", None)
    assert "rx channels 2 -> 1" in net.server.output
    net.ping()
    assert transfer(net) > 20
    assert net.server.stop() == 0, net.server.output
    assert net.nat.run("ethtool", "-l", "nat-in") == before


def test_jumbo_frames(net: Net) -> None:
    """8000 bytes that may not be fragmented, and TCP with segments of 9000."""
    for namespace, device in (
        (net.nat, "nat-in"),
        (net.nat, "nat-out"),
        (net.client, "eth0"),
        (net.outside, "eth0"),
    ):
        namespace.ip("link", "set", device, "mtu", "9000")
    begin(net, {"mtu": 9000}, {"mtu": 9000})
    net.client.run("ping", "-c", "2", "-W", "2", "-s", "8000", "-M", "do", SERVER)
    assert transfer(net) > 20
