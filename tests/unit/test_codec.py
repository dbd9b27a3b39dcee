# SPDX-License-Identifier: Apache-2.0
"""Bytes of the sync protocol: every message comes back as it was, anything else is a CodecError."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat_control.dataplane import NO_RECORDS, Records
from nat_control.sync import codec
from nat_control.sync.codec import (
    HEADER,
    LAYOUTS,
    MAX_PAYLOAD,
    MAX_RECORDS,
    BucketEntries,
    Bye,
    Carries,
    CodecError,
    Decoder,
    DeleteComplete,
    DeleteEntries,
    Digest,
    Error,
    HandOver,
    Hello,
    InFront,
    InitState,
    InstallComplete,
    InstallEntries,
    Message,
    Moved,
    Offload,
    PoolRange,
    Ready,
    Recall,
    Received,
    Resync,
    UpdateEntries,
    WantEntries,
    encode,
)
from nat_control.sync.digest import Summary, differing
from nat_fastpath.engine import RECORD

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
records = st.integers(0, 5).flatmap(
    lambda n: st.binary(min_size=96 * n, max_size=96 * n).map(lambda raw: np.frombuffer(raw, RECORD))
)
ids = st.lists(u64, max_size=5).map(lambda values: np.array(values, np.uint64))
pools = st.tuples(u32, u32, u16, u16).map(lambda p: PoolRange(min(p[:2]), max(p[:2]), min(p[2:]), max(p[2:])))
EPOCH = 0xFFFFFFFF
messages = st.one_of(
    st.builds(
        Hello,
        u8,
        st.just(EPOCH),
        u32,
        st.lists(pools, max_size=4).map(tuple),
        u16,
        st.binary(min_size=16, max_size=16),
        u8,
    ),
    st.builds(InitState, u64, u32, st.booleans(), records),
    st.builds(Ready, u64, ids),
    st.builds(InstallEntries, u64, records),
    st.builds(UpdateEntries, records),
    st.builds(DeleteEntries, u64, records),
    st.builds(InstallComplete, u64, ids),
    st.builds(DeleteComplete, u64),
    st.builds(Digest, u64, st.just(np.arange(codec.BUCKETS, dtype=np.uint64)), u64),
    st.builds(
        BucketEntries,
        u64,
        st.sets(st.integers(0, codec.BUCKETS - 1), max_size=9).map(lambda found: tuple(sorted(found))),
        st.binary(max_size=64).map(lambda raw: np.frombuffer(raw[: len(raw) // 16 * 16], codec.ENTRY)),
    ),
    st.builds(WantEntries, ids),
    st.builds(Resync, u64, u64),
    st.builds(Offload, u64, ids),
    st.builds(Recall, u64, ids),
    st.builds(Moved, u64, u32, ids),
    st.builds(
        InFront,
        u32,
        u32,
        st.binary(max_size=64).map(lambda raw: np.frombuffer(raw[: len(raw) // 16 * 16], codec.CARRIED)),
    ),
    st.builds(Error, u16, st.text(st.characters(exclude_categories=["Cs"]), max_size=300)),
    st.just(Bye()),
    st.builds(HandOver, st.integers(0, 255), st.booleans()),
    st.builds(
        Carries,
        st.integers(0, 255),
        st.booleans(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    ),
)


def plain(message: Message) -> tuple[object, ...]:
    """Comparable: arrays as bytes."""
    values = (getattr(message, field.name) for field in dataclasses.fields(message))
    return (type(message), *(v.tobytes() if isinstance(v, np.ndarray) else v for v in values))


def decode(*parts: bytes) -> list[Received]:
    decoder = Decoder()
    found = [received for part in parts for received in decoder.feed(part)]
    decoder.end()
    return found


def header(kind: int, length: int, *, magic: int = codec.MAGIC, version: int = codec.VERSION) -> bytes:
    return HEADER.pack(magic, version, kind, EPOCH, length)


def some(n: int) -> Records:
    made = np.zeros(n, RECORD)
    made["id"] = np.arange(1, n + 1)
    return made


@given(st.lists(messages, max_size=4), st.data())
def test_messages_come_back_however_the_stream_is_split(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(encode(message, EPOCH) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [plain(r.message) for r in decode(*parts)] == [plain(message) for message in sent]


@given(st.lists(messages, min_size=1, max_size=3))
def test_byte_by_byte(sent: list[Message]) -> None:
    stream = b"".join(encode(message, EPOCH) for message in sent)
    found = decode(*(stream[i : i + 1] for i in range(len(stream))))
    assert [plain(r.message) for r in found] == [plain(message) for message in sent]
    assert {r.epoch for r in found} == {EPOCH}


def run(parts: Iterable[bytes]) -> None:
    """Feeds until the stream proves broken."""
    decoder, why = Decoder(), None
    try:
        for part in parts:
            for received in decoder.feed(part):
                assert type(received.message) in LAYOUTS
            assert decoder.kept <= HEADER.size + MAX_PAYLOAD
    except CodecError as error:
        why = str(error)
    if why is not None:
        assert why
        assert "\n" not in why
        with pytest.raises(CodecError):
            list(decoder.feed(b""))


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_are_messages_or_a_codec_error(parts: list[bytes]) -> None:
    run(parts)


@given(st.sampled_from([layout.number for layout in LAYOUTS.values()]), st.binary(max_size=400), st.data())
def test_any_payload_is_a_message_or_a_codec_error(kind: int, payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(payload)))
    run([header(kind, len(payload)) + payload[:at], payload[at:]])


@given(messages, st.data())
def test_a_flipped_bit_does_no_harm(message: Message, data: st.DataObject) -> None:
    stream = bytearray(encode(message, EPOCH))
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    stream[bit // 8] ^= 1 << bit % 8
    run([bytes(stream)])


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (header(11, 0, magic=0x1234), "magic"),
        (header(11, 0, version=1), "version 1"),
        (header(0, 0), "unknown message type 0"),
        (header(200, 0), "unknown message type 200"),
        (header(4, MAX_PAYLOAD + 1), "at most"),
        (header(4, 0xFFFFFFFF), "at most"),
        (header(4, 8 + 95) + bytes(103), "whole number of 96-byte records"),
        (header(4, 7) + bytes(7), "needs 8"),
        (header(7, 12) + bytes(12), "session ids"),
        (header(8, 9) + bytes(9), "instead of 8"),
        (header(9, 16) + bytes(16), "instead of"),
        (header(11, 1) + bytes(1), "instead of 0"),
        (header(15, 39) + bytes(39), "needs 40"),
        (header(15, 41) + bytes(41), "16-byte records"),
        (header(16, 9) + bytes(9), "session ids"),
        (header(17, 8) + bytes(8), "instead of 16"),
        (header(10, 1027) + bytes(1027), "a text of 1025"),
        (header(13, 1) + bytes(1), "instead of 2"),
        (header(14, 2) + b"\1\2", "lasting flag"),
        (header(14, 1027) + bytes(1027), "a text of 1025"),
        (header(2, 16) + bytes(12) + b"\2" + bytes(3), "last flag"),
        (header(1, 28) + bytes(8) + b"\xff\xff" + bytes(18), "65535 address ranges"),
        (header(1, 28) + bytes(8) + b"\1\0" + bytes(18), "instead of 40"),
        (header(1, 40) + bytes(8) + b"\1\0" + bytes(18) + b"\2" + bytes(11), "empty range"),
    ],
)
def test_what_is_refused(stream: bytes, why: str) -> None:
    with pytest.raises(CodecError, match=why):
        decode(stream)


@given(messages, st.integers(1))
def test_a_cut_stream_is_named(message: Message, cut: int) -> None:
    stream = encode(message, EPOCH)
    with pytest.raises(CodecError, match="bytes into a message"):
        decode(stream[: -(cut % (len(stream) - 1)) - 1])


def test_a_wrong_length_is_not_believed() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(header(4, 0xFFFFFFFF))
        decoder = Decoder()
        assert list(decoder.feed(header(4, MAX_PAYLOAD))) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_limits_of_the_sender() -> None:
    assert len(encode(InitState(1, 0, True, some(MAX_RECORDS)), 1)) <= HEADER.size + MAX_PAYLOAD
    with pytest.raises(CodecError, match="at most"):
        encode(InitState(1, 0, True, some(MAX_RECORDS + 1)), 1)
    with pytest.raises(CodecError, match="InstallEntries"):
        encode(InstallEntries(-1, NO_RECORDS), 1)
    with pytest.raises(CodecError, match="Bye"):
        encode(Bye(), 1 << 32)
    with pytest.raises(CodecError, match="this version"):
        encode(UpdateEntries(np.zeros(1, np.uint64)), 1)
    with pytest.raises(CodecError, match="address ranges"):
        encode(Hello(1, 1, 0, (PoolRange(1, 1, 1, 1),) * 257), 1)


def test_an_error_text_is_cut_between_characters() -> None:
    (received,) = decode(encode(Error(3, "ä" * 1000), 1))
    assert received.message == Error(3, "ä" * 512)


def test_records_stay_valid_after_the_buffer_has_moved_on() -> None:
    decoder = Decoder()
    first = next(iter(decoder.feed(encode(UpdateEntries(some(3)), 1)))).message
    list(decoder.feed(encode(UpdateEntries(some(900)), 1)))
    assert isinstance(first, UpdateEntries)
    assert list(first.records["id"]) == [1, 2, 3]


def test_pools_say_what_they_share() -> None:
    one = PoolRange(0x0A000001, 0x0A000005, 1024, 2047)
    assert one.overlap(PoolRange(0x0A000001, 0x0A000005, 2048, 3000)) is None
    assert one.overlap(PoolRange(0x0A000006, 0x0A000009, 1024, 2047)) is None
    shared = one.overlap(PoolRange(0x0A000005, 0x0A000009, 2047, 3000))
    assert str(shared) == "10.0.0.5 ports 2047-2047"
    assert str(one) == "10.0.0.1-10.0.0.5 ports 1024-2047"


# -- the digest -------------------------------------------------------------------------------------------


def random_records(n: int) -> Records:
    return np.frombuffer(np.random.default_rng(1).bytes(96 * n), RECORD)


def test_a_digest_depends_on_the_set_and_not_on_the_order() -> None:
    made = random_records(1000)
    one, other = Summary(5), Summary(5)
    one.add(made)
    other.add(made[500:])
    other.add(made[:500][::-1])
    assert differing(one.buckets, other.buckets) == []
    other.remove(made[:1])
    assert len(differing(one.buckets, other.buckets)) == 1
    other.remove(made[1:])
    assert not other.buckets.any()


def test_a_digest_ignores_times_and_counters_and_sees_every_key() -> None:
    seen = {"id", "protocol"} | {
        f"{s}_{p}" for s in ("internal", "external", "remote") for p in ("addr", "port")
    }
    for name in RECORD.names or ():
        one, other, changed = Summary(), Summary(), some(3)
        one.add(changed)
        changed[name][1] ^= 1
        other.add(changed)
        assert bool(differing(one.buckets, other.buckets)) == (name in seen), name


def test_a_digest_has_a_key_and_uses_all_buckets() -> None:
    one, other = Summary(1), Summary(2)
    one.add(some(10_000))
    other.add(some(10_000))
    assert len(differing(one.buckets, other.buckets)) == codec.BUCKETS
