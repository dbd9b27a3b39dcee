# SPDX-License-Identifier: Apache-2.0
"""That the switch keeps the traffic outlasts the agent, and a reboot where there is a directory for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nat_control import config as configuration
from switch_agent.kept import Kept, file_of

EXAMPLE = configuration.load(Path(__file__).parents[2] / "examples" / "pair-switch.yaml")


def test_where_it_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_NAT_STATE", raising=False)
    assert file_of(EXAMPLE) == EXAMPLE.control.socket.parent / f"{EXAMPLE.instance}.kept"
    monkeypatch.setenv("TANDEM_NAT_STATE", "/var/lib/other")
    assert file_of(EXAMPLE).parent == Path("/var/lib/other")
    assert EXAMPLE.switch
    config = replace(EXAMPLE, switch=replace(EXAMPLE.switch, state=tmp_path / "new"))
    lines: list[str] = []
    kept = Kept(file_of(config), lines.append)
    assert not kept
    kept.set(True)
    assert Kept(tmp_path / "new" / f"{EXAMPLE.instance}.kept", lines.append)
    kept.set(False)
    assert not Kept(file_of(config), lines.append)
    assert lines == []


def test_what_a_reboot_empties_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr(Path, "write_text", lambda *_: None)
    lines: list[str] = []
    Kept(Path("/run/tandem-nat/agent.kept"), lines.append).set(True)
    (line,) = lines
    assert "a reboot forgets" in line
    assert "`switch.state`" in line
