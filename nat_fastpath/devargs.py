# SPDX-License-Identifier: Apache-2.0
"""Devices in DPDK's words: what they say, and what must be right before DPDK sees them.

DPDK names no cause when a NIC is still the kernel's, or when a killed process has left its socket behind.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Set
from pathlib import Path

PCI = re.compile(r"(?:pci:)?((?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])(?=,|$)", re.ASCII | re.I)
DEVARGS = re.compile(rf"net_\w+\d(?=,|$)|{PCI.pattern}|(vdev|auxiliary|vmbus):.", re.ASCII | re.I)
INTERFACE = re.compile(r"[^\s/:]{1,15}")  # as the kernel allows them
USERSPACE = {"vfio-pci", "igb_uio", "uio_pci_generic"}
BIFURCATED = {"mlx4_core", "mlx5_core", "mana"}  # their NICs stay with the kernel's driver
# they take a frame of any size in several buffers, and hand it over so; others need one that holds it whole
SCATTERING = {"net_memif", "net_virtio_user", "net_tap", "net_pcap", "net_ring", "net_null"}
INTERFACES = {"iface", "rx_iface", "rx_iface_in", "tx_iface"}
NO_LINK = {
    "net_memif": "no other end is connected",
    "net_virtio_user": "no other end is connected",
    "net_tap": "its kernel interface is down or gone",
}


def name_of(device: str) -> str:
    """Without its arguments; a PCI address as DPDK writes it."""
    return pci_address(device) or device.split(",")[0]


def driver_of(device: str) -> str:
    """``net_memif`` of ``net_memif0,role=client``; empty where DPDK chooses it."""
    found = re.match(r"net_\w*?(?=\d+(,|$))", device, re.ASCII)
    return found[0] if found else ""


def no_driver(driver: str) -> str:
    return f"the installed DPDK has no driver {driver}; `tandem-nat drivers net_` lists those that it has"


def arguments_of(device: str) -> dict[str, str]:
    words = (word.partition("=") for word in device.split(",")[1:])
    return {key: value for key, _, value in words}


def kernel_interfaces(device: str) -> set[str]:
    """Those that a driver is told to take packets from, such as ``eth0`` of ``net_pcap0,iface=eth0``."""
    if driver_of(device) == "net_vhost":  # its iface is a socket
        return set()
    return {name for key, name in arguments_of(device).items() if key in INTERFACES}


def pci_address(device: str) -> str:
    """``0000:03:00.0`` of ``pci:03:00.0,arguments``; empty where it is no PCI device."""
    found = PCI.match(device)
    if found is None:
        return ""
    address = found[1].lower()
    return address if address.count(":") == 2 else f"0000:{address}"


def canonical(device: str) -> str:
    """The same device with its PCI address in full, as DPDK names its port."""
    address, comma, arguments = device.partition(",")
    return f"{pci_address(device) or address}{comma}{arguments}"


def scatters(device: str) -> bool:
    return driver_of(device) in SCATTERING


def fault_of(device: str, driver: str = "auto") -> str:
    """What is wrong with a port's device and driver on whatever machine; empty when nothing is."""
    if not DEVARGS.match(device):
        if INTERFACE.fullmatch(device):
            return ""
        return f"{device} is no kernel interface, and no DPDK devargs such as net_memif0 or 0000:03:00.0"
    for name in sorted(kernel_interfaces(device)):
        if not INTERFACE.fullmatch(name):
            return f"{name} is no name of an interface: 1 to 15 characters without space, / and :"
    if driver != "auto":
        return (
            f"driver {driver} carries kernel interfaces, and {name_of(device)} is none; leave the driver out"
        )
    return ""


def problem_of(device: str, root: Path = Path("/"), needed: Set[str] = frozenset()) -> str:
    """Why DPDK could not use it, and how to mend that; empty when nothing is known to be in the way.

    Kernel interfaces that are ``needed`` are not to be given up: this host would be cut off.

    A socket that a killed process has left where this device is to listen is removed.
    """
    if address := pci_address(device):
        return _pci_problem(address, root, needed)
    driver, arguments = driver_of(device), arguments_of(device)
    if driver == "net_virtio_user" and arguments.get("server") == "1":
        return _listening_place(arguments.get("path", ""), "path")
    if driver == "net_tap" and tap_files(name := tap_interface(device)):
        return f"the interface {name} is another port's already; choose another iface"
    listens = driver == "net_memif" and arguments.get("role") in ("server", "master")
    if listens and arguments.get("socket-abstract") == "no":  # an abstract one ends with its process
        return _listening_place(arguments.get("socket", ""), "socket")
    return ""


def _pci_problem(address: str, root: Path, needed: Set[str]) -> str:
    path = root / "sys/bus/pci/devices" / address
    if not path.exists():
        return "there is no such PCI device here; `tandem-nat drivers` lists those that there are"
    try:
        driver = (path / "driver").readlink().name
    except OSError:
        driver = ""
    if driver in BIFURCATED or (driver in USERSPACE and driver != "vfio-pci"):
        return ""
    if driver == "vfio-pci":
        unsafe = root / "sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
        if (path / "iommu_group").is_symlink() or (unsafe.exists() and unsafe.read_text().strip() in "Y1"):
            return ""
        return (
            "vfio-pci has it, but no IOMMU is on; `tandem-nat doctor` says how to turn it on, or without one: "
            f"echo 1 > /{unsafe.relative_to(root)}"
        )
    interfaces = sorted(name.name for pattern in ("net/*", "virtio*/net/*") for name in path.glob(pattern))
    has_it = f"the kernel's driver {driver} has it" if driver else "no driver has it"
    if interfaces:
        has_it += f" as {', '.join(interfaces)}"
    if not needed.isdisjoint(interfaces):
        return (
            f"{has_it}, which carries this host's default route; choose another NIC, or move the route first"
        )
    first = "".join(f"ip link set {name} down && " for name in interfaces)
    return f"{has_it}; {first}modprobe vfio-pci && dpdk-devbind.py --bind=vfio-pci {address}"


def _listening_place(path: str, argument: str) -> str:
    """A socket of ours that nobody listens at is removed: DPDK would not listen there."""
    if not path:
        return f"{argument}= is missing: the socket to listen at"
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        folder = Path(path).absolute().parent
        return "" if folder.is_dir() else f"there is no directory {folder}; mkdir -p {folder}"
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISSOCK(found.st_mode):
        return f"{path} is no socket; remove it, or choose another {argument}"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user; remove it, or choose another {argument}"
    if _is_alive(path):
        return f"another process listens at {path}; end it, or choose another {argument}"
    os.unlink(path)
    return ""


def _is_alive(path: str) -> bool:
    """Whether a process has it open. A socket of another type than any of DPDK's asks, so nobody notices."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True


def tap_interface(device: str) -> str:
    """The kernel's end of a net_tap, as it is called at first."""
    number = name_of(device).removeprefix("net_tap")
    return arguments_of(device).get("iface", f"dtap{number}")


def tap_files(interface: str) -> tuple[Path, ...]:
    """What this process has open of a tap interface."""
    return tuple(path for path in Path("/proc/self/fdinfo").iterdir() if _tap_of(path) == interface)


def is_attached(file: Path) -> bool:
    """Whether the interface of one of ``tap_files`` exists, in whatever network namespace, under whatever name. Raises OSError
    where this process can open nothing more."""
    return bool(_tap_of(file))


def _tap_of(file: Path) -> str:
    try:
        lines = file.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # closed meanwhile
        return ""
    return next((line.removeprefix("iff:").strip() for line in lines if line.startswith("iff:")), "")
