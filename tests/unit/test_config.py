# SPDX-License-Identifier: Apache-2.0
"""The configuration: what is read, what is refused and in which words, and that the schema says the same."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from importlib.resources import files
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nat_control import config as c
from nat_fastpath.engine import Core, Verdict

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(files("nat_control").joinpath("config.schema.json").read_text())
SCHEMA_CHECK = jsonschema.Draft202012Validator(SCHEMA)
MACS = (b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02")

GOOD: dict[str, Any] = {
    "instance": "server-1",
    "ports": {
        "internal": {"device": "nat-in", "address": "10.0.0.1/24"},
        "external": {"device": "nat-out", "address": "198.51.100.1/24", "gateway": "198.51.100.254"},
    },
    "nat": {"pool": {"addresses": ["198.51.100.10-198.51.100.13"], "ports": "1024-65535"}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one value set, or removed when it is ``...``."""
    document = copy.deepcopy(GOOD)
    at = document
    *way, last = path.split(".")
    for key in way:
        at = at.setdefault(key, {})
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return document


def problems(document: object) -> dict[str, str]:
    """The messages by path; empty when the document is good."""
    try:
        c.parse(document)
    except c.ConfigError as error:
        return {problem.path: problem.message for problem in error.errors}
    return {}


# -- what is good ------------------------------------------------------------------------------------------


def test_server_example() -> None:
    config = c.load(ROOT / "examples/server.yaml")
    internal, external = config.ports
    assert (internal.name, internal.device, internal.address) == (
        "internal",
        "nat-in",
        IPv4Interface("10.0.0.1/24"),
    )
    assert external.gateway == IPv4Address("198.51.100.254")
    assert config.nat.pool.ranges == ((IPv4Address("198.51.100.10"), IPv4Address("198.51.100.13")),)
    assert config.nat.pool.ports == (1024, 65535)
    assert config.nat.max_sessions == 1_000_000
    assert config.nat.timeouts == c.Timeouts(300, 7440, 240, 60)
    assert config.workers == c.Workers((1,), "adaptive")
    assert config.control.socket == Path("/run/tandem-nat/server-1.sock")
    assert c.warnings(config) == ()


def test_routed_example() -> None:
    config = c.load(ROOT / "examples/routed.yaml")
    core = c.to_core(config, MACS)
    assert [(str(route.prefix), route.length, route.port, str(route.gateway)) for route in core.routes] == [
        ("10.0.0.0", 24, 0, "0"),
        ("10.1.0.0", 16, 0, "10.0.0.254"),
        ("10.2.0.0", 16, 0, "10.0.0.254"),
        ("192.168.7.0", 24, 0, "10.0.0.253"),
        ("203.0.113.0", 30, 1, "0"),
        ("0.0.0.0", 0, 1, "203.0.113.1"),
    ]
    assert core.ports[0].mac == bytes.fromhex("020000000101")  # the configuration's
    assert core.ports[1].mac == MACS[1]  # the device's
    assert core.ports[0].mtu == 1400
    assert core.routes[5].gateway_mac == bytes.fromhex("0200000002fe")
    assert [int(neighbour.address) for neighbour in core.neighbours] == [int(IPv4Address("10.0.0.20"))]
    (warning,) = c.warnings(config)
    assert warning.startswith("nat.pool.addresses: 198.51.100.16 is not on the external subnet")


def test_vlans_and_one_device_for_both_ports() -> None:
    document = changed(f"{INTERNAL}.vlan", 10)
    document["ports"]["external"] |= {"vlan": 20, "device": document["ports"]["internal"]["device"]}
    assert [port.vlan for port in c.to_core(c.parse(document), MACS).ports] == [10, 20]
    del document["ports"]["internal"]["vlan"]
    assert [port.vlan for port in c.to_core(c.parse(document), MACS).ports] == [0, 20]
    document["ports"]["internal"]["vlan"] = 20
    assert "different VLANs" in problems(document)["ports.external.device"]
    document["ports"]["internal"] |= {"vlan": 10, "mac": M1, "driver": "af_packet"}
    found = problems(document)
    assert set(found) == {"ports.external.mac", "ports.external.driver"}
    assert all("the internal port has another one" in message for message in found.values())


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_makes_a_core(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    SCHEMA_CHECK.validate(document)
    core = Core(c.to_core(c.load(path), MACS))
    assert core.burst([(0, bytes(60))], 1)[0].verdict == Verdict.DROP_NOT_FOR_US
    core.close()


def test_defaults_are_those_of_the_schema() -> None:
    nat = c.parse(GOOD).nat
    properties = SCHEMA["properties"]["nat"]["properties"]
    for name in ("mapping", "filtering", "flow_hash", "max_sessions"):
        assert getattr(nat, name) == properties[name]["default"]
    for name in ("timeouts", "limits"):
        for key, schema in properties[name]["properties"].items():
            assert getattr(getattr(nat, name), key) == schema["default"]
    for name in ("port_preservation", "parity", "quarantine", "quarantine_ports"):
        assert getattr(nat.pool, name) == properties["pool"]["properties"][name]["default"]
    assert "{}-{}".format(*nat.pool.ports) == properties["pool"]["properties"]["ports"]["default"]
    assert c.parse(changed("nat.pool", {"addresses": "198.51.100.10"})).nat.pool.ports == (1024, 65535)
    workers = SCHEMA["properties"]["workers"]["properties"]
    assert c.parse(GOOD).workers == c.Workers(tuple(workers["cores"]["default"]), workers["idle"]["default"])
    assert c.parse(GOOD).control.socket == Path("/run/tandem-nat/server-1.sock")


@pytest.mark.parametrize(
    ("written", "ranges"),
    [
        ("198.51.100.10", [(10, 10)]),
        ("198.51.100.10-198.51.100.13", [(10, 13)]),
        (" 198.51.100.10 - 198.51.100.13 , 198.51.100.20 ", [(10, 13), (20, 20)]),
        ("198.51.100.16/28", [(16, 31)]),
        (["198.51.100.20", "198.51.100.10"], [(10, 10), (20, 20)]),
        (["198.51.100.12-198.51.100.13", "198.51.100.10-198.51.100.11"], [(10, 13)]),
        ("198.51.100.1", [(1, 1)]),  # the port's own address may serve as the pool
    ],
)
def test_pool_addresses(written: object, ranges: list[tuple[int, int]]) -> None:
    pool = c.parse(changed("nat.pool.addresses", written)).nat.pool
    base = int(IPv4Address("198.51.100.0"))
    assert [(int(first) - base, int(last) - base) for first, last in pool.ranges] == ranges
    assert pool.n_addresses == sum(last - first + 1 for first, last in ranges)


def test_configurations_are_frozen() -> None:
    config = c.parse(GOOD)
    with pytest.raises(FrozenInstanceError):
        config.instance = "other"  # type: ignore[misc]
    assert hash(config) == hash(c.parse(copy.deepcopy(GOOD)))


def test_to_core_wants_a_mac_for_each_port() -> None:
    with pytest.raises(ValueError, match="shorter"):
        c.to_core(c.parse(GOOD), MACS[:1])


@pytest.mark.parametrize(("prefix", "neighbours"), [(24, 4096), (18, (1 << 14) + 256), (12, 65534)])
def test_every_address_of_a_link_can_be_a_next_hop(prefix: int, neighbours: int) -> None:
    config = c.parse(changed("ports.internal.address", f"10.0.0.1/{prefix}"))
    assert c.to_core(config, MACS).max_neighbours == neighbours


def test_warnings() -> None:
    document = changed(
        "nat.timeouts", {"udp": 119, "tcp_established": 7439, "tcp_transitory": 239, "icmp": 59}
    )
    del document["ports"]["external"]["gateway"]
    found = c.warnings(c.parse(document))
    assert [line.split(":")[0] for line in found] == [
        "nat.timeouts.udp",
        "nat.timeouts.tcp_established",
        "nat.timeouts.tcp_transitory",
        "nat.timeouts.icmp",
        "ports.external.gateway",
    ]
    assert "120 s of RFC 4787 REQ-5" in found[0]


# -- what is refused ---------------------------------------------------------------------------------------

INTERNAL, EXTERNAL = "ports.internal", "ports.external"
ROUTE = {"prefix": "10.1.0.0/16", "gateway": "10.0.0.254"}
M1, M2 = "02:00:00:00:00:01", "02:00:00:00:00:02"

# (path of the change, value, path of the problem, part of its message); all of this the schema says too
SHAPE = [
    ("instance", ..., "instance", "missing"),
    ("instance", 1, "instance", "write it in quotes"),
    ("ports.internal.driver", "xdp", "ports.internal.driver", "af_xdp"),
    ("instance", "a b", "instance", "not allowed"),
    ("instance", "", "instance", "not allowed"),
    ("instance", "x" * 65, "instance", "1 to 64"),
    ("ports", ..., "ports", "missing"),
    ("ports", [], "ports", "no mapping with the keys internal, external"),
    ("ports.interal", {}, "ports.interal", "did you mean internal?"),
    (INTERNAL, ..., INTERNAL, "missing"),
    (INTERNAL, None, INTERNAL, "nothing is no mapping"),
    (f"{INTERNAL}.device", ..., f"{INTERNAL}.device", "missing"),
    (f"{INTERNAL}.device", True, f"{INTERNAL}.device", "write it in quotes"),
    (f"{INTERNAL}.address", "10.0.0.1", f"{INTERNAL}.address", "length of its prefix"),
    (f"{INTERNAL}.adress", "10.0.0.1/24", f"{INTERNAL}.adress", "did you mean address?"),
    (f"{INTERNAL}.mtu", True, f"{INTERNAL}.mtu", "whole number from 576 to 9000"),
    (f"{INTERNAL}.mtu", 575, f"{INTERNAL}.mtu", "576"),
    (f"{INTERNAL}.mtu", 9001, f"{INTERNAL}.mtu", "9000"),
    (f"{INTERNAL}.mtu", "1500", f"{INTERNAL}.mtu", "'1500' is no whole number"),
    *(
        (f"{INTERNAL}.vlan", no, f"{INTERNAL}.vlan", "whole number from 1 to 4094")
        for no in (0, 4095, "7", True)
    ),
    (f"{INTERNAL}.mac", "02:00:00:00:00", f"{INTERNAL}.mac", "a MAC, such as"),
    (f"{INTERNAL}.mac", "01:00:00:00:00:00", f"{INTERNAL}.mac", "no unicast MAC"),
    (f"{INTERNAL}.routes", {}, f"{INTERNAL}.routes", "no list"),
    (f"{INTERNAL}.routes", [{**ROUTE, "via": 1}], f"{INTERNAL}.routes[0].via", "unknown key"),
    (f"{INTERNAL}.routes", [ROUTE, {"prefix": "10.2.0.0/16"}], f"{INTERNAL}.routes[1].gateway", "missing"),
    (f"{INTERNAL}.routes", [{}] * 65, f"{INTERNAL}.routes", "64 at most"),
    (f"{INTERNAL}.neighbours", [{"address": "10.0.0.9"}], f"{INTERNAL}.neighbours[0].mac", "missing"),
    ("nat", ..., "nat", "missing"),
    ("nat.pool", ..., "nat.pool", "missing"),
    ("nat.pool", {}, "nat.pool.addresses", "missing"),
    ("nat.pool.addresses", [], "nat.pool.addresses", "has no address"),
    ("nat.pool.addresses", "", "nat.pool.addresses", "IPv4 address"),
    ("nat.pool.addresses", 5, "nat.pool.addresses", "no list"),
    ("nat.pool.addresses", ["198.51.100.9", 5], "nat.pool.addresses[1]", "no text"),
    ("nat.pool.addresses", ["198.51.100.9", "x"], "nat.pool.addresses[1]", "such as 198.51.100.254"),
    ("nat.pool.addresses", "198.51.100.10-", "nat.pool.addresses", "IPv4 address"),
    ("nat.pool.ports", "all", "nat.pool.ports", "1024-65535"),
    ("nat.pool.ports", 0, "nat.pool.ports", "1024-65535"),
    ("nat.pool.ports", 65536, "nat.pool.ports", "1024-65535"),
    ("nat.pool.ports", [4000 + 2 * at for at in range(17)], "nat.pool.ports", "17 port ranges, and 1 to 16"),
    ("nat.pool.ports", [], "nat.pool.ports", "0 port ranges"),
    ("nat.pool.parity", "yes", "nat.pool.parity", "true or false"),
    ("nat.pool.port_preservation", 1, "nat.pool.port_preservation", "true or false"),
    ("nat.pool.quarantine", -1, "nat.pool.quarantine", "whole number from 0"),
    ("nat.flow_hash", "siphash", "nat.flow_hash", "fnv, aes"),
    ("nat.mapping", "endpoint-independant", "nat.mapping", "did you mean endpoint-independent?"),
    ("nat.filtering", None, "nat.filtering", "none of: address-and-port-dependent, address-dependent"),
    ("nat.max_sessions", 0, "nat.max_sessions", "from 1 to 16777216"),
    ("nat.max_sessions", (1 << 24) + 1, "nat.max_sessions", "from 1 to 16777216"),
    ("nat.max_session", 5, "nat.max_session", "did you mean max_sessions?"),
    ("nat.timeouts.udp", 0, "nat.timeouts.udp", "from 1 to"),
    ("nat.timeouts.udp", 1.5, "nat.timeouts.udp", "no whole number"),
    ("nat.timeouts.tcp", 5, "nat.timeouts.tcp", "unknown key; allowed: udp, tcp_established"),
    ("nat.limits.sessions_per_host", -1, "nat.limits.sessions_per_host", "from 0 to"),
    ("nat.limits.new_sessions_per_second", 10**9, "nat.limits.new_sessions_per_second", "from 0 to"),
    ("workers.cores", [1, 2, 1], "workers.cores", "CPU 1 is listed twice"),
    ("workers.cores", [], "workers.cores", "1 to 32 CPUs"),
    ("workers.cores", 1, "workers.cores", "1 to 32 CPUs"),
    ("workers.cores", [True], "workers.cores", "no whole number"),
    ("workers.idle", "sleepy", "workers.idle", "adaptive, busy"),
    ("control.socket", "run/x.sock", "control.socket", "absolute path"),
    ("control.socket", "/" + "x" * 107, "control.socket", "107 at most"),
]

# what a schema cannot say
MEANING = [
    (f"{INTERNAL}.address", "10.0.0.300/24", f"{INTERNAL}.address", "300"),
    (f"{INTERNAL}.address", "10.0.0.1/33", f"{INTERNAL}.address", "33"),
    (f"{INTERNAL}.address", "10.0.0.0/24", f"{INTERNAL}.address", "network or broadcast address"),
    (f"{INTERNAL}.address", "127.0.0.1/8", f"{INTERNAL}.address", "no unicast address"),
    (f"{INTERNAL}.address", "198.51.100.129/25", f"{EXTERNAL}.address", "overlaps the internal subnet"),
    (f"{INTERNAL}.device", "nat-out", f"{EXTERNAL}.device", "the internal port's device too"),
    (f"{EXTERNAL}.gateway", "198.51.101.254", f"{EXTERNAL}.gateway", "not on the port's subnet"),
    (f"{EXTERNAL}.gateway", "198.51.100.255", f"{EXTERNAL}.gateway", "broadcast"),
    (f"{EXTERNAL}.gateway", "198.51.100.1", f"{EXTERNAL}.gateway", "own address"),
    (f"{INTERNAL}.gateway_mac", M1, f"{INTERNAL}.gateway_mac", "no gateway"),
    (f"{INTERNAL}.mac", "00:00:00:00:00:00", f"{INTERNAL}.mac", "no unicast MAC"),
    (
        f"{INTERNAL}.routes",
        [{**ROUTE, "prefix": "10.1.0.1/16"}],
        f"{INTERNAL}.routes[0].prefix",
        "10.1.0.0/16",
    ),
    (f"{INTERNAL}.routes", [{**ROUTE, "gateway": "10.1.0.1"}], f"{INTERNAL}.routes[0].gateway", "not on"),
    (f"{INTERNAL}.routes", [ROUTE, ROUTE], f"{INTERNAL}.routes[1].prefix", "already"),
    (
        f"{INTERNAL}.routes",
        [{**ROUTE, "prefix": "10.0.0.0/24"}],
        f"{INTERNAL}.routes[0].prefix",
        "own subnet",
    ),
    (
        f"{INTERNAL}.routes",
        [{**ROUTE, "mac": M1}, {**ROUTE, "prefix": "10.2.0.0/16", "mac": M2}],
        f"{INTERNAL}.routes[1].mac",
        "has the MAC 02:00:00:00:00:01",
    ),
    (
        f"{INTERNAL}.routes",
        [{**ROUTE, "prefix": f"10.{i}.0.0/16"} for i in range(1, 63)],
        "ports",
        "65 routes with subnets and gateways, and 64 at most",
    ),
    (
        f"{INTERNAL}.neighbours",
        [{"address": "10.0.0.9", "mac": M1}] * 2,
        f"{INTERNAL}.neighbours[1].address",
        "listed twice",
    ),
    (
        f"{INTERNAL}.neighbours",
        [{"address": "10.9.0.9", "mac": M1}],
        f"{INTERNAL}.neighbours[0].address",
        "not on the port's subnet",
    ),
    ("nat.pool.addresses", "198.51.100.13-198.51.100.10", "nat.pool.addresses", "reversed"),
    ("nat.pool.addresses", "198.51.100.0/28", "nat.pool.addresses", "network address of the external"),
    ("nat.pool.addresses", "198.51.100.255", "nat.pool.addresses", "broadcast address of the external"),
    ("nat.pool.addresses", "198.51.100.254", "nat.pool.addresses", "external gateway"),
    ("nat.pool.addresses", "198.51.100.17/28", "nat.pool.addresses", "198.51.100.16/28 is meant"),
    ("nat.pool.addresses", "10.0.0.9", "nat.pool.addresses", "overlaps the internal subnet"),
    ("nat.pool.addresses", "224.0.0.1", "nat.pool.addresses", "no unicast"),
    ("nat.pool.addresses", "192.0.2.9,192.0.2.9", "nat.pool.addresses", "in the pool already"),
    ("nat.pool.addresses", ["192.0.2.1-192.0.2.9", "192.0.2.5"], "nat.pool.addresses[1]", "already"),
    ("nat.pool.addresses", [f"192.0.2.{i}" for i in range(1, 131, 2)], "nat.pool.addresses", "65 separate"),
    ("nat.pool.addresses", "20.0.0.0/16", "nat.pool.addresses", "65536 addresses, and 10922"),
    ("nat.pool.ports", "4000-5000, 5000-6000", "nat.pool.ports", "5000 is in two port ranges"),
    ("nat.pool.ports", "65535-1024", "nat.pool.ports", "the lower one first"),
    ("nat.pool.ports", "0-99999", "nat.pool.ports", "1024-65535"),
]


@pytest.mark.parametrize(("path", "value", "where", "message"), SHAPE + MEANING)
def test_refused(path: str, value: object, where: str, message: str) -> None:
    found = problems(changed(path, value))
    assert list(found) == [where]
    assert message in found[where]


def test_every_problem_at_once() -> None:
    document = changed("nat.mapping", "none")
    document["ports"]["internal"] |= {"mtu": 1, "gateway": "10.9.9.9"}
    document["ports"]["external"]["device"] = 7
    document["nat"]["pool"]["addresses"] = ["198.51.100.254", "nonsense", "10.0.0.4"]
    document["colour"] = "red"
    assert set(problems(document)) == {
        "colour",
        "ports.internal.mtu",
        "ports.internal.gateway",
        "ports.external.device",
        "nat.pool.addresses[0]",
        "nat.pool.addresses[1]",
        "nat.pool.addresses[2]",
        "nat.mapping",
    }


def test_an_unreadable_value_has_no_consequences() -> None:
    """One line about the address, and none about the gateway and the pool that were compared with it."""
    assert list(problems(changed(f"{EXTERNAL}.address", "198.51.100/24"))) == [f"{EXTERNAL}.address"]
    assert list(problems(changed("ports", {}))) == [INTERNAL, EXTERNAL]


def test_source_is_named() -> None:
    with pytest.raises(c.ConfigError, match=r"^a\.yaml: nat: missing$"):
        c.parse(changed("nat", ...), "a.yaml")


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"instance: a\nnat: [\n", "line 3, column 1", "broken YAML"),
        (
            b"instance: a\nports: {}\ninstance: b\n",
            "line 3, column 1",
            "'instance' stands here a second time",
        ),
        (b"nat:\n  pool: {ports: 1, ports: 2}\n", "line 2, column 20", "'ports' stands here a second time"),
        (b"", "line 1, column 1", "nothing is no mapping"),
        (b"- a\n", "line 1, column 1", "no mapping"),
        (b"a: 1\nb: \xff\n", "line 2, column 4", "UTF-8"),
        (b"a: 1\nb: \x07\n", "line 2, column 4", "does not allow"),
        (b"a: !!python/object:os.system {}\n", "line 1, column 4", "constructor"),
        (b"a: !!timestamp x\n", "", "cannot be read"),
        (b"a: " + b"9" * 5000, "", "cannot be read"),
        (b"a: &x [*x]\n", "line 1, column 8", "an alias within what has an anchor"),
        (b"[" * 20000, "line 1, column 33", "nested more than 32 deep"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, where: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(c.ConfigError) as caught:
        c.load(path)
    first = caught.value.errors[0]
    assert first.path == where
    assert message in first.message
    assert str(caught.value).startswith(f"{path}: ")


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(c.ConfigError, match=r"absent\.yaml: cannot be read: No such file or directory$"):
        c.load(tmp_path / "absent.yaml")
    with pytest.raises(c.ConfigError, match=r"cannot be read: Is a directory$"):
        c.load(tmp_path)


def test_macs_and_dates_need_no_quotes(tmp_path: Path) -> None:
    """YAML 1.1 takes the one for a number to the base of 60 and the other for a date."""
    path = tmp_path / "c.yaml"
    document = changed(f"{INTERNAL}.mac", "MAC")
    path.write_text(
        yaml.safe_dump(document).replace("MAC", "10:20:30:40:50:10").replace("server-1", "2026-01-01")
    )
    config = c.load(path)
    assert config.instance == "2026-01-01"
    assert config.ports[0].mac == bytes.fromhex("102030405010")


def test_off_needs_no_quotes(tmp_path: Path) -> None:
    """YAML 1.1 takes it for false."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "peer: {mode: off}\n")
    peer = c.load(path).peer
    assert peer is not None
    assert peer.mode == "off"


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    lines = yaml.safe_dump(changed("nat.timeouts", {"udp": 400})).replace("timeouts:", "timeouts: &t")
    path.write_text(lines.replace("udp: 400", "<<: {udp: 500, icmp: 61}\n    udp: 400"))
    assert c.load(path).nat.timeouts == c.Timeouts(udp=400, icmp=61)


# -- the schema --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "value", "where", "message"), SHAPE)
def test_schema_refuses_what_the_parser_refuses(path: str, value: object, where: str, message: str) -> None:
    assert not SCHEMA_CHECK.is_valid(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("instance", "x" * 64),
        (f"{INTERNAL}.mtu", 576),
        (f"{INTERNAL}.mtu", 9000),
        (f"{INTERNAL}.vlan", 1),
        (f"{INTERNAL}.vlan", 4094),
        (f"{INTERNAL}.device", "net_pcap0,rx_pcap=a b.pcap"),
        (f"{INTERNAL}.gateway", "10.0.0.254"),
        (f"{INTERNAL}.routes", [{**ROUTE, "mac": M1}]),
        (f"{INTERNAL}.neighbours", [{"address": "10.0.0.9", "mac": "0A:0b:00:00:00:01"}]),
        (f"{EXTERNAL}.gateway_mac", M1),
        ("nat.pool.addresses", "198.51.100.10 - 198.51.100.13 ,192.0.2.0/31"),
        ("nat.pool.ports", 4000),
        ("nat.pool.ports", "1-65535"),
        ("nat.pool.ports", "6000-7000, 1024-2000"),
        ("nat.pool.ports", [4000, "5000-5999"]),
        ("nat.pool.port_preservation", True),
        ("nat.pool.parity", True),
        ("nat.pool.quarantine", 0),
        ("nat.pool.quarantine_ports", 10),
        *(("nat.flow_hash", name) for name in c.FLOW_HASHES),
        ("nat.max_sessions", 1 << 24),
        ("nat.timeouts.udp", 30 * 86400),
        ("nat.limits", {"sessions_per_host": 1, "mappings_per_host": 2, "new_sessions_per_second": 10**8}),
        ("workers", {"cores": [1023, 0], "idle": "busy"}),
        ("control", {}),
        ("control.socket", "/" + "x" * 106),
        *(("nat.mapping", name) for name in c.MAPPINGS),
        *(("nat.filtering", name) for name in c.FILTERINGS),
    ],
)
def test_schema_accepts_what_the_parser_accepts(path: str, value: object) -> None:
    document = changed(path, value)
    assert problems(document) == {}
    SCHEMA_CHECK.validate(document)


def test_schema_and_parser_know_the_same_keys_and_choices() -> None:
    SCHEMA_CHECK.check_schema(SCHEMA)
    parts, nat = SCHEMA["$defs"], SCHEMA["properties"]["nat"]["properties"]
    by_kind = {
        "": SCHEMA,
        **{name: SCHEMA["properties"][name] for name in ("ports", "nat", "workers", "control")},
        **{
            name: SCHEMA["properties"][name] for name in ("peer", "heartbeat", "switch", "virtual", "offload")
        },
        **{name: nat[name] for name in ("pool", "timeouts", "limits")},
        **{
            name: parts[name]
            for name in ("port", "route", "neighbour", "hold", "tls", "switch_ports", "tags")
        },
    }
    assert by_kind.keys() == c.KEYS.keys()
    for kind, schema in by_kind.items():
        assert set(schema["properties"]) == set(c.KEYS[kind]), kind
        assert set(schema.get("required", ())) == {key for key, needed in c.KEYS[kind].items() if needed}, (
            kind
        )
        assert schema["additionalProperties"] is False
    assert tuple(nat["mapping"]["enum"]) == c.MAPPINGS
    assert tuple(parts["port"]["properties"]["driver"]["enum"]) == c.DRIVERS
    assert tuple(nat["filtering"]["enum"]) == c.FILTERINGS
    assert tuple(nat["flow_hash"]["enum"]) == c.FLOW_HASHES
    assert nat["pool"]["properties"]["ports"]["oneOf"][2]["maxItems"] == c.MAX_PORT_RANGES
    assert tuple(SCHEMA["properties"]["workers"]["properties"]["idle"]["enum"]) == c.IDLE_MODES
    assert nat["max_sessions"]["maximum"] == c.MAX_SESSIONS
    assert parts["seconds"]["maximum"] == c.MAX_TIMEOUT
    assert parts["port"]["properties"]["routes"]["maxItems"] == c.MAX_ROUTES
    assert parts["port"]["properties"]["neighbours"]["maxItems"] == c.MAX_STATIC_NEIGHBOURS


def test_reference_names_every_key() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    missing = {key for keys in c.KEYS.values() for key in keys if f"`{key}`" not in text}
    assert missing == set()


def test_limits_are_those_of_the_core() -> None:
    header = (ROOT / "nat_fastpath/core/nat.h").read_text()
    for name in ("MAX_ROUTES", "MAX_RANGES"):
        found = re.search(rf"#define NAT_{name} (\d+)u", header)
        assert found is not None
        assert int(found[1]) == getattr(c, name)


# -- anything at all ---------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=8)
    | st.sampled_from(["10.0.0.1/24", "10.0.0.9", "198.51.100.254", "1-2", M1, "busy", "0.0.0.0/0", "\x00"])
)
KEY = st.sampled_from(sorted({key for keys in c.KEYS.values() for key in keys})) | SCALARS.filter(
    lambda key: key == key
)


def nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(children, max_size=4) | st.dictionaries(KEY, children, max_size=5)


ANYTHING = st.recursive(SCALARS, nested, max_leaves=25)


def only_config_error(act: Callable[[], object]) -> None:
    """Whatever else is raised fails the test."""
    error = None
    try:
        act()
    except c.ConfigError as caught:
        error = caught
    if error:
        assert all(problem.message for problem in error.errors)
        assert str(error).count("\n") == len(error.errors) - 1


@given(ANYTHING)
def test_any_value_is_read_or_refused(value: object) -> None:
    only_config_error(lambda: c.parse(value))


PATHS = [
    *GOOD,
    *(f"{port}.{key}" for port in (INTERNAL, EXTERNAL) for key in c.KEYS["port"]),
    *(f"nat.{key}" for key in c.KEYS["nat"]),
    *(f"nat.{kind}.{key}" for kind in ("pool", "timeouts", "limits") for key in c.KEYS[kind]),
    *(f"{kind}.{key}" for kind in ("workers", "control") for key in c.KEYS[kind]),
    *(
        f"{kind}.{key}"
        for kind in ("peer", "heartbeat", "switch", "virtual", "offload")
        for key in c.KEYS[kind]
    ),
    *(f"peer.hold.{key}" for key in c.KEYS["hold"]),
    *(f"switch.ports.{key}" for key in c.KEYS["switch_ports"]),
]


@given(st.sampled_from(PATHS), ANYTHING | st.lists(st.dictionaries(KEY, SCALARS, max_size=3), max_size=3))
def test_any_value_anywhere_is_read_or_refused(path: str, value: object) -> None:
    only_config_error(lambda: c.parse(changed(path, value)))
