# SPDX-License-Identifier: Apache-2.0
"""What TLS adds to the takeover: bytes on the agent's descriptor until they are read at the switch's end, beside plain TCP."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nat_control.certificates import make_certificates
from nat_control.tls import Tls, context
from switch_agent.relay import Relay

SIZE = 900  # bytes of a prepared takeover, about
PAUSE = 0.002  # seconds between two


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds from write to read: by plain TCP and through the relay; median, p99 and longest."""
    with TemporaryDirectory() as directory:
        make_certificates(Path(directory), ("agent", "ovs"))
        return {
            "plain": _summary(_plain(rounds)),
            "tls": _summary(asyncio.run(_tls(Path(directory), rounds))),
        }


def _summary(times: Any) -> dict[str, float]:
    found = np.array(times) / 1e3
    return {
        "median": float(np.median(found)),
        "p99": float(np.percentile(found, 99)),
        "max": float(found.max()),
    }


def _write(fd: int, reader: threading.Thread, read: list[int], rounds: int) -> list[int]:
    written = []
    for _ in range(rounds):
        time.sleep(PAUSE)
        written.append(time.monotonic_ns())
        os.write(fd, bytes(SIZE))
    reader.join()
    return [there - here for here, there in zip(written, read, strict=True)]


def _reading(connection: socket.socket, rounds: int) -> tuple[threading.Thread, list[int]]:
    times: list[int] = []

    def read() -> None:
        for _ in range(rounds):
            left = SIZE
            while left:
                left -= len(connection.recv(left))
            times.append(time.monotonic_ns())

    thread = threading.Thread(target=read)
    thread.start()
    return thread, times


def _plain(rounds: int) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        switch = socket.create_connection(listener.getsockname())
        agent, _ = listener.accept()
        with switch, agent:
            agent.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _write(agent.fileno(), *_reading(switch, rounds), rounds)


async def _tls(directory: Path, rounds: int) -> list[int]:
    def files(name: str) -> Tls:
        return Tls(directory / "ca.pem", directory / f"{name}.pem", directory / f"{name}.key")

    taken: asyncio.Queue[socket.socket] = asyncio.Queue()
    relay = Relay(files("agent"), urgent=True, taken=taken.put_nowait, refused=print)
    port = await relay.start("127.0.0.1", 0)
    plain = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port))
    switch = await asyncio.to_thread(context(files("ovs"), listens=False).wrap_socket, plain)
    with await taken.get() as agent, switch:
        found = await asyncio.to_thread(_write, agent.fileno(), *_reading(switch, rounds), rounds)
    await relay.stop()
    return found
