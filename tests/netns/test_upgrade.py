# SPDX-License-Identifier: Apache-2.0
"""docs/upgrade.md, its commands read out of it and run on a pair under a running stream."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nat_control.lab import Lab, until
from nat_control.sync import codec
from switch_agent.pair_lab import CLI, PairLab
from tests.netns.test_pair import passes, stream

RUNBOOK = Path(__file__).parents[2] / "docs" / "upgrade.md"
# A release that is like this one, but for the version of the sync protocol.
OTHER = "import sys; from nat_control.sync import codec; codec.VERSION += 1; from nat_control.cli import main; sys.exit(main())"
FLOWS = 50


def commands(name: str) -> list[tuple[str, str]]:
    """Host and command line of each step."""
    (block,) = re.findall(rf"<!-- runbook: {name} -->\n```console\n(.*?)```", RUNBOOK.read_text(), re.DOTALL)
    steps = [re.fullmatch(r"(agent|server)# +(.+)", line) for line in block.splitlines()]
    assert all(steps), block
    return [(step[1], step[2]) for step in steps if step]


class Hosts:
    """The two hosts of the runbook, as far as it uses them."""

    def __init__(self, net: PairLab, new: list[str]) -> None:
        self.net = net
        self.new = new  # the command `tandem-nat` of the new release

    def run(self, host: str, command: str) -> None:
        service = re.fullmatch(r"systemctl (stop|start|restart) tandem-nat", command)
        if service is None:
            self.shell(command)
            return
        if service[1] != "start":
            process = self.net.server if host == "server" else self.net.agent
            process.stop()
        if service[1] == "stop":
            return
        if host == "server":
            argv = (*self.new, "server", self.net.server_config)
            self.net.server = self.net.nat.start(*argv, name="new-server").ready("\nready", timeout=60)
        else:
            argv = (*self.new, "switch", self.net.agent_config)
            self.net.agent = self.net.switch.start(*argv, name="new-agent").ready(
                "the switch is ready", timeout=60
            )

    def shell(self, command: str) -> None:
        for name, path in (("switch.yaml", self.net.agent_config), ("server.yaml", self.net.server_config)):
            command = command.replace(name, path)
        function = f'tandem-nat() {{ {" ".join(CLI)} "$@"; }}; '
        done = subprocess.run(["bash", "-c", function + command], capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.net.agent.output}"


@pytest.mark.parametrize("name", [pytest.param("same", marks=pytest.mark.long), "other"])
def test_the_runbook_loses_no_packet(name: str) -> None:
    with Lab() as lab:
        net = PairLab(lab, misses=100)  # loads of the machine are no deaths here
        net.start_agent()
        net.start_server()
        net.carrier("server")
        old = {"server": net.server, "agent": net.agent}
        record = stream(net, 300, rate=500, flows=FLOWS)
        until("its sessions have their rules", lambda: net.show("agent")["offloaded"] >= FLOWS)
        before = {row["id"]: row["external"] for row in net.show("server", "sessions")}
        began = time.monotonic_ns()
        hosts = Hosts(net, CLI if name == "same" else [sys.executable, "-c", OTHER])
        for host, command in commands(name):
            hosts.run(host, command)
            if (name, host, command) == ("other", "server", "systemctl start tandem-nat"):
                until("the old agent says why", lambda: "the peer speaks" in old["agent"].output)
        net.carrier("server")
        ended = time.monotonic_ns()
        assert {
            row["id"]: row["external"] for row in net.show("server", "sessions")
        }.items() >= before.items()
        seen = record(now=True)
        assert seen.sent[-1] > ended, "the stream was over before the upgrade"
        assert not len(seen.lost(began)), f"{len(seen.lost(began))} of {len(seen.sent)} are lost"
        if name == "other":
            now = codec.VERSION
            for process, versions in ((old["agent"], (now + 1, now)), (net.server, (now, now + 1))):
                line = "the peer speaks version {} of the sync protocol and we {}: ".format(*versions)
                told = [one for one in process.output.splitlines() if line in one and "degraded" not in one]
                assert len(told) == 1, process.output
        passes(net)


def test_two_versions_go_on_alone_and_say_so() -> None:
    """Nothing is exchanged, the traffic goes on, and each side shows why."""
    with Lab() as lab:
        net = PairLab(lab, misses=100)
        net.start_agent()
        net.server = net.nat.start(sys.executable, "-c", OTHER, "server", net.server_config, name="server")
        net.server.ready("\nready", timeout=60)
        why = f"the peer speaks version {codec.VERSION + 1} of the sync protocol and we {codec.VERSION}"
        until("the agent says why", lambda: why in json.dumps(net.show("agent")["degraded"]))
        assert net.show("agent")["carrier"] == "switch"
        passes(net)
