# SPDX-License-Identifier: Apache-2.0
"""Every transition of the TCP state table, against the reference model (RFC 5382, RFC 7857)."""

from __future__ import annotations

from itertools import product

import pytest

from nat_fastpath.engine import Core
from tests.packets import CLIENT, INSIDE, OTHER_SERVER, OUTSIDE, SERVER, START, config, small_pool
from tests.reference_nat import Datagram
from tests.side_by_side import Pair

# Ways into each state, seen from the opener: "o" is a packet of the opener, "p" of its peer.
WAYS = {
    "syn of one": [],
    "syn of both": ["p:SA"],
    "established": ["p:SA", "o:A"],
    "finished by the opener": ["p:SA", "o:A", "o:FA"],
    "finished by the peer": ["p:SA", "o:A", "p:FA"],
    "closing": ["p:SA", "o:A", "o:FA", "p:FA"],
    "reset": ["p:SA", "o:A", "p:R"],
    # the same endpoints once more, begun by either: longer ways, so one packet must do behind them
    "refused": ["p:R"],
    "anew after a reset": ["p:SA", "o:A", "p:R", "o:S", "p:SA"],
    "anew after a reset, by the peer": ["p:SA", "o:A", "p:R", "p:S", "o:SA"],
    "anew after the opener has finished": ["p:SA", "o:A", "o:FA", "o:S", "p:SA"],
    "anew after closing": ["p:SA", "o:A", "o:FA", "p:FA", "o:S", "p:SA"],
    "anew after closing, by the peer": ["p:SA", "o:A", "o:FA", "p:FA", "p:S", "o:SA"],
}
EVENTS = [f"{who}:{flags}" for who in "op" for flags in ("S", "SA", "A", "FA", "R")]


@pytest.mark.parametrize("opened_inside", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_transition(way: str, opened_inside: bool) -> None:
    """From each state, any two packets: the core keeps the session as long as the model does."""
    for events in product(EVENTS, repeat=1 if "anew" in way else 2):
        pair = Pair(Core(config(pool=small_pool(1), filtering="endpoint-independent", max_sessions=4)), START)
        inside, remote = (CLIENT, 4000), (SERVER, 80)
        if not opened_inside:
            # another session makes the mapping that the peer may then open to
            pair.send(Datagram("tcp", inside, (OTHER_SERVER, 80), flags="S"), INSIDE)
        for who, flags in (event.split(":") for event in ["o:S", *WAYS[way], *events]):
            if (who == "o") == opened_inside:
                pair.send(Datagram("tcp", inside, remote, flags=flags), INSIDE)
            else:
                pair.send(Datagram("tcp", remote, ("198.51.100.10", 2000), flags=flags), OUTSIDE)
        pair.compare()
