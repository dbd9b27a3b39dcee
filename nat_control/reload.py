# SPDX-License-Identifier: Apache-2.0
"""A changed configuration for an instance that runs: what is different, whether it can be taken, and taking it.

``compare`` is a pure function of two configurations. ``Reload`` reads the file again and puts it in force in all cores,
whole or not at all. Addresses that leave the pool while they have mappings are kept without ports to hand out
("draining"), where the operator asks for that, until nobody uses them any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nat_control import config as configuration
from nat_control.api import ApiError, Conversation, count
from nat_control.config import FILTERINGS, MAPPINGS, Config, ConfigError, Neighbour, Problem, Route
from nat_control.core_plane import CorePlane
from nat_control.dataplane import NO_RECORDS, Changes
from nat_control.pair import Pair
from nat_fastpath.core_config import CoreConfig, PoolRange
from nat_fastpath.engine import FLAG_FOREIGN, Change, Core, CoreError

P = ParamSpec("P")
T = TypeVar("T")

SHOWN = 16  # addresses that are named one by one
ALL_PORTS = 1, 65535
NOTHING_TO_HAND_OUT = 1, 0  # the own ports of an address that is draining


# -- what is different ------------------------------------------------------------------------------------------

RESTART = "needs a restart"
RESTART_OF_AGENT = "needs a restart of the agent, which keeps its sessions"
POOL = ("addresses", "ports", "port_preservation", "parity", "quarantine", "quarantine_ports")
APPLICABLE = ("nat.timeouts.", "nat.limits.", "offload", *(f"nat.pool.{key}" for key in POOL))
AT_PORT = ("gateway", "gateway_mac", "routes", "neighbours")
RULES = ("gateway", "routes")  # an agent has written rules for them, and for the pool's addresses
NAMES = {"ranges": "addresses", "port_ranges": "ports"}  # of fields of the pool whose key has another name
PORT_KEY = re.compile(r"ports\.(?:internal|external)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A line for each key that is different, with its path; those in ``refused`` need a restart."""

    applicable: tuple[str, ...]
    refused: tuple[str, ...]


def _text(value: object) -> str:
    match value:
        case None | ():
            return "none"
        case bool():
            return "true" if value else "false"
        case bytes():
            return value.hex(":") if len(value) == 6 else "another"  # which is a secret
        case Route():
            mac = f" ({_text(value.gateway_mac)})" if value.gateway_mac else ""
            return f"{value.gateway}{mac}"
        case (str() as host, int() as port):
            return f"{host}:{port}"
        case ((first, last),) | (first, last) if first == last:
            return str(first)
        case (IPv4Address() | int() as first, IPv4Address() | int() as last):
            return f"{first}-{last}"
        case tuple():
            return ", ".join(map(_text, value))
    return str(value)


def _entry(path: str, one: Route | Neighbour) -> tuple[str, object]:
    if isinstance(one, Route):
        return f"{path}[{one.prefix}]", one
    return f"{path}[{one.address}]", one.mac


def _flat(value: object, path: str) -> dict[str, object]:
    """Every key and its value; an entry of routes or neighbours stands under what it is for."""
    if path == "ports":
        assert isinstance(value, tuple)
        return {key: one for port in value for key, one in _flat(port, f"ports.{port.name}").items()}
    if is_dataclass(value):
        found: dict[str, object] = {}
        for field in fields(value):
            name = NAMES.get(field.name, field.name) if path == "nat.pool" else field.name
            found |= _flat(getattr(value, field.name), f"{path}.{name}" if path else name)
        return found
    if path.endswith((".routes", ".neighbours")):
        assert isinstance(value, tuple)
        return dict(_entry(path, one) for one in value)
    return {path: value}


def _why_not(path: str, old: Config, new: Config, mtus: Sequence[int]) -> str:
    """Why a key cannot be changed while the instance runs; "": it can."""
    found = PORT_KEY.match(path)
    key = found[1] if found else ""
    if new.switch and (path == "nat.pool.addresses" or key in RULES):
        return RESTART_OF_AGENT
    if path == "nat.filtering":  # permissions are kept for one of them only
        free = old.nat.mapping == MAPPINGS[0] and FILTERINGS[1] not in (old.nat.filtering, new.nat.filtering)
        return "" if free else RESTART
    if key == "mtu" and mtus:
        at = path.startswith("ports.external")
        more = new.ports[at].mtu > mtus[at]
        return f"{RESTART}: its device was started for {mtus[at]}" if more else ""
    return "" if path.startswith(APPLICABLE) or key in (*AT_PORT, "mtu") else RESTART


def compare(old: Config, new: Config, mtus: Sequence[int] = ()) -> Comparison:
    """``mtus``: what the devices of the ports were started for; (): there are none."""
    before, after = _flat(old, ""), _flat(new, "")
    applicable, refused = [], []
    for path in {**before, **after}:
        if before.get(path) == after.get(path):
            continue
        line = f"{path}: {_text(before.get(path))} -> {_text(after.get(path))}"
        if why := _why_not(path, old, new, mtus):
            refused.append(f"{line}: {why}")
        else:
            applicable.append(line)
    return Comparison(tuple(applicable), tuple(refused))


# -- addresses --------------------------------------------------------------------------------------------------


def _addresses(pool: Iterable[tuple[Any, Any]]) -> set[int]:
    return {number for first, last in pool for number in range(int(first), int(last) + 1)}


def _ranges(addresses: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in sorted(addresses):
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def with_draining(core: CoreConfig, draining: set[int]) -> CoreConfig:
    """``core`` with these addresses too, of which nothing is handed out."""
    pool = [
        *core.pool,
        *(PoolRange(first, last, ALL_PORTS, NOTHING_TO_HAND_OUT) for first, last in _ranges(draining)),
    ]
    return replace(core, pool=tuple(sorted(pool, key=lambda part: int(part.first))))


# -- taking it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """``drain``: addresses with mappings leave the pool when these have ended. ``force``: they are ended.
    ``check``: only say what would happen."""

    drain: bool = False
    force: bool = False
    check: bool = False


def _options(body: object) -> Options:
    if not isinstance(body, dict):
        raise ApiError("reload: not an object")
    names = [field.name for field in fields(Options)]
    if unknown := sorted(set(body) - set(names)):
        raise ApiError(f"reload: unknown key {unknown[0]!r}; there are {', '.join(names)}")
    if wrong := [name for name, value in body.items() if not isinstance(value, bool)]:
        raise ApiError(f"reload: {wrong[0]} is true or false")
    if body.get("drain") and body.get("force"):
        raise ApiError("reload: drain and force exclude each other")
    return Options(**body)


class Reload:
    """The configuration in force, and its file.

    ``to_core`` makes the cores' configurations, ``refuses`` says what else stands against a new one, ``taken`` is told of
    it. ``threads``: cores belong to workers, which may have to be waited for.
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        cores: Sequence[Core],
        to_core: Callable[[Config], Sequence[CoreConfig]],
        *,
        taken: Callable[[Config], None],
        say: Callable[[str], None],
        refuses: Callable[[Config], Sequence[str]] = lambda _: (),
        pair: Pair | None = None,
        mtus: Sequence[int] = (),
        threads: bool = True,
    ) -> None:
        self.config = config
        self.path = path.absolute()
        self._cores = cores
        self._to_core = to_core
        self._taken = taken
        self._say = say
        self._refuses = refuses
        self._pair = pair
        self._mtus = mtus
        self._threads = threads
        self._draining: set[int] = set()
        self._left: list[str] = []  # addresses that have left the pool just now
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def _call(self, command: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        if self._threads:
            return await asyncio.to_thread(command, *arguments, **options)
        return command(*arguments, **options)

    # -- for those who ask -----------------------------------------------------------------------------------

    async def verb(self, body: object, conversation: Conversation) -> None:
        """For the operator's socket."""
        answer = await self.run(_options(body))
        told = lines(answer)
        for line in told:
            self._say(f"reload: {line}")
        await conversation.send({"reload": {**answer, "lines": told}})

    async def hang_up(self) -> None:
        """For SIGHUP."""
        for line in lines(await self.run(Options())):
            self._say(f"reload: {line}")

    def draining(self) -> list[dict[str, Any]]:
        """Addresses that leave the pool, and the mappings that they still have."""
        shown = sorted(self._draining)[:SHOWN]
        return [{"address": str(IPv4Address(at)), "mappings": self._mappings(at)} for at in shown]

    def tick(self) -> None:
        """Once per second: addresses that nobody uses any more go."""
        if not self._draining or self._lock.locked():
            return
        task = asyncio.ensure_future(self._end_draining())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the work --------------------------------------------------------------------------------------------

    async def run(self, options: Options) -> dict[str, Any]:
        """Reads the file and puts it in force. ``result`` in the answer is "applied", "checked", "unchanged", "refused"
        (with reasons in ``refused``) or "invalid" (with ``errors``); in the last two cases nothing has changed."""
        async with self._lock:
            try:
                return await self._run(options)
            except ConfigError as error:
                return {"result": "invalid", "errors": str(error).splitlines()}
            except (MemoryError, RuntimeError, OSError) as error:  # not even a thread to read it in
                return {
                    "result": "refused",
                    "refused": [str(error) or "no memory"],
                    "changes": [],
                    "warnings": [],
                }

    async def _run(self, options: Options) -> dict[str, Any]:
        self._left = []
        new = await asyncio.to_thread(_load, self.path)
        found = compare(self.config, new, self._mtus)
        told = {"changes": list(found.applicable), "warnings": list(configuration.warnings(new))}
        if refused := list(found.refused) or await self._take(new, options):
            return {"result": "refused", "refused": refused, **told}
        did = told["changes"] or self._left
        result = "checked" if options.check else "applied" if did else "unchanged"
        return {"result": result, **told, "left": self._left, "draining": await self._call(self.draining)}

    async def _take(self, new: Config, options: Options) -> list[str]:
        """Why not; nothing has changed then."""
        staying = _addresses(new.nat.pool.ranges)
        leaving = (_addresses(self.config.nat.pool.ranges) | self._draining) - staying
        news = set() if options.drain or options.force else leaving - self._draining
        refused = await self._call(self._used, news)
        refused += await self._call(self._refuses, new)
        if self._pair is not None and (why := self._pair.refuses(new)):
            refused.append(why)
        if refused:
            return refused
        before = [core.config for core in self._cores]
        try:
            changes = await self._call(self._prepare, self._core_configs(new, leaving))
            if options.check:
                return []
            await self._call(apply_to_all, self._cores, changes)
            if refused := await self._call(self._used, news):  # since we looked
                await self._call(apply_to_all, self._cores, self._prepare(before))
                return refused
            for change in changes:
                await self._call(change.reroute)
        except (CoreError, MemoryError) as error:
            return [str(error) or "no memory for another configuration"]
        except TimeoutError:
            return ["the worker does not answer: it is stopped, and may take this when it goes on"]
        self.config, self._draining = new, leaving
        self._taken(new)
        if self._pair is not None:
            self._pair.reconfigured(new)
        if options.force:
            with contextlib.suppress(TimeoutError):  # a worker has stopped since: they drain
                await self._end_sessions(leaving)
        await self._remove_unused()
        return []

    def _core_configs(self, config: Config, draining: set[int]) -> list[CoreConfig]:
        return [with_draining(one, draining) for one in self._to_core(config)]

    def _prepare(self, configs: Sequence[CoreConfig]) -> list[Change]:
        return [core.prepare(one) for core, one in zip(self._cores, configs, strict=True)]

    def _mappings(self, address: int) -> int:
        return sum(core.mappings_on(address) for core in self._cores)

    def _used(self, addresses: set[int]) -> list[str]:
        found = [(at, n) for at in sorted(addresses) if (n := self._mappings(at))]
        told = [
            f"nat.pool.addresses: {IPv4Address(at)} has {count(n, 'mapping')}: --drain lets it go when they have ended, "
            "--force ends them"
            for at, n in found[:SHOWN]
        ]
        if len(found) > SHOWN:
            told.append(f"nat.pool.addresses: {len(found) - SHOWN} more addresses have mappings")
        return told

    async def _end_sessions(self, addresses: set[int]) -> None:
        wanted = np.array(sorted(addresses), np.uint32)
        for core in self._cores:
            plane = CorePlane(core, own=not self._threads)
            async for page in plane.sessions():
                records = page[np.isin(page["external_addr"], wanted)]
                foreign = records[records["flags"] & FLAG_FOREIGN != 0]
                if self._pair is not None and len(foreign):  # what we end of the peer's it would not hear of
                    self._pair.transport.events(Changes(NO_RECORDS, NO_RECORDS, foreign))
                await plane.delete(records)

    async def _end_draining(self) -> None:
        async with self._lock:
            self._left = []
            await self._remove_unused()
            for one in self._left:
                self._say(f"pool: {one} has left it")

    async def _remove_unused(self) -> None:
        try:
            unused = await self._call(lambda: {at for at in self._draining if not self._mappings(at)})
            if not unused:
                return
            left = self._draining - unused
            changes = await self._call(self._prepare, self._core_configs(self.config, left))
            await self._call(apply_to_all, self._cores, changes)
        except (CoreError, MemoryError, RuntimeError, OSError):
            return  # it is tried again in a second
        self._draining = left
        self._left = [_text((IPv4Address(first), IPv4Address(last))) for first, last in _ranges(unused)]


def _load(path: Path) -> Config:
    if path.exists() and not path.is_file() and not path.is_dir():  # what has no end would be read for ever
        raise ConfigError((Problem("", "cannot be read again: this is no file"),), str(path))
    return configuration.load(path)


def apply_to_all(cores: Sequence[Core], changes: Sequence[Change]) -> None:
    """In all of them or in none: what one refuses is taken back in those before it."""
    before = [core.config for core in cores]
    for i, change in enumerate(changes):
        try:
            change.apply()
        except CoreError:
            for core, config in zip(cores[:i], before[:i], strict=True):
                core.prepare(config).apply()
            raise


def lines(answer: dict[str, Any]) -> list[str]:
    """What a person reads of an answer."""
    match answer["result"]:
        case "invalid":
            return [*answer["errors"], "invalid: nothing is changed"]
        case "refused":
            return [*answer["refused"], "refused: nothing is changed"]
    told = [*(f"warning: {line}" for line in answer["warnings"]), *answer["changes"]]
    told += [f"{one} has left the pool" for one in answer["left"]]
    for one in answer["draining"]:
        told.append(f"draining {one['address']}: {count(one['mappings'], 'mapping')} left")
    n = len(answer["changes"])
    if not n and not answer["left"]:
        return [*told, "nothing is different"]
    be = "can be" if answer["result"] == "checked" else "is" if n == 1 else "are"
    return [*told, f"{count(n, 'change')} {be} applied"] if n else told
