# SPDX-License-Identifier: Apache-2.0
"""The sync channel between two cores in two processes, over TLS: an InitState, then new sessions, told and acknowledged.

``python -m bench.sync SIDE CONFIG SESSIONS NEW`` is one of them. The first holds SESSIONS from the beginning, and opens NEW
once both are operational; the second counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench import rules
from nat_control import config as configuration
from nat_control.certificates import make_certificates
from nat_control.core_plane import BATCH, CorePlane
from nat_control.dataplane import Events, Records
from nat_control.lab import Lab, LabError
from nat_control.pair import Pair
from nat_control.sync import actions as do
from nat_control.sync.actions import State
from nat_fastpath.engine import EVENT, EVENT_OPEN, FLAG_PENDING, RECORD, Core

AHEAD = 32_768  # sessions that were told and are not acknowledged, at most
SYNC, BEATS = "127.0.0.1:7000", ("127.0.0.1:7001", "127.0.0.1:7002")
PATIENCE = 120.0
ROOM = 2  # a table that is full to the brim refuses some; an operator's is not


class Acknowledged(CorePlane):
    """Counts the sessions that the peer holds."""

    count = 0

    async def commit(self, records: Records) -> int:
        self.count += len(records)
        return await super().commit(records)


def sessions_of_events(events: Events) -> Records:
    """The records in the events themselves."""
    raw = events.view(np.uint8).reshape(len(events), EVENT.itemsize)
    return raw[:, EVENT.itemsize - RECORD.itemsize :].view(RECORD)[:, 0]


class Side:
    def __init__(self, path: Path, first: bool) -> None:
        config = configuration.load(path)
        macs = [bytes(6)] * sum(port.device is not None for port in config.ports)
        self.core = Core(configuration.to_core(config, macs))
        self.plane = Acknowledged(self.core, own=True)
        self.first = first
        self.records = np.zeros(0, rules.RECORD)
        self.number = config.number
        self.since: dict[State, float] = {}
        self.pair = Pair(
            config, self.plane, epoch=1, clock=time.monotonic, drain=lambda: None, notice=self._notice
        )

    def _notice(self, action: do.Action) -> None:
        if isinstance(action, do.StateChanged):
            self.since[action.after] = time.monotonic()

    async def run(self, sessions: int, new: int) -> dict[str, Any]:
        opened = rules.sessions(sessions + new, self.number)
        if self.first:
            await self._hold(opened[:sessions])
        await self.pair.listen()
        running = asyncio.create_task(self.pair.run())
        print("listening", flush=True)
        async with asyncio.timeout(PATIENCE):
            while State.OPERATIONAL not in self.since:
                await asyncio.sleep(0.001)
            begin = time.monotonic()
            if self.first:
                await self._open(opened[sessions:])
            while self.core.counters()["sessions"] < sessions + new:
                await asyncio.sleep(0.001)
        took = time.monotonic() - begin
        if not self.first:  # the other one has more to hear
            await asyncio.sleep(1)
        running.cancel()
        init = self.since[State.OPERATIONAL] - self.since[State.HANDSHAKE]
        return {"init_state_s": round(init, 3), "new_per_second": round(new / took) if new else None}

    async def _hold(self, records: Records) -> None:
        for at in range(0, len(records), BATCH):
            await self._install(records[at : at + BATCH])

    async def _install(self, records: Records) -> None:
        if await self.plane.install(records) < len(records):
            raise SystemExit("the core refuses sessions: the figures would be of others")
        self.core.events()

    async def _open(self, records: Records) -> None:
        """As the core's own events would tell it, as fast as they are acknowledged."""
        told = 0
        for at in range(0, len(records), BATCH):
            some = records[at : at + BATCH]
            await self._install(some)
            events = np.zeros(len(some), EVENT)
            events["type"] = EVENT_OPEN
            sessions_of_events(events)[:] = some
            events["flags"] = FLAG_PENDING  # a packet waits for the acknowledgement
            self.pair.events(events)
            told += len(some)
            while told - self.plane.count > AHEAD:
                await asyncio.sleep(0)
        while self.plane.count < told:
            await asyncio.sleep(0)


def measure(sessions: int = 1_000_000, new: int = 400_000) -> dict[str, Any]:
    """InitState until both are operational, in seconds; then new sessions per second, acknowledged. Raises LabError."""
    with Lab() as lab:
        space = lab.namespace("sync")
        make_certificates(lab.directory, ("first", "second"))
        commands = []
        for number, name in enumerate(("first", "second")):
            tree = {**rules.CONFIG, "instance": name}
            ports = ("1024-32767", "32768-65535")[number]
            nat = {**tree["nat"], "pool": {**tree["nat"]["pool"], "ports": ports}}
            tree["nat"] = {**nat, "max_sessions": (sessions + new) * ROOM}
            files = {"ca": "ca.pem", "certificate": f"{name}.pem", "key": f"{name}.key"}
            tls = {key: str(lab.directory / file) for key, file in files.items()}
            role = ("listen", "connect")[number]
            tree["peer"] = {role: SYNC, "mode": "synchronous", "tls": tls}
            tree["heartbeat"] = {"listen": BEATS[number], "connect": BEATS[1 - number], "misses": 500}
            if number:  # the side with the switch's number; no switch takes part
                there = {**tree["switch"]["ports"], "server_internal": 3, "server_external": 4}
                tree["switch"] = {**tree["switch"], "ports": there}
            else:
                del tree["switch"]
                sides = {side: {**port, "device": side} for side, port in tree["ports"].items()}
                tree["ports"] = sides
            path = lab.directory / f"{name}.yaml"
            path.write_text(yaml.safe_dump(tree))
            commands.append([sys.executable, "-m", "bench.sync", name, str(path), str(sessions), str(new)])
        first = space.start(*commands[0], name="first").ready("listening", 60)
        space.start(*commands[1], name="second").ready("listening", 60)
        if first.wait(2 * PATIENCE):
            raise LabError(f"bench.sync: {first.last_line}")
        said = first.last_line
    return {"figure": "sync between servers", "sessions": sessions, "new": new, **json.loads(said)}


if __name__ == "__main__":
    _, side, path, sessions, new = sys.argv
    result = asyncio.run(Side(Path(path), side == "first").run(int(sessions), int(new)))
    print(json.dumps(result), flush=True)
