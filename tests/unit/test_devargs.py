# SPDX-License-Identifier: Apache-2.0
"""What devices in DPDK's words say, and what stands in their way: planted PCI buses, real sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nat_fastpath.devargs import (
    DEVARGS,
    arguments_of,
    canonical,
    driver_of,
    kernel_interfaces,
    name_of,
    pci_address,
    problem_of,
    scatters,
    tap_interface,
)
from tests.host.hosts import nic, plant
from tests.unit.test_config import INTERNAL, changed, problems

NIC = "0000:03:00.0"


@pytest.mark.parametrize(
    ("device", "address"),
    [
        ("0000:03:00.0", NIC),
        ("03:00.0", NIC),
        ("pci:0000:03:00.0,txq_inline=0", NIC),
        ("0000:AF:00.1", "0000:af:00.1"),
        ("0000:03:00.0x", ""),
        ("0000:03:00.8", ""),
        ("net_memif0,socket=/tmp/03:00.0", ""),
    ],
)
def test_pci_addresses(device: str, address: str) -> None:
    assert pci_address(device) == address
    assert bool(DEVARGS.match(device)) == (bool(address) or device.startswith("net_"))


def test_what_the_words_say() -> None:
    device = "net_virtio_user12,path=/run/a.sock,server=1"
    assert (name_of(device), driver_of(device)) == ("net_virtio_user12", "net_virtio_user")
    assert arguments_of(device) == {"path": "/run/a.sock", "server": "1"}
    assert canonical("pci:03:00.0,a=b") == f"{NIC},a=b"
    assert canonical(device) == device
    assert scatters(device)
    assert not scatters("eth0")
    assert not scatters("net_af_packet0,iface=eth0")
    assert not scatters(NIC)
    assert (tap_interface("net_tap3"), tap_interface("net_tap0,iface=lan")) == ("dtap3", "lan")


def test_kernel_interfaces_by_dpdks_own_words() -> None:
    assert kernel_interfaces("net_af_xdp0,iface=eth0,start_queue=1") == {"eth0"}
    assert kernel_interfaces("net_pcap0,rx_iface=eth0,tx_iface=eth1") == {"eth0", "eth1"}
    assert kernel_interfaces("net_memif0,role=client") == kernel_interfaces("eth0") == set()
    assert kernel_interfaces("net_vhost0,iface=/run/a.sock,client=1") == set()


# -- PCI ------------------------------------------------------------------------------------------------------


def host(root: Path, driver: str = "", iommu: bool = True, interface: str = "") -> Path:
    plant(root, **nic(NIC, "0x1528"))
    path = root / "sys/bus/pci/devices" / NIC
    if driver:
        (path / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
    if iommu:
        (path / "iommu_group").symlink_to("../../../kernel/iommu_groups/7")
    if interface:
        (path / "net" / interface).mkdir(parents=True)
    return root


def test_a_pci_device_that_is_not_there(tmp_path: Path) -> None:
    assert "no such PCI device" in problem_of(NIC, tmp_path)
    assert "tandem-nat drivers" in problem_of(NIC, tmp_path)


def test_a_pci_device_of_the_kernel(tmp_path: Path) -> None:
    said = problem_of("03:00.0", host(tmp_path, "ixgbe", interface="enp3s0"))
    assert said == (
        "the kernel's driver ixgbe has it as enp3s0; ip link set enp3s0 down && modprobe vfio-pci && "
        f"dpdk-devbind.py --bind=vfio-pci {NIC}"
    )


def test_a_nic_that_carries_the_default_route_is_never_told_away(tmp_path: Path) -> None:
    root = host(tmp_path, "ixgbe", interface="enp3s0")
    said = problem_of(NIC, root, needed={"enp3s0"})
    assert "default route; choose another NIC" in said
    assert "devbind" not in said
    assert "devbind" in problem_of(NIC, root, needed={"enp4s0"})


def test_a_pci_device_of_nobody(tmp_path: Path) -> None:
    said = problem_of(NIC, host(tmp_path))
    assert said == f"no driver has it; modprobe vfio-pci && dpdk-devbind.py --bind=vfio-pci {NIC}"


@pytest.mark.parametrize("driver", ["vfio-pci", "igb_uio", "uio_pci_generic", "mlx5_core"])
def test_a_pci_device_that_dpdk_can_have(tmp_path: Path, driver: str) -> None:
    assert problem_of(NIC, host(tmp_path, driver, interface="ens1" if driver == "mlx5_core" else "")) == ""


def test_vfio_without_an_iommu(tmp_path: Path) -> None:
    switch = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
    host(tmp_path, "vfio-pci", iommu=False)
    plant(tmp_path, **{switch: "N\n"})
    assert f"echo 1 > /{switch}" in problem_of(NIC, tmp_path)
    plant(tmp_path, **{switch: "Y\n"})
    assert problem_of(NIC, tmp_path) == ""


# -- sockets --------------------------------------------------------------------------------------------------

KINDS = {
    "net_virtio_user0,path={},server=1": socket.SOCK_STREAM,
    "net_memif0,role=server,socket={},socket-abstract=no": socket.SOCK_SEQPACKET,
}


@pytest.mark.parametrize(("device", "kind"), KINDS.items(), ids=["virtio_user", "memif"])
def test_a_stale_socket_is_removed_and_a_living_one_is_not(tmp_path: Path, device: str, kind: int) -> None:
    path = tmp_path / "a.sock"
    device = device.format(path)
    assert problem_of(device) == ""
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.setblocking(False)
        assert f"another process listens at {path}" in problem_of(device)
        with pytest.raises(BlockingIOError):  # who listens has not been bothered
            listener.accept()
        assert path.is_socket()
    assert path.is_socket()
    assert problem_of(device) == ""
    assert not path.exists()


@pytest.mark.parametrize("device", KINDS)
def test_what_is_not_ours_to_remove(tmp_path: Path, device: str) -> None:
    path = tmp_path / "a.sock"
    path.write_text("precious")
    assert "is no socket" in problem_of(device.format(path))
    assert path.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(path)
    assert "is no socket" in problem_of(device.format(link))
    assert link.is_symlink()
    assert "mkdir -p" in problem_of(device.format(tmp_path / "none" / "a.sock"))
    assert "is missing" in problem_of(device.split("=", 1)[0].split(",")[0] + "," + _without_path(device))


def _without_path(device: str) -> str:
    return ",".join(word for word in device.split(",")[1:] if "{}" not in word)


@pytest.mark.skipif(os.geteuid() != 0, reason="root gives a file away")
def test_another_users_socket(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    os.chown(path, 65534, 65534)
    assert "belongs to another user" in problem_of(f"net_virtio_user0,path={path},server=1")
    assert path.is_socket()


def test_who_connects_removes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    for device in (
        f"net_virtio_user0,path={path}",
        f"net_memif0,role=client,socket={path},socket-abstract=no",
    ):
        assert problem_of(device) == ""
    assert path.is_socket()


@pytest.mark.parametrize(
    ("device", "driver", "key", "why"),
    [
        ("0000:zz:00.0", "auto", "device", "no kernel interface, and no DPDK devargs"),
        ("sixteen-is-longer", "auto", "device", "no kernel interface, and no DPDK devargs"),
        (
            "net_tap0,iface=sixteen-is-longer",
            "auto",
            "device",
            "sixteen-is-longer is no name of an interface",
        ),
        ("net_memif0,role=client", "af_xdp", "driver", "net_memif0 is none"),
        ("0000:03:00.0", "af_packet", "driver", "0000:03:00.0 is none"),
    ],
)
def test_a_device_that_cannot_be_one(device: str, driver: str, key: str, why: str) -> None:
    document = changed(f"{INTERNAL}.device", device)
    document["ports"]["internal"]["driver"] = driver
    found = problems(document)
    assert set(found) == {f"{INTERNAL}.{key}"}
    assert why in found[f"{INTERNAL}.{key}"]
