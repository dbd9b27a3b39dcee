# SPDX-License-Identifier: Apache-2.0
"""What the owner of a session must hear of its packets, and what it knows already."""

from __future__ import annotations

import numpy as np
import pytest

from nat_control.dataplane import Records
from nat_control.sync.hearsay import Hearsay
from nat_fastpath.engine import FLAG_FOREIGN, RECORD

ONE, OTHER = 1, 2


def sessions(idle: dict[int, float], flags: int = FLAG_FOREIGN) -> Records:
    """id → seconds since its last packet."""
    found = np.zeros(len(idle), RECORD)
    found["id"], found["flags"] = list(idle), flags
    found["idle_ms"] = [round(1000 * seconds) for seconds in idle.values()]
    return found


def carried(hearsay: Hearsay, **idle: float) -> list[int]:
    numbers = {"one": ONE, "other": OTHER}
    page = sessions({numbers[name]: seconds for name, seconds in idle.items()})
    return list(hearsay.carried(page)["id"].tolist())


@pytest.fixture
def hearsay() -> Hearsay:
    """Begun at 0; its first look is at 10."""
    return Hearsay(0.0)


def test_what_our_own_plane_has_carried_is_news(hearsay: Hearsay) -> None:
    hearsay.look(10.0)
    assert carried(hearsay, one=3.0, other=12.0) == [ONE]
    assert not len(hearsay.carried(sessions({ONE: 3.0}, flags=0))), "our own sessions are no news to the peer"


def test_each_packet_is_told_once_however_late_the_look(hearsay: Hearsay) -> None:
    hearsay.look(10.0)
    hearsay.look(17.0)
    assert carried(hearsay, one=6.5, other=7.5) == [ONE]


def test_what_was_heard_is_not_told_back(hearsay: Hearsay) -> None:
    hearsay.heard(sessions({ONE: 1.0, OTHER: 0.0}), 5.0)
    hearsay.look(10.0)
    assert carried(hearsay, one=6.0, other=4.9) == []  # the plane has taken a moment


def test_what_is_carried_after_it_was_heard_of_is_told(hearsay: Hearsay) -> None:
    """At once: by the next look it would be too old."""
    hearsay.heard(sessions({ONE: 1.0, OTHER: 1.0}), 5.0)
    hearsay.look(10.0)
    assert carried(hearsay, one=2.0, other=6.0) == [ONE]


def test_what_the_peer_tells_of_before_our_own_packets_does_not_hide_them(hearsay: Hearsay) -> None:
    hearsay.heard(sessions({ONE: 4.0}), 5.0)  # at 1; our own were at 3
    hearsay.look(10.0)
    assert carried(hearsay, one=7.0) == [ONE]


def test_the_latest_that_was_heard_counts(hearsay: Hearsay) -> None:
    hearsay.heard(sessions({ONE: 0.0, OTHER: 0.0}), 8.0)
    hearsay.heard(sessions({ONE: 3.0, OTHER: 0.0}), 9.0)
    hearsay.look(10.0)
    assert carried(hearsay, one=2.0, other=1.0) == []


def test_what_is_heard_during_a_look_is_not_told_back(hearsay: Hearsay) -> None:
    hearsay.look(10.0)
    hearsay.heard(sessions({ONE: 0.0}), 10.5)
    assert carried(hearsay, one=0.1, other=0.1) == [OTHER]
    hearsay.look(20.0)
    assert carried(hearsay, one=9.4) == []
