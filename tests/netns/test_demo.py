# SPDX-License-Identifier: Apache-2.0
"""The demo, as an operator runs it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nat_control import demo, lab

DEMO = [sys.executable, "-m", "nat_control.cli", "demo"]
NAMES = {
    "the NAT starts",
    "ping",
    "DNS",
    "HTTP download",
    "iperf3 TCP",
    "iperf3 UDP",
    "a download and a stream run",
    "kill -9: the switch carries on",
    "the server returns",
    "the download outlives both",
    "the stream outlives both",
    "no session is lost",
    "only the pool's addresses are used",
    "nothing leaves untranslated",
    "clean end",
    "nothing is left over",
}


def test_the_demo_proves_what_it_says(tmp_path: Path) -> None:
    report = tmp_path / "demo.json"
    done = subprocess.run([*DEMO, "--json", str(report)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(report.read_text())
    checks, figures = written["checks"], written["failover"]
    assert all(set(check) == {"name", "ok", "detail"} for check in checks)
    assert {check["name"] for check in checks} >= NAMES
    assert all(check["ok"] is True for check in checks)
    assert f"{len(checks)} of {len(checks)} checks held" in done.stdout
    assert figures["sessions_lost"] == 0
    assert sum(figures["packets_lost"].values()) < 1000 < figures["packets_sent"]
    assert 0 < figures["detect_ms"] <= figures["written_ms"] < figures["first_good_ms"] < 1000
    assert figures["return_ms"] > 0
    assert "packets lost by the return" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals) -> None:
    process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "the NAT starts" in process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert lab.leftovers(process.pid) == []


def test_what_a_killed_demo_leaves_is_swept_away() -> None:
    process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "the NAT starts" in process.stdout.readline()
    process.kill()
    process.communicate(timeout=20)
    assert lab.leftovers(process.pid)
    lab.sweep()
    assert lab.leftovers(process.pid) == []


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TOOLS", {"ip": "iproute2", "no-such-program": "its-package"})
    with pytest.raises(lab.LabError, match="no-such-program not installed: apt install its-package"):
        demo.run(None)


def test_a_broken_translation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: a router in the NAT's place, which translates nothing, passes none that matters."""

    def route_instead(self: demo.Demo) -> str:
        self.nat.address("nat-in", f"{demo.NAT_INSIDE}/24")
        self.nat.address("nat-out", f"{demo.NAT_OUTSIDE}/24")
        self.nat.route("default", demo.ROUTER)
        self.nat.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.outside.route(str(demo.INSIDE), demo.NAT_OUTSIDE)
        self.server = self.nat.start("sleep", "1000")
        return "a router"

    monkeypatch.setattr(demo.Demo, "start_nat", route_instead)
    monkeypatch.setattr(demo.Demo, "tcp", lambda self: "left out")
    monkeypatch.setattr(demo.Demo, "udp", lambda self: "left out")
    with lab.Lab() as made:
        broken = demo.Demo(made, lambda check: None)
        broken.run()
        held = {check.name: check.ok for check in broken.checks}
        assert held["HTTP download"]
        assert not held["nothing leaves untranslated"]
        assert not held["only the pool's addresses are used"]
        assert not held["clean end"]


@pytest.mark.parametrize(("width", "height", "flows"), [(80, 24, 4), (120, 40, 10), (80, 12, 4)])
def test_the_picture_fits_the_terminal_and_shows_every_port(width: int, height: int, flows: int) -> None:
    shown = demo.Demo(lab.Lab(), lambda check: None)
    shown.view.flows = [
        {
            "protocol": "icmp",
            "internal": f"10.0.0.10:{50000 + i}",
            "external": f"198.51.100.10:{60000 + i}",
            "remote": "203.0.113.2:65535",
            "packets_out": 10_000_000,
            "packets_in": 0,
            "idle": i,
        }
        for i in range(20)
    ]
    shown.view.carrier = "switch"
    shown.checks = [demo.Check(f"{i} only the pool's addresses are used", True, "x" * 200) for i in range(12)]
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    console.print(demo.picture(shown, height))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("carried by the SWITCH" in line for line in lines)
    assert sum(f"198.51.100.10:{60000 + i} " in line for i in range(20) for line in lines) == flows
    assert "11 only the pool's addresses are used" in lines[-1]
    assert len(lines) < max(height, 16)


@pytest.mark.long
def test_a_reader_that_goes_away_does_not_end_the_demo() -> None:
    process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    time.sleep(6)  # some checks later
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert errors == ""


def test_a_kept_demo_stays_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the set-up alone, and under another name, for an operator may keep one right now."""
    monkeypatch.setattr(lab, "KEPT", f"keeping{os.getpid()}")
    with lab.Lab(kept=True) as made:
        client = made.namespace("client")
        process = client.start("sleep", "1000")
    try:
        assert process.alive
        assert Path("/run/netns", client.full_name).exists()
        with pytest.raises(lab.LabError, match="a kept demo exists already"):
            lab.Lab(kept=True).__enter__()
        lab.sweep()
        assert process.alive
        os.seteuid(65534)
        try:
            with pytest.raises(lab.LabError, match="a kept demo is root's: try again with sudo"):
                lab.end_kept()
        finally:
            os.seteuid(0)
        assert process.alive
    finally:
        removed = lab.end_kept()
    assert client.full_name in removed
    assert not Path("/run/netns", client.full_name).exists()
    assert process.wait(5) == -signal.SIGTERM
    assert lab.end_kept() == []


def test_cleanup_is_not_undone_by_a_second_signal() -> None:
    """Two Ctrl-C in a row, the second while it cleans up."""
    process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "the NAT starts" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    end = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < end:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.returncode in (130, -signal.SIGINT)
    assert lab.leftovers(process.pid) == []
