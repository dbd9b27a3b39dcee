# SPDX-License-Identifier: Apache-2.0
"""What the first packet of a new flow takes more than later ones: end to end, and between the server's ports.

A client asks twice in each flow, and gets its own words back. Of each question we know how long it was on its way there and
back, and, by two taps on the switch's ports to the server, how long the server had it. What any first packet takes more in
a switch and two kernels is measured by ``mode`` off: a server alone, behind the same forward rules. Modes are measured
in turn, round by round, so that what the machine does meanwhile comes upon all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.failover import Case, Pair
from nat_control.lab import Lab
from switch_agent.pair_lab import OUTSIDE

ECHO_PORT = 9002
GAP_US = 2000  # after each answer
MODES = ("off", "asynchronous", "synchronous")
ROUNDS = 3
SEEN = np.dtype([("number", "<u8"), ("at", "<u8"), ("other", "<u4"), ("outgoing", "<u4")])
Times = np.ndarray[Any, np.dtype[np.float64]]  # ms, shape (flows, 2): of the first and the second question


def _ask(mode: str, flows: int) -> tuple[Times, Times]:
    """Round-trip times, and what of them the questions were at the server; nan: no answer, or not seen."""
    with Lab() as lab:
        pair = Pair(lab, Case(mode=mode))
        net, port = pair.net, str(ECHO_PORT)
        net.outside.start(pair.program, "echo", OUTSIDE, port, name="echo").ready("listening")
        asked, seen = lab.directory / "asked", lab.directory / "seen"
        tap = net.switch.start(pair.program, "tap", "inner", "outer", port, str(seen), name="tap")
        tap.ready("listening")
        net.client.run(pair.program, "ask", OUTSIDE, port, str(flows), str(GAP_US), str(asked), timeout=120)
        tap.stop()
        trip = np.fromfile(asked, "<u8").reshape(-1, 2) / 1e6
        found = np.fromfile(seen, SEEN)
    trip[trip == 0] = np.nan
    return trip, server_times(found, len(trip))


def server_times(seen: np.ndarray[Any, Any], flows: int) -> Times:
    """From when a question left the switch for the server until it came from there; ``seen``: dtype SEEN, in any order."""
    at = np.full((2, 2 * flows), np.nan)
    question = seen["outgoing"] == (seen["other"] == 0)  # its answer comes and goes at the other port
    for side in (0, 1):
        found = seen[question & (seen["other"] == side)][::-1]  # the first one counts
        at[side, found["number"].astype(np.int64)] = found["at"].astype(np.int64) - int(seen["at"].min())
    return np.asarray((at[1] - at[0]).reshape(-1, 2) / 1e6)


def _spread(values: Times) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4), "max": round(float(values.max()), 4)}


def row_of(mode: str, trip: Times, server: Times) -> dict[str, Any]:
    """One line of the report: ``added`` is what a first question takes more than the median of the second ones."""
    answered = ~np.isnan(trip).any(axis=1)
    known = np.median(trip[answered, 1])
    added = trip[answered, 0] - known
    there = server[answered & ~np.isnan(server).any(axis=1)]
    return {
        "mode": mode,
        "flows": len(trip),
        "unanswered": int((~answered).sum()),
        "known_rtt_ms": round(float(known), 4),
        "added_ms": _spread(added),
        "known_at_server_ms": round(float(np.median(there[:, 1])), 4),
        "added_at_server_ms": _spread(there[:, 0] - np.median(there[:, 1])),
        "added_ms_by_percent": [round(float(one), 5) for one in np.percentile(added, range(101))],
        "known_ms_by_percent": [round(float(one), 5) for one in np.percentile(trip[answered, 1], range(101))],
    }


def measure(
    flows: int = 500,
    modes: Sequence[str] = MODES,
    rounds: int = ROUNDS,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each mode, of ``flows`` flows; with ``over_off_ms``, what it adds to mode off, where that is measured too.

    Raises LabError.
    """
    found: dict[str, list[tuple[Times, Times]]] = {mode: [] for mode in modes}
    for number in range(rounds):
        for mode in modes:
            tell(f"new flow, {mode}: round {number + 1} of {rounds}")
            found[mode].append(_ask(mode, flows // rounds))
    rows = [
        row_of(mode, *(np.concatenate(part) for part in zip(*of, strict=True))) for mode, of in found.items()
    ]
    off = next((row["added_ms"] for row in rows if row["mode"] == "off"), None)
    for row in rows:
        row["over_off_ms"] = None
        if off is not None and row["mode"] != "off":
            row["over_off_ms"] = {
                name: round(row["added_ms"][name] - off[name], 4) for name in ("p50", "p99")
            }
    return rows
