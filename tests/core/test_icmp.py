# SPDX-License-Identifier: Apache-2.0
"""ICMP errors of our own (RFC 1812), answers to pings, and errors of others (RFC 5508, section 4)."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Packet

from nat_fastpath.core_config import PortConfig
from nat_fastpath.engine import Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    SERVER,
    Nat,
    check_sums,
    echo,
    frame,
    host_mac,
    icmp_error,
    mac_bytes,
    number,
    parse,
    tcp,
    udp,
)

ROUTER = "192.0.2.33"
KINDS = ["udp", "udp without checksum", "tcp", "echo"]


def flow(kind: str) -> Packet:
    if kind == "tcp":
        return tcp(CLIENT, 4000, SERVER, 80)
    if kind == "echo":
        return echo(CLIENT, SERVER, 9)
    return udp(CLIENT, 4000, SERVER, 53, check=0 if "without" in kind else None)


def small_mtu(mtu: int = 1000) -> tuple[PortConfig, ...]:
    return tuple(
        PortConfig(side, mac_bytes(OUR_MAC[at]), number(OUR_ADDRESS[at]), mtu if at == OUTSIDE else 1500)
        for at, side in enumerate(("internal", "external"))
    )


@pytest.mark.parametrize("known", [False, True])
def test_time_exceeded_quotes_the_packet_as_it_came(known: bool) -> None:
    nat = Nat()
    if known:
        nat.out(udp(CLIENT, 4000, SERVER, 53))
    sent = parse(frame(udp(CLIENT, 4000, SERVER, 53, b"x" * 900, ttl=1)))
    result = nat.send(sent)
    assert (result.verdict, result.port) == (Verdict.REPLY, INSIDE)
    assert result.frame[:12] == mac_bytes(host_mac(CLIENT)) + mac_bytes(OUR_MAC[INSIDE])
    check_sums(result.frame)
    answer = parse(result.frame)
    assert (answer.src, answer.dst, answer.len) == (OUR_ADDRESS[INSIDE], CLIENT, 576)
    assert (answer[ICMP].type, answer[ICMP].code) == (11, 0)
    assert result.frame[42:] == bytes(sent)[:548]
    assert nat.counters()["sessions"] == int(known)


def test_time_exceeded_towards_the_outside() -> None:
    nat = Nat()
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    result = nat.send(udp(SERVER, 53, out.src, out[UDP].sport, ttl=1), OUTSIDE)
    answer = parse(result.frame)
    assert (result.port, answer.src, answer.dst) == (OUTSIDE, OUR_ADDRESS[OUTSIDE], SERVER)
    assert IP(bytes(answer[ICMP].payload)).dst == out.src, "the quotation shows nothing of the inside"


def test_too_big_tells_the_mtu() -> None:
    nat = Nat(ports=small_mtu())
    result = nat.send(udp(CLIENT, 4000, SERVER, 53, b"x" * 973, flags="DF"))
    answer = parse(result.frame)
    check_sums(result.frame)
    assert (answer[ICMP].type, answer[ICMP].code, answer[ICMP].nexthopmtu) == (3, 4, 1000)
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53, b"x" * 973)) == "FRAGMENT"
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53, b"x" * 972, flags="DF")) == "FORWARD"


def test_no_error_about_an_error_and_no_more_than_the_rate() -> None:
    nat = Nat(icmp_rate=3)
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    assert nat.verdict(icmp_error(SERVER, out.src, out, ttl=1), OUTSIDE) == "DROP_TTL"
    verdicts = [nat.verdict(udp(CLIENT, 4000, SERVER, 53, ttl=1)) for _ in range(5)]
    assert verdicts == ["REPLY"] * 3 + ["DROP_TTL"] * 2
    assert nat.counters()["icmp_errors_limited"] == 2
    nat.wait(1)
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53, ttl=1)) == "REPLY"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quote", [28, None])
def test_error_from_outside(kind: str, quote: int | None) -> None:
    """The host sees its own packet quoted, with every checksum that can be right, right."""
    nat = Nat()
    sent = parse(frame(flow(kind)))
    out = nat.out(sent)
    back = nat.back(icmp_error(ROUTER, out.src, out, 3, 4, quote))
    assert (back.src, back.dst) == (ROUTER, CLIENT)
    expected = IP(bytes(sent))
    expected.ttl = sent.ttl - 1
    del expected.chksum
    assert bytes(back[ICMP].payload) == bytes(expected)[:quote]
    assert nat.counters()["icmp_errors_translated"] == 1


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("quote", [28, None])
def test_error_from_inside(kind: str, quote: int | None) -> None:
    """The server sees what it sent quoted, and the host's external address as the sender, even a router's."""
    nat = Nat()
    out = nat.out(flow(kind))
    if kind == "tcp":
        answer = tcp(SERVER, 80, out.src, out[TCP].sport, "SA")
    else:
        answer = udp(SERVER, 53, out.src, out[UDP].sport, check=0 if "without" in kind else None)
    answer = parse(frame(answer, OUTSIDE))
    delivered = nat.back(answer)
    for source in (CLIENT, OTHER_CLIENT):
        error = nat.out(icmp_error(source, SERVER, delivered, 3, 3, quote))
        assert (error.src, error.dst) == (out.src, SERVER)
        expected = IP(bytes(answer))
        expected.ttl = answer.ttl - 1
        del expected.chksum
        assert bytes(error[ICMP].payload) == bytes(expected)[:quote]


def test_errors_that_are_not_translated() -> None:
    nat = Nat()
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    broken = bytearray(bytes(out))
    broken[8] ^= 1  # the quoted header checksum is wrong now
    cases: list[tuple[Packet, str]] = [
        (icmp_error(ROUTER, out.src, udp(out.src, out[UDP].sport, SERVER, 54)), "DROP_ICMP_NO_SESSION"),
        (icmp_error(ROUTER, "198.51.100.77", out), "DROP_NOT_POOL"),
        (icmp_error(ROUTER, out.src, out, quote=27), "DROP_ICMP_EMBEDDED"),
        (icmp_error(ROUTER, out.src, IP(bytes(broken))), "DROP_ICMP_EMBEDDED"),
        (icmp_error(ROUTER, out.src, udp(CLIENT, 4000, SERVER, 53)), "DROP_ICMP_EMBEDDED"),
    ]
    for packet, verdict in cases:
        assert nat.verdict(packet, OUTSIDE) == verdict
    data = bytearray(frame(icmp_error(ROUTER, out.src, out), OUTSIDE))
    data[-1] ^= 1
    assert nat.raw(bytes(data), OUTSIDE).verdict == Verdict.DROP_ICMP_CHECKSUM


def test_error_does_not_keep_the_session_alive() -> None:
    nat = Nat()
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.wait(299)
    nat.back(icmp_error(ROUTER, out.src, out))
    nat.wait(1)
    assert nat.counters()["sessions"] == 0


@pytest.mark.parametrize(
    ("source", "destination", "port"),
    [
        (CLIENT, OUR_ADDRESS[INSIDE], INSIDE),
        (CLIENT, OUR_ADDRESS[OUTSIDE], INSIDE),
        (CLIENT, "198.51.100.13", INSIDE),
        (SERVER, OUR_ADDRESS[OUTSIDE], OUTSIDE),
        (SERVER, "198.51.100.13", OUTSIDE),
    ],
)
def test_ping_to_our_addresses(source: str, destination: str, port: int) -> None:
    nat = Nat()
    result = nat.send(echo(source, destination, 7, payload=b"p" * 100), port)
    assert (result.verdict, result.port) == (Verdict.REPLY, port)
    check_sums(result.frame)
    answer: Any = parse(result.frame)
    assert (answer.src, answer.dst, answer[ICMP].type, answer[ICMP].id) == (destination, source, 0, 7)
    assert bytes(answer[ICMP].payload) == b"p" * 100
    assert nat.counters()["sessions"] == 0
