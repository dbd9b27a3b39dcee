# SPDX-License-Identifier: Apache-2.0
"""The real server between real programs, in namespaces that each test makes and removes."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_control import api
from nat_control.demo import (
    CLIENT,
    NAT_INSIDE,
    ROUTER,
    SECOND_SERVER,
    SERVER,
    Check,
    Demo,
    features,
    in_pool,
    server_command,
)
from nat_control.lab import Lab, Process, until
from nat_control.translate import read_pcap

CLI = [sys.executable, "-m", "nat_control.cli"]
SECOND_CLIENT, ROUTED = "10.0.0.11", ("10.1.0.5", "10.2.0.5")


class Net(Demo):
    """The demo's network with configurations of our own, and two subnets behind a router inside."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab, self._tell)
        self.build()
        self.client.address("eth0", f"{SECOND_CLIENT}/24")
        self.far = lab.namespace("far")
        lab.cable(self.far, "eth0", self.client, "lan")
        self.client.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.client.address("lan", "10.1.0.1/24", "10.2.0.1/24")
        self.far.address("eth0", *(f"{address}/24" for address in ROUTED))
        self.far.route("default", "10.1.0.1")

    @staticmethod
    def _tell(check: Check) -> None:
        raise AssertionError("the tests call the checks themselves")

    def write(self, instance: str = "test", name: str = "nat", **nat: Any) -> Path:
        path = self.lab.directory / f"{name}.yaml"
        routes = [{"prefix": f"10.{n}.0.0/24", "gateway": CLIENT} for n in (1, 2)]
        pool = {"addresses": ["198.51.100.10-198.51.100.13"], "ports": "1024-65535"}
        external = {"device": "nat-out", "address": "198.51.100.1/24", "gateway": ROUTER}
        content = {
            "instance": instance,
            "ports": {
                "internal": {"device": "nat-in", "address": f"{NAT_INSIDE}/24", "routes": routes},
                "external": {**external, **nat.pop("external", {})},
            },
            "nat": {"pool": pool, "max_sessions": 10_000, **nat},
            "control": {"socket": str(self.lab.directory / f"{name}.sock")},
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def begin(self, config: Path, *options: str, command: list[str] | None = None) -> Process:
        self.server = self.nat.start(*(command or server_command(config, *options)), name="server")
        return self.server.ready("\nready", timeout=30)

    def state(self) -> list[str]:
        """All that the server may change on the interfaces."""
        seen = []
        for device in ("nat-in", "nat-out"):
            link = json.loads(self.nat.ip("-j", "-d", "link", "show", device))[0]
            seen += [
                features(self.nat, device),
                str(sorted(link["flags"])),
                str(link.get("xdp")),
                str(link["mtu"]),
            ]
            seen.append(str(link.get("promiscuity")))
            seen.append(self.nat.run("sysctl", f"net.ipv4.conf.{device}"))
        return seen

    def stats(self) -> dict[str, Any]:
        return next(api.ask(self.socket, {"show": "stats"}))["stats"]

    def sessions(self, **wanted: str) -> list[dict[str, Any]]:
        return self._sessions(wanted)

    def show(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [*CLI, "show", *arguments, "--socket", str(self.socket)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if not code else done.stderr

    def python(self, namespace: str, script: str, *arguments: str, name: str) -> Process:
        where = {"client": self.client, "outside": self.outside, "nat": self.nat}[namespace]
        return where.start(sys.executable, "-u", "-c", script, *arguments, name=name)


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """A NAT that runs, with all servers outside."""
    with Lab() as lab:
        running = Net(lab)
        running.start_services()
        running.begin(running.write())
        yield running


@pytest.fixture
def bare() -> Iterator[Net]:
    """The same network, and no NAT in it yet."""
    with Lab() as lab:
        yield Net(lab)


# -- traffic ------------------------------------------------------------------------------------------------


def test_a_download_comes_whole(net: Net) -> None:
    net.download()


def test_tcp_up_and_down(net: Net) -> None:
    for direction in ((), ("-R",)):
        report = net._iperf3("-t", "2", *direction)
        assert report["end"]["sum_received"]["bytes"] > 1_000_000


def test_udp_up_and_down(net: Net) -> None:
    for direction in ((), ("-R",)):
        total = net._iperf3("-u", "-b", "10M", "-t", "1", *direction)["end"]["sum"]
        assert total["packets"] > 100
        assert total["lost_percent"] < 1


def test_ping_dns_and_traceroute(net: Net) -> None:
    assert "rtt" in net.ping()
    net.name_look_up()
    net.mapping()
    assert net.traceroute() == f"hops {NAT_INSIDE}, {SERVER}"


def test_fragments_pass_both_ways(net: Net) -> None:
    """A datagram larger than the MTU comes whole, up to the largest that there is, and its answer does."""
    before = net.stats()["counters"]
    for size in ("4000", "65507"):
        said = net.client.run("ping", "-n", "-q", "-c", "3", "-i", "0.2", "-W", "2", "-s", size, SERVER)
        assert " 3 received" in said
    echo = net.python("outside", UDP_ECHO, SERVER, name="echo").ready("bound")
    sizes = ("8000", "1400", "65507")
    assert net.client.run(sys.executable, "-c", UDP_ASK, SERVER, *sizes).split() == [*sizes]
    echo.stop()
    after = net.stats()["counters"]
    ways = (f"{way}_packets.{port}" for way in ("rx", "tx") for port in (0, 1))
    assert all(after[name] - before[name] >= 3 * 3 + 3 * 45 + 6 + 1 + 45 for name in ways)


def test_packets_longer_than_the_next_mtu_are_cut(bare: Net) -> None:
    bare.begin(bare.write(external={"mtu": 1000}))
    for size in ("1400", "4000"):  # whole, and in fragments that are too long themselves
        said = bare.client.run(
            *("ping", "-n", "-q", "-c", "3", "-i", "0.2", "-W", "2", "-M", "dont", "-s", size, ROUTER)
        )
        assert " 3 received" in said
    assert bare.stats()["verdicts"]["fragment"] == 3 + 3 * 3
    refused = bare.client.attempt("ping", "-n", "-c", "1", "-W", "2", "-M", "do", "-s", "1400", ROUTER)
    assert "mtu = 1000" in refused.stdout + refused.stderr


def test_the_nat_answers_pings_to_itself(net: Net) -> None:
    net.client.run("ping", "-n", "-q", "-c", "1", NAT_INSIDE)
    net.outside.run("ping", "-n", "-q", "-c", "1", "198.51.100.1")


def test_clients_of_several_subnets(net: Net) -> None:
    for namespace, address in (
        (net.client, CLIENT),
        (net.client, SECOND_CLIENT),
        *((net.far, address) for address in ROUTED),
    ):
        said = namespace.run(
            *("curl", "-sS", "-f", "--interface", address, "-r", "0-99999", "-o", "/dev/null"),
            *("-w", "%{size_download}", f"http://{SERVER}/file"),
        )
        assert said == "100000"
        rows = net.sessions(internal=address, protocol="tcp")
        assert rows
        assert all(in_pool(row["external"].split(":")[0]) for row in rows)
    hops = [line.split()[1] for line in net.far.run("traceroute", "-n", "-q", "1", SERVER).splitlines()[1:]]
    assert hops == ["10.1.0.1", NAT_INSIDE, SERVER]


def test_outside_nobody_sees_an_inside_address(net: Net) -> None:
    net.ping()
    net.pool_only()
    sources = {
        IPv4Address(packet.frame[26:30])
        for packet in read_pcap(net.lab.directory / "outside.pcap")
        if packet.frame[12:14] == b"\x08\x00"
    }
    assert sources
    assert not [source for source in sources if str(source).startswith("10.")]


def test_show_as_text_and_as_json(net: Net) -> None:
    net.ping()
    net.name_look_up()
    assert "instance test" in net.show("status")
    assert json.loads(net.show("status", "--json"))["instance"] == "test"
    assert json.loads(net.show("stats", "--json"))["verdicts"]["forward"] > 0
    assert "translated and sent on" in net.show("stats")
    assert json.loads(net.show("pool", "--json"))["capacity"] == 4 * (65535 - 1023)
    assert "198.51.100.10-198.51.100.13" in net.show("pool")
    ports = json.loads(net.show("ports", "--json"))
    assert ports["internal"]["kernel_interface"] == "nat-in"
    assert ports["external"]["link"]["up"] is True
    assert ROUTER in {hop["address"] for hop in ports["external"]["neighbours"]}
    assert "net_af_xdp" in net.show("ports")
    rows = json.loads(net.show("sessions", "--json", "--protocol", "icmp", "--remote", SERVER))["sessions"]
    assert rows
    assert {row["protocol"] for row in rows} == {"icmp"}
    first = json.loads(net.show("sessions", "--json", "--limit", "1"))
    assert len(first["sessions"]) == 1
    assert first["cursor"]
    assert len(net.show("sessions", "--limit", "0").splitlines()) >= 2
    assert "none of icmp, tcp, udp" in net.show("sessions", "--protocol", "sctp", code=2)


def test_a_second_server_of_the_same_name_is_refused(net: Net) -> None:
    second = net.nat.attempt(*server_command(net.write(name="other")))
    assert second.returncode == 1
    assert "instance 'test' runs already" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    net.ping()


UDP_ECHO = """
import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind((sys.argv[1], 7778))
print("bound")
while True:
    data, sender = s.recvfrom(65535)
    s.sendto(data, sender)
"""
UDP_ASK = """
import os, socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.settimeout(5)
s.connect((sys.argv[1], 7778))
for size in sys.argv[2:]:
    sent = os.urandom(int(size))
    s.send(sent)
    assert s.recv(65535) == sent
    print(size)
"""
SENDER = """
import socket, sys, time
s = socket.socket(type=socket.SOCK_DGRAM)
s.connect((sys.argv[1], 7777))
start = time.monotonic()
for i in range(3000):
    time.sleep(max(0, start + i / 1000 - time.monotonic()))
    s.send(b"%d" % i)
for _ in range(20):
    s.send(b"end")
    time.sleep(0.05)
"""
RECEIVER = """
import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind((sys.argv[1], 7777))
print("bound")
seen = set()
while (data := s.recv(100)) != b"end":
    seen.add(data)
    if len(seen) == 500:
        print("flowing")
print(f"received {len(seen)}")
"""
STALLING = """
import ctypes, signal, sys
from nat_control.cli import app
def stall(number, frame):
    print("stalled", flush=True)
    ctypes.PyDLL(None).usleep(1_000_000)  # PyDLL keeps the GIL: no Python runs meanwhile
    print("resumed", flush=True)
signal.signal(signal.SIGUSR1, stall)
app(sys.argv[1:])
"""


def test_a_stalled_control_loop_costs_established_flows_no_packet(bare: Net) -> None:
    bare.begin(bare.write(), command=[sys.executable, "-u", "-c", STALLING, "server", str(bare.write())])
    receiver = bare.python("outside", RECEIVER, SERVER, name="receiver").ready("bound")
    sender = bare.python("client", SENDER, SERVER, name="sender")
    receiver.ready("flowing")
    bare.server.signal(signal.SIGUSR1)
    bare.server.ready("resumed")
    assert sender.alive  # so the whole stall lay within the stream
    assert receiver.wait(20) == 0
    assert "received 3000" in receiver.output


MANY = """
import socket, sys
for port in range(20000, 20500):
    s = socket.socket(type=socket.SOCK_DGRAM)
    s.bind(("", port))
    s.sendto(b"load", (sys.argv[1], 9))
    s.close()
"""


def test_an_exhausted_pool_lets_nothing_out_untranslated(bare: Net) -> None:
    bare.start_services()
    bare.begin(bare.write(pool={"addresses": ["198.51.100.10"], "ports": "2000-2063"}))
    look_up = (
        "dig",
        "+short",
        "+tries=1",
        "+time=2",
        "-b",
        f"{CLIENT}#5353",
        f"@{SERVER}",
        "www.tandem.example",
    )
    assert bare.client.run(*look_up).strip() == SERVER
    capture = bare.start_capture("udp.pcap", "udp")
    load = [bare.python("client", MANY, SERVER, name="many") for _ in range(2)]
    assert [process.wait(20) for process in load[:1]] == [0]
    assert bare.client.run(*look_up).strip() == SERVER  # the live flow goes on
    load[1].wait(20)
    stats = bare.stats()
    assert stats["verdicts"]["drop_no_port"] > 400
    rows = bare.sessions(protocol="udp")
    assert len({row["external"] for row in rows}) == 64
    assert [row["packets_in"] for row in rows if row["internal"] == f"{CLIENT}:5353"] == [2]
    assert capture.stop() == 0
    ends = set()
    for packet in read_pcap(bare.lab.directory / "udp.pcap"):
        if packet.frame[23] == 17 and IPv4Address(packet.frame[26:30]) != IPv4Address(SERVER):
            ends.add((str(IPv4Address(packet.frame[26:30])), int.from_bytes(packet.frame[34:36], "big")))
    assert ends <= {("198.51.100.10", port) for port in range(2000, 2064)}
    assert len(ends) > 32
    # the ports of TCP are others
    bare.download()


def test_show_pool_counts_mappings_where_they_are(bare: Net) -> None:
    """One host, more mappings than its address has ports: the others are at the second one."""
    bare.begin(bare.write(pool={"addresses": ["198.51.100.10-198.51.100.11"], "ports": "2000-2063"}))
    assert bare.python("client", MANY, SERVER, name="many").wait(20) == 0
    pool = json.loads(bare.show("pool", "--json"))
    assert [use["mappings"] for use in pool["in_use"]] == [64, 64]
    assert sorted(use["hosts"] for use in pool["in_use"]) == [0, 1]
    assert (pool["used"], pool["in_use_total"]) == (128, 2)
    assert pool["unpaired"] == 64


# -- start and end ----------------------------------------------------------------------------------------


def test_sigterm_ends_it_cleanly_and_soon(bare: Net) -> None:
    before = bare.state()
    bare.begin(bare.write())
    assert bare.socket.stat().st_mode & 0o777 == 0o600
    bare.client.run("ping", "-n", "-q", "-c", "1", ROUTER)
    asked = time.monotonic()
    bare.server.signal(signal.SIGTERM)
    assert bare.server.wait(2) == 0
    assert time.monotonic() - asked < 2
    assert "ended by SIGTERM" in bare.server.output
    assert not bare.socket.exists()
    assert bare.state() == before
    assert "no server is running there" in bare.show("status", code=3)


def test_an_operator_who_reads_does_not_keep_it_from_ending(bare: Net) -> None:
    bare.begin(bare.write())
    with api.socket.socket(api.socket.AF_UNIX) as idle:
        idle.connect(str(bare.socket))
        bare.server.signal(signal.SIGINT)
        assert bare.server.wait(2) == 0


def test_kill_9_hinders_nothing(bare: Net) -> None:
    before = bare.state()
    config = bare.write()
    for _ in range(3):
        bare.begin(config)
        bare.client.run("ping", "-n", "-q", "-c", "1", "-W", "3", ROUTER)
        bare.server.signal(signal.SIGKILL)
        bare.server.wait(5)
        assert bare.socket.exists()
        assert "no server is running there" in bare.show("status", code=3)
    bare.begin(config)
    bare.client.run("ping", "-n", "-q", "-c", "1", "-W", "3", ROUTER)
    assert bare.server.stop() == 0
    assert bare.state() == before


def test_a_signal_during_the_start_undoes_it(bare: Net) -> None:
    before = bare.state()
    config = bare.write()
    server = bare.nat.start(*server_command(config), name="server")
    server.ready("\ninternal:", timeout=30)
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0
    assert not bare.socket.exists()
    assert bare.state() == before


def test_a_failed_start_undoes_what_was_done(bare: Net) -> None:
    before = bare.state()
    server = bare.nat.attempt(*server_command(bare.write(external={"device": "nat-none"})))
    assert server.returncode == 1
    assert "device nat-none: no kernel interface" in server.stderr
    assert "Traceback" not in server.stderr
    assert bare.state() == before


def test_a_device_without_a_mac_needs_one(bare: Net) -> None:
    server = bare.nat.attempt(*server_command(bare.write(external={"device": "net_ring0"})))
    assert server.returncode == 1
    assert "device net_ring0 has no MAC; ports.external.mac says which the NAT takes" in server.stderr
    config = bare.write(external={"device": "net_ring0", "mac": "02:00:00:00:00:01"})
    bare.begin(config)
    assert bare.server.stop() == 0


def test_the_device_of_the_default_route_is_refused_without_force(bare: Net) -> None:
    bare.nat.ip("route", "add", "default", "dev", "nat-out")
    config = bare.write()
    refused = bare.nat.attempt(*server_command(config))
    assert refused.returncode == 1
    assert "nat-out" in refused.stderr
    assert "--force" in refused.stderr
    bare.begin(config, "--force")
    assert bare.server.stop() == 0


def test_a_taken_socket_is_refused_and_left_alone(bare: Net) -> None:
    with api.socket.socket(api.socket.AF_UNIX) as other:
        other.bind(str(bare.socket))
        other.listen(1)
        refused = bare.nat.attempt(*server_command(bare.write()))
        assert refused.returncode == 1
        assert "another server listens there" in refused.stderr
        assert bare.socket.is_socket()


def test_two_next_hops_that_come_late(bare: Net) -> None:
    """The first packet waits for ARP, and is not lost; a router that is away costs no more than its packets."""
    bare.outside.ip("link", "set", "eth0", "down")
    bare.begin(bare.write())
    answers: list[str] = []
    pinging = threading.Thread(
        target=lambda: answers.append(
            bare.client.attempt("ping", "-n", "-q", "-c", "20", "-i", "0.2", SECOND_SERVER).stdout
        )
    )
    pinging.start()
    until("a packet for the absent router", lambda: bare.stats()["counters"]["rx_packets.0"] > 2)
    bare.outside.ip("link", "set", "eth0", "up")
    pinging.join()
    received = int(answers[0].split(" received")[0].split()[-1])
    assert received >= 10
