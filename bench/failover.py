# SPDX-License-Identifier: Apache-2.0
"""What a failover costs a UDP stream: a client, Open vSwitch with the agent, the server, an outside; all real.

Each trial sends ``rate`` packets per second round ``flows`` flows through the server, ends the server in one of the ways of
HOWS, and counts at the outside what came. Times are from that moment on, in ms: ``detect``, ``written`` (the bytes that
make the switch carry), ``first_good`` (arrival of the first packet that was sent afterwards and came).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import core
from nat_control import api
from nat_control.client import Client
from nat_control.lab import Lab, LabError, Process, until
from switch_agent.pair_lab import CLIENT, OUTSIDE, PairLab

SOURCE = Path(__file__).with_name("stream.c")
FLAGS = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
HOWS = ("kill", "stop", "link", "planned", "failback", "takeover", "release")
PORT, OTHER_PORT = 9000, 9001
LEAD, REST = 0.6, 1.3  # seconds of the stream before and after the end
SETTLED, BIN = 0.1, 0.01  # seconds
OPENING = 180.0  # seconds that the sessions of a case may take
CALM, ROUNDS = 4000, 3  # packets per second at which flows are opened, and asked again, and how often that
SHOWN = (0, 2)  # trials whose timeline is kept: the first and the third failover in a row
PURGED = 100  # entries, at most, of a cache without those of single flows
LONGEST = 60.0  # seconds of the stream while the server comes back
ARRIVAL = np.dtype(
    [
        ("sequence", "<u8"),
        ("sent", "<u8"),
        ("arrived", "<u8"),
        ("address", "<u4"),
        ("port", "<u2"),
        ("", "<u2"),
    ]
)


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    how: str = "kill"
    rate: int = 1000  # packets per second
    flows: int = 1
    known: int = 0  # sessions besides those of the stream
    trials: int = 5
    mode: str = "synchronous"
    misses: int = 3  # heartbeats of 2 ms
    nat: str = "rules"  # or conntrack
    sessions: int = 0  # that the tables have room for, at least; their memory is touched


@dataclass
class Trial:
    lost: int
    sent: int
    first_second: float  # share of what was sent in the first second after the detection
    detect: float | None
    written: float | None
    first_good: float | None
    lost_before: int = 0  # of those sent before the end, but for the last SETTLED: no failover costs these
    lost_after: int = 0  # of those sent after the detection
    sessions_lost: int = (
        0  # flows that come from another external endpoint than when they were opened, or never more
    )
    silent: int = 0  # flows of which nothing came after the end, as long as the stream was
    late: float | None = None  # ms, of the sender against its own timetable, at most
    timeline: list[int] = field(default_factory=list)  # arrivals in each BIN from LEAD before the end on
    reason: str = ""
    gaps: list[str] = field(default_factory=list)  # runs of lost packets: how many, and when (ms)


def stream_program() -> str:
    """The path of stream.c's program, compiled where it is not yet."""
    return str(core.compiled("bench-stream", [SOURCE], [], FLAGS))


class Pair:
    """The network of one case, up and with the server in front."""

    def __init__(self, lab: Lab, case: Case) -> None:
        self.case = case
        self.program = stream_program()
        sessions = max(20_000, 2 * (case.flows + case.known), case.sessions)
        self.net = PairLab(
            lab,
            case.mode,
            misses=case.misses,
            nat={"max_sessions": sessions, "timeouts": {"udp": 3600}},
            max_flows=4 * max(10_000, case.flows + case.known),
            switch={"nat": case.nat},
        )
        self.directory = lab.directory
        self.endpoints = np.zeros(
            case.flows, np.uint64
        )  # of the stream's flows, as the outside saw them first
        if case.mode == "off":  # no agent: the switch forwards to the server for good
            for port, there in ((1, 3), (3, 1), (2, 4), (4, 2)):
                self.net.ovs.ofctl("add-flow", f"in_port={port},actions=output:{there}")
            self.net.start_server()
            return
        self.net.start_agent()
        self.net.start_server()
        self.carrier("server")
        self.net.outside.start(self.program, "echo", OUTSIDE, str(OTHER_PORT), name="others").ready(
            "listening"
        )
        self.open_known()

    def agent(self) -> dict[str, Any]:
        answer = next(api.ask(self.directory / "agent.sock", {"show": "status"}))
        status: dict[str, Any] = answer["status"]
        return status

    def carrier(self, who: str, timeout: float = 30) -> None:
        until(f"the {who} carries", lambda: self.agent()["carrier"] == who, timeout, 0.01)

    def server_is_back(self, returns: int) -> None:
        """``returns`` counts the lines that the agent had said before. The switch's cache is purged after that line."""
        until("the server carries", lambda: self._returns() > returns, 60, 0.01)
        with contextlib.suppress(LabError):
            until("the cache is purged", lambda: self.cached() < PURGED, 5, 0.05)

    def cached(self) -> int:
        """Entries of the datapath."""
        return int(self.net.ovs.appctl("upcall/show").split("(current ")[1].split(")")[0])

    def _returns(self) -> int:
        return self.net.agent.output.count("\nthe server carries")

    def send(self, port: int, rate: float, flows: int, packets: int) -> tuple[Process, Path]:
        file = self.directory / f"sent-{port}"
        numbers = map(str, (port, rate, flows, packets))
        process = self.net.client.start(
            self.program, "send", CLIENT, OUTSIDE, *numbers, str(file), name="send"
        )
        return process.ready("begin"), file

    def receive(self) -> tuple[Process, Path]:
        file = self.directory / "received"
        process = self.net.outside.start(
            self.program, "receive", OUTSIDE, str(PORT), str(file), name="receive"
        )
        return process.ready("listening"), file

    def open_known(self) -> None:
        """Sessions that only exist, and what the stream's flows need before they are measured."""
        receiver, received = self.receive()
        end = time.monotonic() + OPENING
        while not self._all_there():
            if time.monotonic() > end:
                raise LabError(f"not all sessions are at the switch after {OPENING:g} s: {self.agent()}")
            for port, flows in ((PORT, self.case.flows), (OTHER_PORT, self.case.known)):
                if flows:  # again what found a table full of held packets, a cold cache or a dead server
                    sender, _ = self.send(port, CALM, flows, flows)
                    sender.wait(60)
            with contextlib.suppress(LabError):
                until("all sessions are at the switch", self._all_there, 3, 0.1)
        receiver.stop()
        # a packet may be lost that has opened its flow
        self.endpoints = self.endpoints_now(endpoints(np.fromfile(received, ARRIVAL), self.case.flows))
        self.carrier("server")

    def endpoints_now(self, heard: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Where each flow comes from, in a calm stream, if that is not known from ``heard`` yet (0); both shape (flows,)."""
        for _ in range(ROUNDS):
            if heard.all():
                break
            receiver, received = self.receive()
            sender, _ = self.send(PORT, CALM, self.case.flows, self.case.flows)
            sender.wait(60)
            time.sleep(0.1)
            receiver.stop()
            heard = np.where(heard, heard, endpoints(np.fromfile(received, ARRIVAL), self.case.flows))
        return heard

    def _all_there(self) -> bool:
        status = self.agent()
        return bool(min(status["sessions"], status["offloaded"]) >= self.case.flows + self.case.known)

    # -- a trial -------------------------------------------------------------------------------------------

    def end_server(self) -> None:
        """As the case says; returns once the signal is sent."""
        match self.case.how:
            case "kill":
                self.net.server.signal(signal.SIGKILL)
            case "stop":
                self.net.server.signal(signal.SIGSTOP)
            case "planned":
                self.net.server.signal(signal.SIGTERM)
            case "takeover" | "release":
                self.move(self.case.how)
            case "link":
                for device in ("nat-in", "nat-out"):
                    self.net.nat.ip("link", "set", device, "down")

    def move(self, verb: str) -> None:
        """As an operator does at the agent: the traffic moves on purpose."""
        moved = Client(self.directory / "agent.sock").move(verb)
        if moved["result"] != "done":
            raise LabError(f"peer {verb}: {moved['why'] or moved['result']}")

    def bring_back(self) -> None:
        if self.case.how == "release":
            return  # the trial was that
        returns = self._returns()
        match self.case.how:
            case "takeover":
                self.move("release")
            case "stop":
                self.net.server.signal(signal.SIGCONT)
            case "link":
                for device in ("nat-in", "nat-out"):
                    self.net.nat.ip("link", "set", device, "up")
            case _:
                self.net.server.popen.wait(10)
                self.net.start_server()
        self.server_is_back(returns)

    def trial(self) -> Trial:
        if self.case.how == "failback":
            self.net.server.signal(signal.SIGKILL)
            self.carrier("switch")
        if self.case.how == "release":
            self.move("takeover")
        after = LONGEST if self.case.how == "failback" else REST
        before = self.agent()
        receiver, received = self.receive()
        sender, sent = self.send(PORT, self.case.rate, self.case.flows, int(self.case.rate * (LEAD + after)))
        begin = int(sender.output.split()[1])
        ended = begin + int((LEAD + random.uniform(0, 0.01)) * 1e9)
        time.sleep(max(ended - time.monotonic_ns(), 0) / 1e9)
        ended = time.monotonic_ns()
        if self.case.how == "failback":
            returns = self._returns()
            self.net.start_server()
            self.server_is_back(returns)
            ended = time.monotonic_ns()
            time.sleep(REST)
            sender.signal(signal.SIGTERM)
        else:
            self.end_server()
        sender.wait(60)
        if self.case.how != "failback":
            self.carrier("server" if self.case.how == "release" else "switch")
        time.sleep(0.1)
        receiver.stop()
        status = self.agent()
        times, arrivals = np.fromfile(sent, "<u8"), np.fromfile(received, ARRIVAL)
        trial = evaluate(times, arrivals, ended, status, self.case)
        due = begin + (np.arange(len(times)) * (1e9 / self.case.rate)).astype(np.int64)
        trial.late = float((times.astype(np.int64) - due).max() / 1e6)
        heard = endpoints(arrivals[arrivals["sent"] >= ended], self.case.flows)
        trial.silent = int((heard == 0).sum())
        moved = int((self.endpoints_now(heard) != self.endpoints).sum())
        trial.sessions_lost = max(moved, before["sessions"] - status["sessions"])
        if self.case.how != "failback":
            self.bring_back()
        return trial


def evaluate(
    sent: np.ndarray[Any, Any], arrivals: np.ndarray[Any, Any], ended: int, status: dict[str, Any], case: Case
) -> Trial:
    """``sent``: shape (n,), time of each sequence number; ``ended``: when the server did."""
    came = np.zeros(len(sent), np.bool_)
    came[arrivals["sequence"]] = True
    takeover = status["takeover"] if case.how not in ("failback", "takeover", "release") else {}
    detected, written = takeover.get("detected"), takeover.get("written")
    if detected is not None and detected < ended:
        detected = written = None  # of an earlier trial
    start = detected or ended
    second = (sent >= start) & (sent < start + 10**9)
    later = arrivals[arrivals["sent"] >= ended]
    early = sent < ended - int(SETTLED * 1e9)
    place = ((arrivals["arrived"].astype(np.int64) - ended) / (BIN * 1e9) + LEAD / BIN).astype(np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate([[True], came, [True]]).astype(np.int8)))
    return Trial(
        lost=int((~came).sum()),
        sent=len(sent),
        first_second=float(came[second].mean()) if second.any() else 1.0,
        detect=(detected - ended) / 1e6 if detected else None,
        written=(written - ended) / 1e6 if written else None,
        first_good=(int(later["arrived"].min()) - ended) / 1e6 if len(later) else None,
        lost_before=int((~came[early]).sum()),
        lost_after=int((~came[sent >= start]).sum()),
        timeline=np.bincount(place[place >= 0], minlength=round((LEAD + REST) / BIN)).tolist(),
        reason=takeover.get("reason", "") if detected else "",
        gaps=[
            f"{stop - start} at {(int(sent[start]) - ended) / 1e6:.1f}"
            for start, stop in edges.reshape(-1, 2).tolist()
        ],
    )


def endpoints(arrivals: np.ndarray[Any, Any], flows: int) -> np.ndarray[Any, Any]:
    """The external endpoint of each flow when it came last, shape (flows,); 0: it did not."""
    last = np.zeros(flows, np.uint64)
    came = arrivals["address"].astype(np.uint64) << np.uint64(16) | arrivals["port"]
    last[arrivals["sequence"] % np.uint64(flows)] = came
    return last


# -- results -----------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    rounded = [round(f, 5) for f in (min(found), statistics.median(found), max(found))]
    return dict(zip(("min", "median", "max"), rounded, strict=True))


def measure(case: Case, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """All trials of a case, in one network; the last line of ``--json``. Raises LabError."""
    trials = []
    with Lab() as lab:
        pair = Pair(lab, case)
        memory = resident(pair.net.server.pid)
        for number in range(case.trials):
            try:
                trials.append(trial := pair.trial())
            except LabError as error:
                said = "; ".join(pair.net.agent.output.splitlines()[-5:])
                raise LabError(f"trial {number + 1}: {error}; the agent: {said}") from None
            tell(
                f"{case.how} {number + 1}/{case.trials}: lost {trial.lost} of {trial.sent} ({', '.join(trial.gaps[:6])}), "
                f"{trial.lost_before} of them before, {trial.lost_after} once it was noticed, {trial.reason or '-'}, "
                f"detected {_ms(trial.detect)}, written {_ms(trial.written)}, first good {_ms(trial.first_good)}, "
                f"of first second {trial.first_second:.5f}, sessions lost {trial.sessions_lost}, silent {trial.silent}"
            )
    return {
        "how": case.how,
        "rate": case.rate,
        "flows": case.flows,
        "known": case.known,
        "mode": case.mode,
        "nat": case.nat,
        "trials": case.trials,
        "cpus": os.cpu_count(),
        "packets_lost": spread([trial.lost for trial in trials]),
        "delivered_first_second": spread([trial.first_second for trial in trials]),
        "sessions_lost": sum(trial.sessions_lost for trial in trials),
        "detect_ms": spread([trial.detect for trial in trials]),
        "written_ms": spread([trial.written for trial in trials]),
        "first_good_ms": spread([trial.first_good for trial in trials]),
        "reaction_ms": spread([_between(trial.detect, trial.written) for trial in trials]),
        "server_mb": memory >> 20,
        "lost_before": sum(trial.lost_before for trial in trials),
        "sender_late_ms": spread([trial.late for trial in trials]),
        "each": [
            {
                "lost": trial.lost,
                "delivered_first_second": round(trial.first_second, 6),
                "lost_before": trial.lost_before,
                "lost_after": trial.lost_after,
                "sessions_lost": trial.sessions_lost,
                "detect_ms": trial.detect,
                "reaction_ms": _between(trial.detect, trial.written),
                "first_good_ms": trial.first_good,
                "reason": trial.reason,
                "timeline": trial.timeline if number in SHOWN else None,
            }
            for number, trial in enumerate(trials)
        ],
    }


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"
