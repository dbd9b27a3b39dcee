# SPDX-License-Identifier: Apache-2.0
"""What is right and wrong with a host: pure functions from facts (host_facts.py) to findings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nat_control.config import Config
from nat_control.findings import Finding, Severity, good, sysctl, write
from nat_control.host_facts import Facts
from nat_control.ovs_doctor import ovs_findings
from nat_control.pci import PciDevice
from nat_fastpath.devargs import DEVARGS, pci_address

CAPABILITIES = {"NET_ADMIN": 12, "NET_RAW": 13}  # what raw sockets and changes to interfaces need
IPC_LOCK = 14
USERSPACE = {"vfio-pci", "uio_pci_generic", "igb_uio"}
BIFURCATED = {"mlx4_core", "mlx5_core", "mana"}  # DPDK drives these beside their kernel driver
WITHOUT_CONFIG_MB = 512  # of hugepages, when no configuration says how much is needed


@dataclass(frozen=True, slots=True)
class Need:
    """A configuration, and what it takes: bytes of tables in hugepages, MB of packet buffers."""

    config: Config
    tables: int
    packets_mb: int

    @property
    def hugepages_mb(self) -> int:
        return self.packets_mb + -(-self.tables // 2**20)


def diagnose(facts: Facts, need: Need | None = None) -> list[Finding]:
    """All findings, the worst first, in the order of the checks among equals."""
    config = need.config if need else None
    found = [*_permissions(facts), *_cpu(facts)]
    if config is None or not config.switch:
        found += [
            *_hugepages(facts, need),
            *_iommu(facts, config),
            *_ports(facts, config),
            *_cores(facts, config),
        ]
    if facts.ovs:
        found += ovs_findings(facts.ovs, config, facts.rmem_default)
    found += [Finding("unseen", Severity.NOTE, f"not looked at: {line}") for line in facts.unseen]
    order = list(Severity)
    return sorted(found, key=lambda finding: -order.index(finding.severity))


def _permissions(facts: Facts) -> Iterator[Finding]:
    lacking = [name for name, bit in CAPABILITIES.items() if not facts.capabilities >> bit & 1]
    if not facts.root:
        yield Finding(
            "permissions",
            Severity.WARNING,
            "this user is not root",
            "a server needs root; and some things could not be looked at",
            (("sudo", "tandem-nat", "doctor"),),
        )
    elif lacking:
        yield Finding(
            "permissions",
            Severity.PROBLEM,
            f"root, but without CAP_{' and CAP_'.join(lacking)}",
            "raw sockets and changes to interfaces need them; a container has them only if it is told to",
            advice="docker run " + " ".join(f"--cap-add={name}" for name in lacking),
        )
    else:
        yield good("permissions", "root, with CAP_NET_ADMIN and CAP_NET_RAW")
    if facts.memlock is not None and not facts.capabilities >> IPC_LOCK & 1:
        yield Finding(
            "memlock",
            Severity.NOTE,
            f"{facts.memlock >> 10} KiB of memory may be locked",
            "vfio locks all memory that a NIC writes to",
            advice="ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        )
    if facts.realtime is False:
        limit = "without limit" if facts.rtprio is None else facts.rtprio
        yield Finding(
            "realtime",
            Severity.NOTE,
            f"no thread may have SCHED_FIFO here (RLIMIT_RTPRIO is {limit})",
            "a busy host may then keep the heartbeat waiting",
            advice="ulimit -r 50, LimitRTPRIO=50 in the unit, or CAP_SYS_NICE",
        )
    elif facts.realtime:
        yield good("realtime", "threads may have SCHED_FIFO")


def _cpu(facts: Facts) -> Iterator[Finding]:
    aes = ", AES" if "aes" in facts.cpu_flags else ""
    if facts.hash_path == "baseline":
        what = "the hash of new packets runs in its baseline code"
        yield Finding(
            "cpu", Severity.NOTE, what + aes, "with AVX2 or AVX-512 a look-up costs less; it works without"
        )
    else:
        yield good("cpu", f"the hash runs in its code for {facts.hash_path}{aes}")
    if facts.clock and facts.clock != "tsc" and "tsc" in facts.cpu_flags:
        mendable = "tsc" in facts.clocks
        path = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        yield Finding(
            "clock",
            Severity.WARNING if mendable else Severity.NOTE,
            f"the clock source is {facts.clock}, not tsc",
            "the worker reads the clock in every loop, and this one costs a call of the kernel",
            (write("tsc", path),) if mendable else (),
            advice="" if mendable else "the kernel does not trust this CPU's TSC: see `dmesg | grep -i tsc`",
            automatic=mendable,
        )
    elif facts.clock:
        yield good("clock", f"the clock source is {facts.clock}")


def _hugepages(facts: Facts, need: Need | None) -> Iterator[Finding]:
    if not facts.hugepages:
        yield Finding(
            "hugepages", Severity.WARNING, "this kernel has no hugepages", "memory is slower without"
        )
        return
    free_mb = sum(pages.free * pages.size_kb for pages in facts.hugepages) >> 10
    total = ", ".join(f"{p.free} of {p.total} of {p.size_kb >> 10} MiB" for p in facts.hugepages if p.total)
    wanted = need.hugepages_mb if need else WITHOUT_CONFIG_MB
    small = min(facts.hugepages, key=lambda pages: pages.size_kb)
    missing = -(-(wanted - free_mb) * 1024 // small.size_kb)
    state = f"hugepages free: {total or 'none, and none reserved'}"
    far = list(_node_hugepages(facts, need)) if need and len(facts.nodes) > 1 else []
    if far:
        yield from far
    elif (need and missing > 0) or not free_mb:
        for_what = "this configuration takes" if need else "a start may take"
        mend = (
            sysctl("vm.nr_hugepages", small.total + missing)
            if small.size_kb == 2048
            else write(
                str(small.total + missing),
                f"/sys/kernel/mm/hugepages/hugepages-{small.size_kb}kB/nr_hugepages",
            )
        )
        yield Finding(
            "hugepages",
            Severity.WARNING,
            f"{state}; {for_what} {wanted} MiB",
            "ordinary memory works, with more TLB misses; NICs by vfio need hugepages, and a killed server's peer hears"
            " of it later the more ordinary memory the kernel has to take down",
            (mend,),
            advice="vm.nr_hugepages in /etc/sysctl.d outlasts a reboot",
            automatic=True,
        )
    else:
        yield good("hugepages", state + (f"; this configuration takes {wanted} MiB" if need else ""))
    if facts.hugetlbfs:
        yield good("hugetlbfs", f"hugetlbfs is mounted on {', '.join(facts.hugetlbfs)}")
    else:
        yield Finding(
            "hugetlbfs",
            Severity.NOTE,
            "no hugetlbfs is mounted",
            "the server does without; other programs with DPDK want it",
            (("mkdir", "-p", "/dev/hugepages"), ("mount", "-t", "hugetlbfs", "none", "/dev/hugepages")),
            automatic=True,
        )


def _node_hugepages(facts: Facts, need: Need) -> Iterator[Finding]:
    """Those of the NUMA nodes at which NICs of the configuration are."""
    nodes = {nic.node: address for _, address, nic in _pci_ports(facts, need.config) if nic}
    for node, address in sorted(nodes.items()):
        if not 0 <= node < len(facts.node_hugepages) or not facts.node_hugepages[node]:
            continue
        pages = facts.node_hugepages[node]
        free_mb = sum(kind.free * kind.size_kb for kind in pages) >> 10
        if free_mb >= need.hugepages_mb:
            continue
        small = min(pages, key=lambda kind: kind.size_kb)
        wanted = small.total - (-(need.hugepages_mb - free_mb) * 1024 // small.size_kb)
        folder = f"/sys/devices/system/node/node{node}/hugepages/hugepages-{small.size_kb}kB"
        yield Finding(
            "hugepages",
            Severity.WARNING,
            f"NUMA node {node}, with NIC {address}, has {free_mb} MiB of hugepages free; this configuration takes"
            f" {need.hugepages_mb} MiB",
            "what does not lie there is reached through the other socket, or is ordinary memory",
            (write(str(wanted), f"{folder}/nr_hugepages"),),
            advice="a line of /etc/tmpfiles.d (`w`) outlasts a reboot",
            automatic=True,
            subject=f"node {node}",
        )


def _pci_ports(facts: Facts, config: Config | None) -> Iterator[tuple[str, str, PciDevice | None]]:
    """(port, device, NIC): the ports of a configuration that are PCI devices, and who that is here."""
    nics = {nic.address: nic for nic in facts.nics}
    for port in config.ports if config else ():
        if address := pci_address(port.device):
            yield port.name, address, nics.get(address)


def kernel_interface(device: str) -> str:
    """The kernel interface of ``device``, which may be its name, or in DPDK's words have it as ``iface=``."""
    found = re.search(r",iface=([^,]+)", device)
    return found[1] if found else device


def _kernel_arguments(arguments: str) -> str:
    """Nothing that --fix would do: a host that does not boot is worse."""
    return (
        f"sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{arguments} /' /etc/default/grub && update-grub && reboot "
        f"(or grubby --update-kernel=ALL --args='{arguments}')"
    )


def _iommu(facts: Facts, config: Config | None) -> Iterator[Finding]:
    wanted = [nic for _, _, nic in _pci_ports(facts, config) if nic and nic.driver not in BIFURCATED]
    unsafe = (("modprobe", "vfio"), write("1", "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"))
    if facts.iommu_groups:
        yield good("iommu", f"the IOMMU is on, with {facts.iommu_groups} groups")
    else:
        yield Finding(
            "iommu",
            Severity.PROBLEM if wanted and not facts.unsafe_noiommu else Severity.NOTE,
            "no IOMMU is on"
            + (", and vfio works without one, as it was told" if facts.unsafe_noiommu else ""),
            "vfio-pci takes a NIC only with an IOMMU, or in its unsafe mode, where the NIC may write anywhere",
            unsafe if "vfio_pci" in facts.modules | facts.loadable and not facts.unsafe_noiommu else (),
            advice="where there is one: on in the firmware, and "
            + _kernel_arguments("intel_iommu=on iommu=pt")
            + " (AMD needs iommu=pt only). The unsafe mode is for machines without one",
        )
    if "vfio_pci" in facts.modules:
        yield good("vfio", "vfio-pci is loaded")
    else:
        can = "vfio_pci" in facts.loadable
        others = sorted(facts.modules - {"vfio_pci"})
        yield Finding(
            "vfio",
            Severity.PROBLEM if wanted and not others else Severity.NOTE,
            "vfio-pci is not loaded" + ("" if can else ", and this kernel has no such module"),
            "without it DPDK takes no NIC, save those that share with their kernel driver (Mellanox)"
            + (f"; there is {', '.join(others)}" if others else ""),
            (("modprobe", "vfio-pci"),) if can else (),
            advice="" if can else "a kernel with CONFIG_VFIO_PCI; kernel interfaces need none of this",
            automatic=can,
        )


def _ports(facts: Facts, config: Config | None) -> Iterator[Finding]:
    for name, address, nic in _pci_ports(facts, config):
        if nic is None:
            known = ", ".join(other.address for other in facts.nics) or "none"
            what = f"ports.{name}: there is no NIC {address}; here are: {known}"
            yield Finding(
                "nic", Severity.PROBLEM, what, "the server does not start", advice="`tandem-nat drivers`"
            )
        elif nic.driver in USERSPACE | BIFURCATED:
            yield good("nic", f"ports.{name}: {address} is bound to {nic.driver}")
        else:
            carries = facts.default_route & set(nic.interfaces)
            yield Finding(
                "nic",
                Severity.PROBLEM,
                f"ports.{name}: {address} is bound to {nic.driver or 'no driver'}"
                + (f", and carries this host's default route ({', '.join(carries)})" if carries else ""),
                "DPDK takes it only from vfio-pci" + ("; this host would be cut off" if carries else ""),
                ()
                if carries
                else (("modprobe", "vfio-pci"), ("dpdk-devbind.py", "--bind=vfio-pci", address)),
                advice="choose another NIC, or move the route first" if carries else "",
                # an interface of the kernel that is in use is taken away by that, so a person types it
                automatic=not carries and not nic.interfaces,
                subject=name,
            )
    interfaces = dict(facts.interfaces)
    for port in config.ports if config else ():
        device = kernel_interface(port.device)
        if device in facts.default_route:
            yield Finding(
                "default-route",
                Severity.PROBLEM,
                f"ports.{port.name}: {device} carries this host's default route",
                "the server refuses it, for this host would be cut off",
                advice="another interface; or `tandem-nat server --force`, if you know how to come back",
            )
        if not (interface := interfaces.get(device)):
            if not DEVARGS.match(port.device):
                yield Finding(
                    "interface",
                    Severity.PROBLEM,
                    f"ports.{port.name}: there is no interface {device} in this network namespace",
                    "the server does not start",
                    advice="`ip link` lists them; `ip netns exec NAME tandem-nat doctor` looks at another namespace",
                    subject=port.name,
                )
            continue
        if interface.mtu < port.mtu:
            yield Finding(
                "mtu",
                Severity.NOTE,
                f"ports.{port.name}: {device} has MTU {interface.mtu}, the configuration {port.mtu}",
                "the server raises it while it runs; the other end of the cable must take such packets, too",
                (("ip", "link", "set", device, "mtu", str(port.mtu)),),
                automatic=True,
                subject=port.name,
            )
        if interface.merging:
            yield Finding(
                "offloads",
                Severity.NOTE,
                f"ports.{port.name}: {device} merges packets ({', '.join(interface.merging)})",
                "no wire ever saw what comes of it; the server turns it off while it runs, and on again",
                (("ethtool", "-K", device, *(word for key in interface.merging for word in (key, "off"))),),
                automatic=True,
                subject=port.name,
            )
        elif interface.merging is not None:
            yield good("offloads", f"ports.{port.name}: {device} merges no packets")
    if not config:
        for nic in facts.nics:
            names = f" ({', '.join(nic.interfaces)})" if nic.interfaces else ""
            route = ", carries the default route" if facts.default_route & set(nic.interfaces) else ""
            yield good("nic", f"NIC {nic.address}{names} is bound to {nic.driver or 'no driver'}{route}")


def _cores(facts: Facts, config: Config | None) -> Iterator[Finding]:
    if len(facts.nodes) > 1:
        yield good("numa", f"{len(facts.nodes)} NUMA nodes")
    cores = config.workers.cores if config else ()
    for _, address, nic in _pci_ports(facts, config):
        if nic is None or not 0 <= nic.node < len(facts.nodes):
            continue
        far = [cpu for cpu in cores if cpu not in facts.nodes[nic.node]]
        if far:
            near = sorted(facts.nodes[nic.node] & facts.cpus)
            yield Finding(
                "numa",
                Severity.WARNING,
                f"NIC {address} is at NUMA node {nic.node}, and CPU {', '.join(map(str, far))} is not",
                "every packet then crosses between the sockets",
                advice=f"workers.cores: choose of {', '.join(map(str, near))}",
            )
    absent = [str(cpu) for cpu in cores if facts.cpus and cpu not in facts.cpus]
    if absent:
        yield Finding(
            "cores",
            Severity.PROBLEM,
            f"workers.cores: CPU {', '.join(absent)} is not online",
            "the server does not start",
            advice=f"choose of {', '.join(map(str, sorted(facts.cpus)))}",
        )
    crowded = ",".join(str(cpu) for cpu in cores if cpu not in facts.isolated)
    if crowded:
        yield Finding(
            "isolation",
            Severity.NOTE,
            f"CPU {crowded} of workers.cores is not isolated",
            "other work of this host interrupts the worker there, and packets wait",
            advice=_kernel_arguments(
                f"isolcpus=managed_irq,domain,{crowded} nohz_full={crowded} rcu_nocbs={crowded}"
            ),
        )
    elif cores:
        yield good("isolation", "the CPUs of workers.cores are isolated")
    slow = [
        (cpu, governor)
        for cpu, governor in facts.governors
        if governor != "performance" and (cpu in cores or not cores)
    ]
    if slow:
        names = ", ".join(str(cpu) for cpu, _ in slow)
        yield Finding(
            "governor",
            Severity.WARNING,
            f"CPU {names}: the frequency governor is {', '.join(sorted({governor for _, governor in slow}))}",
            "a worker that sleeps is met by a slow CPU when packets come",
            tuple(
                write("performance", f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor")
                for cpu, _ in slow
            ),
            automatic=True,
        )
