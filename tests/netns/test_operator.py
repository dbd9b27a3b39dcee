# SPDX-License-Identifier: Apache-2.0
"""The operator's tools beside a running server: explain, trace, top, and the examples of docs/python.md."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nat_control.client import connect
from nat_control.demo import CLIENT, ROUTER, SERVER
from nat_control.lab import Lab, until
from tests.netns.test_server import CLI, Net

ROOT = Path(__file__).parent.parent.parent
SEND = """
import socket, sys, time
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
out.bind(("0.0.0.0", int(sys.argv[2])))
for _ in range(int(sys.argv[3])):
    out.sendto(b"hello", (sys.argv[1], 53))
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with Lab() as lab:
        running = Net(lab)
        running.begin(running.write())
        yield running


def send(net: Net, port: int, n: int = 1) -> None:
    net.client.run(sys.executable, "-c", SEND, SERVER, str(port), str(n))


def command(net: Net, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*CLI, *arguments, "--socket", str(net.socket)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if not code else done.stderr


def test_explain_says_what_then_happens(net: Net) -> None:
    send(net, 4999)  # next hops are known from here on
    flow = f"{CLIENT}:5000", f"{SERVER}:53/udp"
    text = command(net, "explain", *flow)
    assert f"route: 0.0.0.0/0 via {ROUTER} (external)" in text
    assert "no mapping: none; a new one would be opened" in text
    assert "\nverdict: forward (translated and sent on)\n" in text
    told = json.loads(command(net, "explain", *flow, "--json"))
    assert not net.sessions(internal=f"{CLIENT}:5000"), "nothing was opened"
    send(net, 5000)
    (session,) = net.sessions(internal=f"{CLIENT}:5000")
    assert session["external"] == told["becomes"]["source"]
    assert "\nsession: " in command(net, "explain", *flow)
    back = command(net, "explain", f"{SERVER}:53", f"{session['external']}/udp", "--from", "external")
    assert f"-> {CLIENT}:5000" in back
    assert "has no protocol: write" in command(net, "explain", flow[0], f"{SERVER}:53", code=2)


def test_trace_tells_of_a_real_flow(net: Net) -> None:
    tracing = subprocess.Popen(
        [*CLI, "trace", f"{CLIENT}:5100", "udp", "--packets", "3", "--seconds", "60", "--json", "--socket",
         str(net.socket)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while tracing.poll() is None:
        send(net, 5100, 5)
    out, err = tracing.communicate(timeout=30)
    rows = [json.loads(line) for line in out.splitlines()]
    (session,) = net.sessions(internal=f"{CLIENT}:5100")
    assert [row["source"] for row in rows] == [f"{CLIENT}:5100"] * 3
    assert {row["after"]["source"] for row in rows} == {session["external"]}
    assert {row["verdict"] for row in rows} == {"forward"}
    assert err == "3 packets: all\n"


def test_a_trace_without_packets_ends_in_time(net: Net) -> None:
    done = subprocess.run(
        [*CLI, "trace", "10.0.0.99", "--seconds", "0.3", "--socket", str(net.socket)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "0 packets: time is over\n")


def test_top_once(net: Net) -> None:
    send(net, 5200)
    seen = json.loads(command(net, "top", "--once", "--json", "--every", "0.5"))
    assert seen["sessions"] >= 1
    assert seen["top_hosts"][0]["address"] == CLIENT
    assert {"busy_share", "verdicts", "ports", "opened"} <= set(seen)
    text = command(net, "top", "--once", "--every", "0.5")
    assert CLIENT in text


def test_top_on_a_terminal_ends_with_q(net: Net) -> None:
    """80 x 24, as a person has it: each line fits, and the terminal is left as it was."""
    send(net, 5250)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(slave)
    watching = subprocess.Popen(
        [*CLI, "top", "--every", "0.3", "--socket", str(net.socket)],
        stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    seen = b""

    def read() -> bool:
        nonlocal seen
        if select.select([master], [], [], 0.1)[0]:
            seen += os.read(master, 65536)
        return seen.count(b"q ends") >= 3

    until("three pictures", read, timeout=60)
    assert CLIENT.encode() in seen
    os.write(master, b"\x1b[B")  # arrow down: no escape
    before_keys = seen.count(b"q ends")
    until("another picture", lambda: read() and seen.count(b"q ends") > before_keys + 1, timeout=60)
    assert watching.poll() is None
    os.write(master, b"xq")
    while watching.poll() is None:
        read()
    assert watching.returncode == 0
    assert termios.tcgetattr(slave) == before
    pictures = seen.decode().replace("\r", "").split("\x1b[H")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for one in pictures for line in one.split("\n")]
    assert all(len(line.rstrip()) <= 80 for line in lines), max(lines, key=len)
    assert "Traceback" not in seen.decode()
    os.close(master)
    os.close(slave)


def test_the_examples_of_the_documentation_run(net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    send(net, 5300)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {"SOCKET": net.socket, "begin_something": lambda: send(net, 5301)}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert "forward" in capsys.readouterr().out


def test_a_stream_of_events_sees_a_session_open_and_the_server_end(net: Net) -> None:
    nat = connect(socket=net.socket)
    with nat.events(timeout=30) as stream:
        send(net, 5400)
        ports: set[int] = set()
        while 5400 not in ports:
            ports.update(next(stream)["internal_port"].tolist())


def test_the_status_of_an_agent_is_a_table(tmp_path: Path) -> None:
    """An agent that no switch has come to yet has a status all the same."""
    config = yaml.safe_load((ROOT / "examples/pair-switch.yaml").read_text())
    for part in ("peer", "heartbeat"):
        config.pop(part, None)
    config["control"] = {"socket": str(tmp_path / "agent.sock")}
    config["switch"]["openflow"], config["switch"]["takeover"] = "127.0.0.1:16653", "127.0.0.1:16654"
    (tmp_path / "agent.yaml").write_text(yaml.safe_dump(config))
    with Lab() as lab:
        where = lab.namespace("agent")
        where.start(*CLI, "switch", str(tmp_path / "agent.yaml"), name="agent").ready("ready", timeout=60)
        done = subprocess.run(
            [*CLI, "show", "status", "--socket", str(tmp_path / "agent.sock")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        # after its first second it says that it is degraded
        told = r"^# switch agent .*\n(degraded .*\n)?process +\d+, up \d+ s\nswitch +not connected\n"
        assert re.search(told, done.stdout)
        told = connect(socket=tmp_path / "agent.sock").explain("10.0.0.10:5000", "203.0.113.1:53")
        assert told["verdict"] in ("held", "forward")
        assert json.loads(
            subprocess.run(
                [*CLI, "top", "--once", "--json", "--every", "0.3", "--socket", str(tmp_path / "agent.sock")],
                capture_output=True,
                timeout=60,
                check=True,
            ).stdout
        )["carrier"]
