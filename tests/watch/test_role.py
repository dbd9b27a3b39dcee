# SPDX-License-Identifier: Apache-2.0
"""The role of two servers: heartbeats tell it, and a death changes it without waiting for anybody."""

import socket

import numpy as np
import pytest

from nat_fastpath.role import Role, RoleState

from .helpers import pair, until


@pytest.mark.parametrize("after", [RoleState.ACTIVE, RoleState.PROBING])
def test_the_survivor_takes_over_with_a_higher_term(after: RoleState) -> None:
    ours, its = Role(RoleState.STANDBY, probe=1), Role(RoleState.ACTIVE, probe=1)
    its.term = 7
    with pair() as (w, peer):
        w.follow(ours.address, after)
        peer.follow(its.address, RoleState.STANDBY)
        until(lambda: w.stats()["peer_term"] == 7 and w.stats()["peer_carries"])
        assert not peer.stats()["peer_carries"]
        its.unfit = True
        until(lambda: w.stats()["peer_unfit"])
        peer.stop()
        until(lambda: not w.stats()["alive"])
        assert ours.state is RoleState.STANDBY, "it was not armed"
        peer.start()
        until(lambda: w.stats()["alive"])
        one, other = socket.socketpair()
        with one, other:
            w.arm(b"", one.fileno())
            peer.stop()
            until(lambda: w.fired)
            assert (ours.state, ours.term) == (after, 8)


def test_the_end_of_a_connection_alone_is_asked_about() -> None:
    """With heartbeats coming it need not be a death; who answers on the ports carries on."""
    role = Role(RoleState.STANDBY, probe=1)
    one, other = socket.socketpair()
    ours, its = socket.socketpair()
    with pair() as (w, _), one, other, ours:
        w.follow(role.address, RoleState.ACTIVE)
        w.watch_tcp(ours.fileno())
        w.arm(b"", one.fileno())
        its.close()
        until(lambda: w.fired == "TCP end")
        assert role.state is RoleState.PROBING
        assert w.stats()["alive"]


@pytest.mark.parametrize("yields", [True, False])
def test_a_worker_that_stands_still_gives_the_role_away(yields: bool) -> None:
    """The others would go on, and answer the one that asks."""
    still, its = Role(RoleState.ACTIVE, probe=1), Role(RoleState.STANDBY, probe=1, both=True)
    moves, stands = np.zeros(2, np.uint64)[:1], np.zeros(1, np.uint64)
    counters = [int(one.ctypes.data) for one in (moves, stands)]
    with pair({"counters": counters, "patience_ms": 60.0}) as (w, peer):
        w.follow(still.address, RoleState.STANDBY)
        peer.follow(its.address, RoleState.STANDBY)
        still.yields = yields

        def works() -> bool:
            moves[0] += 1
            return bool(peer.stats()["received_stalled"] >= 3)

        until(works)
        assert still.state is (RoleState.STANDBY if yields else RoleState.ACTIVE)
        assert w.stats()["stalled"]
        until(lambda: bool(peer.stats()["peer_carries"]) is not yields)
        assert (w.stats()["peer_both"], w.stats()["peer_silence_us"]) == (1, 60_000)


def test_who_carries_or_shall_stay_is_left_alone() -> None:
    for state, after in ((RoleState.ACTIVE, RoleState.PROBING), (RoleState.STANDBY, RoleState.STANDBY)):
        role = Role(state, probe=1)
        one, other = socket.socketpair()
        with pair() as (w, peer), one, other:
            w.follow(role.address, after)
            until(lambda w=w: w.stats()["alive"])
            w.arm(b"", one.fileno())
            peer.stop()
            until(lambda w=w: w.fired)
            assert (role.state, role.term) == (state, 0)
