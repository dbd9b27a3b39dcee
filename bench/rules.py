# SPDX-License-Identifier: Apache-2.0
"""How fast the agent's plane writes rules: ``python -m bench.rules SESSIONS``, beside an Open vSwitch that connects to 127.0.0.1:6653."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from ipaddress import IPv4Address
from typing import Any

import numpy as np

from nat_control import config as configuration
from nat_control.config import parse
from nat_control.core_plane import CorePlane
from nat_control.lab import Lab
from nat_fastpath.engine import RECORD, Core
from switch_agent.agent import next_hops_of, pipeline_of
from switch_agent.channel import Channel
from switch_agent.codec import Ready
from switch_agent.pair_lab import PairLab
from switch_agent.plane import OpenFlowDataPlane

HOST, REMOTE = IPv4Address("10.1.0.0"), IPv4Address("203.0.113.1")
POOL_FIRST, FIRST_PORT, PORTS = IPv4Address("198.51.100.10"), 1024, 31_744  # of each address


def sessions(n: int, instance: int = 1) -> np.ndarray[Any, np.dtype[np.void]]:
    """Sessions of different inside endpoints, as ``instance`` would have opened them; shape (n,), dtype RECORD."""
    found = np.zeros(n, RECORD)
    number = np.arange(n)
    found["id"] = 1 << 60 | instance << 52 | np.arange(1, n + 1)
    found["internal_addr"] = int(HOST) + number // PORTS
    found["external_addr"] = int(POOL_FIRST) + number // PORTS
    found["internal_port"] = found["external_port"] = FIRST_PORT + number % PORTS
    found["remote_addr"], found["remote_port"] = int(REMOTE), 53
    found["protocol"], found["timeout_ms"] = 17, 3_600_000
    found["internal_mac"], found["external_if"] = 0x02_00_0A_00_00_0A, 1
    return found


async def write(n: int) -> dict[str, Any]:
    """Runs where the switch connects to."""
    config = parse(CONFIG)
    core = Core(configuration.to_core(config, []))
    channel = Channel(1)
    pipeline = pipeline_of(config)
    hops = next_hops_of(config, pipeline)
    plane = OpenFlowDataPlane(channel, pipeline, hops, CorePlane(core, own=True), max_flows=2 * n)
    await channel.listen("127.0.0.1:6653")
    while not any(isinstance(event, Ready) for event in await channel.events()):
        pass
    await plane.prepare()
    records = sessions(n)
    begin = time.monotonic()
    for at in range(0, n, plane.capabilities.max_batch):
        await plane.install(records[at : at + plane.capabilities.max_batch])
    took = time.monotonic() - begin
    await channel.close()
    return {
        "rules": 2 * plane.offloaded,
        "refused": dict(plane.refused),
        "rules_per_second": round(2 * plane.offloaded / took),
    }


CONFIG: dict[str, Any] = {
    "instance": "switch",
    "ports": {
        "internal": {"address": "10.0.0.1/8"},
        "external": {"address": "198.51.100.1/24", "gateway": "198.51.100.254"},
    },
    "nat": {
        "pool": {"addresses": "198.51.100.10-198.51.100.60", "ports": "1024-32767"},
        "max_sessions": 1_100_000,
    },
    "virtual": {"mac": "02:00:5e:00:01:01"},
    "switch": {
        "openflow": "127.0.0.1:6653",
        "datapath_id": "1",
        "ports": {"internal": 1, "external": 2},
    },
}


def measure(n: int = 100_000) -> dict[str, Any]:
    """Flow-mods per second of the plane, each batch behind a barrier, into a real Open vSwitch. Raises LabError."""
    with Lab() as lab:
        net = PairLab(lab)
        said = net.switch.run(sys.executable, "-m", "bench.rules", str(n), timeout=120)
    return {"figure": "flow-mods", **json.loads(said)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(write(int(sys.argv[1])))))
