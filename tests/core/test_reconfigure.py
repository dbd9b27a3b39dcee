# SPDX-License-Identifier: Apache-2.0
"""Another configuration for a core that runs: in force at once, whole or not at all, and sessions survive."""

from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.l2 import ARP, Ether

from nat_fastpath.core_config import NeighbourConfig, PoolRange, PortConfig, RouteConfig
from nat_fastpath.engine import CoreError, Verdict
from tests.packets import (
    CLIENT,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    OTHER_CLIENT,
    OTHER_SERVER,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    POOL,
    SERVER,
    Nat,
    arp,
    host_mac,
    mac_bytes,
    number,
    small_pool,
    text,
    udp,
)

NEW_GATEWAY, NEW_MAC = "198.51.100.253", "02:00:00:00:01:fd"
ROUTER, ROUTER_MAC = "10.0.0.20", host_mac("10.0.0.20")
BEHIND = "10.1.0.5"  # an inside host behind a router


def reconfigure(nat: Nat, **changes: Any) -> None:
    change = nat.core.prepare(replace(nat.core.config, **changes))
    change.apply()
    change.reroute()


def next_hop(nat: Nat, packet: Any, port: int = INSIDE, mac: str | None = None) -> str:
    result = nat.send(packet, port, mac)
    assert result.verdict == Verdict.FORWARD
    return str(Ether(result.frame).dst)


def through(gateway: str, mac: str | None, *more: RouteConfig) -> tuple[RouteConfig, ...]:
    """The usual routes, with this default gateway outside."""
    return (
        RouteConfig(number("10.0.0.0"), 24, INSIDE),
        RouteConfig(number("198.51.100.0"), 24, OUTSIDE),
        RouteConfig(0, 0, OUTSIDE, number(gateway), mac_bytes(mac) if mac else None),
        *more,
    )


def test_a_timeout_holds_for_sessions_that_exist() -> None:
    nat = Nat()
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    reconfigure(nat, udp_timeout=10)
    assert nat.sessions()["timeout_ms"].tolist() == [10_000]
    nat.wait(11)
    assert not len(nat.sessions())


def test_limits_and_filtering() -> None:
    nat = Nat()
    sent = nat.out(udp(CLIENT, 4000, SERVER, 53))
    stranger = udp(OTHER_SERVER, 9, sent.src, sent.sport)
    assert nat.verdict(stranger, OUTSIDE) == "DROP_FILTERED"
    reconfigure(nat, filtering="endpoint-independent", sessions_per_host=2, new_sessions_rate=20)
    assert nat.verdict(stranger, OUTSIDE) == "FORWARD"
    assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "DROP_QUOTA"
    assert [nat.verdict(udp(OTHER_CLIENT, 4000 + i, SERVER, 53)) for i in range(2)] == [
        "FORWARD",
        "DROP_BUDGET",
    ]
    reconfigure(nat, filtering="address-and-port-dependent", sessions_per_host=0, new_sessions_rate=0)
    assert nat.verdict(stranger, OUTSIDE) == "FORWARD", "it has a session by now"
    assert nat.verdict(udp(OTHER_SERVER, 10, sent.src, sent.sport), OUTSIDE) == "DROP_FILTERED"
    assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "FORWARD"


def test_an_mtu() -> None:
    nat = Nat()
    big = udp(CLIENT, 4000, SERVER, 53, bytes(1200), flags="DF")
    nat.out(big)
    internal, external = nat.core.config.ports
    reconfigure(nat, ports=(internal, replace(external, mtu=1000)))
    assert nat.verdict(big) == "REPLY"


def test_sessions_follow_to_another_gateway() -> None:
    nat = Nat()
    flow = udp(CLIENT, 4000, SERVER, 53)
    assert next_hop(nat, flow) == GATEWAY_MAC
    reconfigure(nat, routes=through(NEW_GATEWAY, NEW_MAC))
    assert next_hop(nat, flow) == NEW_MAC
    hops = {text(hop["address"]): int(hop["sessions"]) for hop in nat.core.neighbours()}
    assert (hops[GATEWAY], hops[NEW_GATEWAY]) == (0, 1)
    # nobody needs the old one any more: it is neither kept nor asked for
    nat.pump(100, 0.5)
    assert GATEWAY not in {text(hop["address"]) for hop in nat.core.neighbours()}


def test_a_gateway_without_a_mac_is_asked_for_and_packets_wait() -> None:
    nat = Nat()
    flow = udp(CLIENT, 4000, SERVER, 53)
    nat.out(flow)
    reconfigure(nat, routes=through(NEW_GATEWAY, None))
    assert nat.verdict(flow) == "HELD"
    nat.resolve(NEW_GATEWAY, OUTSIDE, NEW_MAC)
    assert [Ether(result.frame).dst for result in nat.core.take()] == [NEW_MAC]


def test_a_gateway_gets_another_mac_and_what_waited_leaves() -> None:
    nat = Nat(routes=through(GATEWAY, None))
    flow = udp(CLIENT, 4000, SERVER, 53)
    assert nat.verdict(flow) == "HELD"
    reconfigure(nat, routes=through(GATEWAY, NEW_MAC))
    assert [Ether(result.frame).dst for result in nat.core.take()] == [NEW_MAC]
    assert next_hop(nat, flow) == NEW_MAC
    # without a MAC in the configuration the known one stays, and is asked for when it is due
    reconfigure(nat, routes=through(GATEWAY, None))
    assert next_hop(nat, flow) == NEW_MAC
    nat.pump(31)
    assert GATEWAY in [Ether(data)[ARP].pdst for _, data in nat.core.outbox()]
    assert nat.raw(arp(OUTSIDE, 2, GATEWAY_MAC, GATEWAY, OUR_ADDRESS[1]), OUTSIDE).verdict == Verdict.CONSUMED
    assert next_hop(nat, flow) == GATEWAY_MAC


def test_a_more_specific_route_comes_and_goes() -> None:
    nat = Nat()
    flow, other = udp(CLIENT, 4000, SERVER, 53), udp(CLIENT, 4000, "192.0.2.1", 53)
    assert (next_hop(nat, flow), next_hop(nat, other)) == (GATEWAY_MAC, GATEWAY_MAC)
    specific = RouteConfig(number("203.0.113.0"), 24, OUTSIDE, number(NEW_GATEWAY), mac_bytes(NEW_MAC))
    reconfigure(nat, routes=through(GATEWAY, GATEWAY_MAC, specific))
    assert (next_hop(nat, flow), next_hop(nat, other)) == (NEW_MAC, GATEWAY_MAC)
    reconfigure(nat, routes=through(GATEWAY, GATEWAY_MAC))
    assert (next_hop(nat, flow), next_hop(nat, other)) == (GATEWAY_MAC, GATEWAY_MAC)
    # without a route existing sessions go on where they went, and there are no new ones
    reconfigure(nat, routes=through(GATEWAY, GATEWAY_MAC)[:2])
    assert next_hop(nat, flow) == GATEWAY_MAC
    assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "DROP_NO_ROUTE"


def test_answers_follow_an_inside_route_but_not_those_to_another_sender() -> None:
    def inside(router: str) -> tuple[RouteConfig, ...]:
        return through(GATEWAY, GATEWAY_MAC, RouteConfig(number("10.1.0.0"), 24, INSIDE, number(router)))

    nat = Nat(routes=inside(ROUTER))
    by_router = nat.forward(udp(BEHIND, 4000, SERVER, 53), mac=ROUTER_MAC)
    by_another = nat.forward(udp("10.1.0.6", 4000, SERVER, 53), mac="02:00:00:00:00:77")
    answers = [udp(SERVER, 53, sent.src, sent.sport) for sent in (by_router, by_another)]
    assert [next_hop(nat, answer, OUTSIDE) for answer in answers] == [ROUTER_MAC, "02:00:00:00:00:77"]
    nat.core.events()
    reconfigure(nat, routes=inside("10.0.0.21"))
    assert [next_hop(nat, answer, OUTSIDE) for answer in answers] == [
        host_mac("10.0.0.21"),
        "02:00:00:00:00:77",
    ]
    assert nat.core.events()["internal_addr"].tolist() == [number(BEHIND)], "the peer hears of it"


def test_static_neighbours_come_and_go() -> None:
    nat = Nat()
    flow = udp(CLIENT, 4000, "198.51.100.50", 53)
    assert nat.verdict(flow) == "HELD"
    neighbour = NeighbourConfig(number("198.51.100.50"), OUTSIDE, mac_bytes(NEW_MAC))
    before = nat.core.config.neighbours
    reconfigure(nat, neighbours=(*before, neighbour))
    assert [Ether(result.frame).dst for result in nat.core.take()] == [NEW_MAC]
    spoof = arp(OUTSIDE, 2, "02:00:00:00:00:99", "198.51.100.50", OUR_ADDRESS[1])
    nat.raw(spoof, OUTSIDE)
    assert next_hop(nat, flow) == NEW_MAC
    reconfigure(nat, neighbours=before)
    assert next_hop(nat, flow) == NEW_MAC, "no packet is lost"
    nat.raw(spoof, OUTSIDE)
    assert next_hop(nat, flow) == "02:00:00:00:00:99", "but ARP decides again"


def test_a_static_neighbour_that_was_wrong_is_soon_asked_for() -> None:
    nat = Nat()
    flow = udp(CLIENT, 4000, "198.51.100.50", 53)
    before = nat.core.config.neighbours
    reconfigure(
        nat, neighbours=(*before, NeighbourConfig(number("198.51.100.50"), OUTSIDE, mac_bytes(NEW_MAC)))
    )
    nat.out(flow)
    reconfigure(nat, neighbours=before)
    nat.pump(6)  # first at that MAC, then by broadcast
    asked = [Ether(data) for port, data in nat.core.outbox() if port == OUTSIDE]
    assert "ff:ff:ff:ff:ff:ff" in {one.dst for one in asked if one[ARP].pdst == "198.51.100.50"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mapping": "endpoint-dependent"}, "the mapping cannot be changed"),
        ({"filtering": "address-dependent"}, "the filtering, other than"),
        ({"flow_hash": "aes"}, "the flow hash"),
        ({"max_sessions": 2048}, "the sizes of tables"),
        ({"max_held": 7}, "the sizes of tables"),
        ({"synchronous": True}, "instance and synchronous mode"),
        ({"n_slices": 2}, "slices"),
        (
            {"ports": (PortConfig("internal", mac_bytes(OUR_MAC[0]), 1), PortConfig("external", bytes(6)))},
            "ports",
        ),
        ({"neighbours": (NeighbourConfig(1, 0, bytes(6)),) * 2}, "stands twice"),
        ({"neighbours": (NeighbourConfig(1, 5, bytes(6)),)}, "no port that exists"),
        ({"routes": (RouteConfig(0, 33, INSIDE),)}, "length of up to 32"),
        ({"pool": ()}, "1 to 64 pool ranges"),
    ],
)
def test_what_cannot_be_changed_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    nat = Nat()
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    before = nat.core.config
    with pytest.raises(CoreError, match=message):
        nat.core.prepare(replace(before, **{"udp_timeout": 1, **changes}))
    assert nat.core.config is before
    assert nat.sessions()["timeout_ms"].tolist() == [300_000]


def test_without_room_for_its_next_hops_nothing_changes() -> None:
    nat = Nat(max_neighbours=44)  # 42 hosts and the gateway
    flow = udp(CLIENT, 4000, SERVER, 53)
    nat.out(flow)
    hosts = nat.core.config.neighbours
    more = tuple(NeighbourConfig(number(f"10.0.0.{i}"), INSIDE, mac_bytes(NEW_MAC)) for i in (90, 91))
    change = nat.core.prepare(replace(nat.core.config, udp_timeout=1, neighbours=hosts + more))
    with pytest.raises(CoreError, match="no room in max_neighbours"):
        change.apply()
    with pytest.raises(RuntimeError, match="already"):
        change.apply()
    assert nat.sessions()["timeout_ms"].tolist() == [300_000]
    assert next_hop(nat, flow) == GATEWAY_MAC
    nat.pump(70, 0.5)
    assert nat.counters()["neighbours"] == 43
    reconfigure(nat, udp_timeout=1, neighbours=hosts + more[:1])
    assert nat.sessions()["timeout_ms"].tolist() == [1000]


def test_a_change_may_be_left_and_outlive_its_core() -> None:
    nat = Nat()
    change = nat.core.prepare(replace(nat.core.config, udp_timeout=1))
    nat.core.close()
    with pytest.raises(RuntimeError, match="closed"):
        change.apply()


# -- the pool -------------------------------------------------------------------------------------------------

FIRST, SECOND = (PoolRange(number(POOL[0]) + i, number(POOL[0]) + i, (2000, 2007)) for i in range(2))


def drained(part: PoolRange) -> PoolRange:
    return replace(part, own=(1, 0))


def test_addresses_come_and_are_announced() -> None:
    nat = Nat(pool=(FIRST,))
    asked = arp(OUTSIDE, 1, GATEWAY_MAC, GATEWAY, text(int(SECOND.first)))
    assert nat.raw(asked, OUTSIDE).verdict == Verdict.CONSUMED
    for i in range(8):
        nat.out(udp(CLIENT, 4000 + i, SERVER, 53))
    assert nat.verdict(udp(CLIENT, 4008, SERVER, 53)) == "DROP_NO_PORT"
    nat.core.outbox()
    reconfigure(nat, pool=(FIRST, SECOND))
    nat.pump(0.1)
    told = [Ether(data)[ARP] for port, data in nat.core.outbox() if port == OUTSIDE]
    assert text(int(SECOND.first)) in [one.psrc for one in told if one.psrc == one.pdst]
    assert nat.raw(asked, OUTSIDE).verdict == Verdict.REPLY
    assert nat.out(udp(CLIENT, 4008, SERVER, 53)).src == text(int(SECOND.first))
    assert len(nat.sessions()) == 9


def test_an_address_with_mappings_does_not_go_and_a_drained_one_does() -> None:
    nat = Nat(pool=(FIRST, SECOND))
    flow = udp(CLIENT, 4000, SERVER, 53)
    sent = nat.out(flow)
    home, other = (FIRST, SECOND) if sent.src == text(int(FIRST.first)) else (SECOND, FIRST)
    assert nat.core.mappings_on(int(home.first)) == 1
    with pytest.raises(CoreError, match="address that leaves the pool has mappings"):
        reconfigure(nat, pool=(other,), udp_timeout=1)
    assert nat.sessions()["timeout_ms"].tolist() == [300_000]
    reconfigure(nat, pool=tuple(sorted((other, drained(home)), key=lambda part: int(part.first))))
    # what lives there goes on, both ways, and nothing new comes
    assert nat.out(flow).sport == sent.sport
    nat.back(udp(SERVER, 53, sent.src, sent.sport))
    assert {nat.out(udp(CLIENT, 4001 + i, SERVER, 53)).src for i in range(8)} == {text(int(other.first))}
    assert nat.verdict(udp(CLIENT, 4010, SERVER, 53)) == "DROP_NO_PORT"
    nat.core.delete(nat.sessions())
    assert nat.core.mappings_on(int(home.first)) == 0
    reconfigure(nat, pool=(other,))
    assert nat.verdict(udp(SERVER, 53, sent.src, sent.sport), OUTSIDE) == "DROP_NOT_POOL"
    assert nat.core.mappings_on(int(home.first)) == 0
    # and it may come back
    reconfigure(nat, pool=(FIRST, SECOND), quarantine=0)
    assert nat.verdict(udp(SERVER, 53, sent.src, sent.sport), OUTSIDE) == "DROP_NO_MAPPING"


def test_ports_preferences_and_quarantine_of_the_pool() -> None:
    nat = Nat(pool=small_pool(64))
    before = nat.out(udp(CLIENT, 4000, SERVER, 53)).sport
    reconfigure(nat, pool=(PoolRange(number(POOL[0]), number(POOL[0]), (2000, 5000), (4500, 4600)),),
                port_preservation=True, quarantine=100)  # fmt: skip
    assert nat.out(udp(CLIENT, 4000, SERVER, 53)).sport == before
    assert nat.out(udp(CLIENT, 4555, SERVER, 53)).sport == 4555
    assert 4500 <= nat.out(udp(CLIENT, 9999, SERVER, 53)).sport <= 4600
    nat.core.delete(nat.sessions())
    assert nat.counters()["ports_resting"] == 2
    reconfigure(nat, port_preservation=False, port_parity=True)
    assert all(nat.out(udp(CLIENT, 5001 + 2 * i, SERVER, 53)).sport % 2 for i in range(10))


def test_an_address_that_comes_back_finds_its_ports_at_rest() -> None:
    both = tuple(PoolRange(number(address), number(address), (4096, 4096)) for address in POOL[:2])
    nat = Nat(pool=both, quarantine=120)
    for client in (CLIENT, OTHER_CLIENT):
        nat.out(udp(client, 4000, SERVER, 53))
    nat.core.delete(nat.sessions())
    assert nat.counters()["ports_resting"] == 2
    for others in (small_pool(1), both[1:]):
        reconfigure(nat, pool=others)
        reconfigure(nat, pool=both)
        assert nat.verdict(udp(CLIENT, 4001, SERVER, 53)) == "DROP_NO_PORT", "both rest still"
    nat.wait(121)
    assert nat.counters()["ports_resting"] == 0
    verdicts = [nat.verdict(udp(CLIENT, 4002 + i, SERVER, 53)) for i in range(3)]
    assert verdicts == ["FORWARD", "FORWARD", "DROP_NO_PORT"]
