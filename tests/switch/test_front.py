# SPDX-License-Identifier: Apache-2.0
"""Sessions in front of the server and behind it, on a real Open vSwitch."""

import asyncio
import re
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from scapy.layers.inet import TCP
from scapy.packet import Packet

from nat_control.dataplane import Ids, Records
from nat_control.lab import until
from nat_fastpath.engine import FLAG_OFFLOAD, TCP_STATES
from switch_agent.compile import NextHopGroups, Numbers
from switch_agent.nexthops import NextHops
from switch_agent.pipeline import FRONT_PRIORITY, INBOUND, NEW_AT_PEER, SESSION_PRIORITY, Kind, by_protocol
from switch_agent.plane import OpenFlowDataPlane, Reconciled
from tests.memory_plane import AsyncMemoryPlane
from tests.switch.net import (
    CLIENT,
    INTERNAL_PORT,
    REMOTE,
    REMOTE_PORT,
    ROUTES,
    Net,
    ip,
    outward,
    pipeline,
    random_records,
    record,
)
from tests.switch.test_open_vswitch import in_packet, out_packet, translated_in, translated_out

UDP_ONE, TCP_ONE = record(17, 1), record(6, 2)


def priorities(net: Net) -> list[int]:
    return sorted(int(re.search(r"priority=(\d+)", line)[1]) for line in net.session_flows())


def rules_of(net: Net, kind: Kind) -> list[str]:
    return net.ovs.flows(f"cookie={kind.cookie:#x}/-1")


def control(flags: str) -> Packet:
    return outward(ip(CLIENT, REMOTE) / TCP(sport=INTERNAL_PORT, dport=REMOTE_PORT, flags=flags))


def put(net: Net, records: Records, front: bool) -> list[int]:
    return net.run(net.plane.set_front(records["id"], front)).tolist()


def test_to_the_front_and_back(net: Net) -> None:
    """One pair of rules at any time that a look finds; the server gets what begins and ends a connection."""
    both = np.concatenate((UDP_ONE, TCP_ONE))
    net.install(both)
    net.run(net.plane.install_static_peer_rules())
    net.passes("client", out_packet(), "inner", bytes(out_packet()))
    assert put(net, both, True) == both["id"].tolist() == net.plane.in_front.tolist()
    assert net.plane.is_front(both).tolist() == [True, True]
    assert priorities(net) == [FRONT_PRIORITY] * 4
    for protocol in (6, 17):
        net.passes("client", out_packet(protocol), "outside", translated_out(protocol))
        net.passes("outside", in_packet(protocol), "client", translated_in(protocol))
    for flags in ("S", "FA", "R", "RA"):
        net.passes("client", control(flags), "inner", bytes(control(flags)))
    assert put(net, both[:1], True) == both["id"][:1].tolist(), "asked again nothing changes"
    assert put(net, both[:1], False) == both["id"][:1].tolist()
    assert priorities(net) == [SESSION_PRIORITY] * 2 + [FRONT_PRIORITY] * 2
    net.passes("client", out_packet(), "inner", bytes(out_packet()))
    assert rules_of(net, Kind.TCP_TO_SERVER), "one is still in front"
    assert put(net, both, False) == both["id"].tolist()
    for kind in (Kind.TCP_TO_SERVER, Kind.TCP_OUT_FRONT, Kind.TCP_IN_FRONT):
        assert not rules_of(net, kind), "nothing is in front: no packet is looked at closer than its port"
    net.passes("client", out_packet(6), "inner", bytes(out_packet(6)))


def test_the_takeover_changes_nothing_for_those_in_front(net: Net) -> None:
    net.install(TCP_ONE)
    net.run(net.plane.install_static_peer_rules())
    put(net, TCP_ONE, True)
    before = sorted(
        re.sub(r"(duration|n_packets|n_bytes|idle_age)=[^,]*, ?", "", one) for one in net.session_flows()
    )
    net.second.write(net.plane.prepared_takeover())
    until("the forward rules are gone", lambda: not rules_of(net, Kind.TO_SERVER))
    until("and those that show it TCP", lambda: not rules_of(net, Kind.TCP_TO_SERVER))
    after = sorted(
        re.sub(r"(duration|n_packets|n_bytes|idle_age)=[^,]*, ?", "", one) for one in net.session_flows()
    )
    assert before == after
    net.passes("client", out_packet(6), "outside", translated_out(6))
    # from here on the agent hears of ends, at once
    sent = net.wires["client"].send(control("FA"))
    assert net.asked(0, sent).cookie == Kind.TCP_OUT_FRONT.cookie


@pytest.mark.parametrize("flags", ["S", "SA", "FA", "R"])
def test_alone_the_agent_sees_what_begins_and_ends_a_connection(net: Net, flags: str) -> None:
    net.install(TCP_ONE)
    sent = net.wires["client"].send(control(flags))
    assert net.asked(0, sent).cookie == Kind.TCP_OUT.cookie
    net.passes("client", out_packet(6), "outside", translated_out(6))
    answer = in_packet(6)
    answer[TCP].flags = flags
    if flags == "S":  # anybody outside can send those
        net.passes("outside", answer, "client", _forwarded(answer))
    else:
        sent = net.wires["outside"].send(answer)
        assert net.asked(1, sent).cookie == Kind.TCP_IN.cookie


def _forwarded(packet: Packet) -> bytes:
    made = type(packet)(translated_in(6))
    made[TCP].flags = packet[TCP].flags
    del made[TCP].chksum
    return bytes(made)


def test_settled_sessions_go_to_the_front_by_themselves(net: Net) -> None:
    """new_at_peer: UDP with its first rules, TCP once it is established."""
    net.fresh(pipeline=pipeline(partition=NEW_AT_PEER))
    net.run(net.plane.install_static_peer_rules())
    opening = TCP_ONE.copy()
    opening["tcp_state"] = TCP_STATES.index("syn_out")
    net.install(np.concatenate((UDP_ONE, opening)))
    assert net.plane.in_front.tolist() == UDP_ONE["id"].tolist()
    net.passes("client", out_packet(), "outside", translated_out())
    net.passes("client", out_packet(6), "inner", bytes(out_packet(6)))
    opening["tcp_state"] = TCP_STATES.index("established")
    net.run(net.plane.update(opening))
    assert len(net.plane.in_front) == 2
    net.passes("client", out_packet(6), "outside", translated_out(6))
    assert priorities(net) == [FRONT_PRIORITY] * 4


def test_a_chosen_protocol_never_sees_the_server(net: Net) -> None:
    net.fresh(pipeline=pipeline(partition=by_protocol(frozenset((17,)))))
    net.install(np.concatenate((UDP_ONE, TCP_ONE)))
    net.run(net.plane.install_static_peer_rules())
    net.passes("client", out_packet(), "outside", translated_out())
    net.passes("client", out_packet(6), "inner", bytes(out_packet(6)))
    new = out_packet()
    new["UDP"].sport = 7777
    assert net.asked(0, net.wires["client"].send(new)).cookie == Kind.NEW_FLOW.cookie
    assert priorities(net) == [SESSION_PRIORITY] * 4


def test_what_is_carried_in_front_is_told(net: Net) -> None:
    """To the store and to whoever tells the server: what is news, once, whichever rules have counted it."""
    net.install(UDP_ONE)
    net.run(net.plane.install_static_peer_rules())
    told: list[Records] = []
    net.plane.tell = told.append
    put(net, UDP_ONE, True)
    net.passes("client", out_packet(), "outside", translated_out())
    until("it is counted", lambda: net.run(net.plane.activity())["packets_out"].sum() >= 1)
    carried = int(net.run(net.plane.activity())["packets_out"].sum())
    assert net.run(net.plane.refresh()) == 1
    assert net.run(net.plane.refresh()) == 0
    [one] = np.concatenate(told)
    assert one["flags"] & FLAG_OFFLOAD
    assert one["packets_out"] == carried == next(iter(net.store.held.values()))["packets_out"]
    assert one["bytes_out"] == carried * len(bytes(out_packet().payload))
    put(net, UDP_ONE, False)
    put(net, UDP_ONE, True)
    assert net.run(net.plane.refresh()) == 0, "new rules begin at 0"


def test_reconciling_knows_front_from_behind(net: Net) -> None:
    """A new agent finds those in front, and what stands at the wrong priority is put right."""
    records = random_records(100)
    net.install(records)
    put(net, records[:40], True)
    pipe = net.plane._pipeline
    net.plane = OpenFlowDataPlane(net.channel, pipe, NextHops(pipe, ROUTES), AsyncMemoryPlane(net.store))
    net.run(net.plane.prepare())
    assert net.run(net.plane.recover()) == 100
    assert net.plane.in_front.tolist() == records["id"][:40].tolist()
    assert net.run(net.plane.reconcile()) == Reconciled(200, 0, 0)
    net.plane._front -= set(records["id"][:10].tolist())
    net.plane._front |= set(records["id"][60:63].tolist())
    assert net.run(net.plane.reconcile()) == Reconciled(174, 26, 26)
    assert net.run(net.plane.reconcile()) == Reconciled(200, 0, 0)
    assert priorities(net) == [SESSION_PRIORITY] * 134 + [FRONT_PRIORITY] * 66


def test_without_room_for_two_pairs_one_goes_first(net: Net) -> None:
    net.fresh(max_flows=20)
    records = random_records(12)
    net.install(records)
    net.run(net.plane.install_static_peer_rules())
    assert put(net, records[:5], True) == sorted(records["id"][net.plane.is_front(records)].tolist())
    assert net.plane.offloaded == 10
    assert len(net.plane.in_front) == net.plane.has_rules(records[:5]).sum()
    assert net.lines == []


def test_a_session_that_ends_in_front_leaves_nothing(net: Net) -> None:
    net.install(records := random_records(30))
    put(net, records, True)
    assert net.run(net.plane.delete(records)) == 30
    assert net.session_flows() == []
    assert len(net.plane.in_front) == 0


def test_ends_while_they_are_moved_leave_nothing(net: Net) -> None:
    """Whichever comes first, a session that has ended has no rules."""

    async def at_once(records: Records) -> None:
        await asyncio.gather(
            *(net.plane.set_front(records["id"], front) for front in (True, False, True)),
            *(net.plane.delete(one) for one in np.array_split(records, 10)),
        )

    net.install(records := random_records(400))
    net.run(at_once(records))
    assert net.session_flows() == []
    assert len(net.plane.in_front) == net.plane.offloaded == 0


def test_ends_while_reconciling_leave_nothing(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sessions that had one rule of two: before they are looked for, and before they get the other."""
    net.install(records := random_records(30))
    plane = net.plane
    delete_cookies, each = plane._delete_cookies, plane._each
    net.run(delete_cookies(records["id"][:10] | np.uint64(INBOUND)))

    async def early(cookies: Numbers) -> None:
        monkeypatch.setattr(plane, "_delete_cookies", delete_cookies)
        await plane.delete(records[:3])
        await delete_cookies(cookies)

    async def late(ids: Ids, work: Callable[[Records], Awaitable[object]]) -> None:
        await plane.delete(records[3:6])
        await each(ids, work)

    monkeypatch.setattr(plane, "_delete_cookies", early)
    monkeypatch.setattr(plane, "_each", late)
    net.run(plane.reconcile())
    assert len(net.session_flows()) == 2 * plane.offloaded == 2 * 24


def test_the_last_one_ends_while_another_comes(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """What begins and ends a connection stays above it."""
    net.install(np.concatenate((UDP_ONE, TCP_ONE)))
    net.run(net.plane.install_static_peer_rules())
    put(net, UDP_ONE, True)
    add = net.plane._add

    async def ends_first(records: Records, groups: NextHopGroups, priority: Numbers | int) -> Records:
        await net.plane.delete(UDP_ONE)
        return await add(records, groups, priority)

    monkeypatch.setattr(net.plane, "_add", ends_first)
    assert put(net, TCP_ONE, True) == TCP_ONE["id"].tolist()
    for kind in (Kind.TCP_TO_SERVER, Kind.TCP_OUT_FRONT, Kind.TCP_IN_FRONT):
        assert rules_of(net, kind)
    net.run(net.plane.delete(TCP_ONE))
    assert not rules_of(net, Kind.TCP_TO_SERVER)


def test_nothing_is_in_front_without_what_stands_above(net: Net) -> None:
    """A table with no room for that: they are where they were, and say so."""
    net.run(net.plane._store.install(records := random_records(3)))
    limit = f"flow_limit={len(net.ovs.flows())}"
    net.ovs.vsctl(
        *("--id=@t", "create", "Flow_Table", limit, "overflow_policy=refuse"),
        *("--", "set", "bridge", net.ovs.bridge, "flow_tables:0=@t"),
    )
    try:
        assert put(net, records, True) == net.plane.in_front.tolist() == []
        assert "TABLE_FULL" in net.lines[0]
    finally:
        net.ovs.vsctl("clear", "bridge", net.ovs.bridge, "flow_tables")
    assert put(net, records, True) == sorted(records["id"].tolist())
    assert rules_of(net, Kind.TCP_OUT_FRONT)
