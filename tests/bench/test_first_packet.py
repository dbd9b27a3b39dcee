# SPDX-License-Identifier: Apache-2.0
"""What a new flow's first packet takes more: from times that are known."""

import numpy as np

from bench.first_packet import SEEN, row_of, server_times


def test_the_servers_time_is_that_of_questions() -> None:
    """Question 0 is 3 ms at the server, 1 takes 1 ms, and 2 is lost there; answers, and what is seen again, do not count."""
    seen = np.array(
        [
            (0, 10_000_000, 0, 1), (0, 13_000_000, 1, 0), (0, 14_000_000, 1, 1), (0, 19_000_000, 0, 0),
            (1, 20_000_000, 0, 1), (1, 21_000_000, 1, 0), (1, 29_000_000, 1, 0), (2, 30_000_000, 0, 1),
        ],
        SEEN,
    )  # fmt: skip
    assert np.array_equal(server_times(seen, 2), [[3, 1], [np.nan, np.nan]], equal_nan=True)


def test_added_is_over_the_median_of_the_second() -> None:
    trip = np.array([[5.0, 1.0], [6.0, 2.0], [9.0, 3.0], [np.nan, 1.0]])
    row = row_of("synchronous", trip, trip / 10)
    assert (row["flows"], row["unanswered"], row["known_rtt_ms"]) == (4, 1, 2.0)
    assert row["added_ms"]["p50"] == 4.0
    assert row["added_ms"]["max"] == 7.0
    assert row["added_at_server_ms"]["p50"] == 0.4
