# SPDX-License-Identifier: Apache-2.0
"""docs/sync.md says of the machine and its bytes what the code says."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nat_control.sync import codec, describe
from nat_control.sync.actions import State
from nat_control.sync.protocol import TABLE

FILE = Path(__file__).parents[2] / "docs" / "sync.md"


def test_the_file_is_what_the_code_says() -> None:
    text = FILE.read_text()
    assert describe.described(text) == text, "python -m nat_control.sync.describe docs/sync.md"


def test_a_part_without_a_place_is_told() -> None:
    with pytest.raises(ValueError, match="generated: diagram"):
        describe.described("# nothing")


def test_every_row_and_message_is_there() -> None:
    rows = describe.transitions().splitlines()[2:]
    told = [(row.split(" | ")[0][2:], row.split(" | ")[1].split(", ")) for row in rows]
    assert {(State(state), kind) for kind, states in told for state in states} == {
        (state, kind.value) for state, kind in TABLE
    }
    assert [int(row.split(" | ")[0][2:]) for row in describe.messages().splitlines()[2:]] == [
        *range(1, len(codec.LAYOUTS) + 1)
    ]


def test_offsets_are_those_of_the_bytes() -> None:
    data = codec.encode(codec.Resync(0x1122, 0x3344), 7)[codec.HEADER.size :]
    (row,) = [row for row in describe.messages().splitlines() if "Resync" in row]
    assert "0: first txid u64; 8: last txid u64" in row
    assert struct.unpack_from("<Q", data, 8) == (0x3344,)
