# SPDX-License-Identifier: Apache-2.0
"""What counts as a death, and what does not, between real processes."""

import ctypes
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from nat_fastpath.watch import Watch

from .helpers import Peer, pair, take, until, watch

Stream = tuple[socket.socket, socket.socket]

BUSY = "while True: pass"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def judged(w: Watch, intervals: int) -> None:
    """Waits until so many silent intervals were judged."""
    before = w.stats()["missed"]
    until(lambda: w.stats()["missed"] >= before + intervals)


def test_a_stopped_process_is_silent(stream: Stream) -> None:
    with watch() as w, Peer(w) as peer:
        until(lambda: w.stats()["alive"])
        w.arm(b"take over", stream[0].fileno())
        assert w.fired is None
        peer.pause()
        until(lambda: w.times["written"])
        assert w.fired == "silence"
        assert take(stream[1]) == b"take over"
        times = w.times
        assert times["last_heartbeat"] is not None
        assert times["detected"] is not None
        assert times["written"] is not None
        assert times["last_heartbeat"] + 3 * 20_000_000 < times["detected"] <= times["written"]
        # Its return changes nothing: whoever took over stays.
        peer.resume()
        until(lambda: w.stats()["alive"])
        assert w.fired == "silence"
        w.arm(b"", stream[0].fileno())
        assert w.fired is None


@pytest.mark.parametrize("tcp", [True, False])
def test_kill(tcp: bool, stream: Stream, listener: socket.socket) -> None:
    with watch() as w, Peer(w, listener if tcp else None) as peer:
        if peer.tcp is not None:
            w.watch_tcp(peer.tcp.fileno())
        until(lambda: w.stats()["alive"])
        w.arm(b"take over", stream[0].fileno())
        peer.process.kill()
        until(lambda: w.times["written"])
        assert w.fired == ("TCP end" if tcp else "silence")
        assert take(stream[1]) == b"take over"


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("second", [True, False])
def test_the_end_of_a_connection(how: str, second: bool, stream: Stream, listener: socket.socket) -> None:
    with (
        socket.create_connection(listener.getsockname()) as theirs,
        pair() as (w, _),
        listener.accept()[0] as ours,
    ):
        w.watch_tcp(*((None, ours.fileno()) if second else (ours.fileno(), None)))
        w.arm(b"take over", stream[0].fileno())
        theirs.sendall(b"data is nobody's end")
        sent = w.stats()["sent"]
        until(lambda: w.stats()["sent"] > sent)
        assert w.fired is None
        if how == "RST":
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
        else:
            theirs.shutdown(socket.SHUT_WR)
        until(lambda: w.times["written"])
        assert w.fired == "TCP end"
        if how == "FIN":
            assert ours.recv(100) == b"data is nobody's end"


def test_a_connection_that_ended_before_arming_counts_then(stream: Stream, listener: socket.socket) -> None:
    with pair() as (w, _):
        with socket.create_connection(listener.getsockname()):
            ours = listener.accept()[0]
        with ours:
            w.watch_tcp(ours.fileno())
            w.arm(b"take over", stream[0].fileno())
            until(lambda: w.times["written"])
            assert w.fired == "TCP end"


def test_a_connection_no_longer_watched_may_end(stream: Stream, listener: socket.socket) -> None:
    with pair() as (w, _), socket.create_connection(listener.getsockname()) as theirs:
        ours = listener.accept()[0]
        w.watch_tcp(ours.fileno())
        w.arm(b"take over", stream[0].fileno())
        w.watch_tcp()
        theirs.close()
        ours.close()
        received = w.stats()["received"]
        until(lambda: w.stats()["received"] >= received + 3)
        assert w.fired is None


def test_a_worker_that_stands_still(stream: Stream) -> None:
    loops = (ctypes.c_uint64 * 2)()
    addresses = [ctypes.addressof(loops), 0, ctypes.addressof(loops) + 8]
    working = threading.Event()
    end = threading.Event()

    def work() -> None:
        while not end.wait(0.001):
            loops[0] += 1
            loops[1] += not working.is_set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with pair(second={"counters": addresses, "patience_ms": 1000}) as (w, peer):
            w.arm(b"take over", stream[0].fileno())
            until(lambda: w.stats()["peer_progress"] > 0)
            assert w.fired is None
            working.set()
            until(lambda: w.times["written"])
            assert w.fired == "stalled worker"
            assert not w.stats()["alive"]
            assert w.stats()["received_stalled"] >= 3
            working.clear()
            until(lambda: w.stats()["alive"])
            assert peer.stats()["alive"]
    finally:
        end.set()
        worker.join()


def test_a_planned_leave_is_no_death(stream: Stream, listener: socket.socket) -> None:
    with watch() as w, Peer(w, listener) as peer:
        assert peer.tcp is not None
        w.watch_tcp(peer.tcp.fileno())
        until(lambda: w.stats()["alive"])
        w.arm(b"take over", stream[0].fileno())
        peer.ask("leave")
        until(lambda: w.stats()["left"])
        peer.process.kill()
        judged(w, 6)
        assert w.fired is None
        assert not w.stats()["alive"]
        assert w.disarm()
        assert take(stream[1]) == b""


def test_a_leave_can_be_taken_back(stream: Stream) -> None:
    with pair() as (w, peer):
        w.arm(b"take over", stream[0].fileno())
        peer.leave()
        until(lambda: w.stats()["left"])
        peer.leave(False)
        until(lambda: w.stats()["alive"])
        peer.stop()
        until(lambda: w.fired)
        assert w.fired == "silence"


def test_nothing_is_judged_before_the_peer_was_heard(stream: Stream) -> None:
    with watch() as w, watch(w.address, key=bytes(16), instance=2) as stranger:
        w.arm(b"take over", stream[0].fileno())
        until(lambda: w.stats()["bad_auth"] > 10 and stranger.stats()["sent"] > 10)
        assert w.fired is None
        assert w.times == {"last_heartbeat": None, "detected": None, "written": None}


def test_a_peer_with_a_longer_interval_is_slow_and_not_dead(stream: Stream) -> None:
    with pair(first={"interval_ms": 5.0}, second={"interval_ms": 100.0}) as (w, peer):
        w.arm(b"take over", stream[0].fileno())
        received = w.stats()["received"]
        until(lambda: w.stats()["received"] >= received + 5)
        assert w.fired is None
        peer.stop()
        until(lambda: w.fired)


def test_arming_after_a_silence_gives_the_peer_its_time(stream: Stream) -> None:
    with pair() as (w, peer):
        peer.stop()
        judged(w, 5)
        assert w.fired is None
        w.arm(b"take over", stream[0].fileno())
        armed = time.monotonic_ns()
        until(lambda: w.fired)
        detected = w.times["detected"]
        assert detected is not None
        assert detected - armed > 2 * 20_000_000


def test_a_judge_that_was_stopped_blames_nobody() -> None:
    """The peer is this process; the judge is the other, stopped for longer than any limit, again and again."""
    with watch(interval_ms=10.0) as peer, Peer(peer, interval_ms=10.0, misses=3) as judge:
        until(lambda: judge.ask("stats")["alive"])
        judge.ask("arm")
        for _ in range(8):
            judge.pause()
            sent = peer.stats()["sent"]
            until(lambda sent=sent: peer.stats()["sent"] >= sent + 10)  # type: ignore[misc]
            judge.resume()
            received = judge.ask("stats")["received"]
            until(lambda received=received: judge.ask("stats")["received"] > received + 2)  # type: ignore[misc]
            assert judge.ask("fired") is None
        assert judge.ask("stats")["late_wakeups"] >= 8
        peer.stop()
        until(lambda: judge.ask("fired") == "silence")


def test_a_pause_of_the_whole_machine_blames_nobody() -> None:
    """Nobody sent and nobody judged: intervals in which the judge did not run do not count, however many."""
    with watch(interval_ms=200.0) as peer, Peer(peer, interval_ms=200.0) as judge:
        until(lambda: judge.ask("stats")["alive"])
        judge.ask("arm")
        before = judge.ask("stats")["late_wakeups"]
        judge.pause()
        peer.stop()
        time.sleep(1.2)
        judge.resume()
        until(lambda: judge.ask("stats")["late_wakeups"] > before)
        peer.start()
        received = judge.ask("stats")["received"]
        until(lambda: judge.ask("stats")["received"] > received)
        assert judge.ask("fired") is None


def test_after_a_pause_the_workers_get_their_chance_first() -> None:
    """The pause is longer than the patience, but no worker could have worked in it."""
    with watch() as w, Peer(w, work=True, patience_ms=1000.0) as peer:
        until(lambda: w.stats()["alive"])
        peer.ask("work")
        received = w.stats()["received"]
        until(lambda: w.stats()["received"] > received + 1)
        before = w.stats()["received_stalled"]
        peer.pause()
        time.sleep(1.2)
        peer.resume()
        received = w.stats()["received"]
        until(lambda: w.stats()["received"] > received + 5)
        assert w.stats()["received_stalled"] == before
        peer.ask("work")
        until(lambda: w.stats()["received_stalled"] > before)


def test_busy_neighbours_kill_nobody(stream: Stream) -> None:
    """As fast as it is meant to be where the threads may have priority, and slower where they may not."""
    with watch() as probe:
        interval = 2.0 if probe.stats()["realtime"] else 50.0
    with watch(interval_ms=interval) as w, Peer(w, interval_ms=interval) as peer:
        until(lambda: w.stats()["alive"] and peer.ask("stats")["alive"])
        neighbours = [
            subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2 * (os.cpu_count() or 1))
        ]
        try:
            w.arm(b"take over", stream[0].fileno())
            peer.ask("arm")
            received = w.stats()["received"]
            until(lambda: w.stats()["received"] >= received + 3000 / interval, seconds=60)
            assert w.fired is None, w.stats()
            assert peer.ask("fired") is None, peer.ask("stats")
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()
