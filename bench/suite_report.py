# SPDX-License-Identifier: Apache-2.0
"""The report of `make bench`: a table of all figures in Markdown, and plots in the manner of the thesis's figures 8.2 to 8.11."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import report
from bench.figures import Figure

OURS, FLOOR, PEER = "tab:blue", "tab:green", "tab:orange"
HIDDEN = "*drowned in noise*"


def latest(lines: Path) -> list[Figure]:
    """Of each figure the last one that was measured."""
    found: dict[str, Figure] = {}
    for line in lines.read_text().splitlines():
        one = json.loads(line)
        found.pop(one["figure"], None)
        found[one["figure"]] = one
    return list(found.values())


def write(rows: list[Figure], directory: Path) -> Path:
    """Plots and report.md into ``directory``; the path of the latter. Plots need matplotlib (`pip install '.[bench]'`)."""
    try:
        pictures = _plots(rows, directory)
    except ImportError:
        pictures = {}
    path = directory / "report.md"
    path.write_text("\n".join(_text(rows, pictures)) + "\n")
    return path


# -- the table ---------------------------------------------------------------------------------------------


def _text(rows: list[Figure], pictures: dict[str, str]) -> list[str]:
    machines = dict.fromkeys(f"{row['machine']}; {row['hugepages_mb']} MB of hugepages free" for row in rows)
    commits = dict.fromkeys(row["commit"] for row in rows)
    found = ["# Measured", "", f"Machine: {' / '.join(machines)}. Commit: {', '.join(commits)}.", "",
             "Medians with minimum and maximum of the rounds in which the CPU was at its full speed; ratios are of the same round, and",
             f"both sides took turns. Where rounds differ too much, no number stands: {HIDDEN}. Beside each figure the load of the",
             "machine: above 1 somebody else was at work.", ""]  # fmt: skip
    for part in dict.fromkeys(row["part"] for row in rows):
        found += [f"## {part}", "", "| figure | median (min … max) | beside it | ratio | goal | rounds (dropped) | load |",
                  "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        found += [f"| {' | '.join(_cells(row))} |" for row in rows if row["part"] == part]
        found.append("")
    for name, words in pictures.items():
        found += [f"![{words}]({name})", "", f"*{words}*", ""]
    return found


def _cells(row: Figure) -> list[str]:
    load = str(row["load"])
    if "missing" in row:
        return [row["figure"], f"**{row['missing']}**", "", "", "", "", load]
    if "other" in row:
        values = ", ".join(f"{key} {_short(value)}" for key, value in row["other"].items())
        return [row["figure"], values, "", "", "", "", load]
    rounds = f"{row['rounds']} ({row['dropped']})"
    if row["drowned"]:
        return [row["figure"], HIDDEN, "", "", row.get("goal", ""), rounds, load]
    value = f"{_number(row['median'])} {row['unit']} ({_number(row['min'])} … {_number(row['max'])})"
    beside = f"{row.get('floor_name', 'floor')} {_number(row['floor'])}" if "floor" in row else _more(row)
    ratio = (
        f"{row['ratio']['median']:.3g} ({row['ratio']['min']:.3g} … {row['ratio']['max']:.3g})"
        if "ratio" in row
        else ""
    )
    return [row["figure"], value, beside, ratio, row.get("goal", ""), rounds, load]


def _more(row: Figure) -> str:
    """What a figure without a floor says besides."""
    chosen = (
        "p50",
        "p99.9",
        "p99.99",
        "lost",
        "refused",
        "events_lost",
        "machine_worst_us",
        "worst_us",
        "bound",
        "software",
    )
    return ", ".join(f"{key} {row[key]}" for key in chosen if key in row)


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _short(value: Any) -> str:
    return " / ".join(_short(one) for one in value.values()) if isinstance(value, dict) else str(value)


# -- plots -------------------------------------------------------------------------------------------------


def _plots(rows: list[Figure], directory: Path) -> dict[str, str]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    told = [
        row
        for row in rows
        if "missing" not in row and "other" not in row and row["rounds"] and not row["drowned"]
    ]
    done: dict[str, str] = {}
    draws: tuple[tuple[str, str, Callable[[Any, list[Figure]], bool]], ...] = (
        ("throughput", "Packets per second by sessions, with the floor of the same run and the peers (8.2)", _throughput),
        ("filling", "New sessions per second while the table fills: the dip of 8.2", _filling),
        ("unsolicited", "Unsolicited packets dropped, beside established ones forwarded (8.3)", _unsolicited),
        ("directions", "One way and both ways (8.4)", _directions),
        ("split", "Split processing (8.5)", _split),
        ("latency-known", "Latency of known flows (8.6)", lambda plot, found: _latency(plot, found, "known")),
        ("latency-new", "Latency of new flows (8.7)", lambda plot, found: _latency(plot, found, "new")),
        ("latency-pair", "What a new flow's first packet takes more, in each mode (8.8)", _pair),
        ("new-flows", "Sessions that come and go per second (8.9)", _new_flows),
        ("devices", "Devices, beside plain forwarding, and peers (8.10)", _devices),
        ("micro", "Steps one by one (8.11)", _micro),
    )  # fmt: skip
    for name, words, draw in draws:
        if draw(pyplot, told):
            pyplot.tight_layout()
            pyplot.savefig(directory / f"{name}.png", dpi=120)
            done[f"{name}.png"] = words
        pyplot.close("all")
    return done


def _core(rows: list[Figure], direction: str) -> list[Figure]:
    wanted = {"kind": "core", "direction": direction, "order": "uniform", "batch": 32}
    found = [
        row
        for row in rows
        if all(row.get(key) == value for key, value in wanted.items()) and ", batch" not in row["figure"]
    ]
    return sorted((row for row in found if "endpoint" not in row["figure"]), key=lambda row: row["sessions"])


def _throughput(plot: Any, rows: list[Figure]) -> bool:
    found = _core(rows, "both")
    if not found:
        return False
    sessions = [row["sessions"] for row in found]
    for key, name, colour in (("median", "NAT", OURS), ("floor", "the floor", FLOOR)):
        plot.plot(sessions, [1e3 / row[key] for row in found], "o-", label=name, color=colour)
    plot.fill_between(
        sessions,
        [1e3 / row["max"] for row in found],
        [1e3 / row["min"] for row in found],
        alpha=0.2,
        color=OURS,
    )
    for row in rows:
        if row["part"] == "peers":
            flows = int(row["figure"].split(", ")[1].split(" flows")[0].replace(",", ""))
            plot.plot([flows], [row["floor"]], "x", label=f"{row['floor_name']} (over devices)")
    _logarithmic(plot, "sessions", "Mpps, one core")
    return bool(found)


def _filling(plot: Any, rows: list[Figure]) -> bool:
    found = [row for row in rows if row.get("kind") == "filling"]
    for row in found:
        step = row["sessions"] / len(row["curve"]) / 1e6
        plot.step([step * (1 + i) for i in range(len(row["curve"]))], row["curve"], where="mid", color=OURS)
    plot.ylim(bottom=0)
    plot.xlabel("million sessions open")
    plot.ylabel("million new sessions per second, one core")
    return bool(found)


def _unsolicited(plot: Any, rows: list[Figure]) -> bool:
    found = [row for row in rows if row.get("kind") == "unsolicited"]
    names = [f"{row['sessions']:,}" for row in found]
    _pairs(
        plot,
        names,
        [row["median"] for row in found],
        [row["floor"] for row in found],
        ("dropped", "forwarded"),
    )
    plot.ylabel("ns per packet")
    return bool(found)


def _directions(plot: Any, rows: list[Figure]) -> bool:
    one = {row["sessions"]: row for row in _core(rows, "out")}
    both = {row["sessions"]: row for row in _core(rows, "both")}
    there = sorted(one.keys() & both.keys())
    if not there:
        return False
    for found, name in ((one, "one way"), (both, "both ways")):
        plot.plot(there, [1e3 / found[n]["median"] for n in there], "o-", label=name)
        plot.plot(there, [1e3 / found[n]["floor"] for n in there], ":", label=f"the floor, {name}")
    _logarithmic(plot, "sessions", "Mpps, one core")
    return bool(there)


def _split(plot: Any, rows: list[Figure]) -> bool:
    return report.split_plot(plot, rows)


def _pair(plot: Any, rows: list[Figure]) -> bool:
    return report.new_flows_plot(plot, rows)


def _latency(plot: Any, rows: list[Figure], kind: str) -> bool:
    found = [row for row in rows if row.get("kind") == kind and row.get("curve")]
    if not found:
        return False
    for row in found:
        times, shares = zip(*row["curve"], strict=True)
        plot.step(
            times,
            [max(1 - share, 1e-7) for share in shares],
            label=f"{row['share']:.0%} of capacity, {row['rate'] / 1e6:.3g} M/s",
        )
    plot.xscale("log")
    plot.yscale("log")
    plot.xlabel("µs")
    plot.ylabel("share of packets that took longer")
    plot.legend()
    return bool(found)


def _new_flows(plot: Any, rows: list[Figure]) -> bool:
    found = [row for row in rows if row["part"] == "newflows" and row["unit"] == "M/s"]
    _bars(plot, found, [row["figure"].removeprefix("new flows: ") for row in found])
    plot.xlabel("millions per second")
    return bool(found)


def _devices(plot: Any, rows: list[Figure]) -> bool:
    found = [
        row for row in rows if row["unit"] == "Mpps" and row["part"] in ("io", "links", "memif", "peers")
    ]
    names = [
        row["figure"].removeprefix("io ").removeprefix("peers: ").removesuffix(": rate") for row in found
    ]
    plot.figure(figsize=(9, 1.5 + 0.5 * len(found)))
    places = range(len(found))
    plot.barh(
        [place - 0.2 for place in places],
        [row["median"] for row in found],
        0.4,
        label="Tandem NAT",
        color=OURS,
    )
    plot.barh(
        [place + 0.2 for place in places],
        [row["floor"] for row in found],
        0.4,
        label="plain forwarding, or the peer",
        color=PEER,
    )
    plot.yticks(list(places), names, fontsize=8)
    plot.xscale("log")
    plot.xlabel("Mpps")
    plot.legend()
    return bool(found)


def _micro(plot: Any, rows: list[Figure]) -> bool:
    found = [row for row in rows if row["part"] == "micro"]
    _bars(plot, found, [row["figure"].removeprefix("micro: ") for row in found])
    plot.xscale("log")
    plot.xlabel("ns")
    return bool(found)


def _bars(plot: Any, rows: list[Figure], names: list[str]) -> None:
    middle = [row["median"] for row in rows]
    below, above = [row["median"] - row["min"] for row in rows], [row["max"] - row["median"] for row in rows]
    plot.barh(range(len(rows)), middle, xerr=[below, above], color=OURS, ecolor="grey")
    plot.yticks(range(len(rows)), names, fontsize=8)


def _pairs(plot: Any, names: list[str], one: list[float], other: list[float], words: tuple[str, str]) -> None:
    places = range(len(names))
    plot.bar([place - 0.2 for place in places], one, 0.4, label=words[0], color=OURS)
    plot.bar([place + 0.2 for place in places], other, 0.4, label=words[1], color=FLOOR)
    plot.xticks(list(places), names)
    plot.legend()


def _logarithmic(plot: Any, across: str, up: str) -> None:
    plot.xscale("log")
    plot.ylim(bottom=0)
    plot.xlabel(across)
    plot.ylabel(up)
    plot.legend(fontsize=8)
