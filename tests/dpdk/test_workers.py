# SPDX-License-Identifier: Apache-2.0
"""Several workers with real threads, between rings that stand for wires and for devices with RSS."""

from __future__ import annotations

from pathlib import Path

import pytest

from nat_control.lab import Lab
from tests.dpdk import wire
from tests.dpdk import workers_process as process
from tests.dpdk.dpdk_process import run
from tests.packets import INSIDE, MARK, OUR_MAC, OUTSIDE


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return wire.build(Path(tmp_path_factory.mktemp("wire")))


@pytest.mark.parametrize("idle", ["adaptive", "busy"])
@pytest.mark.parametrize(
    ("how", "n"), [("rss", 2), ("rss", 3), ("software", 2), ("software", 3), ("vlan", 2), ("dscp", 2)]
)
def test_flows_stay_in_their_cores(library: str, how: str, n: int, idle: str) -> None:
    """Nothing is lost, and frames that a device has spread by its hash are never handed on."""
    said = run(process.several, library, how, n, idle)
    assert said["drops"] == {}
    assert said["counted"], "each frame is counted once, in one core"
    assert said["learned"]
    assert said["lost"] == 0, "buffers"
    assert said["tx_dropped"] == 0
    assert said["received"] == 0
    assert said["odd"] > 0, "pings, fragments and hairpins go from core to core"
    spread = said["spread"]
    assert spread["handoff_dropped"] == 0
    assert spread["handoff_received"] == spread["handed_off"]
    assert (spread["handed_off"] > 0) == (how != "rss")
    assert (spread["tx_passed"] > 0) == (how != "rss")
    assert said["moving"] == n
    assert all(said["loops"])
    why = {
        "rss": "",
        "software": "software: net_ring has no RSS",
        "dscp": "software: inside and outside share the device, and RSS has one key only",
        "vlan": "software: inside and outside share the device, and RSS has one key only",
    }
    assert said["said"] == [why[how]] * 2


def test_one_link_marked_by_dscp(library: str) -> None:
    """What comes out is what went in but for the lowest bit of the DSCP, and nobody but the link sees that set."""
    said = run(process.marks, library)
    clear = [tos for tos in range(256) if not tos & MARK]
    assert said["out"] == clear == said["back"]
    assert said["quoted"] == [11, 0xB9, 0x28]
    assert said["through"] == [0xC0, True]
    assert said["cut"] == [3, 0x2A]
    assert said["fragments"] == 0x2A
    for question, side in (("inside", INSIDE), ("outside", OUTSIDE)):
        assert said[question] == said[f"probe {question}"] == [OUR_MAC[side]]
    assert said["dropped"]
    assert said["broken"], "a wrong checksum is mended by nobody"
    assert said["lost"] == 0


@pytest.mark.parametrize("driver", ["af_packet", "af_xdp"])
def test_two_workers_between_kernel_interfaces(library: str, driver: str) -> None:
    """Each polls one of them, and sends on it for the other."""
    with Lab() as lab:
        host = lab.namespace("workers")
        host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        for side in ("internal", "external"):
            host.ip("link", "add", f"{side}0", "type", "veth", "peer", "name", f"{side}1")
            host.ip("link", "set", f"{side}1", "up")
        said = run(process.several, library, driver, 2, "adaptive", command=tuple(host.command()))
    assert said["drops"] == {}
    assert said["counted"]
    assert (said["tx_dropped"], said["received"]) == (0, 0)
    assert said["lost"] == 0 or driver == "af_xdp", "whose driver keeps what is in its fill rings"
    assert said["spread"]["handed_off"] == said["spread"]["handoff_received"] > 0
    assert said["spread"]["tx_passed"] > 0
    assert said["said"] == [f"software: net_{driver} has no RSS"] * 2


@pytest.mark.parametrize("how", ["rss", "software"])
def test_what_is_on_its_way_at_the_end_is_given_back(library: str, how: str) -> None:
    said = run(process.stopped_amid, library, how)
    assert said == {"busy": True, "lost": 0}


def test_a_full_ring_drops_and_counts(library: str) -> None:
    said = run(process.full_ring, library)
    assert said["dropped"] > 0
    assert said["received"], "what found room arrives once its worker moves"
    assert said["goes_on"]
    assert said["lost"] == 0


def test_a_device_with_rss_is_told_the_slices(library: str) -> None:
    said = run(process.rss_of_a_device, library)
    for side in ("internal", "external"):
        spread, rx_queues, tx_queues, table, _ = said[side]
        assert (spread, rx_queues, tx_queues) == ("rss", 3, 3)
        assert table == [entry * 3 // 128 for entry in range(128)]
    assert int(said["internal"][4][:16], 16) == 0x9E3779B1 << 7
    assert int(said["external"][4], 16) == 1 << (320 - 120)
    assert said["None"][:3] == [
        "software: inside and outside share the device, and RSS has one key only",
        1,
        1,
    ]
    assert said["alone"] == ["", 1]


def test_cores_and_threads_that_do_not_fit(library: str) -> None:
    assert run(process.wrong_cores, library) == [
        "core 0 of 2 has slice 1 of 2",
        "1 CPUs for 2 cores",
        "0 cores; there are 1 to 32",
        "core 1 of 2 has slice 0 of 2",
        "a worker owns this core: stop it first",
    ]
