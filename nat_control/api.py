# SPDX-License-Identifier: Apache-2.0
"""The operator's socket: newline-delimited JSON over a unix socket that only its owner may open.

A request is one line, ``{"show": "sessions", "filter": {"internal": "10.0.0.0/24"}, "limit": 100}``. Sessions
come as pages, ``{"rows": [...]}`` lines and then ``{"end": {"rows": n, "cursor": c}}``; ``cursor`` in a next
request goes on from there, 0 means that there is no more. Without a ``limit``, or with 0, all are sent. Everything
else is one line, ``{"status": {...}}``. A mistake is answered with ``{"error": "one line"}``.

With ``"format": "binary"`` sessions come as they are in memory: a line ``{"dtype": {...}}`` that numpy makes a dtype
of, then for each page ``{"records": {"rows": n, "bytes": b, "lost": 0}}`` and b bytes behind that line. Events come so
too, for a request ``{"events": {}}``; they, and the rows of ``{"trace": {...}}``, go on until the client says
anything, or goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nat_fastpath.engine import FLAG_FOREIGN, FLAG_INBOUND, FLAG_OFFLOAD, FLAG_PENDING, TCP_STATES

Records = np.ndarray[Any, np.dtype[np.void]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Pages = Callable[[int, int], tuple[Records, int]]  # Core.sessions
P = ParamSpec("P")
T = TypeVar("T")

REQUEST_BYTES = 65536
CLIENTS = 16
PATIENCE = 30.0  # seconds: for a request to come, and for a client to read on
PAGE = 4096  # records gathered by one command
ROWS = 512  # rows formatted in one go: some milliseconds

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
STATES = {name: index for index, name in enumerate(TCP_STATES) if index}  # 0: no TCP
FLAGS = {
    FLAG_PENDING: "pending",
    FLAG_FOREIGN: "foreign",
    FLAG_INBOUND: "inbound",
    FLAG_OFFLOAD: "offload",
}
SIDES = ("internal", "external", "remote")
FILTERS = (*SIDES, "port", "protocol", "state", "older", "idle")


class ApiError(Exception):
    """One line for the operator."""


def count(n: int, what: str) -> str:
    """ "1 mapping", "2 mappings"."""
    return f"{n} {what}{'s' * (n != 1)}"


# -- filters ----------------------------------------------------------------------------------------------


def _number(key: str, value: object, low: float, high: float) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(f"{key}: {value!r} is not a number from {low:.0f} to {high:.0f}")
    return value


def _choice(key: str, value: object, allowed: Mapping[str, int]) -> int:
    found = allowed.get(value) if isinstance(value, str) else None
    if found is None:
        raise ApiError(f"{key}: {value!r} is none of {', '.join(allowed)}")
    return found


def parse_endpoint(key: str, value: object) -> tuple[int, int, int | None]:
    """(address, mask, port) of "10.0.0.0/24", "10.0.0.5", "10.0.0.5:80" or ":80"."""
    text, colon, port = str(value).partition(":")
    number = None
    if colon:
        if not port.isdecimal() or int(port) > 65535:
            raise ApiError(f"{key}: {port!r} is no port")
        number = int(port)
    try:
        network = IPv4Network(text or "0.0.0.0/0", strict=False)
    except ValueError:
        raise ApiError(f"{key}: {value!r} is not ADDRESS, ADDRESS:PORT or NETWORK/LENGTH") from None
    return int(network.network_address), int(network.netmask), number


def _from(side: str, address: int, mask: int, records: Records) -> Mask:
    return np.asarray(records[f"{side}_addr"] & np.uint32(mask) == address)


def _equal(sides: tuple[str, ...], port: int, records: Records) -> Mask:
    return np.asarray(np.any([records[f"{side}_port"] == port for side in sides], axis=0))


def _is(field: str, value: int, records: Records) -> Mask:
    return np.asarray(records[field] == value)


def _at_least(field: str, value: int, records: Records) -> Mask:
    return np.asarray(records[field] >= value)


def parse_filter(wanted: object) -> Callable[[Records], Mask]:
    """A function from records to the mask of those that match all of ``wanted``.

    Keys: internal, external, remote ("10.0.0.0/24", "10.0.0.5:80", ":80"), port (of any side), protocol,
    state (of TCP), older and idle (seconds at least). Raises ApiError for anything else.
    """
    if not isinstance(wanted, dict):
        raise ApiError("filter: not an object")
    tests: list[Callable[[Records], Mask]] = []
    for key, value in wanted.items():
        if key in SIDES:
            address, mask, port = parse_endpoint(key, value)
            tests.append(partial(_from, key, address, mask))
            if port is not None:
                tests.append(partial(_equal, (key,), port))
        elif key == "port":
            tests.append(partial(_equal, SIDES, int(_number(key, value, 0, 65535))))
        elif key == "protocol":
            tests.append(partial(_is, "protocol", _choice(key, value, PROTOCOLS)))
        elif key == "state":
            tests.append(partial(_is, "tcp_state", _choice(key, value, STATES)))
        elif key in ("older", "idle"):
            least = int(_number(key, value, 0, 4_000_000) * 1000)
            tests.append(partial(_at_least, "age_ms" if key == "older" else "idle_ms", least))
        else:
            raise ApiError(f"filter: unknown key {key!r}; there are {', '.join(FILTERS)}")

    def mask_of(records: Records) -> Mask:
        mask = np.ones(len(records), bool)
        for test in tests:
            mask &= test(records)
        return mask

    return mask_of


def rows_of(records: Records) -> list[dict[str, Any]]:
    """Sessions as an operator reads them; times in seconds."""
    columns = {name: records[name].tolist() for name in records.dtype.names or ()}
    rows = []
    for i in range(len(records)):
        flags = columns["flags"][i]
        tcp = columns["protocol"][i] == 6
        rows.append(
            {
                "id": f"{columns['id'][i]:016x}",
                "protocol": PROTOCOL_NAMES.get(columns["protocol"][i], str(columns["protocol"][i])),
                **{
                    side: f"{IPv4Address(columns[f'{side}_addr'][i])}:{columns[f'{side}_port'][i]}"
                    for side in SIDES
                },
                "state": TCP_STATES[columns["tcp_state"][i]] if tcp else "",
                "age": columns["age_ms"][i] / 1000,
                "idle": columns["idle_ms"][i] / 1000,
                "timeout": columns["timeout_ms"][i] / 1000,
                "packets_out": columns["packets_out"][i],
                "packets_in": columns["packets_in"][i],
                "bytes_out": columns["bytes_out"][i],
                "bytes_in": columns["bytes_in"][i],
                "flags": [name for bit, name in FLAGS.items() if flags & bit],
            }
        )
    return rows


# -- the server -------------------------------------------------------------------------------------------


class Conversation:
    """One client, for the verbs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, threads: bool) -> None:
        self._reader = reader
        self._writer = writer
        self._threads = threads

    async def run(self, command: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """What may have to wait for the core's owner."""
        if self._threads:
            return await asyncio.to_thread(command, *arguments, **options)
        return command(*arguments, **options)

    async def send(self, message: Mapping[str, Any], data: bytes = b"") -> None:
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        if data:
            self._writer.write(data)
        async with asyncio.timeout(PATIENCE):
            await self._writer.drain()
        await asyncio.sleep(0)  # drain() returns at once while the client reads fast

    async def send_dtype(self, dtype: np.dtype[np.void]) -> None:
        assert dtype.names
        fields = [(name, *dtype.fields[name][:2]) for name in dtype.names] if dtype.fields else []
        told = {
            "names": [name for name, _, _ in fields],
            "formats": [kind.str for _, kind, _ in fields],
            "offsets": [offset for _, _, offset in fields],
            "itemsize": dtype.itemsize,
        }
        await self.send({"dtype": told})

    async def send_records(self, records: Records, lost: int = 0) -> None:
        data = records.tobytes()
        await self.send({"records": {"rows": len(records), "bytes": len(data), "lost": lost}}, data)

    @contextlib.asynccontextmanager
    async def until_gone(self) -> AsyncIterator[asyncio.Future[bytes]]:
        """A future that is done when the client says anything, or goes away."""
        gone = asyncio.ensure_future(self._reader.read(1024))
        try:
            yield gone
        finally:
            if not gone.done():
                gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)


Verb = Callable[[object, Conversation], Awaitable[None]]


class Api:
    """Answers operators. ``answers`` maps what can be shown to functions that may take a while, ``sessions`` is
    ``Core.sessions``, ``verbs`` are other requests than "show". ``threads``: all these wait for a worker, so they run
    in threads; a core that belongs to the loop's own thread must not be asked from others."""

    def __init__(
        self,
        answers: Mapping[str, Callable[[], Mapping[str, Any]]],
        sessions: Pages,
        verbs: Mapping[str, Verb] | None = None,
        *,
        threads: bool = True,
    ) -> None:
        self._answers = answers
        self._sessions = sessions
        self._verbs = verbs or {}
        self._threads = threads
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._path: Path | None = None

    async def start(self, path: Path) -> None:
        """Listens at ``path``. Raises ApiError when another process does, or the place cannot be used."""
        listener = _bind(path)
        self._path = path
        self._server = await asyncio.start_unix_server(self._client, sock=listener, limit=REQUEST_BYTES)

    async def close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._server = None

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            conversation = Conversation(reader, writer, threads=self._threads)
            if len(self._clients) > CLIENTS:
                await conversation.send({"error": f"too many clients, {CLIENTS} at most: try again later"})
            else:
                await self._serve(conversation, reader)
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            pass  # gone, asleep, or we end
        finally:
            self._clients.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _serve(self, conversation: Conversation, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                async with asyncio.timeout(PATIENCE):
                    line = await reader.readline()
            except ValueError:
                await conversation.send({"error": f"request longer than {REQUEST_BYTES} bytes"})
                return
            if not line:
                return
            try:
                await self._answer(_request(line), conversation)
            except ApiError as error:
                await conversation.send({"error": str(error)})
            except TimeoutError as error:
                if not str(error):  # the client's, not the worker's
                    raise
                await conversation.send({"error": str(error)})
            except (MemoryError, RuntimeError) as error:  # no memory or thread for the answer, or we end
                await conversation.send({"error": str(error) or "no memory for the answer"})

    async def _answer(self, request: dict[str, Any], conversation: Conversation) -> None:
        for verb in self._verbs:
            if set(request) == {verb}:
                return await self._verbs[verb](request[verb], conversation)
        what = request.get("show")
        allowed = {"show", "filter", "limit", "cursor", "format"} if what == "sessions" else {"show"}
        if unknown := sorted(set(request) - allowed):
            raise ApiError(f"unknown key {unknown[0]!r}; there are {', '.join(sorted(allowed))}")
        if what == "sessions":
            await self._stream(request, conversation)
        elif isinstance(what, str) and what in self._answers:
            await conversation.send({what: await conversation.run(self._answers[what])})
        else:
            raise ApiError(f"show: {what!r} is none of {', '.join([*self._answers, 'sessions'])}")
        return None

    async def _stream(self, request: dict[str, Any], conversation: Conversation) -> None:
        matches = parse_filter(request.get("filter", {}))
        left = int(_number("limit", request.get("limit", 0), 0, 2**32)) or 2**32  # 0: all
        cursor = int(_number("cursor", request.get("cursor", 0), 0, 2**63))
        binary = _choice("format", request.get("format", "rows"), {"rows": 0, "binary": 1})
        sent = 0
        while left:
            records, following = await conversation.run(self._sessions, cursor, PAGE)
            if binary == 1:
                binary = 2  # told once
                await conversation.send_dtype(records.dtype)
            found = np.flatnonzero(matches(records))
            if len(found) > left:
                # Taken again up to the last row that is wanted, so that the cursor stands right behind it.
                records, following = await conversation.run(self._sessions, cursor, int(found[left - 1]) + 1)
                found = np.flatnonzero(matches(records))[:left]
            if binary:
                await conversation.send_records(records[found])
            else:
                for first in range(0, len(found), ROWS):
                    await conversation.send({"rows": rows_of(records[found[first : first + ROWS]])})
            sent += len(found)
            left -= len(found)
            cursor = following
            if not cursor:
                break
        await conversation.send({"end": {"rows": sent, "cursor": cursor}})


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise ApiError("a request is one line of JSON") from None
    if not isinstance(request, dict):
        raise ApiError("a request is a JSON object")
    return request


def _bind(path: Path) -> socket.socket:
    """A listening socket at ``path``, never open to others, not even for a moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _answers(path):
            raise ApiError(f"{path}: another server listens there; stop it, or set control.socket")
        if path.is_socket():
            path.unlink()  # of a process that died
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(mask)
        listener.listen(CLIENTS)
    except OSError as error:
        # "AF_UNIX path too long" comes without an errno
        raise ApiError(f"control.socket {path}: {error.strerror or error}") from None
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True
        except OSError as error:
            if isinstance(error, ConnectionRefusedError | FileNotFoundError):
                return False
            raise
        return True


# -- the client -------------------------------------------------------------------------------------------


class NotRunning(Exception):
    """Nobody answers at the socket; the message says which, and why."""


def connection(path: Path, timeout: float) -> socket.socket:
    """A connection to who listens at ``path``; raises NotRunning with the reason when there is none."""
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(timeout)
    try:
        made.connect(str(path))
    except OSError as error:
        made.close()
        raise not_running(path, error) from None
    return made


def not_running(path: Path, error: OSError) -> NotRunning:
    if isinstance(error, PermissionError):
        return NotRunning(f"{path}: permission denied; the socket is its owner's (root's): use sudo")
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return NotRunning(f"{path}: no server is running there; start one with `tandem-nat server`")
    return NotRunning(f"{path}: {error.strerror or error or 'no answer'}")


def ask(path: Path, request: Mapping[str, Any], timeout: float = 30) -> Iterator[dict[str, Any]]:
    """Sends one request; yields the lines of the answer, the last of which has no "rows".

    Raises NotRunning when nobody answers, ApiError with the server's own words when it refuses.
    """
    with connection(path, timeout) as opened:
        try:
            # A server that refuses us has closed already, perhaps; why, can be read all the same.
            with contextlib.suppress(BrokenPipeError):
                opened.sendall(json.dumps(request).encode() + b"\n")
            with opened.makefile("rb") as lines:
                for line in lines:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise ApiError(answer["error"])
                    yield answer
                    if "rows" not in answer:
                        return
        except OSError as error:
            raise not_running(path, error) from None
    raise NotRunning(f"{path}: the server ended in the middle of its answer")
