# SPDX-License-Identifier: Apache-2.0
"""DPDK for the core: EAL, mempools, ports, and the workers that carry packets between them."""

from importlib import import_module

try:
    import_module("nat_fastpath.dpdk._dpdk")
except ImportError as error:
    raise ImportError(
        f"this Tandem NAT was built without DPDK ({error}): "
        "install libdpdk >= 22.11 (Debian: apt install libdpdk-dev pkg-config) and build it again"
    ) from None

from nat_fastpath.dpdk.binding import DpdkError, Eal, Link, Mempool, Port, PortInfo, ports
from nat_fastpath.dpdk.kernel_interface import InterfaceError, repair
from nat_fastpath.dpdk.worker import Worker, Workers, WorkerStuck

__all__ = [
    "DpdkError",
    "Eal",
    "InterfaceError",
    "Link",
    "Mempool",
    "Port",
    "PortInfo",
    "Worker",
    "WorkerStuck",
    "Workers",
    "ports",
    "repair",
]
