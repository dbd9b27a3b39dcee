# SPDX-License-Identifier: Apache-2.0
"""The generator around a NAT in one process, over rings; and around what makes mistakes. See dpdk_process."""

from __future__ import annotations

import json
import sys
from typing import Any

from bench import nat
from bench.pktgen import Flows, Generator, Order, Phase, Result, What, phases, ring_pair
from nat_fastpath.dpdk import Eal, Mempool, Port
from tests.dpdk import dpdk_process

FLOWS, PACKETS = 500, 5000


def _ports(state: str, pool: Mempool) -> tuple[tuple[Port, Port], tuple[Port, Port]]:
    """Of the NAT, and of the generator; inside first."""
    made = []
    for index, name in enumerate(("in", "out")):
        made.append(
            [
                Port(device, pool, index=index, state_dir=dpdk_process.Path(state))
                for device in ring_pair(name)
            ]
        )
    return (made[0][0], made[1][0]), (made[0][1], made[1][1])


def _told(result: Result) -> dict[str, Any]:
    return {**result.summary(), "steps": int(result.steps.sum())}


def around_a_nat(state: str) -> dict[str, Any]:
    """Every flow once, then answers, both at a fixed rate, what nobody asked for, and sizes."""
    Eal(memory_mb=128)
    pool = Mempool("buffers", 16384)
    ours, theirs = _ports(state, pool)
    of = nat.flows(FLOWS)
    box = nat.Nat(ours, pool, nat.core_config(of))
    generator = Generator(theirs, pool, of, nat.ROUTERS)
    try:
        for side in (0, 1):
            generator.send_to(side, nat.MACS[side])
        new = generator.run(Phase(What.OUT, Order.EACH_ONCE, rate=20_000, packets=FLOWS, check_every=1))
        told = {
            "new": _told(new),
            "both": _told(
                generator.run(
                    Phase(What.OUT | What.IN, Order.ZIPF, rate=20_000, packets=PACKETS, check_every=1)
                )
            ),
            "sizes": _told(
                generator.run(
                    Phase(
                        What.IN, Order.RANDOM, rate=5_000, packets=600, sizes=(60, 1514, 590), check_every=1
                    )
                )
            ),
            "unsolicited": _told(generator.run(Phase(What.UNSOLICITED, rate=10_000, packets=1000))),
            "mappings": len(set(generator.mappings().tolist())),
            "sessions": box.core.counters()["sessions"],
            "events": box.drain(),
            "verdicts": box.core.verdicts().tolist(),
        }
    finally:
        generator.close()
        box.close()
    return told


def phases_around_a_nat(state: str) -> list[dict[str, Any]]:
    """Those of RFC 9693, around a NAT that has room for half of the flows; it forgets all at once when told to."""
    Eal(memory_mb=128)
    pool = Mempool("buffers", 16384)
    ours, theirs = _ports(state, pool)
    of = nat.flows(2 * FLOWS)
    box = nat.Nat(ours, pool, nat.core_config(of, max_sessions=FLOWS))
    generator = Generator(theirs, pool, of, nat.ROUTERS)

    def clear() -> None:
        while box.core.counters()["sessions"]:
            box.core.delete(box.core.sessions()[0])
        box.drain()

    try:
        for side in (0, 1):
            generator.send_to(side, nat.MACS[side])
        return list(phases.all_phases(generator, 20_000, 0.1, (60,), clear))
    finally:
        generator.close()
        box.close()


def around_a_cable(state: str) -> dict[str, Any]:
    """Nothing translates: every fault that the generator looks for is there."""
    Eal(memory_mb=128)
    pool = Mempool("buffers", 16384)
    inside, outside = (
        Port(device, pool, index=0, state_dir=dpdk_process.Path(state)) for device in ring_pair("cable")
    )
    of = Flows(100, nat.flows(100).pool)
    generator = Generator((inside, outside), pool, of, nat.ROUTERS)
    told = _told(generator.run(Phase(What.OUT, Order.SEQUENTIAL, rate=10_000, packets=300, check_every=1)))
    generator.close()
    return told


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
