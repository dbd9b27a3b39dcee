# SPDX-License-Identifier: Apache-2.0
"""What `doctor` knows about a host: read from /proc, /sys and a few tools, and judged elsewhere (doctor.py)."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nat_control.ovs_facts import Ovs
from nat_control.pci import PciDevice, pci_devices

# The features that make one packet of several, by ethtool's words for -K; the server turns them off.
MERGING = {
    "generic-receive-offload": "gro",
    "large-receive-offload": "lro",
    "rx-gro-hw": "rx-gro-hw",
    "rx-gro-list": "rx-gro-list",
    "rx-udp-gro-forwarding": "rx-udp-gro-forwarding",
}


@dataclass(frozen=True, slots=True)
class Hugepages:
    size_kb: int
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Interface:
    """A kernel interface. ``merging`` are the merging offloads that are on; None: they could not be read."""

    mtu: int
    merging: tuple[str, ...] | None = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """One look at a host. None is always "could not be looked at"; ``unseen`` says why."""

    root: bool = True
    capabilities: int = -1  # a mask; bit numbers are those of linux/capability.h
    memlock: int | None = None  # bytes; None: no limit
    rtprio: int | None = None  # None: no limit
    realtime: bool | None = None  # a thread may have SCHED_FIFO
    hugepages: tuple[Hugepages, ...] = ()
    node_hugepages: tuple[tuple[Hugepages, ...], ...] = ()  # of each NUMA node
    hugetlbfs: tuple[str, ...] = ()  # where it is mounted
    iommu_groups: int = 0
    unsafe_noiommu: bool = False
    modules: frozenset[str] = frozenset()  # loaded or built in, of those that matter
    loadable: frozenset[str] = frozenset()  # could be loaded
    nics: tuple[PciDevice, ...] = ()
    cpu_flags: frozenset[str] = frozenset()
    hash_path: str = "baseline"
    cpus: frozenset[int] = frozenset()  # online
    nodes: tuple[frozenset[int], ...] = ()  # CPUs of each NUMA node
    isolated: frozenset[int] = frozenset()
    governors: tuple[tuple[int, str], ...] = ()
    clock: str | None = None
    clocks: tuple[str, ...] = ()  # available
    rmem_default: int | None = None
    rmem_max: int | None = None
    interfaces: tuple[tuple[str, Interface], ...] = ()
    default_route: frozenset[str] = frozenset()
    ovs: Ovs | None = None
    unseen: tuple[str, ...] = ()


MODULES = ("vfio_pci", "uio_pci_generic", "igb_uio")


def gather(
    root: Path = Path("/"), devices: Iterable[str] = (), ovs: Ovs | None = None, unseen: Sequence[str] = ()
) -> Facts:
    """Looks at this host; ``devices`` are the kernel interfaces whose offloads matter.

    Under another ``root`` only files are read: what is asked of the running kernel and of tools is left as it
    is by default.
    """
    from nat_fastpath.engine import hash_path  # with numpy; the other commands start without

    here = root == Path("/")
    gaps = list(unseen)
    status = dict(line.split(":", 1) for line in _text(root / "proc/self/status").splitlines() if ":" in line)
    names = {path.name for path in (root / "sys/class/net").glob("*")}
    cpu = root / "sys/devices/system/cpu"
    clock = root / "sys/devices/system/clocksource/clocksource0"
    noiommu = _text(root / "sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    modules, loadable = _modules(root)
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    return Facts(
        root=(status.get("Uid", "0 0").split() or ["0", "0"])[1] == "0",
        capabilities=int(status.get("CapEff", "0").strip() or "0", 16),
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        rtprio=_limit(resource.RLIMIT_RTPRIO),
        realtime=_realtime() if here else None,
        hugepages=_hugepages(root / "sys/kernel/mm/hugepages"),
        node_hugepages=tuple(_hugepages(path / "hugepages") for path in nodes),
        hugetlbfs=tuple(
            words[1]
            for line in _text(root / "proc/mounts").splitlines()
            if len(words := line.split()) > 2 and words[2] == "hugetlbfs"
        ),
        iommu_groups=len(list((root / "sys/kernel/iommu_groups").glob("*"))),
        unsafe_noiommu=noiommu in ("Y", "1"),
        modules=modules,
        loadable=loadable,
        nics=tuple(pci_devices(root)),
        cpu_flags=_cpu_flags(root),
        hash_path=hash_path(),
        cpus=cpu_list(_text(cpu / "online")),
        nodes=tuple(cpu_list(_text(path / "cpulist")) for path in nodes),
        isolated=cpu_list(_text(cpu / "isolated")),
        governors=tuple(
            sorted(
                (int(path.parents[1].name[3:]), _text(path))
                for path in cpu.glob("cpu[0-9]*/cpufreq/scaling_governor")
            )
        ),
        clock=_text(clock / "current_clocksource") or None,
        clocks=tuple(_text(clock / "available_clocksource").split()),
        rmem_default=_int(root / "proc/sys/net/core/rmem_default"),
        rmem_max=_int(root / "proc/sys/net/core/rmem_max"),
        interfaces=tuple(
            (name, Interface(mtu, _merging(name, gaps) if here else ()))
            for name in sorted(set(devices) & names)
            if (mtu := _int(root / "sys/class/net" / name / "mtu")) is not None
        ),
        default_route=_default_route(root),
        ovs=ovs,
        unseen=tuple(gaps),
    )


def cpu_list(text: str) -> frozenset[int]:
    """ "0-2,5" → 0, 1, 2, 5, as the kernel writes sets of CPUs."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _hugepages(folder: Path) -> tuple[Hugepages, ...]:
    return tuple(
        Hugepages(size, _int(path / "nr_hugepages") or 0, _int(path / "free_hugepages") or 0)
        for path in sorted(folder.glob("hugepages-*kB"))
        if (size := int(path.name[10:-2]))
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _int(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _limit(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _realtime() -> bool:
    """Tried, and taken back: limits, capabilities and control groups all have their say."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, policy, parameters)
    except OSError:
        return False
    return True


def _modules(root: Path) -> tuple[frozenset[str], frozenset[str]]:
    loaded = {name for name in MODULES if (root / "sys/module" / name).is_dir()}
    release = _text(root / "proc/sys/kernel/osrelease")
    folder = root / "lib/modules" / release
    lines = _text(folder / "modules.dep").splitlines()
    built_in = _text(folder / "modules.builtin").splitlines()

    def names(paths: Iterable[str]) -> set[str]:
        return {path.split(":")[0].rpartition("/")[2].split(".")[0].replace("-", "_") for path in paths}

    return frozenset(loaded | names(built_in) & set(MODULES)), frozenset(names(lines) & set(MODULES))


def _cpu_flags(root: Path) -> frozenset[str]:
    for line in _text(root / "proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _default_route(root: Path) -> frozenset[str]:
    """The interfaces of default routes (or their halves), and those that they stand on."""
    due: set[str] = set()
    for line in _text(root / "proc/net/route").splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and int(words[7], 16) in (0, 0x80):  # the mask, in network order
            due.add(words[0])
    for line in _text(root / "proc/net/ipv6_route").splitlines():
        words = line.split()
        if len(words) > 9 and int(words[1], 16) <= 1 and words[9] != "lo":
            due.add(words[9])
    found: set[str] = set()
    while due:
        name = due.pop()
        found.add(name)
        due |= {path.name[6:] for path in (root / "sys/class/net" / name).glob("lower_*")} - found
    return frozenset(found)


def _merging(name: str, gaps: list[str]) -> tuple[str, ...] | None:
    try:
        done = subprocess.run(
            ["ethtool", "--json", "-k", name], capture_output=True, text=True, timeout=10, check=True
        )
        features = json.loads(done.stdout)[0]
    except FileNotFoundError:
        gaps.append(f"offloads of {name}: ethtool is not installed (apt install ethtool)")
    except (subprocess.SubprocessError, ValueError, LookupError) as error:
        gaps.append(f"offloads of {name}: ethtool: {getattr(error, 'stderr', None) or error}".strip())
    else:
        return tuple(
            word
            for key, word in MERGING.items()
            if key in features and features[key]["active"] and not features[key]["fixed"]
        )
    return None
