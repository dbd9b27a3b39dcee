# SPDX-License-Identifier: Apache-2.0
"""The sections of the configuration that make a NAT half of a pair: peer, heartbeat, switch, virtual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from nat_control.config_reader import (
    MAX_SOCKET_PATH,
    Reader,
    Section,
    choice,
    flag,
    integer,
    shown,
    text_like,
)
from nat_control.tls import Tls

MODES = ("off", "asynchronous", "synchronous")
PARTITIONS = ("all_peer", "new_at_peer", "by_protocol", "all_local")
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
ON_LIMIT = ("drop",)
BARRIERS = ("trusted", "probe")
FAILOVERS = ("rules", "group")
NATS = ("rules", "conntrack")
MARKS = ("vlan", "dscp")  # what tells the sides apart on a link that both share
MAX_OPENFLOW_PORT = 65279
TLS_PLACE = "tls:"
WITH = ("switch", "server")
ROLES = ("primary", "secondary")
ON_SPLIT = ("primary", "both")
RETURNS = ("manual", "automatic")

Address = tuple[str, int]  # host and port


@dataclass(frozen=True, slots=True)
class Hold:
    """Bounds of output commit: packets that wait for the peer, how long (ms), and what happens then."""

    packets: int = 1024
    ms: int = 50
    on_limit: str = ON_LIMIT[0]


@dataclass(frozen=True, slots=True)
class Twin:
    """What makes a server one of two, and not the server of a switch; see nat_control/standby.py."""

    primary: bool
    on_split: str = ON_SPLIT[0]
    returns: str = RETURNS[0]
    probe_ms: int = 5


@dataclass(frozen=True, slots=True)
class Peer:
    """The sync channel; one side listens, the other connects. ``plain``: without TLS over a network that is trusted."""

    listen: Address | None
    connect: Address | None
    mode: str = "synchronous"
    partition: str = PARTITIONS[0]
    local_protocols: tuple[str, ...] = ()
    hold: Hold = Hold()
    tls: Tls | None = None
    plain: bool = False
    twin: Twin | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """``connect`` is the peer's address, learned from its heartbeats where it is None; ``key`` has 16 bytes."""

    listen: Address
    connect: Address | None
    interval_ms: float = 2.0
    misses: int = 3
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class SwitchPorts:
    """OpenFlow port numbers; 0: there is no server. One link to it: both of its ports are that."""

    internal: int
    external: int
    server_internal: int = 0
    server_external: int = 0

    @property
    def one_link(self) -> bool:
        return self.server_internal == self.server_external != 0


@dataclass(frozen=True, slots=True)
class Switch:
    """``openflow`` and ``takeover`` are where the switch connects to, twice: tls:ADDRESS:PORT, unix:PATH or ADDRESS:PORT.

    ``plain``: the last of these also where the address is not on loopback, over a network that is trusted.
    ``ovs`` is the run directory, or control socket, of an Open vSwitch that the agent may manage. ``mark`` and ``tags`` (inside,
    outside; 0 untagged) are of the one link to the server. ``failover``: what goes over when a link to it is lost, the agent by
    its rules or, before it and without it, the switch by a group. ``nat``: sessions are rules, or entries of Open vSwitch's
    connection tracking. ``state`` is a directory for what is remembered over a reboot.
    """

    openflow: str
    takeover: str
    datapath_id: int
    ports: SwitchPorts
    barrier: str = BARRIERS[0]
    max_flows: int = 100_000
    ovs: Path | None = None
    tls: Tls | None = None
    plain: bool = False
    mark: str = MARKS[0]
    tags: tuple[int, int] = (0, 0)
    failover: str = FAILOVERS[0]
    nat: str = NATS[0]
    state: Path | None = None


@dataclass(frozen=True, slots=True)
class Virtual:
    """What both halves are known by."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class Offloading:
    """From ``packets_per_second`` on, and ``age_seconds`` old, a session goes to the switch; below
    ``keep_packets_per_second`` it comes back. ``max`` sessions at once, a look each ``interval_seconds``."""

    packets_per_second: int
    keep_packets_per_second: int
    age_seconds: int = 10
    interval_seconds: int = 5
    max: int = 1000


KEYS: Mapping[str, Mapping[str, bool]] = {
    "peer": {
        "listen": False,
        "connect": False,
        "mode": False,
        "partition": False,
        "local_protocols": False,
        "hold": False,
        "tls": False,
        "plain": False,
        "with": False,
        "role": False,
        "on_split": False,
        "return": False,
        "probe_ms": False,
    },
    "tls": {"ca": True, "certificate": True, "key": True},
    "hold": {"packets": False, "ms": False, "on_limit": False},
    "heartbeat": {"listen": True, "connect": False, "interval_ms": False, "misses": False, "key": False},
    "switch": {
        "openflow": True,
        "takeover": False,
        "datapath_id": True,
        "barrier": False,
        "max_flows": False,
        "ovs": False,
        "tls": False,
        "plain": False,
        "ports": True,
        "mark": False,
        "tags": False,
        "failover": False,
        "nat": False,
        "state": False,
    },
    "switch_ports": {
        "internal": True,
        "external": True,
        "server_internal": False,
        "server_external": False,
        "server": False,
    },
    "tags": {"internal": False, "external": False},
    "virtual": {"mac": True},
    "offload": {
        "packets_per_second": True,
        "keep_packets_per_second": False,
        "age_seconds": False,
        "interval_seconds": False,
        "max": False,
    },
}

_listener = text_like(r"\d{1,3}(?:\.\d{1,3}){3}:\d{1,5}", "ADDRESS:PORT, such as 127.0.0.1:7000")
_openflow = text_like(
    r"(?:tls:)?\d{1,3}(?:\.\d{1,3}){3}:\d{1,5}|unix:/[!-~]{1,100}",
    "tls:ADDRESS:PORT, unix:/PATH or ADDRESS:PORT, such as 127.0.0.1:6653",
)
_path = text_like(r"/[!-~]{1,100}", "an absolute path, such as /var/run/openvswitch")
_hexadecimal = text_like(r"[0-9A-Fa-f]{1,16}", "1 to 16 hexadecimal digits")
_key = text_like(r"[0-9A-Fa-f]{32}", "32 hexadecimal digits, such as openssl rand -hex 16 gives")


def _address(value: object) -> Address:
    host, _, port = _listener(value).rpartition(":")
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"{shown(value)} is not allowed: a port is from 1 to 65535")
    return str(IPv4Address(host)), int(port)


def _place(value: object) -> str:
    text = _openflow(value)
    if text.startswith("unix:"):
        return text
    host, port = _address(text.removeprefix(TLS_PLACE))
    return f"{TLS_PLACE if text.startswith(TLS_PLACE) else ''}{host}:{port}"


def _datapath_id(value: object) -> int:
    number = int(_hexadecimal(value), 16)
    if not number:
        raise ValueError(f"{shown(value)} is no datapath id: ovs-vsctl get bridge br0 datapath_id tells it")
    return number


def _interval(value: object) -> float:
    if type(value) not in (int, float) or not 0.1 <= value <= 10_000:  # type: ignore[operator]
        raise ValueError(f"{shown(value)} is no number of milliseconds from 0.1 to 10000")
    return float(value)  # type: ignore[arg-type]


def _other_place(place: str) -> str:
    """Beside the first: the next port, or a path that begins like it."""
    if place.startswith("unix:"):
        if len(f"{place}-takeover") - len("unix:") > MAX_SOCKET_PATH:
            raise ValueError(f"missing: `openflow` with -takeover has more than {MAX_SOCKET_PATH} bytes")
        return f"{place}-takeover"
    host, _, port = place.rpartition(":")
    if int(port) == 65535:
        raise ValueError("missing: there is no port after the 65535 of `openflow`")
    return f"{host}:{int(port) + 1}"


def read_peer(section: Section) -> Peer:
    hold = section.section("hold", "hold")
    mode = section.get("mode", choice(MODES), "synchronous")
    given = ("listen" in section.values) + ("connect" in section.values)
    if (given == 2 or (given == 0 and mode != "off")) and section.reader.good(section.at):
        section.reader.fault(section.at, "exactly one of `listen` and `connect` is needed")
    return Peer(
        listen=section.get("listen", _address, None),
        connect=section.get("connect", _address, None),
        mode=mode,
        partition=_partition(section),
        local_protocols=section.get("local_protocols", _protocols, ()),
        hold=Hold(
            packets=hold.get("packets", integer(1, 16384), 1024),
            ms=hold.get("ms", integer(1, 10_000), 50),
            on_limit=hold.get("on_limit", choice(ON_LIMIT), ON_LIMIT[0]),
        ),
        tls=_read_tls(section.section("tls", "tls")) if "tls" in section.values else None,
        plain=section.get("plain", flag, False),
        twin=_read_twin(section),
    )


def _partition(section: Section) -> str:
    """With what depends on it: who reads `local_protocols` needs the one that is about them."""
    name = section.get("partition", choice(PARTITIONS), PARTITIONS[0])
    given = "local_protocols" in section.values
    if section.reader.good(section.path("partition")) and given != (name == "by_protocol"):
        section.reader.fault(
            section.path("local_protocols"),
            "only `partition: by_protocol` has use for it"
            if given
            else "missing: by_protocol needs the protocols that the switch carries, such as [udp]",
        )
    return name


def _protocols(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{shown(value)} is no list of protocols, such as [udp]")
    if strange := [one for one in value if one not in PROTOCOLS]:
        raise ValueError(f"{shown(strange[0])} is none of: {', '.join(PROTOCOLS)}")
    if not 0 < len(set(value)) < len(PROTOCOLS) or len(set(value)) < len(value):
        raise ValueError("one or two of icmp, tcp, udp, each once; for all of them there is `all_local`")
    return tuple(sorted(value))


def _read_twin(section: Section) -> Twin | None:
    """Present where the peer is a server like us."""
    fault = section.reader.fault
    twin = Twin(
        primary=section.get("role", choice(ROLES), "") == "primary",
        on_split=section.get("on_split", choice(ON_SPLIT), ON_SPLIT[0]),
        returns=section.get("return", choice(RETURNS), RETURNS[0]),
        probe_ms=section.get("probe_ms", integer(1, 1000), 5),
    )
    if section.get("with", choice(WITH), WITH[0]) == "server":
        if "role" not in section.values:
            fault(section.path("role"), "missing: of two servers one is `primary`, the other `secondary`")
        if section.values.get("partition", PARTITIONS[0]) != PARTITIONS[0]:
            fault(
                section.path("partition"),
                "of two servers one carries all: only `all_peer`, or `with: switch`, is possible",
            )
        return twin
    for key in ("role", "on_split", "return", "probe_ms"):
        if key in section.values and section.reader.good(section.path("with")):
            fault(section.path(key), "only of a pair of servers (`with: server`)")
    return None


def _read_tls(section: Section) -> Tls:
    nowhere = Path("/")
    return Tls(*(section.get(key, lambda value: Path(_path(value)), nowhere) for key in KEYS["tls"]))


def read_heartbeat(section: Section) -> Heartbeat:
    return Heartbeat(
        listen=section.get("listen", _address, ("127.0.0.1", 7001)),
        connect=section.get("connect", _address, None),
        interval_ms=section.get("interval_ms", _interval, 2.0),
        misses=section.get("misses", integer(1, 1000), 3),
        key=section.get("key", lambda value: bytes.fromhex(_key(value)), None),
    )


def read_switch(section: Section) -> Switch:
    ports = section.section("ports", "switch_ports")
    openflow = section.get("openflow", _place, "127.0.0.1:6653")
    takeover = section.get("takeover", _place, "")
    if "takeover" not in section.values:
        try:
            takeover = _other_place(openflow)
        except ValueError as error:
            section.reader.fault(section.path("takeover"), str(error))
    number = integer(1, MAX_OPENFLOW_PORT)
    numbers = [ports.get(key, number, 0) for key in KEYS["switch_ports"]]
    if one_link := numbers.pop():
        if any(numbers[2:]):
            section.reader.fault(
                "switch.ports.server", "there are server_internal and server_external: one link or two"
            )
        numbers[2:] = [one_link] * 2
    tags = section.section("tags", "tags")
    return Switch(
        openflow=openflow,
        takeover=takeover,
        datapath_id=section.get("datapath_id", _datapath_id, 0),
        barrier=section.get("barrier", choice(BARRIERS), BARRIERS[0]),
        max_flows=section.get("max_flows", integer(2, 10_000_000), 100_000),
        ovs=section.get("ovs", lambda value: Path(_path(value)), None),
        tls=_read_tls(section.section("tls", "tls")) if "tls" in section.values else None,
        plain=section.get("plain", flag, False),
        ports=SwitchPorts(*numbers),
        mark=section.get("mark", choice(MARKS), MARKS[0]),
        failover=section.get("failover", choice(FAILOVERS), FAILOVERS[0]),
        nat=section.get("nat", choice(NATS), NATS[0]),
        state=section.get("state", lambda value: Path(_path(value)), None),
        tags=(tags.get("internal", integer(1, 4094), 0), tags.get("external", integer(1, 4094), 0)),
    )


def read_offload(section: Section) -> Offloading:
    heavy = section.get("packets_per_second", integer(2, 10**8), 2)
    keep = section.get("keep_packets_per_second", integer(1, 10**8), heavy // 2)
    if keep >= heavy and section.reader.good(section.at):
        section.reader.fault(
            section.path("keep_packets_per_second"),
            f"{keep} is not below packets_per_second ({heavy}): a session would go back and forth",
        )
    return Offloading(
        heavy,
        keep,
        age_seconds=section.get("age_seconds", integer(0, 86_400), 10),
        interval_seconds=section.get("interval_seconds", integer(1, 3600), 5),
        max=section.get("max", integer(1, 65_535), 1000),
    )


def check_pair(
    reader: Reader,
    peer: Peer | None,
    heartbeat: Heartbeat | None,
    switch: Switch | None,
    virtual: Virtual | None,
    offload: Offloading | None = None,
) -> None:
    """What must hold among these sections; one that could not be read has no consequences for the others."""
    active = peer is not None and peer.mode != "off" and reader.good("peer.mode")
    if active and heartbeat is None:
        reader.fault("heartbeat", "missing: a peer needs it to learn of the other's death")
    if active and peer:
        _check_tls(reader, peer, heartbeat)
    if heartbeat is not None and peer is None:
        reader.fault("peer", "missing: a heartbeat is for the peer")
    lacking = active and peer and peer.connect and heartbeat and heartbeat.connect is None
    if lacking and reader.good("heartbeat.connect"):
        reader.fault(
            "heartbeat.connect", "missing: who connects to the peer says where its heartbeat listens"
        )
    if (active or switch) and virtual is None:
        reader.fault("virtual", "missing: both halves of a pair have one MAC")
    if offload and switch:
        reader.fault("offload", "is the server's: the switch moves what the server asks for")
    elif offload and peer and peer.twin:
        reader.fault("offload", "the peer is a server: there is no switch that could carry sessions")
    elif offload and not active:
        reader.fault("offload", "there is no peer whose switch could carry sessions")
    if switch is None:
        return
    if peer and peer.twin and reader.good("peer.with"):
        reader.fault("peer.with", "a switch agent's peer is a server by itself: leave it out")
    ports = switch.ports
    lacking = active and not (ports.server_internal and ports.server_external)
    if lacking and reader.good(*(f"switch.ports.{key}" for key in KEYS["switch_ports"])):
        reader.fault(
            "switch.ports",
            "server_internal and server_external are needed for the peer, or server where one link carries both sides",
        )
    servers = [ports.server_internal, *(() if ports.one_link else (ports.server_external,))]
    given = [port for port in (ports.internal, ports.external, *servers) if port]
    if len(set(given)) < len(given) and reader.good("switch.ports"):
        reader.fault("switch.ports", "one port has two uses")
    if switch.takeover == switch.openflow and reader.good("switch.takeover", "switch.openflow"):
        reader.fault(
            "switch.takeover", "must be another place than `openflow`: it is a connection of its own"
        )
    _check_places(reader, switch, peer)


def _check_places(reader: Reader, switch: Switch, peer: Peer | None) -> None:
    """Who reaches an OpenFlow listener commands the NAT: in plain only where nobody else can, or may."""
    places = {"switch.openflow": switch.openflow, "switch.takeover": switch.takeover}
    secret = [path for path, place in places.items() if place.startswith(TLS_PLACE)]
    if secret and not switch.tls and reader.good("switch.tls"):
        reader.fault("switch.tls", f"missing: {secret[0]} begins with {TLS_PLACE}")
    if switch.tls and not secret and reader.good(*places):
        reader.fault("switch.tls", f"neither `openflow` nor `takeover` begins with {TLS_PLACE}")
    if switch.tls and peer and peer.tls and switch.tls.ca == peer.tls.ca and reader.good("switch.tls"):
        reader.fault(
            "switch.tls.ca",
            "that of `peer.tls`: the switch could pass for the peer; tandem-nat certs makes another authority in a directory of its own",
        )
    for path, place in places.items():
        host = place.rpartition(":")[0]
        if not host or place.startswith(("unix:", TLS_PLACE)) or switch.plain or not reader.good(path):
            continue
        if not IPv4Address(host).is_loopback:
            reader.fault(
                path,
                f"{host} is not on loopback: {TLS_PLACE}{place} with `tls` is needed (tandem-nat certs makes the files), "
                "or `plain: true` where the network between is trusted",
            )


def check_link(reader: Reader, switch: Switch, vlans: Sequence[int]) -> None:
    """The link to the server, whose ``vlans`` on the networks' ports are those on it if nothing else is said."""
    if not reader.good("switch.mark", "switch.tags", "switch.ports"):
        return
    tagged = any(switch.tags)
    if tagged and not (switch.ports.one_link and switch.mark == "vlan"):
        reader.fault("switch.tags", "is for `switch.ports.server` with `mark: vlan`")
    elif switch.ports.one_link and switch.mark == "vlan":
        inside, outside = switch.tags if tagged else vlans
        if inside == outside:
            reader.fault(
                "switch.tags",
                "inside and outside need different VLANs on the link to the server, or `mark: dscp`",
            )
    elif switch.mark == "dscp" and not switch.ports.one_link:
        reader.fault("switch.mark", "dscp is for one link to the server (`switch.ports.server`)")
    if switch.failover == "group" and not switch.ports.server_internal:
        reader.fault("switch.failover", "a group watches the ports to a server, and there are none")


def check_nat(reader: Reader, switch: Switch, partition: str) -> None:
    if switch.nat != "conntrack" or not reader.good("switch.nat"):
        return
    if switch.ovs is None and reader.good("switch.ovs"):
        reader.fault(
            "switch.nat",
            "conntrack is for an Open vSwitch that the agent may manage: say where it is (`switch.ovs`)",
        )
    if switch.failover == "group":
        reader.fault("switch.nat", "conntrack does not go with `failover: group`: one of the two")
    if partition != "all_peer":
        reader.fault(
            "switch.nat",
            f"conntrack has no session in front of the server: with it peer.partition is all_peer, not {partition}",
        )


def _check_tls(reader: Reader, peer: Peer, heartbeat: Heartbeat | None) -> None:
    """Plain only where nobody else can listen, or where somebody has said that the network is trusted."""
    if peer.tls and peer.plain:
        reader.fault("peer.plain", "there is `tls`: one of the two")
    if peer.tls and heartbeat and heartbeat.key:
        reader.fault("heartbeat.key", "the sync channel has TLS, and brings a key of its own")
    key = "listen" if peer.listen else "connect"
    where = peer.listen or peer.connect
    if where and not peer.tls and not peer.plain and not IPv4Address(where[0]).is_loopback:
        reader.fault(
            f"peer.{key}",
            f"{where[0]} is not on loopback: `tls` is needed (tandem-nat certs makes the files), "
            "or `plain: true` where the network between is trusted",
        )
