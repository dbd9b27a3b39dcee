# SPDX-License-Identifier: Apache-2.0
"""A server with two workers between real programs: veth pairs know nothing of our hash, so software hands over."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_control.client import connect
from nat_control.demo import CLIENT, SERVER, server_command
from nat_control.lab import Lab, Namespace, until
from nat_fastpath.engine import slice_of_hosts, slice_of_ports
from switch_agent.pair_lab import OUTSIDE, PairLab
from tests.netns.test_server import ROUTED, SECOND_CLIENT, UDP_ASK, UDP_ECHO, Net
from tests.stopped_thread import stopped_thread

CPUS = sorted(os.sched_getaffinity(0))[:2]
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="two workers need two CPUs")
FAR = ROUTED[0]  # behind a router
OWNER = {host: int(slice_of_hosts(int(IPv4Address(host)), 2)) for host in (CLIENT, SECOND_CLIENT, FAR)}

ASK = """
import socket, sys
answered = 0
for port in range(int(sys.argv[4])):
    s = socket.socket(type=socket.SOCK_DGRAM)
    s.settimeout(float(sys.argv[5]))
    s.bind((sys.argv[1], int(sys.argv[3]) + port))
    try:
        s.sendto(b"x", (sys.argv[2], 7778))
        answered += s.recv(10) == b"x"
    except TimeoutError:
        pass
print(answered)
"""


class TwoWorkers(Net):
    def write(self, instance: str = "test", name: str = "nat", **nat: Any) -> Path:
        path = super().write(instance, name, **nat)
        content = yaml.safe_load(path.read_text()) | {"workers": {"cores": CPUS}}
        path.write_text(yaml.safe_dump(content))
        return path

    def where(self, host: str) -> Namespace:
        return self.far if host in ROUTED else self.client

    def ask(self, host: str, first: int, count: int, to: str = SERVER, patience: float = 3) -> int:
        """How many of ``count`` datagrams, each of a port of its own, are answered by an echo."""
        arguments = (host, to, str(first), str(count), str(patience))
        return int(self.where(host).run(sys.executable, "-c", ASK, *arguments))

    def echo(self) -> None:
        self.python("outside", UDP_ECHO, SERVER, name="echo").ready("bound")

    def workers(self) -> list[dict[str, Any]]:
        return json.loads(self.show("status", "--json"))["workers"]

    def command(self, *arguments: str) -> str:
        return self.nat.run(sys.executable, "-m", "nat_control.cli", *arguments, "--socket", str(self.socket))


@pytest.fixture(scope="module")
def net() -> Iterator[TwoWorkers]:
    with Lab() as lab:
        running = TwoWorkers(lab)
        running.start_services()
        running.begin(running.write(filtering="endpoint-independent"))
        running.echo()
        yield running


@pytest.fixture
def bare() -> Iterator[TwoWorkers]:
    with Lab() as lab:
        yield TwoWorkers(lab)


def test_the_hosts_here_are_of_both_workers() -> None:
    assert OWNER == {CLIENT: 0, SECOND_CLIENT: 1, FAR: 0}


def test_hosts_of_both_workers_have_udp_tcp_and_ping(net: TwoWorkers) -> None:
    for host in OWNER:
        assert net.ask(host, 30000, 20) == 20
        said = net.where(host).run("ping", "-n", "-q", "-i", "0.1", "-c", "5", "-W", "2", "-I", host, SERVER)
        assert " 5 received" in said
        said = net.where(host).run(
            *("curl", "-sS", "-f", "--interface", host, "-r", "0-499999", "-o", "/dev/null"),
            *("-w", "%{size_download}", f"http://{SERVER}/file"),
        )
        assert said == "500000"
    for host, owner in OWNER.items():
        rows = net.sessions(internal=host)
        assert {row["protocol"] for row in rows} == {"icmp", "tcp", "udp"}
        ports = [int(row["external"].split(":")[1]) for row in rows]
        assert set(slice_of_ports(ports, 2).tolist()) == {owner}, "ports are of their host's worker"
    workers = net.workers()
    assert [one["cpu"] for one in workers] == CPUS
    assert all(one["sessions"] >= 20 and not one["stalled"] for one in workers)
    assert sum(one["sessions"] for one in workers) == json.loads(net.show("status", "--json"))["sessions"]
    assert sum(one["handed_off"] for one in workers) > 100
    assert sum(one["handed_off"] for one in workers) == sum(one["handoff_received"] for one in workers)
    assert not any(one["handoff_dropped"] for one in workers)


def test_both_carry_at_once(net: TwoWorkers) -> None:
    report = net._iperf3("-t", "2", "-P", "2")
    assert report["end"]["sum_received"]["bytes"] > 1_000_000
    total = net._iperf3("-u", "-b", "10M", "-t", "1")["end"]["sum"]
    assert total["lost_percent"] < 1


def test_fragments_pass_both_ways(net: TwoWorkers) -> None:
    """From outside only the first one says whose it is."""
    sizes = ("8000", "1400", "65507")
    for host in (CLIENT, SECOND_CLIENT):
        said = net.client.run(
            *("ping", "-n", "-q", "-c", "3", "-i", "0.2", "-W", "2", "-I", host, "-s", "4000", SERVER)
        )
        assert " 3 received" in said
    assert net.client.run(sys.executable, "-c", UDP_ASK, SERVER, *sizes).split() == [*sizes]


def test_traceroute_names_the_nat_to_hosts_of_both(net: TwoWorkers) -> None:
    for host in (CLIENT, SECOND_CLIENT):
        said = net.client.run("traceroute", "-n", "-q", "1", "-s", host, SERVER).splitlines()[1:]
        assert [line.split()[1] for line in said] == ["10.0.0.1", SERVER]


def test_a_hairpin_from_one_worker_to_the_other(net: TwoWorkers) -> None:
    """FAR asks SECOND_CLIENT by its external endpoint, and each sees the other's."""
    opened = net.client.start(sys.executable, "-u", "-c", OPENING_ECHO, SECOND_CLIENT, SERVER, name="opener")
    opened.ready("bound")
    (row,) = net.sessions(internal=f"{SECOND_CLIENT}:7779")
    address, port = row["external"].split(":")
    turned = net.far.run(sys.executable, "-c", HAIRPIN, FAR, address, port).split()
    assert turned == ["20"]
    both = [r for r in net.sessions(protocol="udp") if r["remote"].startswith("198.51.100.1")]
    assert {r["internal"].split(":")[0] for r in both} >= {FAR, SECOND_CLIENT}

    told = json.loads(net.command("explain", f"{FAR}:5000", f"{address}:{port}/udp", "--json"))
    assert told["verdict"] == "forward"
    assert told["becomes"]["destination"] == f"{SECOND_CLIENT}:7779"
    handed = [step["text"] for step in told["steps"] if step["step"] == "handoff"]
    assert handed[0] == "worker 0 has this packet"
    assert handed[1].startswith("worker 1 has the external port")


OPENING_ECHO = """
import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind((sys.argv[1], 7779))
s.settimeout(5)
s.sendto(b"open", (sys.argv[2], 7778))
assert s.recv(10) == b"open"
print("bound")
s.settimeout(None)
while True:
    data, sender = s.recvfrom(100)
    s.sendto(data, sender)
"""
HAIRPIN = """
import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind((sys.argv[1], 6000))
s.settimeout(5)
answered = 0
for i in range(20):
    s.sendto(b"%d" % i, (sys.argv[2], int(sys.argv[3])))
    data, sender = s.recvfrom(100)
    answered += data == b"%d" % i and sender == (sys.argv[2], int(sys.argv[3]))
print(answered)
"""


def test_a_quota_is_whole_for_each_host(bare: TwoWorkers) -> None:
    bare.begin(bare.write(limits={"sessions_per_host": 7}))
    bare.echo()
    for host in OWNER:
        assert bare.ask(host, 30000, 10, patience=0.5) == 7
        assert len(bare.sessions(internal=host)) == 7
    assert bare.stats()["verdicts"]["drop_quota"] == 9


def test_explain_and_trace_know_both(net: TwoWorkers) -> None:
    for host, owner in ((CLIENT, 0), (SECOND_CLIENT, 1)):
        net.ask(host, 31000, 1)
        text = net.command("explain", f"{host}:31000", f"{SERVER}:7778/udp")
        assert f"worker {owner} has this packet" in text
        (row,) = net.sessions(internal=f"{host}:31000")
        back = net.command("explain", f"{SERVER}:7778", f"{row['external']}/udp", "--from", "external")
        assert f"worker {owner} has this packet" in back
        assert f"-> {host}:31000" in back
    tracing = net.nat.start(
        *(
            sys.executable,
            "-m",
            "nat_control.cli",
            "trace",
            f"remote={SERVER}:7778",
            "udp",
            "--packets",
            "12",
        ),
        *("--seconds", "60", "--json", "--socket", str(net.socket)),
        name="trace",
    )
    while tracing.alive:
        for host in (CLIENT, SECOND_CLIENT):
            net.ask(host, 32000, 1)
    rows = [json.loads(line) for line in tracing.output.splitlines() if line.startswith("{")]
    assert len(rows) == 12
    assert {row["source"].split(":")[0] for row in rows} >= {CLIENT, SECOND_CLIENT, SERVER}
    assert {row["verdict"] for row in rows} == {"forward"}


def test_pages_hosts_and_counters_are_of_both(net: TwoWorkers) -> None:
    for host in (CLIENT, SECOND_CLIENT):
        net.ask(host, 33000, 5)
    seen, cursor = [], 0
    while True:
        page = json.loads(
            net.show("sessions", "--json", "--limit", "20", *(["--cursor", str(cursor)] if cursor else []))
        )
        seen += [row["id"] for row in page["sessions"]]
        cursor = page["cursor"]
        if not cursor:
            break
    assert len(seen) == len(set(seen))
    assert set(seen) >= {row["id"] for row in net.sessions()}
    hosts = {host["address"] for host in connect(net.socket).show("hosts")["top"]}
    assert set(OWNER) <= hosts
    stats = net.stats()
    assert len(stats["workers"]) == 2
    assert "over the workers by software: " in net.show("ports")
    assert stats["worker"]["loops"] == sum(one["loops"] for one in stats["workers"])
    text = net.show("status")
    assert f"worker 0 CPU {CPUS[0]}, adaptive" in " ".join(text.split())
    assert f"worker 1 CPU {CPUS[1]}, adaptive" in " ".join(text.split())
    assert "worker1.handoff_received" in net.show("stats", "--all")
    seen_by_top = json.loads(net.command("top", "--once", "--json", "--every", "0.5"))
    assert len(seen_by_top["busy_shares"]) == 2


def test_a_cpu_that_is_not_there_is_one_line(bare: TwoWorkers) -> None:
    config = bare.write()
    content = yaml.safe_load(config.read_text()) | {"workers": {"cores": [CPUS[0], 1023]}}
    config.write_text(yaml.safe_dump(content))
    before = bare.state()
    done = bare.nat.attempt(*server_command(config))
    assert done.returncode == 1
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("tandem-nat:")]
    assert "CPU 1023" in line
    assert bare.state() == before, "everything is put back, and the worker that ran already has ended"


def test_one_worker_that_stands_still_is_named(bare: TwoWorkers) -> None:
    bare.begin(bare.write())
    with stopped_thread(bare.server.pid, "nat-worker-1"):
        until("it is missed", lambda: "has not moved for a second" in bare.server.output)
        assert (
            f"nothing of its hosts (CPU {CPUS[1]}), and nothing at all by external, is" in bare.server.output
        )
        status = json.loads(bare.show("status", "--json"))
        assert len(status["degraded"]) == 1
        assert [one["stalled"] for one in status["workers"]] == [False, True]
        assert "STALLED" in bare.show("status")
        bare.server.signal(signal.SIGTERM)
        until("it ends without its thread", lambda: "we end without it" in bare.server.output, 20)
    assert bare.server.wait(10) == 1
    assert "a worker has not ended in 5 seconds" in bare.server.output
    bare.begin(bare.write())
    assert "repaired: " in bare.server.output, "and the next start puts back what this one could not"


# -- a pair ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[PairLab]:
    with Lab() as lab:
        net = PairLab(lab, workers=2)
        net.client.address("eth0", f"{SECOND_CLIENT}/24")
        net.start_agent()
        yield net


def sessions_of(net: PairLab, of: str) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["internal"], row["external"]) for row in net.show(of, "sessions")}


def both_pass(net: PairLab) -> None:
    for host in (CLIENT, SECOND_CLIENT):
        until(
            f"{host} passes",
            lambda host=host: net.client.attempt("ping", "-q", "-c", "3", "-i", "0.1", "-W", "1", "-I", host, OUTSIDE).returncode == 0,
        )  # fmt: skip


@pytest.mark.long
def test_a_pair_with_two_workers_dies_and_returns(pair: PairLab) -> None:
    """What either has opened is at the other, goes on there, and comes back to the worker of its host."""
    pair.start_server()
    pair.carrier("server")
    pair.outside.start(sys.executable, "-u", "-c", UDP_ECHO, OUTSIDE, name="echo").ready("bound")

    def ask(host: str, first: int) -> int:
        arguments = (host, OUTSIDE, str(first), "20", "3")
        return int(pair.client.run(sys.executable, "-c", ASK, *arguments))

    for host in (CLIENT, SECOND_CLIENT):
        assert ask(host, 20000) == 20
    pair.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", name="tcp").ready("Server listening")
    stream = pair.client.start(
        "iperf3", "-c", OUTSIDE, "-B", SECOND_CLIENT, "-t", "8", "--json", name="stream"
    )
    until(
        "both have all, and the stream",
        lambda: (
            len(sessions_of(pair, "server")) >= 42
            and sessions_of(pair, "agent").items() >= sessions_of(pair, "server").items()
        ),
    )
    known = sessions_of(pair, "agent")

    pair.server.popen.kill()
    pair.server.popen.wait()
    pair.carrier("switch")
    assert sessions_of(pair, "agent").items() >= known.items()
    both_pass(pair)
    for host in (CLIENT, SECOND_CLIENT):
        assert ask(host, 21000) == 20, "the agent opens new ones, with ports of the worker's slice"

    pair.start_server()
    pair.carrier("server")
    both_pass(pair)
    told = sessions_of(pair, "server")
    assert told.items() >= known.items()
    for host in (CLIENT, SECOND_CLIENT):
        assert {f"{host}:{21000 + i}" for i in range(20)} <= {inside for inside, _ in told.values()}
        assert ask(host, 21000) == 20
    assert all(one["sessions"] >= 40 for one in pair.show("server")["workers"])
    assert stream.wait(30) == 0, stream.output
    assert json.loads(stream.output)["end"]["sum_received"]["bytes"] > 1 << 20
    assert "contradict" not in pair.server.output + pair.agent.output


def test_one_of_two_workers_stops(pair: PairLab) -> None:
    """The other one goes on, and yet its hosts must not wait for it."""
    pair.start_server()
    pair.carrier("server")
    both_pass(pair)
    with stopped_thread(pair.server.pid, "nat-worker-1"):
        pair.carrier("switch")
        assert pair.show("agent")["takeover"]["reason"] == "stalled worker"
        both_pass(pair)


def test_an_agent_without_its_servers_slices_is_refused_by_name(pair: PairLab) -> None:
    content = yaml.safe_load(Path(pair.server_config).read_text())
    content["workers"]["cores"] = content["workers"]["cores"][:1]
    content["nat"]["pool"]["slices"] = 1
    Path(pair.server_config).write_text(yaml.safe_dump(content))
    pair.start_server()
    until("it is told", lambda: "nat.pool.slices: " in pair.server.output + pair.agent.output)
    assert pair.show("agent")["carrier"] == "switch"
    until(
        "status says why", lambda: any("nat.pool.slices: " in line for line in pair.show("agent")["degraded"])
    )
