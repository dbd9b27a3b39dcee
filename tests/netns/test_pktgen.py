# SPDX-License-Identifier: Apache-2.0
"""`tandem-nat pktgen` as a user runs it: around `tandem-nat server`, over cables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
import yaml

from nat_control.lab import Lab, Namespace

CLI = [sys.executable, "-m", "nat_control.cli"]
AROUND = [
    *("pktgen", "inside", "outside", "--pool", "198.51.100.10-198.51.100.11"),
    *("--nat", "10.0.0.1,198.51.100.1", "--ours", "10.0.0.2,198.51.100.254", "--hosts", "10.0.1.0"),
    *("--flows", "300", "--json"),
]


@pytest.fixture
def generator() -> Iterator[Namespace]:
    """The namespace with the far ends of both cables of a NAT that is up."""
    with Lab() as lab:
        nat, generator = lab.namespace("nat"), lab.namespace("generator")
        lab.cable(generator, "inside", nat, "nat-in")
        lab.cable(generator, "outside", nat, "nat-out")
        route = {"prefix": "10.0.0.0/8", "gateway": "10.0.0.2"}
        config = {
            "instance": "one",
            "ports": {
                "internal": {"device": "nat-in", "address": "10.0.0.1/24", "routes": [route]},
                "external": {"device": "nat-out", "address": "198.51.100.1/24", "gateway": "198.51.100.254"},
            },
            "nat": {"pool": {"addresses": "198.51.100.10-198.51.100.11"}},
            "control": {"socket": str(lab.directory / "one.sock")},
        }
        path = lab.directory / "one.yaml"
        path.write_text(yaml.safe_dump(config))
        nat.start(*CLI, "server", str(path), name="server").ready("\nready", timeout=30)
        yield generator


def test_around_a_server(generator: Namespace) -> None:
    done = generator.attempt(*CLI, *AROUND, "--rate", "2000", "--seconds", "2", "--check", "1", timeout=90)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["open"]["new_mappings"], found["open"]["lost"]) == (300, 0)
    assert 3500 < found["run"]["sent"] <= 4000  # a machine that is busy at the end of the time
    assert (found["run"]["lost"], found["run"]["wrong"]) == (0, {})
    assert found["run"]["checked"] == found["run"]["sent"]


def test_another_pool_is_seen(generator: Namespace) -> None:
    around = [word.replace("100.11", "100.10") for word in AROUND]
    done = generator.attempt(*CLI, *around, "--rate", "1000", "--seconds", "0.5", timeout=90)
    assert done.returncode == 1
    assert json.loads(done.stdout)["run"]["wrong"]["pool"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--size", "63"], "frames have 64 to 1518 bytes"),
        (["--pool", "198.51.100.11-198.51.100.10"], "ends before it begins"),
        (["--nat", "10.0.0.9,198.51.100.1"], "10.0.0.9 does not answer ARP"),
    ],
)
def test_what_cannot_be(generator: Namespace, change: list[str], said: str) -> None:
    done = generator.attempt(*CLI, *AROUND, *change, timeout=90)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_phases_of_rfc_9693(generator: Namespace) -> None:
    around = [*AROUND, "--rfc9693", "--rate", "2000", "--seconds", "0.3"]
    done = generator.attempt(*CLI, *around, timeout=110)
    assert done.returncode == 0, done.stderr
    found = {one["figure"]: one["median"] for one in map(json.loads, done.stdout.splitlines())}
    assert found["RFC 9693: capacity"] == 300
    assert {"RFC 9693: set-up rate", "RFC 9693: throughput"} <= set(found)
