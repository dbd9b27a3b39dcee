# SPDX-License-Identifier: Apache-2.0
"""The stream of numbered datagrams: it knows which were lost, and when."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from nat_control.lab import Lab
from nat_control.lab_stream import Record

STREAM = [sys.executable, "-m", "nat_control.lab_stream"]
MS = 1_000_000


def test_a_record_knows_what_was_lost() -> None:
    sent = np.arange(10, dtype=np.int64) * MS + MS
    number = np.array([0, 1, 3, 2, 3, 7, 8, 9, 999])  # 3 comes twice, 999 is a stranger's
    received = np.array([1, 2, 3, 4, 5, 9, 10, 11, 12], np.int64) * MS
    record = Record(sent, number, received)
    assert record.lost().tolist() == [4, 5, 6]
    assert record.lost(6 * MS, 7 * MS).tolist() == [5]
    assert record.arrival()[3] == 3 * MS
    assert record.gap() == (5 * MS, 9 * MS)


def test_a_record_knows_what_came_late() -> None:
    sent = np.arange(10, dtype=np.int64)
    one = Record(sent, np.array([0, 2, 1, 3, 3, 2]), sent[:6])
    assert one.reordered().tolist() == [1]
    two = Record(sent, np.array([0, 1, 3, 2, 7, 4, 5, 5]), sent[:8])
    assert two.reordered(flows=2).tolist() == [5], "of another flow it may come after"
    assert two.reordered().tolist() == [2, 4, 5]
    assert Record(sent, np.zeros(0, np.int64), sent[:0]).reordered(3).tolist() == []


def test_an_interruption_is_found_where_it_was(tmp_path: Path) -> None:
    sent, received = tmp_path / "sent.npy", tmp_path / "received.npz"
    with Lab() as lab:
        one, other = lab.namespace("one"), lab.namespace("other")
        lab.cable(one, "eth0", other, "eth0")
        one.address("eth0", "10.9.0.1/24")
        other.address("eth0", "10.9.0.2/24")
        end = ["10.9.0.2", "7777", "--flows", "3", "--out"]
        receiver = other.start(*STREAM, "receive", *end, str(received), name="r").ready("receiving")
        sender = one.start(*STREAM, "send", *end, str(sent), "--seconds", "2", name="s").ready("sending")
        time.sleep(0.5)
        down = time.monotonic_ns()
        other.ip("address", "del", "10.9.0.2/24", "dev", "eth0")
        time.sleep(0.3)
        other.ip("address", "add", "10.9.0.2/24", "dev", "eth0")
        up = time.monotonic_ns()
        assert sender.wait(10) == 0, sender.output
        assert receiver.stop() == 0, receiver.output
        assert json.loads(receiver.last_line)["flows"] == 3
    record = Record.load(sent, received)
    assert len(record.sent) == 2000
    lost = record.lost()
    assert len(lost) + len(record.number) == 2000
    assert 250 <= len(lost) <= (up - down) / MS + 50
    assert record.lost(down - 50 * MS, up + 50 * MS).tolist() == lost.tolist()
    last, first = record.gap()
    assert first - last >= 250 * MS
    assert down - 50 * MS < last < first < up + 50 * MS
