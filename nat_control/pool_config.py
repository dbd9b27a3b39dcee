# SPDX-License-Identifier: Apache-2.0
"""The pool of external addresses and ports: its part of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from nat_control.config_reader import (
    MAX_WORKERS,
    Reader,
    Section,
    address_range,
    flag,
    integer,
    port_ranges,
    shown,
)

# What the core's arrays hold; see nat.h and port_pool.h.
MAX_POOL_ADDRESSES = (2**31 - 2) // (3 * 65536)  # slots of all triples have 31-bit numbers
MAX_PORT_RANGES = 16
MAX_POOL_TRIPLES = 2**31 - 1
MAX_TIMEOUT = 30 * 86400  # the core's ages are 32-bit milliseconds and wrap after 49 days


@dataclass(frozen=True, slots=True)
class Pool:
    """External addresses as inclusive ranges, ascending and disjoint, all with the same ``port_ranges``."""

    ranges: tuple[tuple[IPv4Address, IPv4Address], ...]
    port_ranges: tuple[tuple[int, int], ...] = ((1024, 65535),)  # ascending and disjoint
    port_preservation: bool = False
    parity: bool = False
    quarantine: int = 120  # seconds that a freed port rests
    quarantine_ports: int = 0  # that rest at once; 0: all
    slices: int = 0  # of hosts and ports; 0: one for each worker

    @property
    def ports(self) -> tuple[int, int]:
        """From the first to the last, with what lies between the ranges."""
        return self.port_ranges[0][0], self.port_ranges[-1][1]

    @property
    def n_ports(self) -> int:
        return sum(last - first + 1 for first, last in self.port_ranges)

    @property
    def n_addresses(self) -> int:
        return sum(int(last) - int(first) + 1 for first, last in self.ranges)


Located = tuple[int, int, str]  # first, last, path


def read_addresses(section: Section) -> list[Located]:
    """The pool's ranges as they stand in the file: one text, or a list of them, each perhaps with commas."""
    at = section.path("addresses")
    value = section.values.get("addresses", "")
    items = [(at, value)] if isinstance(value, str) else section.items("addresses", MAX_POOL_ADDRESSES)
    found: list[Located] = []
    for path, item in items:
        if not isinstance(item, str):
            section.reader.fault(path, f"{shown(item)} is no text such as 198.51.100.10-198.51.100.13")
            continue
        for text in item.split(","):
            try:
                first, last = address_range(text.strip())
                found.append((int(first), int(last), path))
            except ValueError as error:
                if section.reader.good(at) and "addresses" in section.values:
                    section.reader.fault(path, str(error))
    if value == []:
        section.reader.fault(at, "the pool has no address")
    return found


def _merged(reader: Reader, located: list[Located]) -> tuple[tuple[IPv4Address, IPv4Address], ...]:
    """Ascending ranges; neighbouring ones become one, overlapping ones are an error."""
    ranges: list[tuple[int, int]] = []
    for first, last, path in sorted(located):
        if ranges and first <= ranges[-1][1]:
            reader.fault(path, f"{IPv4Address(first)} is in the pool already")
            first = ranges[-1][1] + 1
        if ranges and first == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
        else:
            ranges.append((first, last))
    return tuple((IPv4Address(first), IPv4Address(last)) for first, last in ranges)


def read_pool(reader: Reader, section: Section, located: list[Located]) -> Pool:
    return Pool(
        _merged(reader, located),
        section.get("ports", port_ranges(MAX_PORT_RANGES), Pool(()).port_ranges),
        section.get("port_preservation", flag, False),
        section.get("parity", flag, False),
        section.get("quarantine", integer(0, MAX_TIMEOUT), 120),
        section.get("quarantine_ports", integer(0, MAX_POOL_TRIPLES), 0),
        section.get("slices", integer(1, MAX_WORKERS), 0),
    )


def check_slices(reader: Reader, pool: Pool, slices: int) -> None:
    """Every slice must have ports to hand out."""
    if slices == 1 or not reader.good("nat.pool.ports"):
        return
    from nat_fastpath.engine import slice_of_ports  # numpy, which most configurations do not need

    there = {
        int(found)
        for first, last in pool.port_ranges
        for found in slice_of_ports(range(first, last + 1), slices)
    }
    if len(there) < slices:
        enough = 4 << (slices - 1).bit_length()
        reader.fault("nat.pool.ports", f"no port is left for {slices - len(there)} of {slices} slices (one for "
                     f"each worker): {enough} ports in a row are enough for all of them")  # fmt: skip
