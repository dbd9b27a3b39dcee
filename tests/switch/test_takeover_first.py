# SPDX-License-Identifier: Apache-2.0
"""A takeover goes before all that waits for the switch, and nothing that is under way puts forward rules there behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nat_control import config as configuration
from nat_control.lab import until
from switch_agent.carrier import Carrier
from switch_agent.codec import PortDescription
from switch_agent.pipeline import FORWARD_COOKIE, FORWARD_MASK, Kind
from switch_agent.plane import SwitchError
from tests.switch.net import Net, record

EXAMPLE = Path(__file__).parents[2] / "examples" / "pair-switch.yaml"


def to_server(net: Net) -> list[str]:
    return net.ovs.flows(f"cookie={FORWARD_COOKIE:#x}/{FORWARD_MASK:#x}") + net.ovs.flows(
        f"cookie={Kind.TCP_TO_SERVER.cookie:#x}/-1"
    )


async def overtaken(net: Net, work: Callable[[], Awaitable[object]]) -> None:
    """``work`` is about to write, and waits for others; then the takeover comes."""
    slots = net.channel._slots
    for _ in range(net.channel.limits.outstanding):
        await slots.acquire()
    task = asyncio.ensure_future(work())
    await asyncio.sleep(0.05)
    assert not task.done()
    net.plane.take_over()
    for _ in range(net.channel.limits.outstanding):
        slots.release()
    await task


@pytest.mark.parametrize("kind", [Kind.FROM_SERVER, Kind.TO_SERVER])
def test_a_return_that_is_overtaken_ends(net: Net, kind: Kind) -> None:
    net.run(net.plane.install_static_peer_rules(Kind.FROM_SERVER))
    with pytest.raises(SwitchError, match="the switch takes over meanwhile"):
        net.run(overtaken(net, lambda: net.plane.install_static_peer_rules(kind)))
    assert to_server(net) == []
    assert not net.plane.server_carries
    with pytest.raises(SwitchError, match="takes over"):  # nor what begins before the takeover is through
        net.run(net.plane.install_static_peer_rules(kind))
    assert to_server(net) == []
    net.plane.overtaken = False
    net.run(net.plane.install_static_peer_rules())
    assert len(to_server(net)) == 4


def test_a_preparation_that_is_overtaken_puts_nothing_back(net: Net) -> None:
    """The switch was back, and had the rules when it was asked."""
    net.run(net.plane.install_static_peer_rules())

    async def body() -> None:
        asking = net.plane._channel.statistics

        async def asked(*arguments: int) -> object:
            found = await asking(*arguments)
            if net.plane.server_carries and not net.plane.overtaken:
                net.plane.take_over()
            return found

        net.plane._channel.statistics = asked  # type: ignore[assignment]
        try:
            await net.plane.forwards()
        finally:
            del net.plane._channel.statistics  # type: ignore[attr-defined]

    net.run(body())
    assert to_server(net) == []
    assert not net.plane.server_carries


def test_a_session_that_comes_to_the_front_shows_the_dead_server_nothing(net: Net) -> None:
    net.install(record())
    net.run(net.plane.install_static_peer_rules())

    writes = net.channel.transact

    async def waits(data: bytes, *arguments: Any) -> object:
        if Kind.TCP_TO_SERVER.cookie.to_bytes(8, "big") in bytes(data) and not net.plane.overtaken:
            net.plane.take_over()  # it was decided upon, and waits for its turn
        return await writes(data, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net.channel, "transact", waits)
        net.run(net.plane.set_front(record()["id"], True))
    assert net.plane.overtaken
    assert to_server(net) == []


def test_a_lost_link_waits_for_nobody(net: Net, tmp_path: Path) -> None:
    """The rules are gone although no operation is done any more."""
    config = configuration.load(EXAMPLE)
    config = replace(config, control=replace(config.control, socket=tmp_path / "agent.sock"))
    waiting: dict[str, list[object]] = {"later": [], "first": []}

    async def body() -> None:
        carrier = Carrier(
            config, net.plane, net.second, later=waiting["later"].append, first=waiting["first"].append,
            announce=lambda: None, prepared=lambda: None, known=lambda: None, say=net.lines.append,
        )  # fmt: skip
        await net.plane.install_static_peer_rules()
        carrier.ready = carrier.forwarding = True
        assert len(to_server(net)) == 4
        assert config.switch
        port = PortDescription(config.switch.ports.server_internal, "inner", b"", False)
        carrier.link(port, False)

    net.run(body())
    until("the rules are gone", lambda: to_server(net) == [], 2)
    assert [len(waiting[which]) for which in ("first", "later")] == [1, 0]
