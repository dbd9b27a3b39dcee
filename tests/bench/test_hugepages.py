# SPDX-License-Identifier: Apache-2.0
"""Hugepages are lent: as many as before afterwards, whoever was killed meanwhile. On files that stand for the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import hugepages


@pytest.fixture
def number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten pages of which three are free; here a page that is added is not free."""
    number, free = tmp_path / "nr_hugepages", tmp_path / "free_hugepages"
    number.write_text("10\n")
    free.write_text("3\n")
    for name, path in (("NUMBER", number), ("FREE", free), ("BEFORE", tmp_path / "before")):
        monkeypatch.setattr(hugepages, name, path)
    return number


def test_enough_are_there(number: Path) -> None:
    with hugepages.reserved(6):
        assert int(number.read_text()) == 10
    assert int(number.read_text()) == 10


def test_too_few_are_said_and_put_back(number: Path) -> None:
    said = "8 MB of hugepages are needed, and memory for only 6 is in one piece"
    with pytest.raises(hugepages.NoHugepages, match=said), hugepages.reserved(8):
        raise AssertionError
    assert int(number.read_text()) == 10
    with hugepages.if_there_are(8):
        assert int(number.read_text()) == 10


def test_who_comes_next_puts_back_what_a_killed_one_took(number: Path) -> None:
    hugepages.BEFORE.write_text("7\n")
    with hugepages.reserved(2):
        assert int(number.read_text()) == 7
        assert int(hugepages.BEFORE.read_text()) == 7
        number.write_text("500\n")
    assert int(number.read_text()) == 7
    assert hugepages.BEFORE.read_text() == ""


def test_where_there_are_none(tmp_path: Path, number: Path) -> None:
    number.unlink()
    said = r"no hugepages can be reserved here: .*nr_hugepages: No such"
    with pytest.raises(hugepages.NoHugepages, match=said), hugepages.reserved(2):
        raise AssertionError
