# SPDX-License-Identifier: Apache-2.0
"""One Open vSwitch for all tests of a module, and as if new for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab
from tests.switch.net import Net


@pytest.fixture(scope="module")
def real() -> Iterator[Net]:
    with Lab() as lab, asyncio.Runner() as runner:
        net = Net(lab, runner)
        yield net
        net.run(net.channel.close())
        net.run(net.second.close())


@pytest.fixture
def net(real: Net) -> Net:
    real.fresh()
    return real
