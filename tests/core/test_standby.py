# SPDX-License-Identifier: Apache-2.0
"""A core that stands by: silent on all ports, and ready to carry at once; probes, announcements and the fence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.l2 import ARP, Ether

from nat_fastpath.cores import Cores
from nat_fastpath.engine import FLAG_FOREIGN, Verdict
from nat_fastpath.role import Role, RoleState
from tests.packets import (
    CLIENT,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    OUR_ADDRESS,
    OUR_MAC,
    OUTSIDE,
    SECOND,
    SERVER,
    Nat,
    arp,
    config,
    frame,
    host_mac,
    tcp,
    udp,
)

PROBE = 0.005


class Pair:
    """Two servers with one MAC; what one sends on a port the other hears there."""

    def __init__(self, **changes: object) -> None:
        self.roles = [Role(RoleState.ACTIVE, probe=PROBE), Role(RoleState.STANDBY, probe=PROBE)]
        self.nats = [Nat(instance=i + 1, role=role.address, **changes) for i, role in enumerate(self.roles)]

    def step(self, seconds: float = 0.001) -> list[tuple[int, int, Ether]]:
        """One turn of both; (who, port, frame) of what they sent by themselves."""
        sent = []
        for nat in self.nats:
            nat.now += round(seconds * SECOND)
            nat.core.poll(nat.now)
        for who, nat in enumerate(self.nats):
            for port, data in nat.core.outbox():
                sent.append((who, port, Ether(data)))
                other = self.nats[1 - who]
                answer = other.raw(data, port)
                if answer.verdict == Verdict.REPLY:
                    sent.append((1 - who, answer.port, Ether(answer.frame)))
                    nat.raw(answer.frame, port)
        return sent


def mirrored(source: Nat, target: Nat) -> None:
    records, _ = source.core.sessions(0)
    records["flags"] |= FLAG_FOREIGN
    assert target.core.install(records) == len(records)


def test_nothing_leaves_it_and_all_is_counted() -> None:
    pair = Pair()
    standby = pair.nats[1]
    outbound = frame(udp(CLIENT, 4000, SERVER, 53))
    for data, port in (
        (outbound, INSIDE),
        (frame(tcp(CLIENT, 4000, SERVER, 80)), INSIDE),
        (frame(udp(SERVER, 53, "198.51.100.10", 4000), OUTSIDE), OUTSIDE),
        (arp(0, 1, host_mac("10.0.0.77"), "10.0.0.77", OUR_ADDRESS[0]), INSIDE),
        (arp(1, 1, GATEWAY_MAC, "198.51.100.77", "198.51.100.10"), OUTSIDE),
        (b"\0" * 20, INSIDE),
    ):
        assert standby.raw(data, port).verdict == Verdict.DROP_STANDBY
    standby.core.poll(standby.now + SECOND)
    assert standby.core.outbox() == []
    assert standby.core.verdicts()[Verdict.DROP_STANDBY] == 6
    assert standby.core.counters()["sessions"] == 0
    answer = standby.core.explain(INSIDE, outbound)
    assert answer.verdict == Verdict.DROP_STANDBY


def test_it_learns_next_hops_but_asks_for_none() -> None:
    pair = Pair(neighbours=())
    active, standby = pair.nats
    active.raw(frame(udp(CLIENT, 4000, SERVER, 53)))  # the gateway is asked for
    for who, port, sent in pair.step():
        assert who == 0, f"the standby sends {sent.summary()} on port {port}"
    standby.core.learn(active.core.neighbours())
    assert standby.raw(arp(1, 2, GATEWAY_MAC, GATEWAY, OUR_ADDRESS[1]), OUTSIDE).verdict in (
        Verdict.CONSUMED,
        Verdict.DROP_STANDBY,
    )
    for _ in range(20):
        assert all(who == 0 for who, _, _ in pair.step(0.1))


def test_sessions_are_carried_on_in_the_same_turn() -> None:
    pair = Pair()
    active, standby = pair.nats
    before = active.out(udp(CLIENT, 4000, SERVER, 53))
    mirrored(active, standby)
    assert standby.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.DROP_STANDBY
    pair.roles[1].state = RoleState.ACTIVE
    after = standby.out(udp(CLIENT, 4000, SERVER, 53))
    assert (after.src, after.sport) == (before.src, before.sport)
    pair.roles[0].state = RoleState.STANDBY
    assert active.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.DROP_STANDBY


def test_one_announcement_per_port_comes_first_and_again() -> None:
    pair = Pair()
    pair.roles[1].state = RoleState.ACTIVE
    seen = [(port, f[ARP].psrc) for who, port, f in pair.step() if who == 1]
    assert seen[:2] == [(0, OUR_ADDRESS[0]), (1, OUR_ADDRESS[1])]
    assert [(1, f"198.51.100.{i}") for i in range(10, 14)] == seen[2:6]
    later = [
        (port, f[ARP].psrc, f.src, f[ARP].hwsrc)
        for _ in range(10)
        for who, port, f in pair.step(0.1)
        if who == 1 and f[ARP].psrc == f[ARP].pdst
    ]
    assert later == 4 * [(i, OUR_ADDRESS[i], OUR_MAC[i], OUR_MAC[i]) for i in range(2)]


def test_a_probe_that_is_answered_leaves_it_silent() -> None:
    pair = Pair()
    pair.roles[1].state = RoleState.PROBING
    sent = pair.step()
    probes = [(port, f) for who, port, f in sent if who == 1]
    assert [port for port, _ in probes] == [0, 1]
    for port, f in probes:
        assert f.dst == "ff:ff:ff:ff:ff:ff"
        assert f.src == f[ARP].hwsrc != OUR_MAC[port], "no switch may learn our MAC here"
        assert (f[ARP].psrc, f[ARP].pdst) == ("0.0.0.0", OUR_ADDRESS[port])
    answers = [f for who, _, f in sent if who == 0]
    assert answers
    assert all(f.dst == "ff:ff:ff:ff:ff:ff" for f in answers), "a NIC lets no other MAC through"
    assert pair.roles[1].state is RoleState.STANDBY
    assert pair.roles[1].counts() == {"answered": 1, "unanswered": 0, "fenced": 0}
    for _ in range(20):
        assert all(who == 0 for who, _, _ in pair.step())


@pytest.mark.parametrize("port", [INSIDE, OUTSIDE])
def test_one_port_that_answers_is_enough(port: int) -> None:
    pair = Pair()
    pair.roles[1].state = RoleState.PROBING
    pair.nats[1].core.poll(pair.nats[1].now + 1)
    probe = dict(pair.nats[1].core.outbox())[port]
    pair.nats[1].raw(pair.nats[0].raw(probe, port).frame, port)
    assert pair.roles[1].state is RoleState.STANDBY


def test_without_an_answer_it_carries_after_the_time() -> None:
    pair = Pair()
    standby = pair.nats[1]
    pair.roles[1].state = RoleState.PROBING
    for turn in range(20):
        standby.now += SECOND // 1000
        standby.core.poll(standby.now)
        sent = standby.core.outbox()
        silent = standby.raw(frame(udp(CLIENT, 4000, SERVER, 53))).verdict == Verdict.DROP_STANDBY
        assert silent == (turn < PROBE * 1000), turn
        assert sent or not silent
    assert pair.roles[1].state is RoleState.ACTIVE
    assert pair.roles[1].counts()["unanswered"] == 1


def test_time_that_it_did_not_live_does_not_count() -> None:
    """It was stopped while it asked; the answer waits in its rings."""
    pair = Pair()
    active, standby = pair.nats
    pair.roles[1].state = RoleState.PROBING
    standby.core.poll(standby.now)
    answers = [(port, active.raw(data, port).frame) for port, data in standby.core.outbox()]
    for _ in range(3):
        standby.now += SECOND
        standby.core.poll(standby.now)
        assert pair.roles[1].state is RoleState.PROBING
    for port, data in answers:
        standby.raw(data, port)
    assert pair.roles[1].state is RoleState.STANDBY


@pytest.mark.parametrize("answered", [True, False])
def test_what_was_held_waits_for_the_answer(answered: bool) -> None:
    pair = Pair(synchronous=True)
    active, other = pair.nats
    pair.roles[0].fence = 0.01
    assert active.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.HELD
    if answered:
        pair.roles[1].state = RoleState.ACTIVE
    active.now = other.now = active.now + SECOND // 50
    active.core.poll(active.now)
    assert pair.roles[0].state is RoleState.PROBING
    records, _ = active.core.sessions(0)
    assert active.core.commit(records) == 1
    assert active.core.take() == [], "nobody knows yet who carries"
    for _ in range(8):
        pair.step()
    sent = [one.verdict for one in active.core.take()]
    assert sent == [Verdict.DROP_STANDBY if answered else Verdict.FORWARD]
    assert active.core.verdicts()[Verdict.FORWARD] == int(not answered)
    assert active.core.counters()["tx_packets.1"] - active.core.counters()["arp_requests_sent"] <= 8


def test_who_stood_still_asks_before_it_sends() -> None:
    pair = Pair()
    active, other = pair.nats
    active.out(udp(CLIENT, 4000, SERVER, 53))
    mirrored(active, other)
    pair.roles[0].fence = 0.01
    for _ in range(30):
        pair.step()
    pair.roles[1].state = RoleState.ACTIVE  # the other has given us up
    active.now = other.now = active.now + SECOND
    other.core.poll(other.now)
    waited = [frame(udp(CLIENT, 4000, SERVER, 53))] * 32
    results = active.burst([(INSIDE, data) for data in waited])
    assert {r.verdict for r in results} == {Verdict.DROP_STANDBY}
    assert pair.roles[0].state is RoleState.PROBING
    pair.step()
    assert pair.roles[0].state is RoleState.STANDBY
    assert pair.roles[0].counts() == {"answered": 1, "unanswered": 0, "fenced": 1}


def test_who_stood_still_and_is_not_missed_goes_on() -> None:
    pair = Pair()
    active = pair.nats[0]
    pair.roles[0].fence = 0.01
    active.out(udp(CLIENT, 4000, SERVER, 53))
    active.now += SECOND
    for _ in range(8):
        pair.step()
    assert pair.roles[0].state is RoleState.ACTIVE
    active.out(udp(CLIENT, 4000, SERVER, 53))


def test_what_was_held_is_given_up_when_it_stands_down() -> None:
    pair = Pair(synchronous=True)
    active = pair.nats[0]
    assert active.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.HELD
    pair.roles[0].state = RoleState.STANDBY
    active.core.poll(active.now + 1)
    assert [r.verdict for r in active.core.take()] == [Verdict.DROP_SESSION_GONE]
    assert active.core.outbox() == []


def test_a_reload_keeps_the_role() -> None:
    pair = Pair()
    standby = pair.nats[1]
    changed = replace(standby.core.config, udp_timeout=100, role=0)
    standby.core.prepare(changed).apply()
    assert standby.send(udp(CLIENT, 4000, SERVER, 53)).verdict == Verdict.DROP_STANDBY


def test_several_cores_change_together_and_the_first_asks() -> None:
    role = Role(RoleState.STANDBY, probe=PROBE)
    both = Cores(config(role=role.address), 2)
    cores = both.cores
    now = 5 * SECOND
    role.state = RoleState.PROBING
    for core in cores:
        core.poll(now)
    assert [len(core.outbox()) for core in cores] == [2, 0]
    for _ in range(5):
        now += SECOND // 1000
        for core in cores:
            core.poll(now)
    assert role.state is RoleState.ACTIVE
    for core in cores:
        core.poll(now + 1)
    assert [bool(core.outbox()) for core in cores] == [True, False]
    answered = [c.burst([(INSIDE, frame(udp(CLIENT, 4000, SERVER, 53)))], now + 2)[0] for c in cores]
    assert Verdict.DROP_STANDBY not in {one.verdict for one in answered}
    both.close()
