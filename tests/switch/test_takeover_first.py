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
from switch_agent.failover import LATCH, WithGroup
from switch_agent.pipeline import FORWARD_COOKIE, FORWARD_MASK, Kind
from switch_agent.plane import SwitchError
from tests.switch.net import Net, pipeline, record

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


class Waiting:
    """A carrier whose operations are done when the test says so."""

    def __init__(self, net: Net, directory: Path) -> None:
        config = configuration.load(EXAMPLE)
        assert config.switch
        self.port = config.switch.ports.server_internal
        self.later: list[Callable[[], Awaitable[object]]] = []
        self.first: list[Callable[[], Awaitable[object]]] = []
        self.carrier = Carrier(
            replace(config, control=replace(config.control, socket=directory / "agent.sock")),
            net.plane, net.second, later=self.later.append, first=self.first.append,
            announce=lambda: None, prepared=lambda: None, known=lambda: None, say=net.lines.append,
        )  # fmt: skip

    def link(self, up: bool) -> None:
        self.carrier.link(PortDescription(self.port, "inner", b"", up), up)


def test_a_lost_link_waits_for_nobody(net: Net, tmp_path: Path) -> None:
    """The rules are gone although no operation is done any more."""

    async def body() -> None:
        waiting = Waiting(net, tmp_path)
        await net.plane.install_static_peer_rules()
        waiting.carrier.ready = waiting.carrier.forwarding = True
        assert len(to_server(net)) == 4
        waiting.link(False)
        assert len(waiting.first) == 1

    net.run(body())
    until("the rules are gone", lambda: to_server(net) == [], 2)


def test_a_switch_that_went_over_by_itself_is_found_out(real: Net, tmp_path: Path) -> None:
    """Its group has seen a link lost, and no port status has told of it."""
    plain = pipeline()
    real.fresh(pipeline=WithGroup(plain.internal, plain.external, plain.mac))

    async def body() -> None:
        waiting = Waiting(real, tmp_path)
        await real.plane.install_static_peer_rules()
        waiting.carrier.ready = waiting.carrier.forwarding = True
        await waiting.carrier.look_at_latch()
        assert waiting.carrier.forwarding
        assert not waiting.first
        real.ovs.ofctl(
            "add-flow", f"table={LATCH},cookie={Kind.LATCH.cookie:#x},actions=load:1->NXM_NX_REG0[]"
        )
        waiting.link(True)
        for work in waiting.later:
            await work()
        assert len(waiting.first) == 1
        await waiting.first[0]()
        assert not waiting.carrier.forwarding

    real.run(body())
    assert to_server(real) == real.ovs.flows(f"cookie={Kind.LATCH.cookie:#x}/-1") == []
