# SPDX-License-Identifier: Apache-2.0
"""The commands about this host: `doctor` and `drivers`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nat_control.cli_output import FAILED, WARNED, Json, complain, fail, print_json, table, user_errors
from nat_control.config import load, to_core
from nat_control.doctor import Need, diagnose, kernel_interface
from nat_control.findings import Finding, Severity
from nat_control.host_facts import gather
from nat_control.memory import packet_memory_mb
from nat_control.ovs_facts import Ovs, OvsUnseen, look_at
from nat_control.pci import PciDevice, pci_devices, pci_names

COLOURS = {
    Severity.GOOD: "green",
    Severity.NOTE: "blue",
    Severity.WARNING: "yellow",
    Severity.PROBLEM: "bold red",
}
ANY_MAC = bytes.fromhex("020000000001")
PATIENCE = 60  # seconds that a remedy may take


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(drivers)


# -- doctor ---------------------------------------------------------------------------------------------------


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", help="What this host shall run.", readable=False),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended, after asking.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --fix: do not ask.")] = False,
    ovs_db: Annotated[
        str | None,
        typer.Option(
            "--ovs-db", metavar="unix:PATH", help="Database of an Open vSwitch, as for ovs-vsctl --db."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this host: what spoils speed, a start or a failover, why, and the command that mends it.

    Exit codes: 0 nothing worse than a note, 4 warnings, 1 a problem.
    """
    if yes and not fix:
        raise typer.BadParameter("--yes goes with --fix")
    if fix and as_json and not yes:
        raise typer.BadParameter("--fix with --json asks nobody: add --yes")
    with user_errors():
        need = _need(config) if config else None
        found = _look(need, ovs_db)
        results: list[dict[str, Any]] = []
        if fix:
            if not as_json:
                _print_findings(found)
            results = _mend(found, need, ovs_db, ask=not yes, quiet=as_json)
            found = _look(need, ovs_db)
        if as_json:
            worst = max(found, key=_rank).severity.value
            answer = {"worst": worst, "findings": [finding.as_json() for finding in found]}
            print_json({**answer, "fixes": results} if fix else answer)
        elif not fix:
            _print_findings(found)
        _print_summary(found, as_json)
    worst_rank = max(map(_rank, found))
    if worst_rank >= _ranks[Severity.PROBLEM]:
        raise typer.Exit(FAILED)
    if worst_rank >= _ranks[Severity.WARNING]:
        raise typer.Exit(WARNED)


_ranks = {severity: i for i, severity in enumerate(Severity)}


def _rank(finding: Finding) -> int:
    return _ranks[finding.severity]


def _need(path: Path) -> Need:
    from nat_fastpath.cores import sliced
    from nat_fastpath.engine import memory_for

    config = load(path)
    whole = to_core(config, [port.mac or ANY_MAC for port in config.ports])
    page = 2 << 20  # a table of a page and more is in pages of its own, smaller ones are in ordinary memory
    tables = 0
    for one in sliced(whole, 1 if config.switch else config.slices):
        parts = memory_for(one)
        del parts["total"]
        tables += sum(-(-size // page) * page for size in parts.values() if size >= page)
    return Need(config, tables, 0 if config.switch else packet_memory_mb(config))


def _look(need: Need | None, ovs_db: str | None) -> list[Finding]:
    ovs: Ovs | None = None
    unseen = []
    try:
        ovs = look_at(ovs_db)
    except OvsUnseen as error:
        if ovs_db:
            raise fail(f"--ovs-db {ovs_db}: {error}") from None
        unseen.append(str(error))
    devices = [kernel_interface(port.device) for port in need.config.ports] if need else []
    return diagnose(gather(devices=devices, ovs=ovs, unseen=unseen), need)


def _mend(
    found: list[Finding], need: Need | None, ovs_db: str | None, *, ask: bool, quiet: bool
) -> list[dict[str, Any]]:
    """Runs remedies one by one, and looks again after each: only what is not found any more is mended."""
    results = []
    for finding in found:
        if finding.severity is Severity.GOOD or not finding.automatic or not finding.commands:
            continue
        if ask and not typer.confirm(f"\n{finding.what}\n  run: {' && '.join(finding.remedy)}"):
            results.append(
                {"check": finding.check, "subject": finding.subject, "what": finding.what, "result": "left"}
            )
            continue
        error = _run_all(finding)
        if error is None and any(map(finding.is_still, _look(need, ovs_db))):
            error = "the commands ran, and it is still so"
        result = "mended" if error is None else f"not mended: {error}"
        results.append(
            {"check": finding.check, "subject": finding.subject, "what": finding.what, "result": result}
        )
        if not quiet:
            print(f"{finding.check}: {result}")
    if not results and not quiet:
        print("there is nothing that --fix can do")
    return results


def _run_all(finding: Finding) -> str | None:
    for command, shown in zip(finding.commands, finding.remedy, strict=True):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            return f"{command[0]} is not installed"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{shown}: {error}"
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            return f"{shown}: {said or f'exit code {done.returncode}'}"
    return None


def _print_findings(found: list[Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for finding in found:
        label = f"{finding.severity.value:8}"
        if console.is_terminal:
            console.print(f"[{COLOURS[finding.severity]}]{label}[/]", end="")
        else:
            print(label, end="")
        print(finding.what)
        if finding.why:
            print(f"         why: {finding.why}")
        for command in finding.remedy:
            print(f"         run: {command}")
        if finding.advice:
            print(f"         {'note' if finding.commands else 'do'}: {finding.advice}")


def _print_summary(found: list[Finding], as_json: bool) -> None:
    if as_json:
        return
    counts = (
        (severity, sum(finding.severity is severity for finding in found)) for severity in reversed(Severity)
    )
    print(", ".join(f"{severity.value}: {n}" for severity, n in counts))


# -- drivers --------------------------------------------------------------------------------------------------


def drivers(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Drivers whose name has this in it.", show_default=False)
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Not only drivers of networks.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="List the PCI ids, with their names.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Folder of DPDK's drivers; else where DPDK looks.", readable=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """What the installed DPDK can drive, read from its drivers, and the NICs of this host."""
    try:
        from nat_fastpath.dpdk import pmdinfo
    except ImportError as error:
        raise fail(error) from None
    try:
        where = folder or pmdinfo.plugin_folder()
    except pmdinfo.PmdError as error:
        raise fail(error) from None
    known, problems = pmdinfo.installed_drivers(where)
    for line in problems:
        complain(line)
    if not known:
        raise fail(f"{where}: there are no drivers of DPDK in it")
    matched = [(nic, [d for d in known if d.drives(_id(nic, pmdinfo))]) for nic in pci_devices()]
    networks = ("net_", "mlx5_eth")
    shown = [
        d for d in known if name.lower() in d.name.lower() and (every or name or d.name.startswith(networks))
    ]
    if not shown:
        raise fail(f"no driver in {where} has {name!r} in its name; without NAME all are listed")
    wanted = {(i.vendor, i.device) for d in shown for i in d.pci_ids} | {
        (n.vendor, n.device) for n, _ in matched
    }
    names = pci_names(wanted)
    if as_json:
        print_json(
            {
                "folder": str(where),
                "drivers": [
                    {
                        "name": d.name,
                        "file": d.file,
                        "kernel_modules": list(d.kernel_modules),
                        "parameters": d.parameters,
                        "pci_ids": [
                            {
                                "id": _words(i.vendor, i.device),
                                "subsystem": _words(i.subvendor, i.subdevice),
                                "name": names.get((i.vendor, i.device)),
                            }
                            for i in d.pci_ids
                        ],
                    }
                    for d in shown
                ],
                "nics": [
                    {
                        "address": nic.address,
                        "id": _words(nic.vendor, nic.device),
                        "name": names.get((nic.vendor, nic.device)),
                        "kernel_driver": nic.driver,
                        "interfaces": list(nic.interfaces),
                        "drivers": [d.name for d in fitting],
                    }
                    for nic, fitting in matched
                ],
                "unreadable": problems,
            }
        )
        return
    rows = [
        (d.name, len(d.pci_ids) or None, " or ".join(d.kernel_modules) or None, d.parameters or None)
        for d in shown
    ]
    table(f"drivers in {where}", ("driver", "PCI ids", "kernel module", "parameters"), rows)
    if ids or (name and len(shown) == 1):
        lines = [
            (d.name, _words(i.vendor, i.device), names.get((i.vendor, i.device)))
            for d in shown
            for i in d.pci_ids
        ]
        if lines:
            table("PCI ids", ("driver", "id", "name"), sorted(set(lines), key=str))
    here = [
        (
            nic.address,
            _words(nic.vendor, nic.device),
            names.get((nic.vendor, nic.device)),
            list(nic.interfaces) or None,
            nic.driver,
            [d.name for d in fitting] or "none",
        )
        for nic, fitting in matched
    ]
    if here:
        table("NICs of this host", ("address", "id", "name", "interface", "bound to", "DPDK's driver"), here)
    else:
        print("this host has no NIC on a PCI bus", file=sys.stderr)


def _id(nic: PciDevice, pmdinfo: Any) -> Any:
    return pmdinfo.PciId(nic.vendor, nic.device, nic.subvendor, nic.subdevice)


def _words(vendor: int, device: int) -> str:
    return f"{vendor:04x}:{device:04x}"
