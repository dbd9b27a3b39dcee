# SPDX-License-Identifier: Apache-2.0
"""A peer in a process of its own, a peer whose every datagram the test writes itself, and waiting."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nat_fastpath.watch import Watch

KEY = bytes(range(16))
ROOT = Path(__file__).parents[2]
LEAVE, STALLED = 1, 2

CHILD = """
import ctypes, json, os, socket, sys
from nat_fastpath.watch import Watch

setup = json.loads(sys.argv[1])
tcp = socket.create_connection(("127.0.0.1", setup["tcp"])) if "tcp" in setup else None
stream, other = socket.socketpair()
loops = ctypes.c_uint64()
if setup["work"]:
    setup["watch"]["counters"] = [ctypes.addressof(loops)]
watch = Watch(("127.0.0.1", 0), ("127.0.0.1", setup["peer"]), bytes.fromhex(setup["key"]), **setup["watch"])
watch.start()
say = lambda value: print(json.dumps(value), flush=True)
say({"address": watch.address, "pid": os.getpid()})
for line in sys.stdin:
    match line.split():
        case ["arm"]: say(watch.arm(b"prepared", stream.fileno()))
        case ["leave"]: say(watch.leave())
        case ["work"]:
            loops.value += 1
            say(None)
        case ["fired"]: say(watch.fired)
        case ["stats"]: say(watch.stats())
"""


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for ``condition``, and fails when it does not come true even on a very slow machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def watch(peer: tuple[str, int] | None = None, key: bytes = KEY, **changes: Any) -> Watch:
    """A watch at a free port, with intervals that a busy machine keeps."""
    settings: dict[str, Any] = {"instance": 1, "epoch": 100, "interval_ms": 20.0, "misses": 3} | changes
    return Watch(("127.0.0.1", 0), peer, key, **settings)


@contextlib.contextmanager
def pair(
    first: dict[str, Any] | None = None, second: dict[str, Any] | None = None
) -> Iterator[tuple[Watch, Watch]]:
    """Two running watches that have found each other."""
    with (
        watch(**(first or {})) as a,
        watch(a.address, **({"instance": 2, "epoch": 200} | (second or {}))) as b,
    ):
        until(lambda: a.stats()["alive"] and b.stats()["alive"])
        yield a, b


def take(stream: socket.socket) -> bytes:
    """What can be read at once."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while more := stream.recv(1 << 20, socket.MSG_DONTWAIT):
            data += more
    return data


class Peer:
    """A watch in another process, which obeys lines of text."""

    def __init__(
        self, peer: Watch, tcp: socket.socket | None = None, *, work: bool = False, **changes: Any
    ) -> None:
        """``work``: with a worker, which advances by one each time that it is asked to ``work``."""
        setup: dict[str, Any] = {"peer": peer.address[1], "key": KEY.hex(), "work": work}
        setup["watch"] = {"instance": 2, "epoch": 200, "interval_ms": 20.0} | changes
        if tcp is not None:
            setup["tcp"] = tcp.getsockname()[1]
        command = [sys.executable, "-c", CHILD, json.dumps(setup)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tcp = tcp.accept()[0] if tcp is not None else None
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def pause(self) -> None:
        """SIGSTOP, and no return before it is obeyed."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.tcp):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


# -- the packet, written down a second time ----------------------------------------------------------------


def siphash(key: bytes, data: bytes) -> int:
    """SipHash-2-4 after the paper, section 2."""
    mask = (1 << 64) - 1
    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def turn(a: int, b: int, bits: int, swap: bool) -> None:
        v[a] = v[a] + v[b] & mask
        v[b] = ((v[b] << bits | v[b] >> 64 - bits) & mask) ^ v[a]
        if swap:
            v[a] = (v[a] << 32 | v[a] >> 32) & mask

    def rounds(n: int) -> None:
        for _ in range(n):
            turn(0, 1, 13, True)
            turn(2, 3, 16, False)
            turn(0, 3, 21, False)
            turn(2, 1, 17, True)

    whole = data.ljust(len(data) // 8 * 8 + 7, b"\0") + bytes([len(data) & 255])
    for (word,) in struct.iter_unpack("<Q", whole):
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 255
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


BODY = struct.Struct("<4sBBBBIIQQQQII")


class Forger:
    """Speaks for instance 2, epoch 200, to ``target``; every field of a heartbeat can be another."""

    def __init__(self, target: Watch, nonce: int = 77) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(20)
        self.target = target
        self.fields: dict[str, Any] = {
            "magic": b"TNHB", "version": 2, "instance": 2, "flags": 0, "workers": 0, "epoch": 200,
            "interval_us": 20_000, "nonce": nonce, "echo": 0, "sequence": 0, "progress": 0,
            "term": 0, "silence_us": 0,
        }  # fmt: skip

    def heartbeat(self, key: bytes = KEY, **changes: Any) -> bytes:
        """The next one; numbers count up."""
        self.fields["sequence"] += 1
        body = BODY.pack(*(self.fields | changes).values())
        return body + siphash(key, body).to_bytes(8, "little")

    def send(self, datagram: bytes) -> None:
        self.socket.sendto(datagram, self.target.address)

    def hear(self) -> dict[str, Any]:
        """The next heartbeat of the target."""
        data = self.socket.recv(2048)
        assert siphash(KEY, data[:-8]) == int.from_bytes(data[-8:], "little")
        return dict(zip(self.fields, BODY.unpack(data[:-8]), strict=True))

    def converse(self) -> list[bytes]:
        """Sends until the target holds us alive, and returns what was sent."""
        sent: list[bytes] = []

        def alive() -> bool:
            sent.append(self.heartbeat())
            self.send(sent[-1])
            self.fields["echo"] = self.hear()["nonce"]
            return bool(self.target.stats()["alive"])

        until(alive)
        return sent

    def __enter__(self) -> "Forger":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
