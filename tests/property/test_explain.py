# SPDX-License-Identifier: Apache-2.0
"""`explain` says of any packet, in any state, what then really becomes of it, and changes nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.packet import Packet, Raw

from nat_fastpath.core_config import NeighbourConfig, PortConfig
from nat_fastpath.engine import STEP_KINDS, Core, Verdict
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OTHER_SERVER,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    SECOND,
    SERVER,
    START,
    arp,
    config,
    echo,
    external,
    fragments,
    frame,
    host_mac,
    icmp_error,
    internal,
    ip,
    mac_bytes,
    number,
    remote,
    retagged,
    small_pool,
    tcp,
    text,
    udp,
)

STRANGER = "10.0.0.77"  # inside, without a static neighbour
INSIDERS = (CLIENT, OTHER_CLIENT, STRANGER, "10.0.0.78")
SERVERS = (SERVER, OTHER_SERVER, "198.51.100.33", "198.51.100.255", "10.0.0.5", "224.0.0.1", "127.0.0.1")
HASHES = ("fnv", "aes") if "aes" in Path("/proc/cpuinfo").read_text().split() else ("fnv",)
FLAGS = ("S", "S", "SA", "A", "PA", "FA", "R")


def state(core: Core) -> list[Any]:
    """All that is seen of a core."""
    sessions, cursor = core.sessions(0, 1 << 10)
    assert cursor == 0
    return [
        sorted(map(bytes, sessions)),
        sorted(map(bytes, core.neighbours())),
        sorted(map(bytes, core.hosts())),
        core.verdicts().tolist(),
        # that a command was carried out is counted, as of all commands
        {name: value for name, value in core.counters().items() if name != "commands"},
    ]


class Traffic:
    """Packets that meet: few hosts and ports, and the ends of sessions that exist."""

    def __init__(self, core: Core, rng: random.Random) -> None:
        self.core, self.rng = core, rng
        self.waiting: list[tuple[int, Packet]] = []  # fragments that were not sent yet

    def _session(self) -> Any:
        sessions, _ = self.core.sessions(0, 1 << 10)
        return self.rng.choice(sessions) if len(sessions) else None

    def _transport(self, source: tuple[str, int], destination: tuple[str, int], **fields: Any) -> Packet:
        kind = self.rng.random()
        if kind < 0.45:
            return udp(*source, *destination, self.rng.randbytes(self.rng.choice((4, 40, 700))), **fields)
        if kind < 0.85:
            return tcp(*source, *destination, self.rng.choice(FLAGS), **fields)
        return echo(source[0], destination[0], source[1], reply=self.rng.random() < 0.2, **fields)

    def packet(self) -> tuple[int, Packet]:
        rng = self.rng
        if self.waiting and rng.random() < 0.7:
            return self.waiting.pop(rng.randrange(len(self.waiting)))
        fields: dict[str, Any] = {"id": rng.randrange(4), "ttl": rng.choice((1, 2, 64, 64, 64, 64, 64))}
        session = self._session()
        inside = rng.choice(INSIDERS), rng.randint(4000, 4002)
        outside = rng.choice(SERVERS[:3] if rng.random() < 0.9 else SERVERS), rng.choice((53, 80))
        choice = rng.random()
        if session is None or choice < 0.3:
            port, packet = INSIDE, self._transport(inside, outside, **fields)
        elif choice < 0.5:
            port, packet = OUTSIDE, self._answer(session, outside, fields)
        elif choice < 0.6:
            port, packet = INSIDE, self._transport(inside, external(session), **fields)  # hairpin
        elif choice < 0.7:
            port, packet = OUTSIDE, self._error(session, outside, fields)
        elif choice < 0.75:
            port, packet = INSIDE, echo(inside[0], OUR_ADDRESS[INSIDE], 7, **fields)
        elif choice < 0.8:
            port, packet = OUTSIDE, self._transport(inside, external(session), **fields)  # forged
        elif choice < 0.84:
            port, packet = self._odd(inside, outside, fields)
        else:
            port, packet = INSIDE, self._transport(internal(session), remote(session), **fields)
        if rng.random() < 0.3:
            packet.flags = "DF"
        elif rng.random() < 0.15 and len(bytes(packet)) > 60:
            self.waiting += [(port, piece) for piece in fragments(packet, rng.choice((16, 24, 320)))]
            return self.waiting.pop(rng.randrange(len(self.waiting)))
        return port, packet

    def _answer(self, session: Any, outside: tuple[str, int], fields: dict[str, Any]) -> Packet:
        source = remote(session) if self.rng.random() < 0.7 else outside
        to = external(session)
        if session["protocol"] == 1:
            return echo(source[0], to[0], to[1], reply=True, **fields)
        make = {6: tcp, 17: udp}[int(session["protocol"])]
        if make is tcp:
            return tcp(*source, *to, self.rng.choice(FLAGS), **fields)
        return udp(*source, *to, self.rng.randbytes(self.rng.choice((4, 700))), **fields)

    def _error(self, session: Any, outside: tuple[str, int], fields: dict[str, Any]) -> Packet:
        about = udp(*external(session), *remote(session))
        return icmp_error(outside[0], text(session["external_addr"]), about, **fields)

    def _odd(
        self, inside: tuple[str, int], outside: tuple[str, int], fields: dict[str, Any]
    ) -> tuple[int, Packet]:
        here, pool = OUR_ADDRESS[OUTSIDE], "198.51.100.10"
        makers: tuple[Callable[[], tuple[int, Packet]], ...] = (
            lambda: (INSIDE, self._transport(inside, (OUR_ADDRESS[INSIDE], 22), **fields)),
            lambda: (OUTSIDE, self._transport(outside, (here, 22), **fields)),
            lambda: (OUTSIDE, self._transport(outside, ("198.51.100.77", 22), **fields)),
            lambda: (OUTSIDE, icmp_error(outside[0], pool, udp(pool, 1, *outside), kind=5, **fields)),
            lambda: (OUTSIDE, icmp_error(outside[0], pool, udp(*inside, *outside), **fields)),
            lambda: (INSIDE, icmp_error(inside[0], outside[0], udp(*outside, *inside), quote=12, **fields)),
            lambda: (INSIDE, ip(inside[0], outside[0], frag=1, proto=6, **fields) / Raw(b"overlap!")),
            lambda: (INSIDE, ip(inside[0], "198.51.100.255", proto=17, **fields) / Raw(b"12345678")),
        )
        return self.rng.choice(makers)()

    def tagged(self, port: int, data: bytes) -> bytes:
        return retagged(data, self.core.config.ports[port].vlan, self.rng.choice((0, 0, 10)))

    def frame(self) -> tuple[int, bytes]:
        rng = self.rng
        if rng.random() < 0.03:
            who = rng.choice(INSIDERS)
            question = arp(INSIDE, rng.choice((1, 2)), host_mac(who), who, OUR_ADDRESS[INSIDE])
            return INSIDE, self.tagged(INSIDE, question)
        port, packet = self.packet()
        mac = host_mac(rng.choice(INSIDERS)) if port == INSIDE and rng.random() < 0.1 else None
        data = self.tagged(port, frame(packet, port, mac))
        if rng.random() < 0.03:  # any damage
            at = rng.randrange(len(data))
            data = data[:at] + rng.randbytes(1) + data[at + 1 :]
        if rng.random() < 0.02:
            data = data[: rng.randrange(len(data))]
        return port, data


def settings(rng: random.Random) -> dict[str, Any]:
    small = rng.choice((576, 1500))
    hosts = (CLIENT, OTHER_CLIENT)
    first = rng.choice((1023, 2000, 3998))  # of both classes; of one; those of the packets themselves
    return {
        "ports": tuple(
            PortConfig(
                side, mac_bytes(OUR_MAC[i]), number(OUR_ADDRESS[i]), mtu=small, vlan=rng.choice((0, 0, 7))
            )
            for i, side in enumerate(("internal", "external"))
        ),
        "neighbours": tuple(
            NeighbourConfig(number(host), INSIDE, mac_bytes(host_mac(host))) for host in hosts
        ),
        "mapping": rng.choice(("endpoint-independent", "endpoint-dependent")),
        "filtering": rng.choice(("address-and-port-dependent", "address-dependent", "endpoint-independent")),
        "synchronous": rng.random() < 0.3,
        "pool": small_pool(rng.choice((2, 5, 64)), rng.choice((1, 2)), first),
        "port_ranges": rng.choice(((), ((first, first + 1), (first + 20, first + 63)))),
        "port_preservation": rng.random() < 0.3,
        "port_parity": rng.random() < 0.3,
        "flow_hash": rng.choice(HASHES),
        "max_sessions": rng.choice((8, 64, 1024)),
        "sessions_per_host": rng.choice((0, 2, 6)),
        "mappings_per_host": rng.choice((0, 2, 3)),
        "new_sessions_rate": rng.choice((0, 0, 5)),
        "new_sessions_burst": rng.choice((0, 3)),
        "quarantine": rng.choice((0, 5, 120)),
        "quarantine_ports": rng.choice((0, 2)),
        "icmp_rate": rng.choice((1, 1000)),
        "max_held": rng.choice((8, 64)),
        "max_neighbours": rng.choice((4, 64)),
        "event_ring": rng.choice((16, 4096)),
        "seed": rng.randrange(1, 1 << 32),
    }


@pytest.mark.timeout(240)
def test_what_explain_says_is_what_happens() -> None:
    """Nor does a core that was asked ever go another way than its twin, which was not."""
    rng = random.Random(20_261_124)
    seen: Counter[Verdict] = Counter()
    kinds: set[str] = set()
    counted: Counter[str] = Counter()
    for _ in range(40):
        sent: list[tuple[int, bytes]] = []
        made = config(**settings(rng))
        core, twin = Core(made), Core(made)
        traffic, now, reading = Traffic(core, rng), START, rng.choice((0.0, 0.5))
        for _ in range(100):
            if rng.random() < 0.1:
                now += round(rng.choice((0.3, 1.1, 61, 241, 301)) * SECOND)
            elif rng.random() < 0.5:
                now += SECOND // 20
            read, commit = rng.random() < reading, rng.random() < 0.3
            for one in (core, twin):
                one.poll(now)
                one.take()
                one.outbox()
                if read:
                    one.events()
                if commit:
                    one.commit(core.sessions(0, 1 << 10)[0])
            # scapy takes its time: what was sent once meets another state later
            if not sent or rng.random() < 0.3:
                sent.append(traffic.frame())
            port, data = sent[-1] if rng.random() < 0.5 else rng.choice(sent)
            before = state(core)
            explained = core.explain(port, data)
            assert state(core) == before, "a question has changed something"
            assert core.explain(port, data)[:4] == explained[:4], "asked twice, answered twofold"
            result = core.burst([(port, data)], now)[0]
            assert twin.burst([(port, data)], now)[0] == result, "a question has left something behind"
            told = [STEP_KINDS[kind] for kind in explained.steps["kind"]]
            assert explained.verdict == result.verdict, (told, data.hex())
            if result.verdict <= Verdict.FRAGMENT:
                assert explained.port == result.port
                assert explained.frame == result.frame, told
            seen[result.verdict] += 1
            kinds.update(told)
            counted.update(core.counters())
        assert state(core) == state(twin)
        core.close()
        twin.close()
    wanted = (
        "FORWARD", "REPLY", "FRAGMENT", "HELD", "CONSUMED", "DROP_ADDRESS", "DROP_FRAGMENT", "DROP_TCP_NOT_SYN",
        "DROP_NO_MAPPING", "DROP_FILTERED", "DROP_NO_PORT", "DROP_TABLE_FULL", "DROP_QUOTA", "DROP_BUDGET",
        "DROP_EVENTS_FULL", "DROP_HOLD_LIMIT", "DROP_TOO_BIG", "DROP_ICMP_NO_SESSION", "DROP_NOT_POOL", "DROP_LOCAL",
    )  # fmt: skip
    assert not {name for name in wanted if not seen[Verdict[name]]}, seen
    features = ("parity_missed", "class_missed", "ports_resting", "no_port_resting", "rests_cut", "unpaired")
    assert not {name for name in features if not counted[name]}, counted
    assert set(STEP_KINDS) - kinds <= {"no_route", "handoff"}, set(STEP_KINDS) - kinds


def test_of_a_long_frame_its_beginning_is_enough() -> None:
    core = Core(config())
    data = frame(udp(CLIENT, 4000, SERVER, 53, b"x" * 1400))
    assert core.explain(INSIDE, data[:60], len(data)).verdict == Verdict.FORWARD
    assert core.explain(INSIDE, data[:60], 9000).verdict == Verdict.FORWARD  # padding, not a longer packet
    assert core.explain(INSIDE, data[:60]).verdict == Verdict.DROP_IP_HEADER
    with pytest.raises(ValueError, match="port 7"):
        core.explain(7, data)


def test_a_port_is_told_before_it_is_taken() -> None:
    core = Core(config())
    data = frame(udp(CLIENT, 4000, SERVER, 53))
    steps = core.explain(INSIDE, data).steps
    port = steps[steps["kind"] == STEP_KINDS.index("port")][0]
    core.burst([(INSIDE, data)], START)
    session = core.sessions(0, 1)[0][0]
    assert external(session) == (text(port["address"]), int(port["port"]))


def test_a_fresh_mac_is_learned_by_the_packet_alone() -> None:
    core = Core(config())
    data = frame(udp(STRANGER, 4000, SERVER, 53))
    assert core.explain(INSIDE, data).verdict == Verdict.FORWARD
    known = np.asarray(core.neighbours()["mac"])
    assert int.from_bytes(mac_bytes(host_mac(STRANGER)), "big") not in known
