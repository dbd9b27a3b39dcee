# SPDX-License-Identifier: Apache-2.0
"""The operator's socket for scripts: binary sessions, events, explanations, traces; and what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nat_control import api
from nat_control.client import Client, EventStream, connect
from nat_control.live import SUBSCRIBER_EVENTS, Live, Subscriber
from nat_fastpath.engine import EVENT, RECORD, Core
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OUR_ADDRESS,
    SERVER,
    START,
    config,
    external,
    frame,
    small_pool,
    tagged_ports,
    tcp,
    udp,
)


class Running:
    """A real core behind a real socket; the loop has a thread of its own, as a server's has."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.path = path
        self.core = Core(config(**changes))
        self.core.poll(START)
        self.live = Live(self.core, ["internal", "external"])
        self.loop = asyncio.new_event_loop()
        self.api = api.Api(
            {"status": lambda: {"instance": "one"}, "hosts": self.live.hosts},
            self.core.sessions,
            self.live.verbs,
            threads=False,  # packets and commands below go through the loop, whose own the core is
        )
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.do(self.api.start(path))

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def run() -> Any:
            return function(*arguments)

        return self.do(run())

    def send(self, *packets: Any, port: int = INSIDE) -> list[Any]:
        found: list[Any] = self.call(self.core.burst, [(port, frame(p, port)) for p in packets], START)
        return found

    def publish(self) -> None:
        self.call(lambda: self.live.publish(self.core.events()))

    def close(self) -> None:
        self.do(self.api.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with contextlib.closing(Running(tmp_path / "nat.sock")) as made:
        yield made


@pytest.fixture
def client(running: Running) -> Client:
    return connect(running.path)


# -- sessions ---------------------------------------------------------------------------------------------


def test_sessions_are_the_cores_own_records(running: Running, client: Client) -> None:
    assert client.sessions().shape == (0,)
    running.send(udp(CLIENT, 4000, SERVER, 53), tcp(OTHER_CLIENT, 4001, SERVER, 80))
    found = client.sessions()
    assert found.dtype == RECORD
    assert sorted(map(bytes, found)) == sorted(map(bytes, running.call(running.core.sessions)[0]))
    assert client.sessions(protocol="tcp")["internal_port"].tolist() == [4001]
    assert len(client.sessions(internal=f"{CLIENT}:4000", remote=":53")) == 1
    assert len(client.sessions(port=9)) == 0
    found["packets_in"] = 0  # an array of one's own
    with pytest.raises(api.ApiError, match="unknown key 'inside'"):
        client.sessions(inside="10.0.0.1")


def test_pages_go_on_where_the_last_one_ended(running: Running, client: Client) -> None:
    running.send(*(udp(CLIENT, 4000 + i, SERVER, 53) for i in range(10)))
    pages = client.session_pages(limit=4)
    first = np.concatenate(list(pages))
    assert (len(first), pages.rows, pages.cursor > 0) == (4, 4, True)
    rest = client.session_pages(cursor=pages.cursor)
    ports = [*first["internal_port"], *np.concatenate(list(rest))["internal_port"]]
    assert sorted(ports) == list(range(4000, 4010))
    assert rest.cursor == 0
    assert list(rest) == [], "at its end it stays"
    begun = client.session_pages()
    next(begun)
    begun.close()
    assert list(begun) == []


# -- events -----------------------------------------------------------------------------------------------


def test_events_come_as_they_happen_to_everybody(running: Running, client: Client) -> None:
    with client.events() as one, client.events() as other:
        running.send(udp(CLIENT, 4000, SERVER, 53))
        running.publish()
        for stream in (one, other):
            events = next(stream)
            assert events.dtype == EVENT
            assert events["internal_port"].tolist() == [4000]
            assert stream.lost == 0
    deadline = threading.Event()
    while running.live._subscribers and not deadline.wait(0.01):
        pass  # pytest's timeout is the end of this


def test_a_quiet_time_is_told_and_the_stream_goes_on(running: Running, client: Client) -> None:
    with client.events(timeout=0.05) as stream:
        for port in (4000, 4001):
            with pytest.raises(TimeoutError, match=r"no event for 0\.05"):
                next(stream)
            running.send(udp(CLIENT, port, SERVER, 53))
            running.publish()
            while True:
                with contextlib.suppress(TimeoutError):
                    assert next(stream)["internal_port"].tolist() == [port]
                    break


def test_a_stream_that_is_closed_elsewhere_ends(client: Client) -> None:
    stream = client.events()
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    with client.events() as left:
        pass
    assert list(left) == [], "at its end it stays"


def events_of(n: int, first: int) -> np.ndarray:
    made = np.zeros(n, EVENT)
    made["sequence"] = np.arange(first, first + n)
    return made


def test_a_slow_reader_loses_the_oldest_and_is_told_how_many() -> None:
    async def story() -> None:
        subscriber = Subscriber(bound=100)
        for i in range(10):
            subscriber.put(events_of(30, 30 * i))
        got, lost = await subscriber.take()
        assert (int(got["sequence"][0]), lost) == (200, 200)
        n = len(got)
        while n < 100:
            got, lost = await subscriber.take()
            assert not lost
            n += len(got)
        assert int(got["sequence"][-1]) == 299
        subscriber.put(events_of(250, 300))  # more at once than it may have
        got, lost = await subscriber.take()
        assert (int(got["sequence"][0]), len(got), lost) == (450, 100, 150)

    asyncio.run(story())


def test_a_reader_that_does_not_read_costs_bounded_memory(running: Running, client: Client) -> None:
    stream = client.events()
    total = 8 * SUBSCRIBER_EVENTS
    for first in range(0, total, 16384):  # publishing takes no time, whoever reads or not
        running.call(running.live.publish, events_of(16384, first))
    seen = last = 0
    while last != total - 1:
        events = next(stream)
        seen, last = seen + len(events), int(events["sequence"][-1])
    assert stream.lost > 0
    assert seen + stream.lost == total
    stream.__exit__()


# -- explain and trace ------------------------------------------------------------------------------------


def test_an_explanation_in_words(running: Running, client: Client) -> None:
    told = client.explain(f"{CLIENT}:4000", f"{SERVER}:53")
    said = {step["step"]: step["text"] for step in told["steps"]}
    assert told["verdict"] == "forward"
    assert said["route"] == "0.0.0.0/0 via 198.51.100.254 (external)"
    assert said["next_hop"] == "198.51.100.254 (external), MAC 02:00:00:00:01:fe static"
    assert said["mapping" if "mapping" in said else "no_mapping"] == "none; a new one would be opened"
    assert said["host"] == f"{CLIENT} has 0 sessions, 0 mappings"
    assert said["session"].startswith("would be opened: ")
    assert told["becomes"]["destination"] == f"{SERVER}:53"
    assert told["becomes"]["to"] == "external"
    running.send(udp(CLIENT, 4000, SERVER, 53))
    outside = external(client.sessions()[0])
    assert told["becomes"]["source"] == "{}:{}".format(*outside)

    answer = client.explain(f"{SERVER}:53", "{}:{}".format(*outside))
    assert (answer["packet"]["from"], answer["verdict"]) == ("external", "forward")
    assert not [step for step in answer["steps"] if "would be opened" in step["text"]]
    assert answer["becomes"]["destination"] == f"{CLIENT}:4000"
    stranger = client.explain(f"{SERVER}:99", "{}:{}".format(*outside))
    assert stranger["verdict"] == "drop_filtered"
    forged = client.explain(f"{CLIENT}:53", "{}:{}".format(*outside), side="external")
    assert forged["verdict"] == "drop_address"
    assert client.explain(f"{CLIENT}:4000", f"{SERVER}:53", length=1600)["verdict"] == "fragment"
    assert (
        client.explain(f"{CLIENT}:4000", f"{SERVER}:53", length=1600, dont_fragment=True)["verdict"]
        == "reply"
    )
    cut = client.explain(f"{CLIENT}:4000", f"{SERVER}:53", length=1600, dont_fragment=True)["answer"]
    assert cut["message"] == "icmp fragmentation needed, MTU 1500"
    late = client.explain(f"{CLIENT}:4000", f"{SERVER}:53", ttl=1)
    assert (late["verdict"], late["becomes"]) == ("reply", None)
    assert late["answer"] == {
        "message": "icmp time exceeded", "source": OUR_ADDRESS[INSIDE], "destination": CLIENT, "to": "internal"
    }  # fmt: skip
    ping = client.explain(CLIENT, OUR_ADDRESS[INSIDE], "icmp")
    assert ping["answer"]["message"] == "icmp echo reply"
    assert client.explain(f"{CLIENT}:4", f"{SERVER}:80", "tcp", flags="A")["verdict"] == "drop_tcp_not_syn"
    assert client.explain(f"{CLIENT}:4", SERVER, "icmp", length=100)["verdict"] == "forward"
    assert client.explain("10.0.0.99:4", f"{SERVER}:80")["verdict"] == "forward"


def test_an_explanation_tells_what_the_budget_leaves(tmp_path: Path) -> None:
    made = Running(tmp_path / "nat.sock", new_sessions_rate=20, new_sessions_burst=2)
    with contextlib.closing(made) as running:
        client, said = connect(running.path), []
        for port in range(4000, 4003):
            told = client.explain(f"{CLIENT}:{port}", f"{SERVER}:53")
            said += [step["text"] for step in told["steps"] if step["step"] == "budget"]
            running.send(udp(CLIENT, port, SERVER, 53))
    assert said == [
        "20 new sessions per second; after this one, 1 more may open at once",
        "20 new sessions per second; after this one, 0 more may open at once",
        "20 new sessions per second are used up",
    ]


def test_an_explanation_names_a_parity_that_was_missed(tmp_path: Path) -> None:
    made = Running(tmp_path / "nat.sock", pool=small_pool(1, first=1001), port_parity=True)
    with contextlib.closing(made) as running:
        told = connect(running.path).explain(f"{CLIENT}:4000", f"{SERVER}:53")
    (text,) = (step["text"] for step in told["steps"] if step["step"] == "port")
    assert text == (
        "198.51.100.10:1001 would be taken, of the other parity, as none of its own is free; "
        "0 others are free there"
    )


@pytest.mark.parametrize("vlans", [(5, 0), (0, 7), (5, 7)])
def test_an_explanation_on_tagged_ports(tmp_path: Path, vlans: tuple[int, int]) -> None:
    with contextlib.closing(Running(tmp_path / "nat.sock", ports=tagged_ports(*vlans))) as running:
        told = connect(running.path).explain(f"{CLIENT}:4000", f"{SERVER}:53")
    assert told["verdict"] == "forward"
    assert (told["becomes"]["destination"], told["becomes"]["to"]) == (f"{SERVER}:53", "external")
    assert told["becomes"]["ttl"] == 63


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"source": "x", "destination": "10.0.0.1:1"}, "source: 'x' is not ADDRESS:PORT"),
        ({"source": "10.0.0.1:66000", "destination": "10.0.0.1:1"}, "source: '10.0.0.1:66000' is not"),
        ({"protocol": "sctp"}, "protocol: 'sctp' is none of icmp, tcp, udp"),
        ({"from": "above"}, "from: 'above' is neither internal nor external"),
        ({"flags": "XY"}, "flags: 'XY' are not of FSRPAU"),
        ({"length": 70000}, "length: 70000 is not a number from 28 to 65535"),
        ({"ttl": "1"}, "ttl: '1' is not a number"),
        ({"why": 1}, "explain: unknown key 'why'"),
        ([], "explain: not an object"),
    ],
)
def test_a_wrong_question_is_one_clear_line(running: Running, asked: Any, message: str) -> None:
    with pytest.raises(api.ApiError) as caught:
        list(api.ask(running.path, {"explain": asked}))
    assert str(caught.value).startswith(message)


def test_a_trace_of_a_flow(running: Running, client: Client) -> None:
    lines = client.trace(packets=2, seconds=60, internal=CLIENT, protocol="udp")
    rows: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: rows.extend(lines))
    reader.start()
    while reader.is_alive():
        running.send(udp(CLIENT, 4000, SERVER, 53))
        reader.join(0.05)
    assert len(rows) == 2
    assert rows[0]["source"] == f"{CLIENT}:4000"
    assert rows[0]["after"]["source"] == "{}:{}".format(*external(client.sessions()[0]))
    assert (rows[0]["verdict"], rows[0]["from"], rows[0]["to"]) == ("forward", "internal", "external")


def test_a_second_trace_is_told_of_the_first_which_ends_with_its_reader(
    running: Running, client: Client
) -> None:
    first = client.trace_lines({"trace": {"seconds": 600, "internal": CLIENT}})
    reader = threading.Thread(target=next, args=(first,))
    reader.start()
    while not running.live._traced:  # pytest's timeout is the end of this
        time.sleep(0.01)
    with pytest.raises(api.ApiError, match="another trace runs") as caught:
        next(client.trace_lines({"trace": {"packets": 1}}))
    message = str(caught.value)
    assert f"of any protocol, internal {CLIENT}" in message
    running.send(udp(CLIENT, 4000, SERVER, 53))
    reader.join(10)
    first.close()  # type: ignore[attr-defined]
    while running.call(running.core.trace_start, 1, 1) is None:
        time.sleep(0.01)


# -- whatever anybody sends -------------------------------------------------------------------------------


def requests(rng: random.Random) -> bytes:
    good: list[Any] = [
        {"show": "status"}, {"show": "sessions", "format": "binary", "limit": 3}, {"show": "hosts"},
        {"explain": {"source": "10.0.0.5:1", "destination": "203.0.113.7:53"}}, {"events": {}},
        {"trace": {"packets": 1, "seconds": 0.01}}, {"show": ["sessions"]}, {"events": []}, {"trace": 1}, {},
    ]  # fmt: skip
    line = json.dumps(rng.choice(good)).encode()
    kind = rng.randrange(7)
    if kind == 0:
        return line + b"\n"
    if kind == 1:
        return rng.randbytes(rng.randrange(300)) + b"\n"
    if kind == 2:
        return line[: rng.randrange(len(line))]  # half a request
    if kind == 3:
        return b"x" * 70_000
    if kind == 4:
        return b"[" * 3000 + b"\n"  # deep
    if kind == 5:
        at = rng.randrange(len(line))
        return line[:at] + rng.randbytes(1) + line[at + 1 :] + b"\n"
    value = rng.choice([None, True, -1, 1e308, "x" * 1000, [1], {"a": {}}, 2**70])
    key = rng.choice(["source", "packets", "seconds", "internal", "length", "filter", "limit", "cursor"])
    verb = rng.choice(["explain", "trace", "events", "show"])
    body = {key: value} if verb != "show" else "sessions"
    return json.dumps({verb: body, **({key: value} if verb == "show" else {})}).encode() + b"\n"


def test_whatever_is_sent_the_next_one_is_answered(running: Running, client: Client) -> None:
    running.send(*(udp(CLIENT, 4000 + i, SERVER, 53) for i in range(20)))
    rng = random.Random(4)
    unheard: list[Any] = []
    running.loop.call_soon_threadsafe(
        running.loop.set_exception_handler, lambda loop, context: unheard.append(context)
    )
    for _ in range(300):
        with socket.socket(socket.AF_UNIX) as opened, contextlib.suppress(OSError):
            opened.settimeout(5)
            opened.connect(str(running.path))
            for _ in range(rng.randrange(1, 4)):
                opened.sendall(requests(rng))
            if rng.random() < 0.5:
                opened.shutdown(socket.SHUT_WR)
                while opened.recv(65536):
                    pass
    while True:  # those that have just left still count for a moment
        with contextlib.suppress(api.ApiError):
            assert client.status() == {"instance": "one"}
            break
    assert len(client.sessions()) == 20
    assert not unheard, unheard[0]


def test_a_subscriber_counts_as_a_client(running: Running, client: Client) -> None:
    streams: list[EventStream] = [client.events() for _ in range(api.CLIENTS)]
    with pytest.raises(api.ApiError, match="too many clients"):
        client.status()
    for stream in streams:
        stream.__exit__()
