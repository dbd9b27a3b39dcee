# SPDX-License-Identifier: Apache-2.0
"""``python -m nat_control.sync.describe docs/sync.md`` writes into that file what the code says of the state machine, the
messages and their bytes: each part between ``<!-- generated: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import ast
import inspect
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nat_control.sync import codec
from nat_control.sync.actions import ErrorCode, Input, State
from nat_control.sync.codec import BUCKETS, CARRIED, ENTRY, LAYOUTS
from nat_control.sync.machine import Machine
from nat_control.sync.merge import Merging
from nat_control.sync.offloading import Offloading
from nat_control.sync.outbox import Outbox
from nat_control.sync.protocol import CONNECTED, INPUT_OF, TABLE, Protocol
from nat_fastpath.engine import NEIGHBOUR, RECORD

IDS, RECORDS = "ids of sessions, u64 each", f"records of {RECORD.itemsize} bytes"
# The names of each message's fixed fields, the struct that packs them, and what follows.
FIELDS: Mapping[type, tuple[str, struct.Struct | None, str]] = {
    codec.Hello: (
        "record size, instance, slices, term, ranges, precedence, kind, key of heartbeats",
        codec._HELLO,
        f"ranges, at most {codec.MAX_POOLS}: first and last address u32, first and last port u16",
    ),
    codec.InitState: ("txid, chunk, last", codec._INIT, RECORDS),
    codec.Ready: ("txid", codec._U64, IDS + ", which are refused"),
    codec.InstallEntries: ("txid", codec._U64, RECORDS),
    codec.UpdateEntries: ("", None, RECORDS),
    codec.DeleteEntries: ("txid", codec._U64, RECORDS),
    codec.InstallComplete: ("txid", codec._U64, IDS + ", which are refused"),
    codec.DeleteComplete: ("txid", codec._U64, ""),
    codec.Digest: ("txid of the last change received, sessions", codec._TWO, f"{BUCKETS} sums, u64 each"),
    codec.Error: ("code", codec._CODE, f"UTF-8 text of at most {codec.MAX_TEXT} bytes"),
    codec.Bye: ("", None, ""),
    codec.NextHopsKnown: ("", None, f"next hops of {NEIGHBOUR.itemsize} bytes"),
    codec.HandOver: ("instance that shall carry, lasting", codec._CARRIER, ""),
    codec.Carries: (
        "instance that carries, lasting",
        codec._CARRIER,
        f"why not as asked, UTF-8 text of at most {codec.MAX_TEXT} bytes",
    ),
    codec.BucketEntries: (
        "txid of the last change received",
        codec._U64,
        f"{BUCKETS // 8} bytes, a bit for each bucket from the lowest; then entries of {ENTRY.itemsize} bytes: id and hash, u64 each",
    ),
    codec.WantEntries: ("", None, IDS),
    codec.Resync: ("first txid, last txid", codec._TWO, ""),
    codec.Offload: ("txid", codec._U64, IDS),
    codec.Recall: ("txid", codec._U64, IDS),
    codec.Moved: ("txid, room", codec._MOVED, IDS + ", which are in front"),
    codec.InFront: (
        "milliseconds, room",
        codec._FRONT,
        f"entries of {CARRIED.itemsize} bytes, at most {codec.MAX_FRONT}: id and packets, u64 each",
    ),
}
SIZES = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64"}


# -- what a handler may do, from its source ----------------------------------------------------------------


def _functions() -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for owner in (Outbox, Machine, Merging, Offloading, Protocol):
        tree = ast.parse(inspect.getsource(owner))
        found |= {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return found


class Effects:
    """Which messages and states a handler may lead to, by all that it calls."""

    def __init__(self) -> None:
        self._functions = _functions()
        self._names = {kind.__name__: kind for kind in LAYOUTS}

    def _reached(self, name: str) -> set[str]:
        reached, left = set(), [name]
        while left:
            if (one := left.pop()) in self._functions and one not in reached:
                reached.add(one)
                left += [node.attr for node in self._within(one) if isinstance(node, ast.Attribute)]
        return reached

    def _within(self, name: str) -> Iterator[ast.AST]:
        for statement in self._functions[name].body:
            yield from ast.walk(statement)

    def of(self, handler: Callable[..., None]) -> tuple[list[str], list[State]]:
        """Messages by their names, in the order of their numbers; states."""
        sent: set[str] = set()
        states: set[State] = set()
        for name in self._reached(handler.__name__):
            for node in self._within(name):
                made = [node.func] if isinstance(node, ast.Call) else []
                made += [node.body, node.orelse] if isinstance(node, ast.IfExp) else []
                sent |= {one.id for one in made if isinstance(one, ast.Name) and one.id in self._names}
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                    to = node.args[0]
                    if node.func.attr in ("_become", "_release") and isinstance(to, ast.Attribute):
                        states.add(State[to.attr])
        order = list(self._names)
        return sorted(sent, key=order.index), [state for state in State if state in states]


# -- the parts ------------------------------------------------------------------------------------------------


def _table(*rows: tuple[object, ...]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def diagram() -> str:
    effects, arrows = Effects(), dict[tuple[State, State], list[str]]()
    for (state, kind), handler in TABLE.items():
        for to in effects.of(handler)[1]:
            if to is not state:
                arrows.setdefault((state, to), []).append(kind.value)
    for state in CONNECTED:
        arrows.setdefault((state, State.FAILED), []).append("anything else")
    lines = [f"    {a.value} --> {b.value}: {', '.join(kinds)}" for (a, b), kinds in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {State.STARTING.value}", *lines, "```"])


def transitions() -> str:
    effects, states = Effects(), dict[tuple[Input, Callable[..., None]], list[str]]()
    for (state, kind), handler in TABLE.items():
        states.setdefault((kind, handler), []).append(state.value)
    rows: list[tuple[object, ...]] = [("input", "in state", "what is done", "may send", "may become")]
    for (kind, handler), within in sorted(states.items(), key=lambda row: list(Input).index(row[0][0])):
        said = inspect.getdoc(handler)
        if not said:
            raise ValueError(f"{handler.__name__} does not say what it does")
        sent, after = effects.of(handler)
        told = " ".join(said.split("\n\n")[0].split())
        rows.append(
            (kind.value, ", ".join(within), told, ", ".join(sent), ", ".join(state.value for state in after))
        )
    return _table(*rows)


def _offsets(names: str, layout: struct.Struct | None) -> str:
    if layout is None:
        return ""
    found, at, wanted = [], 0, names.split(", ")
    for count, code in re.findall(r"(\d*)([A-Za-z])", layout.format):
        size = struct.calcsize(f"<{count}{code}")
        if code == "s":
            found.append(f"{at}: {wanted.pop(0)}, {size} bytes")
        elif code != "x":
            for i in range(int(count or 1)):
                found.append(f"{at + i * size}: {wanted.pop(0)} {SIZES[code]}")
        at += size
    if wanted:
        raise ValueError(f"{names}: more names than fields")
    return "; ".join(found)


def header() -> str:
    names = "magic, version, type, epoch of the sender's Hello, payload length"
    rows = [tuple(part.split(": ", 1)) for part in _offsets(names, codec.HEADER).split("; ")]
    fixed = (
        f"Magic {codec.MAGIC:#06x}, version {codec.VERSION}, payloads of {codec.MAX_PAYLOAD} bytes at most."
    )
    return _table(("offset", "field of the header"), *rows) + "\n\n" + fixed


def messages() -> str:
    rows: list[tuple[object, ...]] = [
        ("type", "message", "fields by offset in the payload", "then, from offset")
    ]
    for kind, layout in LAYOUTS.items():
        names, fixed, rest = FIELDS[kind]
        then = f"{fixed.size if fixed else 0}: {rest}" if rest else ""
        rows.append((layout.number, kind.__name__, _offsets(names, fixed), then))
    return _table(*rows)


def records() -> str:
    parts = []
    for title, layout in (("struct nat_record", RECORD), ("struct nat_neighbour_record", NEIGHBOUR)):
        assert layout.fields
        found = sorted((field[1], name, field[0].itemsize) for name, field in layout.fields.items())
        parts.append(_table(("offset", f"field of `{title}`, {layout.itemsize} bytes", "bytes"), *found))
    return "\n\n".join(parts)


def errors() -> str:
    lines = inspect.getsource(ErrorCode).splitlines()
    why = {line.split(" = ")[0].strip(): line.partition("  # ")[2] for line in lines if " = " in line}
    return _table(("code", "error", ""), *((one.value, one.name.lower(), why[one.name]) for one in ErrorCode))


PARTS: Mapping[str, Callable[[], str]] = {
    "diagram": diagram,
    "transitions": transitions,
    "header": header,
    "messages": messages,
    "records": records,
    "errors": errors,
}


def described(text: str) -> str:
    """The file's text, with every part as the code says it. Raises ValueError when a part has no place."""
    if set(FIELDS) != set(LAYOUTS) or set(INPUT_OF) != set(LAYOUTS):
        raise ValueError("a message has no fields here, or no input")
    for name, part in PARTS.items():
        begin, end = f"<!-- generated: {name} -->\n", "\n<!-- end -->"
        if text.count(begin) != 1:
            raise ValueError(f"one {begin.strip()} is wanted")
        before, _, rest = text.partition(begin)
        text = before + begin + part() + end + rest.partition(end)[2]
    return text


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(described(path.read_text()))


if __name__ == "__main__":
    main()
