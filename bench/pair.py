# SPDX-License-Identifier: Apache-2.0
"""All figures of the pair: what `python -m bench pair` measures, one line of JSON each, beside what we want."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench import deaths, failover, first_packet, rules, sync, twins
from bench.failover import Case, LabError
from nat_control.lab import Lab
from switch_agent.pair_lab import CLIENT, OUTSIDE, PairLab

Tell = Callable[[str], None]
GIGABYTE = 6_000_000  # sessions: their tables are 1 GB


@dataclass(frozen=True, slots=True)
class Figure:
    """``must`` and ``good`` are goals in words; ``measure`` gets the number of trials and a place for progress."""

    name: str
    must: str
    good: str
    measure: Callable[[int, Tell], dict[str, Any]]


def _of(case: Case) -> Callable[[int, Tell], dict[str, Any]]:
    return lambda trials, tell: failover.measure(replace(case, trials=trials), tell)


def _new_flows(mode: str) -> Callable[[int, Tell], dict[str, Any]]:
    """Beside mode off, in turn."""
    modes = (mode,) if mode == "off" else ("off", mode)
    return lambda trials, tell: first_packet.measure(20 * trials, modes, tell=tell)[-1]


def generator(rate: int = 100_000, flows: int = 50_000, seconds: float = 3) -> dict[str, Any]:
    """What the stream itself loses: sender and receiver at the ends of one cable, with nothing between. Raises LabError."""
    with Lab() as lab:
        client, outside = lab.namespace("client"), lab.namespace("outside")
        lab.cable(client, "eth0", outside, "eth0")
        client.address("eth0", "203.0.113.2/24")
        outside.address("eth0", "203.0.113.1/24")
        client.run("ping", "-c", "1", "-W", "2", OUTSIDE)
        program, sent, received = (
            failover.stream_program(),
            lab.directory / "sent",
            lab.directory / "received",
        )
        port = str(failover.PORT)
        receiver = outside.start(program, "receive", OUTSIDE, port, str(received), name="receive").ready(
            "listening"
        )
        numbers = map(str, (rate, flows, int(rate * seconds)))
        client.start(program, "send", "203.0.113.2", OUTSIDE, port, *numbers, str(sent), name="send").wait(60)
        time.sleep(0.2)
        receiver.stop()
        times, arrivals = np.fromfile(sent, "<u8"), np.fromfile(received, failover.ARRIVAL)
    took = (int(times[-1]) - int(times[0])) / 1e9
    return {
        "rate": rate,
        "flows": flows,
        "sent_per_second": round((len(times) - 1) / took),
        "lost": len(times) - len(np.unique(arrivals["sequence"])),
        "delay_ms": failover.spread(((arrivals["arrived"] - arrivals["sent"]) / 1e6).tolist()),
    }


def split_processing(
    flows: int = 1024, rate: int = 50_000, seconds: float = 3, partition: str = "new_at_peer"
) -> dict[str, Any]:
    """Packets per second at the server and at the receiver while ``flows`` new flows begin. Raises LabError."""
    with Lab() as lab:
        net = PairLab(lab, "asynchronous", peer={"partition": partition})
        net.start_agent()
        net.start_server()
        net.carrier("server", 60)
        program, sent, received = (
            failover.stream_program(),
            lab.directory / "sent",
            lab.directory / "received",
        )
        port = str(failover.PORT)
        receiver = net.outside.start(program, "receive", OUTSIDE, port, str(received), name="receive").ready(
            "listening"
        )
        numbers = map(str, (rate, flows, int(rate * seconds)))
        sender = net.client.start(
            program, "send", CLIENT, OUTSIDE, port, *numbers, str(sent), name="send"
        ).ready("begin")
        begin = int(sender.output.split()[1])
        seen = list(_server_packets(net, lambda: sender.alive))
        sender.wait(60)
        time.sleep(0.2)
        receiver.stop()
        arrivals = np.fromfile(received, failover.ARRIVAL)
    at = (arrivals["arrived"].astype(np.int64) - begin) / 1e9
    return {
        "partition": partition,
        "flows": flows,
        "rate": rate,
        "lost": int(rate * seconds) - len(np.unique(arrivals["sequence"])),
        "server_s": [round((when - begin) / 1e9, 3) for when, _ in seen],
        "server_packets": [count for _, count in seen],
        "received_bin_s": 0.05,
        "received": np.bincount((at[at >= 0] / 0.05).astype(np.int64)).tolist(),
    }


def _server_packets(net: PairLab, goes_on: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """When, and how many packets the server had forwarded then."""
    while goes_on():
        yield time.monotonic_ns(), net.show("server", "stats")["verdicts"]["forward"]
        time.sleep(0.02)


FIGURES = [
    Figure("generator: its own loss", "0 lost at 100 kpps", "", lambda trials, tell: generator()),
    Figure("kill, 1 flow at 1000 pps", "lost: median ≤ 3, max ≤ 10", "median ≤ 1", _of(Case("kill"))),
    Figure("two servers, one killed, 1 flow at 1000 pps", "none of its own; of a switch: median ≤ 3, max ≤ 10", "", lambda trials, tell: twins.measure(trials, tell=tell)),
    Figure("link down, 1000 pps", "lost ≤ 2", "0", _of(Case("link"))),
    Figure("kill, 1 GB of 4 KB pages", "lost: median ≤ 6", "≤ 3", _of(Case("kill", sessions=GIGABYTE))),
    Figure("SIGSTOP, 1000 pps", "lost ≤ 20", "≤ 6", _of(Case("stop"))),
    Figure("kill, 10 000 flows at 50 kpps", "first second ≥ 99.9 %", "≥ 99.95 %", _of(Case("kill", 50_000, 10_000))),
    Figure("kill, 50 000 flows at 100 kpps", "first second ≥ 99.9 %, first and third", "≥ 99.95 %", _of(Case("kill", 100_000, 50_000))),
    Figure("planned, 10 000 flows at 10 000 pps", "0 lost", "0", _of(Case("planned", 10_000, 10_000))),
    Figure("fail-back, 10 000 flows at 10 000 pps", "0 lost", "0", _of(Case("failback", 10_000, 10_000))),
    Figure("new flow, off", "", "", _new_flows("off")),
    Figure("new flow, asynchronous", "p50 ≤ 0.02 ms", "≤ 0.005", _new_flows("asynchronous")),
    Figure("new flow, synchronous", "p50 ≤ 1 ms, p99 ≤ 5", "≤ 0.4, ≤ 2", _new_flows("synchronous")),
    Figure("flow-mods by the agent", "≥ 100 k/s", "Open vSwitch's 129 k/s", lambda trials, tell: rules.measure()),
    Figure("sync and InitState of 1 M", "≥ 300 k/s; ≤ 5 s", "≥ 1 M/s; ≤ 2 s", lambda trials, tell: sync.measure()),
    Figure("split processing", "", "", lambda trials, tell: split_processing()),
    Figure("false deaths in 10 minutes", "0", "0", lambda trials, tell: deaths.measure(10, tell=tell)),
]  # fmt: skip


def measure(trials: int, chosen: list[str], tell: Tell) -> Iterator[dict[str, Any]]:
    """The figures whose name contains one of ``chosen`` (all, if that is empty); one that fails says why, and the others go on."""
    for figure in FIGURES:
        if chosen and not any(one in figure.name for one in chosen):
            continue
        tell(f"-- {figure.name}")
        row = {"figure": figure.name, "must": figure.must, "good": figure.good}
        try:
            yield {**row, **figure.measure(trials, tell), "figure": figure.name}
        except LabError as error:
            yield {**row, "failed": str(error)}
