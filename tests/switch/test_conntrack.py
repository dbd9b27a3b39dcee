# SPDX-License-Identifier: Apache-2.0
"""Sessions as entries of a real Open vSwitch's connection tracking, with real packets."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from nat_control.lab import until
from nat_fastpath.engine import TCP_STATES
from switch_agent import conntrack, ovs_tracker
from switch_agent.conntrack_plane import ConntrackPlane
from switch_agent.pipeline import ALL_BITS, Kind
from switch_agent.plane import OpenFlowDataPlane, Reconciled, SwitchError
from switch_agent.recovery import RULE
from tests.memory_plane import AsyncMemoryPlane, MemoryPlane
from tests.switch.net import (
    CLIENT,
    CLIENT_MAC,
    EXTERNAL,
    EXTERNAL_PORT,
    GATEWAY_KEY,
    INTERNAL_PORT,
    NEW_GATEWAY_MAC,
    REMOTE,
    REMOTE_PORT,
    Net,
    inward,
    ip,
    left,
    mac_number,
    next_hops,
    outward,
    pipeline,
    random_records,
    record,
)
from tests.switch.test_open_vswitch import (
    in_packet,
    out_packet,
    translated_in,
    translated_out,
    transport,
)


def fresh(net: Net, **options: Any) -> ConntrackPlane:
    made = net.fresh(make=partial(ConntrackPlane, ovs=net.ovs.directory), **options)
    assert isinstance(made, ConntrackPlane)
    return made


@pytest.fixture
def net(real: Net) -> Net:
    fresh(real)
    return real


def another(net: Net, **options: Any) -> ConntrackPlane:
    """An agent that starts anew: it knows no session."""
    pipe = pipeline()
    net.store = MemoryPlane(1, [])
    net.plane = plane = ConntrackPlane(
        net.channel,
        pipe,
        next_hops(pipe),
        AsyncMemoryPlane(net.store),
        ovs=net.ovs.directory,
        report=net.lines.append,
        **options,
    )
    net.run(plane.prepare())
    return plane


def dump(net: Net) -> Any:
    return net.run(ovs_tracker.dump(net.ovs.directory))


def both_ways(net: Net, protocol: int) -> None:
    net.passes("client", out_packet(protocol), "outside", translated_out(protocol))
    net.passes("outside", in_packet(protocol), "client", translated_in(protocol))


@pytest.mark.parametrize("protocol", [6, 17])
def test_packets_are_translated_both_ways(net: Net, protocol: int) -> None:
    """From the first packet on, from either side, and TCP in the middle of a connection: every byte is as it must be."""
    net.install(record(protocol))
    net.wires["outside"].send(in_packet(protocol))
    assert net.wires["client"].receive() == translated_in(protocol)
    both_ways(net, protocol)
    assert net.session_flows() == []
    assert net.lines == []


def test_tcp_minds_no_sequence_numbers(net: Net) -> None:
    """The tracker has not seen what came before, nor what the agent has sent."""
    net.install(record(6))
    for seq in (1, 1 << 31, 77, 3 << 30):
        segment = TCP(sport=INTERNAL_PORT, dport=REMOTE_PORT, flags="A", seq=seq, ack=seq ^ 1 << 31)
        translated = TCP(sport=EXTERNAL_PORT, dport=REMOTE_PORT, flags="A", seq=seq, ack=seq ^ 1 << 31)
        net.wires["client"].send(outward(ip(CLIENT, REMOTE) / segment / Raw(b"x")))
        expected = left("02:00:00:00:01:fe", ip(EXTERNAL, REMOTE, 63) / translated / Raw(b"x"))
        assert net.wires["outside"].receive() == expected


def test_sessions_of_one_mapping(net: Net) -> None:
    """One inside endpoint, one external one, several remote ends."""
    remotes = ["203.0.113.7", "203.0.113.8", "203.0.113.9"]
    records = np.concatenate(
        [
            record(17, i + 1, remote_addr=int.from_bytes(map(int, one.split("."))))
            for i, one in enumerate(remotes)
        ]
    )
    net.install(records)
    for one in remotes:
        packet = outward(ip(CLIENT, one) / transport(17, INTERNAL_PORT, REMOTE_PORT))
        expected = left(
            "02:00:00:00:01:fe", ip(EXTERNAL, one, 63) / transport(17, EXTERNAL_PORT, REMOTE_PORT)
        )
        net.wires["client"].send(packet)
        assert net.wires["outside"].receive() == expected
    net.run(net.plane.delete(records[:2]))
    assert dump(net)["id"].tolist() == records["id"][2:].tolist()


def test_they_wait_behind_the_server(net: Net) -> None:
    net.run(net.plane.install_static_peer_rules())
    net.install(record(6))
    net.passes("client", out_packet(6), "inner", bytes(out_packet(6)))
    net.second.write(net.plane.prepared_takeover())
    both_ways(net, 6)
    net.run(net.plane.install_static_peer_rules())
    net.passes("client", out_packet(6), "inner", bytes(out_packet(6)))


def test_what_the_agent_has_to_see_reaches_it_as_it_came(net: Net) -> None:
    net.install(np.concatenate([record(), record(6, 2)]))
    both_ways(net, 17)
    long = ip(CLIENT, REMOTE)
    long.flags = "MF"
    syn = TCP(sport=INTERNAL_PORT, dport=REMOTE_PORT, flags="S")
    cases = [
        ("client", outward(ip(CLIENT, REMOTE) / UDP(sport=6000, dport=53)), Kind.NEW_FLOW),
        ("client", outward(ip(CLIENT, REMOTE) / TCP(sport=6000, dport=53, flags="A")), Kind.NEW_FLOW),
        ("outside", inward(ip(REMOTE, EXTERNAL) / UDP(sport=1, dport=2)), Kind.UNSOLICITED),
        ("client", out_packet(ttl=1), Kind.TRACK),
        ("outside", inward(ip(REMOTE, EXTERNAL, 1) / transport(17, REMOTE_PORT, EXTERNAL_PORT)), Kind.TRACK),
        (
            "client",
            outward(long / UDP(sport=INTERNAL_PORT, dport=REMOTE_PORT) / Raw(b"12345678")),
            Kind.NEW_FLOW,
        ),
        ("client", outward(ip(CLIENT, REMOTE) / syn), Kind.TCP_OUT),
    ]
    for device, packet, kind in cases:
        sent = net.wires[device].send(packet)
        event = net.asked(0 if device == "client" else 1, sent)
        assert event.cookie == kind.cookie, packet.summary()


def test_a_next_hop_changes_and_is_lost(net: Net) -> None:
    net.install(record())
    both_ways(net, 17)
    net.run(net.plane.set_next_hop(GATEWAY_KEY, mac_number(NEW_GATEWAY_MAC)))
    net.passes("client", out_packet(), "outside", translated_out(mac=NEW_GATEWAY_MAC))
    moved = record(internal_mac=mac_number(NEW_GATEWAY_MAC))
    assert net.run(net.plane.update(moved)) == 1
    expected = bytes.fromhex(NEW_GATEWAY_MAC.replace(":", "")) + translated_in()[6:]
    net.passes("outside", in_packet(), "client", expected)
    net.run(net.plane.set_next_hop(GATEWAY_KEY, None))
    net.purge()  # a packet that still went the old way would not be asked for

    def asks() -> bool:
        net.wires["client"].send(out_packet())
        packet = ip(EXTERNAL, REMOTE, 63) / transport(17, EXTERNAL_PORT, REMOTE_PORT)
        event = net.asked(0, bytes(outward(packet)))
        return net.plane.without_next_hop(event) == (1, int.from_bytes(bytes([198, 51, 100, 254])))

    until("its rule says which one is missing", asks)


def test_vlans(net: Net) -> None:
    tagged = replace(pipeline(), internal=replace(pipeline().internal, vlan=10))
    fresh(net, pipeline=tagged)
    net.install(record())
    packet = out_packet()
    inside = Ether(src=CLIENT_MAC, dst=packet.dst) / Dot1Q(vlan=10) / packet.payload
    net.passes("client", inside, "outside", translated_out())
    net.passes("outside", in_packet(), "client", translated_in())  # the wire's kernel takes the tag away
    (back,) = net.ovs.flows(f"table={conntrack.TABLE},in_port=2")
    assert "push_vlan:0x8100,set_field:4106->vlan_vid,group" in back


def test_deleted_is_gone(net: Net) -> None:
    net.install(record())
    both_ways(net, 17)
    net.run(net.plane.delete(record()))
    assert len(dump(net)) == 0
    net.asked(0, net.wires["client"].send(out_packet()))


def test_another_session_of_the_same_5_tuple(net: Net) -> None:
    """The rules of the one that ended may go late; the entry of its successor stays, with its own translation."""
    net.install(record())
    both_ways(net, 17)
    next_one = record(number=9, external_port=EXTERNAL_PORT + 1)
    net.store.delete(record())
    net.install(next_one)
    net.run(net.plane.withdraw(record()))
    assert dump(net)["id"].tolist() == next_one["id"].tolist()
    expected = left(
        "02:00:00:00:01:fe", ip(EXTERNAL, REMOTE, 63) / transport(17, EXTERNAL_PORT + 1, REMOTE_PORT)
    )
    net.passes("client", out_packet(), "outside", expected)


# -- what is lost, and found again -----------------------------------------------------------------------------


def test_what_is_lost_is_restored(net: Net) -> None:
    records = random_records(3000)
    net.install(records)
    assert net.run(net.plane.reconcile()) == Reconciled(6000, 0, 0)
    net.ovs.appctl("dpctl/flush-conntrack", f"zone={conntrack.ZONE}")
    assert net.run(net.plane.reconcile()) == Reconciled(0, 6000, 0)
    assert sorted(dump(net)["id"].tolist()) == records["id"].tolist()
    net.ovs.appctl("dpctl/flush-conntrack", f"zone={conntrack.ZONE}")
    net.run(net.plane.refresh())
    assert sorted(dump(net)["id"].tolist()) == records["id"].tolist()
    assert net.plane.refused["entries"] == 3000
    assert "no entries of 3000 sessions" in net.lines[-1]


def test_a_wrong_entry_is_put_right(net: Net) -> None:
    net.install(record())
    wrong = record(external_port=EXTERNAL_PORT + 5)
    groups = np.fromiter(net.plane._ruled.values(), np.uint64)
    txid = net.channel.next_txid()
    data = conntrack.flushes(record(), txid) + conntrack.commits(wrong, groups, 1, 2, txid)
    assert net.run(net.channel.transact(data, txid)) == ()
    assert dump(net)["external_port"].tolist() == wrong["external_port"].tolist()
    net.run(net.plane.refresh())
    assert dump(net)["external_port"].tolist() == [EXTERNAL_PORT]


def test_a_new_agent_knows_the_sessions_by_their_entries(net: Net) -> None:
    records = random_records(3000)
    net.install(records)
    plane = another(net)
    assert net.run(plane.recover()) == 3000
    found = np.sort(np.concatenate(list(net.run(pages(plane)))), order="id")
    for name in (
        "id",
        "protocol",
        *(f"{e}_{w}" for e in ("internal", "external", "remote") for w in ("addr", "port")),
    ):
        assert np.array_equal(found[name], records[name]), name
    assert (found["internal_mac"] == mac_number(CLIENT_MAC)).all()
    assert (found["tcp_state"][found["protocol"] == 6] == TCP_STATES.index("established")).all()
    assert net.run(plane.reconcile()) == Reconciled(6000, 0, 0)


async def pages(plane: OpenFlowDataPlane) -> list[Any]:
    return [page.copy() async for page in plane.sessions()]


def test_a_new_agent_deletes_what_nobody_knows(net: Net) -> None:
    net.install(np.concatenate([record(), record(6, 2)]))
    plane = another(net)
    net.run(plane.install(record()))
    assert net.run(plane.reconcile()) == Reconciled(2, 0, 2)
    assert dump(net)["id"].tolist() == record()["id"].tolist()


def test_an_agent_with_rules_is_followed_by_one_with_entries_and_back(net: Net) -> None:
    net.fresh()
    net.install(record())
    both_ways(net, 17)
    plane = another(net)
    assert net.run(plane.recover()) == 1
    net.run(plane.reconcile())
    assert net.session_flows() == []
    both_ways(net, 17)
    pipe = pipeline()
    store = AsyncMemoryPlane(MemoryPlane(1, []))
    net.plane = OpenFlowDataPlane(net.channel, pipe, next_hops(pipe), store, report=net.lines.append)
    net.run(net.plane.prepare())
    net.install(record())
    net.run(net.plane.reconcile())
    assert net.ovs.flows(f"cookie={Kind.TRACK.cookie:#x}/{ALL_BITS:#x}") == []
    both_ways(net, 17)


def test_use_is_told_and_nothing_else(net: Net) -> None:
    """What was used later than its record says; the tracker counts no packets."""
    records = np.concatenate([record(), record(6, 2), record(17, 3, internal_port=9, external_port=9)])
    records["idle_ms"] = 60_000
    net.install(records)
    txid = net.channel.next_txid()
    assert net.run(net.channel.transact(conntrack.flushes(records[2:], txid), txid)) == ()
    told: list[Any] = []
    update = net.plane._store.update

    async def heard(given: Any) -> int:
        told.append(given.copy())
        return await update(given)

    net.plane._store.update = heard  # type: ignore[method-assign]
    assert net.run(net.plane.refresh()) == 2
    (given,) = told
    assert sorted(given["id"].tolist()) == records["id"][:2].tolist()
    assert (given["idle_ms"] < 10_000).all()
    assert not given["packets_out"].any()


# -- limits and refusals ---------------------------------------------------------------------------------------


def test_the_tracker_has_room_for_all(net: Net) -> None:
    net.ovs.appctl("dpctl/ct-set-maxconns", "100")
    another(net, max_flows=5000)
    assert net.ovs.appctl("dpctl/ct-get-maxconns").strip() == "5000"
    records = random_records(5100)
    assert net.install(records) == 5100
    assert len(dump(net)) == net.plane.offloaded == 5000
    assert "timeout=9999" in net.ovs.appctl("dpctl/dump-conntrack", "-s"), "the zone's own timeout policy"


def test_nothing_is_in_front(net: Net) -> None:
    net.install(record())
    assert net.plane.room_in_front == 0
    assert net.run(net.plane.set_front(record()["id"], True)).tolist() == []
    assert net.run(net.plane.set_front(record()["id"], False)).tolist() == record()["id"].tolist()


def test_a_switch_that_cannot_be_asked(net: Net) -> None:
    pipe = pipeline()
    store = AsyncMemoryPlane(MemoryPlane(1, []))
    plane = ConntrackPlane(net.channel, pipe, next_hops(pipe), store, ovs=Path("/nowhere"))
    with pytest.raises(SwitchError, match=r"switch\.nat: conntrack.*/nowhere"):
        net.run(plane.prepare())


def test_lines_of_others_are_no_entries() -> None:
    line = (
        "udp,orig=(src=10.0.0.5,dst=203.0.113.7,sport=5000,dport=53),reply=(src=203.0.113.7,dst=198.51.100.10,"
        "sport=53,dport=33333),zone=20033,timeout=999990,labels=0x%x"
    )
    ours = 5 << 96 | 6 << 64 | 1 << 60 | 1 << 52 | 7
    lines = [
        line % ours,
        line % 7,
        "icmp,orig=(src=10.0.0.5,dst=1.1.1.1,id=1,type=8,code=0)",
        "",
        line % ours + ",x",
    ]
    found = conntrack.entries("\n".join(lines))
    assert found["id"].tolist() == [record(number=7)["id"][0]] * 2
    assert found["idle"].tolist() == [9, 9]
    rules = conntrack.as_rules(found[:1])
    assert rules.dtype == RULE
    assert rules["group"].tolist() == [6, 5]
    assert len(conntrack.entries("")) == 0
