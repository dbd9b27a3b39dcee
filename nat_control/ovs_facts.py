# SPDX-License-Identifier: Apache-2.0
"""What an Open vSwitch is set to, asked of its database and its daemon."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUN = Path("/var/run/openvswitch")
TIMEOUT = 5  # seconds, for each tool
LIMIT = re.compile(r"\(limit (\d+)\)")  # in what upcall/show says
DEFAULT_RINGS = 2048


class OvsUnseen(Exception):
    """There is no Open vSwitch, or it cannot be asked; one line."""


@dataclass(frozen=True, slots=True)
class Controller:
    uuid: str
    target: str
    max_backoff: int | None = None  # milliseconds; None: not set
    inactivity_probe: int | None = None


@dataclass(frozen=True, slots=True)
class Bridge:
    name: str
    datapath_id: str = ""  # 16 hexadecimal digits
    datapath_type: str = ""
    fail_mode: str | None = None
    protocols: tuple[str, ...] = ()
    controllers: tuple[Controller, ...] = ()


@dataclass(frozen=True, slots=True)
class PollPort:
    """A port that Open vSwitch polls by DPDK, and the descriptors of its receive rings."""

    name: str
    rings: int


@dataclass(frozen=True, slots=True)
class Ovs:
    """``database`` is what ovs-vsctl calls ``--db``, None for its default. ``control`` is the daemon's socket."""

    database: str | None
    bridges: tuple[Bridge, ...] = ()
    other_config: Mapping[str, str] = field(default_factory=dict)
    control: str | None = None
    receive_buffers: tuple[int, ...] = ()  # bytes, of the packet sockets of its ports
    limits: tuple[int, ...] = ()  # of flows, in force now, of each datapath
    poll_ports: tuple[PollPort, ...] = ()


def look_at(database: str | None = None) -> Ovs:
    """Asks the switch of ``database`` (``unix:/PATH``), or the installed one. Raises OvsUnseen."""
    if database is None and not (RUN / "db.sock").exists():
        raise OvsUnseen(
            f"no Open vSwitch runs here (there is no {RUN}/db.sock); --ovs-db names one elsewhere"
        )
    controllers = {
        row["_uuid"]: Controller(
            row["_uuid"], row["target"], *map(_number, (row["max_backoff"], row["inactivity_probe"]))
        )
        for row in _table(database, "Controller", "target", "max_backoff", "inactivity_probe")
    }
    columns = ("name", "datapath_id", "datapath_type", "fail_mode", "protocols", "controller")
    bridges = tuple(
        Bridge(
            row["name"],
            str(_one(row["datapath_id"]) or ""),
            row["datapath_type"],
            _one(row["fail_mode"]),
            tuple(_many(row["protocols"])),
            tuple(controllers[uuid] for uuid in _many(row["controller"]) if uuid in controllers),
        )
        for row in _table(database, "Bridge", *columns)
    )
    [settings] = _table(database, "Open_vSwitch", "other_config") or [{"other_config": {}}]
    folder = Path(database[5:]).parent if database and database.startswith("unix:") else RUN
    control = _control(folder)
    return Ovs(
        database,
        bridges,
        settings["other_config"],
        control,
        _receive_buffers(folder),
        _limits(control),
        tuple(_poll_ports(database)),
    )


def _poll_ports(database: str | None) -> Iterator[PollPort]:
    for row in _table(database, "Interface", "name", "type", "options"):
        rings = str(row["options"].get("n_rxq_desc", DEFAULT_RINGS))
        if row["type"] == "dpdk" and rings.isdigit():
            yield PollPort(row["name"], int(rings))


def _limits(control: str | None) -> tuple[int, ...]:
    if control is None:
        return ()
    try:
        text = _run("ovs-appctl", "-t", control, f"--timeout={TIMEOUT}", "upcall/show")
    except OvsUnseen:
        return ()
    return tuple(map(int, LIMIT.findall(text)))


def _table(database: str | None, table: str, *columns: str) -> list[dict[str, Any]]:
    where = [f"--db={database}"] if database else []
    wanted = ",".join(("_uuid", *columns))
    text = _run(
        "ovs-vsctl", *where, f"--timeout={TIMEOUT}", "--format=json", f"--columns={wanted}", "list", table
    )
    try:
        answer = json.loads(text)
        names = answer["headings"]
        return [dict(zip(names, map(_plain, row), strict=True)) for row in answer["data"]]
    except (ValueError, LookupError, TypeError) as error:
        raise OvsUnseen(f"ovs-vsctl list {table} says what is not understood ({error})") from None


def _plain(value: Any) -> Any:
    """OVSDB's notation (RFC 7047, 5.1) as Python's values."""
    match value:
        case ["uuid", str(text)]:
            return text
        case ["set", list(items)]:
            return [_plain(item) for item in items]
        case ["map", list(pairs)]:
            return {str(key): str(item) for key, item in pairs}
    return value


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _one(value: Any) -> Any:
    return next(iter(_many(value)), None)


def _number(value: Any) -> int | None:
    found = _one(value)
    return None if found is None else int(found)


def _control(folder: Path) -> str | None:
    """The daemon's control socket, if it answers us."""
    for path in sorted(folder.glob("ovs-vswitchd*.ctl")):
        try:
            _run("ovs-appctl", "-t", str(path), f"--timeout={TIMEOUT}", "version")
        except OvsUnseen:
            continue
        return str(path)
    return None


def _receive_buffers(folder: Path) -> tuple[int, ...]:
    """Of the daemon whose pid file is in ``folder``; only sockets of this network namespace are seen."""
    try:
        pid = int((folder / "ovs-vswitchd.pid").read_text())
        lines = _run("ss", "--packet", "--memory", "--processes", "--no-header", "--oneline")
    except (OSError, ValueError, OvsUnseen):
        return ()
    return tuple(
        int(size[1])
        for line in lines.splitlines()
        if f"pid={pid}," in line and (size := re.search(r"skmem:\([^)]*?\brb(\d+)", line))
    )


def _run(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False)
    except FileNotFoundError:
        raise OvsUnseen(f"{argv[0]} is not installed (apt install openvswitch-switch)") from None
    except subprocess.TimeoutExpired:
        raise OvsUnseen(f"{argv[0]} does not answer") from None
    if done.returncode:
        raise OvsUnseen(f"{argv[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
