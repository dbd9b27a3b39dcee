# SPDX-License-Identifier: Apache-2.0
"""What the golden cases send. Each is a configuration and a list of (seconds since the last, port, frame).

A reply from outside must know the external port, so a case is a generator: it yields what it sends and is
given what came out. Ports are chosen from the configured seed, so every run sends the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from scapy.packet import Packet

from tests.packets import (
    CLIENT,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    OTHER_CLIENT,
    OTHER_SERVER,
    OUTSIDE,
    SERVER,
    arp,
    echo,
    fragments,
    frame,
    icmp_error,
    parse,
    retagged,
    tcp,
    udp,
)

Step = tuple[float, int, bytes]
Script = Generator[Step, bytes, None]  # yields a step, is sent the frame that came out, or b""
ROUTER = "192.0.2.33"


@dataclass(frozen=True)
class Case:
    """``config`` holds fields of CoreConfig that JSON can carry; ``pool`` as [first, last, port, port]."""

    script: Callable[[], Script]
    config: dict[str, Any]


CASES: dict[str, Case] = {}


def case(**config: Any) -> Callable[[Callable[[], Script]], Callable[[], Script]]:
    """Registers a script under its name, with these fields of the configuration."""

    def register(script: Callable[[], Script]) -> Callable[[], Script]:
        CASES[script.__name__.replace("_", "-")] = Case(script, config)
        return script

    return register


def inside(packet: Packet, wait: float = 0) -> Step:
    return wait, INSIDE, frame(packet, INSIDE)


def outside(packet: Packet, wait: float = 0) -> Step:
    return wait, OUTSIDE, frame(packet, OUTSIDE)


def tagged(step: Step, vlan: int, priority: int = 0) -> Step:
    wait, port, data = step
    return wait, port, retagged(data, vlan, priority)


@case()
def udp_exchange() -> Script:
    """A question and its answer, five hosts' ports; one datagram without checksum each way."""
    for at in range(5):
        out = yield inside(udp(CLIENT, 4000 + at, SERVER, 53, b"question %d" % at))
        external = parse(out)
        yield outside(udp(SERVER, 53, external.src, external.payload.sport, b"answer %d" % at))
    out = yield inside(udp(CLIENT, 4100, SERVER, 53, check=0))
    yield outside(udp(SERVER, 53, parse(out).src, parse(out).payload.sport, check=0))


@case()
def tcp_connection() -> Script:
    """Handshake, data, both FINs, and the same endpoints once more."""
    for _ in range(2):
        out = parse((yield inside(tcp(CLIENT, 4000, SERVER, 80, "S"))))
        back = SERVER, 80, out.src, out.payload.sport
        yield outside(tcp(*back, "SA"))
        yield inside(tcp(CLIENT, 4000, SERVER, 80, "A"))
        yield inside(tcp(CLIENT, 4000, SERVER, 80, "PA", b"GET / HTTP/1.0\r\n\r\n"))
        yield outside(tcp(*back, "PA", b"HTTP/1.0 200 OK\r\n\r\n"))
        yield outside(tcp(*back, "FA"))
        yield inside(tcp(CLIENT, 4000, SERVER, 80, "FA"))
        yield outside(tcp(*back, "A"))


@case()
def tcp_reset() -> Script:
    """A reset leaves the session its transitory time; what comes in it shows that the reset was forged."""
    out = parse((yield inside(tcp(CLIENT, 4000, SERVER, 80, "S"))))
    back = SERVER, 80, out.src, out.payload.sport
    yield outside(tcp(*back, "SA"))
    yield inside(tcp(CLIENT, 4000, SERVER, 80, "A"))
    yield outside(tcp(*back, "R"))
    yield outside(tcp(*back, "A"), 239)
    yield outside(tcp(*back, "A"), 7000)
    yield outside(tcp(*back, "R"))
    yield outside(tcp(*back, "A"), 240)


@case()
def tcp_not_syn() -> Script:
    """What begins in the middle opens nothing, from either side."""
    for flags in ("A", "SA", "FA", "R", "PA", "FS"):
        yield inside(tcp(CLIENT, 4000, SERVER, 80, flags))
        yield outside(tcp(SERVER, 80, "198.51.100.10", 4000, flags))


@case()
def ping() -> Script:
    """Two hosts with one identifier get two; an answer nobody asked for goes nowhere."""
    for host in (CLIENT, OTHER_CLIENT):
        out = parse((yield inside(echo(host, SERVER, 77))))
        yield outside(echo(SERVER, out.src, out.payload.id, reply=True))
        yield outside(echo(OTHER_SERVER, out.src, out.payload.id, reply=True))


@case()
def ping_ourselves() -> Script:
    """Our own and pool addresses answer."""
    yield inside(echo(CLIENT, "10.0.0.1", 5))
    yield inside(echo(CLIENT, "198.51.100.11", 5))
    yield outside(echo(SERVER, "198.51.100.1", 5))
    yield outside(echo(SERVER, "198.51.100.12", 5))
    yield outside(udp(SERVER, 9, "198.51.100.1", 9))


@case()
def traceroute() -> Script:
    """Time exceeded by us, then by a router behind us, then port unreachable by the server."""
    yield inside(udp(CLIENT, 4000, SERVER, 33434, ttl=1))
    for ttl, sender, kind, code in ((2, ROUTER, 11, 0), (3, SERVER, 3, 3)):
        out = parse((yield inside(udp(CLIENT, 4000, SERVER, 33433 + ttl, ttl=ttl))))
        yield outside(icmp_error(sender, out.src, out, kind, code))
    yield outside(icmp_error(ROUTER, "198.51.100.10", udp("198.51.100.10", 9, SERVER, 9)))


@case()
def errors_quoting_all() -> Script:
    """Errors about TCP, UDP and ICMP, whole and cut to eight bytes, from outside and from inside."""
    for packet in (
        tcp(CLIENT, 4000, SERVER, 80),
        udp(CLIENT, 4000, SERVER, 53),
        udp(CLIENT, 4001, SERVER, 53, check=0),
        echo(CLIENT, SERVER, 9),
    ):
        out = parse((yield inside(packet)))
        for quote in (28, None):
            yield outside(icmp_error(ROUTER, out.src, out, 3, 4, quote))
        if "UDP" in packet:
            reply = parse((yield outside(udp(SERVER, 53, out.src, out.payload.sport))))
            yield inside(icmp_error(CLIENT, SERVER, reply, 3, 3))


@case(filtering="endpoint-independent")
def full_cone() -> Script:
    """Endpoint-independent filtering: who knows the mapping may use it."""
    out = parse((yield inside(udp(CLIENT, 4000, SERVER, 53))))
    yield outside(udp(OTHER_SERVER, 1234, out.src, out.payload.sport))
    yield inside(udp(CLIENT, 4000, OTHER_SERVER, 1234))
    yield outside(udp(SERVER, 53, out.src, (out.payload.sport - 1023) % 64512 + 1024))


@case(filtering="address-dependent")
def restricted_cone() -> Script:
    """Address-dependent filtering: any port of a remote that was sent to."""
    out = parse((yield inside(udp(CLIENT, 4000, SERVER, 53))))
    yield outside(udp(SERVER, 1234, out.src, out.payload.sport))
    yield outside(udp(OTHER_SERVER, 53, out.src, out.payload.sport))


@case()
def strangers() -> Script:
    """Address-and-port-dependent filtering, and who knocks at doors that do not exist."""
    out = parse((yield inside(udp(CLIENT, 4000, SERVER, 53))))
    yield outside(udp(SERVER, 54, out.src, out.payload.sport))
    yield outside(udp(OTHER_SERVER, 53, out.src, out.payload.sport))
    yield outside(tcp(SERVER, 53, out.src, out.payload.sport))
    yield outside(udp(SERVER, 53, "198.51.100.77", 4000))


@case(mapping="endpoint-dependent")
def symmetric() -> Script:
    """Endpoint-dependent mapping: one endpoint, three remotes, three external ports."""
    for server, port in ((SERVER, 53), (SERVER, 80), (OTHER_SERVER, 53)):
        out = parse((yield inside(udp(CLIENT, 4000, server, port))))
        yield outside(udp(server, port, out.src, out.payload.sport))


@case(filtering="endpoint-independent")
def hairpin() -> Script:
    """Two inside hosts by their external endpoints, there and back, and an error about it."""
    out = parse((yield inside(udp(CLIENT, 4000, SERVER, 53))))
    there = parse((yield inside(udp(OTHER_CLIENT, 5000, out.src, out.payload.sport))))
    yield inside(udp(CLIENT, 4000, there.src, there.payload.sport))
    yield inside(icmp_error(CLIENT, there.src, there))


@case(pool=["198.51.100.10", "198.51.100.10", 2000, 2003], udp_timeout=30)
def exhausted() -> Script:
    """Four ports, six hosts' flows: two are refused, four go on, and time gives a port back."""
    for at in range(6):
        yield inside(udp(CLIENT, 4000 + at, SERVER, 53))
    for at in range(3):
        yield inside(udp(CLIENT, 4000 + at, SERVER, 53), 10)
    yield inside(udp(CLIENT, 4000, SERVER, 53), 15)
    yield inside(udp(OTHER_CLIENT, 4000, SERVER, 53))


@case(max_sessions=3, sessions_per_host=2)
def limits() -> Script:
    """A host's quota, then the table's end."""
    for at in range(4):
        yield inside(tcp(CLIENT, 4000 + at, SERVER, 80))
    for at in range(2):
        yield inside(tcp(OTHER_CLIENT, 4000 + at, SERVER, 80))


@case()
def timeouts() -> Script:
    """Each kind lives to the last second of its time, and no longer."""
    openings = udp(CLIENT, 4000, SERVER, 53), echo(CLIENT, SERVER, 7), tcp(CLIENT, 4000, SERVER, 80)
    for packet, wait in zip(openings, (300, 60, 240), strict=True):
        out = parse((yield inside(packet)))
        if out.proto == 1:
            answer = echo(SERVER, out.src, out.payload.id, reply=True)
        elif out.proto == 17:
            answer = udp(SERVER, 53, out.src, out.payload.sport)
        else:
            answer = tcp(SERVER, 80, out.src, out.payload.sport, "SA")
        yield outside(answer, wait - 1)
        yield outside(answer, wait)


@case()
def arp_answers() -> Script:
    """ARP for our own and for pool addresses; not for anybody else's."""
    yield 0, INSIDE, arp(INSIDE, 1, "02:00:0a:00:00:05", CLIENT, "10.0.0.1")
    yield 0, OUTSIDE, arp(OUTSIDE, 1, GATEWAY_MAC, GATEWAY, "198.51.100.1")
    yield 0, OUTSIDE, arp(OUTSIDE, 1, GATEWAY_MAC, GATEWAY, "198.51.100.12")
    yield 0, OUTSIDE, arp(OUTSIDE, 1, GATEWAY_MAC, "0.0.0.0", "198.51.100.12")
    yield 0, INSIDE, arp(INSIDE, 1, "02:00:0a:00:00:05", CLIENT, "198.51.100.12")
    yield 0, OUTSIDE, arp(OUTSIDE, 1, "02:00:00:00:09:09", "198.51.100.66", "198.51.100.99")


LONG = bytes(range(256)) * 16


@case()
def fragments_in_order() -> Script:
    """A question in three fragments, and its answer; TCP and ICMP likewise. Each opens its session."""
    for at, packet in enumerate(
        (
            udp(CLIENT, 4000, SERVER, 53, LONG),
            tcp(CLIENT, 4000, SERVER, 80, "S", LONG),
            echo(CLIENT, SERVER, 9, payload=LONG),
        )
    ):
        packet.id = 100 + at
        first, *others = fragments(packet, 1480)
        out = parse((yield inside(first)))
        for part in others:
            yield inside(part)
        if at == 0:
            for part in fragments(udp(SERVER, 53, out.src, out.payload.sport, LONG[::-1], id=200), 1480):
                yield outside(part)


@case()
def fragments_out_of_order() -> Script:
    """The last one first, both ways: it waits, and leaves behind the first. One without a first ages out."""
    for part in fragments(udp(CLIENT, 4000, SERVER, 53, LONG, id=100), 1480)[::-1]:
        out = yield inside(part)
    external = parse(out)
    answer = fragments(udp(SERVER, 53, external.src, external.payload.sport, LONG[::-1], id=200), 1480)
    for at in (1, 0, 2):
        yield outside(answer[at])
    yield outside(fragments(udp(SERVER, 53, "198.51.100.10", 99, LONG, id=201), 1480)[1])
    yield inside(udp(CLIENT, 4000, SERVER, 53), 3)


@case(filtering="endpoint-independent")
def fragments_hairpin() -> Script:
    """Between two inside hosts, in order and not."""
    out = parse((yield inside(udp(CLIENT, 4000, SERVER, 53))))
    for ident, order in ((100, (0, 1, 2)), (101, (2, 0, 1))):
        parts = fragments(udp(OTHER_CLIENT, 5000, out.src, out.payload.sport, LONG, id=ident), 1480)
        for at in order:
            yield inside(parts[at])


@case(external_mtu=1000)
def too_big() -> Script:
    """Longer than the outgoing MTU: cut, be it whole or a fragment already."""
    yield inside(udp(CLIENT, 4000, SERVER, 53, LONG[:1400], id=100))
    for part in fragments(udp(CLIENT, 4000, SERVER, 53, LONG, id=101), 1480):
        yield inside(part)


@case()
def fragments_refused() -> Script:
    """RFC 1858: a header that is cut or written over; and what may not begin anything."""
    parts = fragments(tcp(CLIENT, 4000, SERVER, 80, "S", LONG), 16)
    yield inside(parts[0])
    yield inside(parts[1])
    yield inside(fragments(tcp(CLIENT, 4000, SERVER, 80, "A", LONG), 1480)[0])
    yield outside(fragments(udp(SERVER, 53, "198.51.100.10", 4000, LONG), 1480)[0])
    yield inside(fragments(echo(CLIENT, "10.0.0.1", 7, payload=LONG), 1480)[0])


def between_vlans(near: int, far: int) -> Script:
    """All ways of a packet with these VLANs inside and outside, and other tags than those."""
    for packet in (udp(CLIENT, 4000, SERVER, 53), tcp(CLIENT, 4000, SERVER, 80), echo(CLIENT, SERVER, 7)):
        for priority in (0, 5):
            out = parse((yield tagged(inside(packet), near, priority)))
        external = out.src, out.payload.id if packet.proto == 1 else out.payload.sport
        if packet.proto == 1:
            back = echo(SERVER, *external, reply=True)
        elif packet.proto == 6:
            back = tcp(SERVER, 80, *external, "SA")
        else:
            back = udp(SERVER, 53, *external)
            mapped = external
        for _ in range(2):
            yield tagged(outside(back), far)
    yield tagged(inside(udp(CLIENT, 5000, *mapped)), near)
    yield tagged(inside(udp(CLIENT, 4000, SERVER, 53, ttl=1)), near)
    yield tagged(inside(udp(CLIENT, 4000, SERVER, 53, LONG[:1400], id=100)), near)
    for part in fragments(udp(CLIENT, 4000, SERVER, 53, LONG, id=101), 1480):
        yield tagged(inside(part), near)
    yield tagged(inside(echo(CLIENT, "10.0.0.1", 5)), near)
    yield tagged(outside(icmp_error(ROUTER, mapped[0], udp(*mapped, SERVER, 53), 11, 0)), far)
    yield tagged((0, OUTSIDE, arp(OUTSIDE, 1, GATEWAY_MAC, GATEWAY, "198.51.100.10")), far)
    for step, vlan in (
        (inside(udp(CLIENT, 4000, SERVER, 53)), near),
        (outside(udp(SERVER, 53, *mapped)), far),
    ):
        for other in {0, 10, 20, 99} - {vlan}:
            yield tagged(step, other)


@case(vlans=[10, 20], external_mtu=1000, filtering="endpoint-independent")
def vlans() -> Script:
    """VLAN 10 inside, 20 outside."""
    yield from between_vlans(10, 20)


@case(vlans=[10, 0], external_mtu=1000, filtering="endpoint-independent")
def vlan_inside() -> Script:
    """VLAN 10 inside, none outside: the tag is taken away, and put on what comes back."""
    yield from between_vlans(10, 0)
