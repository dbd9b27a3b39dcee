# SPDX-License-Identifier: Apache-2.0
"""OpenFlow bytes: what the library writes is read right; anything else ends in ProtocolError and nothing worse."""

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from os_ken.ofproto import ofproto_v1_3 as ofp
from os_ken.ofproto import ofproto_v1_3_parser as parser
from os_ken.ofproto.ofproto_protocol import ProtocolDesc

from switch_agent import codec
from switch_agent.codec import (
    Decoder,
    Error,
    Event,
    FlowTimeout,
    PacketIn,
    ProtocolError,
    TransactionComplete,
)


def message(kind: int, body: bytes = b"", xid: int = 7, version: int = 4) -> bytes:
    return codec.HEADER.pack(version, kind, 8 + len(body), xid) + body


def oxm(*fields: tuple[int, bytes]) -> bytes:
    return b"".join(struct.pack("!HBB", 0x8000, number << 1, len(value)) + value for number, value in fields)


def match(fields: bytes) -> bytes:
    length = 4 + len(fields)
    return struct.pack("!HH", 1, length) + fields + bytes(-length % 8)


IN_PORT = (0, (3).to_bytes(4, "big"))
ETH_TYPE = (5, b"\x08\x00")


def packet_in(frame: bytes, fields: bytes) -> bytes:
    head = struct.pack("!IHBBQ", codec.NO_BUFFER, len(frame), 1, 0, 0x1234)
    return message(codec.PACKET_IN, head + match(fields) + bytes(2) + frame)


def flow_stat(cookie: int, packets: int, fields: bytes, group: int) -> bytes:
    actions = struct.pack("!HH4x", 24, 8) + (struct.pack("!HHI", 22, 8, group) if group else b"")
    instructions = struct.pack("!HH4x", 4, 8 + len(actions)) + actions
    rest = match(fields) + instructions
    head = struct.pack(
        "!HBxIIHHHH4xQQQ", 48 + len(rest), 0, 9, 0, 300, 0, 0, 0, cookie, packets, packets * 60
    )
    return head + rest


SAMPLES: dict[str, tuple[bytes, Event | None]] = {
    "hello": (message(0), codec.Hello()),
    "hello of 1.5 with a bitmap": (message(0, struct.pack("!HHI", 1, 8, 1 << 4), version=6), codec.Hello()),
    "error": (
        message(1, struct.pack("!HH", 5, 1) + message(codec.FLOW_MOD, (0xAB).to_bytes(8, "big") + bytes(40))),
        Error(7, 5, 1, "error 5/1", 0xAB),
    ),
    "error that quotes nothing": (message(1, struct.pack("!HH", 1, 1)), Error(7, 1, 1, "error 1/1")),
    "echo": (message(2, b"body"), codec.Echo(7, b"body")),
    "features": (
        message(6, struct.pack("!QIBB2xII", 0xDA7A, 0, 254, 0, 0x4F, 0)),
        codec.Features(0xDA7A, 254),
    ),
    "packet-in": (packet_in(b"frame", oxm(IN_PORT)), PacketIn(3, b"frame", 1, 0x1234)),
    "packet-in, port later": (packet_in(b"f", oxm(ETH_TYPE, IN_PORT)), PacketIn(3, b"f", 1, 0x1234)),
    "flow removed": (
        message(11, struct.pack("!QHBBIIHHQQ", 5, 300, 0, 0, 60, 0, 60, 0, 10, 1000) + match(oxm(IN_PORT))),
        FlowTimeout(5, 0, 60, 10, 1000),
    ),
    "port status": (
        message(12, struct.pack("!B7xI4x6s2x16sII24x", 2, 3, b"\2\0\0\0\0\1", b"inner", 0, 1)),
        codec.PortStatus(codec.PortDescription(3, "inner", b"\2\0\0\0\0\1", False), 2),
    ),
    "barrier": (message(21), TransactionComplete(7)),
    "statistics": (message(19, struct.pack("!HH4x", 1, 1) + b"x"), codec.Multipart(7, 1, True, b"x")),
    "ignored": (message(25, bytes(16)), None),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_each_message_is_read(name: str) -> None:
    data, expected = SAMPLES[name]
    assert Decoder().feed(data) == ([expected] if expected else [])


@given(st.lists(st.sampled_from(sorted(SAMPLES)), max_size=20), st.data())
def test_any_split_of_the_stream_reads_the_same(names: list[str], data: st.DataObject) -> None:
    stream = b"".join(SAMPLES[name][0] for name in names)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    decoder, found = Decoder(), list[Event]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += decoder.feed(stream[start:end])
    assert found == [event for name in names if (event := SAMPLES[name][1])]


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        Decoder().feed(data)


@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_a_damaged_message_is_read_or_refused(name: str, data: st.DataObject) -> None:
    """Shortened with a header that agrees, or with any byte changed."""
    whole = bytearray(SAMPLES[name][0])
    body = whole[8 : data.draw(st.integers(8, len(whole)))]
    for at in data.draw(st.lists(st.integers(0, max(len(body) - 1, 0)), max_size=4)):
        if body:
            body[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        Decoder().feed(message(whole[1], bytes(body)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (struct.pack("!BBHI", 4, 21, 7, 1), "says that it has 7 bytes"),
        (message(21, version=5), "OpenFlow version 0x5"),
        (message(0, version=1), "speaks OpenFlow version 0x1 at most"),
        (message(0, struct.pack("!HHI", 1, 8, 1 << 1), version=6), "does not speak OpenFlow 1.3"),
        (message(0, struct.pack("!HHI", 1, 80, 1 << 4)), "beyond its end"),
        (message(codec.FLOW_MOD, bytes(48)), "which switches do not send"),
        (message(codec.FEATURES_REPLY, bytes(8)), "type 6 ends after 16 bytes"),
        (packet_in(b"", oxm(ETH_TYPE)), "does not say where"),
        (
            message(codec.PACKET_IN, struct.pack("!IHBBQHH", 0, 0, 0, 0, 0, 1, 9000) + bytes(30)),
            "beyond its end",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        Decoder().feed(data)


@pytest.mark.parametrize("tails", [[oxm(IN_PORT)] * 50, [oxm(IN_PORT), oxm(IN_PORT, ETH_TYPE), b""] * 7])
def test_statistics_with_entries_of_one_or_many_lengths(tails: list[bytes]) -> None:
    body = b"".join(flow_stat(i, 10 * i, tail, i % 5) for i, tail in enumerate(tails))
    found = codec.flow_statistics(body)
    numbers = np.arange(len(tails))
    assert found["cookie"].tolist() == numbers.tolist()
    assert found["packets"].tolist() == (numbers * 10).tolist()
    assert found["bytes"].tolist() == (numbers * 600).tolist()
    assert found["group"].tolist() == (numbers % 5).tolist()
    assert set(found["priority"].tolist()) == {300}
    assert set(found["duration_s"].tolist()) == {9}
    with pytest.raises(ProtocolError):
        codec.flow_statistics(body[:-3])


@given(st.binary(max_size=300))
def test_any_statistics_are_read_or_refused(body: bytes) -> None:
    for read in (codec.flow_statistics, codec.ports):
        with contextlib.suppress(ProtocolError):
            read(body)


@pytest.mark.parametrize("target", [{"port": 2}, {"group": 99}])
def test_a_packet_out_is_what_the_library_makes(target: dict[str, int]) -> None:
    action: Any = parser.OFPActionOutput(2, 0) if "port" in target else parser.OFPActionGroup(99)
    made = parser.OFPPacketOut(
        ProtocolDesc(4), ofp.OFP_NO_BUFFER, ofp.OFPP_CONTROLLER, [action], data=b"frame"
    )
    made.set_xid(5)
    made.serialize()
    assert codec.packet_out(b"frame", **target, txid=5) == bytes(made.buf)
    with pytest.raises(ValueError, match="too long"):
        codec.packet_out(bytes(66000), port=1)
