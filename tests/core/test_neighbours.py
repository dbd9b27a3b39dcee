# SPDX-License-Identifier: Apache-2.0
"""ARP (RFC 826, RFC 5227), next hops, the packets that wait for them, and the way back to where a session came from."""

from __future__ import annotations

from scapy.layers.inet import UDP
from scapy.layers.l2 import ARP, Ether

from nat_fastpath.core_config import RouteConfig
from nat_fastpath.engine import NEIGHBOUR_STATES, Verdict
from tests.packets import (
    CLIENT,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    SERVER,
    Nat,
    arp,
    host_mac,
    mac_bytes,
    number,
    parse,
    udp,
)

LEARNED = (
    RouteConfig(number("10.0.0.0"), 24, INSIDE),
    RouteConfig(number("198.51.100.0"), 24, OUTSIDE),
    RouteConfig(0, 0, OUTSIDE, number(GATEWAY)),
)
ROUTER, ROUTER_MAC = "10.0.0.99", "02:00:0a:00:00:99"


def asked(nat: Nat, port: int) -> list[tuple[str, str]]:
    """(destination MAC, address asked for) of the ARP requests in the outbox."""
    frames = [Ether(data) for at, data in nat.core.outbox() if at == port]
    assert all(f[ARP].op == 1 and f[ARP].hwsrc == f.src == OUR_MAC[port] for f in frames)
    return [(f.dst, f[ARP].pdst) for f in frames]


def state(nat: Nat, address: str) -> str:
    row = next(row for row in nat.core.neighbours() if int(row["address"]) == number(address))
    return NEIGHBOUR_STATES[int(row["state"])]


def test_requests_are_answered_for_what_is_ours() -> None:
    nat = Nat()
    for port, address in (
        (0, OUR_ADDRESS[0]),
        (1, OUR_ADDRESS[1]),
        (1, "198.51.100.10"),
        (1, "198.51.100.13"),
    ):
        for sender in (GATEWAY, "0.0.0.0"):  # the second asks whether the address is taken: RFC 5227
            result = nat.raw(arp(port, 1, GATEWAY_MAC, sender, address), port)
            assert (result.verdict, result.port) == (Verdict.REPLY, port)
            answer = Ether(result.frame)
            assert (answer.dst, answer.src) == (GATEWAY_MAC, OUR_MAC[port])
            body = answer[ARP]
            assert (body.op, body.psrc, body.hwsrc, body.pdst, body.hwdst) == (
                2,
                address,
                OUR_MAC[port],
                sender,
                GATEWAY_MAC,
            )
    assert nat.raw(arp(0, 1, GATEWAY_MAC, CLIENT, "198.51.100.10"), 0).verdict != Verdict.REPLY
    assert nat.raw(arp(1, 1, GATEWAY_MAC, GATEWAY, "198.51.100.14"), 1).verdict != Verdict.REPLY


def test_malformed_arp_is_dropped() -> None:
    nat = Nat()
    good = arp(0, 1, host_mac(CLIENT), CLIENT, OUR_ADDRESS[0])
    for at, value in ((15, 2), (17, 6), (18, 5), (19, 6), (21, 3), (22, 1)):
        bad = bytearray(good)
        bad[at] = value
        assert nat.raw(bytes(bad)).verdict == Verdict.DROP_ARP
    assert nat.raw(good[:41]).verdict == Verdict.DROP_RUNT
    assert nat.raw(arp(0, 1, OUR_MAC[0], CLIENT, OUR_ADDRESS[0])).verdict == Verdict.DROP_ARP


def test_gratuitous_arp_for_every_address() -> None:
    nat = Nat()
    nat.core.announce()
    nat.pump(0.2)
    frames = nat.core.outbox()
    said = {(port, Ether(data)[ARP].psrc) for port, data in frames}
    pool = [f"198.51.100.{n}" for n in range(10, 14)]
    assert said == {(0, OUR_ADDRESS[0]), (1, OUR_ADDRESS[1]), *((1, address) for address in pool)}
    assert all(Ether(data)[ARP].psrc == Ether(data)[ARP].pdst for _, data in frames)
    assert all(Ether(data).dst == "ff:ff:ff:ff:ff:ff" for _, data in frames)


def test_packets_wait_for_their_next_hop_in_order() -> None:
    nat = Nat(routes=LEARNED)
    sent = [udp(CLIENT, 4000, SERVER, 53, b"%d" % at) for at in range(5)]
    assert [nat.verdict(packet) for packet in sent] == ["HELD"] * 5
    assert nat.core.take() == []
    nat.resolve(GATEWAY, OUTSIDE, GATEWAY_MAC)
    taken = nat.core.take()
    assert [bytes(parse(result.frame)[UDP].payload) for result in taken] == [b"%d" % at for at in range(5)]
    assert all(r.verdict == Verdict.FORWARD and r.port == OUTSIDE for r in taken)
    assert all(r.frame[:12] == mac_bytes(GATEWAY_MAC) + mac_bytes(OUR_MAC[OUTSIDE]) for r in taken)
    assert nat.verdict(sent[0]) == "FORWARD"
    assert nat.count("HELD") == 5


def test_next_hop_that_does_not_answer() -> None:
    """Asked four times, a quarter of a second apart; then what waits is dropped by name."""
    nat = Nat(routes=LEARNED)
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "HELD"
    nat.pump(1.2)
    assert asked(nat, OUTSIDE) == [("ff:ff:ff:ff:ff:ff", GATEWAY)] * 4
    assert [result.verdict for result in nat.core.take()] == [Verdict.DROP_UNREACHABLE]
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "HELD", "later packets try again"


def test_a_gateway_that_was_asked_in_vain_before_gets_its_time() -> None:
    """A packet is not dropped for requests that nobody heard before it came: as when the switch was not there yet."""
    for pause in (0.0, 0.1, 0.2):
        nat = Nat(routes=LEARNED)
        nat.pump(0.85 + pause)
        assert nat.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.HELD
        nat.core.outbox()
        nat.pump(0.3)
        assert nat.core.take() == []
        assert ("ff:ff:ff:ff:ff:ff", GATEWAY) in asked(nat, OUTSIDE)
        nat.raw(arp(OUTSIDE, 2, GATEWAY_MAC, GATEWAY, OUR_ADDRESS[OUTSIDE], OUR_MAC[OUTSIDE]), OUTSIDE)
        assert [result.verdict for result in nat.core.take()] == [Verdict.FORWARD]


def test_held_packets_are_bounded() -> None:
    nat = Nat(routes=LEARNED, max_held=8)
    verdicts = [nat.verdict(udp(CLIENT, 4000, SERVER, 53)) for _ in range(10)]
    assert verdicts == ["HELD"] * 8 + ["DROP_HOLD_LIMIT"] * 2
    one_hop = Nat(routes=LEARNED)
    verdicts = [one_hop.verdict(udp(CLIENT, 4000, SERVER, 53)) for _ in range(70)]
    assert verdicts == ["HELD"] * 64 + ["DROP_HOLD_LIMIT"] * 6


def test_known_next_hop_is_refreshed_and_moves() -> None:
    """In use it is asked for again before it is given up, and its new MAC counts at once. No packet waits."""
    nat = Nat(routes=LEARNED)
    nat.send(udp(CLIENT, 4000, SERVER, 53))
    nat.resolve(GATEWAY, OUTSIDE, GATEWAY_MAC)
    for _ in range(31):
        nat.pump(1)
        assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "FORWARD"
    nat.pump(1)
    assert state(nat, GATEWAY) == "probe"
    assert asked(nat, OUTSIDE)[0] == (GATEWAY_MAC, GATEWAY), "unicast first: RFC 1122, 2.3.2.1"
    moved = "02:00:00:00:02:fe"
    assert nat.raw(arp(1, 1, moved, GATEWAY, GATEWAY), 1).verdict == Verdict.CONSUMED
    assert state(nat, GATEWAY) == "reachable"
    assert nat.send(udp(CLIENT, 4000, SERVER, 53)).frame[:6] == mac_bytes(moved)


def test_next_hop_that_goes_silent_is_probed_then_waited_for() -> None:
    nat = Nat(routes=LEARNED)
    nat.send(udp(CLIENT, 4000, SERVER, 53))
    nat.resolve(GATEWAY, OUTSIDE, GATEWAY_MAC)
    nat.pump(30)
    assert asked(nat, OUTSIDE) == []
    nat.pump(9)
    probes = asked(nat, OUTSIDE)
    assert [mac for mac, _ in probes[:6]] == [GATEWAY_MAC] * 3 + ["ff:ff:ff:ff:ff:ff"] * 3
    assert state(nat, GATEWAY) == "incomplete"
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53)) == "HELD"


def test_static_neighbour_is_not_overwritten() -> None:
    nat = Nat()
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.raw(arp(0, 2, "02:00:00:00:66:66", CLIENT, OUR_ADDRESS[0], OUR_MAC[0], OUR_MAC[0]))
    assert state(nat, CLIENT) == "static"
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    answer = nat.send(udp(SERVER, 53, out.src, out[UDP].sport), OUTSIDE)
    assert answer.frame[:6] == mac_bytes(host_mac(CLIENT))


def test_answers_go_to_the_mac_that_the_session_comes_from() -> None:
    """Two hosts behind one address by two routers: each session's answers to its own; and a session may move."""
    nat = Nat(neighbours=())
    first, second = "02:00:0a:00:01:01", "02:00:0a:00:01:02"
    for sport, mac in ((4000, first), (4001, second)):
        out = nat.forward(udp(CLIENT, sport, SERVER, 53), mac=mac)
        answer = nat.send(udp(SERVER, 53, out.src, out[UDP].sport), OUTSIDE)
        assert answer.frame[:6] == mac_bytes(mac)
    nat.wait(1)
    out = nat.forward(udp(CLIENT, 4000, SERVER, 53), mac=second)
    answer = nat.send(udp(SERVER, 53, out.src, out[UDP].sport), OUTSIDE)
    assert answer.frame[:6] == mac_bytes(second)


def test_subnets_behind_an_inside_router() -> None:
    """`routes:` of a port: sessions of 10.9.0.0/16 come from the router, and their answers go there."""
    routes = (*LEARNED[:2], RouteConfig(0, 0, OUTSIDE, number(GATEWAY), mac_bytes(GATEWAY_MAC)))
    behind = RouteConfig(number("10.9.0.0"), 16, INSIDE, number(ROUTER), mac_bytes(ROUTER_MAC))
    nat = Nat(routes=(*routes, behind), filtering="endpoint-independent")
    out = nat.forward(udp("10.9.3.4", 4000, SERVER, 53), mac=ROUTER_MAC)
    for remote in (SERVER, "203.0.113.9"):
        answer = nat.send(udp(remote, 53, out.src, out[UDP].sport), OUTSIDE)
        assert (answer.verdict, answer.port) == (Verdict.FORWARD, INSIDE)
        assert answer.frame[:6] == mac_bytes(ROUTER_MAC)
        assert parse(answer.frame).dst == "10.9.3.4"
    # the longest prefix decides, and inside destinations do not leave
    assert nat.verdict(udp(CLIENT, 4000, "10.9.1.1", 53)) == "DROP_NO_ROUTE"
    assert nat.verdict(udp(CLIENT, 4000, "10.0.0.77", 53)) == "DROP_NO_ROUTE"


def test_destination_on_the_outside_link_needs_no_gateway() -> None:
    nat = Nat()
    assert nat.verdict(udp(CLIENT, 4000, "198.51.100.200", 53)) == "HELD"
    nat.resolve("198.51.100.200", OUTSIDE, "02:00:00:00:01:c8")
    (result,) = nat.core.take()
    assert result.frame[:6] == mac_bytes("02:00:00:00:01:c8")
    assert nat.verdict(udp(CLIENT, 4000, "198.51.100.255", 53)) == "DROP_MULTICAST"


def test_unused_next_hops_are_forgotten() -> None:
    nat = Nat(max_neighbours=256, udp_timeout=5)
    before = nat.counters()["neighbours"]
    for at in range(50):
        nat.send(udp(CLIENT, 4000, f"198.51.100.{100 + at}", 53))
    assert nat.counters()["neighbours"] == before + 50
    for _ in range(70):
        nat.pump(1, 0.25)
        nat.core.outbox()
        nat.core.take()
    assert nat.counters()["neighbours"] == before
