# SPDX-License-Identifier: Apache-2.0
"""The reference data plane: sessions in dictionaries, endpoint-independent mapping, checked at every step.

``MemoryPlane`` holds the sessions and does everything at once; ``AsyncMemoryPlane`` is a DataPlane around it.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from nat_control.dataplane import NO_RECORDS, Capabilities, Events, Ids, Mask, NextHops, Records
from nat_fastpath.engine import (
    EVENT,
    EVENT_CLOSE,
    EVENT_OPEN,
    EVENT_UPDATE,
    FLAG_FOREIGN,
    FLAG_OFFLOAD,
    FLAG_PENDING,
    FLAG_PREVAILS,
    NEIGHBOUR,
    RECORD,
    TCP_STATES,
)

Endpoint = tuple[int, int, int]  # protocol, address, port
Key = tuple[int, int, int, int, int]  # protocol, inside address and port, remote address and port
COUNTERS = ("packets_out", "packets_in", "bytes_out", "bytes_in")
KEPT = ("tcp_state", "age_ms", "idle_ms", "timeout_ms")
IDLE, COMMAND, HOLD_TIMEOUT = 1, 2, 3  # why a session ends
UDP = 17
SYN_BOTH, ESTABLISHED = TCP_STATES.index("syn_both"), TCP_STATES.index("established")


def _getter(*names: str) -> Callable[[np.void], Any]:
    """Fields as integers; one conversion of the whole is much faster than one of each field."""
    get = itemgetter(*(RECORD.names.index(name) for name in names))
    return lambda record: get(record.item())


key_of: Callable[[np.void], Key] = _getter(
    "protocol", "internal_addr", "internal_port", "remote_addr", "remote_port"
)
inside: Callable[[np.void], Endpoint] = _getter("protocol", "internal_addr", "internal_port")
outside: Callable[[np.void], Endpoint] = _getter("protocol", "external_addr", "external_port")
_known_by = _getter("id", "protocol", "external_addr", "external_port")


def rows(records: Records) -> Iterator[np.void]:
    return (records[i] for i in range(len(records)))


def together(found: list[np.void]) -> Records:
    return np.array(found, RECORD) if found else NO_RECORDS


class MemoryPlane:
    """``own`` are the (address, port) pairs that it may hand out; ids count from ``epoch``."""

    def __init__(
        self,
        instance: int,
        own: list[tuple[int, int]],
        *,
        epoch: int = 1,
        synchronous: bool = False,
        max_sessions: int = 1 << 20,
        rng: random.Random | None = None,
    ) -> None:
        self.capabilities = Capabilities("memory", max_sessions, True, 4096)
        self.instance = instance
        self.synchronous = synchronous
        self.held: dict[Key, np.void] = {}
        self.mapping: dict[Endpoint, Endpoint] = {}  # inside -> external, of new sessions
        self.owner: dict[Endpoint, Endpoint] = {}  # external -> inside
        self.ended: set[int] = set()  # ids of all sessions that were held once
        self.hops: dict[tuple[int, int], np.void] = {}  # port, address -> dtype NEIGHBOUR; ages stand still
        self._own = own
        self._rng = rng or random.Random(0)
        self._users: dict[Endpoint, int] = {}  # sessions of each external endpoint
        self._base = 1 << 60 | instance << 52 | (epoch & 0xFFFFF) << 32
        self._counter = 0
        self._sequence = 0
        self._events: list[tuple[int, int, np.void]] = []

    def __len__(self) -> int:
        return len(self.held)

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    # -- what packets do

    def open(self, client: Endpoint, remote: tuple[int, int]) -> np.void | None:
        """A session of an inside endpoint; None when it exists already, or no port or room is left."""
        protocol, address, port = client
        key = (protocol, address, port, *remote)
        external = self.mapping.get(client) or self._free(protocol)
        if key in self.held or external is None or len(self) >= self.capabilities.max_sessions:
            return None
        self._counter += 1
        record = np.zeros((), RECORD)
        record["id"] = self._base | self._counter
        record["protocol"], record["internal_addr"], record["internal_port"] = client
        _, record["external_addr"], record["external_port"] = external
        record["remote_addr"], record["remote_port"] = remote
        record["timeout_ms"] = 300_000
        if self.synchronous:
            record["flags"] |= FLAG_PENDING
        self._add(key, record[()])
        self._event(EVENT_OPEN, 0, record[()])
        return self.held[key]

    def touch(self, key: Key, tcp_state: int) -> None:
        record = self.held[key]
        record["tcp_state"] = tcp_state
        record["packets_out"] += 1
        self._event(EVENT_UPDATE, 0, record)

    def close(self, key: Key, reason: int = IDLE) -> None:
        record = self.held.pop(key)
        self.ended.add(int(record["id"]))
        client, external = inside(record), outside(record)
        self._users[external] -= 1
        if not self._users[external]:
            del self._users[external], self.owner[external]
            if self.mapping.get(client) == external:
                del self.mapping[client]
                if left := [one for one, whose in self.owner.items() if whose == client]:
                    self.mapping[client] = left[0]  # after a split it had another one, too
        self._event(EVENT_CLOSE, reason, record)

    def events(self) -> Events:
        """Takes all events there are."""
        found = np.zeros(len(self._events), EVENT)
        for i, (kind, reason, record) in enumerate(self._events):
            self._sequence += 1
            found[i] = (self._sequence, 0, kind, reason, 0, 0, *record.item())
        self._events.clear()
        return found

    # -- what the control side does; see DataPlane

    def install(self, records: Records) -> int:
        return sum(self._install(record) for record in rows(records))

    def holds(self, records: Records) -> Mask:
        return np.array([self._known(record) is not None for record in rows(records)], np.bool_)

    def update(self, records: Records) -> int:
        found = [(self._known(record), record) for record in rows(records)]
        for known, record in found:
            if known is not None and record["flags"] & FLAG_OFFLOAD:
                for name in COUNTERS:
                    known[name] += record[name]
                self._used(known, int(record["idle_ms"]))
                if known["tcp_state"] == SYN_BOTH and record["packets_out"] + record["packets_in"]:
                    known["tcp_state"] = ESTABLISHED
            elif known is not None:
                self._take(known, record)
        return sum(known is not None for known, _ in found)

    def delete(self, records: Records) -> int:
        known = [key_of(record) for record in rows(records) if self._known(record) is not None]
        for key in dict.fromkeys(known):
            self.close(key, COMMAND)
        return len(set(known))

    def commit(self, records: Records) -> int:
        known = [held for record in rows(records) if (held := self._known(record)) is not None]
        for held in known:
            held["flags"] &= 0xFF ^ FLAG_PENDING
        return len(known)

    def adopt(self) -> int:
        taken = [held for held in self.held.values() if held["flags"] & FLAG_FOREIGN]
        for held in taken:
            held["flags"] &= 0xFF ^ FLAG_FOREIGN
        for held in self.held.values():
            held["idle_ms"] = 0
        return len(taken)

    def cede(self, instance: int, besides: Ids) -> int:
        kept = set(besides.tolist())
        given = 0
        for held in self.held.values():
            if int(held["id"]) >> 52 & 0xFF != instance:
                continue
            if int(held["id"]) in kept:
                held["flags"] &= 0xFF ^ FLAG_FOREIGN
            else:
                given += not held["flags"] & FLAG_FOREIGN
                held["flags"] |= FLAG_FOREIGN
        return given

    def learn(self, next_hops: NextHops) -> int:
        news = 0
        for hop in rows(next_hops):
            place = int(hop["port"]), int(hop["address"])
            known = self.hops.get(place)
            if known is None or hop["confirmed_ms"] < known["confirmed_ms"]:
                news += known is None or hop["mac"] != known["mac"]
                self.hops[place] = hop.copy()
        return news

    def taken(self, record: np.void) -> bool:
        """Whether its external endpoint has another user here."""
        return self.owner.get(outside(record), inside(record)) != inside(record)

    def records(self) -> Records:
        return together(list(self.held.values()))

    # -- within

    def _free(self, protocol: int) -> Endpoint | None:
        start = self._rng.randrange(len(self._own)) if self._own else 0
        for address, port in self._own[start:] + self._own[:start]:
            if (protocol, address, port) not in self.owner:
                return protocol, address, port
        return None

    def _known(self, record: np.void) -> np.void | None:
        held = self.held.get(key_of(record))
        return held if held is not None and _known_by(held) == _known_by(record) else None

    def _take(self, held: np.void, record: np.void) -> None:
        """Counters never go back; of all else who saw the last packet knows more."""
        for name in COUNTERS:
            held[name] = max(held[name], record[name])
        if record["idle_ms"] <= held["idle_ms"]:
            for name in KEPT:
                held[name] = record[name]

    def _used(self, held: np.void, idle_ms: int) -> None:
        held["idle_ms"] = min(int(held["idle_ms"]), idle_ms)

    def _install(self, record: np.void) -> bool:
        known = self._known(record)
        if known is not None:
            known["flags"] = known["flags"] & (0xFF ^ FLAG_FOREIGN) | record["flags"] & FLAG_FOREIGN
            self._used(known, int(record["idle_ms"]))
            return True
        key, client, external = key_of(record), inside(record), outside(record)
        prevails = bool(record["flags"] & FLAG_PREVAILS)
        if prevails and key in self.held:
            self.close(key, COMMAND)
        if (
            key in self.held
            or self.owner.get(external, client) != client
            or len(self) >= self.capabilities.max_sessions
        ):
            return False
        record = record.copy()
        record["flags"] &= 0xFF ^ FLAG_PREVAILS
        self._add(key, record)
        if prevails and client in self.mapping:
            self.mapping[client] = external
        return True

    def _add(self, key: Key, record: np.void) -> None:
        client, external = inside(record), outside(record)
        assert key not in self.held
        assert self.owner.setdefault(external, client) == client, "an external endpoint used twice"
        if external not in self._users:
            self.mapping.setdefault(client, external)
        self._users[external] = self._users.get(external, 0) + 1
        self.held[key] = record

    def _event(self, kind: int, reason: int, record: np.void) -> None:
        self._events.append((kind, reason, record.copy()))


class AsyncMemoryPlane:
    """The same as a DataPlane; ``page`` records at once."""

    def __init__(self, plane: MemoryPlane, page: int = 4096) -> None:
        self.plane = plane
        self.page = page

    @property
    def capabilities(self) -> Capabilities:
        return self.plane.capabilities

    async def install(self, records: Records) -> int:
        return self.plane.install(records)

    async def holds(self, records: Records) -> Mask:
        return self.plane.holds(records)

    async def update(self, records: Records) -> int:
        return self.plane.update(records)

    async def delete(self, records: Records) -> int:
        return self.plane.delete(records)

    async def commit(self, records: Records) -> int:
        return self.plane.commit(records)

    async def adopt(self) -> int:
        return self.plane.adopt()

    async def cede(self, instance: int, besides: Ids) -> int:
        return self.plane.cede(instance, besides)

    async def next_hops(self) -> NextHops:
        return np.array(list(self.plane.hops.values()), NEIGHBOUR)

    async def learn(self, next_hops: NextHops) -> int:
        return self.plane.learn(next_hops)

    async def sessions(self) -> AsyncIterator[Records]:
        held = self.plane.records()
        for start in range(0, len(held), self.page):
            yield held[start : start + self.page]
