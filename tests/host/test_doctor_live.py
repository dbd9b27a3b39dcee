# SPDX-License-Identifier: Apache-2.0
"""`tandem-nat doctor` on this machine: as found, with hugepages, without root, and beside a real Open vSwitch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.hugepages import reserved
from nat_control.lab import Lab
from switch_agent.ovs import OpenVSwitch
from tests.unit.test_cli import CLI, config  # noqa: F401

PAGES = Path("/proc/sys/vm/nr_hugepages")
ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes the machine: root")


def doctor(
    *arguments: object, before: tuple[str, ...] = (), answer: str = ""
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*before, *CLI, "doctor", *map(str, arguments)],
        input=answer, capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def asked(*arguments: object, before: tuple[str, ...] = ()) -> dict[str, Any]:
    done = doctor(*arguments, "--json", before=before)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == {"good": 0, "note": 0, "warning": 4, "problem": 1}[answer["worst"]]
    return answer


def named(answer: dict[str, Any], check: str) -> dict[str, Any]:
    found = [finding for finding in answer["findings"] if finding["check"] == check]
    assert found, f"{check} is none of {[finding['check'] for finding in answer['findings']]}"
    first: dict[str, Any] = found[0]
    return first


def test_as_found() -> None:
    answer = asked()
    assert {"permissions", "cpu", "hugepages", "iommu", "vfio"} <= {f["check"] for f in answer["findings"]}
    flags = Path("/proc/cpuinfo").read_text()
    path = "avx512" if " avx512f" in flags else "avx2" if " avx2" in flags else "baseline"
    assert path in named(answer, "cpu")["what"]
    text = doctor().stdout
    assert all(
        finding["what"] in text for finding in answer["findings"] if "hugepages" not in finding["what"]
    )
    assert all(
        command in text for f in answer["findings"] for command in f["commands"] if "nr_huge" not in command
    )


@needs_root
def test_hugepages_on_and_off(config: Path) -> None:  # noqa: F811
    if int(PAGES.read_text()):
        pytest.skip("others use hugepages now")
    assert "none reserved" in named(asked(), "hugepages")["what"]
    with reserved(64):
        total = int(PAGES.read_text())
        with_pages, with_config = asked(), asked("-c", config)
    assert named(with_pages, "hugepages")["severity"] == "good"
    assert f"of {total} of 2 MiB" in named(with_pages, "hugepages")["what"]
    enough = named(with_config, "hugepages")
    assert enough["severity"] == "warning"  # 64 MiB of the 126 and more that it takes
    [remedy] = enough["commands"]
    assert int(remedy.rpartition("=")[2]) >= 63


@needs_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
def test_without_root_it_works_and_says_so() -> None:
    before = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
    python = subprocess.run(
        [*before, sys.executable, "-c", "import nat_control"], cwd=ROOT, capture_output=True
    )
    if python.returncode:
        pytest.skip("this checkout is not readable for others")
    answer = asked(before=before)
    assert named(answer, "permissions")["severity"] == "warning"
    failed = doctor("--fix", "--yes", before=before)
    assert "not mended: " in failed.stdout
    assert failed.returncode == 4


def test_usage() -> None:
    assert doctor("--yes").returncode == 2
    assert doctor("--fix", "--json").returncode == 2
    assert doctor("-c", "/nonexistent.yaml").returncode == 2
    missing = doctor("--ovs-db", "unix:/nonexistent/db.sock")
    assert missing.returncode == 1
    assert "unix:/nonexistent/db.sock" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


@needs_root
@pytest.mark.skipif(not shutil.which("ovs-vswitchd"), reason="Open vSwitch is not installed")
def test_bad_settings_of_a_real_switch_are_found_and_mended() -> None:
    with Lab() as lab:
        space, far = lab.namespace("switch"), lab.namespace("far")
        lab.cable(space, "inner", far, "one")
        space.ip("link", "set", "inner", "up")
        switch = OpenVSwitch(space, {"inner": 1}, ("tcp:127.0.0.1:6653",))
        where = ("--ovs-db", f"unix:{switch.directory}/db.sock")
        inside = ("ip", "netns", "exec", space.full_name)
        clean = {f["check"] for f in asked(*where, before=inside)["findings"] if f["severity"] != "good"}
        bad = {"ovs-fail-mode", "ovs-pmd-maxsleep", "ovs-max-backoff", "ovs-inactivity-probe"}
        assert not clean & bad
        bad |= {"ovs-flow-limit", "ovs-flow-limit-now"}  # as it comes
        assert {"ovs-flow-limit", "ovs-flow-limit-now"} <= clean

        switch.vsctl("set", "bridge", switch.bridge, "fail_mode=standalone")
        switch.vsctl("set", "Open_vSwitch", ".", "other_config:pmd-maxsleep=100")
        uuid = switch.vsctl("get", "bridge", switch.bridge, "controller").strip("[]\n")
        switch.vsctl("set", "controller", uuid, "max_backoff=8000", "inactivity_probe=0")
        found = asked(*where, before=inside)
        assert found["worst"] == "problem"
        assert bad <= {f["check"] for f in found["findings"] if f["severity"] != "good"}
        buffers = named(found, "ovs-receive-buffer")  # as the kernel has them, for the ports it opened
        assert buffers["severity"] == ("warning" if "212992" in buffers["what"] else "good")
        assert named(found, "ovs-management")["severity"] == "good"
        assert "takes 10000 flows" in named(found, "ovs-flow-limit-now")["what"]

        left = doctor(*where, "--fix", before=inside, answer="n\n" * 20)
        assert "run: ovs-vsctl" in left.stdout
        assert switch.vsctl("get", "bridge", switch.bridge, "fail_mode").strip() == "standalone"

        # not --yes: the remedies for the machine itself are not this test's to run
        asks = [f for f in found["findings"] if f["automatic"] and f["commands"] and f["severity"] != "good"]
        answers = "".join(
            "y\n" if f["check"].startswith("ovs-") and f["check"] != "ovs-rmem-default" else "n\n"
            for f in asks
        )
        mended = doctor(*where, "--fix", before=inside, answer=answers)
        assert all(f"{check}: mended" in mended.stdout for check in bad), mended.stdout
        after = {f["check"] for f in asked(*where, before=inside)["findings"] if f["severity"] != "good"}
        assert not after & bad
        assert switch.vsctl("get", "bridge", switch.bridge, "fail_mode").strip() == "secure"
        assert "(limit 200000)" in switch.appctl("upcall/show")
        assert "pmd-maxsleep" not in switch.vsctl("get", "Open_vSwitch", ".", "other_config")


@needs_root
def test_interfaces_of_a_configuration_are_looked_at_and_mended(config: Path) -> None:  # noqa: F811
    with Lab() as lab:
        space, far = lab.namespace("nat"), lab.namespace("far")
        for device in ("nat-in", "nat-out"):
            lab.cable(space, device, far, device)
            space.ip("link", "set", device, "up")
            space.run("ethtool", "-K", device, "gro", "off")
        space.run("ethtool", "-K", "nat-in", "gro", "on")
        space.ip("link", "set", "nat-out", "mtu", "1400")
        space.ip("address", "add", "192.0.2.2/24", "dev", "nat-out")
        space.route("default", "192.0.2.1")
        inside = ("ip", "netns", "exec", space.full_name)

        found = asked("-c", config, before=inside)
        assert found["worst"] == "problem"
        assert "nat-out" in named(found, "default-route")["what"]
        merging, mtu = named(found, "offloads"), named(found, "mtu")
        assert merging["commands"] == ["ethtool -K nat-in gro off"]
        assert mtu["commands"] == ["ip link set nat-out mtu 1500"]

        asks = [f for f in found["findings"] if f["automatic"] and f["commands"] and f["severity"] != "good"]
        answers = "".join("y\n" if f["check"] in ("mtu", "offloads") else "n\n" for f in asks)
        mended = doctor("-c", config, "--fix", before=inside, answer=answers)
        assert "mtu: mended" in mended.stdout
        assert "offloads: mended" in mended.stdout
        assert "mtu 1500" in space.ip("link", "show", "nat-out")
        after = asked("-c", config, before=inside)
        assert not {"mtu", "offloads"} & {f["check"] for f in after["findings"] if f["severity"] != "good"}


WITHOUT_DPDK = """
import sys
sys.modules["nat_fastpath.dpdk._dpdk"] = None  # as where it was not built
from nat_control.cli import main
main()
"""


@pytest.mark.parametrize(("arguments", "codes"), [(["doctor"], {0, 1, 4}), (["drivers"], {1})])
def test_without_dpdk(arguments: list[str], codes: set[int]) -> None:
    line = [sys.executable, "-c", WITHOUT_DPDK, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode in codes
    assert "Traceback" not in done.stderr
    assert ("hash" in done.stdout) if arguments == ["doctor"] else ("built without DPDK" in done.stderr)
