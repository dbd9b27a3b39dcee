# SPDX-License-Identifier: Apache-2.0
"""Links to the peer, by the kernel's word: root, in namespaces of their own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from nat_control.lab import Lab, Namespace
from nat_fastpath.watch import Watch
from tests.entered import entered

from .helpers import pair, take, until

Stream = tuple[socket.socket, socket.socket]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def net() -> Iterator[tuple[Namespace, Namespace]]:
    """Ours with the links one, two and three, and the one with their far ends."""
    with Lab() as lab:
        ours, there = lab.namespace("ours"), lab.namespace("there")
        for name in ("one", "two", "three"):
            lab.cable(ours, name, there, name)
        yield ours, there


@pytest.fixture
def watched(net: tuple[Namespace, Namespace]) -> Iterator[Watch]:
    """A watch of one and two, with a peer that lives."""
    with pair() as (w, _):
        with entered(net[0]):
            w.watch_links([index_of(name) for name in ("one", "two")])
        yield w


def index_of(name: str) -> int:
    return socket.if_nametoindex(name)


def told(namespace: Namespace, name: str, up: bool) -> None:
    """Waits until the kernel has told of it."""
    until(lambda: (" state UP " in namespace.ip("link", "show", name)) == up)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_link_without_a_carrier(
    watched: Watch, net: tuple[Namespace, Namespace], stream: Stream, name: str
) -> None:
    watched.arm(b"prepared", stream[0].fileno())
    begin = time.monotonic_ns()
    net[1].ip("link", "set", name, "down")
    until(lambda: watched.times["written"])
    assert watched.fired == "link down"
    assert take(stream[1]) == b"prepared"
    times = watched.times
    assert begin < times["detected"] <= times["written"]  # type: ignore[operator]
    assert watched.stats()["alive"]  # it is the link that is gone
    net[1].ip("link", "set", "two", "down")
    net[1].ip("link", "set", "one", "down")
    assert take(stream[1]) == b""


@pytest.mark.parametrize(
    "command", [("set", "one", "down"), ("delete", "one"), ("set", "one", "netns", "THERE", "name", "four")]
)
def test_a_link_that_is_taken_away(
    watched: Watch, net: tuple[Namespace, Namespace], stream: Stream, command: tuple[str, ...]
) -> None:
    watched.arm(b"prepared", stream[0].fileno())
    net[0].ip("link", *(part.replace("THERE", net[1].full_name) for part in command))
    until(lambda: watched.fired == "link down")
    assert take(stream[1]) == b"prepared"


def test_no_other_link_counts(watched: Watch, net: tuple[Namespace, Namespace], stream: Stream) -> None:
    """A stranger's, one with other news, one that is not watched any more; the watched one behind them does."""
    ours, there = net
    watched.arm(b"prepared", stream[0].fileno())
    there.ip("link", "set", "three", "down")
    ours.ip("link", "set", "three", "down")
    ours.ip("link", "set", "one", "mtu", "1400")
    ours.ip("link", "set", "one", "promisc", "on")
    with entered(ours):
        watched.watch_links([index_of("two")])
    there.ip("link", "set", "one", "down")
    begin = time.monotonic_ns()
    there.ip("link", "set", "two", "down")
    until(lambda: watched.fired)
    assert watched.times["detected"] > begin  # type: ignore[operator]


def test_not_armed_and_no_links(watched: Watch, net: tuple[Namespace, Namespace], stream: Stream) -> None:
    """What went before the watch was armed is known to who arms it."""
    ours, there = net
    there.ip("link", "set", "one", "down")
    told(ours, "one", False)
    watched.arm(b"prepared", stream[0].fileno())
    there.ip("link", "set", "one", "up")
    told(ours, "one", True)
    assert watched.disarm()
    there.ip("link", "set", "two", "down")
    told(ours, "two", False)
    watched.watch_links([])
    watched.arm(b"prepared", stream[0].fileno())
    there.ip("link", "set", "one", "down")
    told(ours, "one", False)
    watched.stop()
    assert watched.fired is None
    assert take(stream[1]) == b""


def test_too_many(watched: Watch) -> None:
    with pytest.raises(ValueError, match="number of links must be between 0 and 4, not 5"):
        watched.watch_links(range(5))
