# SPDX-License-Identifier: Apache-2.0
"""Thousands of active flows at a takeover, three times in a row, and what the agent sets in an Open vSwitch for them."""

from __future__ import annotations

import re
import signal

import pytest

from bench.failover import Case, Pair
from nat_control.lab import Lab, until
from nat_control.ovs_doctor import FLOW_LIMIT, LIMIT_NOW, RECEIVE_BUFFER
from switch_agent.pair_lab import PairLab

FLOWS = 2000


def buffers(net: PairLab) -> list[int]:
    """Of the switch's packet sockets, as the kernel says."""
    lines = net.switch.run("ss", "--packet", "--memory", "--processes", "--no-header", "--oneline")
    mine = [line for line in lines.splitlines() if f"pid={net.ovs.daemon.pid}," in line and " *:" in line]
    return [int(re.findall(r"\brb(\d+)", line)[0]) for line in mine]


def limit_now(net: PairLab) -> int:
    return int(re.findall(r"\(limit (\d+)\)", net.ovs.appctl("upcall/show"))[0])


def closed(net: PairLab) -> bool:
    sizes = buffers(net)
    return len(sizes) == 4 and min(sizes) >= RECEIVE_BUFFER and limit_now(net) >= LIMIT_NOW


def configured(net: PairLab) -> str:
    return (
        net.ovs.vsctl("--if-exists", "get", "Open_vSwitch", ".", "other_config:flow-limit").strip().strip('"')
    )


def test_the_agent_closes_the_traps_of_an_open_vswitch() -> None:
    with Lab() as lab:
        net = PairLab(lab, receive_buffer=0)
        found = (max(buffers(net)) < RECEIVE_BUFFER, limit_now(net), configured(net))
        assert found == (True, 10_000, ""), "an Open vSwitch as it comes"
        net.start_agent()
        until("they are closed", lambda: closed(net))
        assert configured(net) == str(FLOW_LIMIT)
        assert "other_config:flow-limit was not set (200000), is 300000" in net.agent.output
        assert "receive buffers of 4 sockets" in net.agent.output

        # another daemon: other sockets, and its limit begins low; what the operator wants higher stays
        net.ovs.vsctl("set", "Open_vSwitch", ".", "other_config:flow-limit=500000")
        net.ovs.restart()
        assert max(buffers(net)) < RECEIVE_BUFFER or closed(net)
        until("they are closed again", lambda: closed(net), 20)
        assert configured(net) == "500000"


def test_without_the_right_the_agent_says_so_and_goes_on() -> None:
    """An agent that may not touch the switch's sockets, and does not find its database."""
    with Lab() as lab:
        net = PairLab(lab, receive_buffer=0)
        net.ovs.directory.joinpath("db.sock").rename(net.ovs.directory / "moved")
        without = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
        net.start_agent(*without)
        said = until(
            "it has said both", lambda: net.agent.output.count("Open vSwitch: its ") == 2 and net.agent.output
        )
        assert "its limit of flows stays" in said
        assert "its receive buffers stay" in said
        assert "doctor" in said
        assert max(buffers(net)) < RECEIVE_BUFFER
        assert net.agent.alive


@pytest.mark.parametrize("flows", [FLOWS, pytest.param(10 * FLOWS, marks=pytest.mark.long)])
def test_every_flow_survives_three_takeovers_in_a_row(flows: int) -> None:
    with Lab() as lab:
        pair = Pair(lab, Case("kill", rate=2 * flows, flows=flows, misses=10))
        for number in range(1, 4):
            before = pair.net.agent.output.count("\nrules: ")
            trial = pair.trial()  # it ends with the server in front again
            assert trial.sessions_lost == 0, f"takeover {number}: {trial}"
            until("the cache has no narrow entries any more", lambda: pair.cached() < flows / 100, 5)
            # To read all rules again while the server carries keeps the switch from forwarding.
            assert pair.net.agent.output.count("\nrules: ") == before + 1
        assert pair.agent()["sessions"] == flows


def test_a_hung_server_costs_no_flow() -> None:
    with Lab() as lab:
        pair = Pair(lab, Case("stop", rate=4000, flows=FLOWS, misses=10))
        trial = pair.trial()
        assert trial.sessions_lost == 0, trial
        assert trial.reason == "silence"
        pair.net.server.signal(signal.SIGTERM)
