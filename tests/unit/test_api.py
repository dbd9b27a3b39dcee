# SPDX-License-Identifier: Apache-2.0
"""The operator's socket: filters, pages, limits, and clients that misbehave."""

import asyncio
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path

import numpy as np
import pytest

from nat_control import api
from nat_fastpath.engine import FLAG_INBOUND, RECORD, TCP_STATES


def address(text: str) -> int:
    return int(IPv4Address(text))


def records(n: int) -> np.ndarray:
    """``n`` sessions: hosts 10.0.0.0 + i, external ports 1024 + i, every third one TCP, age i seconds."""
    made = np.zeros(n, RECORD)
    i = np.arange(n)
    made["id"] = i + 1
    made["internal_addr"] = address("10.0.0.0") + i
    made["internal_port"] = 5000
    made["external_addr"] = address("198.51.100.10")
    made["external_port"] = 1024 + i % 60000
    made["remote_addr"] = address("203.0.113.7")
    made["remote_port"] = np.where(i % 2, 53, 80)
    made["protocol"] = np.where(i % 3, 17, 6)
    made["tcp_state"] = np.where(i % 3, 0, TCP_STATES.index("established"))
    made["age_ms"] = i * 1000
    made["idle_ms"] = i * 10
    return made


def pages(table: np.ndarray) -> api.Pages:
    def page(cursor: int, maximum: int) -> tuple[np.ndarray, int]:
        end = cursor + maximum
        return table[cursor:end], end if end < len(table) else 0

    return page


@asynccontextmanager
async def serving(path: Path, sessions: api.Pages) -> AsyncIterator[api.Api]:
    server = api.Api({"status": lambda: {"instance": "one"}}, sessions)
    await server.start(path)
    try:
        yield server
    finally:
        await server.close()


def talk(path: Path, table: np.ndarray, conversation: Callable[[], object]) -> object:
    """Runs a blocking client beside the server, each in its own thread."""

    async def both() -> object:
        async with serving(path, pages(table)):
            return await asyncio.to_thread(conversation)

    return asyncio.run(both())


def run(path: Path, table: np.ndarray, conversation: Callable[[], Awaitable[None]]) -> None:
    async def both() -> None:
        async with serving(path, pages(table)):
            await conversation()

    asyncio.run(both())


def show(path: Path, **request: object) -> tuple[list[dict], dict]:
    *parts, last = list(api.ask(path, {"show": "sessions", **request}))
    return [row for part in parts for row in part["rows"]], last["end"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "nat.sock"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, range(9)),
        ({"internal": "10.0.0.4"}, [4]),
        ({"internal": "10.0.0.4/31"}, [4, 5]),
        ({"internal": "10.0.0.4:5000"}, [4]),
        ({"internal": "10.0.0.4:5001"}, []),
        ({"external": ":1026"}, [2]),
        ({"remote": "203.0.113.0/24:53"}, [1, 3, 5, 7]),
        ({"port": 80}, [0, 2, 4, 6, 8]),
        ({"port": "1025"}, [1]),
        ({"protocol": "tcp"}, [0, 3, 6]),
        ({"state": "established", "port": 53}, [3]),
        ({"state": "syn_out"}, []),
        ({"older": 7}, [7, 8]),
        ({"idle": "0.07"}, [7, 8]),
    ],
)
def test_a_filter_selects(wanted: dict, expected: list[int]) -> None:
    mask = api.parse_filter(wanted)(records(9))
    assert np.flatnonzero(mask).tolist() == list(expected)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"internal": "10.0.0"}, "internal: '10.0.0' is not ADDRESS"),
        ({"remote": "10.0.0.1:http"}, "remote: 'http' is no port"),
        ({"remote": ":65536"}, "remote: '65536' is no port"),
        ({"port": -1}, "port: -1 is not a number from 0 to 65535"),
        ({"port": True}, "port: True is not a number"),
        ({"older": "nan"}, "older: nan is not a number"),
        ({"idle": None}, "idle: None is not a number"),
        ({"protocol": "sctp"}, "protocol: 'sctp' is none of icmp, tcp, udp"),
        ({"state": []}, "state: [] is none of syn_out"),
        ({"inside": "10.0.0.1"}, "filter: unknown key 'inside'; there are internal"),
        ([], "filter: not an object"),
    ],
)
def test_a_wrong_filter_is_one_clear_line(wanted: object, message: str) -> None:
    with pytest.raises(api.ApiError) as caught:
        api.parse_filter(wanted)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_row_reads_well() -> None:
    one = records(4)[3:]
    one["flags"] = FLAG_INBOUND
    one["bytes_out"] = 2**40
    (row,) = api.rows_of(one)
    assert row == {
        "id": "0000000000000004",
        "protocol": "tcp",
        "internal": "10.0.0.3:5000",
        "external": "198.51.100.10:1027",
        "remote": "203.0.113.7:53",
        "state": "established",
        "age": 3.0,
        "idle": 0.03,
        "timeout": 0.0,
        "packets_out": 0,
        "packets_in": 0,
        "bytes_out": 2**40,
        "bytes_in": 0,
        "flags": ["inbound"],
    }
    json.dumps(row)


def test_answers_and_pages(path: Path) -> None:
    def conversation() -> None:
        assert list(api.ask(path, {"show": "status"})) == [{"status": {"instance": "one"}}]
        rows, end = show(path)
        assert [row["internal"] for row in rows] == [
            f"{IPv4Address(0x0A000000 + i)}:5000" for i in range(10_000)
        ]
        assert end == {"rows": 10_000, "cursor": 0}

    talk(path, records(10_000), conversation)
    assert not path.exists()


@pytest.mark.parametrize("limit", [1, 7, 511, 1000, 5000])
def test_the_cursor_goes_on_exactly_behind_the_last_row(path: Path, limit: int) -> None:
    def conversation() -> None:
        seen, cursor = [], 0
        while True:
            rows, end = show(path, limit=limit, cursor=cursor, filter={"protocol": "tcp", "older": 5000})
            assert len(rows) == end["rows"] <= limit
            seen += [row["id"] for row in rows]
            cursor = end["cursor"]
            if not cursor:
                break
        assert seen == [f"{i + 1:016x}" for i in range(5001, 6000, 3)]

    talk(path, records(6000), conversation)


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        (b"nonsense\n", "a request is one line of JSON"),
        (b"[" * 20_000 + b"\n", "a request is one line of JSON"),
        (b"\xff\xfe\n", "a request is one line of JSON"),
        (b"3\n", "a request is a JSON object"),
        (b"{}\n", "show: None is none of status, sessions"),
        (b'{"show": ["status"]}\n', "show: ['status'] is none of status, sessions"),
        (b'{"show": "status", "limit": 3}\n', "unknown key 'limit'; there are show"),
        (b'{"show": "sessions", "limit": -3}\n', "limit: -3 is not a number"),
        (b'{"show": "sessions", "cursor": "x"}\n', "cursor: 'x' is not a number"),
        (b"x" * 70_000 + b"\n", "request longer than 65536 bytes"),
    ],
)
def test_a_wrong_request_is_answered_with_one_line(path: Path, request_line: bytes, message: str) -> None:
    def conversation() -> dict:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(request_line)
            with client.makefile("rb") as lines:
                return json.loads(lines.readline())

    answer = talk(path, records(1), conversation)
    assert isinstance(answer, dict)
    assert answer["error"].startswith(message)


def test_an_error_leaves_the_connection_usable(path: Path) -> None:
    def conversation() -> None:
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rwb") as lines:
            client.connect(str(path))
            for request, key in ((b"{}", "error"), (b'{"show":"status"}', "status")):
                lines.write(request + b"\n")
                lines.flush()
                assert key in json.loads(lines.readline())

    talk(path, records(1), conversation)


def test_too_many_clients_are_told_so(path: Path) -> None:
    def conversation() -> None:
        held = []
        for _ in range(api.CLIENTS):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            client.sendall(b'{"show":"status"}\n')
            assert b"instance" in client.recv(1000)
            held.append(client)
        with pytest.raises(api.ApiError, match="too many clients"):
            list(api.ask(path, {"show": "status"}))
        for client in held:
            client.close()

    talk(path, records(1), conversation)


def test_a_refusal_is_read_even_if_the_server_has_closed_before_we_ask(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        class Late(socket.socket):
            """Connects, and is refused before it can send."""

            def connect(self, address: object) -> None:
                super().connect(address)
                refusing, _ = listener.accept()
                refusing.sendall(b'{"error":"too many clients"}\n')
                refusing.close()

        monkeypatch.setattr(api.socket, "socket", Late)
        with pytest.raises(api.ApiError, match="too many clients"):
            list(api.ask(path, {"show": "status"}))


@pytest.mark.parametrize("limit", [{}, {"limit": 0}, {"limit": "0"}])
def test_no_limit_and_a_limit_of_nought_are_all(path: Path, limit: dict) -> None:
    def conversation() -> None:
        rows, end = show(path, **limit)
        assert len(rows) == 5000
        assert end == {"rows": 5000, "cursor": 0}

    talk(path, records(5000), conversation)


def test_a_million_sessions_leave_the_loop_responsive(path: Path) -> None:
    """A second operator is answered many times while the first one reads a million rows."""
    table = records(1_000_000)

    async def conversation() -> None:
        done = threading.Event()

        def read_all() -> int:
            try:
                return sum(
                    len(part.get("rows", ()))
                    for part in api.ask(path, {"show": "sessions", "limit": 200_000})
                )
            finally:
                done.set()

        def read_status() -> int:
            answered = 0
            while not done.is_set():
                answered += len(list(api.ask(path, {"show": "status"})))
            return answered

        rows, answered = await asyncio.gather(asyncio.to_thread(read_all), asyncio.to_thread(read_status))
        assert rows == 200_000
        assert answered > 10

    run(path, table, conversation)


def test_a_client_that_goes_away_ends_the_stream(path: Path) -> None:
    table, taken, gone = records(1_000_000), [], threading.Event()

    def sessions(cursor: int, maximum: int) -> tuple[np.ndarray, int]:
        taken.append(cursor)
        if len(taken) > 3:
            assert gone.wait(10)
        return pages(table)(cursor, maximum)

    async def both() -> None:
        async with serving(path, sessions) as server:
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b'{"show":"sessions"}\n')
            await reader.read(1000)
            writer.transport.abort()
            gone.set()
            async with asyncio.timeout(10):
                while server._clients:
                    await asyncio.sleep(0)

    asyncio.run(both())
    assert len(taken) < len(table) // api.PAGE


def test_a_client_that_does_not_read_costs_no_memory(path: Path) -> None:
    """The server stops gathering when a client stops reading."""
    table, taken = records(1_000_000), []

    def sessions(cursor: int, maximum: int) -> tuple[np.ndarray, int]:
        taken.append(cursor)
        return pages(table)(cursor, maximum)

    def conversation() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b'{"show":"sessions"}\n')
            client.recv(1)
            for _ in range(20):  # the server keeps answering others meanwhile
                list(api.ask(path, {"show": "status"}))

    async def both() -> None:
        async with serving(path, sessions):
            await asyncio.to_thread(conversation)

    asyncio.run(both())
    assert len(taken) <= 3


def test_a_worker_that_does_not_answer_is_reported(path: Path) -> None:
    def sessions(cursor: int, maximum: int) -> tuple[np.ndarray, int]:
        raise TimeoutError("the worker does not answer")

    def conversation() -> None:
        with pytest.raises(api.ApiError, match="the worker does not answer"):
            show(path)

    async def both() -> None:
        async with serving(path, sessions):
            await asyncio.to_thread(conversation)

    asyncio.run(both())


def test_an_idle_client_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PATIENCE", 0.05)

    async def conversation() -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()

    run(path, records(1), conversation)


def test_the_socket_is_its_owners_alone(path: Path) -> None:
    async def conversation() -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    before = os.umask(0o022)
    os.umask(before)
    run(path, records(1), conversation)
    assert os.umask(before) == before


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def conversation() -> None:
        second = api.Api({}, pages(records(1)))
        with pytest.raises(api.ApiError, match="another server listens there"):
            await second.start(path)
        assert path.is_socket()

    run(path, records(1), conversation)


@pytest.mark.parametrize("text", ["file", "missing/" + "x" * 120])
def test_a_place_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text("precious")

    async def start() -> None:
        await api.Api({}, pages(records(1))).start(tmp_path / text)

    with pytest.raises(api.ApiError) as caught:
        asyncio.run(start())
    assert str(tmp_path / text) in str(caught.value)
    assert (tmp_path / "file").read_text() == "precious"


def test_no_server_is_not_running(path: Path) -> None:
    with pytest.raises(api.NotRunning, match="no server is running there"):
        list(api.ask(path, {"show": "status"}))
