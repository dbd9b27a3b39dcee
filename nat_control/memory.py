# SPDX-License-Identifier: Apache-2.0
"""How much memory DPDK gets for packets; the tables' is the core's to say (engine.memory_for)."""

from nat_control.config import Config

BUFFERS = 16384  # packets in flight; AF_XDP receives nothing with much less


def packet_memory_mb(config: Config) -> int:
    mtu = max(port.mtu for port in config.ports)
    return 64 + (BUFFERS * (2 * mtu + 1024) >> 20)
