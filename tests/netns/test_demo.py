# SPDX-License-Identifier: Apache-2.0
"""The demo, as an operator runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nat_control import demo, lab

DEMO = [sys.executable, "-m", "nat_control.cli", "demo"]
NAMES = {
    "the NAT starts",
    "ping",
    "DNS",
    "HTTP download",
    "iperf3 TCP",
    "iperf3 UDP",
    "only the pool's addresses are used",
    "nothing leaves untranslated",
    "clean end",
    "nothing is left over",
}


def test_the_demo_proves_what_it_says(tmp_path: Path) -> None:
    report = tmp_path / "demo.json"
    done = subprocess.run([*DEMO, "--json", str(report)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(report.read_text())["checks"]
    assert all(set(check) == {"name", "ok", "detail"} for check in checks)
    assert {check["name"] for check in checks} >= NAMES
    assert all(check["ok"] is True for check in checks)
    assert f"{len(checks)} of {len(checks)} checks held" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
