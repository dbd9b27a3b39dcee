# SPDX-License-Identifier: Apache-2.0
"""The pair with both of its OpenFlow connections over TLS, to a real Open vSwitch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nat_control.certificates import make_certificates
from nat_control.lab import Lab, until
from switch_agent.pair_lab import CLI, PairLab
from tests.netns.test_pair import passes, stream


@pytest.fixture
def net() -> Iterator[PairLab]:
    with Lab() as lab:
        there = lab.directory / "openflow"
        lab.namespace("certs").run(*CLI, "certs", str(there), "--openflow")
        names = {"ca": "ca.pem", "certificate": "agent.pem", "key": "agent.key"}
        tls = {key: str(there / name) for key, name in names.items()}
        net = PairLab(lab, switch={"openflow": "tls:127.0.0.1:6653", "tls": tls})
        net.ovs.set_ssl(*(there / name for name in ("ovs.key", "ovs.pem", "ca.pem")))
        net.ovs.set_controllers("ssl:127.0.0.1:6653", "ssl:127.0.0.1:6654")
        net.start_agent()
        yield net


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = stat.read_text().rpartition(")")[2].split()
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def test_a_takeover_through_tls(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    record = stream(net, 4)
    until("its session is known", lambda: net.show("agent")["sessions"] >= 1)
    net.server.popen.kill()
    net.carrier("switch")
    until("it is acknowledged", lambda: net.show("agent")["takeover"]["barrier"])
    takeover = net.show("agent")["takeover"]
    assert takeover["written"] <= takeover["barrier"] < takeover["written"] + 10**9
    assert len(record().lost()) < 1000
    passes(net)
    net.start_server()
    net.carrier("server")
    passes(net)


def test_nothing_is_left_of_a_killed_agent(net: PairLab) -> None:
    relays = [pid for pid in children(net.agent.pid) if "switch_agent.relay" in _command(pid)]
    assert len(relays) == 2
    net.agent.popen.kill()
    net.agent.popen.wait()
    until("they are gone", lambda: not any("switch_agent.relay" in _command(pid) for pid in relays))
    net.start_agent()
    passes(net)


def test_a_switch_of_another_authority_stays_outside(net: PairLab) -> None:
    other = net.lab.directory / "other"
    make_certificates(other, ("ovs",))
    net.ovs.set_ssl(other / "ovs.key", other / "ovs.pem", net.lab.directory / "openflow" / "ca.pem")
    net.ovs.restart()
    until(
        "the agent says why",
        lambda: any("the switch's certificate is refused" in line for line in net.show("agent")["degraded"]),
    )
    there = net.lab.directory / "openflow"
    net.ovs.set_ssl(there / "ovs.key", there / "ovs.pem", there / "ca.pem")
    until("it is let in again", lambda: net.show("agent")["switch"] == "ready")
    passes(net)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def test_the_listener_of_a_plain_network_is_refused(net: PairLab) -> None:
    config = Path(net.agent_config).read_text().replace("tls:127.0.0.1:6653", "0.0.0.0:6653")
    path = net.lab.directory / f"plain-{os.getpid()}.yaml"
    path.write_text(config)
    said = net.switch.attempt(*CLI, "check", str(path))
    assert said.returncode == 2
    assert "0.0.0.0 is not on loopback" in said.stderr
