# SPDX-License-Identifier: Apache-2.0
"""What the system refuses: memory, descriptors, room on the disk; and a clock that jumps. A line, and it goes on."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nat_control import api
from nat_control.demo import ROUTER, server_command
from nat_control.lab import Lab, until
from tests.netns.test_reload import Changing
from tests.netns.test_server import MANY, SERVER

CLOCK = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
/* every look at the wall clock is ten years from the last one, there and back */
static time_t jump(void)
{
    static int n;
    return __atomic_add_fetch(&n, 1, __ATOMIC_RELAXED) & 1 ? 315360000 : -315360000;
}
int clock_gettime(clockid_t clock, struct timespec *t)
{
    int failed = (int)syscall(SYS_clock_gettime, clock, t);
    if (!failed && clock == CLOCK_REALTIME)
        t->tv_sec += jump();
    return failed;
}
time_t time(time_t *t)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t)
        *t = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone)
{
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *t = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}
"""


@pytest.fixture
def net() -> Iterator[Changing]:
    with Lab() as lab:
        yield Changing(lab, 1)


def ping(net: Changing, address: str = ROUTER) -> bool:
    return net.client.attempt("ping", "-n", "-q", "-c", "1", "-W", "2", address).returncode == 0


def degraded(net: Changing) -> str:
    return "\n".join(net.status()["degraded"])


def test_what_is_refused_while_it_runs_is_told_and_stops_nothing(net: Changing) -> None:
    state = net.lab.directory / "state"
    state.mkdir()
    net.change(max_sessions=64)
    # `ip netns exec` gives it a mount namespace of its own
    command = f"mount -t tmpfs -o size=1m none {state} && exec {shlex.join(server_command(net.file))}"
    server = net.begin(net.file, command=["env", f"TANDEM_NAT_STATE={state}", "sh", "-c", command])
    assert ping(net)
    assert degraded(net) == ""
    pid = net.status()["pid"]

    assert net.python("client", MANY, SERVER, name="many").wait(20) == 0
    until("the full table is told", lambda: "a table is full: " in degraded(net))
    assert not ping(net)
    net.change(timeouts={"udp": 1})
    net.reload()
    until("the sessions have ended", lambda: net.status()["sessions"] < 3)
    assert ping(net)

    full = Path(f"/proc/{pid}/root{state}/full")
    with pytest.raises(OSError, match="No space left"):
        full.write_bytes(bytes(2 << 20))
    until("the full disk is told", lambda: f"{state}: no space left" in degraded(net))
    full.unlink()
    server.ready(f"no longer degraded: {state}: no space left")

    files = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), files[1]))
    answers: list[object] = []
    operator = threading.Thread(target=lambda: answers.extend(api.ask(net.socket, {"show": "status"})))
    operator.start()
    server.ready("degraded: the system refuses what is needed: Too many open files")
    server.signal(signal.SIGHUP)
    server.ready("cannot be read: Too many open files")
    assert ping(net)
    assert not answers
    resource.prlimit(pid, resource.RLIMIT_NOFILE, files)
    operator.join(20)
    assert answers, "who waited is let in"

    memory = resource.prlimit(pid, resource.RLIMIT_AS)
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used + (20 << 20), memory[1]))
    net.change(pool={"addresses": "198.51.100.10-198.51.100.200"})
    said = net.reload(code=1)
    assert "no memory" in said
    assert "refused: nothing is changed" in said
    resource.prlimit(pid, resource.RLIMIT_AS, memory)
    assert ping(net)
    assert "1 change is applied" in net.reload()
    assert "Traceback" not in server.output
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0


def test_what_is_refused_at_the_start_is_one_line(net: Changing) -> None:
    before = net.state()
    net.change(max_sessions=16_000_000)
    command = server_command(net.file)
    refused = net.nat.attempt("prlimit", f"--as={1 << 30}", *command)
    assert refused.returncode == 1
    assert "no memory for max_sessions 16000000: " in refused.stderr
    assert "Traceback" not in refused.stderr

    net.change(max_sessions=1000)
    state = net.lab.directory / "state"
    state.mkdir()
    script = f"mount -t tmpfs -o size=4k none {state} && echo > {state}/full && exec {shlex.join(command)}"
    refused = net.nat.attempt("env", f"TANDEM_NAT_STATE={state}", "sh", "-c", script)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].endswith("No space left on device")
    assert "Traceback" not in refused.stderr
    assert net.state() == before


def test_a_wall_clock_that_jumps_changes_nothing(net: Changing) -> None:
    source, shim = net.lab.directory / "clock.c", net.lab.directory / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source], check=True)
    server = net.begin(net.file, command=["env", f"LD_PRELOAD={shim}", *server_command(net.file)])
    assert all(ping(net) for _ in range(3))
    net.change(timeouts={"icmp": 1000})
    server.signal(signal.SIGHUP)
    server.ready("reload: 1 change is applied")
    rows = net.sessions(protocol="icmp")
    assert len(rows) == 3
    assert all(0 <= row["idle"] <= row["age"] < 30 for row in rows)
    assert net.status()["uptime"] < 30
    epoch = int(rows[0]["id"], 16) >> 32 & 0xFFFFF
    assert (int(time.time()) - epoch) % (1 << 20) > 1000, "the clock did not jump"
    assert degraded(net) == ""
