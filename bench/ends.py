# SPDX-License-Identifier: Apache-2.0
"""A box between two links, and the generator at their other ends, each a process of its own: what io and peers measure.

The links are made for each measurement, in a lab of its own; whoever may be the box gets the same ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import yaml

from bench import hugepages
from nat_control import api
from nat_control.lab import Lab, LabError, Process, until

CLI = (sys.executable, "-m", "nat_control.cli")
INSIDE, OUTSIDE = ("10.0.0.1", "10.0.0.2"), ("192.0.2.1", "192.0.2.254")  # the box's, the generator's
PREFIX = 24
HOSTS, PER_HOST = IPv4Address("10.0.1.0"), 64
POOL_FIRST, LOAD = IPv4Address("198.18.0.0"), 0.9
MACS = "02:00:00:00:00:01", "02:00:00:00:00:02"  # the box's
PATIENCE = 60.0
OPEN = 0.99  # of the flows, at least, or the figure is another one
HUGEPAGES_MB = 2048  # for those whose memory is shared between processes, while they are measured


@dataclass(frozen=True, slots=True)
class Links:
    """Devices in DPDK's words, inside first; kernel interfaces where ``interfaces`` has their names at the box."""

    box: tuple[str, str]
    generator: tuple[str, str]
    interfaces: tuple[str, str] | None = None
    driver: str = "auto"
    sockets: tuple[Path, ...] = ()  # that the generator makes, before a box can come


class Net:
    """Namespaces of the box and of the generator, and links of a ``kind`` between them. Raises LabError."""

    def __init__(self, lab: Lab, kind: str) -> None:
        self.lab = lab
        self.box, self.generator = lab.namespace("box"), lab.namespace("generator")
        self.links = LINKS[kind](self)

    @property
    def cpus(self) -> tuple[int, int]:
        """The generator's and the box's."""
        cpus = sorted(os.sched_getaffinity(0))
        return cpus[0], cpus[-1]


def _veth(driver: str) -> Callable[[Net], Links]:
    def make(net: Net) -> Links:
        names = "inside", "outside"
        for name in names:
            net.lab.cable(net.generator, name, net.box, f"box-{name}")
        ours = f"box-{names[0]}", f"box-{names[1]}"
        return Links(ours, names, ours, driver)

    return make


def _memif(more: str) -> Callable[[Net], Links]:
    """The generator is the server, and ends first: that of DPDK 22.11 may crash when its client goes."""

    def make(net: Net) -> Links:
        paths = tuple(net.lab.directory / f"{name}.memif" for name in ("inside", "outside"))
        box, generator = (
            [f"net_memif{i},role={role},socket={path},socket-abstract=no{words}" for i, path in enumerate(paths)]
            for role, words in (("client", more), ("server", ""))
        )  # fmt: skip
        return Links((box[0], box[1]), (generator[0], generator[1]), sockets=paths)

    return make


def _vhost(net: Net) -> Links:
    """The generator is the virtio_user, the box the vhost, as a virtual switch is, which waits for its sockets."""
    paths = tuple(net.lab.directory / f"{name}.vhost" for name in ("inside", "outside"))
    box = [f"net_vhost{i},iface={path},client=1" for i, path in enumerate(paths)]
    generator = [f"net_virtio_user{i},path={path},server=1" for i, path in enumerate(paths)]
    return Links((box[0], box[1]), (generator[0], generator[1]))


LINKS: dict[str, Callable[[Net], Links]] = {
    "memif": _memif(""),
    "memif-zc": _memif(
        ",zero-copy=yes"
    ),  # the client's memory is the server's, too: nobody copies for the box
    "vhost": _vhost,
    "af_packet": _veth("af_packet"),
    "af_xdp": _veth("af_xdp"),
}


def pool(flows: int) -> tuple[IPv4Address, IPv4Address]:
    return POOL_FIRST, POOL_FIRST + int(flows / (LOAD * 64512))


# -- boxes -------------------------------------------------------------------------------------------------


def tandem(net: Net, flows: int) -> Process:
    """`tandem-nat server`, as it is installed."""
    first, last = pool(flows)
    route = {"prefix": "10.0.0.0/8", "gateway": INSIDE[1]}
    driver = {"driver": net.links.driver} if net.links.interfaces else {}
    macs = [{} if net.links.interfaces else {"mac": mac} for mac in MACS]
    config = {
        "instance": "bench",
        "ports": {
            "internal": {"device": net.links.box[0], "address": f"{INSIDE[0]}/{PREFIX}", "routes": [route], **driver, **macs[0]},
            "external": {"device": net.links.box[1], "address": f"{OUTSIDE[0]}/{PREFIX}", "gateway": OUTSIDE[1], **driver, **macs[1]},
        },
        "nat": {"pool": {"addresses": f"{first}-{last}"}, "max_sessions": flows + flows // 8 + 1000},
        "workers": {"cores": [net.cpus[1]], "idle": "busy"},
        "control": {"socket": str(net.lab.directory / "nat.sock")},
    }  # fmt: skip
    path = net.lab.directory / "nat.yaml"
    path.write_text(yaml.safe_dump(config))
    return net.box.start(*CLI, "server", str(path), name="tandem").ready("\nready", timeout=PATIENCE)


def testpmd(net: Net, flows: int) -> Process:
    """Plain forwarding, MAC addresses swapped."""
    del flows
    cpus = net.cpus
    memory = ["--in-memory", "--iova-mode=va"] if hugepages.free_mb() >= 256 else ["--no-huge", "--no-shconf"]
    memory += ["--single-file-segments"]  # the other end of a memif maps them
    devices = net.links.box
    if net.links.interfaces:
        devices = tuple(f"net_{net.links.driver}{i},iface={name}" for i, name in enumerate(devices))  # type: ignore[assignment]
    vdevs = [f"--vdev={device}" for device in devices]
    eal = [f"--lcores=0@{cpus[0]},1@{cpus[1]}", "--no-pci", "--no-telemetry", "-m", "256", *memory, *vdevs]
    forward = [
        "-i",
        "--forward-mode=macswap",
        "--auto-start",
        "--nb-cores=1",
        "--no-flush-rx",
        "--record-core-cycles",
    ]
    command = shlex.join(["dpdk-testpmd", *eal, "--", *forward, "--total-num-mbufs=32768"])
    asked = "while sleep 0.25; do echo show fwd stats all; done"  # a memif forgets what it counted when its other end goes
    process = net.box.start("bash", "-c", f"exec {command} < <({asked})", name="testpmd")
    return process.ready("Forward statistics for port 1", timeout=PATIENCE)


# -- the generator -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """``resolve``: the box answers ARP; ``translated``: it is a NAT. ``more`` are arguments of pktgen."""

    seconds: float = 2
    resolve: bool = True
    translated: bool = True
    size: str = "64"
    more: tuple[str, ...] = ()


def _generator(net: Net, flows: int, asked: Asked) -> Process:
    """`tandem-nat pktgen` around the box."""
    first, last = pool(flows) if asked.translated else (HOSTS, HOSTS + flows // PER_HOST)
    nat = ["--nat", f"{INSIDE[0]},{OUTSIDE[0]}", "--ours", f"{INSIDE[1]},{OUTSIDE[1]}"]
    command = [
        *CLI, "pktgen", *net.links.generator, "--pool", f"{first}-{last}", "--hosts", str(HOSTS),
        *(nat if asked.resolve else ["--macs", ",".join(MACS)]), *("--flows", str(flows), "--size", asked.size),
        *("--cpu", str(net.cpus[0]), "--check", "256", "--seconds", str(asked.seconds), "--json"), *asked.more,
    ]  # fmt: skip
    return net.generator.start(*command, name="pktgen")


Box = Callable[[Net, int], Process]


def said(kind: str, box: Box, flows: int, asked: Asked) -> tuple[str, float | None]:
    """One measurement: links, box and generator are made and taken away.

    What pktgen has written, and the ns of a packet on the box's CPU if the box tells. Raises LabError.
    """
    with Lab() as lab:
        net = Net(lab, kind)
        if net.links.sockets:
            generator = _generator(net, flows, asked)
            until(
                "pktgen has its devices",
                lambda: _alive(generator) and all(map(Path.exists, net.links.sockets)),
            )
            process = box(net, flows)
        else:
            process = box(net, flows)
            generator = _generator(net, flows, asked)
        patience = PATIENCE + 30 * asked.seconds
        of_server = Busy(lab.directory / "nat.sock")

        def ended() -> bool:
            of_server.look()
            return not generator.alive or not _alive(process)

        until("pktgen ends", ended, patience, 0.1)
        if "{" not in generator.output:
            raise LabError(f"pktgen: {generator.last_line}")
        process.stop()
        return generator.output, of_server.ns or _testpmd_ns(process.output)


class Busy:
    """Of the second in which a `tandem-nat server` received most: the ns of its worker for each packet."""

    def __init__(self, control: Path) -> None:
        self._control, self._most = control, 0.0
        self.ns: float | None = None

    def look(self) -> None:
        if not self._control.exists():
            return
        with contextlib.suppress(OSError, StopIteration, api.ApiError):
            status = next(api.ask(self._control, {"show": "status"}))["status"]
            rate = sum(status["rates"][f"rx_packets.{i}"] for i in (0, 1))
            if rate > self._most:
                self._most, self.ns = rate, 1e9 * status["worker"]["busy_share"] / rate


def _testpmd_ns(output: str) -> float | None:
    """Of the turns that had packets, as it says at its end."""
    said = re.findall(r"CPU cycles/packet=([\d.]+) .* at (\d+) MHz", output)
    return 1e3 * float(said[-1][0]) / float(said[-1][1]) if said else None


def once(kind: str, box: Box, flows: int, asked: Asked) -> dict[str, Any]:
    """What pktgen says of its run, and ``box_ns``."""
    text, ns = said(kind, box, flows, asked)
    found: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    if found["open_flows"] < flows * OPEN:
        raise LabError(f"of {flows:,} flows {found['open_flows']:,} could be opened")
    return {**found["run"], "box_ns": ns}


def rfc9693(kind: str, flows: int, high: float, seconds: float) -> list[dict[str, Any]]:
    """The phases around our server, below ``high`` packets per second."""
    asked = Asked(seconds, more=("--rfc9693", "--rate", str(high)))
    text, _ = said(kind, tandem, flows, asked)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _alive(process: Process) -> bool:
    if not process.alive:
        raise LabError(f"{process.log.stem} ended with code {process.popen.returncode}: {process.last_line}")
    return True
