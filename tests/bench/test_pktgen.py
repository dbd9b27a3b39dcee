# SPDX-License-Identifier: Apache-2.0
"""The generator: what it sends comes through a NAT as it says, and what is wrong is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.histogram import upper_bound
from bench.pktgen import Result, phases
from nat_fastpath.engine import VERDICT_NAMES
from tests.bench import pktgen_process
from tests.dpdk.dpdk_process import run


def test_around_a_nat(tmp_path: Path) -> None:
    told = run(pktgen_process.around_a_nat, str(tmp_path))
    flows, packets = pktgen_process.FLOWS, pktgen_process.PACKETS
    for phase, sent in (("new", flows), ("both", packets), ("sizes", 600)):
        result = told[phase]
        assert (result["sent"], result["lost"], result["not_sent"]) == (sent, 0, 0), phase
        assert result["checked"] == result["steps"] == sent
        assert (result["wrong"], result["strange"], result["out_of_order"]) == ({}, 0, 0), phase
        assert 0 < result["latency_us"]["p50"] <= result["latency_us"]["p99.99"]
    assert told["new"]["new_mappings"] == told["mappings"] == told["sessions"] == told["events"] == flows
    assert told["both"]["new_mappings"] == 0
    assert (told["unsolicited"]["sent"], told["unsolicited"]["received"]) == (1000, 0)
    verdicts = dict(zip(VERDICT_NAMES, told["verdicts"], strict=True))
    assert verdicts["forward"] == flows + packets + 600
    assert verdicts["drop_no_mapping"] + verdicts["drop_filtered"] == 1000


def test_phases_of_rfc_9693(tmp_path: Path) -> None:
    set_up, capacity, throughput, tear_down = run(pktgen_process.phases_around_a_nat, str(tmp_path))
    flows = pktgen_process.FLOWS
    assert 0 <= set_up["median"] <= 20_000
    assert (capacity["median"], capacity["more"]) == (flows, False)
    assert 0 <= throughput["median"] <= 20_000
    assert 0 < tear_down["flows"] <= 2 * flows
    assert tear_down["median"] > 0


@pytest.mark.parametrize("limit", [10.0, 700.0, 1000.0])
def test_a_rate_is_searched_for(limit: float) -> None:
    asked: list[float] = []

    def good(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = phases.search(good, 1000.0)
    assert found <= limit <= found * (1 + phases.RESOLUTION) + 1000 * phases.RESOLUTION
    assert len(asked) <= phases.TRIALS


def test_faults_are_seen(tmp_path: Path) -> None:
    told = run(pktgen_process.around_a_cable, str(tmp_path))
    assert told["received"] == 300
    assert told["wrong"] == {"pool": 300, "ttl": 300}


def test_quantiles() -> None:
    """A bucket's upper bound, never more than 1/64 above what was measured."""
    histogram = np.zeros(2304, np.uint64)
    values = [3, 63, 64, 1000, 123_456, 10**9]
    for value in values:
        shift = max(value.bit_length() - 7, 0)
        histogram[value if value < 64 else (shift + 1) * 64 + (value >> shift) - 64] += 1
    result = Result(1.0, (6, 0), (6, 0), {}, 0.0, histogram, np.zeros((2, 0), np.uint32))
    for i, value in enumerate(values):
        assert value <= result.quantile((i + 1) / len(values)) <= value * 65 / 64
    assert upper_bound(63) == 63
    assert np.isnan(Result(1.0, (0, 0), (0, 0), {}, 0.0, histogram * 0, result.steps).quantile(0.5))


@pytest.mark.parametrize("bucket", [64, 127, 128, 500])
def test_buckets_follow_each_other(bucket: int) -> None:
    assert upper_bound(bucket) > upper_bound(bucket - 1)
