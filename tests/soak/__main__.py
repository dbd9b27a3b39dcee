# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.soak --minutes 10 --seed 1``: a pair under traffic, and one fault after the other; exit code 1 at a violation.

New flows begin during each fault. After it the pair must be whole again within a time: the server carries, both have proved that
they hold the same, and traffic goes; and each new flow that was answered still has the external endpoint that it was answered by
(``asynchronous``: but for those answered in the last moments before something died, which are counted). What must hold all the
time: no TCP connection breaks; a flow of the stream keeps its external endpoint, and shares it with nobody; neither half
complains in its log of what should not be. Memory of whoever lived long must not grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import signal
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.failover import ARRIVAL, stream_program
from nat_control.api import ApiError
from nat_control.client import Client
from nat_control.lab import Lab, LabError, Process, until
from switch_agent.pair_lab import CLIENT, OUTSIDE, PairLab
from tests.netns.test_new_flows import rounds
from tests.soak.faults import FAULTS

RATE, FLOWS, CONNECTIONS = 1000, 50, 20
STREAM, TCP, NEW = 9000, 9001, 9002
RECOVERY = 45.0  # seconds
NEW_PER_SECOND, NEW_FLOWS = 200, 400  # per second, and with each fault
BUFFERED = 0.3  # seconds that an arrival may wait in the receiver before it is in the file
GROWTH, SLACK = (
    1.1,
    16 << 20,
)  # of a process that has lived through a good part of it: factor, and bytes beside
COMPLAINTS = re.compile(r"^.*(Traceback|Error:|Segmentation|assert|never awaited).*$", re.MULTILINE)


class Violation(Exception):
    """One line: which promise was broken."""


@dataclass
class Outcome:
    fault: str
    lost: int
    longest_gap_ms: float
    recovery_s: float
    answered: int  # of the new flows
    broken: int  # of those


@dataclass
class Soak:
    net: PairLab
    mode: str
    chance: random.Random
    directory: Path
    outcomes: list[Outcome] = field(default_factory=list)
    memory: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    def start(self, seconds: float) -> None:
        net, program = self.net, stream_program()
        net.start_agent()
        net.start_server()
        net.carrier("server")
        self.received = self.directory / "received"
        tcp = [sys.executable, "-m", "tests.soak.tcp"]
        net.outside.start(program, "receive", OUTSIDE, str(STREAM), str(self.received), name="receive").ready(
            "listening"
        )
        net.outside.start(program, "witness", OUTSIDE, str(NEW), name="witness").ready("listening")
        net.outside.start(*tcp, "serve", OUTSIDE, str(TCP), name="tcp-server").ready("listening")
        self.tcp = net.client.start(*tcp, "keep", OUTSIDE, str(TCP), str(CONNECTIONS), name="tcp")
        self.tcp.ready("talking")
        self.sender = net.client.start(
            *(program, "send", CLIENT, OUTSIDE, str(STREAM), str(RATE), str(FLOWS)),
            *(str(int(seconds * RATE)), str(self.directory / "sent")),
            name="send",
        ).ready("begin")
        self.begin = int(self.sender.output.split()[1])
        self.new_begun = 0
        self.whole("start")

    # -- a fault and what must be true after it ------------------------------------------------------------

    def one(self, name: str) -> None:
        before = time.monotonic_ns()
        new = self.new_flows()
        FAULTS[name](self.net, self.chance)
        mended = time.monotonic_ns()
        try:
            self.whole(name)
        except LabError as error:
            raise Violation(f"{name}: {error}") from None
        whole = time.monotonic_ns()
        time.sleep(BUFFERED)
        self.outcomes.append(
            Outcome(name, *self.delivered(before, whole), (whole - mended) / 1e9, *self.kept(new))
        )

    def whole(self, after: str) -> None:
        """The server carries, both hold the same and have proved it, and traffic goes."""
        self.net.carrier("server", RECOVERY)
        until(f"after {after}: both sides are proved equal", self.equal, RECOVERY, 0.1)
        until(f"after {after}: traffic goes", self.flowing, 10, 0.05)
        self.holds()

    def equal(self) -> bool:
        for name in ("server", "agent"):
            try:
                peer = Client(self.directory / f"{name}.sock").peer()
            except ApiError:
                return False
            if not (peer["verified"] and peer["digest"]["equal"]) or peer["refused"] or peer["differed"]:
                return False
        return True

    def flowing(self) -> bool:
        came = self.arrivals()
        return len(came) > 0 and time.monotonic_ns() - int(came["arrived"][-1]) < int((0.2 + BUFFERED) * 1e9)

    def new_flows(self) -> Process:
        """Begins as many, which a fault befalls."""
        churn = self.net.client.start(
            *(stream_program(), "churn", CLIENT.replace(".10", ".11"), OUTSIDE, str(NEW)),
            *(str(NEW_PER_SECOND), str(self.new_begun), str(NEW_FLOWS), "1", str(self.directory / "new")),
            name="churn",
        ).ready("begin")
        self.new_begun += NEW_FLOWS
        return churn

    def kept(self, new: Process) -> tuple[int, int]:
        """How many of the new flows had an answer, and how many of those have not kept their external endpoint."""
        new.ready("asked", timeout=10)
        new.signal(signal.SIGUSR1)
        if new.wait(60) != 0:
            raise Violation(f"the new flows ended: {new.last_line}")
        first, again = rounds(self.directory / "new")
        answered = first["answered"] != 0
        same = (
            (again["answered"] != 0)
            & (first["address"] == again["address"])
            & (first["port"] == again["port"])
        )
        broken = int((answered & ~same).sum())
        if broken and self.mode == "synchronous":
            raise Violation(
                f"{broken} of {answered.sum()} new flows that were answered are not what they were"
            )
        return int(answered.sum()), broken

    # -- invariants ----------------------------------------------------------------------------------------

    def arrivals(self) -> Any:
        whole = self.received.stat().st_size // ARRIVAL.itemsize
        return np.memmap(self.received, ARRIVAL, "r", shape=(whole,)) if whole else np.zeros(0, ARRIVAL)

    def holds(self) -> None:
        if broken := re.search("^broken.*$", self.tcp.output, re.MULTILINE):
            raise Violation(broken[0])
        if not self.tcp.alive or not self.sender.alive:
            raise Violation(f"a program of the traffic ended: {self.tcp.last_line}; {self.sender.last_line}")
        came = self.arrivals()
        flow = came["sequence"] % FLOWS
        endpoints = np.unique(np.stack([flow, came["address"].astype("<u8") << 16 | came["port"]]), axis=1)
        if len(np.unique(endpoints[0])) < endpoints.shape[1]:
            raise Violation("a flow of the stream came from two external endpoints")
        if len(np.unique(endpoints[1])) < endpoints.shape[1]:
            raise Violation("two flows of the stream came from one external endpoint")
        for process in self.net.lab.processes:
            if found := COMPLAINTS.search(process.output):
                raise Violation(f"{process.log.stem}: {found[0].strip()}")
        for name, process in (
            ("agent", self.net.agent),
            ("server", self.net.server),
            ("switch", self.net.ovs.daemon),
        ):
            if not process.alive:
                raise Violation(f"{name} has ended: {process.last_line}")
            self.memory[name, process.pid].append((time.monotonic(), _resident(process.pid)))

    def delivered(self, begin: int, end: int) -> tuple[int, float]:
        """Datagrams lost of those sent in between, and the longest time in ms in which none came."""
        came = self.arrivals()
        first, last = ((t - self.begin) * RATE // 10**9 for t in (begin, end))
        here = came[(came["sequence"] >= first) & (came["sequence"] < last)]
        gap = float(np.diff(np.sort(here["arrived"])).max() / 1e6) if len(here) > 1 else 0.0
        return int(last - first - len(np.unique(here["sequence"]))), gap

    def grown(self) -> list[str]:
        """Processes whose memory grew, between the second quarter of their life and its end."""
        found = []
        for (name, pid), samples in self.memory.items():
            sizes = [size for _, size in samples]
            if len(sizes) < 12:
                continue
            early = statistics.median(sizes[len(sizes) // 4 : len(sizes) // 2])
            late = statistics.median(sizes[-len(sizes) // 4 :])
            if late > early * GROWTH + SLACK:
                found.append(
                    f"{name} (process {pid}) grew from {early / 2**20:.0f} to {late / 2**20:.0f} MiB"
                )
        return found


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def run(minutes: float, seed: int, mode: str, partition: str, names: list[str]) -> list[Outcome]:
    """Raises Violation, LabError."""
    chance = random.Random(seed)
    end = time.monotonic() + minutes * 60
    with Lab() as lab:
        nat = {"max_sessions": 60_000, "timeouts": {"udp": 120}}
        net = PairLab(lab, mode, nat=nat, max_flows=120_000, peer={"partition": partition})
        net.client.ip("address", "add", f"{CLIENT.replace('.10', '.11')}/24", "dev", "eth0")
        soak = Soak(net, mode, chance, lab.directory)
        soak.start(minutes * 60 + 2 * RECOVERY + 60)
        for turn in itertools.count():
            for name in chance.sample(names, len(names)):
                if time.monotonic() > end:
                    if turn and (grown := soak.grown()):
                        raise Violation("; ".join(grown))
                    soak.tcp.stop()
                    print(soak.tcp.last_line, file=sys.stderr)
                    return soak.outcomes
                try:
                    soak.one(name)
                except Violation:
                    _show_logs(net)
                    raise
                last = soak.outcomes[-1]
                print(
                    f"{last.fault}: {last.lost} lost, {last.longest_gap_ms:.0f} ms at most without a datagram, "
                    f"whole after {last.recovery_s:.1f} s; {last.answered} new flows, {last.broken} broken",
                    file=sys.stderr,
                    flush=True,
                )
    raise AssertionError


def _show_logs(net: PairLab) -> None:
    for process in (net.agent, net.server):
        print(f"--- {process.log.stem}\n{process.output[-3000:]}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=["synchronous", "asynchronous"], default="synchronous")
    parser.add_argument(
        "--partition", choices=["all_peer", "new_at_peer", "by_protocol", "all_local"], default="all_peer"
    )
    parser.add_argument("--faults", nargs="+", choices=sorted(FAULTS), default=sorted(FAULTS))
    asked = parser.parse_args()
    try:
        outcomes = run(asked.minutes, asked.seed, asked.mode, asked.partition, asked.faults)
    except (Violation, LabError) as error:
        sys.exit(f"soak, seed {asked.seed}: {error}")
    for name in asked.faults:
        if some := [one for one in outcomes if one.fault == name]:
            row = {"fault": name, "times": len(some)}
            for key in ("lost", "longest_gap_ms", "recovery_s", "answered", "broken"):
                values = [getattr(one, key) for one in some]
                row[key] = [round(f, 1) for f in (min(values), statistics.median(values), max(values))]
            print(json.dumps(row))


if __name__ == "__main__":
    main()
