# SPDX-License-Identifier: Apache-2.0
"""How much memory DPDK gets for packets; the tables' is the core's to say (engine.memory_for)."""

from nat_control.config import Config
from nat_fastpath.devargs import scatters

BUFFERS = 16384  # packets in flight; AF_XDP receives nothing with much less
QUEUE = 2 * 1024  # of a device for each worker, there and back
OWN = 4096 + 256 + 512  # of a worker: what others hand to it, its cache, and what it has in its hands


def buffers(config: Config) -> int:
    """Packet buffers, for the queues and hand-off rings of all workers at once."""
    devices, hold = (
        len({port.device for port in config.ports}),
        config.peer.hold.packets if config.peer else 1024,
    )
    return max(BUFFERS, len(config.workers.cores) * (devices * QUEUE + OWN) + hold)


def buffer_mtu(config: Config) -> int:
    """IP bytes that a packet buffer must hold: a whole packet, unless all devices take one in several buffers."""
    if all(scatters(port.device) for port in config.ports):
        return 1500
    return max(port.mtu for port in config.ports)


def packet_memory_mb(config: Config) -> int:
    mtu = buffer_mtu(config)
    return 64 + (buffers(config) * (2 * mtu + 1024) >> 20)
