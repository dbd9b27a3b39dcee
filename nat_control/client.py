# SPDX-License-Identifier: Apache-2.0
"""A running NAT for people's own scripts: its figures, its sessions as numpy records, its events as they happen.

    from nat_control.client import connect

    nat = connect()  # or connect(socket="/run/tandem-nat/nat.sock"), connect(config="nat.yaml")
    sessions = nat.sessions(protocol="tcp", state="established")
    print(len(sessions), sessions["bytes_in"].sum())

docs/python.md tells more. A Client may be used by several threads: each call has a connection of its own.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from nat_control import config as configuration
from nat_control.api import ApiError, NotRunning, connection

__all__ = [
    "ApiError",
    "Client",
    "EventStream",
    "Filters",
    "NotRunning",
    "SessionPages",
    "connect",
    "find_socket",
]

Records = np.ndarray[Any, np.dtype[np.void]]
RUN = Path("/run/tandem-nat")
PATIENCE = 30.0  # seconds for an answer


class Filters(TypedDict, total=False):
    """Of sessions; all that are given must match."""

    internal: str  # "10.0.0.5", "10.0.0.5:80", "10.0.0.0/24", "10.0.0.0/24:80" or ":80"
    external: str
    remote: str
    port: int  # of any of the three
    protocol: str  # "icmp", "tcp" or "udp"
    state: str  # of TCP: "established"
    older: float  # seconds since it was opened
    idle: float  # seconds without a packet


class Flow(TypedDict, total=False):
    """Of packets; all that are given must match, and each is written as in Filters."""

    internal: str
    external: str
    remote: str
    protocol: str  # "icmp", "tcp" or "udp"


class More(TypedDict, total=False):
    """Of a packet to explain."""

    side: Literal["internal", "external"]  # where it comes from; without it, where its source address is
    flags: str  # of TCP, "SA"
    length: int  # of the IP packet
    ttl: int
    dont_fragment: bool


def find_socket(config: Path | None = None, path: Path | None = None) -> Path:
    """The socket that is named, that of a configuration, or the only one in /run/tandem-nat.

    Raises NotRunning when there is none, ApiError when there are several, ConfigError for a bad configuration.
    """
    if path:
        return path
    if config:
        return configuration.load(config).control.socket
    found = sorted(RUN.glob("*.sock"))
    if not found:
        raise NotRunning(f"no socket in {RUN}: no server is running; -c or --socket names one elsewhere")
    if len(found) > 1:
        raise ApiError(f"several servers: choose with --socket {' or '.join(map(str, found))}")
    return found[0]


def connect(
    socket: str | Path | None = None, config: str | Path | None = None, timeout: float = PATIENCE
) -> Client:
    """A Client of the server, or switch agent, at this socket or of this configuration; without either, of the only
    one in /run/tandem-nat. Raises NotRunning when it does not answer within ``timeout`` seconds.
    """
    path = find_socket(Path(config) if config else None, Path(socket) if socket else None)
    client = Client(path, timeout)
    client.status()
    return client


class _Connection:
    """One request and the lines, and records, of its answer."""

    def __init__(self, path: Path, request: Mapping[str, Any], timeout: float | None) -> None:
        self._path = path
        self._socket = connection(path, PATIENCE if timeout is None else timeout)
        self._lines: BufferedReader = self._socket.makefile("rb")
        self._dtype: np.dtype[np.void] | None = None
        with contextlib.suppress(BrokenPipeError):  # refused and closed already; why, can be read
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._socket.settimeout(timeout)

    def has_more(self, timeout: float | None) -> bool:
        """Waits until there is something to read, or an end; ``timeout`` in seconds."""
        if timeout is None:
            return True
        self._socket.setblocking(False)
        try:
            buffered = self._lines.peek(1)
        except OSError:
            return True  # an end, which the next look tells
        finally:
            self._socket.setblocking(True)
        return bool(buffered) or bool(select.select([self._socket], [], [], timeout)[0])

    def line(self) -> dict[str, Any]:
        """The next line. Raises ApiError with the server's words, NotRunning when it is gone."""
        try:
            text = self._lines.readline()
        except OSError as error:
            raise NotRunning(f"{self._path}: {error or 'no answer'}") from None
        if not text:
            raise NotRunning(f"{self._path}: the server ended in the middle of its answer")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise ApiError(answer["error"])
        return answer

    def records(self, of: Mapping[str, Any]) -> Records:
        """What stands behind a line "records"."""
        assert self._dtype is not None
        try:
            data = self._lines.read(of["bytes"])
        except OSError as error:
            raise NotRunning(f"{self._path}: {error or 'no answer'}") from None
        if len(data) < of["bytes"]:
            raise NotRunning(f"{self._path}: the server ended in the middle of its answer")
        return np.frombuffer(bytearray(data), self._dtype)  # so that it can be written to

    def next_records(self) -> tuple[Records | None, dict[str, Any]]:
        """The next records and their line; None and the last line at the end."""
        while True:
            answer = self.line()
            if "dtype" in answer:
                self._dtype = np.dtype(answer["dtype"])
            elif "records" in answer:
                return self.records(answer["records"]), answer["records"]
            else:
                return None, answer

    def interrupt(self) -> None:
        """Whoever reads in another thread is told that it is over."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def closed(self) -> bool:
        return self._lines.closed

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class SessionPages(Iterator[Records]):
    """Pages of sessions; ``cursor`` is where a next call goes on after the last page, 0 when there are no more."""

    def __init__(self, path: Path, request: Mapping[str, Any], timeout: float) -> None:
        self._connection = _Connection(path, request, timeout)
        self.cursor = 0
        self.rows = 0

    def __next__(self) -> Records:
        if self._connection.closed:
            raise StopIteration
        try:
            records, line = self._connection.next_records()
        except BaseException:
            self.close()
            raise
        if records is None:
            self.cursor = line["end"]["cursor"]
            self.close()
            raise StopIteration
        self.rows += len(records)
        return records

    def close(self) -> None:
        """For whoever reads no further; the last page does it, too."""
        self._connection.close()


class EventStream(Iterator[Records]):
    """Events from the moment on when it was made: arrays of shape (n,), dtype EVENT, as they happen.

    ``lost`` counts those that were thrown away because this reader was too slow: the server keeps 65 536 for it, and
    never waits. ``events["sequence"]`` counts by one, so a gap shows where. Ends at ``close``, from any thread, and
    raises NotRunning when the server ends, and TimeoutError when nothing happens for ``timeout`` seconds: the next call
    waits again.
    """

    def __init__(self, path: Path, timeout: float | None) -> None:
        self._connection = _Connection(path, {"events": {}}, None)
        self._timeout = timeout
        try:
            self._connection._dtype = np.dtype(self._connection.line()["dtype"])
        except BaseException:
            self._connection.close()
            raise
        self._closed = False
        self.lost = 0

    def __next__(self) -> Records:
        if self._connection.closed:
            raise StopIteration
        try:
            if not self._connection.has_more(self._timeout):
                raise TimeoutError(f"no event for {self._timeout} seconds")
            records, line = self._connection.next_records()
        except NotRunning:
            if self._closed:
                raise StopIteration from None
            raise
        if records is None:
            raise StopIteration
        self.lost += line["lost"]
        return records

    def close(self) -> None:
        self._closed = True
        self._connection.interrupt()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._connection.close()


class Client:
    """A server, or switch agent, at ``path``. Raises NotRunning when it does not answer, ApiError when it refuses."""

    def __init__(self, path: Path, timeout: float = PATIENCE) -> None:
        self.path = path
        self.timeout = timeout

    def show(self, what: str) -> dict[str, Any]:
        """The answer to "status", "stats", "hosts", "pool" or "ports"."""
        answer: dict[str, Any] = self._ask({"show": what})[what]
        return answer

    def status(self) -> dict[str, Any]:
        """What `show status` says."""
        return self.show("status")

    def stats(self) -> dict[str, Any]:
        """Packets by verdict, and all counters."""
        return self.show("stats")

    def sessions(self, **filters: Unpack[Filters]) -> Records:
        """Sessions as one array, shape (n,), dtype RECORD."""
        pages = list(self.session_pages(**filters))
        return np.concatenate(pages) if len(pages) > 1 else pages[0]

    def session_pages(self, *, limit: int = 0, cursor: int = 0, **filters: Unpack[Filters]) -> SessionPages:
        """The same in pages, at most ``limit`` in all (0: no limit), going on at ``cursor``."""
        request = {
            "show": "sessions",
            "format": "binary",
            "filter": filters,
            "limit": limit,
            "cursor": cursor,
        }
        return SessionPages(self.path, request, self.timeout)

    def events(self, timeout: float | None = None) -> EventStream:
        """Sessions that open, change or close from now on. ``timeout``: seconds without an event after which
        TimeoutError is raised, and one may go on; None waits for ever."""
        return EventStream(self.path, timeout)

    def explain(
        self, source: str, destination: str, protocol: str = "udp", **more: Unpack[More]
    ) -> dict[str, Any]:
        """What would happen to a packet from ``source`` ("10.0.0.7:5000") to ``destination``, and why."""
        asked = {"source": source, "destination": destination, "protocol": protocol, **more}
        if "side" in asked:
            asked["from"] = asked.pop("side")
        answer: dict[str, Any] = self._ask({"explain": asked})["explain"]
        return answer

    def trace(
        self, *, packets: int = 20, seconds: float = 10, **flow: Unpack[Flow]
    ) -> Iterator[dict[str, Any]]:
        """The decisions for the next packets of a flow, one dict each.
        Raises ApiError when another trace runs."""
        request = {"trace": {"packets": packets, "seconds": seconds, **flow}}
        for answer in self.trace_lines(request):
            yield from answer.get("rows", ())

    def trace_lines(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of a trace as they come; the last one has "end"."""
        with contextlib.closing(_Connection(self.path, request, None)) as opened:
            while True:
                answer = opened.line()
                yield answer
                if "end" in answer:
                    return

    def reload(self, *, drain: bool = False, force: bool = False, check: bool = False) -> dict[str, Any]:
        """The server reads its configuration again. ``result`` is "applied", "unchanged", "checked", "refused" or
        "invalid", ``lines`` says it for people; docs/cli.md has the rest."""
        asked = {"drain": drain, "force": force, "check": check}
        # without a bound: memory for thousands of addresses takes its time
        with contextlib.closing(_Connection(self.path, {"reload": asked}, None)) as opened:
            answer: dict[str, Any] = opened.line()["reload"]
        return answer

    def peer(self, *, verify: bool = True) -> dict[str, Any]:
        """State of the pair, both counts, what differs. ``verify``: compares now, some seconds at most; ``verified`` tells
        whether both were proven to hold the same."""
        answer: dict[str, Any] = self._ask({"peer": {"verify": verify}})["peer"]
        return answer

    def move(self, verb: str, **options: bool) -> dict[str, Any]:
        """Of a pair, by "takeover" or "release", with ``force`` or ``later``. ``result`` is "done", "unchanged", "later" or
        "refused", then with ``why``; docs/cli.md has the rest."""
        answer: dict[str, Any] = self._ask({verb: options})[verb]
        return answer

    def offload(
        self, what: Literal["add", "remove"], ids: Iterable[str] = (), **filters: Unpack[Filters]
    ) -> dict[str, Any]:
        """Sessions of these ids, that match, are carried by the peer's switch from now on, or by the server again. Of the
        answer ``moved`` are ids, ``refused`` ids and why. Raises ApiError when there is no such session, or no peer."""
        asked = {"ids": list(ids), "filter": filters}
        answer: dict[str, Any] = self._ask({"offload": {what: asked}})["offload"]
        return answer

    def offloaded(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The sessions that the switch carries in front of the server, and how many there are and may be."""
        rows: list[dict[str, Any]] = []
        with contextlib.closing(_Connection(self.path, {"offload": {"list": {}}}, self.timeout)) as opened:
            while "offload" not in (answer := opened.line()):
                rows += answer["rows"]
        return rows, answer["offload"]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.closing(_Connection(self.path, request, self.timeout)) as opened:
            return opened.line()
