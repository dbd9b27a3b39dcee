# SPDX-License-Identifier: Apache-2.0
"""The demo of the pair: the server NAT and the switch, and what becomes of traffic when the server is killed."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from typing import Any

from nat_control import api
from nat_control.demo import FILE_MIB, SECOND_SERVER, SERVER, Check, Demo, expect, features
from nat_control.lab import Lab, until
from nat_control.lab_stream import Record
from switch_agent.pair_lab import PairLab

RATE, PORT = 1000, 7777  # of the stream
DOWNLOAD_RATE = "4M"  # bytes per second: the file lasts longer than the failover
SECOND = 1_000_000_000


class PairDemo(Demo):
    """The same checks through the pair; then the server is killed, and returns."""

    def __init__(self, lab: Lab, tell: Callable[[Check], None]) -> None:
        super().__init__(lab, tell)
        self.socket = lab.directory / "server.sock"
        self.agent_socket = lab.directory / "agent.sock"

    def build(self) -> None:
        self.pair = PairLab(self.lab)
        self.client, self.nat, self.outside = self.pair.client, self.pair.nat, self.pair.outside
        self.outside.address("lo", f"{SECOND_SERVER}/32")
        self.offloads = [features(self.nat, device) for device in ("nat-in", "nat-out")]

    def start_nat(self) -> str:
        self.pair.start_agent()
        self._start_server()
        first = next(line for line in self.server.output.splitlines() if line.startswith("tandem-nat "))
        return f"{first}; with its agent on Open vSwitch, heartbeat {self.pair.heartbeat}"

    def _start_server(self) -> None:
        self.server = self.pair.start_server()
        self._carried_by("server")

    def clean_end(self) -> str:
        said = super().clean_end()
        agent = self.pair.agent
        expect(agent.stop() == 0, f"the agent: exit code {agent.popen.returncode}: {agent.last_line}")
        return said

    # -- what the agent says -------------------------------------------------------------------------------

    def _agent(self) -> dict[str, Any]:
        status: dict[str, Any] = next(api.ask(self.agent_socket, {"show": "status"}))["status"]
        return status

    def _carried_by(self, who: str) -> None:
        until(f"the {who} carries", lambda: self._agent()["carrier"] == who, 20, 0.005)

    def look(self) -> None:
        self.view.carrier = self._agent()["carrier"]
        if self.view.carrier == "server":
            super().look()
        else:  # the server's rates are of the past
            self.view.status = self._agent()
            self.view.flows = self._sessions({}, self.agent_socket)[::-1]  # the latest are what runs

    # -- the failover --------------------------------------------------------------------------------------

    def act(self) -> None:
        steps = [
            ("a download and a stream run", self.begin_traffic),
            ("kill -9: the switch carries on", self.kill),
            ("the server returns", self.come_back),
            ("the download outlives both", self.end_download),
            ("the stream outlives both", self.end_stream),
            ("no session is lost", self.sessions_kept),
        ]
        for name, prove in steps:
            if not self.check(name, prove):
                return

    def begin_traffic(self) -> str:
        directory = self.lab.directory
        self.files = [directory / "sent.npy", directory / "received.npz"]
        stream = [sys.executable, "-m", "nat_control.lab_stream"]
        end = (SERVER, str(PORT), "--out")
        receive = [*stream, "receive", *end, str(self.files[1])]
        self.receiver = self.outside.start(*receive, name="receiver").ready("receiving")
        send = [*stream, "send", *end, str(self.files[0]), "--rate", str(RATE), "--seconds", "60"]
        self.sender = self.client.start(*send, name="sender").ready("sending")
        self.target = directory / "second-download"
        curl = ["curl", "-sS", "-f", "-o", str(self.target), "--limit-rate", DOWNLOAD_RATE]
        self.curl = self.client.start(*curl, f"http://{SERVER}/file")
        until("the download has begun", lambda: self.target.exists() and self.target.stat().st_size)
        time.sleep(1)  # of quiet before the kill
        return f"curl at {DOWNLOAD_RATE}B/s, {RATE} datagrams per second"

    def kill(self) -> str:
        self.known = self._by_id()
        expect(bool(self.known), "the server has no sessions")
        self.killed = time.monotonic_ns()
        self.server.popen.kill()
        self.server.popen.wait()
        self._carried_by("switch")
        takeover = self._agent()["takeover"]
        self.takeover = takeover
        expect(bool(takeover.get("written")), f"nothing was written to the switch: {takeover}")
        expect(takeover["detected"] > self.killed, "the takeover was before the kill")
        held = self._by_id(self.agent_socket)
        expect(held.keys() >= self.known.keys(), f"{len(self.known.keys() - held.keys())} sessions are lost")
        time.sleep(1.5)  # through the switch alone
        expect(self.curl.alive, f"curl: {self.curl.last_line}")
        return f"noticed by {takeover['reason']}; {len(self.known)} sessions on the switch"

    def come_back(self) -> str:
        self.started = time.monotonic_ns()
        self._start_server()
        self.returned = time.monotonic_ns()
        expect(self.curl.alive, "the download ended before the return, so it says nothing of it")
        time.sleep(1)  # through the server again
        self.kept = self._by_id()
        return f"{(self.returned - self.started) / 1e6:.0f} ms from its start"

    def end_download(self) -> str:
        expect(self.curl.wait(40) == 0, f"curl: {self.curl.last_line}")
        with self.target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        expect(digest == self.digest, "the file that came is not the file that was sent (SHA-256 differs)")
        return f"{FILE_MIB} MiB in one connection, SHA-256 {digest[:16]}… as sent"

    def end_stream(self) -> str:
        for process in (self.sender, self.receiver):
            expect(process.stop() == 0, f"{process.log.stem}: {process.last_line}")
            time.sleep(0.2)  # what is under way arrives
        record = Record.load(*self.files)
        by_kill, by_return = record.lost(self.killed - SECOND, self.started), record.lost(self.started)
        before = record.lost(0, self.killed - SECOND)
        last, first = record.gap(self.killed - SECOND, self.started)
        arrival = record.arrival()
        good = arrival[(record.sent >= self.takeover["written"]) & (arrival > 0)]
        expect(int(good.max(initial=0)) > self.returned, "nothing arrived after the return")
        self.figures = {
            "packets_sent": len(record.sent),
            "packets_lost": {"kill": len(by_kill), "return": len(by_return), "before": len(before)},
            "detect_ms": (self.takeover["detected"] - self.killed) / 1e6,
            "written_ms": (self.takeover["written"] - self.killed) / 1e6,
            "first_good_ms": (int(good.min()) - self.killed) / 1e6,
            "gap_ms": (first - last) / 1e6,
            "return_ms": (self.returned - self.started) / 1e6,
        }
        expect(not len(before), f"{len(before)} lost before the kill")
        expect(len(by_kill) + len(by_return) < RATE, f"{len(by_kill)} + {len(by_return)} lost: over a second")
        return f"{len(record.sent)} sent, {len(by_kill)} lost by the kill, {len(by_return)} by the return"

    def sessions_kept(self) -> str:
        """Each is the same at the server that returned: its id and its address outside."""
        lost = [row for id, row in self.known.items() if self.kept.get(id) != row]
        self.figures["sessions_lost"] = len(lost)
        expect(not lost, f"{len(lost)} of {len(self.known)} lost: {', '.join(lost[:5])}")
        return f"{len(self.known)} before the kill, all of them after the return"

    def _by_id(self, at: Any = None) -> dict[Any, str]:
        return {row["id"]: f"{row['internal']} {row['external']}" for row in self._sessions({}, at)}

    def table(self) -> list[str]:
        if "sessions_lost" not in self.figures:
            return []
        figures = self.figures
        lost = figures["packets_lost"]
        rows = [
            ("packets lost by the kill", f"{lost['kill']}"),
            ("packets lost by the return", f"{lost['return']}"),
            ("sessions lost", f"{figures['sessions_lost']}"),
            ("detection", f"{figures['detect_ms']:.1f} ms"),
            ("switch-over, bytes written", f"{figures['written_ms']:.1f} ms"),
            ("switch-over, first good packet", f"{figures['first_good_ms']:.1f} ms"),
            ("return, from the server's start", f"{figures['return_ms']:.0f} ms"),
        ]
        head = f"failover under {RATE} packets per second, from SIGKILL"
        return ["", head, *(f"  {name:<33}{value:>10}" for name, value in rows), ""]
