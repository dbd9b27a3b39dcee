# SPDX-License-Identifier: Apache-2.0
"""What `top` shows: the difference of two looks at a server or an agent, and a picture of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import ConsoleDimensions, Group
from rich.table import Table
from rich.text import Text

from nat_control.client import Client

SIDES = ("internal", "external")
LEAVING = ("forward", "reply", "fragment")
AROUND = 12  # lines of the picture besides verdicts and hosts


class Snapshot(NamedTuple):
    status: dict[str, Any]
    stats: dict[str, Any]
    hosts: dict[str, Any]

    @classmethod
    def take(cls, client: Client) -> Snapshot:
        return cls(client.status(), client.stats(), client.show("hosts"))


def figures(before: Snapshot, now: Snapshot) -> dict[str, Any]:
    """Rates per second between two looks, by the server's own clock."""
    seconds = max(now.status["uptime"] - before.status["uptime"], 1e-3)

    def rates(of: str) -> dict[str, float]:
        old = before.stats[of]
        return {name: round(max(n - old.get(name, 0), 0) / seconds, 1) for name, n in now.stats[of].items()}

    counters = rates("counters")
    status = now.status
    shares = [worker["busy_share"] for worker in status.get("workers", ())]  # an agent has none
    return {
        "instance": status["instance"],
        "uptime": status["uptime"],
        "seconds": round(seconds, 3),
        "carrier": status.get("carrier", "server"),
        "busy_share": max(shares, default=None),  # of the busiest worker
        "busy_shares": shares,
        **{name: status[name] for name in ("sessions", "mappings", "hosts", "neighbours", "held")},
        "max_sessions": status.get("max_sessions"),
        "opened": counters["sessions_opened"],
        "closed": counters["sessions_closed"],
        "ports": {
            side: {
                f"{way}_{unit}": counters.get(f"{way}_{unit}.{i}", 0.0)
                for way in ("rx", "tx")
                for unit in ("packets", "bytes")
            }
            for i, side in enumerate(SIDES)
        },
        "verdicts": {name: rate for name, rate in rates("verdicts").items() if rate},
        "top_hosts": now.hosts["top"],
    }


def _short(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 9999.5:
            return f"{number:.0f}{unit}" if number >= 100 or number == int(number) else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


def _plain(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def picture(seen: dict[str, Any], size: ConsoleDimensions) -> Group:
    """It fits in ``size``; what does not is left out, the rarest verdicts and the smallest hosts first."""
    busy = ", ".join(f"{share:.0%}" for share in seen["busy_shares"])
    busy = busy and f"   worker{'s' if ',' in busy else ''} {busy} busy"
    carrier = "" if seen["carrier"] == "server" else f"   carried by the {seen['carrier']}"
    title = Text(
        f"tandem-nat {seen['instance']}   up {seen['uptime']:.0f} s{busy}{carrier}", "bold", no_wrap=True
    )
    most = f" of {seen['max_sessions']}" if seen["max_sessions"] else ""
    sessions = Text(
        f"sessions {seen['sessions']}{most}   new {_short(seen['opened'])}/s   ended {_short(seen['closed'])}/s   "
        f"hosts {seen['hosts']}   held {seen['held']}",
        no_wrap=True,
    )
    ports = _plain("port", "in packets/s", "in bit/s", "out packets/s", "out bit/s")
    for name, port in seen["ports"].items():
        ports.add_row(
            name,
            _short(port["rx_packets"]),
            _short(8 * port["rx_bytes"]),
            _short(port["tx_packets"]),
            _short(8 * port["tx_bytes"]),
        )
    room = max(size.height - AROUND, 2)
    verdicts = _plain("verdict", "packets/s")
    found = sorted(seen["verdicts"].items(), key=lambda row: -row[1])[: max(room // 2, 1)]
    for name, rate in found:
        verdicts.add_row(Text(name, "" if name in LEAVING else "yellow"), _short(rate))
    hosts = _plain("host", "sessions", "mappings", "refused", "external")
    for host in seen["top_hosts"][: max(room - len(found), 1)]:
        hosts.add_row(
            host["address"],
            str(host["sessions"]),
            str(host["mappings"]),
            Text(str(host["refused"]), "yellow" if host["refused"] else ""),
            host["external"],
        )
    end = Text("q ends", "dim")
    return Group(title, sessions, "", ports, "", verdicts, "", hosts, end)
