# SPDX-License-Identifier: Apache-2.0
"""Files that no person has written: one clear line, soon, and never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat_control import config as c
from nat_control.config_reader import MAX_BYTES, MAX_PROBLEMS, parse_yaml
from tests.unit.test_config import only_config_error

EXAMPLES = [path.read_bytes() for path in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))]
LAUGHS = b"a: &a {k: v}\n" + b"".join(
    b"%c: &%c {<<: [%s]}\n" % (at, at, b", ".join([b"*%c" % (at - 1)] * 9))
    for at in range(ord("b"), ord("l"))
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * (MAX_BYTES + 1), "longer than 1 MiB"),
        (b"{" * 100_000, "nested more than 32 deep"),
        (b"a: " * 100_000, "not allowed here"),
        (b"- " * 100_000, "nested more than 32 deep"),
        (LAUGHS, "an alias within what has an anchor"),
        (b"a: &a {}\nb: [" + b"*a, " * 65 + b"]\n", "more than 64 aliases"),
        (b"a: *b\n", "undefined alias"),
        (b"a: 0x" + b"f" * 9000 + b"\n", "unknown key"),
        (b"? [a, b]\n: 1\n", "unhashable"),
    ],
)
def test_bounds(content: bytes, message: str) -> None:
    with pytest.raises(c.ConfigError) as caught:
        c.parse(parse_yaml(content))
    assert message in str(caught.value)
    assert all(len(line) < 400 for line in str(caught.value).splitlines())


def test_a_file_that_has_no_end() -> None:
    with pytest.raises(c.ConfigError, match="longer than 1 MiB"):
        c.load("/dev/zero")


def test_errors_without_number() -> None:
    keys = b"".join(b"key%d: 1\n" % i for i in range(20_000))
    with pytest.raises(c.ConfigError, match="19984 more unknown keys"):
        c.parse(parse_yaml(keys))
    with pytest.raises(c.ConfigError) as caught:
        c.parse({"ports": {"internal": {"neighbours": [{"address": 1, "mac": 2}] * 1024}}})
    assert len(caught.value.errors) == MAX_PROBLEMS + 1
    assert "more errors than these" in caught.value.errors[-1].message


ANY = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))


@given(ANY)
def test_any_file_is_read_or_refused(content: bytes) -> None:
    only_config_error(lambda: c.parse(parse_yaml(content)))


PIECES = st.sampled_from(
    [b"&a ", b"*a", b"<<: *a", b"- ", b"[", b"]", b"{", b"}", b"? ", b"\n", b"\t", b"'", b"!!int ", b"9" * 5000, b"~", b"|"]
)  # fmt: skip


@given(
    st.sampled_from(EXAMPLES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 30), PIECES), max_size=4),
)
def test_an_example_with_some_places_changed(content: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    for at, length, piece in edits:
        content = content[:at] + piece + content[at + length :]
    only_config_error(lambda: c.parse(parse_yaml(content)))
