# SPDX-License-Identifier: Apache-2.0
"""What a reload takes and what it refuses; in all cores, or in none."""

from __future__ import annotations

import asyncio
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_control import config as c
from nat_control.reload import Options, Reload, compare, lines, with_draining
from nat_fastpath.core_config import CoreConfig
from nat_fastpath.engine import Core
from tests.packets import CLIENT, INSIDE, OUR_MAC, START, frame, mac_bytes, number, text, udp

MAC = "02:00:00:00:01:fe"
SERVER: dict[str, Any] = {
    "instance": "one",
    "ports": {
        "internal": {
            "device": "in0",
            "address": "10.0.0.1/24",
            "neighbours": [{"address": CLIENT, "mac": MAC}],
        },
        "external": {
            "device": "out0",
            "address": "198.51.100.1/24",
            "gateway": "198.51.100.254",
            "gateway_mac": MAC,
            "mtu": 1500,
        },
    },
    "nat": {"pool": {"addresses": ["198.51.100.10-198.51.100.13"]}, "max_sessions": 1000},
    "control": {"socket": "/run/one.sock"},
}
PAIR = {
    "peer": {"listen": "127.0.0.1:7000"},
    "heartbeat": {"listen": "127.0.0.1:7001", "key": "00" * 16},
    "virtual": {"mac": "02:00:00:00:00:01"},
}
AGENT = {
    **PAIR,
    "switch": {
        "openflow": "127.0.0.1:6653",
        "datapath_id": "1",
        "ports": {"internal": 1, "external": 2, "server_internal": 3, "server_external": 4},
    },
}


def changed(base: dict[str, Any], **paths: Any) -> dict[str, Any]:
    """A copy with values at paths such as nat__timeouts__udp; None takes the key away."""
    document = copy.deepcopy(base)
    for path, value in paths.items():
        *way, last = path.split("__")
        at = document
        for key in way:
            at = at.setdefault(key, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    return document


def compared(
    base: dict[str, Any], mtus: tuple[int, ...] = (1500, 1500), **paths: Any
) -> tuple[list[str], list[str]]:
    found = compare(c.parse(base), c.parse(changed(base, **paths)), mtus)
    return list(found.applicable), list(found.refused)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("nat__timeouts__udp", 120, "nat.timeouts.udp: 300 -> 120"),
        ("nat__limits__sessions_per_host", 9, "nat.limits.sessions_per_host: 0 -> 9"),
        ("nat__filtering", "endpoint-independent", "nat.filtering: address-and-port-dependent -> endpoint-independent"),
        (
            "nat__pool__addresses",
            ["198.51.100.10", "198.51.100.20-198.51.100.21"],
            "nat.pool.addresses: 198.51.100.10-198.51.100.13 -> 198.51.100.10, 198.51.100.20-198.51.100.21",
        ),
        ("nat__pool__ports", "2000-3000,5000", "nat.pool.ports: 1024-65535 -> 2000-3000, 5000"),
        ("nat__pool__parity", True, "nat.pool.parity: false -> true"),
        ("nat__pool__quarantine", 5, "nat.pool.quarantine: 120 -> 5"),
        ("ports__external__gateway", "198.51.100.253", "ports.external.gateway: 198.51.100.254 -> 198.51.100.253"),
        ("ports__external__gateway_mac", None, f"ports.external.gateway_mac: {MAC} -> none"),
        (
            "ports__internal__routes",
            [{"prefix": "10.1.0.0/16", "gateway": "10.0.0.9", "mac": MAC}],
            f"ports.internal.routes[10.1.0.0/16]: none -> 10.0.0.9 ({MAC})",
        ),
        ("ports__internal__neighbours", None, f"ports.internal.neighbours[10.0.0.5]: {MAC} -> none"),
        ("ports__external__mtu", 1400, "ports.external.mtu: 1500 -> 1400"),
    ],
)  # fmt: skip
def test_what_is_taken(path: str, value: object, line: str) -> None:
    assert compared(SERVER, **{path: value}) == ([line], [])


@pytest.mark.parametrize(
    ("paths", "refused"),
    [
        ({"instance": "two"}, ["instance: one -> two: needs a restart"]),
        ({"ports__internal__device": "in1"}, ["ports.internal.device: in0 -> in1: needs a restart"]),
        ({"nat__mapping": "endpoint-dependent"}, ["nat.mapping: endpoint-independent -> endpoint-dependent: needs"]),
        ({"nat__filtering": "address-dependent"}, ["nat.filtering: address-and-port-dependent -> address-dependent"]),
        ({"nat__max_sessions": 2000}, ["nat.max_sessions: 1000 -> 2000"]),
        ({"nat__flow_hash": "aes", "workers__cores": [1]}, ["nat.flow_hash: fnv -> aes", "workers.cores: 0 -> 1"]),
        ({"control__socket": "/run/two.sock"}, ["control.socket: /run/one.sock -> /run/two.sock"]),
        ({"ports__external__mtu": 9000}, ["ports.external.mtu: 1500 -> 9000: needs a restart: its device was started"]),
        ({"ports__external__vlan": 7, "nat__timeouts__udp": 9}, ["ports.external.vlan: 0 -> 7"]),
    ],
)  # fmt: skip
def test_what_needs_a_restart(paths: dict[str, Any], refused: list[str]) -> None:
    found = compared(SERVER, **paths)[1]
    assert len(found) == len(refused)
    assert all(line.startswith(start) for line, start in zip(found, refused, strict=True)), found


def test_every_key_of_a_pair_needs_a_restart_and_no_key_is_told() -> None:
    paired = {**SERVER, **PAIR}
    _, refused = compared(paired, peer__mode="asynchronous", heartbeat__misses=9, heartbeat__key="11" * 16)
    assert [line.split(":")[0] for line in refused] == ["peer.mode", "heartbeat.misses", "heartbeat.key"]
    assert "00" not in refused[2]
    assert "11" not in refused[2]
    alone = compare(c.parse(paired), c.parse(SERVER))
    assert "peer.listen: 127.0.0.1:7000 -> none: needs a restart" in alone.refused


def test_an_agent_takes_what_its_rules_do_not_speak_of() -> None:
    agent = changed({**SERVER, **AGENT}, ports__internal__device=None, ports__external__device=None)
    routes = [{"prefix": "10.1.0.0/16", "gateway": "10.0.0.9"}]
    taken, refused = compared(
        agent, (), nat__timeouts__udp=9, nat__pool__addresses="198.51.100.10", ports__internal__routes=routes
    )
    assert taken == ["nat.timeouts.udp: 300 -> 9"]
    assert {line.split(": ")[0] for line in refused} == {
        "ports.internal.routes[10.1.0.0/16]",
        "nat.pool.addresses",
    }
    assert all(line.endswith("needs a restart of the agent, which keeps its sessions") for line in refused)


# -- in cores ---------------------------------------------------------------------------------------------------


class Instance:
    """Two cores, each with its half of hosts and ports, and a file."""

    def __init__(self, folder: Path, n: int = 2) -> None:
        self.file = folder / "nat.yaml"
        self.write()
        config = c.load(self.file)
        self.n, self.said, self.taken = n, list[str](), list[c.Config]()
        self.cores = [Core(one) for one in self.to_core(config)]
        self.reload = Reload(
            config,
            self.file,
            self.cores,
            self.to_core,
            taken=self.taken.append,
            say=self.said.append,
            mtus=(1500,) * 2,
        )

    def to_core(self, config: c.Config) -> list[CoreConfig]:
        made = c.to_core(config, [mac_bytes(mac) for mac in OUR_MAC])
        return [replace(made, n_slices=self.n, slice=i, max_neighbours=8) for i in range(self.n)]

    def write(self, **paths: Any) -> None:
        self.file.write_text(yaml.safe_dump(changed(SERVER, **paths)))

    def run(self, **options: bool) -> dict[str, Any]:
        return asyncio.run(self.reload.run(Options(**options)))

    def open(self, core: int) -> str:
        """A session in that core, of a host that it serves; its pool address."""
        for host in range(60, 70):
            sent = udp(f"10.0.0.{host}", 4000, "203.0.113.7", 53)
            self.cores[core].burst([(INSIDE, frame(sent, mac=MAC))], START)
            if len(found := self.cores[core].sessions()[0]):
                return text(found["external_addr"][0])
        raise AssertionError("none of these hosts is of its slice")

    def timeouts(self) -> list[float]:
        return [core.config.udp_timeout for core in self.cores]


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return Instance(tmp_path)


def test_all_cores_take_it(instance: Instance) -> None:
    instance.write(nat__timeouts__udp=7, nat__pool__addresses="198.51.100.10-198.51.100.20")
    checked = instance.run(check=True)
    assert (checked["result"], len(checked["changes"])) == ("checked", 2)
    assert instance.timeouts() == [300, 300]
    assert instance.run()["result"] == "applied"
    assert instance.timeouts() == [7, 7]
    assert instance.taken == [instance.reload.config]
    assert instance.run() == {
        "left": [],
        "result": "unchanged",
        "changes": [],
        "warnings": checked["warnings"],
        "draining": [],
    }


def test_what_the_second_refuses_the_first_has_not(instance: Instance) -> None:
    """The second has no room for one more next hop."""
    learned = [
        udp(f"10.0.0.{i}", 4000, "198.51.100.50", 53) for i in range(30, 40)
    ]  # from strangers, each a next hop
    for packet in learned:
        instance.cores[1].burst([(INSIDE, frame(packet, mac=f"02:00:00:00:02:{packet.src[-2:]}"))], START)
    instance.write(nat__timeouts__udp=7, ports__internal__neighbours=[{"address": "10.0.0.77", "mac": MAC}])
    answer = instance.run()
    assert answer["result"] == "refused"
    assert "no room in max_neighbours" in answer["refused"][0]
    assert instance.timeouts() == [300, 300]
    assert instance.taken == []
    assert [text(hop.address) for hop in instance.cores[0].config.neighbours] == [CLIENT]


def test_what_a_stopped_worker_has_not_begun_it_does_not_take_later(instance: Instance) -> None:
    instance.cores[1].attach()  # to nobody
    instance.write(nat__timeouts__udp=7, nat__pool__addresses="198.51.100.20")
    answer = instance.run()
    assert lines(answer) == [
        "the worker does not answer: it is stopped, or events are not taken",
        "refused: nothing is changed",
    ]
    instance.cores[1].detach()
    instance.cores[1].settle(START)  # it goes on, and finds what was asked of it
    assert instance.timeouts() == [300, 300]
    for core in (0, 1):
        assert instance.open(core) != "198.51.100.20"
        assert instance.cores[core].sessions()[0]["timeout_ms"].tolist() == [300_000]
    instance.write(nat__timeouts__udp=8)
    assert instance.run()["result"] == "applied"
    assert [core.sessions()[0]["timeout_ms"].tolist() for core in instance.cores] == [[8000]] * 2


WITHOUT_DESCRIPTORS = """
import asyncio, os, resource, sys
from nat_control.config import load
from nat_control.reload import Options, Reload, lines

async def main():
    refused = Reload(load(sys.argv[1]), Path(sys.argv[1]), (), lambda _: (), taken=print, say=print)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    print(lines(await refused.run(Options()))[-1], flush=True)
    os._exit(0)  # asyncio closes what it cannot ask for any more

from pathlib import Path
import nat_control.loop
asyncio.run(main())
"""


def test_without_a_descriptor_nothing_is_changed_and_it_goes_on(instance: Instance) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS, instance.file], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "invalid: nothing is changed\n", done.stderr


def test_a_file_without_an_end_is_not_read(instance: Instance) -> None:
    instance.file.unlink()
    os.mkfifo(instance.file)
    answer = instance.run()
    assert (answer["result"], answer["errors"]) == (
        "invalid",
        [f"{instance.file}: cannot be read again: this is no file"],
    )


def test_an_address_that_is_used_in_the_second_core(instance: Instance) -> None:
    used = instance.open(1)
    left = [f"198.51.100.{i}" for i in range(10, 14) if f"198.51.100.{i}" != used]
    instance.write(nat__pool__addresses=left, nat__timeouts__udp=7)
    refused = instance.run()
    assert refused["refused"] == [
        f"nat.pool.addresses: {used} has 1 mapping: --drain lets it go when they have ended, --force ends them"
    ]
    assert lines(refused)[-1] == "refused: nothing is changed"
    assert instance.timeouts() == [300, 300]

    drained = instance.run(drain=True)
    assert drained["draining"] == [{"address": used, "mappings": 1}]
    assert f"draining {used}: 1 mapping left" in lines(drained)
    assert instance.timeouts() == [7, 7]
    # a reload that changes nothing of it lets it drain on, and the same address may come back
    assert instance.run()["draining"] == [{"address": used, "mappings": 1}]
    instance.write(nat__timeouts__udp=7)
    assert instance.run()["draining"] == []
    instance.write(nat__pool__addresses=left, nat__timeouts__udp=7)
    assert instance.run(drain=True)["draining"]

    async def a_second() -> None:
        instance.reload.tick()
        await asyncio.gather(*instance.reload._tasks)

    asyncio.run(a_second())
    assert instance.reload.draining()
    instance.cores[1].delete(instance.cores[1].sessions()[0])
    asyncio.run(a_second())
    assert instance.reload.draining() == []
    assert instance.said == [f"pool: {used} has left it"]
    assert all(
        number(used) not in range(int(r.first), int(r.last) + 1)
        for core in instance.cores
        for r in core.config.pool
    )


def test_force_ends_the_sessions_there_and_no_others(instance: Instance) -> None:
    used, other = instance.open(1), instance.open(0)
    instance.write(
        nat__pool__addresses=[f"198.51.100.{i}" for i in range(20, 24)] + [other] * (other != used)
    )
    answer = instance.run(force=True)
    assert answer["draining"] == []
    assert not len(instance.cores[1].sessions()[0])
    assert len(instance.cores[0].sessions()[0]) == (other != used)


def test_an_invalid_file_is_told_whole(instance: Instance) -> None:
    instance.write(nat__timeouts__udp=0, nat__pool__quarantine=-1)
    answer = instance.run()
    assert answer["result"] == "invalid"
    assert [line.split(": ")[1] for line in answer["errors"]] == ["nat.pool.quarantine", "nat.timeouts.udp"]
    assert lines(answer)[-1] == "invalid: nothing is changed"


def test_ranges_that_drain_stand_among_the_others() -> None:
    made = c.to_core(c.parse(SERVER), [mac_bytes(mac) for mac in OUR_MAC])
    pool = with_draining(made, {number("198.51.100.9"), number("198.51.100.8"), number("198.51.100.30")}).pool
    assert [(text(int(r.first)), text(int(r.last)), r.own) for r in pool] == [
        ("198.51.100.8", "198.51.100.9", (1, 0)),
        ("198.51.100.10", "198.51.100.13", (1024, 65535)),
        ("198.51.100.30", "198.51.100.30", (1, 0)),
    ]


def test_reload_asked_by_an_operator_is_checked() -> None:
    from nat_control.reload import _options

    wrong: list[tuple[object, str]] = [
        ([], "not an object"),
        ({"now": True}, "unknown key 'now'; there are drain, force, check"),
        ({"drain": 1}, "drain is true or false"),
        ({"drain": True, "force": True}, "exclude each other"),
    ]
    refuses: Callable[[object], None] = lambda body: _options(body)  # noqa: E731
    for body, message in wrong:
        with pytest.raises(Exception, match=message):
            refuses(body)
    assert _options({"check": True}) == Options(check=True)
