# SPDX-License-Identifier: Apache-2.0
"""EAL, mempools, ports and the worker on DPDK's virtual devices: no NIC, no hugepages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from scapy.layers.inet import IP, IPerror
from scapy.utils import PcapReader

from nat_control.config import MAX_AF_XDP_MTU, ConfigError
from nat_control.config import parse as parse_config
from nat_fastpath.dpdk import binding
from tests.dpdk import dpdk_process as process
from tests.packets import (
    CLIENT,
    GATEWAY,
    INSIDE,
    OUR_ADDRESS,
    OUTSIDE,
    SERVER,
    Nat,
    addresses,
    check_sums,
    echo,
    frame,
    parse,
    tcp,
    together,
    udp,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_eal_starts_once_and_leaves_the_affinity_alone() -> None:
    said = process.run(process.eal_twice)
    assert "EAL" in said["error"] or "already" in said["error"].lower()
    assert said["version"].startswith("DPDK ")
    assert said["same_affinity"]


def test_errors_carry_dpdks_own_text(tmp_path: Path) -> None:
    said = process.run(process.errors, str(tmp_path))
    assert "no kernel interface of this network namespace (which has " in said["no-such-interface"]
    assert "net_memif0" in said["no-such-interface"]
    assert "/does/not/exist.pcap" in said["net_pcap0,rx_pcap=/does/not/exist.pcap"]
    unknown = "device net_nosuchdriver0: the installed DPDK has no driver net_nosuchdriver; `tandem-nat drivers net_` "
    assert said["net_nosuchdriver0"].startswith(unknown)
    assert "no kernel interface" in said["0000:zz:00.0"]
    long = "sixteen-is-longer"
    assert said[f"net_tap0,iface={long}"].startswith(
        f"device net_tap0,iface={long}: {long} is no name of an interface"
    )
    assert "driver af_xdp carries kernel interfaces, and net_null0 is none" in said["driver"]
    assert said["0000:ff:1f.7"].startswith("device 0000:ff:1f.7: ")
    assert "10000000 buffers" in said["mempool"]
    assert "Cannot allocate memory" in said["mempool"] or "enough" in said["mempool"]
    assert all("\n" not in line for line in said.values())
    assert said["left"] == "", "a device that could not be used stays behind"


def test_what_af_xdps_libraries_say_is_for_the_error(tmp_path: Path) -> None:
    stderr = tmp_path / "stderr"
    said = process.run(process.said_by_libbpf, str(stderr))
    assert any("/no/such/program" in line for line in said)
    assert stderr.read_text() == ""


def test_a_worker_needs_its_cpu(tmp_path: Path) -> None:
    said = process.run(process.no_such_cpu, str(tmp_path))
    assert (
        said
        == "cannot start a worker on CPU 1000 (workers.cores): there is no such CPU, or this process may not use it"
    )


def test_what_a_device_tells(tmp_path: Path) -> None:
    facts = process.run(process.device_facts, str(tmp_path))
    assert facts["driver"] == "net_null"
    assert facts["mac"] == "02aabbccddee"
    assert set(facts["link"]) == {"up", "speed_mbps", "full_duplex"}
    assert facts["link"]["up"]
    assert {"ipackets", "opackets", "imissed", "rx_nombuf"} <= set(facts["stats"])
    assert "rx_good_packets" in facts["xstats"]
    assert facts["ports"] == [["net_null0", "net_null"]]
    assert facts["available"] + facts["in_use"] == 2048
    assert facts["after"] == []
    assert facts["in_use_after"] == 0


@pytest.mark.parametrize("idle", ["adaptive", "busy"])
def test_a_capture_through_the_worker_is_what_the_core_makes_of_it(tmp_path: Path, idle: str) -> None:
    going = [frame(udp(CLIENT, 5000 + i % 50, SERVER, 53, payload=bytes([i % 256]) * i)) for i in range(1400)]
    going += [b"\0" * 10, frame(tcp(CLIENT, 1, SERVER, 80, "A"))]
    process.write_capture(str(tmp_path / "inside.pcap"), going)
    process.write_capture(
        str(tmp_path / "outside.pcap"), [frame(udp(SERVER, 53, "198.51.100.10", 9), OUTSIDE)]
    )
    nat = Nat()
    expected = [result.frame for result in nat.burst([(INSIDE, data) for data in going]) if result.frame]

    said = process.run(
        process.capture_through_worker,
        str(tmp_path / "inside.pcap"),
        str(tmp_path / "outside.pcap"),
        str(tmp_path / "out"),
        idle,
    )

    assert said["verdicts"] == {
        "forward": 1400,
        "drop_runt": 1,
        "drop_tcp_not_syn": 1,
        "drop_no_mapping": 1,
    }
    got = [bytes(packet) for packet in PcapReader(str(tmp_path / "out1.pcap"))]
    announcements = [data for data in got if data[12:14] == b"\x08\x06"]
    assert announcements, "own and pool addresses are announced at the start"
    assert [data for data in got if data[12:14] != b"\x08\x06"] == expected
    assert said["sessions"] == 50
    assert not said["running"]
    assert "already" in said["twice"]
    assert "owns this core" in said["owned"]
    assert said["stats"]["loops_with_packets"] >= 1400 // 32
    assert (said["stats"]["sleeps"] > 0) == (idle == "adaptive")
    assert 0 <= said["stats"]["busy_share"] <= 1
    assert said["in_use"] == 0, "buffers are lost"


def test_a_worker_sleeps_less_while_a_packet_waits_for_a_commit(tmp_path: Path) -> None:
    """Else the new flow that waits would wait for the worker, too."""
    inside = tmp_path / "inside.pcap"
    process.write_capture(str(inside), [frame(udp(CLIENT, 5000, SERVER, 53))])
    held, idle = process.run(process.sleeps_with_a_held_packet, str(inside), str(tmp_path))
    assert idle > 100
    assert held > 1.5 * idle


def test_lengths_that_lie_do_not_reach_the_checksum(tmp_path: Path) -> None:
    """The sum that a local sender leaves unfinished, in frames whose total length is too short for it."""
    frames = []
    for protocol in (6, 17):
        for total in (*range(48), 1500, 65535):
            header = IP(src=CLIENT, dst=SERVER, proto=protocol, len=total, ihl=5)
            data = bytearray(frame(header) + bytes(40))
            pseudo = sum(int.from_bytes(data[at : at + 2], "big") for at in range(26, 34, 2))
            pseudo += protocol + (total - 20) % 65536
            while pseudo >> 16:
                pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
            for at in (34 + 16, 34 + 6):
                data[at : at + 2] = pseudo.to_bytes(2, "big")
            frames += [bytes(data), b"\xff" * 6 + bytes(data[6:])]
    process.write_capture(str(tmp_path / "inside.pcap"), frames)
    process.write_capture(
        str(tmp_path / "outside.pcap"), [frame(udp(SERVER, 53, "198.51.100.10", 9), OUTSIDE)]
    )
    said = process.run(
        process.capture_through_worker,
        str(tmp_path / "inside.pcap"),
        str(tmp_path / "outside.pcap"),
        str(tmp_path / "out"),
        "adaptive",
    )
    assert sum(said["verdicts"].values()) == len(frames) + 1
    assert said["stats"]["checksums_filled.0"] > 0


def test_frames_of_several_segments(tmp_path: Path) -> None:
    big = [udp(CLIENT, 7000 + i, SERVER, 53, payload=b"x" * (3000 + 500 * i)) for i in range(10)]
    ping = echo(CLIENT, OUR_ADDRESS[INSIDE], 7, payload=b"y" * 6000)
    process.write_capture(str(tmp_path / "inside.pcap"), [frame(packet) for packet in [*big, ping]])
    process.write_capture(
        str(tmp_path / "outside.pcap"), [frame(udp(SERVER, 53, "198.51.100.10", 9), OUTSIDE)]
    )
    said = process.run(
        process.capture_through_worker,
        str(tmp_path / "inside.pcap"),
        str(tmp_path / "outside.pcap"),
        str(tmp_path / "out"),
        "adaptive",
    )
    assert said["verdicts"] == {"forward": 10, "reply": 1, "drop_no_mapping": 1}
    got = [bytes(packet) for packet in PcapReader(str(tmp_path / "out1.pcap"))]
    got = [data for data in got if data[12:14] == b"\x08\x00"]
    assert [len(data) for data in got] == [len(frame(packet)) for packet in big]
    for data in got:
        check_sums(data)
    answers = [bytes(packet) for packet in PcapReader(str(tmp_path / "out0.pcap"))]
    [answer] = [data for data in answers if data[12:14] == b"\x08\x00"]
    check_sums(answer)
    assert addresses(parse(answer))[::2] == (OUR_ADDRESS[INSIDE], CLIENT)
    assert said["in_use"] == 0


@pytest.mark.parametrize("mtu", [1000, 4000], ids=["of one buffer", "of more than one"])
def test_frames_of_several_segments_are_cut(tmp_path: Path, mtu: int) -> None:
    """Their data lies in several buffers; each fragment gets one, so it may be shorter than the MTU."""
    big = [
        udp(
            CLIENT,
            7000 + i,
            SERVER,
            53,
            payload=bytes([i] * 4500) + b"end",
            id=100 + i,
            options=b"\x01" * 4 * i,
        )
        for i in range(6)
    ]
    process.write_capture(str(tmp_path / "inside.pcap"), [frame(packet) for packet in big])
    process.write_capture(
        str(tmp_path / "outside.pcap"), [frame(udp(SERVER, 53, "198.51.100.10", 9), OUTSIDE)]
    )
    said = process.run(
        process.capture_through_worker,
        str(tmp_path / "inside.pcap"),
        str(tmp_path / "outside.pcap"),
        str(tmp_path / "out"),
        "adaptive",
        str(mtu),
    )
    assert said["verdicts"] == {"fragment": 6, "drop_no_mapping": 1}
    got = [bytes(packet) for packet in PcapReader(str(tmp_path / "out1.pcap"))]
    got = [data for data in got if data[12:14] == b"\x08\x00"]
    # a buffer of ordinary pages fills its page and takes 3.7 KiB, one of hugepages 2 KiB
    assert len(got) in ({6 * 5} if mtu == 1000 else {6 * 2, 6 * 3})
    assert max(map(len, got)) <= 14 + mtu
    for i, packet in enumerate(big):
        whole = together([data for data in got if parse(data).id == packet.id])
        assert bytes(whole.payload)[8:] == bytes([i] * 4500) + b"end"
    assert said["in_use"] == 0


def test_a_worker_built_from_another_header_is_refused(tmp_path: Path) -> None:
    said = process.run(process.other_header, str(tmp_path))
    assert set(said) == {"size", "abi", "hash"}
    for line in said.values():
        assert "different sources" in line
        assert "make clean build" in line


def test_a_ring_between_two_nats_of_one_process(tmp_path: Path) -> None:
    """Their workers hand packets over; what has no hop left at the far one is answered through both."""
    going = [udp(CLIENT, 5000 + i % 20, SERVER, 53, payload=bytes([i]) * i, ttl=64) for i in range(200)]
    spent = udp(CLIENT, 5000, SERVER, 53, ttl=2)
    process.write_capture(str(tmp_path / "inside.pcap"), [frame(packet) for packet in [*going, spent]])
    process.write_capture(str(tmp_path / "out"), [])
    near, far = Nat(), Nat(**process.FAR)
    between = near.burst([(INSIDE, frame(packet)) for packet in going])
    expected = [result.frame for result in far.burst([(INSIDE, result.frame) for result in between])]

    said = process.run(process.ring_between_two_nats, str(tmp_path / "inside.pcap"), str(tmp_path / "out"))

    near_verdicts, far_verdicts = said["verdicts"]
    assert near_verdicts["forward"] == 202, "200, what was spent, and the answer to it"
    assert (far_verdicts["forward"], far_verdicts["reply"]) == (200, 1)
    assert said["links"] == [True] * 4
    got = [bytes(packet) for packet in PcapReader(str(tmp_path / "out1.pcap"))]
    assert [data for data in got if data[12:14] == b"\x08\x00"] == expected
    answers = [bytes(packet) for packet in PcapReader(str(tmp_path / "out0.pcap"))]
    [answer] = [data for data in answers if data[12:14] == b"\x08\x00"]
    check_sums(answer)
    assert (parse(answer).src, parse(answer).dst) == (GATEWAY, CLIENT)
    quoted = parse(answer)[IPerror]
    assert (quoted.src, quoted.dst, quoted.payload.sport) == (CLIENT, SERVER, 5000)


def test_the_configuration_knows_what_af_xdp_takes() -> None:
    assert (
        binding._frame_size(MAX_AF_XDP_MTU) == binding.AF_XDP_FRAME < binding._frame_size(MAX_AF_XDP_MTU + 1)
    )
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / "server.yaml").read_text())
    document["ports"]["internal"]["driver"] = "af_xdp"
    document["ports"]["external"]["mtu"] = MAX_AF_XDP_MTU
    parse_config(document)
    document["ports"]["external"]["mtu"] += 1
    with pytest.raises(
        ConfigError, match=r"ports\.internal\.driver: an MTU of 1899 is more than AF_XDP's 1898"
    ):
        parse_config(document)
