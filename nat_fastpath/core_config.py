# SPDX-License-Identifier: Apache-2.0
"""The configuration of one NAT core, as plain frozen values; the mirror of ``struct nat_config`` in core/nat.h.

Addresses are host-order integers or ``ipaddress.IPv4Address`` (anything ``int()`` takes), MACs are 6 bytes,
times are seconds.  Nothing is validated here beyond what would be unsafe: that is ``nat_control.config``'s work.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

Address = int | IPv4Address


@dataclass(frozen=True, slots=True)
class PortConfig:
    """An interface of the core. ``side`` is ``"internal"`` or ``"external"``."""

    side: str
    mac: bytes
    address: Address = 0
    mtu: int = 1500  # IP bytes
    vlan: int = 0  # 0: untagged


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """``prefix/length`` is reached through ``port``, by ``gateway`` or directly (``gateway`` 0)."""

    prefix: Address
    length: int
    port: int
    gateway: Address = 0
    gateway_mac: bytes | None = None


@dataclass(frozen=True, slots=True)
class NeighbourConfig:
    """A static ARP entry."""

    address: Address
    port: int
    mac: bytes


@dataclass(frozen=True, slots=True)
class PoolRange:
    """External addresses ``first``..``last``; ``ports`` are this pair's, ``own`` those this core hands out."""

    first: Address
    last: Address
    ports: tuple[int, int] = (1024, 65535)
    own: tuple[int, int] | None = None  # None: all of ports


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Everything a core must know; see ``struct nat_config``."""

    ports: tuple[PortConfig, ...]
    pool: tuple[PoolRange, ...]
    routes: tuple[RouteConfig, ...] = ()
    neighbours: tuple[NeighbourConfig, ...] = ()
    mapping: str = "endpoint-independent"
    filtering: str = "address-and-port-dependent"
    max_sessions: int = 65536
    max_mappings: int = 0  # 0: as max_sessions
    max_hosts: int = 0  # 0: chosen from max_sessions
    max_neighbours: int = 4096
    max_held: int = 1024
    event_ring: int = 65536
    sessions_per_host: int = 0  # 0: no limit
    mappings_per_host: int = 0
    new_sessions_rate: int = 0  # per second, 0: no limit
    new_sessions_burst: int = 0  # 0: a tenth of a second's worth
    icmp_rate: int = 1000  # ICMP errors of our own per second
    hold: float = 1.0
    udp_timeout: float = 300
    tcp_established_timeout: float = 7440
    tcp_transitory_timeout: float = 240
    icmp_timeout: float = 60
    quarantine: float = 0  # a freed external port rests so long
    quarantine_ports: int = 0  # so many at once; 0: all
    port_ranges: tuple[tuple[int, int], ...] = ()  # of own, only these are handed out; (): all
    port_preservation: bool = False
    port_parity: bool = False
    flow_hash: str = "fnv"
    n_slices: int = 0  # cores that share hosts and ports, see slices.h; 0: this one has all
    slice: int | None = 0  # this core's; None: it serves all of them, each by its own ports
    synchronous: bool = False
    instance: int = 0
    epoch: int = 0
    seed: int = 0  # of the port choice; 0 takes one from the system
    role: int = 0  # Role.address (nat_fastpath/role.py); 0: it always carries
