# SPDX-License-Identifier: Apache-2.0
"""The role of two servers: heartbeats tell it, and a death changes it without waiting for anybody."""

import socket

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
