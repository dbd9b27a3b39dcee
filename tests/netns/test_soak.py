# SPDX-License-Identifier: Apache-2.0
"""``make soak`` for a moment: that it runs, and that it sees what it is there for."""

from __future__ import annotations

import random

import pytest

from nat_control.lab import Lab
from switch_agent.pair_lab import PairLab
from tests.soak.__main__ import Soak, Violation


@pytest.mark.long
def test_faults_pass_and_a_broken_connection_is_seen() -> None:
    with Lab() as lab:
        net = PairLab(lab)
        net.client.ip("address", "add", "10.0.0.11/24", "dev", "eth0")
        soak = Soak(net, "synchronous", random.Random(1), lab.directory)
        soak.start(120)
        for fault in ("server killed", "one link down"):
            soak.one(fault)
        assert [one.fault for one in soak.outcomes] == ["server killed", "one link down"]
        net.client.run("ss", "-K", "dport", "=", ":9001")
        with pytest.raises(Violation, match="broken: connection"):
            soak.one("openflow cut")
