# SPDX-License-Identifier: Apache-2.0
"""A UDP stream of numbered datagrams between two namespaces, so that every lost one is known.

    python -m nat_control.lab_stream send ADDRESS PORT --rate 1000 --flows 1 --seconds 9 --out sent.npy
    python -m nat_control.lab_stream receive ADDRESS PORT --flows 1 --out received.npz

Datagram n belongs to flow n % flows; a flow is a source port. Both end by SIGTERM too, and then write what they
have. Times are nanoseconds of CLOCK_MONOTONIC, which is one for the whole machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import socket
import struct
import sys
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray

NUMBER = struct.Struct("!Q")
PAYLOAD = 100  # bytes of a datagram
FIRST_PORT = 10_000  # of the sender; 50 000 flows end below 60 000
BUFFER = 64 << 20
SO_RCVBUFFORCE = 33  # asm-generic/socket.h: beyond the limit, as root
SHORTEST_SLEEP = 50_000  # ns; below, a sleep takes longer than asked for


@dataclass(frozen=True)
class Record:
    """``sent[n]`` is when datagram n left; ``number`` and ``received`` are the arrivals in their order."""

    sent: NDArray[np.int64]
    number: NDArray[np.int64]
    received: NDArray[np.int64]

    @classmethod
    def load(cls, sent: Path, received: Path) -> Record:
        with np.load(received) as arrivals:
            return cls(np.load(sent), arrivals["number"], arrivals["received"])

    def arrival(self) -> NDArray[np.int64]:
        """When each datagram came first, 0 if never."""
        times = np.zeros(len(self.sent), np.int64)
        known = self.number < len(self.sent)
        times[self.number[known][::-1]] = self.received[known][::-1]
        return times

    def lost(self, begin: int = 0, end: int = 1 << 62) -> NDArray[np.int64]:
        """Numbers of those that left in [begin, end) and never came."""
        return np.flatnonzero((self.arrival() == 0) & (self.sent >= begin) & (self.sent < end))

    def reordered(self, flows: int = 1) -> NDArray[np.int64]:
        """Numbers of those that came after a later one of their flow."""
        return np.asarray(self.number[late(self.number, flows)])

    def gap(self, begin: int = 0, end: int = 1 << 62) -> tuple[int, int]:
        """The longest time without an arrival in [begin, end): that of the last before it, of the first after it."""
        times = np.sort(self.received[(self.received >= begin) & (self.received < end)])
        if len(times) < 2:
            raise ValueError("no two datagrams arrived")
        at = int(np.argmax(np.diff(times)))
        return int(times[at]), int(times[at + 1])


def late(number: NDArray[np.int64], flows: int) -> NDArray[np.bool_]:
    """Which arrivals came after a later one of their flow, duplicates left out; ``number`` in the order of arrival."""
    order = np.argsort(number % flows, kind="stable")
    turn = number[order] // flows
    # flows one after the other, each above all of the one before: one running maximum serves them all
    height = (number[order] % flows) * (int(turn.max(initial=0)) + 2) + turn + 1
    highest = np.maximum.accumulate(np.concatenate([[0], height]))[:-1]
    found = np.zeros(len(number), np.bool_)
    found[order] = height < highest
    first = np.zeros(len(number), np.bool_)
    first[np.unique(number, return_index=True)[1]] = True
    return found & first


class _Ended(Exception):
    """SIGTERM came."""


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Ended


def send(address: str, port: int, rate: int, flows: int, seconds: float, out: Path | None) -> dict[str, int]:
    """Deadlines are absolute: who is late catches up. Returns how many were sent, and how late the latest was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, flows + 64)), hard))
    sockets = []
    for flow in range(flows):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("", FIRST_PORT + flow))
        made.connect((address, port))
        sockets.append(made)
    emit = [made.send for made in sockets]
    total = int(rate * seconds)
    datagram, times = bytearray(PAYLOAD), array("q", bytes(8 * total))
    clock, pack = time.monotonic_ns, NUMBER.pack_into
    number = refused = latest = 0
    print("sending", flush=True)
    start = clock()
    try:
        while number < total:
            now = clock()
            due = min(total, (now - start) * rate // 1_000_000_000 + 1)
            if due <= number:
                ahead = start + number * 1_000_000_000 // rate - now
                if ahead > SHORTEST_SLEEP:
                    time.sleep(ahead / 1e9)
                continue
            latest = max(latest, now - start - number * 1_000_000_000 // rate)
            while number < due:
                pack(datagram, 0, number)
                try:
                    emit[number % flows](datagram)
                except OSError:  # an ICMP error for an earlier one is told here, and this one did not leave
                    refused += 1
                    emit[number % flows](datagram)
                times[number] = clock()
                number += 1
    except _Ended:
        pass
    if out:
        np.save(out, np.frombuffer(times, np.int64)[:number])
    return {"sent": number, "refused": refused, "latest_us": latest // 1000}


def receive(address: str, port: int, flows: int, seconds: float, out: Path) -> dict[str, int]:
    """Until SIGTERM, or for ``seconds``."""
    inbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    inbox.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    inbox.bind((address, port))
    inbox.settimeout(seconds)
    datagram = bytearray(2048)
    numbers, times = array("Q"), array("q")
    take, clock, unpack = inbox.recv_into, time.monotonic_ns, NUMBER.unpack_from
    end = clock() + int(seconds * 1e9)
    print("receiving", flush=True)
    now = 0
    try:
        while now < end:
            if take(datagram) < NUMBER.size:
                continue
            now = clock()
            numbers.append(unpack(datagram)[0])
            times.append(now)
    except (_Ended, TimeoutError):
        pass
    count = min(len(numbers), len(times))  # SIGTERM may come between the two
    number = np.array(numbers[:count], np.int64)
    np.savez(out, number=number, received=np.array(times[:count], np.int64))
    distinct = np.unique(number)
    return {
        "received": count,
        "duplicates": count - len(distinct),
        "reordered": int(late(number, flows).sum()),
        "flows": len(np.unique(distinct % flows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nat_control.lab_stream", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    for name in ("send", "receive"):
        command = what.add_parser(name)
        command.add_argument("address")
        command.add_argument("port", type=int)
        command.add_argument("--flows", type=int, default=1)
        command.add_argument("--out", type=Path, required=name == "receive")
        command.add_argument("--seconds", type=float, default=9.0 if name == "send" else 3600.0)
        if name == "send":
            command.add_argument("--rate", type=int, default=1000, help="datagrams per second")
    asked = parser.parse_args()
    if asked.flows < 1 or asked.flows > 65536 - FIRST_PORT or asked.seconds <= 0:
        parser.error(f"--flows must be 1 to {65536 - FIRST_PORT}, --seconds positive")
    if asked.what == "send" and asked.rate < 1:
        parser.error("--rate must be positive")
    signal.signal(signal.SIGTERM, _end)
    try:
        if asked.what == "send":
            said = send(asked.address, asked.port, asked.rate, asked.flows, asked.seconds, asked.out)
        else:
            said = receive(asked.address, asked.port, asked.flows, asked.seconds, asked.out)
    except OSError as error:
        sys.exit(f"lab_stream: {asked.address}:{asked.port}: {error.strerror}")
    print(json.dumps(said))


if __name__ == "__main__":
    main()
