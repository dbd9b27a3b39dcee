# SPDX-License-Identifier: Apache-2.0
"""Any sequence of calls: every plane answers like the reference in memory, and holds the same in the end."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nat_control.dataplane import CLOSED_BY_COMMAND, Records
from nat_fastpath.engine import EVENT_CLOSE, FLAG_FOREIGN, FLAG_PREVAILS
from tests.memory_plane import MemoryPlane
from tests.packets import number
from tests.planes.conftest import Make
from tests.planes.subjects import INSTANCE, PEER, Subject, session
from tests.planes.test_conformance import plain

MOST = 10  # sessions of the plane; the records below are more
STEPS = 50
ENDPOINTS = 6  # few, so that contradictions are frequent


def universe(rng: random.Random) -> Records:
    """Records over few endpoints; many cannot be held beside each other."""
    found = []
    for at in range(80):
        number_inside = rng.randrange(ENDPOINTS)
        # of the same core, where there are two: see subjects.HOSTS
        others = [n for n in range(ENDPOINTS) if n // 2 % 2 == number_inside // 2 % 2]
        inside, outside = session(number_inside), session(rng.choice(others))
        if rng.random() < 0.5:
            outside = inside
        one = inside.copy()
        one["external_addr"], one["external_port"] = outside["external_addr"], outside["external_port"]
        one["remote_addr"] = number(f"203.0.113.{rng.randrange(1, 5)}")
        one["protocol"] = rng.choice([6, 17])
        one["id"] = 1 << 60 | rng.choice([INSTANCE, PEER, 3]) << 52 | 1 + at
        found.append(one)
    return np.concatenate(found)


def some(rng: random.Random, records: Records) -> Records:
    chosen = records[[rng.randrange(len(records)) for _ in range(rng.randrange(8))]]
    chosen["flags"] = [rng.choice([0, FLAG_FOREIGN]) | rng.choice([0, FLAG_PREVAILS]) for _ in chosen]
    chosen["packets_out"] = [rng.randrange(1 << 40) for _ in chosen]
    chosen["tcp_state"] = [rng.randrange(1, 9) if one["protocol"] == 6 else 0 for one in chosen]
    return chosen


def ends(events: Records) -> list[tuple[int, ...]]:
    assert set(events["type"].tolist()) <= {EVENT_CLOSE}
    assert set(events["reason"].tolist()) <= {CLOSED_BY_COMMAND}
    return [(int(one["id"]), int(one["flags"])) for one in events]


def step(rng: random.Random, subject: Subject, reference: MemoryPlane, records: Records) -> str:
    """One call to both; returns what it was."""
    plane = subject.plane
    call = rng.choice(["install"] * 4 + ["delete", "delete", "update", "commit", "holds", "adopt", "cede"])
    if call == "adopt":
        assert subject.run(plane.adopt()) == reference.adopt()
        return call
    if call == "cede":
        instance, besides = rng.choice([INSTANCE, PEER, 3]), some(rng, records)["id"]
        assert subject.run(plane.cede(instance, besides)) == reference.cede(instance, besides)
        return f"cede {instance}"
    given = some(rng, records)
    got, expected = subject.run(getattr(plane, call)(given)), getattr(reference, call)(given)
    assert np.array_equal(got, expected), (call, got, expected)
    return f"{call} {given['id'].tolist()}"


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_gives_what_the_reference_gives(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    subject, reference = make(max_sessions=MOST), MemoryPlane(INSTANCE, [], max_sessions=MOST)
    if subject.cores > 1:  # none of which gets full
        subject, reference = make(max_sessions=400), MemoryPlane(INSTANCE, [], max_sessions=400)
    records = universe(rng)
    done: list[str] = []
    most = 0
    for _ in range(STEPS):
        done.append(step(rng, subject, reference, records))
        assert plain(subject.held()) == plain(reference.records()), done
        got, expected = ends(subject.events()), ends(reference.events())
        assert got == expected or (subject.cores > 1 and sorted(got) == sorted(expected)), done
        subject.check()
        most = max(most, len(reference))
    assert most >= MOST, "the sequence never fills the plane"
