# SPDX-License-Identifier: Apache-2.0
"""A changed configuration under traffic: sessions survive, and it is taken whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_control import api
from nat_control.demo import CLIENT, SERVER
from nat_control.lab import Lab, until
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_server import CLI, RECEIVER, Net

POOL = [f"198.51.100.{i}" for i in (10, 11, 12, 13)]
STREAM = """
import signal, socket, sys, time
s = socket.socket(type=socket.SOCK_DGRAM)
s.connect((sys.argv[1], 7777))
going = True
def end(number, frame):
    global going
    going = False
signal.signal(signal.SIGTERM, end)
start, i = time.monotonic(), 0
while going:
    time.sleep(max(0, start + i / 1000 - time.monotonic()))
    s.send(b"%d" % i)
    i += 1
print(f"sent {i}")
for _ in range(20):
    s.send(b"end")
    time.sleep(0.05)
"""


class Changing(Net):
    """With a file that is changed while the server runs."""

    def __init__(self, lab: Lab, workers: int) -> None:
        super().__init__(lab)
        self.file = self.write()
        cores = {"cores": sorted(os.sched_getaffinity(0))[:workers]}
        self.content: dict[str, Any] = yaml.safe_load(self.file.read_text()) | {"workers": cores}
        self.file.write_text(yaml.safe_dump(self.content))

    def change(self, **sections: Any) -> None:
        """Keys of ``nat``, and ``internal``: those of that port."""
        self.content["ports"]["internal"] |= sections.pop("internal", {})
        self.content["nat"] |= sections
        self.file.write_text(yaml.safe_dump(self.content))

    def reload(self, *options: str, code: int = 0) -> str:
        done = subprocess.run(
            [*CLI, "reload", *options, "--socket", str(self.socket)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ask(self, **options: bool) -> dict[str, Any]:
        """The same over the socket, without a start of Python for each."""
        answer: dict[str, Any] = next(api.ask(self.socket, {"reload": options}))["reload"]
        return answer

    def status(self) -> dict[str, Any]:
        return next(api.ask(self.socket, {"show": "status"}))["status"]


def answers(net: Changing, address: str) -> bool:
    """To ARP and ping from outside, on the link."""
    return net.outside.attempt("ping", "-n", "-c", "1", "-W", "1", address).returncode == 0


@pytest.fixture(params=[1, 2])
def net(request: pytest.FixtureRequest) -> Iterator[Changing]:
    with Lab() as lab:
        yield Changing(lab, request.param)


def test_changes_under_traffic_cost_no_packet(net: Changing) -> None:
    net.begin(net.file)
    receiver = net.python("outside", RECEIVER, SERVER, name="receiver").ready("bound")
    sender = net.python("client", STREAM, SERVER, name="sender")
    receiver.ready("flowing")

    routes = [*net.content["ports"]["internal"]["routes"], {"prefix": "10.3.0.0/24", "gateway": CLIENT}]
    net.change(
        pool={"addresses": [*POOL, "198.51.100.14"]}, timeouts={"udp": 130}, internal={"routes": routes}
    )
    net.server.signal(signal.SIGHUP)
    net.server.ready("reload: 3 changes are applied")
    assert "reload: nat.timeouts.udp: 300 -> 130" in net.server.output
    assert f"reload: ports.internal.routes[10.3.0.0/24]: none -> {CLIENT}" in net.server.output
    [row] = net.sessions(protocol="udp")
    assert row["timeout"] == 130
    assert answers(net, "198.51.100.14")

    used = row["external"].split(":")[0]
    kept = [address for address in POOL if address != used]
    net.change(pool={"addresses": kept}, timeouts={"udp": 140})
    said = net.reload(code=1)
    assert f"nat.pool.addresses: {used} has 1 mapping: --drain" in said
    assert "refused: nothing is changed" in said
    assert net.sessions(protocol="udp")[0]["timeout"] == 130

    net.change(instance="other")  # an unknown key of `nat`
    net.server.signal(signal.SIGHUP)
    net.server.ready("reload: invalid: nothing is changed")
    assert "nat.instance: unknown key" in net.server.output
    del net.content["nat"]["instance"]
    net.change()

    assert net.ask(drain=True, check=True)["lines"][-1] == "2 changes can be applied"
    assert f"draining {used}: 1 mapping left" in net.reload("--drain")
    assert f"{used}: 1 mapping left" in net.show("pool")
    assert {"address": used, "mappings": 1} in net.status()["draining"]
    sender.signal(signal.SIGTERM)
    assert receiver.wait(20) == 0
    sender.wait(20)  # it says its end many times, at last to nobody
    sent, received = sender.output.split("sent ")[1], receiver.output.split("received ")[1]
    assert sent.split()[0] == received.split()[0]

    assert net.ask()["result"] == "unchanged"
    assert net.status()["draining"] == [{"address": used, "mappings": 1}]
    assert net.ask(force=True)["left"] == [used]
    assert net.status()["draining"] == []
    assert net.sessions(protocol="udp") == []
    assert f"reload: {used} has left the pool" in net.server.output
    assert not answers(net, used)


def test_what_needs_a_restart_is_named_and_nothing_is_taken(net: Changing) -> None:
    net.begin(net.file)
    before = net.status()
    net.change(max_sessions=20_000, mapping="endpoint-dependent", timeouts={"udp": 10})
    answer = json.loads(net.reload("--json", code=1))
    assert answer["result"] == "refused"
    assert answer["refused"] == [
        "nat.mapping: endpoint-independent -> endpoint-dependent: needs a restart",
        "nat.max_sessions: 10000 -> 20000: needs a restart",
    ]
    assert net.status()["mapping"] == before["mapping"]
    del net.content["nat"]["max_sessions"], net.content["nat"]["mapping"]
    net.change(max_sessions=10_000, pool={"addresses": [*POOL, "198.51.100.77"]})
    net.nat.address("lo", "198.51.100.77/32")
    assert "198.51.100.77 is to be the NAT's, but the kernel has it too" in net.ask()["refused"][0]
    net.file.unlink()
    assert "cannot be read: No such file" in net.reload(code=2)


def test_a_pair_goes_on_through_reloads_of_both() -> None:
    """The agent takes what its rules do not speak of, the server all; sessions of the force are ended on both sides."""

    def change(name: str, **nat: Any) -> None:
        path = Path(net.agent_config if name == "agent" else net.server_config)
        content = yaml.safe_load(path.read_text())
        content["nat"]["pool"] |= nat.pop("pool", {})
        content["nat"] |= nat
        path.write_text(yaml.safe_dump(content))

    def reload(name: str, **options: bool) -> dict[str, Any]:
        answer: dict[str, Any] = next(api.ask(lab.directory / f"{name}.sock", {"reload": options}))["reload"]
        return answer

    def ping() -> None:
        """One session."""
        net.client.run("ping", "-q", "-c", "2", "-i", "0.1", "-W", "2", OUTSIDE)

    with Lab() as lab:
        net = PairLab(lab)
        net.start_agent()
        net.start_server()
        net.carrier("server")
        ping()
        used = net.show("server", "sessions")[0]["external"].split(":")[0]
        left = [address for address in POOL if address != used]

        change("agent", pool={"addresses": [*POOL, "198.51.100.14"]})
        assert reload("agent")["refused"][0].endswith(
            "needs a restart of the agent, which keeps its sessions"
        )
        change("agent", pool={"addresses": POOL}, timeouts={"icmp": 400})
        net.agent.signal(signal.SIGHUP)
        net.agent.ready("reload: 1 change is applied")
        change("server", timeouts={"icmp": 400}, pool={"ports": "1024-40000"})
        assert "only ports that it was told of" in reload("server")["refused"][0]

        change("server", pool={"addresses": left, "ports": "1024-32767"})
        assert reload("server")["result"] == "refused"
        assert reload("server", drain=True)["draining"] == [{"address": used, "mappings": 1}]
        ping()
        assert reload("server", force=True)["draining"] == []
        until("it is ended on both sides", lambda: not [
            row for name in ("server", "agent") for row in net.show(name, "sessions") if used in row["external"]
        ])  # fmt: skip
        ping()
        status = net.show("agent")
        assert (status["carrier"], status["peer"], status["takeover"]) == ("server", "operational", {})
        assert [row["timeout"] for row in net.show("agent", "sessions")] == [400] * 2
        assert status["degraded"] == []
