# SPDX-License-Identifier: Apache-2.0
"""The server is killed while new flows arrive: who was answered keeps its external endpoint."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from bench.failover import stream_program
from nat_control.lab import Lab
from switch_agent.pair_lab import CLIENT, OUTSIDE, PairLab

RATE, FLOWS, PORT = 10_000, 20_000, 9000
FLOW = np.dtype(
    [("asked", "<u8"), ("answered", "<u8"), ("address", "<u4"), ("port", "<u2"), ("tries", "<u2")]
)


def rounds(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `stream churn` wrote: each flow's first question, and the second."""
    found = np.fromfile(file, FLOW).reshape(-1, 2)
    return found[:, 0], found[:, 1]


@pytest.mark.parametrize("mode", ["synchronous", pytest.param("asynchronous", marks=pytest.mark.long)])
def test_killed_under_new_flows(mode: str) -> None:
    """Synchronous: an answer means that the peer holds the session. Asynchronous: those that it did not hear of are counted."""
    with Lab() as lab:
        net = PairLab(lab, mode, nat={"max_sessions": 65_536}, max_flows=131_072)
        net.start_agent()
        net.start_server()
        net.carrier("server")
        program, file = stream_program(), lab.directory / "flows"
        net.outside.start(program, "witness", OUTSIDE, str(PORT), name="witness").ready("listening")
        numbers = (str(PORT), str(RATE), "0", str(FLOWS), "0")
        churn = net.client.start(program, "churn", CLIENT, OUTSIDE, *numbers, str(file), name="churn").ready(
            "begin"
        )
        time.sleep(FLOWS / RATE / 2)
        killed = time.monotonic_ns()
        net.server.popen.kill()
        net.server.popen.wait()
        net.carrier("switch")
        assert churn.wait(60) == 0, churn.output
        first, second = rounds(file)
        held = net.show("agent")["sessions"]

    answered = (first["answered"] != 0) & (first["answered"] < killed)
    assert answered.sum() > FLOWS / 100, "the server has carried too little to prove anything"
    endpoint = [of["address"].astype(np.uint64) << np.uint64(16) | of["port"] for of in (first, second)]
    living = first["answered"] != 0
    assert len(np.unique(endpoint[0][living])) == living.sum(), "two flows have one external endpoint"
    broken = answered & ((second["answered"] == 0) | (endpoint[0] != endpoint[1]))
    print(f"{mode}: {answered.sum()} answered before the kill, {broken.sum()} broken, {held} sessions held")
    if mode == "synchronous":
        assert not broken.any()
    else:  # what had not been told is lost, and no more than was on its way in the last moments
        late = first["answered"] > killed - 500_000_000
        assert not (broken & ~late).any()
