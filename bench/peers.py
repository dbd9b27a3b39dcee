# SPDX-License-Identifier: Apache-2.0
"""Other NATs on the same ports, with the same generator and the same flows, in turn with ours: a line for each peer.

Open vSwitch and VPP are between two vhost-user links (``vhost``: what both have), the kernel's NAT between two veths. Who is not
installed is told so.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import ends, figures, hugepages
from bench.ends import Asked, Box, Net
from bench.figures import Figure
from bench.io import Around, bound, mpps
from nat_control.lab import LabError, Process, until
from switch_agent.ovs import OpenVSwitch

OVS_DPDK = Path("/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk")
MEMORY_MB = 1024  # hugepages that an Open vSwitch with DPDK asks for
FLOW_LIMIT = 300_000  # of its datapath, which begins at 10 000 and grows slowly
OUT, BACK = 1, 2  # its ports
MOST_RULES = 50_000  # flows of two rules
RULES_AT_ONCE = 5_000
GOAL = ">= 1 x: never slower"


@dataclass(frozen=True, slots=True)
class Peer:
    """``missing`` says why it cannot be measured here, empty when it can."""

    name: str
    kind: str  # of links
    box: Box
    missing: Callable[[], str]
    most: int = 1 << 24  # flows
    resolve: bool = False


# -- Open vSwitch with DPDK --------------------------------------------------------------------------------


def _ovs_missing() -> str:
    if not OVS_DPDK.exists():
        return "not installed (apt install openvswitch-switch-dpdk)"
    free = hugepages.free_mb()
    return (
        ""
        if free >= MEMORY_MB
        else f"needs {MEMORY_MB} MB of hugepages, {free} are free: sysctl vm.nr_hugepages={MEMORY_MB}"
    )


def _ovs(net: Net, flows: int, rules: Callable[[int], Iterator[str]]) -> Process:
    generator, box = net.cpus
    options = (
        "dpdk-init=true", "dpdk-socket-mem=512", f"dpdk-lcore-mask={1 << generator:#x}", f"pmd-cpu-mask={1 << box:#x}",
        f"flow-limit={FLOW_LIMIT}", 'dpdk-extra="--no-pci --in-memory --no-telemetry --iova-mode=va"',
    )  # fmt: skip
    switch = OpenVSwitch(net.box, {}, program=str(OVS_DPDK), options=options)
    for number, device in enumerate(net.links.box, 1):
        path = dict(word.split("=") for word in device.split(",")[1:])["iface"]
        of_it = ["type=dpdkvhostuserclient", f"options:vhost-server-path={path}", f"ofport_request={number}"]
        switch.vsctl("add-port", "tandem", f"p{number}", "--", "set", "interface", f"p{number}", *of_it)
    file = net.lab.directory / "rules"
    waiting = iter(rules(flows))
    while some := list(itertools.islice(waiting, RULES_AT_ONCE)):  # a busy machine takes its time
        file.write_text("".join(f"{rule}\n" for rule in some))
        switch.ofctl("add-flows", str(file))
    return switch.daemon


def _conntrack(flows: int) -> Iterator[str]:
    """ct(nat) out of a range of addresses; what comes back without a connection is dropped."""
    first, last = ends.pool(flows)
    nat = f"nat(src={first}-{last}:1024-65535)"
    macs = "dec_ttl,mod_dl_dst:02:00:00:00:00:f"
    yield f"in_port={OUT},ip,actions=ct(commit,zone=1,{nat},table=1)"
    yield f"in_port={BACK},ip,actions=ct(zone=1,nat,table=1)"
    yield f"table=1,in_port={OUT},ip,actions={macs}2,output:{BACK}"
    yield f"table=1,in_port={BACK},ct_state=+est+trk,ip,actions={macs}1,output:{OUT}"


def _per_flow(flows: int) -> Iterator[str]:
    """Two rules for each flow of the generator, which rewrite as our switch's rules do."""
    first, _ = ends.pool(flows)
    for flow in range(flows):
        host, port = ends.HOSTS + flow // ends.PER_HOST, 1024 + flow % ends.PER_HOST
        at = f"{first + flow // 60_000}", 1024 + flow % 60_000
        yield (
            f"in_port={OUT},udp,nw_src={host},tp_src={port},actions=dec_ttl,mod_nw_src:{at[0]},mod_tp_src:{at[1]},output:{BACK}"
        )
        yield f"in_port={BACK},udp,nw_dst={at[0]},tp_dst={at[1]},actions=dec_ttl,mod_nw_dst:{host},mod_tp_dst:{port},output:{OUT}"


# -- the kernel's ------------------------------------------------------------------------------------------


def _nftables(net: Net, flows: int) -> Process:
    """snat to the pool; both ends' MACs stand in the table of neighbours, since the generator answers for all addresses."""
    assert net.links.interfaces
    first, last = ends.pool(flows)
    addresses = (ends.INSIDE[0], ends.OUTSIDE[0])
    for interface, address, mac in zip(net.links.interfaces, addresses, ends.MACS, strict=True):
        net.box.ip("link", "set", interface, "address", mac)
        net.box.address(interface, f"{address}/{ends.PREFIX}")
    net.box.route("10.0.0.0/8", ends.INSIDE[1])
    net.box.route("default", ends.OUTSIDE[1])
    net.box.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.netfilter.nf_conntrack_max=20000000")
    rules = net.lab.directory / "rules.nft"
    outside = net.links.interfaces[1]
    rules.write_text(
        "table ip nat {\n chain post {\n  type nat hook postrouting priority 100;\n"
        f'  oifname "{outside}" ip protocol udp snat to {first}-{last}:1024-65535\n }}\n}}\n'
    )
    net.box.run("nft", "-f", str(rules))
    return net.box.start("sleep", "infinity", name="kernel")


def _nft_missing() -> str:
    return "" if shutil.which("nft") else "not installed (apt install nftables)"


# -- VPP ---------------------------------------------------------------------------------------------------


def _vpp_missing() -> str:
    return (
        ""
        if shutil.which("vpp") and shutil.which("vppctl")
        else "not installed (fd.io's packages; Debian has none)"
    )


def _vpp(net: Net, flows: int) -> Process:
    """nat44-ed over memif."""
    first, last = ends.pool(flows)
    control, box = net.lab.directory / "vpp.sock", net.cpus[1]
    startup = net.lab.directory / "vpp.conf"
    startup.write_text(
        f"unix {{ nodaemon cli-listen {control} runtime-dir {net.lab.directory} }}\n"
        f"cpu {{ main-core {net.cpus[0]} corelist-workers {box} }}\nplugins {{ plugin dpdk_plugin.so {{ disable }} }}\n"
        "api-segment { prefix bench }\nstatseg { size 256M }\n"
    )
    process = net.box.start("vpp", "-c", str(startup), name="vpp")
    until("VPP answers", control.exists, 30)
    sessions = flows + flows // 8 + 1024
    commands = [f"nat44 plugin enable sessions {sessions}"]
    for i, (path, address) in enumerate(
        zip(net.links.sockets, (ends.INSIDE[0], ends.OUTSIDE[0]), strict=True)
    ):
        commands += [
            f"create memif socket id {i + 1} filename {path}",
            f"create interface memif id 0 socket-id {i + 1} slave no-zero-copy hw-addr {ends.MACS[i]}",
            f"set interface state memif{i + 1}/0 up",
            f"set interface ip address memif{i + 1}/0 {address}/{ends.PREFIX}",
        ]
    commands += [
        f"ip route add 10.0.0.0/8 via {ends.INSIDE[1]} memif1/0",
        f"ip route add 0.0.0.0/0 via {ends.OUTSIDE[1]} memif2/0",
        "set interface nat44 in memif1/0 out memif2/0",
        f"nat44 add address {first} - {last}",
    ]
    for command in commands:
        net.box.run("vppctl", "-s", str(control), *command.split())
    return process


PEERS = (
    Peer("Open vSwitch ct(nat)", "vhost", partial(_ovs, rules=_conntrack), _ovs_missing),
    Peer(
        "Open vSwitch per-flow rules", "vhost", partial(_ovs, rules=_per_flow), _ovs_missing, most=MOST_RULES
    ),
    Peer("nftables snat", "af_packet", _nftables, _nft_missing, resolve=True),
    Peer("VPP nat44-ed", "memif", _vpp, _vpp_missing, resolve=True),
)


def measure(peer: Peer, flows: int, rounds: int, seconds: float) -> Figure:
    """Ours is the value, the peer the floor: ``ratio`` is how many times as fast we are."""
    name = f"peers: {peer.name}, {flows:,} flows over {peer.kind}"
    if why := peer.missing():
        return figures.missing(name, why)
    if flows > peer.most:
        return figures.missing(name, f"{peer.most:,} flows at most are measured")
    ours, theirs = Around(), Around()
    nat, its = Asked(seconds), Asked(seconds, resolve=peer.resolve)
    try:
        values, speeds = figures.interleaved(
            {
                "ours": lambda: mpps(peer.kind, ends.tandem, flows, nat, ours),
                "peer": lambda: mpps(peer.kind, peer.box, flows, its, theirs),
            },
            rounds,
        )
    except LabError as error:
        return figures.missing(name, str(error))
    if min(values["peer"]) <= 0:
        return figures.missing(name, f"nothing came through: {values['peer']} Mpps")
    return figures.figure(
        name, "Mpps", values["ours"], floor=values["peer"], floor_name=peer.name, speeds=speeds, goal=GOAL,
        wrong=ours.wrong, wrong_peer=theirs.wrong, hugepages_mb=hugepages.total_mb(), **bound(ours, theirs),
    )  # fmt: skip


def add(what: Any) -> None:
    parser = what.add_parser("peers", help="other NATs on the same ports, with the same flows (root)")
    parser.add_argument("--only", nargs="*", default=[], help="peers whose names contain one of these")
    parser.add_argument("--flows", type=int, nargs="+", default=[1, 1024, 28_000])
    parser.add_argument("--rounds", type=int, default=figures.ROUNDS)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--json", action="store_true")


def run(given: argparse.Namespace) -> None:
    chosen = [peer for peer in PEERS if not given.only or any(word in peer.name for word in given.only)]
    with hugepages.if_there_are(ends.HUGEPAGES_MB):
        for peer in chosen:
            figures.say(
                (measure(peer, flows, given.rounds, given.seconds) for flows in given.flows), given.json
            )
