# SPDX-License-Identifier: Apache-2.0
"""What a valid configuration says that is probably not meant, or that costs something: `tandem-nat check` shows it."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nat_control.config import Config


def warnings(config: Config) -> tuple[str, ...]:
    """What is allowed and probably not meant, one line each with its path."""
    found = []
    for name, least, reason in (
        ("udp", 120, "RFC 4787 REQ-5"),
        ("tcp_established", 7440, "RFC 5382 REQ-5"),
        ("tcp_transitory", 240, "RFC 5382 REQ-5"),
        ("icmp", 60, "RFC 5508 REQ-2"),
    ):
        seconds = getattr(config.nat.timeouts, name)
        if seconds < least:
            found.append(f"nat.timeouts.{name}: {seconds} s is less than the {least} s of {reason}")
    if config.nat.pool.quarantine < 120:
        found.append(
            f"nat.pool.quarantine: {config.nat.pool.quarantine} s is less than the 120 s of RFC 6888 REQ-8"
        )
    external = config.ports[1]
    if external.gateway is None and IPv4Network("0.0.0.0/0") not in {
        route.prefix for route in external.routes
    }:
        found.append(
            "ports.external.gateway: there is none, so only the external subnet and the routes are reached"
        )
    subnet = external.address.network
    away = [first for first, last in config.nat.pool.ranges if first not in subnet or last not in subnet]
    if away:
        found.append(
            f"nat.pool.addresses: {away[0]} is not on the external subnet {subnet}: "
            f"the routers outside must send it to {external.address.ip}"
        )
    where = "switch.mark" if config.switch else "ports.mark"
    if "dscp" in (config.mark, config.switch.mark if config.switch else ""):
        found.append(
            f"{where}: dscp takes the lowest bit of the DSCP: codepoints of RFC 2474's pools 2 and 3 lose it, "
            "LE (RFC 8622) among them; CS, AF and EF lose nothing"
        )
    return tuple(found)
