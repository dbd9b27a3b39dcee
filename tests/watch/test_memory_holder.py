# SPDX-License-Identifier: Apache-2.0
"""The process that shares our memory: it lets sockets close at once, and is otherwise not there."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nat_fastpath.watch import MemoryHolder, hold_memory

from .helpers import ROOT, until

PR_SET_CHILD_SUBREAPER = 36

CHILD = """
import json, mmap, os, socket, sys
from nat_fastpath.watch import hold_memory

memory = mmap.mmap(-1, 64 << 20)
for page in range(0, len(memory), 4096):
    memory[page] = 1
holder = hold_memory()
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(json.dumps({"pid": holder.pid, "alive": holder.alive}).encode())
connection.recv(1)
"""


@pytest.fixture
def holder() -> Iterator[MemoryHolder]:
    held = hold_memory()
    yield held
    held.close()


@pytest.fixture
def reaper() -> Iterator[None]:
    """Orphans come to this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


@pytest.mark.usefixtures("reaper")
def test_kill_closes_the_connection_and_ends_the_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(server.getsockname()[1])], cwd=ROOT)
        connection, _ = server.accept()
        with connection:
            holder = json.loads(connection.recv(1000))
            assert holder["alive"]
            assert int(status(holder["pid"])["VmRSS"].split()[0]) >= 64 << 10
            process.kill()
            assert connection.recv(1) == b""
        assert process.wait() == -signal.SIGKILL
        # An orphan now, and ours: it ends by itself.
        assert os.waitpid(holder["pid"], 0)[1] == 0
    assert not Path(f"/proc/{holder['pid']}").exists()


def test_it_holds_memory_and_nothing_else(holder: MemoryHolder) -> None:
    found = status(holder.pid)
    assert found["Name"] == "nat-memory"
    assert found["Threads"] == "1"
    assert found["PPid"] == str(os.getpid())
    assert abs(int(found["VmRSS"].split()[0]) - int(status(os.getpid())["VmRSS"].split()[0])) < 4096
    assert os.listdir(f"/proc/{holder.pid}/fd") == []


def test_it_hears_no_signal(holder: MemoryHolder) -> None:
    """Ctrl-C reaches the whole process group; Python's handlers must not run in there."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(holder.pid, number)
        assert holder.alive
        assert heard == []
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_waiting_for_any_child_never_meets_it(holder: MemoryHolder) -> None:
    children = subprocess.run(
        [sys.executable, "-c", "import os\nfrom nat_fastpath.watch import hold_memory\n"
         "held = hold_memory()\n"
         "try:\n    print(os.waitpid(-1, 0))\n"
         "except ChildProcessError:\n    print('no child', held.alive)\n"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert children.stdout == "no child True\n"
    assert subprocess.run(["true"], check=True).returncode == 0
    assert holder.alive


def test_close_ends_and_reaps_it() -> None:
    held = hold_memory()
    pid = held.pid
    held.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not held.alive
    held.close()


def test_a_dropped_object_ends_it() -> None:
    held = hold_memory()
    pid = held.pid
    del held
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_was_killed_is_noticed_and_reaped(holder: MemoryHolder) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: not holder.alive)
    pid = holder.pid
    holder.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_forked_child_does_not_end_it(holder: MemoryHolder) -> None:
    child = os.fork()
    if child == 0:
        holder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert holder.alive


def test_it_outlives_the_thread_that_made_it() -> None:
    """A killed process closes its files with its last thread, whichever that is; until then the memory must be held."""
    made: list[MemoryHolder] = []

    def elsewhere() -> None:
        made.append(hold_memory())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())
    (holder,) = made
    until(lambda: int(status(holder.pid)["ShdPnd"], 16) == 0)  # it has heard of that end
    assert holder.alive
    holder.close()
    assert not Path(f"/proc/{holder.pid}").exists()


def test_many_times() -> None:
    """Starting and ending it leaves nothing, also beside other children."""
    before = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("\n")
    for _ in range(100):
        held = hold_memory()
        assert held.alive
        held.close()
    after = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("\n")
    assert after[0] == before[0]
    assert after[1] <= before[1] + 3
