# SPDX-License-Identifier: Apache-2.0
"""VLANs from a switch with access ports at the hosts and trunks at the NAT: two devices, and one for both sides.

The switch is Open vSwitch in user space, so the tags are in real frames and no kernel needs to know VLANs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_control.demo import CLIENT, NAT_INSIDE, ROUTER, SERVER, Demo
from nat_control.lab import Lab
from switch_agent.ovs import OpenVSwitch
from tests.netns.test_server import UDP_ASK, UDP_ECHO, Net

INSIDE, OUTSIDE = 10, 20


class TaggedNet(Net):
    """The client in VLAN 10, the server in VLAN 20; ``trunk``: one cable to the NAT for both (router on a stick)."""

    def __init__(self, lab: Lab, *, trunk: bool = False) -> None:
        Demo.__init__(self, lab, self._tell)
        names = ("client", "nat", "outside", "switch")
        self.client, self.nat, self.outside, self.switch = (lab.namespace(name) for name in names)
        self.devices = ["nat-in"] if trunk else ["nat-in", "nat-out"]
        ports = {"client": (self.client, "eth0"), "outside": (self.outside, "eth0")}
        ports |= {device: (self.nat, device) for device in self.devices}
        for name, (end, device) in ports.items():
            lab.cable(end, device, self.switch, name)
        self.ovs = OpenVSwitch(self.switch, {name: at for at, name in enumerate(ports, 1)})
        self.ovs.ofctl("add-flow", "actions=NORMAL")
        carried = {"client": f"tag={INSIDE}", "outside": f"tag={OUTSIDE}", "nat-out": f"trunks={OUTSIDE}"}
        carried["nat-in"] = f"trunks={INSIDE},{OUTSIDE}" if trunk else f"trunks={INSIDE}"
        for name in ports:
            self.ovs.vsctl("set", "port", name, carried[name])
        for end, address in ((self.client, f"{CLIENT}/24"), (self.outside, f"{ROUTER}/24")):
            end.address("eth0", address)
            # checksums are left to be filled in, which the NAT does; segments no switch can split
            end.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")
        self.client.route("default", NAT_INSIDE)
        self.outside.address("lo", f"{SERVER}/32")

    def configuration(self, **both: Any) -> Path:
        internal = {"device": "nat-in", "address": f"{NAT_INSIDE}/24", "vlan": INSIDE, **both}
        external = {"device": self.devices[-1], "address": "198.51.100.1/24", "vlan": OUTSIDE, **both}
        content = {
            "instance": "test",
            "ports": {"internal": internal, "external": {**external, "gateway": ROUTER}},
            "nat": {"pool": {"addresses": "198.51.100.10-198.51.100.13"}, "max_sessions": 1000},
            "control": {"socket": str(self.socket)},
        }
        path = self.lab.directory / "nat.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def features(self) -> list[str]:
        return [self.nat.run("ethtool", "-k", device) for device in self.devices]

    def traffic(self) -> None:
        """Ping small and in fragments, UDP in fragments both ways, TCP both ways, traceroute."""
        for size in ("56", "4000"):
            said = self.client.run("ping", "-q", "-i", "0.2", "-c", "3", "-W", "2", "-s", size, SERVER)
            assert " 3 received" in said
        self.client.run("ping", "-q", "-c", "1", "-W", "2", NAT_INSIDE)
        self.outside.start(sys.executable, "-u", "-c", UDP_ECHO, SERVER, name="echo").ready("bound")
        assert self.client.run(sys.executable, "-c", UDP_ASK, SERVER, "8000", "100").split() == [
            "8000",
            "100",
        ]
        for direction in ((), ("-R",)):
            listener = self.outside.start("iperf3", "-s", "-1", "--forceflush", name="tcp").ready("listening")
            said = self.client.run("iperf3", "-c", SERVER, "-t", "1", "-J", *direction)
            listener.wait(10)
            received = json.loads(said)["end"]["sum_received"]["bytes"]
            assert received > 2_000_000, "checksums left to hardware make TCP crawl"
        hops = self.client.run("traceroute", "-n", "-q", "1", "-w", "2", "-m", "4", SERVER).splitlines()[1:]
        assert [hop.split()[1] for hop in hops] == [NAT_INSIDE, SERVER]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def test_two_devices(lab: Lab) -> None:
    net = TaggedNet(lab)
    before = net.features()
    net.begin(net.configuration())
    assert f"internal: nat-in by net_af_packet, VLAN {INSIDE}, MAC" in net.server.output
    assert "AF_XDP does not see VLAN tags on a veth" in net.server.output
    net.traffic()
    shown = json.loads(net.show("ports", "--json"))
    assert {name: port["vlan"] for name, port in shown.items()} == {"internal": INSIDE, "external": OUTSIDE}
    assert ["VLAN", str(OUTSIDE)] in [line.split() for line in net.show("ports").splitlines()]
    verdicts = net.stats()["verdicts"]
    assert verdicts["fragment"] == 0
    assert not [
        name for name, n in verdicts.items() if n and name.startswith("drop_") and name != "drop_local"
    ]
    assert net.stats()["worker"]["checksums_filled.0"] > 0
    # another VLAN, and none
    for other in ("tag=11", "tag=0"):
        net.ovs.vsctl("set", "port", "client", other, "--", "set", "port", "nat-in", "trunks=0,10,11")
        before_it = net.stats()["verdicts"]["drop_vlan"]
        assert net.client.attempt("ping", "-c", "1", "-W", "1", NAT_INSIDE).returncode == 1
        assert net.stats()["verdicts"]["drop_vlan"] > before_it
    assert net.server.stop() == 0, net.server.output
    assert net.features() == before


def test_one_device_for_both(lab: Lab) -> None:
    """Router on a stick: VLAN 10 comes in and VLAN 20 leaves by the same cable, with one MAC."""
    net = TaggedNet(lab, trunk=True)
    net.begin(net.configuration())
    assert f"external: nat-in by net_af_packet, VLAN {OUTSIDE}" in net.server.output
    net.traffic()
    counters = net.stats()["counters"]
    assert counters["rx_packets.0"] > 1000 < counters["rx_packets.1"]
    assert net.server.stop() == 0, net.server.output


def test_af_xdp_on_a_veth_is_refused(lab: Lab) -> None:
    net = TaggedNet(lab)
    done = net.nat.attempt(
        sys.executable, "-m", "nat_control.cli", "server", str(net.configuration(driver="af_xdp"))
    )
    assert done.returncode == 1
    assert "device nat-in: AF_XDP does not see VLAN tags on a veth" in done.stderr
