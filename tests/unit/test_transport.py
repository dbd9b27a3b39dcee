# SPDX-License-Identifier: Apache-2.0
"""The sync transport over real TCP, both sides in a namespace of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nat_control.certificates import make_certificates
from nat_control.lab import Lab


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_pair_over_tcp(tls: bool) -> None:
    with Lab() as lab:
        if tls:
            make_certificates(lab.directory, ("server", "switch"))
        here = lab.namespace("pair")
        here.ip("link", "set", "lo", "up")
        root = str(Path(__file__).parents[2])
        printed = here.run(
            "env",
            f"PYTHONPATH={root}",
            sys.executable,
            "-m",
            "tests.sync_pair",
            *([str(lab.directory)] if tls else []),
            timeout=90,
        )
    found = json.loads(printed.splitlines()[-1])
    assert [0, "here"] in found["differed"]
    assert found == {
        "exchanged": True,
        "held_at_first": 2000,
        "followed": True,
        "proven": [True, True, True],
        "differed": found["differed"],
        "ended": True,
        "survivor_owns_all": True,
        "returned": True,
        "untouched": True,
        "left": "the peer leaves",
        "tasks_left": 0,
    }
