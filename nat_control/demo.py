# SPDX-License-Identifier: Apache-2.0
"""What `tandem-nat demo` is made of: networks in namespaces, real programs and traffic, checks, the picture.

The pair and its failover come from switch_agent.demo; here the NAT stands alone between the two networks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nat_control import api
from nat_control.lab import Lab, LabError, Namespace, Process, leftovers
from nat_control.translate import CaptureError, read_pcap

INSIDE = IPv4Network("10.0.0.0/24")
CLIENT, NAT_INSIDE = "10.0.0.10", "10.0.0.1"
NAT_OUTSIDE, ROUTER = "198.51.100.1", "198.51.100.254"
POOL = ("198.51.100.10", "198.51.100.13")
SERVER, SECOND_SERVER = "203.0.113.1", "203.0.113.2"
NAME = "www.tandem.example"
FILE_MIB = 64
DRAWN, CHECKS = (
    11,
    17,
)  # lines of the picture besides flows and checks; checks that there are while it is seen
TOOLS = {  # and the Debian packages that have them
    "ip": "iproute2",
    "ethtool": "ethtool",
    "ping": "iputils-ping",
    "traceroute": "traceroute",
    "curl": "curl",
    "nginx": "nginx-light",
    "dnsmasq": "dnsmasq-base",
    "dig": "bind9-dnsutils",
    "iperf3": "iperf3",
    "tcpdump": "tcpdump",
    "ovs-vswitchd": "openvswitch-switch",
}
NGINX = """\
daemon off; master_process off; user root; pid {directory}/nginx.pid; error_log stderr;
events {{}}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/nginx-body; proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi; uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    server {{ listen {server}:80; root {directory}/www; }}
}}
"""


def server_command(config: Path, *options: str) -> list[str]:
    """What starts the real server, by the Python that runs us."""
    return [sys.executable, "-m", "nat_control.cli", "server", str(config), *options]


def missing_tools() -> list[str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [tool for tool in TOOLS if not shutil.which(tool, path=path)]


@dataclass
class Check:
    """Something to be proven; ``ok`` is None until it was tried."""

    name: str
    ok: bool | None = None
    detail: str = ""


@dataclass
class View:
    """What the picture shows of the running NAT; ``carrier`` is "server" or "switch"."""

    carrier: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    flows: list[dict[str, Any]] = field(default_factory=list)


class Demo:
    """The network, the programs in it, and the checks."""

    def __init__(self, lab: Lab, tell: Callable[[Check], None]) -> None:
        self.lab = lab
        self.tell = tell
        self.server: Process  # what start_nat has started
        self.checks: list[Check] = []
        self.view = View()
        self.figures: dict[str, Any] = {}  # of the failover, for the report
        self.socket = lab.directory / "nat.sock"

    # -- set-up ---------------------------------------------------------------------------------------------

    def build(self) -> None:
        lab = self.lab
        self.client, self.nat, self.outside = (lab.namespace(name) for name in ("client", "nat", "outside"))
        lab.cable(self.client, "eth0", self.nat, "nat-in")
        lab.cable(self.outside, "eth0", self.nat, "nat-out")
        self.client.address("eth0", f"{CLIENT}/24")
        self.client.route("default", NAT_INSIDE)
        self.outside.address("eth0", f"{ROUTER}/24")
        self.outside.address("lo", f"{SERVER}/32", f"{SECOND_SERVER}/32")
        self.offloads = [features(self.nat, device) for device in ("nat-in", "nat-out")]

    def start_nat(self) -> str:
        """Starts what translates, and says what it is."""
        raise NotImplementedError

    def start_services(self) -> str:
        directory = self.lab.directory
        (directory / "www").mkdir()
        digest = hashlib.sha256()
        with (directory / "www" / "file").open("wb") as file:
            for _ in range(FILE_MIB):
                part = os.urandom(1 << 20)
                digest.update(part)
                file.write(part)
        self.digest = digest.hexdigest()
        (directory / "nginx.conf").write_text(NGINX.format(directory=directory, server=SERVER))
        self.outside.start("nginx", "-e", "stderr", "-c", str(directory / "nginx.conf"))
        dnsmasq = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]
        dnsmasq += ["--user=root", "--pid-file=", "--bind-interfaces", f"--address=/{NAME}/{SERVER}"]
        dnsmasq += [f"--listen-address={SERVER}", f"--listen-address={SECOND_SERVER}"]
        self.outside.start(*dnsmasq, "--log-facility=-").ready("started")
        # bound, or its UDP answers would come from the router's address, and the NAT rightly drops those
        self.outside.start("iperf3", "-s", "-B", SERVER, "--forceflush").ready("listening")
        # Everything from the inside network, and pings to see that the capture works at all.
        self.capture = self.start_capture("outside.pcap", f"net {INSIDE} or icmp")
        return "nginx, dnsmasq, iperf3 and tcpdump outside"

    def start_capture(self, name: str, expression: str) -> Process:
        """A tcpdump outside; without --immediate-mode its last second would be missing."""
        options = ["--immediate-mode", "-i", "eth0", "-p", "-n", "-U", "-s", "96"]
        target = str(self.lab.directory / name)
        return self.outside.start("tcpdump", *options, "-w", target, expression).ready("listening on")

    # -- checks ---------------------------------------------------------------------------------------------

    def ping(self) -> str:
        return last_line(self.client.run("ping", "-n", "-q", "-c", "5", "-i", "0.2", SERVER), "rtt")

    def name_look_up(self) -> str:
        answer = self.client.run("dig", "+short", "+tries=3", "+time=2", f"@{SERVER}", NAME).strip()
        expect(answer == SERVER, f"dig says {answer!r}")
        return f"{NAME} is {answer}"

    def download(self) -> str:
        target = self.lab.directory / "downloaded"
        report = "%{time_total} %{speed_download}"
        url = ("--resolve", f"{NAME}:80:{SERVER}", f"http://{NAME}/file")
        said = self.client.run("curl", "-sS", "-f", "-o", str(target), "-w", report, *url, timeout=40)
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        expect(digest == self.digest, "the file that came is not the file that was sent (SHA-256 differs)")
        seconds, speed = map(float, said.split())
        return (
            f"{FILE_MIB} MiB in {seconds:.2f} s, {8 * speed / 1e9:.2f} Gbit/s, SHA-256 {digest[:16]}… as sent"
        )

    def traceroute(self) -> str:
        said = self.client.run("traceroute", "-n", "-q", "1", "-w", "2", "-m", "5", SERVER)
        hops = [line.split()[1] for line in said.splitlines()[1:] if line.split()]
        expect(hops == [NAT_INSIDE, SERVER], f"hops {', '.join(hops)}")
        return f"hops {', '.join(hops)}"

    def tcp(self) -> str:
        sums = self._iperf3("-t", "5")["end"]["sum_received"]
        expect(sums["bytes"] > 0, "nothing arrived")
        return f"{sums['bits_per_second'] / 1e9:.2f} Gbit/s for {sums['seconds']:.0f} s"

    def udp(self) -> str:
        sums = self._iperf3("-u", "-b", "20M", "-t", "3")["end"]["sum"]
        expect(sums["packets"] > 0 and sums["lost_percent"] < 1, f"{sums['lost_percent']:.2f} % lost")
        return f"{sums['packets']} datagrams at 20 Mbit/s, {sums['lost_percent']:.2f} % lost"

    def _iperf3(self, *options: str) -> dict[str, Any]:
        done = self.client.attempt("iperf3", "-c", SERVER, "-J", *options, timeout=30)
        report: dict[str, Any] = json.loads(done.stdout or "{}")
        expect(not done.returncode, f"iperf3: {report.get('error', done.stderr.strip())}")
        expect(bool(report.get("end")), f"iperf3 tells no result: {done.stdout}")
        return report

    def mapping(self) -> str:
        """RFC 4787 REQ-1: one internal endpoint, one external one, whatever the remote."""
        for server in (SERVER, SECOND_SERVER):
            self.client.run(
                "dig", "+short", "+tries=3", "+time=2", "-b", f"{CLIENT}#5353", f"@{server}", NAME
            )
        rows = self._sessions({"internal": f"{CLIENT}:5353", "protocol": "udp"})
        external = {row["external"] for row in rows}
        expect(
            len(rows) == 2 and len(external) == 1, f"{len(rows)} sessions at {', '.join(sorted(external))}"
        )
        return f"{CLIENT}:5353 is {external.pop()} to both servers"

    def pool_only(self) -> str:
        rows = self._sessions({})
        outside_pool = [row["external"] for row in rows if not in_pool(row["external"].split(":")[0])]
        expect(bool(rows) and not outside_pool, f"sessions at {', '.join(outside_pool)}")
        clients = {line.split()[0] for line in (self.lab.directory / "access.log").read_text().splitlines()}
        expect(bool(clients) and all(map(in_pool, clients)), f"nginx saw {', '.join(clients)}")
        return f"{len(rows)} sessions, all at the pool's addresses; nginx saw {', '.join(clients)}"

    def nothing_untranslated(self) -> str:
        ended = self.capture.stop() == 0 and "\n0 packets dropped by kernel" in self.capture.output
        expect(ended, f"tcpdump: {self.capture.last_line}")
        from_inside = pings = 0
        for packet in read_pcap(self.lab.directory / "outside.pcap"):
            ip = packet.frame[12:14] == b"\x08\x00"
            source, target = (IPv4Address(packet.frame[at : at + 4]) for at in ((26, 30) if ip else (28, 38)))
            from_inside += source in INSIDE or target in INSIDE
            pings += ip and in_pool(str(source))
        expect(not from_inside, f"{from_inside} packets with addresses of {INSIDE}")
        expect(pings > 0, "the capture saw not even the pings")
        return f"tcpdump outside: 0 packets with addresses of {INSIDE}, {pings} pings from the pool"

    def clean_end(self) -> str:
        expect(self.server.stop() == 0, f"exit code {self.server.popen.returncode}: {self.server.last_line}")
        expect(not self.socket.exists(), "the socket is still there")
        after = [features(self.nat, device) for device in ("nat-in", "nat-out")]
        expect(after == self.offloads, "the interfaces' offloads are not as they were")
        return "SIGTERM, exit code 0, interfaces as they were"

    def _sessions(self, wanted: dict[str, str], at: Path | None = None) -> list[dict[str, Any]]:
        answers = api.ask(at or self.socket, {"show": "sessions", "filter": wanted, "limit": 1000})
        return [row for answer in answers for row in answer.get("rows", ())]

    # -- the way through ------------------------------------------------------------------------------------

    def run(self) -> None:
        self.build()
        started = [("the NAT starts", self.start_nat), ("the outside starts", self.start_services)]
        if all(self.check(name, prove) for name, prove in started):
            with self._watching():
                self.check("ping", self.ping)
                self.check("traceroute shows the NAT", self.traceroute)
                self.check("DNS", self.name_look_up)
                self.check("endpoint-independent mapping", self.mapping)
                self.check("HTTP download", self.download)
                self.check("iperf3 TCP", self.tcp)
                self.check("iperf3 UDP", self.udp)
                self.act()
                self.check("only the pool's addresses are used", self.pool_only)
                self.check("nothing leaves untranslated", self.nothing_untranslated)
            if not self.lab.kept:
                self.check("clean end", self.clean_end)

    def act(self) -> None:
        """What the pair has to show besides."""

    def table(self) -> list[str]:
        """What it found, for the end."""
        return []

    def check(self, name: str, prove: Callable[[], str]) -> bool:
        check = Check(name)
        self.checks.append(check)
        try:
            check.detail, check.ok = prove(), True
        except (LabError, CaptureError, api.ApiError, api.NotRunning, OSError, ValueError, KeyError) as error:
            check.detail, check.ok = " ".join(str(error).split()), False
        self.tell(check)
        return check.ok

    def look(self) -> None:
        self.view.status = next(api.ask(self.socket, {"show": "status"}))["status"]
        self.view.flows = self._sessions({})

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Asks the NAT twice a second what the picture shows."""
        end = threading.Event()

        def watch() -> None:
            while not end.wait(0.5):
                with contextlib.suppress(api.ApiError, api.NotRunning):
                    self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


def expect(held: bool, otherwise: str) -> None:
    if not held:
        raise LabError(otherwise)


def in_pool(address: str) -> bool:
    first, last = map(IPv4Address, POOL)
    return first <= IPv4Address(address) <= last


def features(namespace: Namespace, device: str) -> str:
    return namespace.run("ethtool", "-k", device)


def last_line(text: str, start: str) -> str:
    return next((line for line in text.splitlines() if line.startswith(start)), "")


# -- what is seen -----------------------------------------------------------------------------------------


def _gbits(rates: dict[str, float], name: str) -> str:
    return f"{8 * rates.get(name, 0.0) / 1e6:8.1f} Mbit/s"


def _carrier(carrier: str) -> list[str | tuple[str, str]]:
    if not carrier:
        return ["\n"]
    said = ("the server NAT", "bold green") if carrier == "server" else ("the SWITCH alone", "bold magenta")
    return ["  through Open vSwitch; carried by ", said, "\n"]


def picture(demo: Demo, height: int) -> Group:
    """What fits ``height`` lines of 80 columns: the latest flows, each end with its port, and the latest checks."""
    room = height - DRAWN
    n_flows = min(10, max(4, room - CHECKS))
    n_checks = max(1, room - n_flows)
    status = demo.view.status
    rates = status.get("rates", {})
    drawing = Text.assemble(
        ("  client network        ", "bold cyan"),
        ("Tandem NAT               ", "bold green"),
        ("outside\n", "bold yellow"),
        f"  {INSIDE}  ◀──▶  {NAT_INSIDE} ▏▕ {NAT_OUTSIDE}  ◀──▶  {SERVER}\n",
        *_carrier(demo.view.carrier),
        f"  {status.get('offloaded', 0)} sessions have rules in the switch, which alone knows their packets\n"
        if demo.view.carrier == "switch"
        else f"  from inside {_gbits(rates, 'rx_bytes.0')}   from outside {_gbits(rates, 'rx_bytes.1')}\n",
        f"  {status.get('sessions', 0)} sessions, {status.get('mappings', 0)} mappings, "
        f"worker {status.get('worker', {}).get('busy_share', 0):.0%} busy",
    )
    flows = Table(box=None, header_style="dim", padding=(0, 1))
    for title in ("", "inside", "is outside", "talks to", "packets"):
        flows.add_column(title, justify="right" if title == "packets" else "left", no_wrap=True)
    for row in sorted(demo.view.flows, key=lambda row: row["idle"])[:n_flows]:
        packets = str(row["packets_out"] + row["packets_in"])
        flows.add_row(row["protocol"], row["internal"], row["external"], row["remote"], packets)
    return Group(
        Panel(drawing, title="topology and rates", title_align="left"),
        Panel(flows, title="translations", title_align="left", height=n_flows + 3),
        summary(demo.checks[-n_checks:], wrap=False),
    )


def summary(checks: list[Check], *, wrap: bool = True) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    marks = {None: Text("…", "yellow"), True: Text("✔", "green"), False: Text("✘", "bold red")}
    for check in checks:
        detail = Text(check.detail, "dim", no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")
        table.add_row(marks[check.ok], Text(check.name, no_wrap=True), detail)
    return table


def line_of(check: Check) -> str:
    return f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}"


KEPT = """
It is still running. Look inside, in another terminal too:
  tandem-nat show sessions --socket {socket}
  ip netns exec {client} curl -sO http://{server}/file
  ip netns exec {client} ping {server}
  ip netns exec {outside} tcpdump -n -i eth0
The NAT's own words: {log}
End it with: tandem-nat demo --stop"""


def run(report: Path | None, *, keep: bool = False, make: type[Demo] = Demo) -> bool:
    """Runs the demo that ``make`` is; returns whether everything held. ``report`` gets the checks as JSON.

    Raises LabError where it cannot even begin: no root, or a program is missing; OSError where ``report`` cannot be
    written.
    """
    if report is not None:
        _can_be_written(report)
    if missing := missing_tools():
        packages = " ".join(TOOLS[tool] for tool in missing)
        raise LabError(f"{', '.join(missing)} not installed: apt install {packages}")
    console = Console(highlight=False)
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def tell(check: Check) -> None:
        if not live:
            _say(line_of(check))

    with Lab(kept=keep) as lab:
        demo = make(lab, tell)
        if live:
            with live:
                live.get_renderable = lambda: picture(demo, console.height)  # type: ignore[method-assign]
                demo.run()
        else:
            demo.run()
        good = all(check.ok for check in demo.checks)
        lab.kept = keep and good  # a broken one is not worth keeping
    if lab.kept:
        names = {"client": demo.client.full_name, "outside": demo.outside.full_name}
        _say(KEPT.format(socket=demo.socket, server=SERVER, log=demo.server.log, **names))
    else:
        demo.check("nothing is left over", lambda: _nothing_left(demo))
    return _conclude(demo, console, report)


def _say(line: str) -> None:
    """The demo goes on to its end, and cleans up, when nobody reads: its exit code tells what held."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _can_be_written(path: Path) -> None:
    """Now, and not after the whole demo. Raises OSError."""
    new = not path.exists()
    with path.open("a"):
        pass
    if new:
        path.unlink()


def _nothing_left(demo: Demo) -> str:
    left = leftovers(os.getpid())
    left += [f"process {process.pid}" for process in demo.lab.processes if process.alive]
    expect(not left, f"still there: {', '.join(left)}")
    return "namespaces, processes and files are gone"


def _conclude(demo: Demo, console: Console, report: Path | None) -> bool:
    good = all(check.ok for check in demo.checks)
    if console.is_terminal:
        console.print(summary(demo.checks))
    for line in demo.table():
        _say(line)
    proven = sum(bool(check.ok) for check in demo.checks)
    _say(f"{proven} of {len(demo.checks)} checks held" + ("" if good else ": the demo FAILED"))
    if report:
        checks = [{"name": check.name, "ok": bool(check.ok), "detail": check.detail} for check in demo.checks]
        report.write_text(json.dumps({"checks": checks, "failover": demo.figures}, indent=2) + "\n")
    return good
