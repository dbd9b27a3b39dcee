# SPDX-License-Identifier: Apache-2.0
"""What the parts of the switch agent may know of each other and of the world."""

import ast
from pathlib import Path

PARTS = sorted((Path(__file__).parents[2] / "switch_agent").glob("*.py"))
PURE = {"pipeline", "codec", "compile", "nexthops"}  # bytes and data in and out


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_only_the_channel_knows_the_openflow_library() -> None:
    assert [path.stem for path in PARTS if any(name.startswith("os_ken") for name in imports(path))] == [
        "channel"
    ]


def test_nobody_reads_a_clock() -> None:
    """But for the demo, which measures."""
    assert [path.stem for path in PARTS if {"time", "datetime"} & imports(path)] == ["demo"]


def test_the_pure_parts_do_no_input_or_output() -> None:
    for path in PARTS:
        if path.stem in PURE:
            outside = {"asyncio", "socket", "os", "subprocess", "switch_agent.channel", "switch_agent.plane"}
            assert not outside & imports(path), path
