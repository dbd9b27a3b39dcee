# SPDX-License-Identifier: Apache-2.0
"""False deaths: a pair that nobody kills, beside busy processes, with garbage collections and an InitState again and again."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from bench.failover import stream_program
from nat_control.lab import Lab, LabError, until
from switch_agent.pair_lab import CLIENT, OUTSIDE, PairLab

BUSY = 4  # processes
FLOWS = 50_000  # that stream.c's sender has; more sessions go to more ports outside
OPENING_RATE = 20_000  # new sessions per second
FIRST_PORT = 9000
ROUNDS = 20  # of opening
BETWEEN = 20.0  # seconds between two planned restarts of the server, each of which begins with an InitState
DEATH, LOST = (
    r"the server is dead \((.*?)\)",
    "peer: operational -> ",
)  # lines of the agent, and of the server


def measure(
    minutes: float = 10, sessions: int = 1_000_000, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Deaths in a pair that lives, with the default of 2 ms x 3 heartbeats. Raises LabError."""
    with Lab() as lab:
        nat = {"max_sessions": sessions + FLOWS, "timeouts": {"udp": 7200}}
        command = [sys.executable, "-m", "bench.collecting"]
        net = PairLab(lab, "asynchronous", misses=3, nat=nat, max_flows=20_000, command=command)
        net.start_agent()
        net.start_server()
        net.carrier("server", 60)
        opened = _open(net, sessions)
        tell(f"{opened} sessions at both")
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
        starts, lost, before = 0, -net.server.output.count(LOST), len(_deaths(net))
        try:
            end = time.monotonic() + 60 * minutes
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(BETWEEN, left))
                lost += net.server.output.count(LOST)
                net.server.stop()  # hands the traffic over, which is no death
                net.start_server()
                until("both are in step", lambda: net.show("agent")["peer"] == "operational", 120)
                starts += 1
                held = net.show("server")["sessions"]
                tell(f"{starts} InitStates of {held} sessions, deaths: {_deaths(net)[before:]}")
        finally:
            for one in busy:
                one.kill()
                one.wait()
        held, reasons = net.show("server")["sessions"], _deaths(net)[before:]
        lost += net.server.output.count(LOST)
        return {
            "figure": "false deaths",
            "minutes": minutes,
            "busy_processes": BUSY,
            "sessions": held,
            "init_states": starts,
            "false_deaths": max(len(reasons), lost),  # the server loses its peer at each of the agent's, too
            "reasons": dict(Counter(reasons)),
        }


def _open(net: PairLab, sessions: int) -> int:
    """New ones until both hold ``sessions``: a loaded machine drops some at first."""
    program, file = stream_program(), str(net.lab.directory / "sent")
    for _ in range(ROUNDS):
        for number in range(-(-sessions // FLOWS)):
            port, flows = FIRST_PORT + number, min(FLOWS, sessions - number * FLOWS)
            numbers = map(str, (port, OPENING_RATE, flows, flows))
            net.client.start(program, "send", CLIENT, OUTSIDE, *numbers, file, name="send").wait(300)
        with contextlib.suppress(LabError):
            until("both hold them", lambda: min(_held(net)) >= sessions * 0.999, 5, 0.2)
            break
    return min(_held(net))


def _held(net: PairLab) -> list[int]:
    return [net.show(name)["sessions"] for name in ("agent", "server")]


def _deaths(net: PairLab) -> list[str]:
    """Why the agent has thought the server dead."""
    return re.findall(DEATH, net.agent.output)
