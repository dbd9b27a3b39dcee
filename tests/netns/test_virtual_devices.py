# SPDX-License-Identifier: Apache-2.0
"""DPDK's virtual devices under the whole server: memif with another DPDK process, tap, capture files."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator

import pytest
import yaml
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import PcapReader, PcapWriter

from nat_control.demo import CLIENT, NAT_INSIDE, ROUTER, SERVER
from nat_control.lab import Lab, LabError, Process, until
from tests.netns.test_devices import begin, drivers, transfer
from tests.netns.test_server import Net
from tests.packets import check_sums

OUR_MAC = "02:00:00:00:00:11"
MTU = 9000
PATIENCE = 30  # seconds: an other end that connects while it starts itself is given ten, and then asked again

memif = pytest.mark.skipif(not shutil.which("dpdk-testpmd"), reason="apt install dpdk-dev")


@pytest.fixture
def net() -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab)


# -- memif ----------------------------------------------------------------------------------------------------


def cable(net: Net, role: str, mtu: int = 1500) -> Process:
    """Another DPDK process forwards between the client's veth and the memif."""
    frame, block = (2048, 1 << 16) if mtu == 1500 else (16384, 1 << 16)
    packet = f"net_af_packet0,iface=nat-in,blocksz={block},framesz={frame},framecnt=1024"
    shared = f"net_memif0,role={role},socket={net.lab.directory}/memif.sock,socket-abstract=no"
    eal = ["--lcores=0@0,1@1", "--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", "300"]
    eal += ["--file-prefix=cable", f"--vdev={packet}", f"--vdev={shared}"]
    options = ["--forward-mode=io", "--auto-start", "--stats-period=5"]
    options += [f"--mbuf-size={frame + 256}", f"--total-num-mbufs={16384 if mtu == 1500 else 8192}"]
    net.nat.run("ethtool", "-K", "nat-in", "gro", "off")
    net.client.run("ethtool", "-K", "eth0", "tx", "off")  # the cable fills in no checksums
    while True:
        process = net.nat.start("dpdk-testpmd", *eal, "--", *options, name="cable")
        try:
            return process.ready("Port statistics")
        except LabError:
            # testpmd polls a memif while DPDK sets it up, which sometimes ends it: what our gate.c prevents
            if process.popen.poll() != -signal.SIGSEGV:
                raise
            if role == "server":
                (net.lab.directory / "memif.sock").unlink(missing_ok=True)


def answered(net: Net) -> bool:
    return net.client.attempt("ping", "-q", "-c", "1", "-W", "1", SERVER).returncode == 0


def degraded(net: Net) -> list[str]:
    found: list[str] = json.loads(net.show("status", "--json"))["degraded"]
    return found


def device(net: Net, role: str, *more: str) -> dict[str, object]:
    words = [
        "net_memif1",
        f"role={role}",
        f"socket={net.lab.directory}/memif.sock",
        "socket-abstract=no",
        *more,
    ]
    return {"device": ",".join(words), "mac": OUR_MAC}


ALONE = ["internal: net_memif1 is down: no other end is connected"]


@memif
@pytest.mark.parametrize("role", ["client", pytest.param("server", marks=pytest.mark.long)])
def test_memif(net: Net, role: str) -> None:
    """Traffic; the other end comes late, is killed and comes back; so do we."""
    other = "server" if role == "client" else "client"
    begin(net, device(net, role))
    until("nobody is there", lambda: degraded(net) == ALONE)
    first = cable(net, other)
    assert drivers(net)["internal"] == ("net_memif", None)
    until("both find each other", lambda: answered(net))
    assert transfer(net, 1) > 20
    until("the link is seen", lambda: degraded(net) == [])
    assert net.server.output.count("internal: net_memif1 is up") == 1

    first.popen.kill()
    first.popen.wait()
    until("it is missed", lambda: degraded(net) == ALONE)
    assert "down: no other end is connected" in net.show("ports")
    if other == "server":  # testpmd does not take the place of a killed one
        (net.lab.directory / "memif.sock").unlink()
    second = cable(net, other)
    until("both find each other again", lambda: answered(net), timeout=PATIENCE)

    net.server.popen.kill()
    net.server.popen.wait()
    begin(net, device(net, role))
    if other == "client":  # testpmd connects once
        second.stop()
        cable(net, other)
    until("both find each other once more", lambda: answered(net), timeout=PATIENCE)
    assert net.server.stop() == 0, net.server.output


@memif
def test_memif_without_a_copy(net: Net) -> None:
    config = device(net, "client", "zero-copy=yes")
    with pytest.raises(LabError, match="Failed to connect socket"):
        begin(net, config)
    first = cable(net, "server")
    begin(net, config)
    until("both find each other", lambda: answered(net))
    assert transfer(net, 1) > 20
    assert degraded(net) == []
    first.popen.kill()
    first.popen.wait()
    until("it is missed", lambda: degraded(net) == ALONE)
    assert net.server.stop() == 0, net.server.output


@pytest.mark.long
@memif
def test_jumbo_frames_over_memif(net: Net) -> None:
    """The device's buffers have 2 KB; 8000 bytes that may not be fragmented, and TCP in segments of 9000."""
    for namespace, name in (
        (net.nat, "nat-in"),
        (net.nat, "nat-out"),
        (net.client, "eth0"),
        (net.outside, "eth0"),
    ):
        namespace.ip("link", "set", name, "mtu", str(MTU))
    cable(net, "server", MTU)
    begin(net, {**device(net, "client"), "mtu": MTU}, {"mtu": MTU})
    until("both find each other", lambda: answered(net))
    net.client.run("ping", "-c", "2", "-W", "2", "-s", "8000", "-M", "do", SERVER)
    assert transfer(net, 1) > 20


# -- tap ------------------------------------------------------------------------------------------------------


def test_tap(net: Net) -> None:
    """The kernel's ends become the interfaces of client and outside."""
    begin(net, {"device": "net_tap0,iface=tap-in"}, {"device": "net_tap1,iface=tap-out"})
    assert {name for name, _ in drivers(net).values()} == {"net_tap"}
    for namespace, name, address in (
        (net.client, "tap-in", f"{CLIENT}/24"),
        (net.outside, "tap-out", f"{ROUTER}/24"),
    ):
        namespace.ip("link", "delete", "eth0")
        net.nat.ip("link", "set", name, "netns", namespace.full_name)
        namespace.ip("link", "set", name, "name", "eth0")
        namespace.address("eth0", address)
    net.client.route("default", NAT_INSIDE)
    until("the first answer", lambda: answered(net))
    net.ping()
    assert transfer(net, 1) > 20
    assert degraded(net) == [], "a tap in another namespace is no tap that is gone"
    net.client.ip("link", "delete", "eth0")
    net.server.ready("internal: net_tap0 is down")
    assert len(degraded(net)) == 1
    assert net.server.stop() == 0, net.server.output


# -- capture files --------------------------------------------------------------------------------------------


def test_capture_files_through_the_whole_server(net: Net) -> None:
    """A pool of one port makes known beforehand what comes out, in both directions."""
    paths = {name: str(net.lab.directory / f"{name}.pcap") for name in ("in0", "in1", "out0", "out1")}
    macs = {"client": "02:00:00:00:00:aa", "router": "02:00:00:00:00:fe"}
    pool, port = "198.51.100.10", 2000
    asked = [
        Ether(src=macs["client"], dst=OUR_MAC)
        / IP(src=CLIENT, dst=SERVER, id=i)
        / UDP(sport=5000, dport=53)
        / Raw(b"q" * i)
        for i in range(100)
    ]
    strangers = (
        Ether(src=macs["client"], dst=OUR_MAC) / IP(src=CLIENT, dst=SERVER, ttl=1) / ICMP() / Raw(b"ttl")
    )
    answers = [
        Ether(src=macs["router"], dst="02:00:00:00:00:12")
        / IP(src=SERVER, dst=pool, id=i)
        / UDP(sport=53, dport=port)
        / Raw(b"a" * i)
        for i in range(40)
    ]
    found = Ether(src=macs["router"], dst="02:00:00:00:00:12") / ARP(
        op=2, hwsrc=macs["router"], psrc=ROUTER, hwdst="02:00:00:00:00:12", pdst="198.51.100.1"
    )
    for name, packets in (("in0", [*asked, strangers]), ("in1", [found, *answers])):
        with PcapWriter(paths[name], linktype=1) as writer:
            for packet in packets:
                writer.write(packet)
    path = net.write(pool={"addresses": [pool], "ports": f"{port}-{port}"})
    content = yaml.safe_load(path.read_text())
    for i, side in enumerate(("internal", "external")):
        devargs = f"net_pcap{i},rx_pcap={paths[f'in{i}']},tx_pcap={paths[f'out{i}']}"
        content["ports"][side] |= {"device": devargs, "mac": f"02:00:00:00:00:1{i + 1}"}
    content["ports"]["internal"].pop("routes")
    path.write_text(yaml.safe_dump(content))
    net.begin(path)
    assert {name for name, _ in drivers(net).values()} == {"net_pcap"}
    until(
        "all is translated",
        lambda: net.stats()["verdicts"]["forward"] + net.stats()["verdicts"]["held"] >= 140,
    )
    time.sleep(0.2)
    verdicts = net.stats()["verdicts"]
    assert verdicts["reply"] == 1
    assert net.server.stop() == 0, net.server.output

    def udp_of(name: str) -> list[Ether]:
        return [packet for packet in map(Ether, map(bytes, PcapReader(paths[name]))) if UDP in packet]

    out, back = udp_of("out1"), udp_of("out0")
    assert [(p[IP].id, bytes(p[Raw].load) if Raw in p else b"") for p in out] == [
        (i, b"q" * i) for i in range(100)
    ]
    assert {(p.dst, p[IP].src, p[UDP].sport, p[IP].dst, p[UDP].dport, p[IP].ttl) for p in out} == {
        (macs["router"], pool, port, SERVER, 53, 63)
    }
    assert [p[IP].id for p in back] == list(range(40))
    assert {(p.dst, p[IP].src, p[IP].dst, p[UDP].dport) for p in back} == {
        (macs["client"], SERVER, CLIENT, 5000)
    }
    for packet in (*out, *back):
        check_sums(bytes(packet))
