# SPDX-License-Identifier: Apache-2.0
"""A log that nobody reads, a terminal that is closed, links that go down, devices that go away."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest

from nat_control.demo import SERVER, server_command
from nat_control.lab import Lab, until
from tests.netns.test_server import Net


@pytest.fixture
def bare() -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab)


def shell(net: Net, redirection: str) -> list[str]:
    return ["sh", "-c", f"exec {' '.join(server_command(net.write()))} {redirection}"]


def answers(net: Net) -> bool:
    return net.client.attempt("ping", "-q", "-c", "1", "-W", "1", SERVER).returncode == 0


@pytest.mark.parametrize("redirection", ["> /dev/full 2>&1", ">&- 2>&-"])
def test_a_log_that_cannot_be_written_stops_nothing(bare: Net, redirection: str) -> None:
    before = bare.state()
    server = bare.nat.start(*shell(bare, redirection), name="server")
    until("packets are carried", lambda: answers(bare), 30)
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0
    assert bare.state() == before


@pytest.mark.parametrize("lines", [1, 20])
def test_a_reader_of_the_log_that_goes_away_stops_nothing(bare: Net, lines: int) -> None:
    """During the start, or when it runs."""
    before = bare.state()
    server = subprocess.Popen(
        bare.nat.command(*server_command(bare.write())), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert server.stdout is not None
    assert server.stderr is not None
    try:
        for _ in range(lines):
            if server.stdout.readline() == b"ready\n":
                break
        server.stdout.close()
        until("packets are carried", lambda: answers(bare), 30)
        server.send_signal(signal.SIGTERM)
        assert server.wait(5) == 0
        # the library that attaches AF_XDP's program says what it tries first
        said = [
            line
            for line in server.stderr.read().splitlines()
            if not line.startswith((b"libbpf:", b"libxdp:"))
        ]
        assert said == []
    finally:
        server.kill()
        server.stderr.close()
        server.wait()
    assert bare.state() == before


def test_a_closed_terminal_stops_nothing(bare: Net) -> None:
    """SIGHUP says that there is a configuration to read; where it is the same, nothing happens."""
    before = bare.state()
    server = bare.nat.start(*server_command(bare.write()), name="server")
    server.ready("\ninternal:", timeout=30)
    server.signal(signal.SIGHUP)  # during the start: it waits until there is something to reload
    server.ready("\nready", timeout=30).ready("reload: nothing is different")
    assert answers(bare)
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0
    assert bare.state() == before


def test_a_link_that_goes_down_is_told(bare: Net) -> None:
    server = bare.begin(bare.write())
    assert answers(bare)
    bare.outside.ip("link", "set", "eth0", "down")
    server.ready("external: nat-out is down")
    bare.outside.ip("link", "set", "eth0", "up")
    server.ready("external: nat-out is up")


def test_a_device_that_goes_away_ends_it(bare: Net) -> None:
    server = bare.begin(bare.write())
    bare.nat.ip("link", "delete", "nat-out")
    assert server.wait(10) == 1
    assert "device nat-out is gone" in server.output
    assert "Traceback" not in server.output
