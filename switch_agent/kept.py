# SPDX-License-Identifier: Apache-2.0
"""That an operator has given the switch the traffic to keep: remembered over a restart of the agent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nat_control.config import Config


def file_of(config: Config) -> Path:
    """In ``switch.state``, or $TANDEM_NAT_STATE, or beside the socket."""
    state = (config.switch and config.switch.state) or os.environ.get("TANDEM_NAT_STATE")
    return Path(state or config.control.socket.parent) / f"{config.instance}.kept"


class Kept:
    """True while the file is there; what cannot be written is said, and then holds for this run only."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._now = path.exists()

    def __bool__(self) -> bool:
        return self._now

    def set(self, now: bool) -> None:
        if now is self._now:
            return
        self._now = now
        try:
            if now:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text("the switch keeps the traffic until `tandem-nat peer release`\n")
                if self._path.is_relative_to("/run") or self._path.is_relative_to("/var/run"):
                    self._say(
                        f"{self._path}: a reboot forgets that the switch keeps the traffic; `switch.state` can be a directory that lasts"
                    )
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            self._say(f"{self._path}: {error.strerror}: the next agent will not know who keeps the traffic")
