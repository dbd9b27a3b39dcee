# SPDX-License-Identifier: Apache-2.0
"""Generator and NAT in one process over net_ring, beside plain forwarding over the same rings. A process of its own, for EAL.

``python -m bench.io_ring FLOWS SECONDS ROUNDS SIZE`` prints one line of JSON: ``values`` of each way, and ``speeds``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import figures, nat
from bench.pktgen import IMIX, Forwarder, Generator, Order, Phase, What, phases, ring_pair
from nat_fastpath.dpdk import Eal, Mempool, Port

PACE = 500_000.0  # new flows per second


def measure(flows: int, seconds: float, rounds: int, sizes: tuple[int, ...]) -> dict[str, object]:
    """Mpps that arrive, and ns of the CPU between the rings for each packet, of NAT and of plain forwarding."""
    cpus = sorted(os.sched_getaffinity(0))
    Eal(memory_mb=256, cpu=cpus[0])
    os.sched_setaffinity(0, {cpus[0]})
    pool = Mempool("buffers", 32768)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as state:
        pairs = [
            [Port(device, pool, index=i, state_dir=Path(state)) for device in ring_pair(name)]
            for i, name in enumerate(("in", "out"))
        ]
        ours, theirs = ((pairs[0][side], pairs[1][side]) for side in (0, 1))
        of = nat.flows(flows)
        generator = Generator(theirs, pool, of, nat.ROUTERS)
        for side in (0, 1):
            generator.send_to(side, nat.MACS[side])
        box = nat.Nat(ours, pool, nat.core_config(of), cpu=cpus[-1])
        phases.open_all(generator, PACE)
        box.drain()
        phase = Phase(What.OUT | What.IN, Order.RANDOM, seconds=seconds, sizes=sizes, check_every=256)
        found: dict[str, list[float]] = {"nat": [], "nat_ns": [], "plain": [], "plain_ns": []}

        def run(name: str, busy: Callable[[], tuple[float, float]]) -> None:
            before = busy()
            result = generator.run(phase)
            after = busy()
            found[name].append(result.rate / 1e6)
            found[f"{name}_ns"].append(1e9 * (after[1] - before[1]) / max(after[0] - before[0], 1))

        speeds = [figures.probe()]
        for _ in range(rounds):
            run("nat", box.busy)
            box.worker.stop()
            plain = Forwarder(ours, cpus[-1])
            run("plain", plain.counts)
            plain.close()
            box.worker.start()
            speeds.append(figures.probe())
        generator.close()
        box.close()
    return {"values": found, "speeds": speeds}


if __name__ == "__main__":
    number, lasts, times, frame = sys.argv[1:]
    print(
        json.dumps(
            measure(int(number), float(lasts), int(times), IMIX if frame == "imix" else (int(frame) - 4,))
        )
    )
