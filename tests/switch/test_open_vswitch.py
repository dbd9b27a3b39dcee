# SPDX-License-Identifier: Apache-2.0
"""The switch side against a real Open vSwitch, with real packets."""

import hashlib
import os
import sys
from dataclasses import replace
from ipaddress import IPv4Address

import numpy as np
import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from nat_control.lab import Lab, LabError, leftovers, until
from nat_fastpath.engine import RECORD
from switch_agent import channel as openflow
from switch_agent.codec import Error, Lost, PortStatus, Ready, TransactionComplete
from switch_agent.failover import WithGroup
from switch_agent.nexthops import NextHops, key
from switch_agent.ovs import RECEIVE_BUFFER, OpenVSwitch
from switch_agent.pipeline import (
    FORWARD_COOKIE,
    FORWARD_MASK,
    FastFailover,
    Kind,
    Output,
    Rule,
    SetField,
    StaticGroup,
    mac_text,
)
from switch_agent.plane import TAKEOVER_TXID, OpenFlowDataPlane, Reconciled, SwitchError
from tests.memory_plane import AsyncMemoryPlane, MemoryPlane
from tests.switch.net import (
    CLIENT,
    CLIENT_MAC,
    DEVICES,
    EXTERNAL,
    EXTERNAL_PORT,
    GATEWAY_KEY,
    GATEWAY_MAC,
    INTERNAL_PORT,
    NEW_GATEWAY_MAC,
    REMOTE,
    REMOTE_PORT,
    ROUTES,
    VIRTUAL_MAC,
    Net,
    inward,
    ip,
    left,
    mac_number,
    outward,
    pipeline,
    random_records,
    record,
)

ENDS = ("internal", "external", "remote")


def transport(protocol: int, source: int, destination: int) -> Packet:
    if protocol == 17:
        return UDP(sport=source, dport=destination) / Raw(b"to be checked")
    return TCP(sport=source, dport=destination, flags="PA", seq=1000, ack=2000) / Raw(b"to be checked")


def out_packet(protocol: int = 17, ttl: int = 64) -> Packet:
    return outward(ip(CLIENT, REMOTE, ttl) / transport(protocol, INTERNAL_PORT, REMOTE_PORT))


def in_packet(protocol: int = 17) -> Packet:
    return inward(ip(REMOTE, EXTERNAL) / transport(protocol, REMOTE_PORT, EXTERNAL_PORT))


def translated_out(protocol: int = 17, mac: str = GATEWAY_MAC) -> bytes:
    return left(mac, ip(EXTERNAL, REMOTE, 63) / transport(protocol, EXTERNAL_PORT, REMOTE_PORT))


def translated_in(protocol: int = 17) -> bytes:
    return left(CLIENT_MAC, ip(REMOTE, CLIENT, 63) / transport(protocol, REMOTE_PORT, INTERNAL_PORT))


def test_a_switch_leaves_nothing_behind() -> None:
    """Neither its receive buffers nor, after an error, its daemons."""
    before, there_before = RECEIVE_BUFFER.read_text(), leftovers(os.getpid())
    with Lab() as lab:
        there = lab.namespace("switch")
        lab.cable(there, "one", lab.namespace("end"), "eth0")
        switch = OpenVSwitch(there, {"one": 7}, receive_buffer=4 << 20)
        assert "7(one)" in switch.ofctl("show")
        assert RECEIVE_BUFFER.read_text() == before
        with pytest.raises(LabError, match="nothing is OpenFlow port"):
            OpenVSwitch(lab.namespace("empty"), {"nothing": 1})
        daemons = list(lab.processes)
    assert len(daemons) == 4
    assert not any(process.alive for process in daemons)
    assert leftovers(os.getpid()) == there_before


def test_the_switch_says_who_it_is(net: Net) -> None:
    assert net.channel.connected
    assert net.ovs.ofctl("show").count("LIVE") == len(DEVICES)
    assert len(net.ovs.flows()) == len(net.plane._pipeline.base() + net.plane._pipeline.tcp_control())


@pytest.mark.parametrize("protocol", [6, 17])
def test_packets_are_translated_both_ways(net: Net, protocol: int) -> None:
    """Every byte is that of a packet made by scapy: addresses, ports, TTL, both checksums."""
    assert net.install(record(protocol)) == 1
    net.wires["client"].send(out_packet(protocol))
    assert net.wires["outside"].receive() == translated_out(protocol)
    net.wires["outside"].send(in_packet(protocol))
    assert net.wires["client"].receive() == translated_in(protocol)


def test_a_udp_checksum_of_zero_stays(net: Net) -> None:
    net.install(record())
    packet = out_packet()
    packet[UDP].chksum = 0
    net.wires["client"].send(packet)
    expected = Ether(translated_out())
    expected[UDP].chksum = 0
    assert net.wires["outside"].receive() == bytes(expected)


def test_installing_again_changes_nothing(net: Net) -> None:
    net.install(record())
    net.wires["client"].send(out_packet())
    assert net.wires["outside"].receive()
    assert net.install(record()) == 1
    assert len(net.session_flows()) == 2
    until("counted", lambda: sum("n_packets=1" in line for line in net.session_flows()) == 1)


def test_a_changed_next_hop_moves_the_traffic(net: Net) -> None:
    net.install(record())
    net.passes("client", out_packet(), "outside", translated_out())
    net.run(net.plane.set_next_hop(GATEWAY_KEY, mac_number(NEW_GATEWAY_MAC)))
    net.passes("client", out_packet(), "outside", translated_out(mac=NEW_GATEWAY_MAC))


def test_an_unknown_next_hop_asks_the_agent(net: Net) -> None:
    net.run(net.plane.set_next_hop(GATEWAY_KEY, None))
    net.install(record())
    net.wires["client"].send(out_packet())
    packet = ip(EXTERNAL, REMOTE, 63) / transport(17, EXTERNAL_PORT, REMOTE_PORT)
    net.asked(0, bytes(outward(packet)))


def test_with_the_server_in_front_the_rules_wait_until_the_takeover(net: Net) -> None:
    net.run(net.plane.install_static_peer_rules())
    net.install(record())
    sent = net.wires["client"].send(out_packet())
    assert net.wires["inner"].receive() == sent
    stray = Ether(dst=GATEWAY_MAC, src=VIRTUAL_MAC) / ip(EXTERNAL, REMOTE) / UDP()
    sent = net.wires["outer"].send(stray)
    assert net.wires["outside"].receive() == sent

    # on the other connection, which has nothing else to do
    net.second.write(net.plane.prepared_takeover())
    done = net.run(
        net.expect(
            lambda event: isinstance(event, TransactionComplete | Error) and event.txid == TAKEOVER_TXID,
            net.second,
        )
    )
    assert isinstance(done, TransactionComplete)
    net.passes("client", out_packet(), "outside", translated_out())
    net.passes("outside", in_packet(), "client", translated_in())

    # the server is fenced off: what it still sends is dropped, and counted
    fence = f"cookie={Kind.FENCE.cookie:#x}/-1"

    def fenced() -> bool:
        net.wires["outer"].send(stray)
        return any("n_packets=0" not in line for line in net.ovs.flows(fence))

    until("the fence counts", fenced)
    net.wires["outside"].clear()
    net.wires["outer"].send(stray)
    net.wires["client"].send(out_packet())
    assert net.wires["outside"].receive() == translated_out()

    # the way back
    net.run(net.plane.install_static_peer_rules())
    net.passes("client", out_packet(), "inner", bytes(out_packet()))


def test_a_planned_hand_over_drains_the_server(net: Net) -> None:
    net.run(net.plane.install_static_peer_rules())
    net.install(record())
    net.run(net.plane.delete_static_peer_rules(Kind.TO_SERVER))
    net.wires["client"].send(out_packet())
    assert net.wires["outside"].receive() == translated_out()
    sent = net.wires["outer"].send(Ether(dst=GATEWAY_MAC, src=VIRTUAL_MAC) / ip(EXTERNAL, REMOTE) / UDP())
    assert net.wires["outside"].receive() == sent
    net.run(net.plane.delete_static_peer_rules())
    assert net.ovs.flows(f"cookie={Kind.FROM_SERVER.cookie:#x}/-1") == []


def test_what_the_agent_has_to_see_reaches_it(net: Net) -> None:
    """New flows, ICMP, ARP for our addresses, a TTL that ends here; each by the rule that says why."""
    net.install(record())
    gateway_asks = ARP(op=1, psrc="198.51.100.254", pdst="198.51.100.12")
    cases = [
        ("client", outward(ip(CLIENT, REMOTE) / UDP(sport=6000, dport=53)), Kind.NEW_FLOW.cookie),
        ("client", outward(ip(CLIENT, REMOTE) / ICMP()), Kind.ICMP.cookie),
        ("client", Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst="10.0.0.1"), Kind.ARP.cookie),
        ("outside", inward(ip(REMOTE, EXTERNAL) / UDP(sport=1, dport=2)), Kind.UNSOLICITED.cookie),
        ("outside", Ether(src=GATEWAY_MAC, dst="ff:ff:ff:ff:ff:ff") / gateway_asks, Kind.ARP.cookie),
        ("client", out_packet(ttl=1), int(record()["id"][0])),
    ]
    for device, packet, cookie in cases:
        sent = net.wires[device].send(packet)
        event = net.asked(DEVICES[device] - 1, sent)
        # Open vSwitch names no rule with a packet whose TTL ended; the reason does.
        assert event.cookie == cookie or event.reason == 2, packet.summary()


def test_a_packet_of_the_agent_leaves(net: Net) -> None:
    frame = translated_out()
    assert net.plane.packet_out(frame, 1)
    assert net.wires["outside"].receive() == frame
    assert net.plane.packet_out(translated_in(), 0)
    assert net.wires["client"].receive() == translated_in()


def test_a_tcp_connection_through_the_switch(net: Net) -> None:
    """curl downloads through the rules alone."""
    net.client.ip("link", "set", "to-client", "address", CLIENT_MAC)
    net.outside.ip("link", "set", "to-outside", "address", GATEWAY_MAC)
    net.client.address("to-client", f"{CLIENT}/24")
    net.outside.address("to-outside", f"{REMOTE}/24")
    net.client.route("default", "10.0.0.1")
    net.outside.route("198.51.100.0/24", "203.0.113.1")
    for space, device, gateway in (
        (net.client, "to-client", "10.0.0.1"),
        (net.outside, "to-outside", "203.0.113.1"),
    ):
        space.ip("neigh", "replace", gateway, "lladdr", VIRTUAL_MAC, "dev", device)
        space.run("ethtool", "-K", device, "tx", "off")
    content = np.random.default_rng(1).bytes(3 << 20)
    (net.lab.directory / "file").write_bytes(content)
    server = ["-u", "-m", "http.server", "8080", "--bind", REMOTE, "--directory", str(net.lab.directory)]
    web = net.outside.start(sys.executable, *server, name="web").ready("Serving")
    try:
        net.install(record(6, remote_port=8080))
        net.run(net.plane._delete_kinds(Kind.TCP_OUT, Kind.TCP_IN))  # there is no core that would send on
        got = net.lab.directory / "got"
        fetch = ["curl", "-sS", "--max-time", "20", "--local-port", str(INTERNAL_PORT)]
        net.client.run(*fetch, "-o", str(got), f"http://{REMOTE}:8080/file")
        assert hashlib.sha256(got.read_bytes()).digest() == hashlib.sha256(content).digest()
    finally:
        web.stop()
        net.client.ip("address", "flush", "dev", "to-client")
        net.outside.ip("address", "flush", "dev", "to-outside")

    # the switch brings its counters up to date twice a second
    def counted() -> bool:
        (carried,) = net.run(net.plane.activity())
        assert carried["id"] == record()["id"][0]
        # outwards at least SYN, ACK, request and FIN
        return bool(carried["frame_bytes_in"] > len(content) and carried["packets_out"] >= 4)

    until("all is counted", counted)


# -- errors and limits -------------------------------------------------------------------------------------


def test_errors_name_the_transaction(net: Net) -> None:
    txid = net.channel.next_txid()
    bad = openflow.flow_mod(Rule(1, {}, (Output(0xFFFFFF01),), 0xAB), txid=txid)
    good = openflow.flow_mod(Rule(1, {"in_port": 1}, (), 0xAC), txid=txid)
    (error,) = net.run(net.channel.transact(bad + good, txid))
    assert (error.txid, error.cookie) == (txid, 0xAB)
    assert "OFPET_BAD_ACTION" in error.text
    assert len(net.ovs.flows("cookie=0xac/-1")) == 1

    txid = net.channel.next_txid()
    arp_without_type = bytearray(
        openflow.flow_mod(Rule(1, {"eth_type": 0x806, "arp_op": 1}, (), 1), txid=txid)
    )
    arp_without_type[60:62] = b"\x08\x00"  # the value of eth_type: a field of ARP in IPv4
    (error,) = net.run(net.channel.transact(arp_without_type, txid))
    assert "OFPET_BAD_MATCH" in error.text


def test_a_full_table_is_reported_and_the_rest_is_kept_as_records(net: Net) -> None:
    static = len(net.ovs.flows())
    limit = ["--", "--id=@t", "create", "Flow_Table", f"flow_limit={static + 20}", "overflow_policy=refuse"]
    net.ovs.vsctl(*limit[1:], "--", "set", "bridge", net.ovs.bridge, "flow_tables:0=@t")
    try:
        records = random_records(50)
        assert net.install(records[:10]) + net.install(records[10:]) == 50
        assert net.plane.refused["table_full"] >= 40
        assert "TABLE_FULL" in net.lines[0]
        assert net.plane.offloaded == len(net.session_flows()) // 2 == net.plane.has_rules(records).sum()
        assert len(net.store) == 50
        net.run(net.plane.install_static_peer_rules())  # a return has room all the same
        assert len(net.ovs.flows(f"cookie={FORWARD_COOKIE:#x}/{FORWARD_MASK:#x}")) == 4
        assert net.plane.offloaded == len(net.session_flows()) // 2 == net.plane.full_at
        assert "leave their rules' room" in net.lines[-1]
        net.run(net.plane.delete_static_peer_rules())
    finally:
        net.ovs.vsctl("clear", "bridge", net.ovs.bridge, "flow_tables")
    net.run(net.plane.rerank())
    assert len(net.session_flows()) == 100


def test_only_the_busiest_get_rules(net: Net) -> None:
    net.fresh(max_flows=8)
    records = random_records(10)
    records["packets_out"] = np.arange(10)
    net.install(records)
    assert net.plane.has_rules(records).tolist() == [False] * 6 + [True] * 4
    assert len(net.session_flows()) == 8
    records["packets_out"][:2] = 100
    net.run(net.plane.update(records))
    assert net.run(net.plane.rerank()) == (2, 2)
    assert net.plane.has_rules(records).tolist() == [True] * 2 + [False] * 6 + [True] * 2
    assert net.run(net.plane.rerank()) == (0, 0)


def test_what_no_rule_can_carry_stays_a_record(net: Net) -> None:
    records = np.concatenate([record(1), record(17, 2, remote_addr=record()["external_addr"][0] + 1)])
    assert net.install(records) == 2
    assert net.session_flows() == []
    assert len(net.store) == 2


def test_next_hops_that_nobody_uses_make_room(net: Net) -> None:
    net.fresh(groups=4)
    records = random_records(8)
    records["internal_mac"] = np.arange(1, 9)
    net.install(records[:5])
    assert net.plane.has_rules(records).sum() == 3  # and one group is the gateway's
    assert net.plane.refused["next_hops"] == 2
    assert "no more groups" in net.lines[0]
    net.run(net.plane.delete(records[:2]))
    net.install(records[5:])
    assert net.plane.has_rules(records).sum() == 3
    assert net.ovs.ofctl("dump-groups").count("group_id=") == 4


def test_reconciling(net: Net) -> None:
    records = random_records(300)
    net.install(records)
    net.ovs.ofctl("del-flows", f"cookie={int(records['id'][5]):#x}/-1")
    unknown = record(17, 999, internal_port=9)
    rule = Rule(300, {"in_port": 1}, (Output(2),), int(unknown["id"][0]))
    txid = net.channel.next_txid()
    wrong = openflow.group_mod(77, (SetField("eth_dst", mac_text(1)), Output(2)), txid)
    net.run(net.channel.transact(wrong + openflow.flow_mod(rule, txid=txid), txid))
    assert net.run(net.plane.reconcile()) == Reconciled(599, 1, 1)
    assert len(net.session_flows()) == 600
    assert net.run(net.plane.reconcile()) == Reconciled(600, 0, 0)


def test_connection_lost_and_back(net: Net) -> None:
    """The switch forwards on, what is outstanding fails, and what was missed is made good."""
    net.install(record())
    second = record(17, 2, internal_port=5001, external_port=4444)
    net.ovs.set_controllers(net.second_socket)
    assert isinstance(net.run(net.expect(lambda event: isinstance(event, Lost))), Lost)
    assert not net.channel.connected
    assert net.install(second) == 1, "the agent holds it, and its rules come with the switch"
    net.run(net.plane.delete(record()))
    assert "until it is back" in net.lines[-1]
    net.wires["client"].send(out_packet())
    assert net.wires["outside"].receive() == translated_out()

    net.ovs.set_controllers(f"unix:{net.ovs.controller_socket}", net.second_socket, probe_ms=0)
    ready = net.run(net.expect(lambda event: isinstance(event, Ready)))
    assert isinstance(ready, Ready)
    assert {port.name: port.number for port in ready.ports if port.name in DEVICES} == DEVICES
    net.run(net.plane.prepare())
    assert net.run(net.plane.reconcile()) == Reconciled(0, 2, 2)
    assert {int(line.split(",")[0][7:], 16) & ~(1 << 63) for line in net.session_flows()} == {
        int(second["id"][0])
    }


def test_a_restarted_switch_gets_everything_again(net: Net) -> None:
    net.install(random_records(100))
    net.ovs.restart()
    net.run(net.expect(lambda event: isinstance(event, Ready)))
    net.run(net.plane.prepare())
    assert net.run(net.plane.reconcile()) == Reconciled(0, 200, 0)
    assert len(net.session_flows()) == 200


def test_a_restarted_agent_finds_its_rules_right(net: Net) -> None:
    records = random_records(100)
    net.install(records)
    pipe = net.plane._pipeline
    before = sorted(line.split("actions=")[1] for line in net.session_flows())
    net.plane = type(net.plane)(net.channel, pipe, type(net.plane._hops)(pipe, ROUTES), net.plane._store)
    net.install(records)
    assert sorted(line.split("actions=")[1] for line in net.session_flows()) == before
    assert net.run(net.plane.reconcile()) == Reconciled(200, 0, 0)


def test_a_new_agent_reads_the_sessions_back(net: Net) -> None:
    """All of it from the switch: endpoints, counters, and the MACs of next hops by address and by MAC."""
    records = random_records(300)
    records["internal_mac"][::3] = 0
    net.install(records)
    address = IPv4Address(int(records["internal_addr"][0]))
    net.run(net.plane.set_next_hop(key("internal", address), mac_number(CLIENT_MAC)))
    net.install(one := record(number=1000))
    net.wires["client"].send(out_packet())
    assert net.wires["outside"].receive() == translated_out()

    net.store = MemoryPlane(1, [])
    pipe = net.plane._pipeline
    net.plane = OpenFlowDataPlane(net.channel, pipe, NextHops(pipe, ROUTES), AsyncMemoryPlane(net.store))
    net.run(net.plane.prepare())
    until("its packet is counted", lambda: net.run(net.plane.activity())["packets_out"].sum() == 1)
    assert net.run(net.plane.recover()) == 301
    assert net.run(net.plane.reconcile()) == Reconciled(602, 0, 0)
    found = np.array(sorted(net.store.held.values(), key=lambda row: int(row["id"])), RECORD)
    for name in ("id", "protocol", *(f"{end}_{what}" for end in ENDS for what in ("addr", "port"))):
        assert np.array_equal(found[name], np.concatenate((records, one))[name]), name
    assert np.array_equal(found["internal_mac"], np.concatenate((records, one))["internal_mac"])
    assert found[-1]["packets_out"] == 1
    assert net.run(net.plane.refresh()) == 0, "what was read back is not counted again"
    net.wires["client"].send(out_packet())
    assert net.wires["outside"].receive() == translated_out()
    net.run(net.plane.set_next_hop(GATEWAY_KEY, mac_number(NEW_GATEWAY_MAC)))
    net.passes("client", out_packet(), "outside", translated_out(mac=NEW_GATEWAY_MAC))


def test_a_port_that_goes_down_is_told(net: Net) -> None:
    net.server.ip("link", "set", "to-inner", "down")
    try:
        event = net.run(net.expect(lambda event: isinstance(event, PortStatus) and not event.port.up))
        assert isinstance(event, PortStatus)
        assert event.port.number == DEVICES["inner"]
    finally:
        net.server.ip("link", "set", "to-inner", "up")
        net.run(net.expect(lambda event: isinstance(event, PortStatus) and event.port.up))


def test_a_refused_static_rule_is_an_error(net: Net) -> None:
    with pytest.raises(SwitchError, match="the switch refuses static rules: OFPET_BAD_ACTION"):
        net.run(net.plane._rules((Rule(1, {}, (Output(0xFFFFFF01),), 1),)))


def test_a_switch_that_has_no_such_group(net: Net) -> None:
    """The line says which key asks for it."""

    class Refused(WithGroup):
        def groups(self) -> tuple[StaticGroup, ...]:
            return (FastFailover(0xFFFF_FF01, 3, (), otherwise=1),)  # beyond the last id that there is

    plain = pipeline()
    words = r"the switch refuses a fast-failover group .*`switch.failover: group` is for Open vSwitch"
    with pytest.raises(SwitchError, match=words):
        net.fresh(pipeline=Refused(plain.internal, plain.external, plain.mac))


def test_inside_next_hops_by_address(net: Net) -> None:
    """Without a MAC in the record the host itself is the next hop, and is asked for by the agent."""
    net.install(record(internal_mac=0))
    net.wires["outside"].send(in_packet())
    net.asked(1, bytes(inward(ip(REMOTE, CLIENT, 63) / transport(17, REMOTE_PORT, INTERNAL_PORT))))
    net.run(net.plane.set_next_hop(key("internal", IPv4Address(CLIENT)), mac_number(CLIENT_MAC)))
    net.passes("outside", in_packet(), "client", translated_in())


def test_tags_are_changed_on_the_way(net: Net) -> None:
    """VLAN 5 inside, none outside; the agent sees and sends untagged frames."""
    plain = pipeline()
    net.fresh(pipeline=pipeline(internal=replace(plain.internal, vlan=5)))

    def tagged(packet: Packet) -> Packet:
        return Ether(src=packet.src, dst=packet.dst) / Dot1Q(vlan=5) / packet.payload

    net.install(record())
    net.wires["client"].send(tagged(out_packet()))
    assert net.wires["outside"].receive() == translated_out()
    net.wires["client"].send(tagged(outward(ip(CLIENT, REMOTE) / ICMP())))
    net.asked(0, bytes(outward(ip(CLIENT, REMOTE) / ICMP())))
