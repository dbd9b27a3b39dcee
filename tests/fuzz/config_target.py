# SPDX-License-Identifier: Apache-2.0
"""One input for the configuration: any bytes of a file are a configuration, or errors of one line each.

What can be read can be compared with any other, and makes a core's configuration.
"""

from __future__ import annotations

from pathlib import Path

from nat_control import config as c
from nat_control.config_reader import MAX_PROBLEMS, parse_yaml
from nat_control.reload import compare

EXAMPLES = [path.read_bytes() for path in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))]
KNOWN = [c.parse(parse_yaml(content)) for content in EXAMPLES]
LINE = 500  # characters of an error at most


def refused(error: c.ConfigError) -> None:
    assert 0 < len(error.errors) <= MAX_PROBLEMS + 1
    assert str(error).count("\n") == len(error.errors) - 1
    assert max(map(len, str(error).splitlines())) <= LINE


def one_input(data: bytes) -> None:
    try:
        config = c.parse(parse_yaml(data))
    except c.ConfigError as error:
        return refused(error)
    c.to_core(config, [bytes((2, 0, 0, 0, 0, i)) for i in range(len(config.ports))])
    assert compare(config, config) == compare(KNOWN[0], KNOWN[0])
    for known in KNOWN:
        found = compare(known, config, (1500, 1500))
        assert all(
            line.isprintable() and len(line) <= 100_000 for line in (*found.applicable, *found.refused)
        )
    c.warnings(config)
    return None


def seeds() -> list[bytes]:
    tricks = [
        b"a: &a {k: v}\nb: {<<: *a}\n",
        b"- [1, 2]\n",
        b"a: 'b\n",
        b"? a\n: !!int '1'\n",
        b"instance: a\n",
    ]
    return [*EXAMPLES, *tricks]
