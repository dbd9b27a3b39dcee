# SPDX-License-Identifier: Apache-2.0
"""Several workers in the configuration, and the slices that an agent must share with them."""

from __future__ import annotations

from typing import Any

import pytest

from nat_control import config as c
from nat_control.config_reader import MAX_WORKERS
from nat_fastpath.cores import DIVIDED, memory_for, sliced
from tests.unit.test_config import MACS, ROOT, SCHEMA, SCHEMA_CHECK, changed, problems
from tests.unit.test_pair_config import SWITCH, with_sections


def workers(n: int, **pool: Any) -> dict[str, Any]:
    document = changed("workers.cores", list(range(n)))
    document["nat"]["pool"] |= pool
    return document


def test_a_core_for_all_and_one_for_each_worker() -> None:
    for n in (1, 2, 3, MAX_WORKERS):
        document = workers(n)
        SCHEMA_CHECK.validate(document)
        config = c.parse(document)
        assert config.slices == n
        whole = c.to_core(config, MACS)
        assert (whole.n_slices, whole.slice) == ((0, 0) if n == 1 else (n, None))
    parts = sliced(c.to_core(c.parse(workers(3)), MACS), 3)
    assert [(part.n_slices, part.slice) for part in parts] == [(3, 0), (3, 1), (3, 2)]


def test_what_the_whole_may_have_is_divided_and_rounded_up() -> None:
    document = workers(3)
    document["nat"] |= {"max_sessions": 100_000, "limits": {"sessions_per_host": 7, "mappings_per_host": 5,
                                                           "new_sessions_per_second": 1000}}  # fmt: skip
    whole = c.to_core(c.parse(document), MACS)
    for part in sliced(whole, 3):
        assert part.max_sessions == 33_334
        assert part.new_sessions_rate == 334
        assert (part.sessions_per_host, part.mappings_per_host) == (7, 5)
        assert part.max_neighbours == whole.max_neighbours
        assert all(getattr(part, name) == 0 for name in DIVIDED if getattr(whole, name) == 0), "0 is no limit"
    memory = memory_for(whole, 3)
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


@pytest.mark.parametrize("n", range(2, MAX_WORKERS + 1))
def test_every_worker_needs_ports(n: int) -> None:
    enough = 4 << (n - 1).bit_length()
    for first in (1, 2000, 40001):
        assert problems(workers(n, ports=f"{first}-{first + enough - 1}")) == {}
    assert "no port is left for" in problems(workers(n, ports=f"2000-{2000 + 2 * n - 3}"))["nat.pool.ports"]
    assert f"of {n} slices" in problems(workers(n, ports="2000"))["nat.pool.ports"]


def test_a_server_has_a_worker_for_each_slice() -> None:
    assert problems(workers(2, slices=2)) == {}
    (where,) = found = problems(workers(2, slices=4))
    assert where == "nat.pool.slices"
    assert "4, and `workers.cores` has 2" in found[where]


def test_an_agent_has_one_core_with_every_slice() -> None:
    document = with_sections(SWITCH, devices=False)
    assert c.parse(document).slices == 1
    document["nat"]["pool"]["slices"] = 4
    SCHEMA_CHECK.validate(document)
    core = c.to_core(c.parse(document), [])
    assert (core.n_slices, core.slice) == (4, None)
    document["nat"]["pool"]["ports"] = "2000-2003"
    assert "for 2 of 4 slices" in problems(document)["nat.pool.ports"]
    document["nat"]["pool"]["slices"] = 0
    assert "from 1 to 32" in problems(document)["nat.pool.slices"]


def test_the_limit_is_that_of_the_core_and_of_the_schema() -> None:
    assert f"#define SLICES_MAX {MAX_WORKERS}u" in (ROOT / "nat_fastpath/core/slices.h").read_text()
    assert SCHEMA["properties"]["workers"]["properties"]["cores"]["maxItems"] == MAX_WORKERS
    pool = SCHEMA["properties"]["nat"]["properties"]["pool"]["properties"]
    assert pool["slices"]["maximum"] == MAX_WORKERS
    assert "1 to 32 CPUs" in problems(changed("workers.cores", list(range(33))))["workers.cores"]
