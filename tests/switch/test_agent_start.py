# SPDX-License-Identifier: Apache-2.0
"""An agent whose addresses are taken says which, in one line, before it does anything."""

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest
import yaml

from nat_control import config as configuration
from switch_agent.agent import OPERATIONS, Agent, AgentError, serve

EXAMPLE = Path(__file__).parents[2] / "examples" / "pair-switch.yaml"


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(type=kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("taken", ["switch.openflow", "switch.takeover", "peer.listen", "heartbeat.listen"])
def test_an_address_that_is_taken_is_named(taken: str, tmp_path: Path) -> None:
    section, key = taken.split(".")
    kind = socket.SOCK_DGRAM if section == "heartbeat" else socket.SOCK_STREAM
    content = yaml.safe_load(EXAMPLE.read_text())
    content["control"] = {"socket": str(tmp_path / "agent.sock")}
    for part, name in (
        ("switch", "openflow"),
        ("switch", "takeover"),
        ("peer", "listen"),
        ("heartbeat", "listen"),
    ):
        content[part][name] = f"127.0.0.1:{free_port(socket.SOCK_STREAM)}"
    with socket.socket(type=kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            holder.listen()
        content[section][key] = address = f"127.0.0.1:{holder.getsockname()[1]}"
        (tmp_path / "agent.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(AgentError, match="Address already in use: does another") as error:
            serve(configuration.load(tmp_path / "agent.yaml"), tmp_path / "agent.yaml")
    assert address in str(error.value)
    assert not (tmp_path / "agent.sock").exists()


def test_a_switch_that_is_far_behind_is_compared_with_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So many operations wait for it; what comes beyond them is no operation, and told once."""
    content = yaml.safe_load(EXAMPLE.read_text())
    for section in ("peer", "heartbeat"):
        del content[section]
    (tmp_path / "agent.yaml").write_text(yaml.safe_dump(content))
    path = tmp_path / "agent.yaml"
    done: list[str] = []

    async def noted(what: str) -> None:
        done.append(what)

    async def body() -> None:
        agent = Agent(configuration.load(path), path)
        monkeypatch.setattr(agent.carrier, "compare", lambda: noted("compared"))
        for _ in range(OPERATIONS + 100):
            agent._change(lambda: noted("changed"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(agent._operations(), 1)
        assert done == ["changed"] * OPERATIONS + ["compared"]

    asyncio.run(body())
    assert capsys.readouterr().out.count(f"the switch is {OPERATIONS} operations behind") == 1
