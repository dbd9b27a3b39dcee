# SPDX-License-Identifier: Apache-2.0
"""`peer takeover` of one of two servers that has no peer in step."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from nat_control import config as c
from nat_control.sync.actions import State
from nat_control.traffic import Traffic
from nat_control.twin import Twin, role_of
from nat_fastpath.role import RoleState
from tests.unit.test_pair_config import TWIN, with_sections


def twin_of(*, alive: bool) -> tuple[Twin, Any]:
    """Stands by, beside a pair that is not in step."""
    config = c.parse(with_sections(TWIN, devices=True))
    role = role_of(config)
    assert role
    twin = Twin(config, role, clock=lambda: 0.0, say=lambda line: None, fit=lambda: True)
    heard = {"alive": alive, "peer_carries": True, "peer_unfit": False, "peer_term": 6, "stalled": False}
    protocol = SimpleNamespace(peer=None, apart=False, instance=1)
    watch = SimpleNamespace(stats=lambda: heard, fired="")
    pair: Any = SimpleNamespace(state=State.ALONE, differing=False, protocol=protocol, watch=watch)
    twin.bind(pair)
    return twin, pair


@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_by_force_without_a_peer_in_step(alive: bool, force: bool) -> None:
    twin, pair = twin_of(alive=alive)
    answers: list[dict[str, Any]] = []

    async def send(answer: dict[str, Any]) -> None:
        answers.append(answer["takeover"])

    async def ask() -> None:
        conversation: Any = SimpleNamespace(send=send)
        takeover = Traffic(pair, sessions=lambda: 0, arbiter=twin).verbs["takeover"]
        await takeover({"force": force}, conversation)

    asyncio.run(ask())
    if force:
        assert (answers[0]["result"], answers[0]["proven"], answers[0]["carrier"]) == ("done", None, "here")
        assert twin.view().state is RoleState.ACTIVE
        assert twin.view().term == 7
        assert twin.view().stepped, "it does not yield for what it lacks"
    else:
        assert answers[0]["result"] == "refused"
        assert twin.view().state is RoleState.STANDBY
