# SPDX-License-Identifier: Apache-2.0
"""An agent that starts with another configuration than the one before it: of that one's rules nothing is left."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from switch_agent.failover import WithGroup
from switch_agent.link import OneLink
from switch_agent.pipeline import CLASS_MASK, INBOUND, NEW_AT_PEER, STATIC_CLASS, Pipeline, Side
from switch_agent.plane import OpenFlowDataPlane
from tests.memory_plane import AsyncMemoryPlane, MemoryPlane
from tests.switch.net import Net, next_hops, pipeline, random_records

BEFORE = pipeline()
POOL = replace(
    BEFORE.external, addresses=((IPv4Address("198.51.100.1"),) * 2, (IPv4Address("198.51.100.20"),) * 2)
)
GROUPED = WithGroup(BEFORE.internal, BEFORE.external, BEFORE.mac)
LINK = {
    "internal": replace(BEFORE.internal, server_port=3),
    "external": replace(BEFORE.external, server_port=3),
}
ONE_LINK = OneLink(mac=BEFORE.mac, tags=(101, 102), inside=IPv4Network("10.0.0.0/8"), **LINK)
CHANGES = {
    "pool": (BEFORE, replace(BEFORE, external=POOL)),
    "vlan": (BEFORE, replace(BEFORE, internal=replace(BEFORE.internal, vlan=7))),
    "ports": (BEFORE, replace(BEFORE, internal=Side(2, 4, 0, BEFORE.internal.addresses),
                              external=Side(1, 3, 0, BEFORE.external.addresses))),
    "no server": (BEFORE, replace(BEFORE, internal=replace(BEFORE.internal, server_port=0))),
    "probe": (replace(BEFORE, probe_mac=0x0200AABBCCDD), BEFORE),
    "partition": (BEFORE, replace(BEFORE, partition=NEW_AT_PEER)),
    "group": (GROUPED, BEFORE),
    "to a group": (BEFORE, GROUPED),
    "tags": (ONE_LINK, replace(ONE_LINK, tags=(101, 103))),
    "one link": (ONE_LINK, BEFORE),
}  # fmt: skip


def static(net: Net) -> list[str]:
    """Without what counts."""
    flows = net.ovs.flows(f"cookie={STATIC_CLASS:#x}/{CLASS_MASK:#x}")
    return sorted(
        re.sub(r"(duration|n_packets|n_bytes|idle_age|hard_age)=[^,]*, ?", "", flow) for flow in flows
    )


def next_agent(net: Net, pipe: Pipeline, store: MemoryPlane) -> OpenFlowDataPlane:
    return OpenFlowDataPlane(
        net.channel, pipe, next_hops(pipe), AsyncMemoryPlane(store), report=net.lines.append
    )


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_another_configuration_stays(real: Net, change: str, carries: bool) -> None:
    before, after = CHANGES[change]

    def installed(pipe: Pipeline) -> None:
        real.fresh(pipeline=pipe)
        if carries:
            real.run(real.plane.install_static_peer_rules())

    installed(after)
    wanted = static(real)
    installed(before)
    plane = next_agent(real, after, MemoryPlane(1, []))
    real.run(plane.prepare())
    assert real.run(plane.forwards()) is carries
    assert static(real) == wanted
    assert real.lines == []


@pytest.mark.parametrize(("change", "restored"), [("vlan", 40), ("pool", 0)])
def test_sessions_get_rules_that_match_where_their_packets_come(
    real: Net, change: str, restored: int
) -> None:
    """Their cookies and groups are right."""
    before, after = CHANGES[change]
    real.fresh(pipeline=before)
    records = random_records(20)
    real.install(records)
    store = MemoryPlane(1, [])
    plane = next_agent(real, after, store)
    real.run(plane.prepare())
    assert not real.run(plane.forwards())
    assert real.run(plane.recover()) == 20
    done = real.run(plane.reconcile())
    assert (done.restored, done.deleted) == (restored, 0)
    flows = real.ovs.flows("cookie=0x1000000000000000/0x7000000000000000")
    assert len(flows) == 40
    outbound = [flow for flow in flows if not int(flow.split("cookie=")[1].split(",")[0], 16) & INBOUND]
    assert all(("dl_vlan=7" in flow) is (change == "vlan") for flow in outbound)
    assert real.run(plane.reconcile()).restored == 0
