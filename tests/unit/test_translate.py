# SPDX-License-Identifier: Apache-2.0
"""Captures through the core: file formats, sides, next hops and the summary; read back by scapy."""

import os
import struct
import threading
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.utils import PcapNgWriter, rdpcap

from nat_control.config import Config, parse
from nat_control.translate import CaptureError, made_up_mac, read_pcap, translate
from tests import packets

POOL = {f"198.51.100.{last}" for last in range(10, 14)}
BASE = 1_700_000_000


def config(external: dict[str, object] | None = None, **internal: object) -> Config:
    return parse(
        {
            "instance": "capture",
            "ports": {
                "internal": {"device": "a", "address": "10.0.0.1/24", **internal},
                "external": {
                    "device": "b",
                    "address": "198.51.100.1/24",
                    "gateway": "198.51.100.254",
                    "gateway_mac": packets.GATEWAY_MAC,
                    **(external or {}),
                },
            },
            "nat": {"pool": {"addresses": ["198.51.100.10-198.51.100.13"], "ports": "1024-65535"}},
        }
    )


def write(
    path: Path,
    frames: list[tuple[float, bytes]],
    order: str = "<",
    nano: bool = False,
    link: int = 1,
    cut: int = 0,
) -> Path:
    unit = 1_000_000_000 if nano else 1_000_000
    data = struct.pack(f"{order}IHHiIII", 0xA1B23C4D if nano else 0xA1B2C3D4, 2, 4, 0, 0, 65535, link)
    for time, frame in frames:
        part = frame[:cut] if cut else frame
        fraction = round(time % 1 * unit)
        data += struct.pack(f"{order}IIII", BASE + int(time), fraction, len(part), len(frame)) + part
    path.write_bytes(data)
    return path


def outbound(n: int = 1, source: str = packets.CLIENT) -> bytes:
    return packets.frame(packets.udp(source, 5000 + n, packets.SERVER, 53))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
def test_both_byte_orders_and_both_units(tmp_path: Path, order: str, nano: bool) -> None:
    source = write(tmp_path / "in.pcap", [(0.5, outbound(0)), (1.25, outbound(1))], order, nano)
    assert [(packet.time_ns, packet.length) for packet in read_pcap(source)] == [
        (BASE * 10**9 + 500_000_000, len(outbound())),
        (BASE * 10**9 + 1_250_000_000, len(outbound())),
    ]
    summary = translate(source, tmp_path / "out.pcap", config())
    assert summary["verdicts"] == {"forward": 2}
    out = rdpcap(str(tmp_path / "out.pcap"))
    assert [float(packet.time) for packet in out] == [BASE + 0.5, BASE + 1.25]


def test_outbound_packets_leave_with_the_pools_addresses_to_the_gateway(tmp_path: Path) -> None:
    frames = [(i / 100, outbound(i, f"10.0.0.{5 + i % 7}")) for i in range(50)]
    summary = translate(write(tmp_path / "in.pcap", frames), tmp_path / "out.pcap", config())
    assert (summary["packets"], summary["written"], summary["sessions"]) == (50, 50, 50)
    for packet in rdpcap(str(tmp_path / "out.pcap")):
        assert packet[IP].src in POOL
        assert (packet[IP].dst, packet[UDP].dport) == (packets.SERVER, 53)
        assert packet[Ether].dst == packets.GATEWAY_MAC
        assert packet[Ether].src == made_up_mac(b"external").hex(":")


def test_a_reply_finds_its_way_back(tmp_path: Path) -> None:
    """Two passes: the first says which endpoint the NAT chooses, the same every time."""
    first, second = tmp_path / "1.pcap", tmp_path / "2.pcap"
    translate(write(tmp_path / "in.pcap", [(0, outbound())]), first, config())
    chosen = rdpcap(str(first))[0]
    reply = packets.udp(packets.SERVER, 53, chosen[IP].src, chosen[UDP].sport)
    frames = [(0.0, outbound()), (0.1, packets.frame(reply, packets.OUTSIDE))]
    summary = translate(write(tmp_path / "in.pcap", frames), second, config())
    assert summary["verdicts"] == {"forward": 2}
    back = rdpcap(str(second))[1]
    assert (back[IP].dst, back[UDP].dport) == (packets.CLIENT, 5001)
    assert back[Ether].dst == packets.host_mac(packets.CLIENT)


@pytest.mark.parametrize("vlans", [(10, 20), (10, 0), (0, 20), (10, 10)])
def test_vlans(tmp_path: Path, vlans: tuple[int, int]) -> None:
    """A frame's tag says its side, and its packet leaves with the other side's; another tag is counted."""
    inside, outside = vlans
    sides = config({"vlan": outside} if outside else {}, **({"vlan": inside} if inside else {}))
    out = tmp_path / "out.pcap"
    sent = (0.0, packets.retagged(outbound(), inside))
    translate(write(tmp_path / "in.pcap", [sent]), out, sides)
    (left,) = rdpcap(str(out))
    assert (Dot1Q in left and left[Dot1Q].vlan) == (outside or False)
    back = packets.udp(packets.SERVER, 53, left[IP].src, left[UDP].sport)
    answer = packets.retagged(packets.frame(back, packets.OUTSIDE, "02:00:00:00:09:09"), outside)
    wrong = packets.retagged(outbound(), 99)
    summary = translate(write(tmp_path / "in.pcap", [sent, (1.0, answer), (2.0, wrong)]), out, sides)
    assert summary["verdicts"] == {"forward": 2, "drop_vlan": 1}
    arrived = rdpcap(str(out))[1]
    assert (Dot1Q in arrived and arrived[Dot1Q].vlan) == (inside or False)
    assert (arrived[IP].dst, arrived[UDP].dport) == (packets.CLIENT, 5001)


def test_frames_to_any_mac_are_taken_as_ours(tmp_path: Path) -> None:
    elsewhere = bytes.fromhex("0011223344550066778899aa") + outbound()[12:]
    summary = translate(write(tmp_path / "in.pcap", [(0, elsewhere)]), tmp_path / "out.pcap", config())
    assert summary["verdicts"] == {"forward": 1}


def test_hosts_behind_an_inside_route_are_inside(tmp_path: Path) -> None:
    routed = config(routes=[{"prefix": "10.9.0.0/16", "gateway": "10.0.0.2"}])
    source = write(tmp_path / "in.pcap", [(0, outbound(source="10.9.1.1")), (0, outbound(source="10.8.1.1"))])
    summary = translate(source, tmp_path / "out.pcap", routed)
    assert summary["verdicts"]["forward"] == 1
    assert summary["counters"]["rx_packets.0"] == summary["counters"]["rx_packets.1"] == 1


def test_sessions_age_by_the_captures_own_time(tmp_path: Path) -> None:
    syn = packets.frame(packets.tcp(packets.CLIENT, 4000, packets.SERVER, 80))
    late = packets.frame(packets.tcp(packets.CLIENT, 4000, packets.SERVER, 80, "A"))
    for gap, verdicts in ((100, {"forward": 3}), (100_000, {"forward": 2, "drop_tcp_not_syn": 1})):
        source = write(tmp_path / "in.pcap", [(0, syn), (gap, outbound()), (gap + 2, late)])
        assert translate(source, tmp_path / "out.pcap", config())["verdicts"] == verdicts


def test_time_that_goes_backwards_does_no_harm(tmp_path: Path) -> None:
    frames = [(5.0, outbound(1)), (0.0, outbound(2)), (6.0, outbound(1))]
    summary = translate(write(tmp_path / "in.pcap", frames), tmp_path / "out.pcap", config())
    assert summary["verdicts"] == {"forward": 3}
    assert summary["seconds"] == 1.0


def test_truncated_packets_are_counted_and_never_written(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound()), (1, outbound())], cut=40)
    summary = translate(source, tmp_path / "out.pcap", config())
    assert (summary["truncated"], summary["written"]) == (2, 0)
    assert sum(summary["verdicts"].values()) == 2


def test_answers_of_the_nat_itself_are_written(tmp_path: Path) -> None:
    ping = packets.frame(packets.echo(packets.CLIENT, "10.0.0.1", 7))
    expiring = packets.frame(packets.udp(packets.CLIENT, 5000, packets.SERVER, 33434, ttl=1))
    summary = translate(
        write(tmp_path / "in.pcap", [(0, ping), (1, expiring)]), tmp_path / "out.pcap", config()
    )
    assert summary["verdicts"] == {"reply": 2}
    assert [packet[IP].src for packet in rdpcap(str(tmp_path / "out.pcap"))] == ["10.0.0.1", "10.0.0.1"]


def test_every_packet_has_a_verdict(tmp_path: Path) -> None:
    oddities = [b"", b"\0" * 13, b"\xff" * 14, b"\0" * 60, b"\2" * 12 + b"\x86\xdd" + b"\0" * 60]
    oddities += [outbound()[:n] for n in range(14, len(outbound()), 3)]
    summary = translate(
        write(tmp_path / "in.pcap", [(i, frame) for i, frame in enumerate(oddities)]),
        tmp_path / "out.pcap",
        config(),
    )
    assert sum(summary["verdicts"].values()) == summary["packets"] == len(oddities)


def test_an_on_link_server_outside_needs_no_arp(tmp_path: Path) -> None:
    frame = packets.frame(packets.tcp(packets.CLIENT, 4000, "198.51.100.77", 80))
    summary = translate(write(tmp_path / "in.pcap", [(0, frame)]), tmp_path / "out.pcap", config())
    assert summary["verdicts"] == {"forward": 1}
    (packet,) = rdpcap(str(tmp_path / "out.pcap"))
    assert packet[Ether].dst == made_up_mac(bytes([198, 51, 100, 77])).hex(":")
    assert packet[TCP].flags == "S"


def test_an_empty_capture_is_fine(tmp_path: Path) -> None:
    summary = translate(write(tmp_path / "in.pcap", []), tmp_path / "out.pcap", config())
    assert (summary["packets"], summary["verdicts"], summary["seconds"]) == (0, {}, 0)
    assert list(read_pcap(tmp_path / "out.pcap")) == []


def test_pcapng_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = tmp_path / "in.pcapng"
    with PcapNgWriter(str(source)) as writer:
        writer.write(Ether(outbound()))
    with pytest.raises(CaptureError, match=r"pcapng; make it pcap: editcap -F pcap"):
        translate(source, tmp_path / "out.pcap", config())


def test_other_link_types_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound())], link=101)
    with pytest.raises(CaptureError, match="link type 101, and only Ethernet"):
        translate(source, tmp_path / "out.pcap", config())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "no pcap file"),
        (lambda data: b"hello, world, this is no capture", "no pcap file"),
        (lambda data: data[:20], "no pcap file"),
        (lambda data: data[:32] + b"\xff\xff\xff\x7f" + data[36:], "packet 1 claims 2147483647 bytes"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object, message: str) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound())])
    source.write_bytes(damage(source.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CaptureError, match=message) as caught:
        translate(source, tmp_path / "out.pcap", config())
    assert str(caught.value).startswith(str(source))
    assert not (tmp_path / "out.pcap").exists()


@pytest.mark.parametrize(
    ("left", "message"), [(2, "ends in the header of packet 2"), (1, "ends in packet 2")]
)
def test_a_capture_that_was_cut_off_is_read_up_to_there(tmp_path: Path, left: int, message: str) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound()), (1, outbound())])
    whole = source.read_bytes()
    size = (len(whole) - 24) // 2  # of a packet with its header
    source.write_bytes(whole[: len(whole) - (1 if left == 1 else size - 5)])
    summary = translate(source, tmp_path / "out.pcap", config())
    assert (summary["packets"], summary["written"]) == (1, 1)
    assert message in summary["cut"]


def test_a_capture_that_comes_through_a_pipe(tmp_path: Path) -> None:
    """It is read twice, and a pipe gives it once."""
    whole = write(tmp_path / "in.pcap", [(0, outbound()), (1, outbound(2))]).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(whole))
    writer.start()
    summary = translate(pipe, tmp_path / "out.pcap", config())
    writer.join()
    assert (summary["packets"], summary["written"]) == (2, 2)


def test_a_target_that_is_full_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound())])
    with pytest.raises(CaptureError, match=r"^/dev/full: No space left on device$"):
        translate(source, Path("/dev/full"), config())


def test_the_capture_is_never_overwritten(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound())])
    with pytest.raises(CaptureError, match="is the capture itself"):
        translate(source, source, config())
    with pytest.raises(CaptureError, match="No such file"):
        translate(tmp_path / "none.pcap", tmp_path / "out.pcap", config())
