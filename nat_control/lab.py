# SPDX-License-Identifier: Apache-2.0
"""Networks in namespaces, for the demo and the tests: made, used, and taken away whatever happens.

A lab's namespaces are called ``tandem-<pid>-<n>-<name>``, so that a later lab finds and removes what a
killed one left behind. A kept lab (the demo's ``--keep``) is called ``tandem-kept-<name>`` and stays until
``end_kept``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

T = TypeVar("T")

PREFIX = "tandem-"
KEPT = "kept"
_OWN = re.compile(r"(\d+)-(\d+)")  # pid and serial number
_serial = itertools.count(1)
_living: set[str] = set()  # tags of this process's labs
PATIENCE = 3.0  # seconds that a process gets between SIGTERM and SIGKILL


class LabError(Exception):
    """One line: what could not be done, and the tool's own words."""


def _ip(*arguments: str) -> str:
    return call(["ip", *arguments])


def call(argv: Sequence[str], timeout: float = 30) -> str:
    """Runs a command; returns its output. Raises LabError with the command's own error."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise LabError(f"{argv[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(argv)}: no end after {timeout:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().replace("\n", "; ")
        raise LabError(f"{' '.join(argv)}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def until(what: str, probe: Callable[[], T], timeout: float = 10, interval: float = 0.02) -> T:
    """Asks ``probe`` until its answer is true, and returns that. Raises LabError after ``timeout`` s."""
    end = time.monotonic() + timeout
    while True:
        if answer := probe():
            return answer
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {timeout:g} s")
        time.sleep(interval)


class Process:
    """A program in a namespace, in a session of its own so that Ctrl-C at the terminal reaches only us."""

    def __init__(self, argv: Sequence[str], log: Path, *, follow: bool) -> None:
        self.log = log
        # A killed lab takes its processes along; a kept one must outlive us.
        guard = ["setpriv", "--pdeathsig", "SIGKILL"] if follow else []
        with log.open("wb") as out:
            self.popen = subprocess.Popen(
                [*guard, *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self.pid = self.popen.pid  # setpriv and `ip netns exec` both exec, so this is the program's own

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def wait(self, timeout: float) -> int:
        """The exit code. Raises LabError when it has not ended after ``timeout`` seconds."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.log.stem} has not ended after {timeout:g} s: {self.last_line}") from None

    def signal(self, number: int) -> None:
        if self.alive:
            self.popen.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that is not enough; the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait()

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def ready(self, text: str, timeout: float = 10) -> Process:
        """Waits until its output contains ``text``. Raises LabError with its last line if it ends before."""

        def probe() -> bool:
            if text in self.output:
                return True
            if not self.alive:
                raise LabError(f"{self.log.stem} ended with code {self.popen.returncode}: {self.last_line}")
            return False

        until(f"{self.log.stem}: {text!r}", probe, timeout)
        return self


class Namespace:
    """A network namespace of a lab."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.full_name = f"{PREFIX}{lab.tag}-{name}"
        _ip("netns", "add", self.full_name)
        lab.at_end(lambda: _remove(self.full_name))
        self.ip("link", "set", "lo", "up")
        # Router solicitations and the like would only blur the counters.
        with contextlib.suppress(LabError):
            self.run(
                "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"
            )

    def ip(self, *arguments: str) -> str:
        return _ip("-n", self.full_name, *arguments)

    def address(self, device: str, *addresses: str) -> None:
        """Gives ``device`` its addresses ("10.0.0.2/24") and sets it up."""
        for address in addresses:
            self.ip("address", "add", address, "dev", device)
        self.ip("link", "set", device, "up")

    def route(self, prefix: str, gateway: str) -> None:
        self.ip("route", "add", prefix, "via", gateway)

    def command(self, *argv: str) -> list[str]:
        """What runs ``argv`` in here."""
        return ["ip", "netns", "exec", self.full_name, *argv]

    def run(self, *argv: str, timeout: float = 30) -> str:
        return call(self.command(*argv), timeout)

    def attempt(self, *argv: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Runs a command that may fail. Raises LabError only when it does not end."""
        try:
            return subprocess.run(
                self.command(*argv), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(argv)}: no end after {timeout:g} s") from None

    def start(self, *argv: str, name: str = "") -> Process:
        """Starts a program; it is ended with the lab. Its output goes to a log in the lab's directory."""
        log = self.lab.directory / f"{name or Path(argv[0]).name}-{next(_serial)}.log"
        process = Process(self.command(*argv), log, follow=not self.lab.kept)
        self.lab.processes.append(process)
        self.lab.at_end(process.stop)
        return process


class Lab:
    """Namespaces, cables and processes; a context manager that undoes them in reverse order.

    With ``kept`` it stays when left without an exception, and ``end_kept`` removes it.
    Raises LabError without root, or when a kept lab exists already.
    """

    def __init__(self, *, kept: bool = False) -> None:
        self.kept = kept
        self.tag = KEPT if kept else f"{os.getpid()}-{next(_serial)}"
        self.directory = _directory(self.tag)
        self.processes: list[Process] = []
        self._undo = contextlib.ExitStack()
        self._signals: dict[int, object] = {}

    def __enter__(self) -> Lab:
        if os.geteuid():
            raise LabError("network namespaces need root: try again with sudo")
        sweep()
        if self.kept and (self.directory.exists() or _namespaces(KEPT)):
            raise LabError("a kept demo exists already; `tandem-nat demo --stop` ends it")
        _living.add(self.tag)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._signals[number] = signal.signal(number, _leave)
        try:
            self.directory.mkdir(mode=0o755)
        except OSError as error:
            self._end()
            raise LabError(f"{self.directory}: {error.strerror}") from None
        self.at_end(lambda: shutil.rmtree(self.directory, ignore_errors=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.kept and kind is None:
            self._undo.pop_all()
        self._end()

    def _end(self) -> None:
        # A second Ctrl-C must not leave half of it behind.
        with _deaf():
            self._undo.close()
        _living.discard(self.tag)
        for number, handler in self._signals.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def at_end(self, undo: Callable[[], object]) -> None:
        def quietly() -> None:
            with contextlib.suppress(LabError):
                undo()

        self._undo.callback(quietly)

    def namespace(self, name: str) -> Namespace:
        return Namespace(self, name)

    def cable(self, one: Namespace, one_device: str, other: Namespace, other_device: str) -> None:
        """A veth pair between two namespaces, both ends up."""
        _ip(
            *("link", "add", one_device, "netns", one.full_name, "type", "veth"),
            *("peer", "name", other_device, "netns", other.full_name),
        )
        one.ip("link", "set", one_device, "up")
        other.ip("link", "set", other_device, "up")


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _directory(tag: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{PREFIX}lab-{tag}"


def _namespaces(tag: str = "") -> list[str]:
    """Full names of all labs' namespaces, or of one's."""
    try:
        names = os.listdir("/run/netns")
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name.startswith(f"{PREFIX}{tag}-" if tag else PREFIX))


def _remove(full_name: str) -> None:
    """Ends what still runs in a namespace, and deletes it."""
    for pid in _ip("netns", "pids", full_name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "delete", full_name)


def _remove_lab(tag: str) -> list[str]:
    removed = _namespaces(tag)
    for name in removed:
        with contextlib.suppress(LabError):
            _remove(name)
    directory = _directory(tag)
    # Not through a link, and nobody else's: the place is open to all users.
    if directory.is_dir() and not directory.is_symlink() and directory.stat().st_uid == os.geteuid():
        shutil.rmtree(directory, ignore_errors=True)
        removed.append(str(directory))
    return removed


def leftovers(pid: int) -> list[str]:
    """Namespaces and directories of the labs of process ``pid``."""
    here = Path(tempfile.gettempdir())
    return [*_namespaces(str(pid)), *(str(path) for path in here.glob(f"{PREFIX}lab-{pid}-*"))]


def sweep() -> list[str]:
    """Removes what labs of killed processes left; returns the names."""
    found = [name.removeprefix(PREFIX) for name in _namespaces()]
    found += [
        path.name.removeprefix(f"{PREFIX}lab-") for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}lab-*")
    ]
    tags = {(match[0], int(match[1])) for match in map(_OWN.match, found) if match}
    removed = []
    for tag, pid in sorted(tags):
        dead = tag not in _living if pid == os.getpid() else not Path(f"/proc/{pid}").exists()
        if dead:
            removed += _remove_lab(tag)
    return removed


def end_kept() -> list[str]:
    """Ends the kept lab; returns what was removed, empty if there was none.

    Its processes are asked first, so that the NAT puts its interfaces back.
    """
    if os.geteuid() and _namespaces(KEPT):
        raise LabError("a kept demo is root's: try again with sudo")
    pids = [int(pid) for name in _namespaces(KEPT) for pid in _ip("netns", "pids", name).split()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(LabError):
        until(
            "end of the kept demo", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), PATIENCE
        )
    return _remove_lab(KEPT)
