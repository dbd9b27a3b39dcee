# SPDX-License-Identifier: Apache-2.0
"""Histograms of nanoseconds in the manner of HDR: 64 buckets to each power of two, so a value is told to 1/64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BUCKETS = 2304
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}


def upper_bound(bucket: int) -> float:
    """Nanoseconds; the first 64 buckets are one each, then 64 to each power of two."""
    if bucket < 64:
        return float(bucket)
    shift, step = bucket // 64 - 1, bucket % 64
    return float(((64 + step + 1) << shift) - 1)


def quantile(histogram: NDArray[Any], share: float) -> float:
    """Nanoseconds that so many took at most; each bucket's upper bound. NaN when there are none."""
    total = int(histogram.sum())
    if not total:
        return float("nan")
    at = int(np.searchsorted(np.cumsum(histogram), share * total))
    return upper_bound(min(at, len(histogram) - 1))


def quantiles(histogram: NDArray[Any]) -> dict[str, float]:
    """Those by name, in µs; empty when there are none."""
    if not histogram.sum():
        return {}
    return {name: round(quantile(histogram, share) / 1e3, 3) for name, share in QUANTILES.items()}


def curve(histogram: NDArray[Any]) -> list[list[float]]:
    """For a plot: (µs, share that took at most so long) of each bucket that has any."""
    there = np.flatnonzero(histogram)
    shares = np.cumsum(histogram)[there] / max(int(histogram.sum()), 1)
    return [
        [round(upper_bound(int(bucket)) / 1e3, 4), round(float(share), 7)]
        for bucket, share in zip(there, shares, strict=True)
    ]
