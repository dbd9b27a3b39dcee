# SPDX-License-Identifier: Apache-2.0
"""Kernel interfaces are put back as they were, whatever happens; and some are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nat_control.lab import Lab, Namespace
from tests.dpdk import dpdk_process as process


class Host:
    """A namespace with an interface ``port`` whose other end is in another namespace, as in a container."""

    def __init__(self, lab: Lab, state: Path) -> None:
        self.here: Namespace = lab.namespace("host")
        self.there: Namespace = lab.namespace("far")
        lab.cable(self.here, "port", self.there, "far")
        self.here.ip("link", "set", "port", "down")
        self.state = str(state)

    def run(self, function: Any, *arguments: Any) -> Any:
        return process.run(function, *arguments, command=tuple(self.here.command()))

    def borrow(self, device: str = "port", **more: Any) -> Any:
        return self.run(
            process.borrow, device, self.state, more.get("force", False), 0, more.get("address", "")
        )

    def look(self, device: str = "port") -> dict[str, Any]:
        """All that could be changed."""
        [link] = json.loads(self.here.ip("-j", "-d", "link", "show", "dev", device))
        conf = Path("/proc/sys/net/ipv4/conf") / device
        return {
            "features": self.here.run("ethtool", "-k", device),
            "far_features": self.there.run("ethtool", "-k", "far"),
            "link": {key: link.get(key) for key in ("mtu", "address", "promiscuity", "xdp")},
            "up": "UP" in link["flags"],
            "conf": self.here.run("cat", str(conf / "forwarding"), str(conf / "arp_ignore")),
        }


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Lab() as lab:
        yield Host(lab, tmp_path / "state")


@pytest.mark.parametrize("gro", ["on", "off"])
@pytest.mark.parametrize("up", ["up", "down"])
def test_put_back_at_the_end(host: Host, gro: str, up: str) -> None:
    host.here.run("ethtool", "-K", "port", "gro", gro)
    host.here.run("sysctl", "-qw", "net.ipv4.conf.port.forwarding=1")
    host.here.ip("link", "set", "port", up)
    before = host.look()
    said = host.borrow()
    assert "MTU 1500 -> 1600" in said["changes"]
    assert any(change.startswith("MAC ") for change in said["changes"])
    assert "net.ipv4.conf.port.forwarding 1 -> 0" in said["changes"]
    assert ("gro off" in said["changes"]) == (gro == "on")
    assert host.look() == before
    assert list(Path(host.state, "interfaces").iterdir()) == []


@pytest.mark.parametrize("rxvlan", ["on", "off"])
def test_tags_stay_in_the_frames_where_they_are_needed(host: Host, rxvlan: str) -> None:
    host.here.run("ethtool", "-K", "port", "rxvlan", rxvlan)
    before = host.look()
    taken = [change.split(" off")[0].split(", ") for change in host.borrow()["changes"] if " off" in change]
    assert not any("rxvlan" in features for features in taken), "AF_PACKET's driver puts them back"
    assert host.look() == before
    arguments = ["port", host.state, False, 60, "", True]
    victim = host.here.start(sys.executable, "-m", process.__name__, "borrow", json.dumps(arguments)).ready(
        "borrowed"
    )
    assert "rx-vlan-offload: off" in host.look()["features"]
    victim.popen.kill()
    victim.popen.wait()
    host.run(process.put_back, host.state)
    assert host.look() == before


def test_repaired_after_a_kill(host: Host) -> None:
    host.here.run("ethtool", "-K", "port", "gro", "on")
    before = host.look()
    victim = host.here.start(
        *(sys.executable, "-m", process.__name__, "borrow", json.dumps(["port", host.state, False, 60])),
    ).ready("borrowed")
    during = host.look()
    assert during != before
    assert "tcp-segmentation-offload: off" in during["far_features"], "the other end must split what it sends"
    assert "generic-receive-offload: off" in during["features"]

    refused = host.borrow()
    assert refused["error"] == f"device port: in use by the NAT with process id {victim.pid}"
    assert host.run(process.put_back, host.state) == [], "a living process keeps its interface"

    victim.popen.kill()
    victim.popen.wait()
    assert host.look() != before
    [line] = host.run(process.put_back, host.state)
    assert line == f"port: put back as it was before process {victim.pid} was killed"
    assert host.look() == before
    assert host.run(process.put_back, host.state) == []


def test_taken_again_after_a_kill_without_repair(host: Host) -> None:
    before = host.look()
    victim = host.here.start(
        *(sys.executable, "-m", process.__name__, "borrow", json.dumps(["port", host.state, False, 60])),
    ).ready("borrowed")
    victim.popen.kill()
    victim.popen.wait()
    assert "changes" in host.borrow()
    assert host.look() == before, "the first owner's changes were taken for how it was"


def test_broken_journals_and_vanished_interfaces_are_no_obstacle(host: Host) -> None:
    victim = host.here.start(
        *(sys.executable, "-m", process.__name__, "borrow", json.dumps(["port", host.state, False, 60])),
    ).ready("borrowed")
    victim.popen.kill()
    victim.popen.wait()
    host.here.ip("link", "delete", "port")
    journals = Path(host.state, "interfaces")
    (journals / "1-x.json").write_text("{")
    (journals / "1-y.json").write_text('{"namespace": 1}')
    lines = host.run(process.put_back, host.state)
    assert len(lines) == 2
    assert all("not a journal of ours" in line for line in lines)
    assert list(journals.iterdir()) == []


def test_the_default_route_is_refused_without_force(host: Host) -> None:
    host.here.address("port", "192.0.2.1/24")
    host.here.route("default", "192.0.2.2")
    assert "default route" in host.borrow()["error"]
    assert "--force" in host.borrow()["error"]
    assert "changes" in host.borrow(force=True)


def test_dpdks_words_are_no_way_round_that(host: Host) -> None:
    host.here.address("port", "192.0.2.1/24")
    host.here.ip("link", "set", "port", "up")
    assert host.run(process.by_dpdks_words, host.state)[0] == ""
    host.here.route("default", "192.0.2.2")
    refused, first, second, third = host.run(process.by_dpdks_words, host.state)
    assert "port carries this host's default route" in refused
    assert "--force" in refused
    assert (first, third) == ("", "")
    assert "the interface lan is another port's already" in second
    assert host.run(process.by_dpdks_words, host.state, True)[0] == ""


@pytest.mark.parametrize(
    "routes",
    [
        ["default nexthop via 192.0.2.2 dev port nexthop via 203.0.113.2 dev other"],
        ["default via 192.0.2.2 table 100"],
        ["0.0.0.0/1 via 192.0.2.2", "128.0.0.0/1 via 192.0.2.2"],
    ],
)
def test_every_shape_of_default_route(host: Host, routes: list[str]) -> None:
    host.here.ip("link", "add", "other", "type", "bridge")
    host.here.address("other", "203.0.113.1/24")
    host.here.address("port", "192.0.2.1/24")
    for route in routes:
        host.here.ip("route", "add", *route.split())
    assert "default route" in host.borrow()["error"]


def test_two_with_different_state_directories(host: Host, tmp_path: Path) -> None:
    before = host.look()
    first = host.here.start(
        *(sys.executable, "-m", process.__name__, "borrow", json.dumps(["port", host.state, False, 60])),
    ).ready("borrowed")
    during = host.look()
    said = host.run(process.borrow, "port", str(tmp_path / "other"))
    assert said["error"] == f"device port: in use by the NAT with process id {first.pid}"
    assert host.look() == during
    first.popen.kill()
    first.popen.wait()
    host.run(process.put_back, host.state)
    assert host.look() == before


def test_the_default_route_through_what_stands_on_it(host: Host) -> None:
    host.here.ip("link", "add", "link", "port", "name", "upper", "type", "macvlan")
    host.here.ip("link", "set", "port", "up")
    host.here.address("upper", "192.0.2.1/24")
    host.here.route("default", "192.0.2.2")
    assert "default route" in host.borrow()["error"]


@pytest.mark.parametrize("default", [True, False])
def test_a_member_of_a_bridge(host: Host, default: bool) -> None:
    host.here.ip("link", "add", "bridge", "type", "bridge")
    host.here.ip("link", "set", "port", "master", "bridge")
    host.here.ip("link", "set", "port", "up")
    host.here.address("bridge", "192.0.2.1/24")
    if default:
        host.here.route("default", "192.0.2.2")
        assert "default route" in host.borrow()["error"]
    else:
        assert "ip link set port nomaster" in host.borrow()["error"]


def test_an_address_that_the_kernel_has_too(host: Host) -> None:
    host.here.address("port", "192.0.2.1/24")
    before = host.look()
    said = host.borrow(address="192.0.2.1")
    assert "ip addr del 192.0.2.1/24 dev port" in said["error"]
    assert host.look() == before


def test_what_is_no_ethernet(host: Host) -> None:
    assert "Ethernet" in host.borrow("lo")["error"]
