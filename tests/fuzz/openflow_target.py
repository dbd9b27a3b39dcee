# SPDX-License-Identifier: Apache-2.0
"""One input for the decoder of OpenFlow: any bytes of a switch are events or a ProtocolError, however they are cut.

The first byte of an input: the upper bits say where the stream is cut. With the lowest bit set each message gets a
header that agrees with its length (1 byte of type, 2 of length, the body); without it the bytes are the stream.
"""

from __future__ import annotations

from switch_agent import codec
from switch_agent.codec import Decoder, Event, Multipart, ProtocolError
from tests.fuzz.sync_target import one_line
from tests.switch.test_codec import ETH_TYPE, IN_PORT, SAMPLES, flow_stat, oxm

FRAMED = 1


def stream(data: bytes) -> bytes:
    made, at = [], 0
    while at + 3 <= len(data):
        body = data[at + 3 : at + 3 + int.from_bytes(data[at + 1 : at + 3], "little")]
        made.append(codec.HEADER.pack(codec.VERSION, data[at], 8 + len(body), at) + body)
        at += 3 + len(body)
    return b"".join(made)


def decode(parts: list[bytes]) -> tuple[list[Event], str]:
    """The events, and why the stream is broken; what came in its last part before that is lost."""
    decoder, found = Decoder(), list[Event]()
    try:
        for part in parts:
            found += decoder.feed(part)
    except ProtocolError as error:
        return found, one_line(error)
    return found, ""


def one_input(data: bytes) -> None:
    if not data:
        return
    cut = data[0] >> 1
    whole = stream(data[1:]) if data[0] & FRAMED else data[1:]
    events, why = decode([whole])
    some, why_in_parts = decode([whole[:cut], whole[cut:]])
    assert why == why_in_parts
    assert why or events == some
    for event in events:
        if isinstance(event, Multipart):
            _statistics(event.body)


def _statistics(body: bytes) -> None:
    try:
        flows = codec.flow_statistics(body)
        assert flows.dtype == codec.FLOW_STAT
        assert len(flows) * 56 <= len(body)
    except ProtocolError as error:
        one_line(error)
    try:
        for port in codec.ports(body):
            assert port.name == port.name.strip("\0")
    except ProtocolError as error:
        one_line(error)


def seeds() -> list[bytes]:
    tails = [oxm(IN_PORT), oxm(IN_PORT, ETH_TYPE), b""]
    statistics = b"".join(flow_stat(i, 10, tails[i % 3], i % 2) for i in range(4))
    messages = [(data[1], data[8:]) for data, _ in SAMPLES.values()]
    messages.append((codec.MULTIPART_REPLY, bytes((0, codec.FLOW_STATISTICS, 0, 0, 0, 0, 0, 0)) + statistics))
    framed = [bytes((kind,)) + len(body).to_bytes(2, "little") + body for kind, body in messages]
    streams = [data for data, _ in SAMPLES.values()]
    return [b"\x10" + data for data in streams] + [b"\x21" + one for one in (*framed, b"".join(framed))]
