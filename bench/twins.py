# SPDX-License-Identifier: Apache-2.0
"""What a UDP stream loses when the one of two servers that carries is killed; the other one takes over, and is the next to die."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import failover
from nat_control.lab import Lab
from nat_control.twin_lab import CLIENT, NAMES, OUTSIDE, TwinLab

MISSES = 3  # heartbeats of 2 ms, as it is by default


def measure(trials: int, rate: int = 1000, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """One flow; packets lost, and ms from the kill to the arrival of the first packet that was sent after it. Raises LabError."""
    case = failover.Case("kill", rate, trials=trials)
    found = []
    with Lab() as lab:
        net = TwinLab(lab, misses=MISSES)
        net.start(*NAMES)
        net.in_step("one")
        for number in range(trials):
            carrier, other = NAMES[number % 2], NAMES[1 - number % 2]
            found.append(trial := _trial(net, carrier, other, case))
            tell(
                f"two servers, {carrier} killed, {number + 1}/{trials}: lost {trial.lost} of {trial.sent} ({', '.join(trial.gaps[:6])}), "
                f"{trial.lost_before} of them before, first good {trial.first_good or float('nan'):.2f} ms"
            )
    return {
        "how": "kill of one of two servers",
        "rate": rate,
        "flows": case.flows,
        "trials": trials,
        "packets_lost": failover.spread([one.lost for one in found]),
        "first_good_ms": failover.spread([one.first_good for one in found]),
        "sessions_lost": sum(one.sessions_lost for one in found),
        "lost_before": sum(one.lost_before for one in found),
        "each": [
            {
                "lost": one.lost,
                "delivered_first_second": round(one.first_second, 6),
                "lost_after": one.lost_after,
                "sessions_lost": one.sessions_lost,
                "first_good_ms": one.first_good,
                "timeline": one.timeline if number in failover.SHOWN else None,
            }
            for number, one in enumerate(found)
        ],
    }


def _trial(net: TwinLab, carrier: str, other: str, case: failover.Case) -> failover.Trial:
    program, folder, port = failover.stream_program(), net.lab.directory, str(failover.PORT)
    sent, received = folder / "sent", folder / "received"
    receiver = net.outside.start(program, "receive", OUTSIDE, port, str(received), name="receive")
    receiver.ready("listening")
    numbers = map(str, (port, case.rate, case.flows, int(case.rate * (failover.LEAD + failover.REST))))
    sender = net.client.start(program, "send", CLIENT, OUTSIDE, *numbers, str(sent), name="send")
    begin = int(sender.ready("begin").output.split()[1])
    time.sleep(max(begin + failover.LEAD * 1e9 - time.monotonic_ns(), 0) / 1e9)
    ended = time.monotonic_ns()
    net.kill(carrier)
    sender.wait(60)
    time.sleep(0.1)
    receiver.stop()
    net.carrier(other)
    times, arrivals = np.fromfile(sent, "<u8"), np.fromfile(received, failover.ARRIVAL)
    trial = failover.evaluate(times, arrivals, ended, {"takeover": {}}, case)
    ends = [failover.endpoints(some, case.flows) for some in (arrivals[arrivals["sent"] < ended], arrivals)]
    trial.sessions_lost = int((ends[0] != ends[1]).sum())
    net.start(carrier)
    net.in_step(other, 60)
    return trial
