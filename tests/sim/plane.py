# SPDX-License-Identifier: Apache-2.0
"""The reference plane with a clock: its sessions age, its room changes, and it may refuse some."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from nat_control.dataplane import NO_RECORDS, Ids, Records
from nat_fastpath.engine import FLAG_FOREIGN, FLAG_PREVAILS
from tests.memory_plane import COMMAND, IDLE, Endpoint, Key, MemoryPlane, inside, key_of, outside
from tests.sim.rules import Violation


class AgeingPlane(MemoryPlane):
    """``ends`` hears of every session that ends, and whether the control side ordered it."""

    def __init__(
        self,
        instance: int,
        own: list[tuple[int, int]],
        *,
        epoch: int,
        synchronous: bool,
        rng: random.Random,
        clock: Callable[[], float],
        ends: Callable[[np.void, bool], None],
        yielded: set[int],
    ) -> None:
        super().__init__(instance, own, epoch=epoch, synchronous=synchronous, rng=rng)
        self.clock = clock
        self.ends = ends
        self.yielded = yielded  # ids of sessions that end for one that prevails
        self.room = 1 << 20
        self.refuses = 0  # one in so many sessions, by its id
        self.used: dict[int, float] = {}  # when each session had its last packet, by our clock and as we know
        self.opened: dict[int, float] = {}

    def open(self, client: Endpoint, remote: tuple[int, int]) -> np.void | None:
        return super().open(client, remote) if len(self) < self.room else None

    def touch(self, key: Key, tcp_state: int) -> None:
        self._used_now(self.held[key])
        super().touch(key, tcp_state)

    def carried(self, key: Key) -> None:
        """A packet that changes no state: no event."""
        self.held[key]["packets_out"] += 1
        self._used_now(self.held[key])

    def close(self, key: Key, reason: int = IDLE) -> None:
        record = self.held[key]
        self.ends(record, reason == COMMAND)
        super().close(key, reason)
        del self.used[int(record["id"])], self.opened[int(record["id"])]

    def adopt(self) -> int:
        self.used = dict.fromkeys(self.used, self.clock())
        return super().adopt()

    def age(self, timeout: float) -> None:
        now = self.clock()
        for key, held in list(self.held.items()):
            if not held["flags"] & FLAG_FOREIGN and now - self.used[int(held["id"])] > timeout:
                self.close(key)

    def records(self) -> Records:
        found = super().records()
        if not len(found):
            return NO_RECORDS
        now = self.clock()
        found["idle_ms"] = [int(1000 * max(0.0, now - self.used[number])) for number in found["id"].tolist()]
        return found

    def among(self, ids: Ids) -> Records:
        records = self.records()
        return records[np.isin(records["id"], ids)]

    def _used_now(self, held: np.void) -> None:
        held["idle_ms"] = 0
        self.used[int(held["id"])] = self.clock()

    def _take(self, held: np.void, record: np.void) -> None:
        number = int(held["id"])
        held["idle_ms"] = int(1000 * max(0.0, self.clock() - self.used[number]))
        super()._take(held, record)
        self._used(held, int(record["idle_ms"]))

    def _used(self, held: np.void, idle_ms: int) -> None:
        number = int(held["id"])
        self.used[number] = max(self.used[number], self.clock() - idle_ms / 1000)

    def install(self, records: Records) -> int:
        before = dict(self.held)
        installed = super().install(records)
        if ended := {key for key, held in before.items() if self.held.get(key) is not held}:
            for_these = {key_of(record) for record in records if record["flags"] & FLAG_PREVAILS}
            if not ended <= for_these:
                raise Violation("equal", "a session has ended for one beside which it can be held")
        return installed

    def _install(self, record: np.void) -> bool:
        if self._known(record) is None:
            refused = self.refuses and int(record["id"]) % self.refuses == 0
            other = self.held.get(key_of(record)) if record["flags"] & FLAG_PREVAILS else None
            if refused or (len(self) >= self.room and other is None):
                return False
            if other is not None:
                self.yielded.add(int(other["id"]))
        return super()._install(record)

    def _add(self, key: Key, record: np.void) -> None:
        client, external = inside(record), outside(record)
        if self.owner.get(external, client) != client:
            raise Violation("endpoint", f"{external} of {client} is another's")
        super()._add(key, record)
        self.opened[int(record["id"])] = self.clock()
        self.used[int(record["id"])] = self.clock() - int(record["idle_ms"]) / 1000
