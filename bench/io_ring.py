# SPDX-License-Identifier: Apache-2.0
"""Generator and NAT in one process over net_ring, beside plain forwarding over the same rings. A process of its own, for EAL.

``python -m bench.io_ring plain|workers FLOWS SECONDS ROUNDS SIZE`` prints one line of JSON: ``values`` of each way, and ``speeds``.
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
CALM = 1_000_000.0  # packets per second of a generator that shares its CPU with a worker


class Around:
    """The generator at one end of two ring devices, and what is to be measured at the other."""

    def __init__(self, state: str, flows: int) -> None:
        self.cpus = sorted(os.sched_getaffinity(0))
        Eal(memory_mb=256, cpu=self.cpus[0])
        os.sched_setaffinity(0, {self.cpus[0]})
        self.pool = Mempool("buffers", 32768)
        pairs = [
            [Port(device, self.pool, index=i, state_dir=Path(state)) for device in ring_pair(name)]
            for i, name in enumerate(("in", "out"))
        ]
        self.ours, theirs = ((pairs[0][side], pairs[1][side]) for side in (0, 1))
        self.flows = nat.flows(flows)
        self.generator = Generator(theirs, self.pool, self.flows, nat.ROUTERS)
        for side in (0, 1):
            self.generator.send_to(side, nat.MACS[side])

    def nat(self, cpus: list[int]) -> nat.Nat:
        """With all flows open."""
        box = nat.Nat(self.ours, self.pool, nat.core_config(self.flows), cpus)
        self.generator.forget()
        with box.drained():
            phases.open_all(self.generator, PACE)
        if missing := int((self.generator.mappings() == 0).sum()):
            sys.exit(f"{missing} of {self.flows.count} flows could not be opened")
        return box

    def run(self, seconds: float, sizes: tuple[int, ...], rate: float = 0) -> float:
        """Mpps that come through, both ways; as many as go, or so many per second."""
        phase = Phase(
            What.OUT | What.IN, Order.RANDOM, rate=rate, seconds=seconds, sizes=sizes, check_every=256
        )
        return self.generator.run(phase).rate / 1e6


def beside_plain(
    state: str, flows: int, seconds: float, rounds: int, sizes: tuple[int, ...]
) -> dict[str, object]:
    """Mpps that arrive, and ns of the CPU between the rings for each packet, of NAT and of plain forwarding."""
    around = Around(state, flows)
    box = around.nat([around.cpus[-1]])
    found: dict[str, list[float]] = {"nat": [], "nat_ns": [], "plain": [], "plain_ns": []}

    def run(name: str, busy: Callable[[], tuple[float, float]]) -> None:
        before = busy()
        found[name].append(around.run(seconds, sizes))
        after = busy()
        found[f"{name}_ns"].append(1e9 * (after[1] - before[1]) / max(after[0] - before[0], 1))

    speeds = [figures.probe()]
    for _ in range(rounds):
        run("nat", box.busy)
        box.workers.stop()
        plain = Forwarder(around.ours, around.cpus[-1])
        run("plain", plain.counts)
        plain.close()
        box.workers.start()
        speeds.append(figures.probe())
    around.generator.close()
    box.close()
    return {"values": found, "speeds": speeds}


def two_workers(
    state: str, flows: int, seconds: float, rounds: int, sizes: tuple[int, ...]
) -> dict[str, object]:
    """The same of one worker and of two, of which the rings have one queue only: software spreads. What was handed off.

    ``ns`` are of all workers' CPUs together, for each packet. With two CPUs the generator shares one, and sends CALM.
    """
    around = Around(state, flows)
    cpus = around.cpus
    found: dict[str, list[float]] = {"one": [], "one_ns": [], "two": [], "two_ns": [], "handed_off": []}
    speeds = [figures.probe()]
    for _ in range(rounds):
        for name, places in (("one", cpus[-1:]), ("two", [cpus[-1], cpus[-2 % len(cpus)]])):
            box = around.nat(places)
            handed, before = box.handed_off(), box.busy()
            found[name].append(around.run(seconds, sizes, CALM if len(cpus) < 3 else 0))
            after = box.busy()  # before other counters, for it is asked since it was last
            handed = box.handed_off() - handed
            packets = max(after[0] - before[0], 1)
            found[f"{name}_ns"].append(1e9 * (after[1] - before[1]) / packets)
            if name == "two":
                found["handed_off"].append(handed / packets)
            box.close()
        speeds.append(figures.probe())
    around.generator.close()
    return {"values": found, "speeds": speeds}


if __name__ == "__main__":
    what, number, lasts, times, frame = sys.argv[1:]
    chosen = {"plain": beside_plain, "workers": two_workers}[what]
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        of_frames = IMIX if frame == "imix" else (int(frame) - 4,)
        print(json.dumps(chosen(folder, int(number), float(lasts), int(times), of_frames)))
