# SPDX-License-Identifier: Apache-2.0
"""The report of `python -m bench pair`: a table in Markdown, and plots in the manner of the thesis's figures 8.5 to 8.10."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.failover import BIN, LEAD

Row = dict[str, Any]
DROPS, STEPS = "tab:green", "tab:blue"  # the thesis's colours: packets dropped, durations
SPREADS = {
    "packets_lost": "lost",
    "delivered_first_second": "of first second",
    "detect_ms": "detected, ms",
    "reaction_ms": "then written, ms",
    "first_good_ms": "first good, ms",
}
ADDED = {
    "added_ms": "added ms",
    "over_off_ms": "more than with mode off",
    "added_at_server_ms": "of it between the server's ports",
}
SINGLE = ("sessions_lost", "init_state_s", "new_per_second", "rules_per_second", "false_deaths", "init_states", "lost",
          "sent_per_second", "lost_before", "server_mb")  # fmt: skip


def write(rows: list[Row], directory: Path) -> Path:
    """Plots and report.md into ``directory``; the path of the latter. Plots need matplotlib (`pip install '.[bench]'`)."""
    try:
        pictures = _plots(rows, directory)
    except ImportError:
        pictures = []
    path = directory / "report.md"
    path.write_text("\n".join(_lines(rows, pictures)) + "\n")
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _lines(rows: list[Row], pictures: list[str]) -> list[str]:
    found = ["# The pair, measured", "", "minimum / median / maximum over the trials. Detection, the bytes written after it, and the",
             "first packet that was sent after the end and came, are apart; times are from the end of the server on. What was lost before it",
             "says that the machine does not carry that rate beside all else that it does.", "",
             "| figure | must | good | trials | result |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        cells = (row["figure"], row["must"], row["good"], str(row.get("trials", "")), _result(row))
        found.append(f"| {' | '.join(cells)} |")
    return [*found, *(line for name in pictures for line in ("", f"![{name}]({name})"))]


def _result(row: Row) -> str:
    if "failed" in row:
        return f"**failed**: {row['failed']}"
    said = [f"{words} {_three(row[key])}" for key, words in SPREADS.items() if row.get(key)]
    said += [
        f"{words}: {', '.join(f'{name} {ms:.3g}' for name, ms in row[key].items())}"
        for key, words in ADDED.items()
        if row.get(key)
    ]
    if each := row.get("each"):
        said.append("; ".join(_in_a_row(n, each[n]) for n in (0, 2) if n < len(each)))
    said += [f"{key.replace('_', ' ')} {row[key]:,}" for key in SINGLE if row.get(key) is not None]
    return "; ".join(said)


def _in_a_row(number: int, trial: dict[str, Any]) -> str:
    """The first and the third failover in a row are goals of their own."""
    said = f"failover {number + 1}: {trial['delivered_first_second']:.5f} of first second"
    if "lost_after" in trial:  # not in rows of an earlier version
        said += f", {trial['lost_after']:,} lost once it was noticed, {trial['sessions_lost']} sessions"
    return said


def _three(spread: dict[str, float]) -> str:
    return " / ".join(f"{value:.5g}" for value in spread.values())


# -- plots -------------------------------------------------------------------------------------------------


def _plots(rows: list[Row], directory: Path) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = []
    for name, draw in (
        ("split-processing", split_plot),
        ("new-flows", new_flows_plot),
        ("failover-steps", _steps),
        ("failover-timeline", _timeline),
    ):
        if draw(pyplot, rows):
            pyplot.tight_layout()
            pyplot.savefig(directory / f"{name}.png", dpi=150)
            done.append(f"{name}.png")
        pyplot.close("all")
    return done


def split_plot(pyplot: Any, rows: list[Row]) -> bool:
    """Figure 8.5: what the server and what the receiver sees, while new flows begin and the switch takes them over."""
    found = [row for row in rows if "server_packets" in row]
    if not found:
        return False
    for row in found:
        when, count = np.array(row["server_s"]), np.array(row["server_packets"])
        pyplot.plot(when[1:], np.diff(count) / np.diff(when) / 1e3, label="at the server")
        bins = np.array(row["received"]) / row["received_bin_s"] / 1e3
        pyplot.plot(np.arange(len(bins)) * row["received_bin_s"], bins, label="at the receiver")
        pyplot.title(f"{row['partition']}, {row['flows']} flows")
    pyplot.xlabel("s")
    pyplot.ylabel("1000 packets per second")
    pyplot.legend()
    return True


def new_flows_plot(pyplot: Any, rows: list[Row]) -> bool:
    """Figures 8.6 to 8.8: latency of known flows, and what the first packet of a new one takes more."""
    found = [row for row in rows if "added_ms_by_percent" in row]
    if not found:
        return False
    share = np.arange(101) / 100
    for row in found:
        pyplot.step(
            np.maximum(row["added_ms_by_percent"], 1e-4), share, label=f"{row['mode']}: added by a new flow"
        )
    for row in found[:1]:
        pyplot.step(row["known_ms_by_percent"], share, "k:", label="known flow, round trip")
    pyplot.xscale("log")
    pyplot.xlabel("ms")
    pyplot.ylabel("share of packets")
    pyplot.legend()
    return True


def _steps(pyplot: Any, rows: list[Row]) -> bool:
    """Figure 8.9: packets lost, and what each step took."""
    found = next((row for row in rows if row["figure"].startswith("kill, 1 flow") and row.get("each")), None)
    if found is None:
        return False
    panels = (("lost", "packets lost", DROPS), ("detect_ms", "detected after, ms", STEPS),
              ("reaction_ms", "then written after, ms", STEPS), ("first_good_ms", "first good packet after, ms", STEPS))  # fmt: skip
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6))
    for axis, (key, words, colour) in zip(axes.flat, panels, strict=True):
        axis.hist([one[key] for one in found["each"] if one[key] is not None], bins=20, color=colour)
        axis.set_xlabel(words)
        axis.set_ylabel("trials")
    figure.suptitle(f"{found['figure']}, {found['trials']} trials")
    return True


def _timeline(pyplot: Any, rows: list[Row]) -> bool:
    """Figure 8.10: the rate at the receiver, for each number of flows, as a share of what was sent."""
    found = [
        row
        for row in rows
        if row.get("how", "").startswith("kill") and row.get("each") and row.get("server_mb", 0) < 1000
    ]
    if not found:
        return False
    _, axes = pyplot.subplots(len(found), 1, figsize=(8, 2.2 * len(found)), squeeze=False, sharex=True)
    for axis, row in zip(axes.flat, found, strict=True):
        for number, trial in enumerate(row["each"]):
            if trial["timeline"]:
                rate = np.array(trial["timeline"]) / BIN / row["rate"]
                axis.plot((np.arange(len(rate)) * BIN - LEAD) * 1000, rate, label=f"failover {number + 1}")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(f"{row['figure']}: {row['flows']} flows, {row['rate']} packets per second", fontsize=9)
        axis.set_ylabel("share of the rate")
        axis.set_ylim(bottom=0)
    axes.flat[0].legend()
    axes.flat[-1].set_xlabel("ms from the kill")
    return True
