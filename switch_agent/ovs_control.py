# SPDX-License-Identifier: Apache-2.0
"""What an Open vSwitch on this machine is asked besides OpenFlow: its control socket, as ovs-appctl uses it.

After the wide forward rules have come back, its datapath still has narrow entries from the time when the switch translated
by itself. They say "to the server" now; at the next takeover they would go on saying so until the revalidator reaches each
of them. A purge makes them anew from the rules.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

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


async def ask(where: Path, command: str, *arguments: str) -> str:
    """One command as of ovs-appctl(8), by JSON-RPC; returns its answer. Raises OvsError."""
    path = control_socket(where)
    writer = None
    try:
        async with asyncio.timeout(ANSWER):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(json.dumps({"method": command, "params": arguments, "id": 0}).encode())
            data = b""
            while part := await reader.read(1 << 16):
                data += part
                try:
                    answer = json.loads(data)
                except ValueError:
                    continue  # not whole yet
                if answer.get("error"):
                    raise OvsError(f"{path}: {command}: {str(answer['error']).strip()}")
                return str(answer.get("result"))
    except TimeoutError:
        raise OvsError(f"{path}: no answer to {command} within {ANSWER:g} s") from None
    except OSError as error:
        raise OvsError(f"{path}: {error.strerror or error}") from None
    finally:
        if writer is not None:
            writer.close()
    raise OvsError(f"{path}: no answer to {command}")


async def purge(where: Path) -> None:
    """Makes the datapath's entries anew from the flow table; traffic goes on. Raises OvsError."""
    for number in range(PURGES):
        if number:
            await asyncio.sleep(BETWEEN)
        await ask(where, "revalidator/purge")
