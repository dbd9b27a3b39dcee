# SPDX-License-Identifier: Apache-2.0
"""`tandem-nat drivers`: the installed DPDK's own drivers, damaged files, and a planted PCI bus."""

import json
import os
import shutil
from pathlib import Path

import pytest

from nat_control.pci import pci_devices, pci_names
from nat_fastpath.dpdk import pmdinfo
from nat_fastpath.dpdk.pmdinfo import Driver, PciId, PmdError
from tests.host.hosts import nic, plant
from tests.unit.test_cli import command


@pytest.fixture(scope="module")
def installed() -> dict[str, Driver]:
    found, problems = pmdinfo.installed_drivers(pmdinfo.plugin_folder())
    assert problems == []
    return {driver.name: driver for driver in found}


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("net_ixgbe", PciId(0x8086, 0x10FB)),  # 82599ES
        ("net_i40e", PciId(0x8086, 0x1572)),  # X710
        ("net_ice", PciId(0x8086, 0x1592)),  # E810-C
        ("net_virtio", PciId(0x1AF4, 0x1041)),
        ("mlx5_eth", PciId(0x15B3, 0x1017)),  # ConnectX-5
    ],
)
def test_known_drivers_drive_known_devices(installed: dict[str, Driver], name: str, device: PciId) -> None:
    assert [d.name for d in installed.values() if d.drives(device) and d.name == name] == [name]
    assert not installed[name].drives(PciId(device.vendor, 0xFFFE))


def test_kernel_modules_and_parameters(installed: dict[str, Driver]) -> None:
    assert installed["net_ixgbe"].kernel_modules == ("igb_uio", "uio_pci_generic", "vfio-pci")
    assert "iface=<string>" in installed["net_af_packet"].parameters
    assert installed["net_memif"].pci_ids == ()


def test_the_words_of_a_driver_with_subsystems() -> None:
    whole = PciId(1, 2, 3, 4)
    assert PciId(1, 2).matches(whole)
    assert PciId(1, pmdinfo.ANY).matches(whole)
    assert not PciId(1, 2, 3, 5).matches(whole)


def ixgbe() -> Path:
    [path] = {p.resolve() for p in pmdinfo.plugin_folder().glob("librte_net_ixgbe.so*")}
    return path


def test_an_object_cut_short_anywhere_is_one_clear_line(tmp_path: Path) -> None:
    whole = ixgbe().read_bytes()
    cut = tmp_path / "librte_cut.so"
    refused = []
    for length in {0, 3, 16, 63, 64, 200, *range(0, len(whole), max(1, len(whole) // 40))}:
        cut.write_bytes(whole[:length])
        try:
            pmdinfo.read_drivers(cut)
        except PmdError as error:
            refused.append(str(error))
    assert len(refused) >= 40
    assert all(line.startswith(f"{cut}: ") and "\n" not in line for line in refused)


def test_an_object_with_flipped_bytes_raises_nothing_else(tmp_path: Path) -> None:
    whole = bytearray(ixgbe().read_bytes())
    table = int.from_bytes(whole[40:48], "little")  # e_shoff
    bad = tmp_path / "librte_bad.so"
    refused = 0
    for at in [*range(64), *range(table, min(table + 1900, len(whole)), 7)]:
        whole[at] ^= 0xFF
        bad.write_bytes(whole)
        try:
            pmdinfo.read_drivers(bad)
        except PmdError:
            refused += 1
        whole[at] ^= 0xFF
    assert refused > 10


def test_damaged_driver_information_is_said(tmp_path: Path) -> None:
    whole = ixgbe().read_bytes()
    bad = tmp_path / "librte_bad.so"
    bad.write_bytes(
        whole.replace(b'{"name" : "net_ixgbe"', b'{"nome" : "net_ixgbe"').replace(
            b'{"name": "net_ixgbe"', b'{"nome": "net_ixgbe"'
        )
    )
    assert bad.read_bytes() != whole
    with pytest.raises(PmdError, match="driver information is damaged"):
        pmdinfo.read_drivers(bad)


def test_a_folder_with_a_broken_file_still_shows_the_others(tmp_path: Path) -> None:
    shutil.copy(ixgbe(), tmp_path / "librte_net_ixgbe.so.23.0")
    os.symlink("librte_net_ixgbe.so.23.0", tmp_path / "librte_net_ixgbe.so")
    (tmp_path / "librte_net_broken.so").write_bytes(b"\x7fELF and no more")
    done = command("drivers", "--folder", tmp_path, "--json")
    answer = json.loads(done.stdout)
    assert sorted(d["name"] for d in answer["drivers"]) == ["net_ixgbe", "net_ixgbe_vf"]
    assert "librte_net_broken.so" in done.stderr
    assert len(answer["unreadable"]) == 1


def test_the_command_filters_and_names(tmp_path: Path) -> None:
    answer = json.loads(command("drivers", "IXGBE", "--json").stdout)
    assert {d["name"] for d in answer["drivers"]} == {"net_ixgbe", "net_ixgbe_vf"}
    if Path("/usr/share/misc/pci.ids").exists():
        names = {i["id"]: i["name"] for d in answer["drivers"] for i in d["pci_ids"]}
        assert "82599ES" in names["8086:10fb"]
    text = command("drivers", "net_ixgbe_vf").stdout
    assert "8086:10ed" in text
    assert "no driver in" in command("drivers", "net_nonsense", code=1).stderr
    assert "no drivers of DPDK" in command("drivers", "--folder", tmp_path, code=1).stderr


def test_a_planted_bus(tmp_path: Path, installed: dict[str, Driver]) -> None:
    plant(tmp_path, **nic("0000:03:00.0", "0x10fb", node=1))
    plant(tmp_path, **nic("0000:04:00.0", "0xfffe"))
    plant(tmp_path, **{"sys/bus/pci/devices/0000:00:02.0/class": "0x018000"})
    bound = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
    (tmp_path / "drivers/ixgbe").mkdir(parents=True)
    (bound / "driver").symlink_to(tmp_path / "drivers/ixgbe")
    (bound / "net/eth7").mkdir(parents=True)
    first, second = pci_devices(tmp_path)
    assert (first.address, first.driver, first.interfaces, first.node) == (
        "0000:03:00.0",
        "ixgbe",
        ("eth7",),
        1,
    )
    assert (second.driver, second.interfaces) == (None, ())
    ids = [PciId(n.vendor, n.device, n.subvendor, n.subdevice) for n in (first, second)]
    assert [[d.name for d in installed.values() if d.drives(i)] for i in ids] == [["net_ixgbe"], []]


def test_names_come_from_their_own_vendor(tmp_path: Path) -> None:
    ids = "# c\n0001  One\n\t0007  Wrong\n8086  Intel\n\t0007  Right\n\t\t8086 0007  Sub\nC 02  Network\n\t0007  No\n"
    plant(tmp_path, **{"usr/share/misc/pci.ids": ids})
    assert pci_names([(0x8086, 7)], tmp_path) == {(0x8086, 7): "Intel Right"}
    assert pci_names([(0x8086, 7)], tmp_path / "none") == {}
