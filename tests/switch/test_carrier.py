# SPDX-License-Identifier: Apache-2.0
"""When the traffic is given back to the server: once, and not to one that has died meanwhile."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import yaml

from nat_control import config as configuration
from nat_control.sync.actions import DigestCompared
from switch_agent.agent import Agent
from switch_agent.pipeline import Kind

EXAMPLE = Path(__file__).parents[2] / "examples" / "pair-switch.yaml"
SAME = DigestCompared(())


def agent_of(directory: Path) -> Agent:
    content = yaml.safe_load(EXAMPLE.read_text())
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        content["heartbeat"]["listen"] = f"127.0.0.1:{probe.getsockname()[1]}"
    (directory / "agent.yaml").write_text(yaml.safe_dump(content))
    return Agent(configuration.load(directory / "agent.yaml"), directory / "agent.yaml")


def played(directory: Path, play: Callable[[Agent], Awaitable[None]]) -> None:
    """An agent whose operations are done while ``play`` goes on, and until none waits any more."""

    async def body() -> None:
        agent = agent_of(directory)
        working = asyncio.ensure_future(agent._operations())
        await play(agent)
        while not agent._work.empty():
            await asyncio.sleep(0)
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working

    asyncio.run(body())


def test_who_agrees_again_while_the_traffic_goes_back_starts_no_second_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returns = 0

    async def play(agent: Agent) -> None:
        carrier = agent.carrier

        async def going_back() -> str:
            nonlocal returns
            returns += 1
            carrier.notice(SAME)
            carrier.forwarding = carrier._reconciled = True
            return ""

        monkeypatch.setattr(carrier, "_return", going_back)
        carrier.notice(SAME)
        while not returns:
            await asyncio.sleep(0)

    played(tmp_path, play)
    assert returns == 1


def test_a_server_that_dies_while_the_traffic_goes_back_gets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    async def play(agent: Agent) -> None:
        carrier, plane = agent.carrier, agent.plane
        reasons = ["", "no heartbeats come from the server"]

        async def noted(*what: object, **how: object) -> None:
            done.append(what or how)

        monkeypatch.setattr(carrier, "_unfit", lambda: reasons.pop(0))
        monkeypatch.setattr(carrier, "_reconcile", noted)
        monkeypatch.setattr(plane, "install_static_peer_rules", noted)
        monkeypatch.setattr(plane, "delete_static_peer_rules", lambda: noted("none forwards"))
        assert await carrier._return() == "no heartbeats come from the server"
        assert not carrier.forwarding

    played(tmp_path, play)
    assert done == [{"refresh": True}, (Kind.FROM_SERVER,), ("none forwards",)]


def test_who_waits_for_a_return_to_look_at_the_counters_does_not_look_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    async def play(agent: Agent) -> None:
        async def look() -> None:
            nonlocal looks
            looks += 1

        monkeypatch.setattr(agent.front, "look", look)
        agent.carrier.ready = True
        for server_carries in (False, True):
            agent.plane.server_carries = server_carries
            await agent._refresh(done := asyncio.Event(), rank=False)
            assert done.is_set()

    played(tmp_path, play)
    assert looks == 1
