# SPDX-License-Identifier: Apache-2.0
"""`doctor`'s judgement: planted facts and their findings, and a planted /proc and /sys and its facts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_control.config import parse
from nat_control.doctor import Need, diagnose
from nat_control.findings import Finding, Severity
from nat_control.host_facts import Facts, Hugepages, Interface, cpu_list, gather
from nat_control.ovs_facts import Bridge, Controller, Ovs, PollPort
from nat_control.pci import PciDevice
from nat_fastpath.engine import hash_path
from tests.host.hosts import nic, plant
from tests.unit.test_cli import GOOD

ROOT = Path(__file__).parents[2]
NIC = PciDevice("0000:03:00.0", 0x8086, 0x10FB, 0x8086, 1, "vfio-pci", (), 0, "7")
GOOD_BRIDGE = Bridge(
    "br0",
    "0000000000000001",
    "netdev",
    "secure",
    ("OpenFlow13",),
    (Controller("u1", "tcp:127.0.0.1:6653", 1000, 5000), Controller("u2", "tcp:127.0.0.1:6654", 1000, 5000)),
)
GOOD_OVS = Ovs(
    "unix:/db",
    (GOOD_BRIDGE,),
    {"flow-limit": "300000"},
    "/run/ovs.ctl",
    (64 << 20,),
    (200_000,),
    (PollPort("p0", 2048),),
)
HEALTHY = Facts(
    hugepages=(Hugepages(2048, 1024, 1024),),
    hugetlbfs=("/dev/hugepages",),
    iommu_groups=9,
    modules=frozenset({"vfio_pci"}),
    loadable=frozenset({"vfio_pci"}),
    nics=(NIC, replace(NIC, address="0000:03:00.1")),
    cpu_flags=frozenset({"tsc", "aes", "avx2"}),
    hash_path="avx2",
    cpus=frozenset(range(4)),
    nodes=(frozenset({0, 1}), frozenset({2, 3})),
    node_hugepages=((Hugepages(2048, 512, 512),), (Hugepages(2048, 512, 512),)),
    isolated=frozenset({1}),
    governors=((1, "performance"),),
    clock="tsc",
    clocks=("tsc", "hpet"),
    rmem_default=64 << 20,
    rmem_max=64 << 20,
    realtime=True,
    interfaces=(("nat-in", Interface(1500)), ("nat-out", Interface(1500))),
    default_route=frozenset({"eth0"}),
    ovs=GOOD_OVS,
)


def need(**ports: str) -> Need:
    """A configuration on CPU 1 with the devices that are given."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    for name, device in ports.items():
        tree["ports"][name]["device"] = device
    tree["workers"] = {"cores": [1]}
    return Need(parse(tree), 10 << 20, 126)


def switch() -> Need:
    return Need(parse(yaml.safe_load((ROOT / "examples/pair-switch.yaml").read_text())), 10 << 20, 0)


KERNEL, VFIO = need(), need(internal="0000:03:00.0", external="0000:03:00.1")


def bad(found: list[Finding]) -> list[tuple[str, Severity]]:
    return [(f.check, f.severity) for f in found if f.severity is not Severity.GOOD]


@pytest.mark.parametrize("config", [None, KERNEL, VFIO, switch()])
def test_a_healthy_host_has_nothing_but_good_findings(config: Need | None) -> None:
    found = diagnose(HEALTHY, config)
    assert bad(found) == []
    assert all(not f.commands for f in found)


NOTE, WARNING, PROBLEM = Severity.NOTE, Severity.WARNING, Severity.PROBLEM
NAT_OUT = HEALTHY.interfaces[1]
UNBOUND = (replace(NIC, driver="ixgbe", interfaces=("eth0",)), replace(NIC, address="0000:03:00.1"))


@pytest.mark.parametrize(
    ("config", "changed", "check", "severity", "remedy"),
    [
        (None, {"hugepages": (Hugepages(2048, 0, 0),)}, "hugepages", WARNING, "vm.nr_hugepages=256"),
        # 136 MiB, of which 20 are free: 58 pages more than the 100 that others have
        (KERNEL, {"hugepages": (Hugepages(2048, 110, 10),)}, "hugepages", WARNING, "vm.nr_hugepages=168"),
        # the NIC's node lacks 136 - 2 MiB, and the other one does not help
        (VFIO, {"node_hugepages": ((Hugepages(2048, 9, 1),), HEALTHY.hugepages)}, "hugepages", WARNING,
         "echo 76 > /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"),
        (None, {"hugepages": (Hugepages(1 << 20, 0, 0),)}, "hugepages", WARNING, "hugepages-1048576kB"),
        (None, {"hugetlbfs": ()}, "hugetlbfs", NOTE, "mount -t hugetlbfs"),
        (None, {"iommu_groups": 0}, "iommu", NOTE, "enable_unsafe_noiommu_mode"),
        (VFIO, {"iommu_groups": 0}, "iommu", PROBLEM, "enable_unsafe_noiommu_mode"),
        (VFIO, {"iommu_groups": 0, "unsafe_noiommu": True}, "iommu", NOTE, ""),
        (VFIO, {"modules": frozenset()}, "vfio", PROBLEM, "modprobe vfio-pci"),
        (VFIO, {"modules": frozenset({"igb_uio"})}, "vfio", NOTE, "modprobe vfio-pci"),
        (KERNEL, {"modules": frozenset(), "loadable": frozenset()}, "vfio", NOTE, ""),
        (VFIO, {"nics": HEALTHY.nics[1:]}, "nic", PROBLEM, ""),
        (need(internal="pci:03:00.0", external="03:00.1"), {"nics": HEALTHY.nics[1:]}, "nic", PROBLEM, ""),
        (VFIO, {"nics": (replace(NIC, driver=None), HEALTHY.nics[1])}, "nic", PROBLEM, "--bind=vfio-pci 0000:03:00.0"),
        (VFIO, {"nics": UNBOUND}, "nic", PROBLEM, ""),  # it carries the default route: no command
        (VFIO, {"nics": (replace(NIC, node=1), HEALTHY.nics[1])}, "numa", WARNING, ""),
        (KERNEL, {"cpus": frozenset({0})}, "cores", PROBLEM, ""),
        (KERNEL, {"isolated": frozenset()}, "isolation", NOTE, ""),
        (KERNEL, {"governors": ((0, "powersave"), (1, "powersave"))}, "governor", WARNING, "cpu1/cpufreq"),
        (None, {"clock": "hpet"}, "clock", WARNING, "echo tsc"),
        (None, {"clock": "hpet", "clocks": ("hpet",)}, "clock", NOTE, ""),
        (None, {"hash_path": "baseline"}, "cpu", NOTE, ""),
        (None, {"root": False}, "permissions", WARNING, "sudo"),
        (None, {"capabilities": ~(1 << 13)}, "permissions", PROBLEM, ""),
        (None, {"capabilities": ~(1 << 14), "memlock": 8 << 20}, "memlock", NOTE, ""),
        (None, {"realtime": False}, "realtime", NOTE, ""),
        (KERNEL, {"default_route": frozenset({"nat-in"})}, "default-route", PROBLEM, ""),
        (KERNEL, {"interfaces": HEALTHY.interfaces[1:]}, "interface", PROBLEM, ""),
        (KERNEL, {"interfaces": (("nat-in", Interface(1400)), NAT_OUT)}, "mtu", NOTE, "nat-in mtu 1500"),
        (KERNEL, {"interfaces": (("nat-in", Interface(1500, ("gro", "lro"))), NAT_OUT)}, "offloads", NOTE, "nat-in gro off lro off"),
        (None, {"unseen": ("x: why",)}, "unseen", NOTE, ""),
        (switch(), {"rmem_default": 212992}, "ovs-rmem-default", WARNING, "net.core.rmem_default=67108864"),
    ],
)  # fmt: skip
def test_one_fault_is_one_finding_with_its_remedy(
    config: Need | None, changed: dict[str, Any], check: str, severity: Severity, remedy: str
) -> None:
    found = diagnose(replace(HEALTHY, **changed), config)
    assert bad(found) == [(check, severity)]
    assert found[0].check == check, "the worst is first"
    assert remedy in " && ".join(found[0].remedy)
    assert bool(remedy) == bool(found[0].commands)
    assert check == "unseen" or found[0].why


def with_bridge(**changed: Any) -> Ovs:
    return replace(GOOD_OVS, bridges=(replace(GOOD_BRIDGE, **changed),))


def with_controller(**changed: Any) -> Ovs:
    first, second = GOOD_BRIDGE.controllers
    return with_bridge(controllers=(replace(first, **changed), second))


@pytest.mark.parametrize(
    ("ovs", "checks", "remedy"),
    [
        (replace(GOOD_OVS, other_config={"flow-limit": "300000", "pmd-maxsleep": "100"}), ["ovs-pmd-maxsleep"],
         "--timeout=10 remove Open_vSwitch . other_config pmd-maxsleep"),
        (replace(GOOD_OVS, other_config={}), ["ovs-flow-limit"], "other_config:flow-limit=300000"),
        (replace(GOOD_OVS, limits=(200_000, 10_000)), ["ovs-flow-limit-now"], "-t /run/ovs.ctl upcall/set-flow-limit 200000"),
        (replace(GOOD_OVS, poll_ports=(PollPort("p1", 512),)), ["ovs-rings"], "set interface p1 options:n_rxq_desc=2048"),
        (replace(GOOD_OVS, control=None), ["ovs-management"], "revalidator/purge"),
        (replace(GOOD_OVS, receive_buffers=(212992,)), ["ovs-receive-buffer"], "restart openvswitch-switch"),
        (with_bridge(fail_mode=None), ["ovs-fail-mode"], "--db=unix:/db --timeout=10 set bridge br0 fail_mode=secure"),
        (with_bridge(protocols=("OpenFlow10",)), ["ovs-protocols"], "add bridge br0 protocols OpenFlow13"),
        (with_bridge(datapath_id="0000000000000002"), ["ovs-bridge"], "datapath-id=0000000000000001"),
        (with_bridge(controllers=()), ["ovs-controller"], "set-controller br0 tcp:127.0.0.1:6653 tcp:127.0.0.1:6654"),
        (with_controller(target="ptcp:6653"), ["ovs-controller", "ovs-passive"], "set-controller br0 tcp:"),
        (with_controller(max_backoff=None), ["ovs-max-backoff"], "set controller u1 max_backoff=1000"),
        (with_controller(max_backoff=8000), ["ovs-max-backoff"], "set controller u1 max_backoff=1000"),
        (with_controller(inactivity_probe=0), ["ovs-inactivity-probe"], "set controller u1 inactivity_probe=5000"),
        (with_controller(inactivity_probe=60000), ["ovs-inactivity-probe"], "inactivity_probe=5000"),
    ],
)  # fmt: skip
def test_settings_of_the_switch(ovs: Ovs, checks: list[str], remedy: str) -> None:
    found = diagnose(replace(HEALTHY, ovs=ovs), switch())
    assert [check for check, _ in bad(found)] == checks
    assert remedy in " && ".join(found[0].remedy)


def test_a_switch_that_nobody_may_manage_is_named() -> None:
    tree = yaml.safe_load((ROOT / "examples/pair-switch.yaml").read_text())
    del tree["switch"]["ovs"]
    found = diagnose(HEALTHY, Need(parse(tree), 10 << 20, 0))
    assert bad(found) == [("ovs-unmanaged", WARNING)]
    assert found[0].remedy == ("ovs-appctl -t /run/ovs.ctl revalidator/purge",)


def test_an_agent_needs_no_hugepages_and_no_nic() -> None:
    bare = replace(HEALTHY, hugepages=(), hugetlbfs=(), iommu_groups=0, modules=frozenset(), nics=())
    assert bad(diagnose(bare, switch())) == []


def test_a_nic_in_use_by_the_kernel_is_never_taken_by_fix() -> None:
    used = replace(NIC, driver="ixgbe", interfaces=("eth3",))
    finding = diagnose(replace(HEALTHY, nics=(used, HEALTHY.nics[1])), VFIO)[0]
    assert finding.check == "nic"
    assert finding.commands
    assert not finding.automatic


def test_a_remedy_failed_if_the_finding_is_there_in_other_words() -> None:
    first = Finding("hugepages", WARNING, "none free")
    assert first.is_still(Finding("hugepages", WARNING, "3 free"))
    assert not first.is_still(Finding("hugepages", Severity.GOOD, "all free"))
    assert not first.is_still(replace(first, subject="other"))


def test_facts_of_a_planted_host(tmp_path: Path) -> None:
    plant(
        tmp_path,
        **nic("0000:03:00.0", "0x10fb", node=1),
        **{
            "proc/self/status": "Name:\tx\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000003000\n",
            "proc/mounts": "none /dev/hugepages hugetlbfs rw 0 0\nnone /tmp tmpfs rw 0 0\n",
            "proc/cpuinfo": "processor : 0\nflags : fpu tsc aes\n\nprocessor : 1\nflags : fpu\n",
            "proc/net/route": "Iface\tDest\nbond0.7\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
            "eth5\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n",
            "proc/sys/net/core/rmem_default": "212992\n",
            "proc/sys/kernel/osrelease": "6.1\n",
            "lib/modules/6.1/modules.dep": "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/x.ko.xz\n",
            "lib/modules/6.1/modules.builtin": "kernel/drivers/uio/uio_pci_generic.ko\n",
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "32\n",
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "30\n",
            "sys/devices/system/cpu/online": "0-3\n",
            "sys/devices/system/cpu/isolated": "2-3\n",
            "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor": "powersave\n",
            "sys/devices/system/node/node0/cpulist": "0-1\n",
            "sys/devices/system/node/node1/cpulist": "2-3\n",
            "sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages": "16\n",
            "sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet\n",
            "sys/devices/system/clocksource/clocksource0/available_clocksource": "hpet acpi_pm\n",
            "sys/class/net/nat-in/mtu": "9000\n",
            "sys/class/net/bond0.7/lower_bond0/x": "",
            "sys/class/net/bond0/lower_eth1/x": "",
            "sys/kernel/iommu_groups/0/type": "DMA",
        },
    )
    facts = gather(tmp_path, ["nat-in", "absent"])
    assert (facts.root, facts.capabilities, facts.iommu_groups) == (False, 0x3000, 1)
    assert facts.hugepages == (Hugepages(2048, 32, 30),)
    assert facts.node_hugepages == ((), (Hugepages(2048, 16, 0),))
    assert facts.hugetlbfs == ("/dev/hugepages",)
    assert facts.cpu_flags == {"fpu", "tsc", "aes"}
    assert facts.hash_path == hash_path()
    assert facts.default_route == {"bond0.7", "bond0", "eth1"}
    assert (facts.modules, facts.loadable) == ({"uio_pci_generic"}, {"vfio_pci"})
    assert (facts.cpus, facts.isolated) == ({0, 1, 2, 3}, {2, 3})
    assert facts.nodes == ({0, 1}, {2, 3})
    assert facts.governors == ((2, "powersave"),)
    assert (facts.clock, facts.clocks) == ("hpet", ("hpet", "acpi_pm"))
    assert (facts.rmem_default, facts.rmem_max) == (212992, None)
    assert facts.interfaces == (("nat-in", Interface(9000)),)
    assert [(n.address, n.node) for n in facts.nics] == [("0000:03:00.0", 1)]


def test_an_empty_host_is_no_crash(tmp_path: Path) -> None:
    assert diagnose(gather(tmp_path), KERNEL)


def test_sets_of_cpus() -> None:
    assert cpu_list("0-2,5\n") == {0, 1, 2, 5}
    assert cpu_list("") == frozenset()


def test_a_switch_that_is_to_use_tls_and_does_not() -> None:
    tree = yaml.safe_load((ROOT / "examples/pair-switch.yaml").read_text())
    tree["switch"] |= {
        "openflow": "tls:127.0.0.1:6653",
        "tls": {key: f"/o/{key}" for key in ("ca", "certificate", "key")},
    }
    found = diagnose(replace(HEALTHY, ovs=GOOD_OVS), Need(parse(tree), 10 << 20, 0))
    assert bad(found) == [("ovs-controller", WARNING)]
    assert "set-controller br0 ssl:127.0.0.1:6653 ssl:127.0.0.1:6654" in found[0].remedy[0]
