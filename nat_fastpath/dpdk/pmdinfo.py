# SPDX-License-Identifier: Apache-2.0
"""What the installed DPDK can drive: the information that its drivers carry in their shared objects.

RTE_PMD_REGISTER_* leaves strings ``PMD_INFO_STRING= {json}`` in .rodata; they are read without loading anything.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

ANY = 0xFFFF  # RTE_PCI_ANY_ID
_INFO = re.compile(rb"PMD_INFO_STRING= (\{[^\0]*\})\0")
_PLUGINS = re.compile(rb"DPDK_PLUGIN_PATH=([^\0]*)\0")


class PmdError(Exception):
    """There is nothing to read; one line: what, where, and how to mend it."""


@dataclass(frozen=True, slots=True)
class PciId:
    vendor: int
    device: int
    subvendor: int = ANY
    subdevice: int = ANY

    def matches(self, other: PciId) -> bool:
        pairs = (
            (self.vendor, other.vendor),
            (self.device, other.device),
            (self.subvendor, other.subvendor),
            (self.subdevice, other.subdevice),
        )
        return all(mine in (ANY, its) for mine, its in pairs)


@dataclass(frozen=True, slots=True)
class Driver:
    """One driver of one shared object. ``kernel_modules`` are alternatives, in the words of DPDK."""

    name: str
    file: str
    kernel_modules: tuple[str, ...] = ()
    parameters: str = ""
    pci_ids: tuple[PciId, ...] = ()

    def drives(self, device: PciId) -> bool:
        return any(known.matches(device) for known in self.pci_ids)


def read_only_data(path: Path) -> bytes:
    """The section .rodata. Raises PmdError when ``path`` is no whole ELF file."""
    try:
        with path.open("rb") as file:
            section = ELFFile(file).get_section_by_name(".rodata")
            data: bytes = section.data() if section else b""
            if section and len(data) != section["sh_size"]:
                raise PmdError(f"{path}: the file ends within its .rodata: install its package again")
            return data
    except OSError as error:
        raise PmdError(f"{path}: {error.strerror}") from None
    except PmdError:
        raise
    # what pyelftools raises for files that end early or point anywhere is not only its own kind of error
    except (ELFError, ValueError, KeyError, AttributeError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise PmdError(f"{path}: no readable ELF file ({reason}): install its package again") from None


def read_drivers(path: Path) -> list[Driver]:
    """The drivers in one shared object. Raises PmdError when it cannot be read."""
    return list(_parse(path, read_only_data(path)))


def _parse(path: Path, data: bytes) -> Iterator[Driver]:
    for text in _INFO.findall(data):
        try:
            info = json.loads(text)
            modules = info.get("kmod", "").split("|")
            yield Driver(
                name=str(info["name"]),
                file=path.name,
                # "* igb_uio | vfio-pci": the star says "any device", which the ids say already
                kernel_modules=tuple(name for part in modules if (name := part.strip(" *"))),
                parameters=" ".join(str(info.get("params", "")).split()),
                pci_ids=tuple(PciId(*map(int, ids)) for ids in info.get("pci_ids", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PmdError(f"{path}: its driver information is damaged ({error})") from None


def plugin_folder() -> Path:
    """Where this DPDK looks for its drivers, as librte_eal itself has it. Raises PmdError."""
    for library in _eal_libraries():
        if found := _PLUGINS.search(read_only_data(library)):
            folder = Path(found[1].decode(errors="replace"))
            if folder.is_dir():
                return folder
            raise PmdError(f"{folder}, where {library} looks for drivers, is no folder: apt install dpdk")
    raise PmdError("no librte_eal is installed: apt install dpdk, or name the folder with --folder")


def _eal_libraries() -> list[Path]:
    try:
        cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        cache = ""
    return sorted({Path(path) for path in re.findall(r"librte_eal\.so\S* .*=> (\S+)", cache)}, reverse=True)


def installed_drivers(folder: Path) -> tuple[list[Driver], list[str]]:
    """All drivers of a folder by name, and a line for each file that could not be read."""
    drivers: list[Driver] = []
    problems: list[str] = []
    seen: set[Path] = set()
    # the names without a version are links, which a host without the development package does not have
    for path in sorted(folder.glob("*.so*")):
        real = path.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            drivers += read_drivers(path)
        except PmdError as error:
            problems.append(str(error))
    return sorted(drivers, key=lambda driver: (driver.name, driver.file)), problems
