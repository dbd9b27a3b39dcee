# SPDX-License-Identifier: Apache-2.0
"""A changed pool while the peer is connected: nobody hands out what the other may hand out too."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from nat_control import config as c
from nat_control.pair import Pair, pools
from nat_control.sync.actions import State
from tests.unit.test_reload import PAIR, SERVER, changed


def configured(addresses: str, ports: str) -> c.Config:
    pool = {"addresses": addresses, "ports": ports}
    return c.parse(changed({**SERVER, **PAIR}, nat__pool=pool))


OURS = configured("198.51.100.10-198.51.100.13", "1024-32767")
PEERS = configured("198.51.100.10-198.51.100.13", "32768-65535")


def pair(state: State = State.OPERATIONAL, told: c.Config = OURS) -> Pair:
    made = Pair.__new__(Pair)
    peer = SimpleNamespace(pools=pools(PEERS)) if state is State.OPERATIONAL else None
    made.protocol = SimpleNamespace(pools=pools(OURS), state=state, peer=peer)  # type: ignore[assignment]
    made._told, made._shorter = pools(told), asyncio.Event()
    return made


@pytest.mark.parametrize(
    ("addresses", "ports", "why"),
    [
        ("198.51.100.10-198.51.100.13", "1024-32767", ""),
        ("198.51.100.10-198.51.100.20", "1024-32767", ""),  # the peer's ports are others at any address
        ("198.51.100.10", "2000-3000,4000", ""),
        ("198.51.100.10-198.51.100.13", "1000-32767", "needs a restart"),  # the peer was not told of these
        ("198.51.100.99", "1024-40000", "needs a restart"),
    ],
)
def test_which_pools_can_be_used_while_the_peer_is_there(addresses: str, ports: str, why: str) -> None:
    refused = pair().refuses(configured(addresses, ports))
    assert (why in refused) if why else not refused


def test_ports_that_the_peer_was_told_of_may_come_back() -> None:
    made = pair()
    fewer = configured("198.51.100.10", "2000-3000")
    made.reconfigured(fewer)
    assert made.protocol.pools == pools(fewer), "for the next Hello"
    assert not made.refuses(OURS)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (State.ALONE, ""),
        (State.FAILED, ""),
        (State.HANDSHAKE, "try again in a moment"),
        (State.EXCHANGING, "try again in a moment"),
    ],
)
def test_without_an_operational_peer(state: State, why: str) -> None:
    refused: Any = pair(state).refuses(PEERS)
    assert (why in refused) if why else not refused


def test_ports_that_the_peer_hands_out_anywhere_cannot_be_used() -> None:
    """Not even at an address that it has not now: it may get that without asking."""
    assert "needs a restart" in pair(told=PEERS).refuses(configured("198.51.100.99", "40000-40001"))
