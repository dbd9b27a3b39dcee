# SPDX-License-Identifier: Apache-2.0
"""More sessions than the switch has room for: all go on when it carries, and the busy ones get its rules."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from nat_control.lab import Lab, until
from nat_control.lab_stream import Record
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_pair import SESSION_RULES

FLOWS = 3000


@pytest.mark.long
@pytest.mark.parametrize("limit", ["of the configuration", "of the switch"])
def test_more_flows_than_rules(limit: str) -> None:
    with Lab() as lab:
        net = PairLab(lab, "asynchronous", max_flows=2048 if limit == "of the configuration" else 100_000)
        net.start_agent()
        if limit == "of the switch":
            most = len(net.ovs.flows()) + 1000
            table = ["--id=@t", "create", "Flow_Table", f"flow_limit={most}", "overflow_policy=refuse"]
            net.ovs.vsctl(*table, "--", "set", "bridge", net.ovs.bridge, "flow_tables:0=@t")
        net.start_server()
        net.carrier("server")
        sent, received = (lab.directory / f"many-{name}" for name in ("sent.npy", "received.npz"))
        module = [sys.executable, "-m", "nat_control.lab_stream"]
        many = ["--flows", str(FLOWS), "--out"]
        receiver = net.outside.start(*module, "receive", OUTSIDE, "9002", *many, str(received))
        until("it listens", lambda: ":9002" in net.outside.run("ss", "-Hlun"))
        send = [*module, "send", OUTSIDE, "9002", "--rate", "500", "--seconds", "35", *many, str(sent)]
        sender = net.client.start(*send)
        until("the agent has all", lambda: net.show("agent")["sessions"] >= FLOWS, 30, 0.2)
        net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", name="heavy").ready(
            "Server listening"
        )
        net.client.start("iperf3", "-c", OUTSIDE, "-u", "-l", "100", "-b", "160k", "-t", "25", name="busy")
        until("and more", lambda: ":5201" in str(net.show("agent", "sessions")))
        assert len(net.ovs.flows(SESSION_RULES)) <= 2048
        if limit == "of the switch":
            assert net.show("agent")["refused"]["table_full"] > 0
            until("it says so", lambda: "table is full" in str(net.show("agent")["degraded"]))

        net.server.popen.kill()
        net.server.popen.wait()
        net.carrier("switch")
        killed = time.monotonic_ns()
        until(
            "it has rules",
            lambda: any("udp" in one and "tp_dst=5201" in one for one in net.ovs.flows(SESSION_RULES)),
            20,
            0.2,
        )
        assert sender.wait(60) == 0, sender.output
        time.sleep(0.2)
        receiver.stop()
        seen = Record.load(sent, received)
        late = np.flatnonzero(seen.sent > killed + 10**9)
        arrived = seen.arrival()[late] != 0
        assert len(np.unique(late % FLOWS)) == FLOWS
        assert len(np.unique(late[arrived] % FLOWS)) == FLOWS, "each flow goes on"
        assert len(net.ovs.flows(SESSION_RULES)) <= 2048
