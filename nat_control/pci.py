# SPDX-License-Identifier: Apache-2.0
"""The network devices on this host's PCI bus, from /sys, and the names of PCI ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NETWORK = 0x02  # base class
NAMES = Path("usr/share/misc/pci.ids")


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A network device. ``driver`` is the kernel's that has it, ``node`` the NUMA node, -1 where there is none."""

    address: str
    vendor: int
    device: int
    subvendor: int
    subdevice: int
    driver: str | None
    interfaces: tuple[str, ...]
    node: int
    iommu_group: str | None


def _number(path: Path, default: int = 0) -> int:
    try:
        return int(path.read_text(), 0)
    except (OSError, ValueError):
        return default


def _link(path: Path) -> str | None:
    try:
        return path.readlink().name
    except OSError:
        return None


def pci_devices(root: Path = Path("/")) -> list[PciDevice]:
    """Network devices by address; none where there is no PCI."""
    found = []
    for path in sorted((root / "sys/bus/pci/devices").glob("*")):
        if _number(path / "class") >> 16 != NETWORK:
            continue
        # a virtio device has its interface one level deeper
        interfaces = {name.name for pattern in ("net/*", "virtio*/net/*") for name in path.glob(pattern)}
        found.append(
            PciDevice(
                address=path.name,
                vendor=_number(path / "vendor"),
                device=_number(path / "device"),
                subvendor=_number(path / "subsystem_vendor"),
                subdevice=_number(path / "subsystem_device"),
                driver=_link(path / "driver"),
                interfaces=tuple(sorted(interfaces)),
                node=_number(path / "numa_node", -1),
                iommu_group=_link(path / "iommu_group"),
            )
        )
    return found


def pci_names(ids: Iterable[tuple[int, int]], root: Path = Path("/")) -> dict[tuple[int, int], str]:
    """(vendor, device) → name, as far as pci.ids has them."""
    wanted = set(ids)
    names: dict[tuple[int, int], str] = {}
    vendor, vendor_name = -1, ""
    try:
        lines = (root / NAMES).read_text(errors="replace").splitlines()
    except OSError:
        return names
    for line in lines:
        if line.startswith("C "):
            break  # classes follow
        if not line or line[0] == "#" or line.startswith("\t\t"):
            continue
        number, _, name = line.strip().partition("  ")
        try:
            value = int(number, 16)
        except ValueError:
            continue
        if line[0] != "\t":
            vendor, vendor_name = value, name
        elif (vendor, value) in wanted:
            names[vendor, value] = f"{vendor_name} {name}"
    return names
