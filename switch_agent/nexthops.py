# SPDX-License-Identifier: Apache-2.0
"""Which next hop a session's packets leave to, and the group of each.

A next hop has a key: the MAC that a record names, or the IPv4 address of the gateway or of the host itself.
Its group id follows from the key, so that a restarted agent gives the same ids and the rules that the switch
still has stay right.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from nat_fastpath.engine import RECORD
from switch_agent.compile import NextHopGroups, Records
from switch_agent.pipeline import NextHop, Pipeline

Keys = np.ndarray[Any, np.dtype[np.uint64]]

_EXTERNAL = 1 << 50  # in a key; inside next hops have 0
_BY_MAC = 1 << 48
_BASE = {"internal": 0, "external": _EXTERNAL}
_NAMES = RECORD.names or ()
_key_fields = itemgetter(*map(_NAMES.index, ("internal_mac", "internal_addr", "remote_addr")))
NO_ROUTE = 0


class Route(NamedTuple):
    """``gateway`` None: the hosts of ``prefix`` are on the link."""

    prefix: IPv4Network
    gateway: IPv4Address | None = None


def key(side: str, address: IPv4Address | None = None, mac: int = 0) -> int:
    """The key of a next hop by its address, or by its 48-bit MAC."""
    number = int(address) if address is not None else mac | _BY_MAC
    return number | (_EXTERNAL if side == "external" else 0)


def place(key: int) -> tuple[int, int] | None:
    """The side (0 internal, 1 external) and the address of a next hop that is known by its address."""
    return None if key & _BY_MAC else (int(bool(key & _EXTERNAL)), key & 0xFFFF_FFFF)


def first_group_id(key: int) -> int:
    """The group id that a next hop gets while no other one has it."""
    return zlib.crc32(key.to_bytes(8, "big")) % 0x7FFF_FFFF + 1


class NextHops:
    """Next hops of one switch: routes, what MACs are known, and which groups there are."""

    def __init__(self, pipeline: Pipeline, routes: dict[str, Sequence[Route]], limit: int = 4096) -> None:
        self._ours = [
            tuple((int(first), int(last)) for first, last in side.addresses)
            for side in (pipeline.internal, pipeline.external)
        ]
        # netmask, network and, where there is a gateway, its key; the longest prefix comes last and wins
        self._ways = {
            side: [
                (
                    int(r.prefix.netmask),
                    int(r.prefix.network_address),
                    key(side, r.gateway) if r.gateway else None,
                )
                for r in sorted(found, key=lambda route: route.prefix.prefixlen)
            ]
            for side, found in routes.items()
        }
        self._limit = limit
        self._macs: dict[int, int] = {}  # key → MAC, where it is not the key's own or has changed
        self.groups: dict[int, int] = {}  # key → group id
        self._taken: set[int] = set()

    def hop(self, key: int) -> NextHop:
        mac = self._macs.get(key)
        if mac is None and key & _BY_MAC:
            mac = key & (_BY_MAC - 1)
        return NextHop("external" if key & _EXTERNAL else "internal", mac)

    def learn(self, key: int, mac: int | None) -> None:
        """``mac`` None: not known any more."""
        if mac is None:
            self._macs.pop(key, None)
        else:
            self._macs[key] = mac

    def keys(self, records: Records) -> tuple[Keys, Keys]:
        """Keys towards the inside and the outside, shape (n,); 0 (NO_ROUTE) where there is no way."""
        named = records["internal_mac"]
        inside = np.where(
            named != 0, named | np.uint64(_BY_MAC), self._by_route("internal", records["internal_addr"])
        )
        outside = self._by_route("external", records["remote_addr"])
        # From one inside host to another through a pool address: not a matter of two rules.
        for ranges in self._ours:
            outside[_within(ranges, records["remote_addr"])] = NO_ROUTE
        return inside.astype(np.uint64), outside

    def groups_of(self, record: tuple[int, ...]) -> tuple[int, int]:
        """Groups towards the inside and the outside, for the fields of one record; 0 where there is none."""
        mac, address, remote = _key_fields(record)
        inside = mac | _BY_MAC if mac else self._route("internal", address)
        if any(first <= remote <= last for ranges in self._ours for first, last in ranges):
            return self.groups.get(inside, 0), 0
        return self.groups.get(inside, 0), self.groups.get(self._route("external", remote), 0)

    def _route(self, side: str, address: int) -> int:
        for netmask, network, gateway in reversed(self._ways.get(side, ())):
            if address & netmask == network:
                return (address | _BASE[side]) if gateway is None else gateway
        return NO_ROUTE

    def key_of(self, group_id: int) -> int:
        """The next hop of a group, 0 if there is none; for what happens seldom."""
        return next((key for key, group in self.groups.items() if group == group_id), NO_ROUTE)

    @property
    def full(self) -> bool:
        return len(self.groups) >= self._limit

    def add(self, keys: Keys) -> list[int]:
        """Gives these keys groups; returns the keys that are new. Beyond the limit they get none."""
        new = []
        for one in sorted(set(keys.tolist()), reverse=True):  # outside first: those are few and serve many
            if one == NO_ROUTE or one in self.groups or self.full:
                continue
            group_id = first_group_id(one)
            while group_id in self._taken:
                group_id = group_id % 0x7FFF_FFFF + 1
            self.groups[one] = group_id
            self._taken.add(group_id)
            new.append(one)
        return new

    def adopt(
        self, keys: Keys, groups: np.ndarray[Any, np.dtype[np.uint32]], macs: Mapping[int, int]
    ) -> None:
        """Takes over the ``groups`` of these keys, both shape (n,), as an earlier agent has made them.

        ``macs``: group id → MAC, or 0, of the groups that there are.
        """
        for one, group in set(zip(keys.tolist(), groups.tolist(), strict=True)):
            if one != NO_ROUTE and group in macs and group == first_group_id(one):
                self.groups[one] = group
                self._taken.add(group)
                if macs[group]:
                    self.learn(one, macs[group])

    def forget(self, keys: list[int]) -> None:
        """Takes back what ``add`` gave: the switch would not have it, or nobody uses it any more."""
        for one in keys:
            self._taken.discard(self.groups.pop(one, 0))

    def group_ids(self, keys: Keys) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Group ids, shape (n,); 0 where there is none."""
        return np.array([self.groups.get(one, 0) for one in keys.tolist()], np.uint32)

    def of(self, inside: Keys, outside: Keys) -> NextHopGroups:
        return NextHopGroups(self.group_ids(inside), self.group_ids(outside))

    def _by_route(self, side: str, addresses: np.ndarray[Any, np.dtype[Any]]) -> Keys:
        found = np.full(len(addresses), NO_ROUTE, np.uint64)
        for netmask, network, gateway in self._ways.get(side, ()):
            covered = addresses & np.uint32(netmask) == network
            if gateway is None:
                found[covered] = addresses[covered].astype(np.uint64) | np.uint64(_BASE[side])
            else:
                found[covered] = gateway
        return found


def _within(
    ranges: Sequence[tuple[int, int]], addresses: np.ndarray[Any, np.dtype[Any]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    found = np.zeros(len(addresses), np.bool_)
    for first, last in ranges:
        found |= (addresses >= first) & (addresses <= last)
    return found
