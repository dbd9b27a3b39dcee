# SPDX-License-Identifier: Apache-2.0
"""What `doctor` finds: one thing, how bad it is, why it matters, and the commands that mend it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Command = tuple[str, ...]  # argv


class Severity(StrEnum):
    GOOD = "good"
    NOTE = "note"  # works; could be better, or is worth knowing
    WARNING = "warning"  # works worse than it could, or not in every case
    PROBLEM = "problem"  # does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """``check`` names it for programs, ``subject`` what it is about where there are several. Several commands are one remedy, in order; ``advice`` is for what no
    command does. Only an ``automatic`` remedy is run by --fix: the others interrupt traffic or need a reboot."""

    check: str
    severity: Severity
    what: str
    why: str = ""
    commands: tuple[Command, ...] = ()
    advice: str = ""
    automatic: bool = False
    subject: str = ""

    @property
    def remedy(self) -> tuple[str, ...]:
        return tuple(map(shlex.join, self.commands))

    def is_still(self, later: Finding) -> bool:
        """Whether ``later``, found after a remedy, says that it did not help; how it is put may differ."""
        return later.severity is not Severity.GOOD and (self.check, self.subject) == (
            later.check,
            later.subject,
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "subject": self.subject,
            "severity": self.severity.value,
            "what": self.what,
            "why": self.why,
            "commands": list(self.remedy),
            "advice": self.advice,
            "automatic": self.automatic,
        }


def good(check: str, what: str) -> Finding:
    return Finding(check, Severity.GOOD, what)


def write(value: str, path: str) -> Command:
    return ("sh", "-c", f"echo {shlex.quote(value)} > {path}")


def sysctl(key: str, value: int) -> Command:
    return ("sysctl", "-w", f"{key}={value}")
