# SPDX-License-Identifier: Apache-2.0
"""The command `tandem-nat`. docs/cli.md is its reference."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from nat_control import api, cli_certs, cli_host, cli_live, cli_offload, cli_peer, cli_pktgen
from nat_control.cli_output import FAILED, INTERRUPTED, USAGE, Json
from nat_control.cli_output import cell as _cell
from nat_control.cli_output import complain as _complain
from nat_control.cli_output import fail as _fail
from nat_control.cli_output import print_json as _print_json
from nat_control.cli_output import table as _table
from nat_control.cli_output import user_errors as _user_errors
from nat_control.cli_output import words as _words
from nat_control.client import Client, SessionPages, find_socket
from nat_control.config import Config, ConfigError, load, to_core, warnings
from nat_control.sync import codec
from nat_control.tls import TlsError, context
from nat_fastpath.devargs import driver_of, no_driver

# typer brings a click of its own, or the installed one
UsageError: Any = typer.BadParameter.__base__
EXIT_CODES = (
    "Exit codes: 0 good, 1 failed, 2 usage or configuration, 3 no server is running or it cannot be reached, "
    "4 doctor: warnings, but no problem."
)
ANY_MAC = bytes.fromhex("020000000001")


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit from None  # who reads has seen enough, as `head` does; typer would end with 1


app = typer.Typer(
    cls=_Commands,
    help=f"Tandem NAT: a source NAT with a DPDK fast path.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
show = typer.Typer(help="What a running server knows.", no_args_is_help=True)
app.add_typer(show, name="show")

# readable=False: who opens a file says what is wrong with it, and ends with the code for that
ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="Configuration (YAML).", show_default=False, readable=False),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("-c", "--config", help="Configuration that names the server's socket.", readable=False),
]
SocketOption = Annotated[
    Path | None, typer.Option("--socket", help="The server's socket itself.", readable=False)
]


def _flush(stream: TextIO) -> OSError | None:
    """What could not be written is given up, or Python would try it again at its end, and complain."""
    try:
        stream.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        return error
    return None


@contextlib.contextmanager
def _log_may_be_lost() -> Iterator[None]:
    """For what goes on, and ends well, when nobody can read what it says."""
    try:
        yield
    except BrokenPipeError as error:  # not that of the log
        raise _fail(error) from None
    finally:
        _flush(sys.stdout)


# -- server and configuration -----------------------------------------------------------------------------


@app.command()
def server(
    config: ConfigFile,
    force: Annotated[
        bool, typer.Option("--force", help="Even take the device of the default route.")
    ] = False,
) -> None:
    """Run the NAT until SIGTERM or Ctrl-C; interfaces are put back as they were. SIGHUP reads CONFIG again."""
    if os.geteuid():
        raise _fail("a server needs root, for raw sockets and to change interfaces: try again with sudo")
    with _user_errors(), _log_may_be_lost():
        loaded = load(config)
        for line in warnings(loaded):
            _complain(f"{config}: warning: {line}")
        try:
            from nat_control.server import ServerError, serve  # needs DPDK, which the other commands do not
        except ImportError as error:
            raise _fail(error) from None
        try:
            serve(loaded, config, force=force)
        except ServerError as error:
            raise _fail(error) from None


@app.command()
def switch(config: ConfigFile) -> None:
    """Run the NAT on an OpenFlow switch, alone or as the server's twin, until SIGTERM or Ctrl-C; no DPDK."""
    with _user_errors(), _log_may_be_lost():
        loaded = load(config)
        for line in warnings(loaded):
            _complain(f"{config}: warning: {line}")
        from switch_agent.agent import AgentError, serve  # os-ken takes its time to be imported

        try:
            serve(loaded, config)
        except AgentError as error:
            raise _fail(error) from None


@app.command()
def check(config: ConfigFile, as_json: Json = False) -> None:
    """Check a configuration: every error at once, warnings, and the memory it takes."""
    from nat_fastpath.cores import memory_for
    from nat_fastpath.engine import CoreError

    try:
        loaded = load(config)
        whole = to_core(loaded, [port.mac or ANY_MAC for port in loaded.ports])
        memory = memory_for(whole, 1 if loaded.switch else loaded.slices)
    except ConfigError as error:
        if as_json:
            problems = [{"path": problem.path, "message": problem.message} for problem in error.errors]
            _print_json({"ok": False, "errors": problems})
        else:
            _complain(*str(error).splitlines())
        raise typer.Exit(USAGE) from None
    except CoreError as error:
        raise _fail(f"{config}: {error}") from None
    advice = (*warnings(loaded), *_about_this_machine(loaded))
    if as_json:
        _print_json({"ok": True, "instance": loaded.instance, "warnings": list(advice), "memory": memory})
        return
    for line in advice:
        print(f"{config}: warning: {line}")
    total, sessions = memory["total"], loaded.nat.max_sessions
    print(f"{config}: good; {sessions} sessions take {total / 2**20:.0f} MiB, {total // sessions} bytes each")


def _about_this_machine(config: Config) -> Iterator[str]:
    """What is right in itself, and wrong here; a configuration may be checked elsewhere, so these are warnings."""
    if config.peer and config.peer.tls:
        try:
            context(config.peer.tls, listens=config.peer.listen is not None)
        except TlsError as error:
            yield f"peer.tls: {error}"
    cpus = os.cpu_count() or 1
    if not config.switch and (missing := [str(cpu) for cpu in config.workers.cores if cpu >= cpus]):
        yield f"workers.cores: there is no CPU {', '.join(missing)} here, only 0 to {cpus - 1}: no server can start"
    for port in config.ports:
        if (driver := driver_of(port.device)) and driver not in _dpdk_drivers(driver):
            yield f"ports.{port.name}.device: {no_driver(driver)}: no server can start"


def _dpdk_drivers(wanted: str) -> set[str]:
    """Names of DPDK's drivers; just the wanted one where they cannot be read, or DPDK is not built in."""
    try:
        from nat_fastpath.dpdk import pmdinfo
    except ImportError:
        return {wanted}
    try:
        known, _ = pmdinfo.installed_drivers(pmdinfo.plugin_folder())
    except pmdinfo.PmdError:
        return {wanted}
    # DPDK is content with the beginning of a name
    return {wanted if wanted.startswith(driver.name) else driver.name for driver in known}


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version, whether DPDK is built in, and the version of the sync protocol: both halves of a pair need the same."""
    try:
        import nat_fastpath.dpdk  # noqa: F401

        dpdk = True
    except ImportError:
        dpdk = False
    number = package_version("tandem-nat")
    if as_json:
        _print_json({"version": number, "dpdk": dpdk, "sync": codec.VERSION})
    else:
        with_dpdk = "with" if dpdk else "without"
        print(f"tandem-nat {number}, {with_dpdk} DPDK, version {codec.VERSION} of the sync protocol")


# -- show ---------------------------------------------------------------------------------------------------


def _one(what: str, config: Path | None, path: Path | None) -> dict[str, Any]:
    """The answer to a question that has a single one."""
    return Client(find_socket(config, path)).show(what)


def _role(role: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Of one of two servers."""
    if role is None:
        return []
    peer = f"the {'secondary' if role['configured'] == 'primary' else 'primary'} {role['peer']}"
    return [("role", f"{role['configured']}, {role['role']} (term {role['term']}): {role['why']}; {peer}")]


def _rate(bits: float) -> str:
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if bits < 1000:
            return f"{bits:.0f} {unit}"
        bits /= 1000
    return f"{bits:.2f} Gbit/s"


def _worker(worker: dict[str, Any], n: int) -> str:
    state = "STALLED" if worker["stalled"] else f"{worker['busy_share']:.1%} busy"
    found = f"CPU {worker['cpu']}, {worker['idle']}, {state}"
    if n > 1:
        found += (
            f", {worker['sessions']} sessions, handed off {worker['handed_off']}, "
            f"got {worker['handoff_received']}, dropped {worker['handoff_dropped']}"
        )
    return found


def _agent(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a switch agent's status."""
    takeover, counts, watch = status["takeover"], status["counts"], status["watch"]
    alive = f", {'heard' if watch.get('alive') else 'not heard'} now" if watch else ""
    return [
        *(("degraded", why) for why in status["degraded"]),
        ("process", f"{status['pid']}, up {status['uptime']:.0f} s"),
        ("switch", status["switch"]),
        ("carrier", status["carrier"]),
        ("peer", f"{status['peer']}{alive}"),
        (
            "sessions",
            f"{status['sessions']}, {status['offloaded']} with rules on the switch, "
            f"{status['offload']['in_front']} of them in front of the server",
        ),
        ("mappings", f"{status['mappings']} of {status['hosts']} hosts"),
        ("next hops", f"{status['neighbours']}, {status['held']} packets held"),
        ("counts", ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()) or "-"),
        ("refused rules", ", ".join(f"{n} {why}" for why, n in status["refused"].items()) or "none"),
        ("last takeover", ", ".join((takeover.get("reason", "none"), *_since(takeover)))),
    ]


def _since(takeover: dict[str, Any]) -> list[str]:
    """When each step of a takeover was done, from when the server's death was known."""
    times = ((step, takeover.get(step)) for step in ("written", "barrier", "proved"))
    known = takeover.get("detected")
    return [f"{step} after {(at - known) / 1e6:.2f} ms" for step, at in times if at and known]


def _offload(told: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Nothing without a peer, or where nobody offloads anything."""
    if told is None or not (told["policy"] or told["in_front"] or told["there"]):
        return []
    hand = f", {told['by_hand']} of them by hand" if told["by_hand"] else ""
    moved = f"{told['there']} moves there, {told['back']} back, {told['refused']} refused"
    return [
        ("offloaded", f"{told['in_front']} carried by the switch{hand}, room for {told['room']}; {moved}")
    ]


def _draining(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("draining", f"{one['address']}: {api.count(one['mappings'], 'mapping')} left")
        for one in answer["draining"]
    ]


@show.command("status")
def show_status(config: ConfigOption = None, socket: SocketOption = None, as_json: Json = False) -> None:
    """Uptime, sessions, rates, memory and the worker."""
    with _user_errors():
        status = _one("status", config, socket)
    if as_json:
        return _print_json(status)
    if "carrier" in status:
        return _table(
            f"switch agent {status['instance']}, version {status['version']}", ("", ""), _agent(status)
        )
    rates, workers = status["rates"], status["workers"]
    rows = [
        *(("degraded", why) for why in status["degraded"]),
        *_draining(status),
        ("process", f"{status['pid']}, up {status['uptime']:.0f} s, {status['dpdk']}"),
        *_role(status.get("role")),
        ("behaviour", f"{status['mapping']} mapping, {status['filtering']} filtering"),
        ("sessions", f"{status['sessions']} of {status['max_sessions']}"),
        *_offload(status["offload"]),
        ("mappings", f"{status['mappings']} of {status['hosts']} hosts"),
        ("new and ended", f"{rates['sessions_opened']:.0f} and {rates['sessions_closed']:.0f} per second"),
        ("next hops", f"{status['neighbours']}, {status['held']} packets held"),
        *(
            (f"worker {i}" if len(workers) > 1 else "worker", _worker(one, len(workers)))
            for i, one in enumerate(workers)
        ),
        (
            "memory",
            f"{status['memory']['total'] / 2**20:.0f} MiB of tables, "
            f"{status['buffers']['in_use']} of {status['buffers']['total']} buffers in use, "
            f"{'hugepages' if status['hugepages'] else 'ordinary pages'}",
        ),
    ]
    for i, name in enumerate(("internal", "external")):
        rows.append(
            (
                name,
                f"in {_rate(8 * rates[f'rx_bytes.{i}'])} ({rates[f'rx_packets.{i}']:.0f} packets/s), "
                f"out {_rate(8 * rates[f'tx_bytes.{i}'])} ({rates[f'tx_packets.{i}']:.0f} packets/s)",
            )
        )
    _table(f"instance {status['instance']}, version {status['version']}", ("", ""), rows)


SESSION_COLUMNS = {
    "protocol": 8,
    "internal": 21,
    "external": 21,
    "remote": 21,
    "state": 11,
    "age": 9,
    "idle": 9,
    "packets_out": 11,
    "packets_in": 10,
    "flags": 0,
}


@show.command("sessions")
def show_sessions(
    config: ConfigOption = None,
    socket: SocketOption = None,
    internal: Annotated[
        str | None, typer.Option(help="ADDRESS, ADDRESS:PORT, NETWORK/LENGTH or :PORT.")
    ] = None,
    external: Annotated[str | None, typer.Option(help="The same, of the pool.")] = None,
    remote: Annotated[str | None, typer.Option(help="The same, of the far end.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of any of the three.")] = None,
    protocol: Annotated[str | None, typer.Option(help="icmp, tcp or udp.")] = None,
    state: Annotated[str | None, typer.Option(help="TCP state, such as established.")] = None,
    older: Annotated[float | None, typer.Option(help="Opened at least so many seconds ago.")] = None,
    idle: Annotated[float | None, typer.Option(help="Without a packet for at least so many seconds.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows at most; 0: all.")] = 100,
    cursor: Annotated[int, typer.Option(min=0, help="Go on from where an earlier answer ended.")] = 0,
    as_json: Json = False,
) -> None:
    """Sessions, filtered and paged."""
    sides = {"internal": internal, "external": external, "remote": remote}
    wanted = {**sides, "port": port, "protocol": protocol, "state": state, "older": older, "idle": idle}
    filters: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    with _user_errors():
        pages = Client(find_socket(config, socket)).session_pages(limit=limit, cursor=cursor, **filters)
        (_sessions_as_json if as_json else _sessions_as_text)(pages)


def _sessions_as_json(pages: SessionPages) -> None:
    """One document, written as it comes: a million rows are never in memory."""
    before = '{"sessions": [\n'
    for page in pages:
        for row in api.rows_of(page):
            print(before + json.dumps(row), end="")
            before = ",\n"
    start = before if before != ",\n" else "\n"
    print(f'{start}], "cursor": {pages.cursor}}}')


def _sessions_as_text(pages: SessionPages) -> None:
    def line(cells: Iterable[object]) -> str:
        widths = SESSION_COLUMNS.values()
        return "  ".join(_cell(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    header = line(name.replace("_", " ") for name in SESSION_COLUMNS)
    print(f"\033[1m{header}\033[0m" if sys.stdout.isatty() else header)
    for page in pages:
        for row in api.rows_of(page):
            print(line(row[name] for name in SESSION_COLUMNS))
    more = f"; more with --cursor {pages.cursor}" if pages.cursor else ""
    print(f"{pages.rows} sessions{more}", file=sys.stderr)


@show.command("stats")
def show_stats(
    config: ConfigOption = None,
    socket: SocketOption = None,
    every: Annotated[bool, typer.Option("--all", help="Counters that are zero, too.")] = False,
    as_json: Json = False,
) -> None:
    """Packets by verdict, and all other counters."""
    from nat_fastpath.engine import VERDICT_HELP, VERDICT_NAMES

    with _user_errors():
        stats = _one("stats", config, socket)
    if as_json:
        return _print_json(stats)
    meaning = dict(zip(VERDICT_NAMES, VERDICT_HELP, strict=True))
    verdicts = [(name, n, meaning.get(name, "")) for name, n in stats["verdicts"].items() if n or every]
    _table("packets by verdict", ("verdict", "packets", "meaning"), verdicts)
    counters = {**stats["counters"], **{f"worker.{name}": n for name, n in stats["worker"].items()}}
    if len(workers := stats.get("workers", ())) > 1:
        counters |= {f"worker{i}.{name}": n for i, one in enumerate(workers) for name, n in one.items()}
    _table("counters", ("counter", "value"), [(name, n) for name, n in counters.items() if n or every])


@show.command("pool")
def show_pool(config: ConfigOption = None, socket: SocketOption = None, as_json: Json = False) -> None:
    """External addresses and ports: how many there are, and who uses them."""
    with _user_errors():
        pool = _one("pool", config, socket)
    if as_json:
        return _print_json(pool)
    ports = ", ".join(
        f"{first}-{last}" if first < last else str(first) for first, last in pool["port_ranges"]
    )
    rows = [
        ("addresses", f"{pool['addresses']}: {', '.join(pool['ranges'])}"),
        ("ports", f"{ports}, {pool['capacity']} endpoints of each protocol"),
        *_draining(pool),
        ("mappings", f"{pool['used']}, {pool['unpaired']} ever on another address than their host's"),
        (
            "resting",
            f"{pool['resting']} freed ports rest, {pool['rests_cut']} rested for less than their time",
        ),
        (
            "refused",
            f"{pool['refused']} packets for want of a port, {pool['refused_while_resting']} of them while ports rested",
        ),
        (
            "missed",
            f"{pool['parity_missed']} times the parity, {pool['class_missed']} the class of the inside port",
        ),
    ]
    _table("pool", ("", ""), rows)
    used = [(use["address"], use["hosts"], use["mappings"]) for use in pool["in_use"]]
    _table(f"addresses in use: {pool['in_use_total']}", ("address", "hosts at home here", "mappings"), used)


@show.command("ports")
def show_ports(config: ConfigOption = None, socket: SocketOption = None, as_json: Json = False) -> None:
    """Devices, links, what was changed on them, and next hops."""
    with _user_errors():
        ports = _one("ports", config, socket)
    if as_json:
        return _print_json(ports)
    for name, port in ports.items():
        link, rates = port["link"], port["rates"]
        speed = f", {link['speed_mbps']} Mbit/s" if link["speed_mbps"] else ""
        state = f"up{speed}" if link["up"] else f"down: {port['link_why_down']}"
        rows = [
            ("device", f"{port['device']} by {port['driver']}, link {state}"),
            (
                "address",
                f"{port['address']}, MAC {port['mac']}, MTU {port['mtu']}, gateway {port['gateway'] or '-'}",
            ),
            *((("VLAN", port["vlan"]),) if port["vlan"] else ()),
            *((("not by AF_XDP", port["not_af_xdp"]),) if port["not_af_xdp"] else ()),
            *((("spread", f"over the workers by {port['spread']}"),) if port.get("spread") else ()),
            *(("changed", change) for change in port["changes"]),
            ("in", f"{_rate(8 * rates['rx_bytes'])}, {rates['rx_packets']:.0f} packets/s"),
            ("out", f"{_rate(8 * rates['tx_bytes'])}, {rates['tx_packets']:.0f} packets/s"),
            *((counter, n) for counter, n in port["stats"].items()),
        ]
        _table(name, ("", ""), rows)
        hops = [(hop["address"], hop["mac"], hop["state"], hop["sessions"]) for hop in port["neighbours"]]
        _table(f"{name}: next hops", ("address", "MAC", "state", "sessions"), hops)


# -- captures and demo --------------------------------------------------------------------------------------


@app.command()
def translate(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN.pcap", show_default=False, help="Capture to read.", readable=False),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT.pcap", show_default=False, help="What the NAT sends.", readable=False),
    ],
    config: Annotated[
        Path,
        typer.Option("-c", "--config", help="Configuration (YAML).", show_default=False, readable=False),
    ],
    as_json: Json = False,
) -> None:
    """Send a capture through the NAT's core, and count the packets by verdict."""
    from nat_control.translate import CaptureError
    from nat_control.translate import translate as run

    with _user_errors():
        loaded: Config = load(config)
        try:
            summary = run(source, target, loaded)
        except (CaptureError, OSError) as error:
            raise _fail(error) from None
    if summary["cut"]:
        _complain(summary["cut"])
    if as_json:
        return _print_json(summary)
    _table(f"{source}: packets by verdict", ("verdict", "packets"), list(summary["verdicts"].items()))
    names = ("packets", "truncated", "written", "sessions", "seconds")
    facts = [(name, summary[name]) for name in names]
    facts.insert(1, ("cut off at the end", int(bool(summary["cut"]))))
    _table(f"written to {target}", ("", ""), facts)


@app.command()
def demo(
    report: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the checks there.", readable=False)
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running; --stop ends it.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End what --keep left.")] = False,
) -> None:
    """Show it: clients, the pair and an outside in namespaces, real traffic, and a failover (root)."""
    from nat_control.demo import run
    from nat_control.lab import LabError, end_kept
    from switch_agent.demo import PairDemo

    with _user_errors():
        try:
            if stop:
                removed = end_kept()
                print(f"ended, and removed {', '.join(removed)}" if removed else "there is no kept demo")
                return
            if not run(report, keep=keep, make=PairDemo):
                raise typer.Exit(FAILED)
        except (LabError, OSError) as error:
            raise _fail(error) from None


cli_host.register(app)
cli_live.register(app)
cli_certs.register(app)
cli_pktgen.register(app)
cli_peer.register(app, show)
cli_offload.register(app)


def main() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    code = _main()
    error = _flush(sys.stdout)
    if error and not isinstance(error, BrokenPipeError):
        _complain(f"standard output: {error.strerror}")
        code = code or FAILED
    _flush(sys.stderr)
    sys.exit(code)


def _main() -> int:
    try:
        return app(standalone_mode=False) or 0
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return USAGE
        where = error.ctx.command_path if error.ctx else "tandem-nat"
        what = " ".join(error.format_message().split()).rstrip(".")
        _complain(f"{what or 'a command is missing'}; see `{where} --help`")
        return USAGE
    except typer.Abort:
        return INTERRUPTED
    except OSError as error:
        _complain(_words(error) if error.filename else f"standard output: {error.strerror}")
        return FAILED


if __name__ == "__main__":
    main()
