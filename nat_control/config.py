# SPDX-License-Identifier: Apache-2.0
"""The configuration of a server: YAML in, frozen values out, or every error at once with its path.

``docs/configuration.md`` is the reference for people, ``config.schema.json`` the one for editors; a test
holds the three together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from nat_control.config_reader import (
    ConfigError,
    Problem,
    Reader,
    Section,
    a_device,
    a_mac,
    a_network,
    a_socket,
    an_address,
    an_instance,
    an_interface,
    choice,
    host_in,
    integer,
    load_yaml,
    the_cores,
)
from nat_control.config_warnings import warnings
from nat_control.pair_config import KEYS as PAIR_KEYS
from nat_control.pair_config import (
    MARKS,
    Heartbeat,
    Hold,
    Offloading,
    Peer,
    Switch,
    SwitchPorts,
    Virtual,
    check_link,
    check_nat,
    check_pair,
    read_heartbeat,
    read_offload,
    read_peer,
    read_switch,
)
from nat_control.pool_config import (
    MAX_POOL_ADDRESSES,
    MAX_PORT_RANGES,
    MAX_TIMEOUT,
    Located,
    Pool,
    check_slices,
    read_addresses,
    read_pool,
)
from nat_fastpath import devargs
from nat_fastpath.core_config import CoreConfig, NeighbourConfig, PoolRange, PortConfig, RouteConfig

__all__ = [
    "MAX_PORT_RANGES",
    "MAX_TIMEOUT",
    "Config",
    "ConfigError",
    "Control",
    "Heartbeat",
    "Hold",
    "Limits",
    "Nat",
    "Neighbour",
    "Peer",
    "Pool",
    "Port",
    "Problem",
    "Route",
    "Switch",
    "SwitchPorts",
    "Timeouts",
    "Virtual",
    "Workers",
    "load",
    "parse",
    "to_core",
    "warnings",
]

MAPPINGS = ("endpoint-independent", "endpoint-dependent")
FILTERINGS = ("address-and-port-dependent", "address-dependent", "endpoint-independent")
MAX_AF_XDP_MTU = 1898  # its buffers hold no more; they serve both ports
DRIVERS = ("auto", "af_xdp", "af_packet")  # of kernel interfaces
FLOW_HASHES = ("fnv", "aes")
IDLE_MODES = ("adaptive", "busy")
SIDES = ("internal", "external")

# What the core's arrays hold; see nat.h and port_pool_create().
MAX_ROUTES = 64
MAX_RANGES = 64
MAX_SESSIONS = 1 << 24
MAX_STATIC_NEIGHBOURS = 1024  # per port


@dataclass(frozen=True, slots=True)
class Route:
    """``prefix`` is reached through ``gateway``, whose MAC may be given (6 bytes) and is else learned."""

    prefix: IPv4Network
    gateway: IPv4Address
    gateway_mac: bytes | None = None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A static ARP entry; ``mac`` is 6 bytes."""

    address: IPv4Address
    mac: bytes


@dataclass(frozen=True, slots=True)
class Port:
    """One interface; ``name`` and ``side`` are ``"internal"`` or ``"external"``, ``mtu`` counts IP bytes."""

    name: str
    side: str
    device: str
    address: IPv4Interface
    mac: bytes | None = None
    gateway: IPv4Address | None = None
    gateway_mac: bytes | None = None
    mtu: int = 1500
    vlan: int = 0  # untagged
    driver: str = "auto"
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds without a packet after which a session ends."""

    udp: int = 300
    tcp_established: int = 7440
    tcp_transitory: int = 240
    icmp: int = 60


@dataclass(frozen=True, slots=True)
class Limits:
    """What one inside host may have, and the whole NAT's new sessions per second; 0 is no limit."""

    sessions_per_host: int = 0
    mappings_per_host: int = 0
    new_sessions_per_second: int = 0


@dataclass(frozen=True, slots=True)
class Nat:
    """Behaviour in the terms of RFC 4787: ``mapping`` is one of MAPPINGS, ``filtering`` of FILTERINGS."""

    pool: Pool
    mapping: str = MAPPINGS[0]
    filtering: str = FILTERINGS[0]
    flow_hash: str = FLOW_HASHES[0]
    max_sessions: int = 65536
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Workers:
    """CPUs that carry packets, a worker on each, and what they do when there are none."""

    cores: tuple[int, ...] = (0,)
    idle: str = IDLE_MODES[0]


@dataclass(frozen=True, slots=True)
class Control:
    """The unix socket of ``tandem-nat show``."""

    socket: Path


@dataclass(frozen=True, slots=True)
class Config:
    """A whole, valid configuration. ``ports`` is (internal, external)."""

    instance: str
    ports: tuple[Port, ...]
    nat: Nat
    workers: Workers
    control: Control
    peer: Peer | None = None
    heartbeat: Heartbeat | None = None
    switch: Switch | None = None
    virtual: Virtual | None = None
    offload: Offloading | None = None
    mark: str = MARKS[0]  # what tells the sides apart where both ports are one device

    @property
    def inside_by_dscp(self) -> IPv4Network | None:
        """The internal subnet, where the sides of one device are told apart by DSCP and not by VLAN."""
        return self.ports[0].address.network if self.mark == "dscp" else None

    @property
    def number(self) -> int:
        """The instance in session ids (8 bits): 1 a server, 2 a switch agent, or the secondary of two servers."""
        twin = self.peer.twin if self.peer else None
        return 2 if self.switch or (twin and not twin.primary) else 1

    @property
    def slices(self) -> int:
        """Parts of all hosts and ports: each worker of a server has one, an agent's core has them all."""
        return self.nat.pool.slices or (1 if self.switch else len(self.workers.cores))


# Every key there is, by section. The first value says whether it must be there.
KEYS: Mapping[str, Mapping[str, bool]] = {
    "": {
        "instance": True,
        "ports": True,
        "nat": True,
        "workers": False,
        "control": False,
        "peer": False,
        "heartbeat": False,
        "switch": False,
        "virtual": False,
        "offload": False,
    },
    "ports": {"internal": True, "external": True, "mark": False},
    "port": {
        "device": False,  # a server needs it, a switch agent has none
        "address": True,
        "gateway": False,
        "gateway_mac": False,
        "mac": False,
        "mtu": False,
        "vlan": False,
        "driver": False,
        "routes": False,
        "neighbours": False,
    },
    "route": {"prefix": True, "gateway": True, "mac": False},
    "neighbour": {"address": True, "mac": True},
    "nat": {
        "pool": True,
        "mapping": False,
        "filtering": False,
        "flow_hash": False,
        "max_sessions": False,
        "timeouts": False,
        "limits": False,
    },
    "pool": {
        "addresses": True,
        "ports": False,
        "port_preservation": False,
        "parity": False,
        "quarantine": False,
        "quarantine_ports": False,
        "slices": False,
    },
    "timeouts": {"udp": False, "tcp_established": False, "tcp_transitory": False, "icmp": False},
    "limits": {"sessions_per_host": False, "mappings_per_host": False, "new_sessions_per_second": False},
    "workers": {"cores": False, "idle": False},
    "control": {"socket": False},
    **PAIR_KEYS,
}


_NO_ADDRESS = IPv4Address(0)
_NO_MAC = bytes(6)


def _read_port(side: str, section: Section) -> Port:
    reader = section.reader
    routes = []
    for path, item in section.items("routes", MAX_ROUTES):
        part = reader.section(path, item, "route")
        prefix = part.get("prefix", a_network, IPv4Network(0))
        routes.append(
            Route(prefix, part.get("gateway", an_address, _NO_ADDRESS), part.get("mac", a_mac, None))
        )
    neighbours = []
    for path, item in section.items("neighbours", MAX_STATIC_NEIGHBOURS):
        part = reader.section(path, item, "neighbour")
        neighbours.append(
            Neighbour(part.get("address", an_address, _NO_ADDRESS), part.get("mac", a_mac, _NO_MAC))
        )
    return Port(
        name=side,
        side=side,
        device=section.get("device", a_device, ""),
        address=section.get("address", an_interface, IPv4Interface(0)),
        mac=section.get("mac", a_mac, None),
        gateway=section.get("gateway", an_address, None),
        gateway_mac=section.get("gateway_mac", a_mac, None),
        mtu=section.get("mtu", integer(576, 9000), 1500),
        vlan=section.get("vlan", integer(1, 4094), 0),
        driver=section.get("driver", choice(DRIVERS), "auto"),
        routes=tuple(routes),
        neighbours=tuple(neighbours),
    )


def _check_port(reader: Reader, port: Port) -> None:
    """What must hold among the values of one port."""
    at = f"ports.{port.name}"
    if port.device and reader.good(f"{at}.device", f"{at}.driver"):
        if fault := devargs.fault_of(port.device):
            reader.fault(f"{at}.device", fault)
        elif fault := devargs.fault_of(port.device, port.driver):
            reader.fault(f"{at}.driver", fault)

    def on_link(path: str, address: IPv4Address) -> None:
        if reader.good(path, f"{at}.address"):
            reader.check(path, lambda: host_in(address, port.address.network))
            if address == port.address.ip:
                reader.fault(path, f"{address} is this port's own address")

    macs: dict[IPv4Address, bytes] = {}

    def one_mac(path: str, address: IPv4Address, mac: bytes | None) -> None:
        if mac is not None and reader.good(path) and macs.setdefault(address, mac) != mac:
            reader.fault(path, f"{address} has the MAC {macs[address].hex(':')} elsewhere on this port")

    prefixes: set[IPv4Network] = set()
    if port.gateway:
        on_link(f"{at}.gateway", port.gateway)
        one_mac(f"{at}.gateway_mac", port.gateway, port.gateway_mac)
        prefixes.add(IPv4Network("0.0.0.0/0"))
    elif port.gateway_mac and reader.good(f"{at}.gateway"):
        reader.fault(f"{at}.gateway_mac", "there is no gateway that it could be the MAC of")
    for i, route in enumerate(port.routes):
        path = f"{at}.routes[{i}]"
        on_link(f"{path}.gateway", route.gateway)
        one_mac(f"{path}.mac", route.gateway, route.gateway_mac)
        if not reader.good(f"{path}.prefix", f"{at}.address"):
            continue
        if route.prefix in prefixes:
            reader.fault(f"{path}.prefix", f"{route.prefix} has a route on this port already")
        elif route.prefix == port.address.network:
            reader.fault(
                f"{path}.prefix", f"{route.prefix} is the port's own subnet, reached without a gateway"
            )
        prefixes.add(route.prefix)
    static: set[IPv4Address] = set()
    for i, neighbour in enumerate(port.neighbours):
        path = f"{at}.neighbours[{i}]"
        on_link(f"{path}.address", neighbour.address)
        if not reader.good(f"{path}.address"):
            continue
        if neighbour.address in static:
            reader.fault(f"{path}.address", f"{neighbour.address} is listed twice")
        static.add(neighbour.address)
        one_mac(f"{path}.mac", neighbour.address, neighbour.mac)


def _check_pool(reader: Reader, located: list[Located], config: Config) -> None:
    pool = config.nat.pool
    if reader.good("nat.pool.slices", "workers.cores"):
        if not config.switch and config.slices != len(config.workers.cores):
            reader.fault("nat.pool.slices", f"{config.slices}, and `workers.cores` has {len(config.workers.cores)}: "
                         "each worker has a slice, so a server needs no `slices`")  # fmt: skip
        else:
            check_slices(reader, pool, config.slices)
    at = "nat.pool.addresses"
    if reader.good(at) and len(pool.ranges) > MAX_RANGES:
        reader.fault(at, f"{len(pool.ranges)} separate ranges, and {MAX_RANGES} at most are possible")
    if config.peer is not None and len(pool.ranges) * len(pool.port_ranges) > MAX_RANGES:
        reader.fault("nat.pool.ports", f"{len(pool.ranges)} address ranges with {len(pool.port_ranges)} port "
                     f"ranges each, and {MAX_RANGES} in all are possible with a peer")  # fmt: skip
    if pool.n_addresses > MAX_POOL_ADDRESSES:
        reader.fault(at, f"{pool.n_addresses} addresses, and {MAX_POOL_ADDRESSES} at most are possible")
    internal, external = config.ports
    forbidden: list[tuple[IPv4Address, str]] = []
    if reader.good("ports.external.address"):
        subnet = external.address.network
        if subnet.prefixlen < 31:
            forbidden.append((subnet.network_address, f"the network address of the external subnet {subnet}"))
            forbidden.append(
                (subnet.broadcast_address, f"the broadcast address of the external subnet {subnet}")
            )
    if external.gateway:
        forbidden.append((external.gateway, "the external gateway"))
    forbidden += [(route.gateway, "the gateway of an external route") for route in external.routes]
    forbidden += [(neighbour.address, "an external neighbour") for neighbour in external.neighbours]
    faults = {address: what for address, what in forbidden if address != _NO_ADDRESS}
    inside = internal.address.network if reader.good("ports.internal.address") else None
    for first, last, path in located:
        for address, what in faults.items():
            if first <= int(address) <= last:
                reader.fault(path, f"{address} is {what}")
        if inside and first <= int(inside.broadcast_address) and last >= int(inside.network_address):
            reader.fault(path, f"overlaps the internal subnet {inside}")


def parse(mapping: object, source: str = "config") -> Config:
    """Reads a configuration that is already a mapping, as ``yaml.safe_load`` gives it.

    ``source`` names it in messages.  Raises ConfigError with every problem, never anything else.
    """
    reader = Reader(KEYS)
    root = reader.section("", mapping, "")
    if not isinstance(mapping, Mapping):
        raise ConfigError(reader.problems, source)
    instance = root.get("instance", an_instance, "")
    sides = root.section("ports", "ports")
    ports = tuple(_read_port(side, sides.section(side, "port")) for side in SIDES)
    nat = root.section("nat", "nat")
    pool_section = nat.section("pool", "pool")
    located = read_addresses(pool_section)
    pool = read_pool(reader, pool_section, located)
    timeouts, limits = nat.section("timeouts", "timeouts"), nat.section("limits", "limits")
    workers, control = root.section("workers", "workers"), root.section("control", "control")
    present = {
        name: root.section(name, name)
        for name in ("peer", "heartbeat", "switch", "virtual", "offload")
        if name in root.values
    }
    config = Config(
        instance=instance,
        ports=ports,
        nat=Nat(
            pool=pool,
            mapping=nat.get("mapping", choice(MAPPINGS), MAPPINGS[0]),
            filtering=nat.get("filtering", choice(FILTERINGS), FILTERINGS[0]),
            flow_hash=nat.get("flow_hash", choice(FLOW_HASHES), FLOW_HASHES[0]),
            max_sessions=nat.get("max_sessions", integer(1, MAX_SESSIONS), 65536),
            timeouts=Timeouts(
                udp=timeouts.get("udp", integer(1, MAX_TIMEOUT), 300),
                tcp_established=timeouts.get("tcp_established", integer(1, MAX_TIMEOUT), 7440),
                tcp_transitory=timeouts.get("tcp_transitory", integer(1, MAX_TIMEOUT), 240),
                icmp=timeouts.get("icmp", integer(1, MAX_TIMEOUT), 60),
            ),
            limits=Limits(
                sessions_per_host=limits.get("sessions_per_host", integer(0, MAX_SESSIONS), 0),
                mappings_per_host=limits.get("mappings_per_host", integer(0, MAX_SESSIONS), 0),
                new_sessions_per_second=limits.get("new_sessions_per_second", integer(0, 10**8), 0),
            ),
        ),
        workers=Workers(
            cores=workers.get("cores", the_cores, (0,)),
            idle=workers.get("idle", choice(IDLE_MODES), IDLE_MODES[0]),
        ),
        control=Control(control.get("socket", a_socket, Path(f"/run/tandem-nat/{instance}.sock"))),
        peer=read_peer(present["peer"]) if "peer" in present else None,
        heartbeat=read_heartbeat(present["heartbeat"]) if "heartbeat" in present else None,
        switch=read_switch(present["switch"]) if "switch" in present else None,
        virtual=Virtual(present["virtual"].get("mac", a_mac, _NO_MAC)) if "virtual" in present else None,
        mark=sides.get("mark", choice(MARKS), MARKS[0]),
        offload=read_offload(present["offload"]) if "offload" in present else None,
    )
    _check(reader, config, located)
    check_pair(reader, config.peer, config.heartbeat, config.switch, config.virtual, config.offload)
    if config.switch is not None:
        check_link(reader, config.switch, [port.vlan for port in ports])
        check_nat(reader, config.switch, config.peer.partition if config.peer else "all_peer")
        if "mark" in sides.values:
            reader.fault(
                "ports.mark", "a switch agent has no devices: the link to the server is `switch.mark`"
            )
    for side in config.ports:
        path = f"ports.{side.name}"
        if config.switch is None and not side.device and reader.good(f"{path}.device"):
            reader.fault(f"{path}.device", "missing")
        if config.switch is not None and side.device:
            reader.fault(f"{path}.device", "a switch agent has no devices: its ports are `switch.ports`")
        if config.virtual is not None and side.mac is not None:
            reader.fault(f"{path}.mac", "the MAC is that of `virtual`")
    if reader.problems:
        raise ConfigError(reader.problems, source)
    return config


def _check(reader: Reader, config: Config, located: list[Located]) -> None:
    internal, external = config.ports
    for port in config.ports:
        _check_port(reader, port)
        largest = max(internal.mtu, external.mtu)
        if port.driver == "af_xdp" and largest > MAX_AF_XDP_MTU:
            reader.fault(f"ports.{port.name}.driver", f"an MTU of {largest} is more than AF_XDP's {MAX_AF_XDP_MTU}"
                         " (both ports share their buffers); auto or af_packet carries it")  # fmt: skip
    if internal.device and internal.device == external.device:
        _check_shared_device(reader, internal, external, config.mark)
    elif (
        config.mark == "dscp"
        and external.device
        and reader.good("ports.internal.device", "ports.external.device")
    ):
        reader.fault("ports.mark", "dscp is for ports on one device, and these are on two")
    if reader.good("ports.internal.address", "ports.external.address"):
        inside, outside = internal.address.network, external.address.network
        if inside.overlaps(outside):
            reader.fault("ports.external.address", f"{outside} overlaps the internal subnet {inside}")
    routes = sum(1 + (port.gateway is not None) + len(port.routes) for port in config.ports)
    if routes > MAX_ROUTES:
        reader.fault(
            "ports", f"{routes} routes with subnets and gateways, and {MAX_ROUTES} at most are possible"
        )
    _check_pool(reader, located, config)


def _check_shared_device(reader: Reader, internal: Port, external: Port, mark: str) -> None:
    """One device for both ports: their VLANs tell them apart, or DSCP; MAC and driver are the device's."""
    at, device = "ports.external", external.device
    for port in (internal, external):
        if mark == "dscp" and port.vlan:
            reader.fault(
                f"ports.{port.name}.vlan", "the link carries no tags where DSCP tells the sides apart"
            )
    if mark == "vlan" and internal.vlan == external.vlan and reader.good(f"{at}.vlan", "ports.internal.vlan"):
        reader.fault(f"{at}.device", f"{device} is the internal port's device too: they need different VLANs, "
                     "or `ports.mark: dscp`")  # fmt: skip
    for key in ("mac", "driver"):
        same = getattr(internal, key) == getattr(external, key)
        if not same and reader.good(f"{at}.{key}", f"ports.internal.{key}"):
            reader.fault(f"{at}.{key}", f"the internal port has another one, and both are on {device}")


def load(path: str | Path) -> Config:
    """Reads a YAML file. Raises ConfigError with every problem, also when the file cannot be read at all."""
    return parse(load_yaml(path), str(path))


# --- what follows from it ---------------------------------------------------------------------------------


def to_core(config: Config, macs: Sequence[bytes], *, epoch: int = 0) -> CoreConfig:
    """The configuration of a core for everything; that of several workers is divided (nat_fastpath/cores.py).

    ``macs`` has the 6 bytes of each device's own MAC, in the order of ``config.ports``; they are used where
    the configuration gives none.  ``epoch`` (20 bit) tells the identities of one start from those of another.
    Raises ValueError when there is not one MAC for each port.
    """
    routes: list[RouteConfig] = []
    neighbours: list[NeighbourConfig] = []
    on_link = 0
    for i, port in enumerate(config.ports):
        subnet = port.address.network
        on_link += subnet.num_addresses
        routes.append(RouteConfig(subnet.network_address, subnet.prefixlen, i))
        if port.gateway:
            routes.append(RouteConfig(IPv4Address(0), 0, i, port.gateway, port.gateway_mac))
        routes += [
            RouteConfig(
                route.prefix.network_address, route.prefix.prefixlen, i, route.gateway, route.gateway_mac
            )
            for route in port.routes
        ]
        neighbours += [NeighbourConfig(neighbour.address, i, neighbour.mac) for neighbour in port.neighbours]
    timeouts, limits, pool = config.nat.timeouts, config.nat.limits, config.nat.pool
    if config.virtual:
        macs = [config.virtual.mac] * len(config.ports)
    peer = config.peer if config.peer and config.peer.mode != "off" else None
    hold = peer.hold if peer else None
    tags = config.switch is None  # OpenFlowDataPlane adds and removes those of an agent
    return CoreConfig(
        ports=tuple(
            PortConfig(port.side, port.mac or mac, port.address.ip, port.mtu, port.vlan if tags else 0)
            for port, mac in zip(config.ports, macs, strict=True)
        ),
        pool=tuple(PoolRange(first, last, (1, 65535), pool.ports) for first, last in pool.ranges),
        routes=tuple(routes),
        neighbours=tuple(neighbours),
        port_ranges=pool.port_ranges if len(pool.port_ranges) > 1 else (),
        port_preservation=pool.port_preservation,
        port_parity=pool.parity,
        quarantine=pool.quarantine,
        quarantine_ports=pool.quarantine_ports,
        flow_hash=config.nat.flow_hash,
        mapping=config.nat.mapping,
        filtering=config.nat.filtering,
        max_sessions=config.nat.max_sessions,
        max_neighbours=min(max(4096, on_link), 65534),  # every address on a link can be a next hop
        sessions_per_host=limits.sessions_per_host,
        mappings_per_host=limits.mappings_per_host,
        new_sessions_rate=limits.new_sessions_per_second,
        udp_timeout=timeouts.udp,
        tcp_established_timeout=timeouts.tcp_established,
        tcp_transitory_timeout=timeouts.tcp_transitory,
        icmp_timeout=timeouts.icmp,
        instance=config.number,
        epoch=epoch,
        n_slices=config.slices if config.slices > 1 else 0,
        slice=None if config.slices > 1 else 0,
        # an agent's packets wait for their rules on the switch, with a peer or without
        synchronous=config.switch is not None or (peer is not None and peer.mode == "synchronous"),
        hold=hold.ms / 1000 if hold else 1.0,
        max_held=hold.packets if hold else 1024,
    )
