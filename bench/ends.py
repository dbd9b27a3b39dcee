# SPDX-License-Identifier: Apache-2.0
"""A box between two links, and the generator at their other ends, each a process of its own: what io and peers measure.

The links are made for each measurement, in a lab of its own; whoever may be the box gets the same ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import yaml

from nat_control.lab import Lab, LabError, Process, until

CLI = (sys.executable, "-m", "nat_control.cli")
INSIDE, OUTSIDE = ("10.0.0.1", "10.0.0.2"), ("192.0.2.1", "192.0.2.254")  # the box's, the generator's
PREFIX = 24
HOSTS, PER_HOST = IPv4Address("10.0.1.0"), 64
POOL_FIRST, LOAD = IPv4Address("198.18.0.0"), 0.9
MACS = "02:00:00:00:00:01", "02:00:00:00:00:02"  # the box's
PACE = 200_000  # new flows per second, at first; what is lost comes again slower
PATIENCE = 60.0
HUGEPAGES = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True, slots=True)
class Links:
    """Devices in DPDK's words, inside first; kernel interfaces where ``interfaces`` has their names at the box."""

    box: tuple[str, str]
    generator: tuple[str, str]
    interfaces: tuple[str, str] | None = None
    driver: str = "auto"
    sockets: tuple[Path, ...] = ()  # that the generator makes, before a box can come


def hugepages_mb() -> int:
    """Free ones."""
    return sum(
        int((folder / "free_hugepages").read_text()) * int(folder.name[10:-2]) // 1024
        for folder in HUGEPAGES.glob("hugepages-*kB")
    )


@contextlib.contextmanager
def reserved_hugepages(mb: int) -> Iterator[None]:
    """So many are free in here, if the machine can spare them, and given back afterwards."""
    number = HUGEPAGES / "hugepages-2048kB" / "nr_hugepages"
    missing = (mb - hugepages_mb()) // 2
    if missing <= 0 or not os.access(number, os.W_OK):
        yield
        return
    before = int(number.read_text())
    number.write_text(str(before + missing))
    try:
        yield
    finally:
        number.write_text(str(before))


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


def _memif(net: Net) -> Links:
    """The generator is the server, and ends first: that of DPDK 22.11 may crash when its client goes."""
    paths = tuple(net.lab.directory / f"{name}.memif" for name in ("inside", "outside"))
    box, generator = (
        [f"net_memif{i},role={role},socket={path},socket-abstract=no" for i, path in enumerate(paths)]
        for role in ("client", "server")
    )
    return Links((box[0], box[1]), (generator[0], generator[1]), sockets=paths)


def _vhost(net: Net) -> Links:
    """The generator is the virtio_user, the box the vhost, as a virtual switch is, which waits for its sockets."""
    paths = tuple(net.lab.directory / f"{name}.vhost" for name in ("inside", "outside"))
    box = [f"net_vhost{i},iface={path},client=1" for i, path in enumerate(paths)]
    generator = [f"net_virtio_user{i},path={path},server=1" for i, path in enumerate(paths)]
    return Links((box[0], box[1]), (generator[0], generator[1]))


LINKS: dict[str, Callable[[Net], Links]] = {
    "memif": _memif,
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
    memory = ["--in-memory", "--iova-mode=va"] if hugepages_mb() >= 256 else ["--no-huge", "--no-shconf"]
    devices = net.links.box
    if net.links.interfaces:
        devices = tuple(f"net_{net.links.driver}{i},iface={name}" for i, name in enumerate(devices))  # type: ignore[assignment]
    vdevs = [f"--vdev={device}" for device in devices]
    eal = [f"--lcores=0@{cpus[0]},1@{cpus[1]}", "--no-pci", "--no-telemetry", "-m", "256", *memory, *vdevs]
    forward = ["--forward-mode=macswap", "--auto-start", "--nb-cores=1", "--stats-period=1", "--no-flush-rx"]
    process = net.box.start("dpdk-testpmd", *eal, "--", *forward, "--total-num-mbufs=32768", name="testpmd")
    return process.ready("Port statistics", timeout=PATIENCE)


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


def said(kind: str, box: Box, flows: int, asked: Asked) -> str:
    """One measurement: links, box and generator are made and taken away. What pktgen has written. Raises LabError."""
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
        until("pktgen ends", lambda: not generator.alive or not _alive(process), patience)
        if "{" not in generator.output:
            raise LabError(f"pktgen: {generator.last_line}")
        return generator.output


def once(kind: str, box: Box, flows: int, asked: Asked) -> dict[str, Any]:
    """What pktgen says of its run."""
    text = said(kind, box, flows, asked)
    found: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    run: dict[str, Any] = found["run"]
    return run


def rfc9693(kind: str, flows: int, high: float, seconds: float) -> list[dict[str, Any]]:
    """The phases around our server, below ``high`` packets per second."""
    asked = Asked(seconds, more=("--rfc9693", "--rate", str(high)))
    text = said(kind, tandem, flows, asked)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _alive(process: Process) -> bool:
    if not process.alive:
        raise LabError(f"{process.log.stem} ended with code {process.popen.returncode}: {process.last_line}")
    return True
