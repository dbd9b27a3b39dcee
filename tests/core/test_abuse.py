# SPDX-License-Identifier: Apache-2.0
"""What a hostile host inside or outside can send, and must not gain by it."""

from __future__ import annotations

import threading

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import ARP, Ether

from nat_fastpath.core_config import RouteConfig
from nat_fastpath.engine import FLAG_PENDING, Core, Verdict
from tests.packets import (
    CLIENT,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    OTHER_CLIENT,
    OUR_MAC,
    OUTSIDE,
    SERVER,
    Nat,
    arp,
    config,
    echo,
    frame,
    icmp_error,
    number,
    parse,
    tcp,
    udp,
)

STRANGER_MAC = "02:bb:00:00:00:01"


def next_hops(nat: Nat) -> int:
    return len(nat.core.neighbours())


@pytest.mark.parametrize(
    "limit", [{"sessions_per_host": 2}, {"new_sessions_rate": 1, "new_sessions_burst": 2}], ids=str
)
def test_refused_packets_leave_no_next_hops_behind(limit: dict[str, int]) -> None:
    nat = Nat(**limit)
    before = next_hops(nat)
    for host in range(20, 120):
        nat.send(udp(CLIENT, 4000, f"198.51.100.{host}", 53))
    assert next_hops(nat) <= before + 2


def test_refused_sources_leave_no_next_hops_behind() -> None:
    nat = Nat(new_sessions_rate=1, new_sessions_burst=1)
    before = next_hops(nat)
    for host in range(60, 250):
        nat.send(udp(f"10.0.0.{host}", 4000, SERVER, 53))
    assert next_hops(nat) <= before + 1


def test_sender_that_changes_its_mac_has_one_next_hop() -> None:
    nat = Nat()
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    before = next_hops(nat)
    for number_ in range(600):
        nat.now += 2_000_000
        mac = f"02:cc:00:00:{number_ >> 8:02x}:{number_ & 255:02x}"
        assert nat.send(udp(CLIENT, 4000, SERVER, 53), mac=mac).verdict == Verdict.FORWARD
    assert next_hops(nat) <= before + 1
    nat.core.delete(nat.sessions())
    assert next_hops(nat) <= before


def test_gateway_is_learned_by_arp_only() -> None:
    """A router may send from another MAC than the one that answers for its address (VRRP); so may an attacker."""
    routes = (
        RouteConfig(number("10.0.0.0"), 24, INSIDE),
        RouteConfig(number("198.51.100.0"), 24, OUTSIDE),
        RouteConfig(0, 0, OUTSIDE, number(GATEWAY)),
    )
    nat = Nat(routes=routes, filtering="endpoint-independent")
    assert nat.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.HELD
    (session,) = nat.sessions()
    to = str(Ether(frame(udp(CLIENT, 1, SERVER, 1)))[UDP].sport), int(session["external_port"])
    nat.send(udp("192.0.2.9", 99, "198.51.100.10", to[1]), OUTSIDE, STRANGER_MAC)
    assert nat.core.take() == []
    assert nat.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.HELD
    nat.raw(arp(OUTSIDE, 2, GATEWAY_MAC, GATEWAY, "198.51.100.1", OUR_MAC[1], OUR_MAC[1]), OUTSIDE)
    assert {Ether(result.frame).dst for result in nat.core.take()} == {GATEWAY_MAC}


def test_inside_source_from_outside_is_forged() -> None:
    nat = Nat(filtering="endpoint-independent")
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    assert nat.verdict(udp(OTHER_CLIENT, 5, out.src, out[UDP].sport), OUTSIDE) == "DROP_ADDRESS"
    assert len(nat.sessions()) == 1


@pytest.mark.parametrize("mac", ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"])
def test_group_sender_mac_is_nobody(mac: str) -> None:
    nat = Nat()
    for packet in (
        udp(CLIENT, 4000, SERVER, 53),
        echo(CLIENT, "10.0.0.1", 7),
        udp(CLIENT, 1, SERVER, 2, ttl=1),
    ):
        assert nat.send(packet, mac=mac).verdict == Verdict.DROP_ADDRESS
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    assert nat.send(udp(CLIENT, 4000, SERVER, 53), mac=mac).verdict == Verdict.DROP_ADDRESS


@pytest.mark.parametrize("source", ["10.0.0.255", "10.0.0.0", "198.51.100.255"])
def test_broadcast_source_gets_no_answer(source: str) -> None:
    """RFC 1812, 4.3.2.7."""
    nat = Nat()
    assert nat.verdict(echo(source, "10.0.0.1", 7)) == "DROP_ADDRESS"
    assert nat.verdict(udp(source, 7, SERVER, 7, ttl=1)) == "DROP_ADDRESS"


def test_error_about_a_hairpin_session_does_not_come_from_the_wire() -> None:
    nat = Nat(filtering="endpoint-independent")
    first, second = (nat.out(udp(host, 4000, SERVER, 53)) for host in (CLIENT, OTHER_CLIENT))
    nat.out(udp(OTHER_CLIENT, 4000, first.src, first[UDP].sport))
    quoted = udp(first.src, first[UDP].sport, second.src, second[UDP].sport)
    assert nat.verdict(icmp_error("192.0.2.1", first.src, quoted), OUTSIDE) == "DROP_ADDRESS"


@pytest.mark.parametrize("kind", [4, 5])
def test_redirect_and_source_quench_are_not_translated(kind: int) -> None:
    nat = Nat()
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    assert nat.verdict(icmp_error(SERVER, out.src, out, kind, 1), OUTSIDE) == "DROP_ICMP_TYPE"


def test_one_connection_cannot_use_up_the_event_ring() -> None:
    nat = Nat(event_ring=64)
    nat.out(tcp(CLIENT, 4000, SERVER, 80))
    (session,) = nat.sessions()
    back = SERVER, 80, "198.51.100.10", int(session["external_port"])
    back = (*back[:2], str(parse(nat.send(tcp(CLIENT, 4000, SERVER, 80)).frame).src), back[3])
    nat.back(tcp(*back, "SA"))
    nat.out(tcp(CLIENT, 4000, SERVER, 80, "A"))
    for _ in range(100):
        nat.back(tcp(*back, "R"))
        nat.out(tcp(CLIENT, 4000, SERVER, 80, "A"))
    assert nat.verdict(udp(OTHER_CLIENT, 4000, SERVER, 53)) == "FORWARD"


def test_clock_that_goes_back_ends_nothing() -> None:
    nat = Nat()
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.now -= 5_000_000
    nat.core.settle(nat.now)
    assert len(nat.sessions()) == 1


def test_hairpin_waits_for_both_commits() -> None:
    nat = Nat(filtering="endpoint-independent", synchronous=True)
    nat.send(udp(CLIENT, 4000, SERVER, 53))
    nat.core.commit(nat.sessions())
    (first,) = nat.core.take()
    target = parse(first.frame)
    assert nat.send(udp(OTHER_CLIENT, 4000, target.src, target[UDP].sport)).verdict == Verdict.HELD
    pending = [record for record in nat.sessions() if int(record["flags"]) & FLAG_PENDING]
    released = []
    while pending:
        assert released == []
        nat.core.commit(pending[0])
        released = nat.core.take()
        pending = [record for record in nat.sessions() if int(record["flags"]) & FLAG_PENDING]
    (result,) = released
    assert result.verdict == Verdict.FORWARD
    assert parse(result.frame).dst == CLIENT


def test_delete_says_when_the_event_ring_is_full() -> None:
    nat = Nat(event_ring=64)
    for port in range(40):
        nat.out(udp(CLIENT, 4000 + port, SERVER, 53))
    nat.core.events()
    for port in range(40):
        nat.out(udp(CLIENT, 5000 + port, SERVER, 53))
    with pytest.raises(BufferError, match="24 of 80 records are done"):
        nat.core.delete(nat.sessions())


def test_closing_while_others_ask() -> None:
    """A command of another thread comes before the end, or is refused."""
    for _ in range(20):
        core = Core(config())
        ends: list[str] = []

        def ask(core: Core = core, ends: list[str] = ends) -> None:
            try:
                while True:
                    core.sessions()
            except RuntimeError as error:
                ends.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        core.close()
        for thread in threads:
            thread.join(10)
        assert ends == ["this core is closed"] * 3


def test_arp_from_a_group_mac_teaches_nothing() -> None:
    nat = Nat()
    packet = arp(INSIDE, 2, "ff:ff:ff:ff:ff:ff", CLIENT, "10.0.0.1")
    assert nat.raw(packet).verdict != Verdict.CONSUMED
    assert ARP in Ether(packet)
