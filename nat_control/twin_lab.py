# SPDX-License-Identifier: Apache-2.0
"""client - bridge - two servers - bridge - outside, and a link between the servers; in namespaces of a lab.

For the tests and the measurements of a pair of servers.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import yaml

from nat_control import api
from nat_control.certificates import make_certificates
from nat_control.lab import Lab, Process, until

CLIENT, NAT_INSIDE, ROUTER, OUTSIDE = "10.0.0.10", "10.0.0.1", "198.51.100.254", "203.0.113.1"
VIRTUAL_MAC = "02:00:5e:00:01:01"
CLI = [sys.executable, "-m", "nat_control.cli"]
NAMES = ("one", "two")  # primary, secondary
PORTS = {"one": "1024-32767", "two": "32768-65535"}
SYNC = {"one": "192.168.77.1", "two": "192.168.77.2"}
BRIDGES = {"inner": "inside", "outer": "beyond"}  # ports of each server there: inner-one, outer-two …


class TwinLab:
    """``peer``: what the configurations have beside the addresses, such as on_split."""

    def __init__(
        self,
        lab: Lab,
        *,
        interval_ms: float = 2,
        misses: int = 10,  # 20 ms: a machine that others load is not dead
        nat: dict[str, Any] | None = None,
        peer: dict[str, Any] | None = None,
        workers: int = 1,
    ) -> None:
        self.lab = lab
        self.switch = lab.namespace("switch")
        self.client, self.outside = lab.namespace("client"), lab.namespace("outside")
        self.hosts = {name: lab.namespace(name) for name in NAMES}
        for bridge in BRIDGES.values():
            self.switch.ip(
                "link", "add", bridge, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"
            )
            self.switch.ip("link", "set", bridge, "up")
        lab.cable(self.client, "eth0", self.switch, "client")
        lab.cable(self.outside, "eth0", self.switch, "outside")
        self.switch.ip("link", "set", "client", "master", "inside")
        self.switch.ip("link", "set", "outside", "master", "beyond")
        for name, host in self.hosts.items():
            for side, bridge in BRIDGES.items():
                lab.cable(host, f"nat-{side}", self.switch, f"{side}-{name}")
                self.switch.ip("link", "set", f"{side}-{name}", "master", bridge)
        lab.cable(self.hosts["one"], "sync", self.hosts["two"], "sync")
        for name, host in self.hosts.items():
            host.address("sync", f"{SYNC[name]}/24")
        self.client.address("eth0", f"{CLIENT}/24")
        self.client.route("default", NAT_INSIDE)
        self.outside.address("eth0", f"{ROUTER}/24")
        self.outside.address("lo", f"{OUTSIDE}/32")
        for end in (self.client, self.outside):
            end.run("ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off")
        make_certificates(lab.directory, NAMES)
        self.nat_options = {"max_sessions": 20_000, **(nat or {})}
        self.servers: dict[str, Process] = {}
        cores = sorted(os.sched_getaffinity(0))[:workers]
        for name, other in (("one", "two"), ("two", "one")):
            way = {"listen" if name == "one" else "connect": f"{SYNC['one']}:7000"}
            beats = {"listen": f"{SYNC[name]}:7001", "interval_ms": interval_ms, "misses": misses}
            if name == "two":
                beats["connect"] = f"{SYNC[other]}:7001"
            role = "primary" if name == "one" else "secondary"
            self._write(name, cores, {**way, "with": "server", "role": role, **(peer or {})}, beats)

    def _write(self, name: str, cores: list[int], peer: dict[str, Any], beats: dict[str, Any]) -> None:
        files = {"ca": "ca.pem", "certificate": f"{name}.pem", "key": f"{name}.key"}
        tls = {key: str(self.lab.directory / file) for key, file in files.items()}
        content = {
            "instance": name,
            "ports": {
                "internal": {"device": "nat-inner", "address": f"{NAT_INSIDE}/24"},
                "external": {"device": "nat-outer", "address": "198.51.100.1/24", "gateway": ROUTER},
            },
            "nat": {
                "pool": {"addresses": "198.51.100.10-198.51.100.13", "ports": PORTS[name]},
                **self.nat_options,
            },
            "workers": {"cores": cores},
            "virtual": {"mac": VIRTUAL_MAC},
            "control": {"socket": str(self.lab.directory / f"{name}.sock")},
            "peer": {"tls": tls, "hold": {"packets": 1024, "ms": 500, "on_limit": "drop"}, **peer},
            "heartbeat": beats,
        }
        (self.lab.directory / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def begin(self, name: str) -> Process:
        """Starts a server, without waiting for it."""
        config = str(self.lab.directory / f"{name}.yaml")
        self.servers[name] = self.hosts[name].start(*CLI, "server", config, name=f"server-{name}")
        return self.servers[name]

    def start(self, *names: str) -> None:
        """Starts these servers together, and waits until they are ready."""
        for process in [self.begin(name) for name in names]:
            process.ready("\nready", timeout=60)

    def kill(self, name: str) -> None:
        """kill -9."""
        self.servers[name].popen.kill()
        self.servers[name].popen.wait()

    def show(self, name: str, what: str = "status") -> Any:
        """What the command shows; of ``sessions`` the rows."""
        answers = list(api.ask(self.lab.directory / f"{name}.sock", {"show": what}))
        if what == "sessions":
            return [row for answer in answers for row in answer.get("rows", ())]
        return answers[0][what]

    def role(self, name: str) -> str:
        return str(self.show(name)["role"]["role"])

    def carrier(self, name: str, timeout: float = 20) -> None:
        """Waits until this server says that it carries."""
        until(f"server {name} carries", lambda: self.role(name) == "carries", timeout, 0.02)

    def in_step(self, carrier: str, timeout: float = 30) -> None:
        """Waits until one carries, the other stands by, and each holds the other's sessions."""
        other = NAMES[carrier == NAMES[0]]

        def probe() -> bool:
            both = {name: self.show(name) for name in NAMES}
            roles = both[carrier]["role"]["role"], both[other]["role"]["role"]
            return roles == ("carries", "stands by") and {s["peer"] for s in both.values()} == {"operational"}

        until(f"{carrier} carries, and {other} is in step", probe, timeout, 0.05)

    def sync_link(self, *, up: bool) -> None:
        """The network between the servers."""
        self.hosts["one"].ip("link", "set", "sync", "up" if up else "down")

    def seen_at(self, side: str = "inner") -> str:
        """The port of this side's bridge behind which the shared MAC is: "inner-one"."""
        found = json.loads(self.switch.run("bridge", "-j", "fdb", "show", "br", BRIDGES[side]))
        return next((row["ifname"] for row in found if row["mac"] == VIRTUAL_MAC), "")
