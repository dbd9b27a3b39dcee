# SPDX-License-Identifier: Apache-2.0
"""client - Open vSwitch with the agent - outside, and the server NAT on two more ports of the switch.

For the demo, the tests and the measurements, in namespaces of a lab.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import yaml

from nat_control import api
from nat_control.certificates import make_certificates
from nat_control.lab import Lab, Process, until
from switch_agent.ovs import OpenVSwitch

CLIENT, NAT_INSIDE, ROUTER, OUTSIDE = "10.0.0.10", "10.0.0.1", "198.51.100.254", "203.0.113.1"
AGENT, SERVER = "192.168.77.1", "192.168.77.2"  # the link between the two
VIRTUAL_MAC = "02:00:5e:00:01:01"
CLI = [sys.executable, "-m", "nat_control.cli"]
# 20 ms of silence at 2 ms: the default of 3 takes a machine that others load for a dead server
MISSES = 10
DEVICES = {"client": 1, "outside": 2, "inner": 3, "outer": 4}
TAGS = {"internal": 101, "external": 102}  # on one link to the server, by VLAN


class PairLab:
    """All of it, started on demand."""

    def __init__(
        self,
        lab: Lab,
        mode: str = "synchronous",
        interval_ms: float = 2,
        misses: int = MISSES,
        nat: dict[str, Any] | None = None,
        max_flows: int = 100_000,
        workers: int = 1,
        switch: dict[str, Any] | None = None,
        mark: str = "",
        receive_buffer: int = 64 << 20,
        command: list[str] | None = None,
        peer: dict[str, Any] | None = None,
        offload: dict[str, Any] | None = None,
    ) -> None:
        """``mark``: one link between switch and server, on which this tells the sides apart (vlan, dscp)."""
        self.lab = lab
        self.command = command or CLI
        self.workers = {"cores": sorted(os.sched_getaffinity(0))[:workers]}
        self.nat_options = {"max_sessions": 20_000, **(nat or {})}
        self.switch = lab.namespace("switch")
        self.client, self.outside, self.nat = (lab.namespace(name) for name in ("client", "outside", "nat"))
        devices = {name: number for name, number in DEVICES.items() if not (mark and name == "outer")}
        for device, end, there in (
            ("client", self.client, "eth0"),
            ("outside", self.outside, "eth0"),
            ("inner", self.nat, "nat-in"),
            ("outer", self.nat, "nat-out"),
        ):
            if device in devices:
                lab.cable(end, there, self.switch, device)
        lab.cable(self.nat, "sync", self.switch, "sync")
        self.client.address("eth0", f"{CLIENT}/24")
        self.client.route("default", NAT_INSIDE)
        self.outside.address("eth0", f"{ROUTER}/24")
        self.outside.address("lo", f"{OUTSIDE}/32")
        self.switch.address("sync", f"{AGENT}/24")
        self.nat.address("sync", f"{SERVER}/24")
        self.ovs = OpenVSwitch(
            self.switch,
            devices,
            ("tcp:127.0.0.1:6653", "tcp:127.0.0.1:6654"),
            receive_buffer=receive_buffer,
        )
        # what the client's and the outside's kernels leave to hardware does not pass a userspace switch
        for end, device in ((self.client, "eth0"), (self.outside, "eth0")):
            end.run("ethtool", "-K", device, "tx", "off", "tso", "off", "gso", "off")
        make_certificates(lab.directory, ("agent", "server"))
        self.heartbeat = f"{interval_ms:g} ms x {misses}"
        beats = {"interval_ms": interval_ms, "misses": misses}
        hold = {"packets": 1024, "ms": 500, "on_limit": "drop"}
        servers = {"server": 3} if mark else {"server_internal": 3, "server_external": 4}
        both = {"mode": mode, "hold": hold, **(peer or {})}
        self.agent_config = self._write(
            "agent",
            "32768-65535",
            {},
            peer={"listen": f"{AGENT}:7000", "tls": self._tls("agent"), **both},
            heartbeat={"listen": f"{AGENT}:7001", **beats},
            switch={
                "openflow": "127.0.0.1:6653",
                "datapath_id": "1",
                "max_flows": max_flows,
                "ovs": str(self.ovs.directory),
                "ports": {"internal": 1, "external": 2, **servers},
                **({"mark": mark} if mark else {}),
                **({"tags": TAGS} if mark == "vlan" else {}),
                **(switch or {}),
            },
        )
        self.server_config = self._write(
            "server",
            "1024-32767",
            {"internal": "nat-in", "external": "nat-in" if mark else "nat-out"},
            mark=mark,
            workers=self.workers,
            peer={"connect": f"{AGENT}:7000", "tls": self._tls("server"), **both},
            heartbeat={"listen": f"{SERVER}:7001", "connect": f"{AGENT}:7001", **beats},
            **({"offload": offload} if offload else {}),
        )

    def _tls(self, name: str) -> dict[str, str]:
        files = {"ca": "ca.pem", "certificate": f"{name}.pem", "key": f"{name}.key"}
        return {key: str(self.lab.directory / file) for key, file in files.items()}

    def _write(self, name: str, ports: str, devices: dict[str, str], mark: str = "", **more: Any) -> str:
        sides: dict[str, Any] = {
            "internal": {"address": f"{NAT_INSIDE}/24"},
            "external": {"address": "198.51.100.1/24", "gateway": ROUTER},
        }
        for side, device in devices.items():
            sides[side] |= {"device": device, **({"vlan": TAGS[side]} if mark == "vlan" else {})}
        if mark:
            sides["mark"] = mark
        content = {
            "instance": name,
            "ports": sides,
            "nat": {
                "pool": {
                    "addresses": "198.51.100.10-198.51.100.13",
                    "ports": ports,
                    "slices": len(self.workers["cores"]),
                },
                **self.nat_options,
            },
            "virtual": {"mac": VIRTUAL_MAC},
            "control": {"socket": str(self.lab.directory / f"{name}.sock")},
            **more,
        }
        path = self.lab.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def start_agent(self, *before: str) -> Process:
        """``before`` is a command that runs it, as `setpriv`."""
        self.agent = self.switch.start(*before, *self.command, "switch", self.agent_config, name="agent")
        self.agent.ready("the switch is ready", timeout=30)
        return self.agent

    def start_server(self) -> Process:
        self.server = self.nat.start(*self.command, "server", self.server_config, name="server")
        return self.server.ready("\nready", timeout=30)

    def show(self, name: str, what: str = "status") -> Any:
        """What the command shows, without a start of Python for each look; of ``sessions`` the rows."""
        answers = list(api.ask(self.lab.directory / f"{name}.sock", {"show": what}))
        if what == "sessions":
            return [row for answer in answers for row in answer.get("rows", ())]
        return answers[0][what]

    def carrier(self, who: str, timeout: float = 20) -> None:
        """Waits until ``who`` carries the traffic."""
        until(f"the {who} carries", lambda: self.show("agent")["carrier"] == who, timeout, 0.05)
