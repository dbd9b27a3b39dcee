# SPDX-License-Identifier: Apache-2.0
"""The prepared bytes: written whole, once, and never after disarm."""

import asyncio
import errno
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nat_fastpath.watch import MAX_PREPARED, Watch

from .helpers import pair, take, until, watch

Stream = tuple[socket.socket, socket.socket]


def laps(w: Watch, n: int = 2) -> None:
    """Waits until the thread has gone round."""
    sent = w.stats()["sent"]
    until(lambda: w.stats()["sent"] >= sent + n)


@pytest.fixture
def slow() -> Iterator[Stream]:
    """A TCP connection that takes a few kilobytes before somebody reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.socket()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        theirs.connect(server.getsockname())
        ours = server.accept()[0]
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        with ours, theirs:
            yield ours, theirs


def test_a_slow_stream_gets_every_byte(slow: Stream) -> None:
    data = os.urandom(MAX_PREPARED)
    with pair() as (w, peer):
        w.arm(data, slow[0].fileno())
        peer.stop()
        until(lambda: w.fired)
        laps(w)
        assert w.times["written"] is None
        received = bytearray()
        while len(received) < len(data):
            received += slow[1].recv(1500)
        assert received == data
        until(lambda: w.times["written"])
        laps(w)
        assert take(slow[1]) == b""


def test_disarm_in_the_middle_of_writing(slow: Stream) -> None:
    with pair() as (w, peer):
        w.arm(bytes(MAX_PREPARED), slow[0].fileno())
        peer.stop()
        until(lambda: w.fired)
        assert not w.disarm()
        slow[0].shutdown(socket.SHUT_WR)
        received = bytearray()
        while more := slow[1].recv(65536):
            received += more
        assert len(received) < MAX_PREPARED
        assert w.times["written"] is None
        assert w.fired == "silence"
        assert w.stats()["write_error"] == 0


def test_after_disarm_nothing_is_written() -> None:
    """The death comes just before, during and just after disarm, many times."""
    outcomes = {True: 0, False: 0}
    with pair(first={"interval_ms": 1.0, "misses": 1000}, second={"interval_ms": 1.0}) as (w, _):
        for i in range(400):
            ours, theirs = socket.socketpair()
            connection, other = socket.socketpair()
            with ours, theirs, connection, other:
                w.watch_tcp(connection.fileno())
                w.arm(b"take over", ours.fileno())
                killer = threading.Thread(target=other.shutdown, args=(socket.SHUT_RDWR,))
                killer.start()
                for _ in range(i % 40 * 25):
                    pass
                in_time = w.disarm()
                written = take(theirs)
                assert written == (b"" if in_time else b"take over")
                killer.join()
                if i % 10 == 0:
                    laps(w)
                assert take(theirs) == b""
                assert (w.fired is None) == in_time
                w.watch_tcp()
                outcomes[in_time] += 1
    assert sum(outcomes.values()) == 400


def test_with_nowhere_to_write_a_death_is_told() -> None:
    with pair() as (w, peer):
        w.arm(b"take over", None)
        peer.stop()
        assert select.select([w.eventfd], [], [], 5)[0]
        assert w.fired == "silence"
        assert w.times["written"] is None


def test_disarmed_and_armed_again(stream: Stream) -> None:
    with pair() as (w, peer):
        w.arm(b"first", stream[0].fileno())
        assert w.stats()["armed"]
        assert w.disarm()
        assert not w.stats()["armed"]
        assert not w.update(b"too late")
        peer.stop()
        until(lambda: not w.stats()["alive"])
        laps(w)
        assert w.fired is None
        w.arm(b"second", stream[0].fileno())
        until(lambda: w.times["written"])
        assert take(stream[1]) == b"second"


def test_update_replaces_the_bytes(stream: Stream) -> None:
    with pair() as (w, peer):
        w.arm(b"old", stream[0].fileno())
        for i in range(1000):
            assert w.update(b"%05d" % i * 1000)
        peer.stop()
        until(lambda: w.times["written"])
        assert take(stream[1]) == b"00999" * 1000
        assert not w.update(b"too late")
        laps(w)
        assert take(stream[1]) == b""


def test_an_update_is_seen_whole_or_not_at_all() -> None:
    """Updates race with the death: what is written is one of them, and the last that was accepted."""
    with pair(first={"interval_ms": 1.0, "misses": 1000}, second={"interval_ms": 1.0}) as (w, _):
        for _ in range(50):
            ours, theirs = socket.socketpair()
            connection, other = socket.socketpair()
            with ours, theirs, connection, other:
                w.watch_tcp(connection.fileno())
                w.arm(b"\0" * 4096, ours.fileno())
                killer = threading.Thread(target=other.shutdown, args=(socket.SHUT_RDWR,))
                killer.start()
                accepted, i = 0, 1
                while w.update(bytes([i]) * 4096):
                    accepted, i = i, i % 255 + 1
                killer.join()
                until(lambda: w.times["written"])
                assert take(theirs) == bytes([accepted]) * 4096
                w.watch_tcp()
                w.disarm()


def test_a_broken_stream_is_reported(stream: Stream) -> None:
    with pair() as (w, peer):
        w.arm(b"take over", stream[0].fileno())
        stream[1].close()
        peer.stop()
        until(lambda: w.stats()["write_error"])
        assert w.stats()["write_error"] == errno.EPIPE
        assert w.fired == "silence"
        assert w.times["written"] is None


def test_what_cannot_be_armed(stream: Stream) -> None:
    with watch() as w, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        with pytest.raises(ValueError, match="stream socket"):
            w.arm(b"", udp.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            w.arm(b"", -1)
        with pytest.raises(ValueError, match="length of data"):
            w.arm(bytes(MAX_PREPARED + 1), stream[0].fileno())
        assert not w.stats()["armed"]


def test_the_event_wakes_asyncio(stream: Stream) -> None:
    async def death() -> str | None:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        with pair() as (w, peer):
            loop.add_reader(w.eventfd, woken.set)
            w.arm(b"take over", stream[0].fileno())
            peer.stop()
            await asyncio.wait_for(woken.wait(), 20)
            loop.remove_reader(w.eventfd)
            assert int.from_bytes(os.read(w.eventfd, 8), "little") >= 1
            return w.fired

    assert asyncio.run(death()) == "silence"


def test_nothing_is_left_behind(stream: Stream) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    with pair():
        pass
    before = held()
    for _ in range(30):
        with pair(first={"interval_ms": 1.0}, second={"interval_ms": 1.0}) as (w, peer):
            w.arm(bytes(MAX_PREPARED), stream[0].fileno())
            peer.leave()
    assert held() == before


def test_stop_and_start_again() -> None:
    with pair() as (w, peer):
        w.stop()
        w.stop()
        until(lambda: not peer.stats()["alive"])
        w.start()
        until(lambda: peer.stats()["alive"] and w.stats()["alive"])
        with pytest.raises(OSError, match="already"):
            w.start()


def test_a_closed_watch_says_so() -> None:
    w = watch()
    w.close()
    w.close()
    for call in (
        w.start,
        w.stop,
        w.disarm,
        w.leave,
        w.stats,
        w.watch_tcp,
        lambda: w.fired,
        lambda: w.eventfd,
    ):
        with pytest.raises(ValueError, match="this watch is closed"):
            call()


def test_signals_stay_with_the_main_thread() -> None:
    wanted = 1 << signal.SIGTERM - 1 | 1 << signal.SIGINT - 1
    with pair():
        blocked = []
        for task in Path("/proc/self/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines)
            if status["Name"] == "nat-heartbeat":
                blocked.append(int(status["SigBlk"], 16) & wanted)
    assert blocked
    assert set(blocked) == {wanted}


def test_another_key_for_both_is_no_death_and_for_one_is() -> None:
    with pair() as (w, peer):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            w.arm(b"dead", ours.fileno())
            for one in (peer, w):
                one.rekey(b"k" * 16)
            heard = w.stats()["received"]
            until(lambda: w.stats()["received"] > heard + 3)
            assert w.fired is None
            peer.rekey(b"l" * 16)
            until(lambda: w.fired)
            assert take(theirs) == b"dead"
        with pytest.raises(ValueError, match="16 bytes"):
            w.rekey(b"short")
