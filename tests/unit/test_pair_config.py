# SPDX-License-Identifier: Apache-2.0
"""The sections that make a NAT half of a pair."""

from __future__ import annotations

import copy
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from nat_control import config as c
from nat_control import pair_config
from switch_agent.agent import partition_of, pipeline_of
from switch_agent.pipeline import Partition
from tests.unit.test_config import GOOD, ROOT, SCHEMA, SCHEMA_CHECK, problems

PAIR = {
    "peer": {"connect": "127.0.0.1:7000"},
    "heartbeat": {"listen": "127.0.0.1:7002", "connect": "127.0.0.1:7001"},
    "virtual": {"mac": "02:00:5e:00:01:01"},
}
SWITCH = {
    "peer": {"listen": "127.0.0.1:7000", "mode": "asynchronous", "hold": {"packets": 9, "ms": 7}},
    "heartbeat": {"listen": "127.0.0.1:7001", "interval_ms": 2.5, "misses": 4, "key": "0f" * 16},
    "virtual": {"mac": "02:00:5e:00:01:01"},
    "switch": {
        "openflow": "127.0.0.1:6653",
        "datapath_id": "0000000000000001",
        "ports": {"internal": 1, "external": 2, "server_internal": 3, "server_external": 4},
    },
}
ONE_LINK = {"internal": 1, "external": 2, "server": 3}


TLS = {"ca": "/o/ca.pem", "certificate": "/o/agent.pem", "key": "/o/agent.key"}
TWIN = {
    **PAIR,
    "peer": {"connect": "127.0.0.1:7000", "with": "server", "role": "secondary", "on_split": "both"},
}
TWINS = {(c.Peer, name) for name in ("with", "on_split", "return", "probe_ms")}  # Peer.twin has them


def with_sections(sections: dict[str, Any], *, devices: bool) -> dict[str, Any]:
    document = copy.deepcopy({**GOOD, **sections})
    if not devices:
        for port in document["ports"].values():
            del port["device"]
    return document


def test_both_halves_of_a_pair() -> None:
    for document in (with_sections(PAIR, devices=True), with_sections(SWITCH, devices=False)):
        SCHEMA_CHECK.validate(document)
    server = c.parse(with_sections(PAIR, devices=True))
    assert (server.number, server.peer.connect, server.peer.mode) == (1, ("127.0.0.1", 7000), "synchronous")
    core = c.to_core(server, [bytes(6)] * 2)
    assert (core.instance, core.synchronous, core.hold) == (1, True, 0.05)
    assert {port.mac for port in core.ports} == {bytes.fromhex("02005e000101")}
    assert (core.pool[0].ports, core.pool[0].own) == ((1, 65535), (1024, 65535))
    agent = c.parse(with_sections(SWITCH, devices=False))
    assert agent.number == 2
    assert agent.switch.takeover == "127.0.0.1:6654"
    assert agent.switch.datapath_id == 1
    assert agent.heartbeat.key == b"\x0f" * 16
    core = c.to_core(agent, [])
    assert (core.instance, core.synchronous, core.hold, core.max_held) == (2, True, 0.007, 9)
    unix = {**SWITCH["switch"], "openflow": "unix:/run/br0.controller"}
    document = with_sections({**SWITCH, "switch": unix}, devices=False)
    assert c.parse(document).switch.takeover == "unix:/run/br0.controller-takeover"


def test_the_examples_are_one_pair() -> None:
    server, agent = (c.load(ROOT / f"examples/pair-{side}.yaml") for side in ("server", "switch"))
    assert (server.number, agent.number) == (1, 2)
    assert server.peer.connect == agent.peer.listen == ("127.0.0.1", 7000)
    assert server.heartbeat.connect == agent.heartbeat.listen == ("127.0.0.1", 7001)
    assert server.virtual == agent.virtual
    assert server.nat.pool.ranges == agent.nat.pool.ranges
    assert (server.nat.pool.ports, agent.nat.pool.ports) == ((1024, 32767), (32768, 65535))
    assert [port.address for port in server.ports] == [port.address for port in agent.ports]


def test_openflow_by_tls_or_in_plain_where_it_is_trusted() -> None:
    def switch(**keys: object) -> dict[str, Any]:
        return with_sections({**SWITCH, "switch": {**SWITCH["switch"], **keys}}, devices=False)

    document = switch(openflow="tls:192.0.2.1:6653", tls=TLS)
    SCHEMA_CHECK.validate(document)
    config = c.parse(document)
    assert config.switch.takeover == "tls:192.0.2.1:6654"
    assert config.switch.tls.key == Path("/o/agent.key")
    assert c.parse(
        switch(openflow="tls:192.0.2.1:6653", takeover="unix:/run/br.controller", tls=TLS)
    ).switch.tls
    plain = switch(openflow="192.0.2.1:6653", plain=True)
    SCHEMA_CHECK.validate(plain)
    assert c.parse(plain).switch.plain
    document["peer"]["tls"] = TLS
    del document["heartbeat"]["key"]
    assert "the switch could pass for the peer" in problems(document)["switch.tls.ca"]


def test_offloading_is_the_servers_and_needs_a_peer() -> None:
    sections = {**PAIR, "offload": {"packets_per_second": 1000}}
    document = with_sections(sections, devices=True)
    SCHEMA_CHECK.validate(document)
    assert c.parse(document).offload == pair_config.Offloading(1000, 500, 10, 5, 1000)
    sections["offload"]["keep_packets_per_second"] = 1000
    assert problems(with_sections(sections, devices=True)) == {
        "offload.keep_packets_per_second": "1000 is not below packets_per_second (1000): a session would go back and forth"
    }
    at_switch = {**SWITCH, "offload": {"packets_per_second": 1000}}
    assert problems(with_sections(at_switch, devices=False)) == {
        "offload": "is the server's: the switch moves what the server asks for"
    }
    alone = {"offload": {"packets_per_second": 1000}}
    assert problems(with_sections(alone, devices=True)) == {
        "offload": "there is no peer whose switch could carry sessions"
    }


def test_the_examples_of_two_servers_are_one_pair() -> None:
    one, two = (c.load(ROOT / f"examples/servers-{side}.yaml") for side in ("primary", "secondary"))
    assert (one.number, two.number) == (1, 2)
    assert one.peer.listen == two.peer.connect
    assert one.heartbeat.listen == two.heartbeat.connect
    assert one.virtual == two.virtual
    assert [port.address for port in one.ports] == [port.address for port in two.ports]
    assert one.nat.pool.ranges == two.nat.pool.ranges
    assert (one.nat.pool.ports, two.nat.pool.ports) == ((1024, 32767), (32768, 65535))
    assert one.peer.twin == pair_config.Twin(primary=True)
    assert not two.peer.twin.primary


def test_one_of_two_servers() -> None:
    document = with_sections(TWIN, devices=True)
    SCHEMA_CHECK.validate(document)
    config = c.parse(document)
    assert config.peer.twin == pair_config.Twin(primary=False, on_split="both")
    assert (config.number, c.to_core(config, []).instance) == (2, 2)
    schema = SCHEMA["properties"]["peer"]["properties"]
    for name, field in (("on_split", "on_split"), ("return", "returns"), ("probe_ms", "probe_ms")):
        assert schema[name]["default"] == getattr(pair_config.Twin(primary=True), field)
    for name, choices in (
        ("with", "WITH"),
        ("role", "ROLES"),
        ("on_split", "ON_SPLIT"),
        ("return", "RETURNS"),
    ):
        assert schema[name]["enum"] == list(getattr(pair_config, choices))


def test_what_does_not_fit_two_servers() -> None:
    peer = {"connect": "127.0.0.1:7000", "with": "server"}
    assert problems(with_sections({**PAIR, "peer": peer}, devices=True)) == {
        "peer.role": "missing: of two servers one is `primary`, the other `secondary`"
    }
    peer = {"connect": "127.0.0.1:7000", "role": "primary", "probe_ms": 3}
    assert problems(with_sections({**PAIR, "peer": peer}, devices=True)) == dict.fromkeys(
        ("peer.role", "peer.probe_ms"), "only of a pair of servers (`with: server`)"
    )
    for partition in pair_config.PARTITIONS[1:]:
        local = {"local_protocols": ["udp"]} if partition == "by_protocol" else {}
        peer = {**TWIN["peer"], "partition": partition, **local}
        assert problems(with_sections({**TWIN, "peer": peer}, devices=True)) == {
            "peer.partition": "of two servers one carries all: only `all_peer`, or `with: switch`, is possible"
        }
    peer = {"listen": "127.0.0.1:7000", "with": "server", "role": "primary"}
    assert problems(with_sections({**SWITCH, "peer": peer}, devices=False)) == {
        "peer.with": "a switch agent's peer is a server by itself: leave it out"
    }


@pytest.mark.parametrize("partition", pair_config.PARTITIONS)
def test_conntrack_is_behind_the_server(partition: str) -> None:
    switch = {**SWITCH["switch"], "nat": "conntrack", "ovs": "/var/run/openvswitch"}
    local = {"local_protocols": ["udp"]} if partition == "by_protocol" else {}
    sections = {**SWITCH, "switch": switch, "peer": {**SWITCH["peer"], "partition": partition, **local}}
    if partition == "all_peer":
        assert c.parse(with_sections(sections, devices=False)).switch.nat == "conntrack"
        switch["failover"] = "group"
        assert "one of the two" in problems(with_sections(sections, devices=False))["switch.nat"]
    else:
        assert f"not {partition}" in problems(with_sections(sections, devices=False))["switch.nat"]


def test_a_switch_without_a_peer() -> None:
    alone = {
        "virtual": SWITCH["virtual"],
        "switch": {**SWITCH["switch"], "ports": {"internal": 1, "external": 2}},
    }
    config = c.parse(with_sections(alone, devices=False))
    assert config.switch.ports == c.SwitchPorts(1, 2, 0, 0)
    grouped = {**alone, "switch": {**alone["switch"], "failover": "group"}}
    assert "there are none" in problems(with_sections(grouped, devices=False))["switch.failover"]
    core = c.to_core(config, [])
    assert (core.instance, core.synchronous, core.hold) == (2, True, 1.0)
    assert (core.pool[0].ports, core.pool[0].own) == ((1, 65535), (1024, 65535))


def test_a_peer_that_is_off_needs_nothing_and_changes_nothing() -> None:
    document = with_sections({"peer": {"mode": "off"}}, devices=True)
    SCHEMA_CHECK.validate(document)
    macs = [b"\x02\0\0\0\0\x01"] * 2
    assert c.to_core(c.parse(document), macs) == c.to_core(c.parse(GOOD), macs)


def test_a_server_that_does_not_wait() -> None:
    peer = {**PAIR["peer"], "mode": "asynchronous"}
    core = c.to_core(c.parse(with_sections({**PAIR, "peer": peer}, devices=True)), [])
    assert (core.synchronous, core.max_held) == (False, 1024)


def test_defaults_and_choices_are_those_of_the_schema() -> None:
    kinds = {
        c.Hold: SCHEMA["$defs"]["hold"],
        c.Peer: SCHEMA["properties"]["peer"],
        c.Heartbeat: SCHEMA["properties"]["heartbeat"],
        c.Switch: SCHEMA["properties"]["switch"],
    }
    for kind, schema in kinds.items():
        values = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
        for name, part in schema["properties"].items():
            if "default" in part and (kind, name) not in TWINS:
                assert values[name] == part["default"], name
    assert SCHEMA["properties"]["peer"]["properties"]["mode"]["enum"] == list(pair_config.MODES)
    assert SCHEMA["properties"]["peer"]["properties"]["partition"]["enum"] == list(pair_config.PARTITIONS)
    assert SCHEMA["$defs"]["hold"]["properties"]["on_limit"]["enum"] == list(pair_config.ON_LIMIT)
    assert SCHEMA["properties"]["switch"]["properties"]["barrier"]["enum"] == list(pair_config.BARRIERS)
    assert SCHEMA["properties"]["switch"]["properties"]["mark"]["enum"] == list(pair_config.MARKS)
    assert SCHEMA["properties"]["switch"]["properties"]["failover"]["enum"] == list(pair_config.FAILOVERS)
    assert SCHEMA["properties"]["switch"]["properties"]["nat"]["enum"] == list(pair_config.NATS)
    assert SCHEMA["properties"]["ports"]["properties"]["mark"]["enum"] == list(pair_config.MARKS)
    for part in SCHEMA["$defs"]["switch_ports"]["properties"].values():
        assert part["maximum"] == pair_config.MAX_OPENFLOW_PORT


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("peer", 5),
        ("peer.mode", "sometimes"),
        ("peer.listen", "here"),
        ("heartbeat", 5),
        ("heartbeat.listen", "here"),
        ("heartbeat.connect", "there"),
        ("switch", 5),
        ("switch.openflow", "here"),
        ("switch.takeover", "here"),
        ("switch.ports", 5),
        ("switch.ports.server_internal", "a"),
        ("virtual", 5),
        ("virtual.mac", "x"),
    ],
)
def test_what_cannot_be_read_is_one_error(path: str, value: object) -> None:
    document = with_sections(SWITCH, devices=False)
    *parents, last = path.split(".")
    place = document
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(c.ConfigError) as caught:
        c.parse(document)
    assert [problem.path for problem in caught.value.errors] == [path]
    assert not SCHEMA_CHECK.is_valid(document)


@pytest.mark.parametrize(
    "peer", [{}, {"mode": "asynchronous"}, {"listen": "127.0.0.1:1", "connect": "127.0.0.1:2"}]
)
def test_the_schema_wants_exactly_one_of_listen_and_connect_too(peer: dict[str, str]) -> None:
    document = with_sections({**PAIR, "peer": peer}, devices=True)
    assert "exactly one of" in problems(document)["peer"]
    assert not SCHEMA_CHECK.is_valid(document)


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        ("peer.listen", "127.0.0.1:7000", "peer", "exactly one of"),
        ("peer.connect", "127.0.0.1:70000", "peer.connect", "from 1 to 65535"),
        ("peer.connect", "localhost:7000", "peer.connect", "ADDRESS:PORT"),
        ("peer.connect", "192.0.2.7:7000", "peer.connect", "not on loopback: `tls` is needed"),
        ("peer.tls", {"ca": "/ca.pem", "certificate": "/me.pem"}, "peer.tls.key", "missing"),
        ("peer.tls", {"ca": "ca.pem", "certificate": "/m", "key": "/k"}, "peer.tls.ca", "absolute path"),
        ("peer.partition", "mine", "peer.partition", "none of: all_peer"),
        ("peer.partition", "by_protocol", "peer.local_protocols", "missing: by_protocol needs"),
        ("peer.local_protocols", ["udp"], "peer.local_protocols", "only `partition: by_protocol`"),
        ("peer.hold", {"ms": 0}, "peer.hold.ms", "from 1 to 10000"),
        ("heartbeat", ..., "heartbeat", "missing"),
        ("heartbeat.connect", ..., "heartbeat.connect", "where its heartbeat listens"),
        ("heartbeat.interval_ms", 0, "heartbeat.interval_ms", "milliseconds"),
        ("heartbeat.key", "secret", "heartbeat.key", "32 hexadecimal"),
        ("peer", ..., "peer", "missing"),
        ("virtual", ..., "virtual", "one MAC"),
        ("ports.internal.mac", "02:00:00:00:00:09", "ports.internal.mac", "`virtual`"),
        ("switch", SWITCH["switch"], "ports.internal.device", "no devices"),
    ],
)
def test_halves_that_do_not_fit(path: str, value: object, where: str, message: str) -> None:
    document = with_sections(PAIR, devices=True)
    *parents, last = path.split(".")
    place = document
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    assert message in problems(document)[where]


@pytest.mark.parametrize(
    ("protocols", "message"),
    [
        ("udp", "no list of protocols"),
        (["sctp"], "none of: icmp, tcp, udp"),
        (["icmp", "tcp", "udp"], "there is `all_local`"),
        (["udp", "udp"], "each once"),
    ],
)
def test_protocols_that_the_switch_cannot_have(protocols: object, message: str) -> None:
    peer = {**SWITCH["peer"], "partition": "by_protocol", "local_protocols": protocols}
    document = with_sections({**SWITCH, "peer": peer}, devices=False)
    assert message in problems(document)["peer.local_protocols"]
    assert not SCHEMA_CHECK.is_valid(document)


@pytest.mark.parametrize(
    ("peer", "forwarded", "in_front"),
    [
        ({}, {1, 6, 17}, False),
        ({"partition": "new_at_peer"}, {1, 6, 17}, True),
        ({"partition": "by_protocol", "local_protocols": ["udp", "icmp"]}, {6}, False),
        ({"partition": "all_local"}, set(), False),
    ],
)
def test_partitions(peer: dict[str, object], forwarded: set[int], in_front: bool) -> None:
    document = with_sections({**SWITCH, "peer": {**SWITCH["peer"], **peer}}, devices=False)
    SCHEMA_CHECK.validate(document)
    assert partition_of(c.parse(document)) == Partition(frozenset(forwarded), in_front)


def test_tls_or_plain_and_one_key() -> None:
    tls = {key: f"/etc/{key}" for key in ("ca", "certificate", "key")}
    away = {**PAIR, "peer": {"connect": "192.0.2.7:7000", "tls": tls}}
    document = with_sections(away, devices=True)
    SCHEMA_CHECK.validate(document)
    assert c.parse(document).peer.tls.certificate == Path("/etc/certificate")
    trusted = with_sections({**PAIR, "peer": {"connect": "192.0.2.7:7000", "plain": True}}, devices=True)
    assert problems(trusted) == {}
    away["peer"]["plain"] = True
    away["heartbeat"] = {**PAIR["heartbeat"], "key": "00" * 16}
    found = problems(with_sections(away, devices=True))
    assert found.keys() == {"peer.plain", "heartbeat.key"}


@pytest.mark.parametrize(
    ("key", "value", "where", "message"),
    [
        ("ports", {**SWITCH["switch"]["ports"], "external": 1}, "switch.ports", "two uses"),
        ("ports", {"internal": 1, "external": 2}, "switch.ports", "needed for the peer"),
        ("takeover", "127.0.0.1:6653", "switch.takeover", "another place"),
        ("openflow", "127.0.0.1:65535", "switch.takeover", "no port after"),
        ("openflow", "unix:/" + "x" * 100, "switch.takeover", "more than 107 bytes"),
        ("openflow", "tcp:here", "switch.openflow", "tls:ADDRESS:PORT, unix:/PATH or ADDRESS:PORT"),
        ("openflow", "192.0.2.1:6653", "switch.openflow", "192.0.2.1 is not on loopback: tls:192.0.2.1:6653"),
        ("openflow", "0.0.0.0:6653", "switch.takeover", "`plain: true` where the network between is trusted"),
        ("openflow", "tls:127.0.0.1:6653", "switch.tls", "missing: switch.openflow begins with tls:"),
        ("takeover", "tls:127.0.0.1:6653", "switch.tls", "missing: switch.takeover begins with tls:"),
        ("tls", TLS, "switch.tls", "neither `openflow` nor `takeover` begins with tls:"),
        ("datapath_id", 1, "switch.datapath_id", "quotes"),
        ("barrier", "believed", "switch.barrier", "trusted"),
        ("ports", {**ONE_LINK, "server_internal": 4}, "switch.ports.server", "one link or two"),
        ("ports", {**ONE_LINK, "server": 2}, "switch.ports", "two uses"),
        ("ports", ONE_LINK, "switch.tags", "different VLANs"),
        ("mark", "dscp", "switch.mark", "one link to the server"),
        ("mark", "mac", "switch.mark", "none of: vlan, dscp"),
        ("failover", "bfd", "switch.failover", "none of: rules, group"),
        ("nat", "kernel", "switch.nat", "none of: rules, conntrack"),
        ("nat", "conntrack", "switch.nat", "say where it is (`switch.ovs`)"),
        ("tags", {"internal": 5}, "switch.tags", "`switch.ports.server` with `mark: vlan`"),
        ("tags", {"internal": 4095}, "switch.tags.internal", "from 1 to 4094"),
    ],
)
def test_switches_that_do_not_fit(key: str, value: object, where: str, message: str) -> None:
    document = with_sections({**SWITCH, "switch": {**SWITCH["switch"], key: value}}, devices=False)
    assert message in problems(document)[where]


def test_one_link_to_the_server() -> None:
    by_tags = {"ports": ONE_LINK, "tags": {"external": 102}}
    for more, tags in ((by_tags, (0, 102)), ({"ports": ONE_LINK, "mark": "dscp"}, None)):
        document = with_sections({**SWITCH, "switch": {**SWITCH["switch"], **more}}, devices=False)
        SCHEMA_CHECK.validate(document)
        config = c.parse(document)
        assert config.switch.ports.one_link
        made = pipeline_of(config)
        assert (made.tags, made.internal.server_port, made.external.server_port) == (tags, 3, 3)
        assert str(made.inside) == "10.0.0.0/24"
        lost = [
            line for line in c.warnings(config) if line.startswith("switch.mark: dscp takes the lowest bit")
        ]
        assert len(lost) == (tags is None)
    # without tags those of the networks are on the link as they are
    document = with_sections({**SWITCH, "switch": {**SWITCH["switch"], "ports": ONE_LINK}}, devices=False)
    document["ports"]["internal"]["vlan"] = 10
    assert pipeline_of(c.parse(document)).tags == (10, 0)


def test_one_device_of_the_server() -> None:
    document = with_sections(PAIR, devices=True)
    document["ports"]["mark"] = "dscp"
    assert "these are on two" in problems(document)["ports.mark"]
    document["ports"]["external"]["device"] = document["ports"]["internal"]["device"]
    SCHEMA_CHECK.validate(document)
    config = c.parse(document)
    assert config.inside_by_dscp == config.ports[0].address.network
    assert [line for line in c.warnings(config) if line.startswith("ports.mark: dscp takes the lowest bit")]
    document["ports"]["external"]["vlan"] = 5
    assert "no tags" in problems(document)["ports.external.vlan"]
    del document["ports"]["external"]["vlan"], document["ports"]["mark"]
    assert "`ports.mark: dscp`" in problems(document)["ports.external.device"]
    document = with_sections(SWITCH, devices=False)
    document["ports"]["mark"] = "dscp"
    assert "`switch.mark`" in problems(document)["ports.mark"]
