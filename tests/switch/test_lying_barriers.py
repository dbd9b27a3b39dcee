# SPDX-License-Identifier: Apache-2.0
"""A real Open vSwitch behind a proxy that acknowledges 200 ms before it writes: what is believed, and what is proved."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab
from switch_agent import codec
from switch_agent.channel import Channel, Limits
from switch_agent.plane import OpenFlowDataPlane, SwitchError
from switch_agent.probe import random_mac
from tests.switch.lying import LyingSwitch
from tests.switch.net import Net, pipeline, random_records, record
from tests.switch.test_open_vswitch import in_packet, out_packet, translated_in, translated_out

LATE = 0.2


class LyingNet(Net):
    """``self.plane`` is on a channel to the switch that lies; the channel of Net is an honest one beside it."""

    def start(self) -> None:
        path = str(self.ovs.controller_socket)
        self.liar = LyingSwitch(f"{path}-liar", f"{path}-hears", LATE)
        self.heard = Channel(1, Limits(proof=1))
        self.run(self.heard.listen(f"unix:{self.liar.there}"))
        self.run(self.liar.start())
        self.ovs.set_controllers(f"unix:{path}", self.second_socket, f"unix:{self.liar.here}", probe_ms=0)
        self.run(self.expect(lambda event: type(event).__name__ == "Ready", self.heard))

    def lying(self, *, prove: bool) -> OpenFlowDataPlane:
        """Like ``fresh``: the switch is prepared by the honest channel, the plane then uses the other one."""
        self.liar.lost = False
        self.fresh(pipeline=pipeline(probe_mac=random_mac()))
        self.heard.prove = prove
        self.plane._channel = self.heard
        return self.plane

    def took(self, work: object) -> float:
        """Seconds."""
        before = time.monotonic()
        self.run(work)  # type: ignore[arg-type]
        return time.monotonic() - before


@pytest.fixture(scope="module")
def net() -> Iterator[LyingNet]:
    with Lab() as lab, asyncio.Runner() as runner:
        made = LyingNet(lab, runner)
        made.start()
        yield made
        made.run(made.liar.stop())
        for channel in (made.heard, made.channel, made.second):
            made.run(channel.close())


def test_trusted_means_deceived(net: LyingNet) -> None:
    """The first answer of a session that both sides hold, they believe, is lost."""
    net.lying(prove=False)
    assert net.took(net.plane.install(record())) < LATE
    net.wires["outside"].send(in_packet())
    assert net.wires["client"].receive(LATE / 2) != translated_in()


def test_a_session_that_is_proved_is_there(net: LyingNet) -> None:
    net.lying(prove=True)
    assert net.took(net.plane.install(record())) >= LATE
    net.wires["outside"].send(in_packet())
    assert net.wires["client"].receive() == translated_in()
    net.wires["client"].send(out_packet())
    assert net.wires["outside"].receive() == translated_out()
    assert net.took(net.plane.delete(record())) >= LATE
    assert net.session_flows() == []
    assert not net.lines


def test_many_at_once_are_proved_together(net: LyingNet) -> None:
    net.lying(prove=True)
    records = random_records(400)

    async def all_of_them() -> None:
        parts = [records[at : at + 100] for at in range(0, 400, 100)]
        await asyncio.gather(*(net.plane.install(part) for part in parts))

    # one after the other, for its next hops, and then the rules of all
    assert LATE <= net.took(all_of_them()) < 8 * LATE
    assert len(net.session_flows()) == 800
    assert not net.lines


def test_what_never_comes_is_refused_and_told(net: LyingNet) -> None:
    net.lying(prove=True)
    net.run(net.plane.install(record()))
    net.liar.lost = True
    lost = record(number=2, internal_port=5001, external_port=4444)
    assert net.run(net.plane.install(lost)) == 1, "the agent's core carries it"
    assert net.plane.refused["rules"] == 1
    assert not net.plane.has_rules(lost).any()
    assert net.plane.has_rules(record()).all()
    assert "acknowledged, but not there 1 s later" in net.lines[0]


def test_a_takeover_is_over_when_frames_prove_it(net: LyingNet) -> None:
    net.lying(prove=True)
    net.plane._channel = net.channel
    net.run(net.plane.install_static_peer_rules())
    net.plane._channel = net.heard
    net.heard.limits = Limits(proof=0.1)
    try:
        assert not net.run(net.plane.forwarded_no_more())
        with pytest.raises(SwitchError, match="acknowledged, but not there"):
            net.run(net.plane.delete_static_peer_rules())
        net.heard.limits = Limits(proof=1)
        assert net.took(net.plane.forwarded_no_more()) < LATE
        assert net.run(net.plane.forwarded_no_more())
        net.plane._channel = net.channel
        net.run(net.plane.install_static_peer_rules())
        net.plane._channel = net.heard
        net.plane.repeat_takeover()
        assert net.took(net.plane.forwarded_no_more()) >= LATE / 2
        assert not net.ovs.flows("cookie=0x7000000000000010/-2")
    finally:
        net.heard.limits = Limits(proof=1)


def test_what_a_customer_sends_is_no_probe(net: LyingNet) -> None:
    """Not even with the right MAC: it has no number of ours, and is a packet-in like any other."""
    plane = net.lying(prove=True)
    source = plane._pipeline.probe_mac.to_bytes(6, "big")
    wire = net.wires["client"]
    wire.socket.send(b"\xff" * 6 + source + b"\x88\xb5" + bytes(46))

    async def customers_frame() -> int:
        while True:
            for event in await net.heard.events():
                if isinstance(event, codec.PacketIn) and event.frame[6:12] == source:
                    return event.in_port

    assert net.run(customers_frame()) == 1
