# SPDX-License-Identifier: Apache-2.0
"""What the tests of several workers run in a process of its own: see dpdk_process.py."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.l2 import ARP, Ether

from nat_fastpath.core_config import CoreConfig
from nat_fastpath.dpdk import Eal, Mempool, Port, Worker, Workers
from nat_fastpath.engine import VERDICT_NAMES, Core, Verdict
from tests.dpdk.dpdk_process import main
from tests.dpdk.wire import Veth, Wire, load, until
from tests.packets import (
    CLIENT,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    MARK,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    POOL,
    SERVER,
    arp,
    check_sums,
    config,
    echo,
    external,
    fragments,
    frame,
    host_mac,
    icmp_error,
    internal,
    marked,
    number,
    parse,
    retagged,
    sum_words,
    tagged_ports,
    tcp,
    together,
    udp,
    vlan,
)
from tests.spread import host_slice, port_slice

CLIENTS = [f"10.0.0.{i}" for i in range(20, 40)]
VLANS = {"vlan": (10, 20)}
SIDES = ("internal", "external")


class Net:
    """``n`` workers between two wires; or on one, that both sides share by VLANs or by DSCP."""

    def __init__(self, library: str, how: str, n: int, idle: str = "adaptive", **changes: Any) -> None:
        Eal(memory_mb=160)
        self.pool, wire = Mempool("buffers", 32768), load(library)
        queues = n if how == "rss" else 1
        self.vlans = VLANS.get(how, (0, 0))
        self.marks = how == "dscp"
        if how in ("vlan", "dscp"):
            changes.setdefault("ports", tagged_ports(*self.vlans))
            both = Wire(wire, self.pool, "both", 1, n, None)
            self.wires = [both, both]
        elif how.startswith("af_"):
            self.wires = [Veth(self.pool, n, side, how, Path(library).parent) for side in SIDES]
        else:
            self.wires = [Wire(wire, self.pool, side[:2], queues, n, side) for side in SIDES]
        made: CoreConfig = config(**{"filtering": "endpoint-independent", "max_sessions": 4096, **changes})
        self.cores = [Core(replace(made, n_slices=n, slice=i) if n > 1 else made) for i in range(n)]
        self.n, self.ports = n, [wire.port for wire in self.wires]
        # a device that is closed gives back what it had taken to receive into
        self.in_use = 0 if how.startswith("af_") else self.pool.in_use
        inside = IPv4Network("10.0.0.0/24") if self.marks else None
        self.workers = Workers(self.cores, self.ports, self.pool, idle=idle, inside=inside)
        self.workers.start()

    def send(self, side: int, frames: list[bytes]) -> None:
        tagged = [retagged(one, self.vlans[side]) for one in frames]
        self.wires[side].send([marked(one, side == INSIDE) for one in tagged] if self.marks else tagged)

    def await_frames(self, side: int, n: int) -> list[bytes]:
        frames = self.wires[side].await_frames(n, self.vlans[side])
        if self.marks:
            assert all(one[15] & MARK == (MARK if side == INSIDE else 0) for one in frames)
            assert all(sum_words(one[14:34]) == 0xFFFF for one in frames)
        return [marked(one, inside=False) for one in frames] if self.marks else frames

    def total(self, name: str) -> int:
        return int(sum(stats[name] for stats in self.workers.stats()))

    def sessions(self) -> list[tuple[int, Any]]:
        return [(i, record) for i, core in enumerate(self.cores) for record in core.sessions()[0]]

    def close(self) -> int:
        """Buffers that are lost."""
        self.workers.stop()
        for wire in {id(wire): wire for wire in self.wires}.values():
            wire.drain()
        return self.pool.in_use - self.in_use


@cache
def flows() -> list[bytes]:
    makers = (lambda *ends: udp(*ends), lambda *ends: tcp(*ends))
    return [
        frame(make(client, 4000 + i, SERVER, 53)) for i in range(4) for client in CLIENTS for make in makers
    ]


def exchange(net: Net, rounds: int) -> None:
    """New flows, their answers, and packets of both directions; each is translated as one core would."""
    opening = flows()
    for _ in range(rounds):
        net.send(INSIDE, opening)
        out = net.await_frames(OUTSIDE, len(opening))
        assert len(out) == len(opening)
        by_session = {}
        for data in out:
            check_sums(data)
            packet = parse(data)
            by_session[packet.proto, packet.src, packet.payload.sport] = packet
        assert len(by_session) == len(opening), "an external endpoint twice"
        answers = [
            frame(
                (udp if UDP in packet else tcp)(
                    SERVER, 53, packet.src, packet.payload.sport, **({} if UDP in packet else {"flags": "SA"})
                ),
                OUTSIDE,
            )
            for packet in by_session.values()
        ]
        net.send(OUTSIDE, answers)
        back = net.await_frames(INSIDE, len(answers))
        ends = sorted((p.proto, p.dst, p.payload.dport) for p in map(parse, back))
        sent = sorted((p.proto, p.src, p.payload.sport) for p in map(parse, opening))
        assert ends == sent, "to whom they were sent"
        opening = [data if UDP in parse(data) else frame(replaced(data)) for data in opening]


def replaced(data: bytes) -> Any:
    """The next segment of the connection that this one opens."""
    packet = parse(data)
    return tcp(packet.src, packet[TCP].sport, packet.dst, packet[TCP].dport, "A")


def odd_ones(net: Net) -> None:
    """Pings, hairpins, fragments of both directions and ARP: what RSS alone cannot bring to its core."""
    net.send(INSIDE, [frame(echo(client, SERVER, 9)) for client in CLIENTS])
    out = [parse(data) for data in net.await_frames(OUTSIDE, len(CLIENTS))]
    net.send(OUTSIDE, [frame(echo(SERVER, p.src, p[ICMP].id, reply=True), OUTSIDE) for p in out])
    back = {parse(data).dst for data in net.await_frames(INSIDE, len(CLIENTS))}
    assert back == set(CLIENTS)

    ends = {internal(r): external(r) for _, r in net.sessions() if r["protocol"] == 17}
    pairs = list(zip(CLIENTS, CLIENTS[1:] + CLIENTS[:1], strict=True))
    net.send(INSIDE, [frame(udp(one, 4000, *ends[other, 4000])) for one, other in pairs])
    turned = {
        (parse(data).src, parse(data)[UDP].sport, parse(data).dst)
        for data in net.await_frames(INSIDE, len(pairs))
    }
    assert turned == {(*ends[one, 4000], other) for one, other in pairs}

    long = bytes(range(256)) * 12
    for at, client in enumerate(CLIENTS):
        parts = fragments(udp(client, 4000, SERVER, 53, long, id=at), 1480)
        net.send(INSIDE, [frame(part) for part in parts])
        assert together(net.await_frames(OUTSIDE, len(parts))).src == ends[client, 4000][0]
        answer = fragments(udp(SERVER, 53, *ends[client, 4000], long, id=at), 1480)
        net.send(OUTSIDE, [frame(part, OUTSIDE) for part in answer])
        assert together(net.await_frames(INSIDE, len(answer))).dst == client


def several(library: str, how: str, n: int, idle: str) -> dict[str, Any]:
    net = Net(library, how, n, idle)
    exchange(net, 2)
    sessions = net.sessions()
    assert len(sessions) == len(flows())
    for i, record in sessions:
        assert host_slice(int(record["internal_addr"]), n) == i == port_slice(int(record["external_port"]), n)
    spread = {
        name: net.total(name) for name in ("handed_off", "handoff_received", "handoff_dropped", "tx_passed")
    }
    odd_ones(net)
    question = arp(INSIDE, 1, host_mac(CLIENT), CLIENT, OUR_ADDRESS[INSIDE])
    net.send(INSIDE, [question])
    sent = sum(wire.sent for wire in {id(wire): wire for wire in net.wires}.values())
    counted = until(lambda: sum(c.counters()[f"rx_packets.{i}"] for c in net.cores for i in (0, 1)) == sent)
    learned = until(lambda: net.total("arp_copies") == n - 1)
    stats = net.workers.stats()
    drops = {
        name: int(k)
        for core in net.cores
        for name, k in zip(VERDICT_NAMES, core.verdicts(), strict=True)
        if k and name.startswith("drop")
    }
    return {
        "spread": spread,
        "odd": net.total("handed_off") - spread["handed_off"],
        "received": net.total("handoff_received") - net.total("handed_off"),
        "counted": counted,
        "learned": learned,
        "drops": drops,
        "said": [port.spread for port in net.ports],
        "loops": [one["loops"] for one in stats],
        "tx_dropped": sum(one[f"tx_dropped.{i}"] for one in stats for i in (0, 1)),
        "moving": len(set(net.workers.loops_addresses)),
        "lost": net.close(),
    }


def marks(library: str) -> dict[str, Any]:
    """All codepoints both ways; ARP of both sides; errors of ours and of others; fragments that we make."""
    net = Net(library, "dscp", 1, ports=tagged_ports(0, 0, external_mtu=600))
    sent = [frame(udp(CLIENT, 4000, SERVER, 53, tos=tos)) for tos in range(256)]
    net.wires[INSIDE].send([data for data in sent if data[15] & MARK])  # as they are on the link
    out = net.await_frames(OUTSIDE, 128)
    endpoint = parse(out[0]).src, parse(out[0])[UDP].sport
    net.wires[OUTSIDE].send(
        [frame(udp(SERVER, 53, *endpoint, tos=tos), OUTSIDE) for tos in range(256) if not tos & MARK]
    )
    back = net.await_frames(INSIDE, 128)
    said: dict[str, Any] = {"out": [data[15] for data in out], "back": [data[15] for data in back]}

    # an ICMP error of our own quotes what the customer has sent; it and the answer to a ping go inside
    net.send(INSIDE, [frame(udp(CLIENT, 4000, SERVER, 53, ttl=1, tos=0xB9))])
    net.send(INSIDE, [frame(echo(CLIENT, OUR_ADDRESS[INSIDE], 7, tos=0x28))])
    error, pong = net.await_frames(INSIDE, 2)
    said["quoted"] = [parse(error)[ICMP].type, bytes(parse(error)[ICMP].payload)[1], parse(pong).tos]
    # and one of others goes through, with its own mark only
    about = parse(out[-1])
    net.send(OUTSIDE, [frame(icmp_error(GATEWAY, endpoint[0], about, tos=0xC0), OUTSIDE)])
    [through] = net.await_frames(INSIDE, 1)
    said["through"] = [parse(through).tos, bytes(parse(through)[ICMP].payload)[1] == about.tos]
    # pieces that we make, and fragments that come
    net.send(INSIDE, [frame(udp(CLIENT, 4000, SERVER, 53, bytes(1200), tos=0x2A, id=77))])
    pieces = net.await_frames(OUTSIDE, 3)
    said["cut"] = [len(pieces), together(pieces).tos]
    parts = fragments(udp(SERVER, 53, *endpoint, bytes(1200), tos=0x2A, id=9), 480)
    net.send(OUTSIDE, [frame(part, OUTSIDE) for part in parts])
    said["fragments"] = together(net.await_frames(INSIDE, len(parts))).tos

    net.wires[INSIDE].arp.clear()
    questions = {
        "inside": arp(INSIDE, 1, host_mac(CLIENT), CLIENT, OUR_ADDRESS[INSIDE]),
        "outside": arp(OUTSIDE, 1, GATEWAY_MAC, GATEWAY, POOL[0]),
        "probe inside": arp(INSIDE, 1, host_mac(CLIENT), "0.0.0.0", OUR_ADDRESS[INSIDE]),
        "probe outside": arp(OUTSIDE, 1, GATEWAY_MAC, "0.0.0.0", POOL[0]),
    }
    for name, question in questions.items():
        net.wires[INSIDE].send([question])
        until(lambda: net.wires[INSIDE].received() or net.wires[INSIDE].arp)
        said[name] = [Ether(data)[ARP].hwsrc for data in net.wires[INSIDE].arp]
        net.wires[INSIDE].arp.clear()
    # what tells no side
    ipv6 = bytes(Ether(src=GATEWAY_MAC, dst=OUR_MAC[OUTSIDE], type=0x86DD)) + bytes(46)
    net.wires[INSIDE].send([vlan(udp(CLIENT, 1, SERVER, 1), 5), ipv6])
    core = net.cores[0]
    said["dropped"] = until(
        lambda: core.verdicts()[Verdict.DROP_VLAN] == 1 == core.verdicts()[Verdict.DROP_IPV6]
    )
    broken = bytearray(marked(sent[0], True))
    broken[24] ^= 1
    net.wires[INSIDE].send([bytes(broken)])
    said["broken"] = until(lambda: core.verdicts()[Verdict.DROP_IP_CHECKSUM] == 1)
    return {**said, "lost": net.close()}


def stopped_amid(library: str, how: str) -> dict[str, Any]:
    """Workers end while packets are in all of their rings, and some are held."""
    net = Net(library, how, 2, neighbours=(), routes=config().routes[:2])
    for turn in range(40):
        to = f"198.51.100.{100 + turn}"  # nobody answers for it
        net.send(INSIDE, flows()[:80])
        net.send(INSIDE, [frame(udp(client, 4000, to, 53)) for client in CLIENTS])
    busy = until(lambda: sum(core.counters()["held"] for core in net.cores) > 50)
    return {"busy": busy, "lost": net.close()}


def full_ring(library: str) -> dict[str, Any]:
    """A worker that stands still costs the packets of its own slice, and no buffer for ever."""
    net = Net(library, "software", 2)
    exchange(net, 1)
    stop = (
        "import sys, tests.stopped_thread as s\n"
        f"with s.stopped_thread({os.getpid()}, 'nat-worker-1'):\n"
        "    print('stopped', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", stop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stopper:
        assert stopper.stdout is not None
        assert stopper.stdout.readline() == "stopped\n"
        before = net.total("handed_off")
        mine = [
            data for data in flows() if host_slice(number(parse(data).src), 2) == 0 and UDP in parse(data)
        ]
        others = [data for data in flows() if host_slice(number(parse(data).src), 2) == 1]
        for _ in range(5000 // len(others)):
            net.send(INSIDE, others)
            until(lambda: net.total("handed_off") - before == net.wires[INSIDE].sent - len(flows()), 5)
        dropped = net.total("handoff_dropped")
        stopper.communicate("")
    received = until(
        lambda: net.total("handoff_received") + net.total("handoff_dropped") == net.total("handed_off")
    )
    net.wires[OUTSIDE].received()
    net.send(INSIDE, mine)
    goes_on = len(net.await_frames(OUTSIDE, len(mine))) >= len(mine)
    return {"dropped": dropped, "received": received, "goes_on": goes_on, "lost": net.close()}


def rss_of_a_device(library: str) -> dict[str, Any]:
    Eal(memory_mb=160)
    pool, wire = Mempool("buffers", 16384), load(library)
    said: dict[str, Any] = {}
    for i, side in enumerate(("internal", "external", None)):
        port = Port(f"net_null{i}", pool, index=i, state_dir=Path(), queues=3, side=side)
        queues, key, types = (ctypes.c_uint8 * 128)(), (ctypes.c_uint8 * 40)(), ctypes.c_uint64()
        if side is not None:
            assert wire.wire_rss(port.port_id, queues, 128, key, ctypes.byref(types)) == 0
        said[str(side)] = [port.spread, port.rx_queues, port.tx_queues, list(queues), bytes(key).hex()]
    alone = Port("net_null9", pool, index=9, state_dir=Path(), side="internal")
    said["alone"] = [alone.spread, alone.rx_queues]
    return said


def wrong_cores(library: str) -> list[str]:
    Eal(memory_mb=64)
    pool, wire = Mempool("buffers", 1024), load(library)
    ports = [Wire(wire, pool, side[:2], 1, 1, side).port for side in ("internal", "external")]
    cores = [Core(replace(config(), n_slices=2, slice=i)) for i in (0, 1)]
    said = []
    for wrong, more in ((cores[::-1], {}), (cores, {"cpus": [0]}), ([], {}), (cores[:1] * 2, {})):
        try:
            Workers(wrong, ports, pool, **more)  # type: ignore[arg-type]
        except ValueError as error:
            said.append(str(error))
    worker = Worker(cores[0], ports, pool)
    worker.start()
    worker.stop()
    # a second one of the same core: none of the threads is started, and the first core is free again
    both = Workers(cores, ports, pool)
    cores[1].attach()
    try:
        both.start()
    except RuntimeError as error:
        said.append(str(error))
    cores[1].detach()
    cores[0].poll(0)
    return said


if __name__ == "__main__":
    main(globals())
