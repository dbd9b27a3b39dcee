# SPDX-License-Identifier: Apache-2.0
"""The server on two vhost-user ports of a real Open vSwitch with DPDK, client and outside on its other ports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.hugepages import NoHugepages, reserved
from nat_control.demo import CLIENT, NAT_INSIDE, NAT_OUTSIDE, POOL, ROUTER, SERVER, server_command
from nat_control.lab import Lab, Process, until
from switch_agent.channel import Channel
from switch_agent.codec import Ready
from switch_agent.failover import WithGroup
from switch_agent.ovs import OpenVSwitch
from switch_agent.pipeline import Side
from switch_agent.plane import OpenFlowDataPlane
from tests.memory_plane import AsyncMemoryPlane, MemoryPlane
from tests.netns.test_one_link import ASK, ECHO
from tests.netns.test_server import CLI
from tests.switch.net import GATEWAY_KEY, INTERNAL_PORT, address, mac_number, next_hops, record

PROGRAM = Path("/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk")
OPTIONS = (
    "dpdk-init=true",
    "dpdk-socket-mem=256",
    "dpdk-lcore-mask=0x1",
    "pmd-cpu-mask=0x1",
    "pmd-maxsleep=200",
    'dpdk-extra="--no-pci --in-memory --no-telemetry --iova-mode=va"',
)
MEMORY_MB = 700  # of the switch, the server's packets and its tables
MTU = 9000

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="apt install openvswitch-switch-dpdk")


class Net:
    """client - Open vSwitch - outside, and the server's two ports, all with jumbo frames."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.switch, self.client, self.outside, self.nat = (
            lab.namespace(name) for name in ("switch", "client", "outside", "nat")
        )
        for end, device in ((self.client, "client"), (self.outside, "outside")):
            lab.cable(end, "eth0", self.switch, device)
            # what they leave to hardware does not pass a userspace switch
            end.run("ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off")
            end.ip("link", "set", "eth0", "mtu", str(MTU))
            self.switch.ip("link", "set", device, "mtu", str(MTU))
        self.client.address("eth0", f"{CLIENT}/24")
        self.client.route("default", NAT_INSIDE)
        self.outside.address("eth0", f"{ROUTER}/24")
        self.outside.address("lo", f"{SERVER}/32")
        self.sockets = {name: lab.directory / f"{name}.vhost" for name in ("inner", "outer")}
        self.ovs = OpenVSwitch(
            self.switch, {"client": 1, "outside": 2}, program=str(PROGRAM), options=OPTIONS
        )
        for number, (name, socket) in enumerate(self.sockets.items(), 3):
            of_it = ["type=dpdkvhostuserclient", f"options:vhost-server-path={socket}", f"mtu_request={MTU}"]
            of_it.append(f"ofport_request={number}")
            self.ovs.vsctl("add-port", "tandem", name, "--", "set", "interface", name, *of_it)
        self.join()

    def join(self) -> None:
        """The switch is two cables: client to the server's inside, outside to the server's outside."""
        for source, target in ((1, 3), (3, 1), (2, 4), (4, 2)):
            self.ovs.ofctl("add-flow", f"in_port={source},actions=output:{target}")

    def start(self, mtu: int = 1500) -> Process:
        device = "net_virtio_user{},path={},server=1"
        inner, outer = (device.format(i, path) for i, path in enumerate(self.sockets.values()))
        content = {
            "instance": "vhost",
            "ports": {
                "internal": {"device": inner, "address": f"{NAT_INSIDE}/24", "mtu": mtu},
                "external": {"device": outer, "address": f"{NAT_OUTSIDE}/24", "gateway": ROUTER, "mtu": mtu},
            },
            "nat": {"pool": {"addresses": "-".join(POOL), "ports": "1024-65535"}, "max_sessions": 10_000},
            "control": {"socket": str(self.lab.directory / "nat.sock")},
        }
        path = self.lab.directory / "nat.yaml"
        path.write_text(yaml.safe_dump(content))
        self.server = self.nat.start(*server_command(path), name="server")
        return self.server.ready("\nready", timeout=30)

    def show(self, what: str, *options: str) -> str:
        socket = str(self.lab.directory / "nat.sock")
        return subprocess.run(
            [*CLI, "show", what, "--socket", socket, *options], capture_output=True, text=True, check=True
        ).stdout

    def status(self) -> dict[str, Any]:
        return json.loads(self.show("status", "--json"))

    def answered(self) -> bool:
        return self.client.attempt("ping", "-q", "-c", "1", "-W", "1", SERVER).returncode == 0

    def works(self) -> None:
        until("the server and the switch find each other", self.answered, 20)

    def transfer(self) -> float:
        """Mbit/s of TCP that arrive outside."""
        listener = self.outside.start("iperf3", "-s", "-1", "--forceflush", name="iperf3").ready("listening")
        said = self.client.run("iperf3", "-c", SERVER, "-t", "1", "-J")
        listener.wait(10)
        return float(json.loads(said)["end"]["sum_received"]["bits_per_second"]) / 1e6


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(reserved(MEMORY_MB))
        except NoHugepages as error:
            pytest.skip(str(error))
        yield Net(stack.enter_context(Lab()))


@pytest.fixture
def server(net: Net) -> Iterator[Process]:
    yield net.start()
    net.server.stop()


def test_traffic_and_a_clean_end(net: Net, server: Process) -> None:
    assert "hugepages" in server.output
    net.works()
    ports = json.loads(net.show("ports", "--json"))
    assert {port["driver"] for port in ports.values()} == {"net_virtio_user"}
    assert {port["link"]["up"] for port in ports.values()} == {True}
    until("all links are seen", lambda: net.status()["degraded"] == [])
    assert net.transfer() > 20
    assert server.stop() == 0, server.output
    assert not any(path.exists() for path in net.sockets.values())


def test_the_server_is_killed_and_starts_again(net: Net, server: Process) -> None:
    net.works()
    for _ in range(2):
        net.server.popen.kill()
        net.server.popen.wait()
        assert all(path.exists() for path in net.sockets.values()), "this is what hinders the next start"
        net.start()
        net.works()
    assert net.transfer() > 20


def test_a_second_server_does_not_take_the_sockets(net: Net, server: Process) -> None:
    net.works()
    path = net.lab.directory / "other.yaml"
    path.write_text((net.lab.directory / "nat.yaml").read_text().replace("vhost\n", "second\n"))
    refused = net.nat.attempt(*server_command(path))
    assert refused.returncode == 1
    assert f"another process listens at {net.sockets['inner']}" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert net.answered()


def test_the_switch_goes_and_comes_back(net: Net, server: Process) -> None:
    """What stands at the other end is gone: it says so, lives on, and carries again when that is back."""
    net.works()
    until("the links are seen", lambda: net.status()["degraded"] == [])
    net.ovs.daemon.popen.kill()
    net.ovs.daemon.popen.wait()
    server.ready("internal: net_virtio_user0 is down: no other end is connected")
    server.ready("external: net_virtio_user1 is down: no other end is connected")
    assert net.status()["degraded"] == [
        f"{name}: net_virtio_user{i} is down: no other end is connected"
        for i, name in enumerate(("internal", "external"))
    ]
    assert "degraded" in net.show("status")
    assert "down: no other end is connected" in net.show("ports")
    net.ovs.restart()
    net.join()
    server.ready("internal: net_virtio_user0 is up")
    net.works()
    assert net.transfer() > 20
    assert server.alive


def test_jumbo_frames_in_several_buffers(net: Net) -> None:
    """8000 bytes that may not be fragmented, and TCP in segments of 9000, in buffers of 2 KB."""
    server = net.start(MTU)
    net.works()
    net.client.ip("route", "flush", "cache")  # an earlier server has told it of its MTU
    net.client.run("ping", "-c", "2", "-W", "2", "-s", "8000", "-M", "do", SERVER)
    assert net.transfer() > 20
    assert server.stop() == 0, server.output


async def _prepared(net: Net, macs: dict[str, str]) -> None:
    """What an agent writes for one session of the client, with the server in front; then there is no agent any more."""
    channel = Channel(1)
    await channel.listen(f"unix:{net.ovs.controller_socket}")
    net.ovs.set_controllers(f"unix:{net.ovs.controller_socket}")
    while not any(isinstance(event, Ready) for event in await channel.events()):
        pass
    pipe = WithGroup(Side(1, 3), Side(2, 4), mac_number("02:00:5e:00:01:01"))
    hops = next_hops(pipe)
    plane = OpenFlowDataPlane(channel, pipe, hops, AsyncMemoryPlane(MemoryPlane(1, [])))
    await plane.prepare()
    ends = {"internal_addr": address(CLIENT), "remote_addr": address(SERVER), "remote_port": 7}
    await plane.set_next_hop(GATEWAY_KEY, mac_number(macs["outside"]))
    assert await plane.install(record(internal_mac=mac_number(macs["client"]), **ends)) == 1
    await plane.install_static_peer_rules()
    await channel.close()


def test_a_killed_server_is_found_by_a_group_alone(net: Net, server: Process) -> None:
    """Its links end with it: the switch goes over to the rules of sessions without an agent (failover.py)."""
    net.works()
    macs = {
        name: end.run("cat", "/sys/class/net/eth0/address").strip()
        for name, end in (("client", net.client), ("outside", net.outside))
    }
    net.ovs.ofctl("del-flows")
    asyncio.run(_prepared(net, macs))
    net.outside.start(sys.executable, "-u", "-c", ECHO, SERVER, name="echo").ready("bound")
    ask = (sys.executable, "-c", ASK, SERVER, str(INTERNAL_PORT), "100", "184")
    until("the server carries it", lambda: net.client.run(*ask).strip() == "[(184, 184)]")
    assert not any(
        "n_packets=0" not in flow for flow in net.ovs.flows("cookie=0x1000000000000000/0x7000000000000000")
    )
    net.server.popen.kill()
    net.server.popen.wait()
    assert net.client.run(*ask).strip() == "[(184, 184)]", "the rules of its session carry it"
    assert "load:0x1->NXM_NX_REG0[]" in "".join(net.ovs.flows("table=1")), "and go on to"
    net.ovs.set_controllers()
    net.ovs.ofctl("del-flows")
    net.join()
