# SPDX-License-Identifier: Apache-2.0
"""What keeps an instance from working as it should: told once when it begins and when it is over, and by `show status`.

Conditions have a name and a line. Some are states (a link that is down), others are seen by counters that rise; these
last until they have been silent for a while.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nat_control.pair import Pair
from nat_control.sync.actions import State
from nat_fastpath.cores import AnyCore, parts
from nat_fastpath.engine import VERDICT_NAMES

Counters = Mapping[str, float]

QUIET = 10  # looks, of a second each, after which what was counted is over
NO_RESOURCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
RING_FULL = 7 / 8  # share of the event ring above which new sessions are refused
BUFFERS_SHORT = 0.98
A_BURST = 100  # packets that a device did not take, or that it lost, in one second: TCP looks for that limit all the time

# What a counter that rises means; {n} is by how much.
RISING = {
    "drop_table_full": "a table is full: {n} packets of new sessions were refused (nat.max_sessions)",
    "drop_no_port": "no external port is free: {n} packets of new sessions were refused (nat.pool)",
    "drop_events_full": "the control loop does not keep up: {n} packets of new sessions were refused",
    "drop_hold_limit": "no more packets may wait: {n} were dropped (next hops that are asked for, or peer.hold)",
    "drop_hold_timeout": "the peer does not acknowledge new sessions in time: {n} packets were dropped",
    "events_lost": "{n} events were lost",
    "outbox_no_buffer": "packet buffers are used up: {n} frames of our own were not sent",
    "fragment_no_buffer": "packet buffers are used up: {n} fragments were not sent",
    "handoff_dropped": "a worker does not keep up: {n} packets that others had for it were dropped",
    "rx_nombuf": "packet buffers are used up: {n} packets were not received",
    "refused_rules": "the switch refused the rules of {n} sessions, which pass through the agent",
    "refused_next_hops": "{n} sessions have no rules, for want of groups on the switch",
    "tx_dropped": "{n} packets found no room to be sent",
    "imissed": "{n} packets came faster than they were taken",
}


class Health:
    """Conditions that hold. ``say`` is told each one once."""

    def __init__(self, say: Callable[[str], None], state_dir: Path | None = None) -> None:
        self._say = say
        self._state_dir = state_dir
        self._before: dict[str, float] = {}
        self._counted: dict[str, tuple[str, int]] = {}  # name -> its line, looks that it has still to last
        self._states: dict[str, str] = {}

    @property
    def lines(self) -> list[str]:
        """What is wrong now, one line each."""
        return [*self._states.values(), *(line for line, _ in self._counted.values())]

    def look(self, states: Mapping[str, str], counters: Counters) -> None:
        """Once per second. ``states`` are conditions that hold now, by name; ``counters`` that should stand still, of
        which a name such as "tx_dropped.external" belongs to a port."""
        found = dict(states)
        if self._state_dir is not None and (why := _no_room(self._state_dir)):
            found["disk"] = why
        self._tell(line for name, line in found.items() if name not in self._states)
        self._over(line for name, line in self._states.items() if name not in found)
        self._states = found
        before, self._before = self._before, dict(counters)
        for name, n in counters.items():
            kind, _, port = name.partition(".")
            if n - before.get(name, 0) >= (A_BURST if port else 1):
                line = RISING[kind].format(n=int(n - before.get(name, 0)))
                self.counted(name, f"{port}: {line}" if port else line)
        self._counted = {name: (line, left - 1) for name, (line, left) in self._counted.items()}
        self._over(line for line, left in self._counted.values() if left < 0)
        self._counted = {name: one for name, one in self._counted.items() if one[1] >= 0}

    def counted(self, name: str, line: str) -> None:
        """Something has happened that means no good if it goes on."""
        if name not in self._counted:
            self._tell([line])
        self._counted[name] = line, QUIET

    def unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For asyncio: an operator that cannot be let in, for want of descriptors, is tried again in a second."""
        error = context.get("exception")
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno in NO_RESOURCE and "socket" in context
        ):
            self.lacking(error)
        else:
            loop.default_exception_handler(context)

    def lacking(self, error: OSError | MemoryError) -> None:
        """The system refused something that is tried again."""
        why = error.strerror if isinstance(error, OSError) else "no memory"
        self.counted("system", f"the system refuses what is needed: {why}")

    def _tell(self, found: Iterable[str]) -> None:
        for line in found:
            self._say(f"degraded: {line}")

    def _over(self, found: Iterable[str]) -> None:
        for line in found:
            self._say(f"no longer degraded: {line}")


def _no_room(directory: Path) -> str:
    try:
        left = os.statvfs(directory)
    except OSError as error:
        return f"{directory}: {error.strerror}: a restart could not note what it changes"
    return "" if left.f_bavail else f"{directory}: no space left: a restart could not note what it changes"


def states_of(core: AnyCore, in_use: int = 0, buffers: int = 0) -> dict[str, str]:
    """Of the fullest event ring, and of the packet buffers."""
    found = {}
    waiting, ring = max((one.counters()["events"], one.config.event_ring) for one in parts(core))
    if waiting >= ring * RING_FULL:
        found["events"] = f"the control loop does not keep up: {waiting} of {ring} events wait"
    if buffers and in_use >= buffers * BUFFERS_SHORT:
        found["buffers"] = f"packet buffers are used up: {in_use} of {buffers} are in use"
    return found


def state_of(pair: Pair | None) -> dict[str, str]:
    """Of a pair, whose halves protect each other while both are there."""
    if pair is None:
        return {}
    if pair.state is State.OPERATIONAL:
        if not pair.differing:
            return {}
        why = f"{pair.differing} of 256 digests differ"
        return {"digests": f"the peer has not the same sessions ({why}): those would not survive a takeover"}
    why = f": {pair.refused}" if pair.refused else ""
    return {"peer": f"the peer is not in step ({pair.state.value}): sessions are not protected{why}"}


def drops_of(core: AnyCore) -> dict[str, float]:
    """Counters of a core that should stand still."""
    verdicts = zip(VERDICT_NAMES, core.verdicts().tolist(), strict=True)
    return {name: n for name, n in verdicts if name in RISING}
