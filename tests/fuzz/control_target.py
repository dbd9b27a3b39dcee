# SPDX-License-Identifier: Apache-2.0
"""One input for the operator's socket: whatever a client says, each answer is a line of JSON, and the core stays whole.

The input is what the client sends, requests with line ends between them. Behind the socket are a core with some
sessions, its verbs, and a reload of a file that stands still.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from nat_control import config as c
from nat_control.api import Api, Conversation
from nat_control.live import Live
from nat_control.reload import Reload
from nat_fastpath.engine import Core
from tests.packets import CLIENT, INSIDE, SERVER, START, frame, udp

FOLDER = tempfile.TemporaryDirectory()
FILE = Path(FOLDER.name) / "nat.yaml"
FILE.write_bytes((Path(__file__).parents[2] / "examples" / "server.yaml").read_bytes())


class Sink:
    """A client that reads everything, and is gone then."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.transport = self

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None: ...


class Instance:
    def __init__(self) -> None:
        config = c.load(FILE)

        def to_core(config: c.Config) -> list[Any]:
            return [c.to_core(config, [bytes((2, 0, 0, 0, 0, i)) for i in (1, 2)])]

        self.core = Core(*to_core(config))
        packets = [frame(udp(CLIENT, 4000 + i, SERVER, 53), mac="02:00:00:00:01:05") for i in range(5)]
        self.core.burst([(INSIDE, packet) for packet in packets], START)
        self.sessions = len(self.core.sessions()[0])
        self.live = Live(self.core, ("internal", "external"))
        self.reload = Reload(
            config, FILE, [self.core], to_core, taken=lambda _: None, say=_say, threads=False
        )
        answers = {"status": lambda: {"instance": "one"}, "hosts": self.live.hosts}
        verbs = {**self.live.verbs, "reload": self.reload.verb}
        self.api = Api(answers, self.core.sessions, verbs, threads=False)

    async def serve(self, data: bytes) -> bytes:
        reader, sink = asyncio.StreamReader(limit=65536), Sink()
        reader.feed_data(data)
        reader.feed_eof()
        await self.api._serve(Conversation(reader, sink, threads=False), reader)  # type: ignore[arg-type]
        return bytes(sink.data)


def _say(line: str) -> None:
    assert line.isprintable()


INSTANCE = Instance()
LOOP = asyncio.new_event_loop()


def one_input(data: bytes) -> None:
    said = LOOP.run_until_complete(INSTANCE.serve(data))
    while said:
        line, end, said = said.partition(b"\n")
        answer = json.loads(line)
        assert end
        assert isinstance(answer, dict)
        if "records" in answer:
            said = said[answer["records"]["bytes"] :]
        assert "Traceback" not in line.decode()
    assert len(INSTANCE.core.sessions()[0]) == INSTANCE.sessions > 0


def seeds() -> list[bytes]:
    asked: list[dict[str, Any]] = [
        {"show": "status"},
        {"show": "sessions", "filter": {"internal": "10.0.0.0/24", "port": 53, "older": 1}, "limit": 2},
        {
            "show": "sessions",
            "format": "binary",
            "cursor": 1,
            "filter": {"protocol": "tcp", "state": "reset"},
        },
        {"show": "hosts"},
        {
            "explain": {
                "source": "10.0.0.7:5000",
                "destination": "203.0.113.9:53",
                "protocol": "udp",
                "ttl": 3,
            }
        },
        {"trace": {"internal": "10.0.0.7:5000", "protocol": "udp", "packets": 2, "seconds": 1}},
        {"events": {}},
        {"reload": {"check": True}},
        {"reload": {"drain": True, "force": False}},
    ]
    lines = [json.dumps(one).encode() + b"\n" for one in asked]
    return [*lines, b"".join(lines), b"[" * 1000 + b"\n", b"null\n{}\n"]
