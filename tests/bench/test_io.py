# SPDX-License-Identifier: Apache-2.0
"""Devices and peers: each is measured beside another one on the same ports, and packets come through rightly. Root."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from bench import peers
from tests.bench.command import bench


def is_measured(found: dict[str, Any]) -> bool:
    """Both sides, unless the machine was at its speed in no round."""
    assert found.get("missing") is None, found
    return found["rounds"] == 0 or min(found["median"], found["floor"], found["ratio"]["min"]) > 0


root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
with_testpmd = pytest.mark.skipif(shutil.which("dpdk-testpmd") is None, reason="apt install dpdk")


SMALL = ("--flows", "100", "--rounds", "1", "--seconds", "0.3")


@pytest.mark.parametrize("device", ["replay", "ring"])
def test_in_one_process(device: str) -> None:
    each, rate = bench("io", "--devices", device, *SMALL)
    for found, unit in ((each, "ns"), (rate, "Mpps")):
        assert found["unit"] == unit, found
        assert is_measured(found)


@root
@with_testpmd
@pytest.mark.parametrize(
    "device",
    [
        "memif",
        "memif-zc",
        "af_packet",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("vhost", "af_xdp")),
    ],
)
def test_between_processes(device: str) -> None:
    rate, *_ = found = bench("io", "--devices", device, *SMALL, "--seconds", "2.2")
    assert [one["figure"].rpartition(": ")[2] for one in found] == ["rate", "by the time of its CPU"]
    assert all(map(is_measured, found))
    assert rate["wrong"] == []


@root
@pytest.mark.skipif(shutil.which("nft") is None, reason="apt install nftables")
def test_the_kernel_as_peer() -> None:
    (found,) = bench("peers", "--only", "nftables", *SMALL)
    assert is_measured(found)
    assert found["wrong"] == found["wrong_peer"] == []


def test_who_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    vpp = next(peer for peer in peers.PEERS if "VPP" in peer.name)
    found = peers.measure(vpp, 10, 1, 0.1)
    assert found["missing"].startswith("not installed")
    assert "median" not in found


@root
def test_phases_around_the_server() -> None:
    found = bench("io", "--devices", "memif", "--flows", "600", "--seconds", "0.2", "--rfc9693", "5000")
    assert [one["figure"].split(": ")[1].split(" over")[0] for one in found] == [
        "set-up rate",
        "capacity",
        "throughput",
    ]
    assert found[1]["median"] == 600
    assert all(0 <= one["median"] <= 5000 for one in found)
