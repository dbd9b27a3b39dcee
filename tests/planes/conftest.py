# SPDX-License-Identifier: Apache-2.0
"""``make``: builds the plane under test; each test of the suite runs once for every plane."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nat_control.lab import Lab
from tests.planes.subjects import ConntrackSwitch, Dpdk, Memory, OwnCore, Running, Subject, Switch, TwoCores
from tests.switch.net import Net

# EAL starts once per process and takes the namespace that it is in: see test_worker.py.
WORKER_ONLY = "TANDEM_PLANES_WITH_WORKER"
PLANES = (
    ["worker"]
    if WORKER_ONLY in os.environ
    else ["memory", "core", "two cores", "switch", "proved switch", "conntrack switch"]
)

Make = Callable[..., Subject]


@pytest.fixture(scope="package")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="package")
def net(runner: asyncio.Runner) -> Iterator[Net]:
    with Lab() as lab:
        net = Net(lab, runner)
        yield net
        net.run(net.channel.close())
        net.run(net.second.close())


@pytest.fixture(scope="package")
def dpdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dpdk]:
    made = Dpdk(Path(tmp_path_factory.mktemp("state")))
    yield made
    made.close()


@pytest.fixture(params=PLANES)
def make(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Make]:
    made: list[Subject] = []

    def one(max_sessions: int = 4096) -> Subject:
        match request.param:
            case "memory":
                made.append(Memory(runner, max_sessions))
            case "core":
                made.append(OwnCore(runner, max_sessions))
            case "two cores":
                made.append(TwoCores(runner, max_sessions))
            case "switch":
                made.append(Switch(runner, max_sessions, request.getfixturevalue("net")))
            case "proved switch":
                made.append(Switch(runner, max_sessions, request.getfixturevalue("net"), prove=True))
            case "conntrack switch":
                made.append(ConntrackSwitch(runner, max_sessions, request.getfixturevalue("net")))
            case "worker":
                made.append(Running(runner, max_sessions, request.getfixturevalue("dpdk")))
        return made[-1]

    yield one
    for subject in made:
        subject.close()


@pytest.fixture
def subject(make: Make) -> Subject:
    return make()
