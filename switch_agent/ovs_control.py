# SPDX-License-Identifier: Apache-2.0
"""What an Open vSwitch that we may manage is asked besides OpenFlow: its control socket and its database.

Three things of it spoil a takeover with thousands of active flows, and are put right here:

- After the wide forward rules have come back, its datapath still has narrow entries from the time when the switch translated
  by itself. They say "to the server" now; at the next takeover they would go on saying so until the revalidator reaches each
  of them. A purge makes them anew from the rules.
- The datapath's limit of flows begins at 10 000 and grows by 1000 at a time; what is above it takes the slow path, and above
  twice the limit all entries are thrown away.
- The receive buffers of its packet sockets overflow while it makes entries (ovs_sockets.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from nat_control.ovs_doctor import (
    DEFAULT_FLOW_LIMIT,
    FLOW_LIMIT,
    LIMIT_NOW,
    RECEIVE_BUFFER,
    RECOMMENDED_BUFFER,
)
from nat_control.ovs_facts import LIMIT
from switch_agent import ovs_sockets

ANSWER = 5.0  # seconds
PURGES = 2  # one may leave a few entries that were made while it ran
BETWEEN = 0.05  # seconds


class OvsError(Exception):
    """One line: what could not be asked, and why."""


def control_socket(where: Path) -> Path:
    """Of ovs-vswitchd: ``where`` itself, or the one in the run directory ``where``. Raises OvsError."""
    if not where.is_dir():
        return where
    plain = where / "ovs-vswitchd.ctl"
    if plain.exists():
        return plain
    try:
        return where / f"ovs-vswitchd.{(where / 'ovs-vswitchd.pid').read_text().strip()}.ctl"
    except OSError as error:
        raise OvsError(f"{where}: no control socket of ovs-vswitchd ({error.strerror})") from None


async def _call(path: Path, method: str, params: Sequence[Any]) -> Any:
    """One JSON-RPC request; its result. Raises OvsError."""
    writer = None
    try:
        async with asyncio.timeout(ANSWER):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(json.dumps({"method": method, "params": params, "id": 0}).encode())
            data = bytearray()
            while part := await reader.read(1 << 16):
                data += part
                if not part.rstrip().endswith(b"}"):
                    continue  # a long one is not tried after each part
                try:
                    answer = json.loads(data)
                except ValueError:
                    continue  # not whole yet
                if answer.get("error"):
                    raise OvsError(f"{path}: {method}: {str(answer['error']).strip()}")
                return answer.get("result")
    except TimeoutError:
        raise OvsError(f"{path}: no answer to {method} within {ANSWER:g} s") from None
    except OSError as error:
        raise OvsError(f"{path}: {error.strerror or error}") from None
    finally:
        if writer is not None:
            writer.close()
    raise OvsError(f"{path}: no answer to {method}")


async def ask(where: Path, command: str, *arguments: str) -> str:
    """One command as of ovs-appctl(8); returns its answer. Raises OvsError."""
    return str(await _call(control_socket(where), command, arguments))


async def purge(where: Path) -> None:
    """Makes the datapath's entries anew from the flow table; traffic goes on. Raises OvsError."""
    for number in range(PURGES):
        if number:
            await asyncio.sleep(BETWEEN)
        await ask(where, "revalidator/purge")


async def limits(where: Path) -> list[int]:
    """The limit of flows that is in force, of each datapath. Raises OvsError."""
    return [int(found) for found in LIMIT.findall(await ask(where, "upcall/show"))]


async def configured_limit(where: Path) -> int | None:
    """other_config:flow-limit of the database; None: not set. Raises OvsError."""
    found = await _transact(where, {"op": "select", "where": [], "columns": ["other_config"]})
    for key, value in found["rows"][0]["other_config"][1] if found["rows"] else ():
        if key == "flow-limit":
            return int(value) if value.isdigit() else 0
    return None


async def _configure_limit(where: Path, limit: int) -> None:
    put = [
        ["other_config", "delete", ["set", ["flow-limit"]]],
        ["other_config", "insert", ["map", [["flow-limit", str(limit)]]]],
    ]
    await _transact(where, {"op": "mutate", "where": [], "mutations": put})


async def _transact(where: Path, operation: dict[str, Any]) -> dict[str, Any]:
    """One operation on the table of settings."""
    return (await transact(where, {"table": "Open_vSwitch", **operation}))[0]


async def transact(where: Path, *operations: dict[str, Any]) -> list[dict[str, Any]]:
    """These operations on the database, all or none (RFC 7047, 4.1.3); returns their results. Raises OvsError."""
    path = (where if where.is_dir() else where.parent) / "db.sock"
    results = await _call(path, "transact", ["Open_vSwitch", *operations])
    for done in results:
        if done and "error" in done:
            raise OvsError(f"{path}: {done['error']}: {done.get('details', '')}".rstrip(": "))
    return list(results)


class Caretaker:
    """Keeps an Open vSwitch as a takeover needs it. ``where`` is None for a switch that is none, or not ours to manage:
    then nothing is done. ``say`` gets a line for each change, and once for what cannot be done."""

    def __init__(self, where: Path | None, say: Callable[[str], None]) -> None:
        self._where = where
        self._say = say
        self._told: set[str] = set()
        self._caring: asyncio.Future[None] | None = None

    def prepared(self) -> None:
        """After each connection of the switch: its daemon may be another one, with other sockets. Nothing waits for it."""
        if self._where is not None and (self._caring is None or self._caring.done()):
            self._caring = asyncio.ensure_future(self._prepare(self._where))

    async def _prepare(self, where: Path) -> None:
        await self._try("its limit of flows stays", self._configure(where))
        await self._keep(where)

    async def returned(self) -> None:
        """The wide rules are back: stale entries go, and what was lowered or opened meanwhile is put right."""
        if self._where is not None:
            await self._try("its cache stays as it is", purge(self._where))
            await self._keep(self._where)

    async def ask(self, command: str) -> None:
        """A command of ovs-appctl."""
        if self._where is not None:
            await self._try(f"{command} is not possible", self._ask(self._where, command))

    async def _ask(self, where: Path, command: str) -> None:
        await ask(where, command)

    async def _keep(self, where: Path) -> None:
        await self._try("its limit of flows grows slowly", self._raise_now(where))
        await self._try("its receive buffers stay", self._enlarge(where))

    async def _try(self, otherwise: str, work: Awaitable[None]) -> None:
        try:
            await work
        except OvsError as error:
            if (line := f"Open vSwitch: {otherwise}: {error}") not in self._told:
                self._told.add(line)
                self._say(line)

    async def _configure(self, where: Path) -> None:
        before = await configured_limit(where)
        if (DEFAULT_FLOW_LIMIT if before is None else before) >= FLOW_LIMIT:
            return
        await _configure_limit(where, FLOW_LIMIT)
        was = f"not set ({DEFAULT_FLOW_LIMIT})" if before is None else before
        self._say(f"Open vSwitch: other_config:flow-limit was {was}, is {FLOW_LIMIT} from now on")

    async def _raise_now(self, where: Path) -> None:
        if any(limit < LIMIT_NOW for limit in await limits(where)):
            await ask(where, "upcall/set-flow-limit", str(LIMIT_NOW))

    async def _enlarge(self, where: Path) -> None:
        control = control_socket(where)
        try:
            changed = ovs_sockets.enlarge(ovs_sockets.server_pid(control), RECOMMENDED_BUFFER, RECEIVE_BUFFER)
        except OSError as error:
            raise OvsError(
                f"{control}: {error.strerror or error}; `tandem-nat doctor` says how to raise them"
            ) from None
        if changed:
            self._say(
                f"Open vSwitch: receive buffers of {len(changed)} sockets of its ports had {min(changed)} bytes, "
                f"have {RECOMMENDED_BUFFER}"
            )
