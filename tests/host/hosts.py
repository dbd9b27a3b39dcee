# SPDX-License-Identifier: Apache-2.0
"""Hosts that are not there: files of /proc and /sys under another root."""

from pathlib import Path


def plant(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def nic(address: str, device: str, vendor: str = "0x8086", node: int = -1) -> dict[str, str]:
    values = {"class": "0x020000", "vendor": vendor, "device": device, "numa_node": str(node)}
    values |= {"subsystem_vendor": vendor, "subsystem_device": "0x0001"}
    return {f"sys/bus/pci/devices/{address}/{key}": value for key, value in values.items()}
