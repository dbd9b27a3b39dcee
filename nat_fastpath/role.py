# SPDX-License-Identifier: Apache-2.0
"""Who of two servers carries: the words that cores, heartbeat and control side of one of them share (core/role.h)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

WORDS = (
    "state",
    "term",
    "probe_us",
    "fence_us",
    "answered",
    "unanswered",
    "fenced",
    "announce",
    "unfit",
    "yields",
    "both",
)


class RoleState(IntEnum):
    """``enum nat_role_state``."""

    ACTIVE = 0
    STANDBY = 1
    PROBING = 2


class Role:
    """``probe``: seconds that nobody answers before PROBING becomes ACTIVE; ``fence``: a worker that carries and stood
    still for longer probes first, 0: never; ``both``: the peer's death is believed without a probe. Keep it as long as anything has its ``address``.

    The state is what cores and heartbeat have made of it by now; each word is read and written whole.
    """

    def __init__(self, state: RoleState, *, probe: float, fence: float = 0, both: bool = False) -> None:
        self._words = np.zeros(1, [(name, "<u4") for name in WORDS])
        self.state = state
        self._words["probe_us"] = round(probe * 1e6)
        self.fence = fence
        self._words["both"] = both

    @property
    def address(self) -> int:
        """Of the ``struct nat_role``."""
        return int(self._words.ctypes.data)

    @property
    def state(self) -> RoleState:
        return RoleState(int(self._words["state"][0]))

    @state.setter
    def state(self, state: RoleState) -> None:
        self._words["state"] = state

    @property
    def term(self) -> int:
        """Counts takeovers, over both servers."""
        return int(self._words["term"][0])

    @term.setter
    def term(self, term: int) -> None:
        self._words["term"] = term & 0xFFFFFFFF

    @property
    def unfit(self) -> bool:
        """Whether we should not carry; the heartbeat tells the peer."""
        return bool(self._words["unfit"][0])

    @unfit.setter
    def unfit(self, unfit: bool) -> None:
        self._words["unfit"] = unfit

    @property
    def yields(self) -> bool:
        """Whether the peer can carry, so that the heartbeat gives it the role when a worker of ours stands still."""
        return bool(self._words["yields"][0])

    @yields.setter
    def yields(self, yields: bool) -> None:
        self._words["yields"] = yields

    @property
    def fence(self) -> float:
        """Seconds."""
        return int(self._words["fence_us"][0]) / 1e6

    @fence.setter
    def fence(self, seconds: float) -> None:
        self._words["fence_us"] = round(seconds * 1e6)

    def counts(self) -> dict[str, int]:
        """Probes that were ``answered`` and ``unanswered``, and workers that were ``fenced``."""
        return {name: int(self._words[name][0]) for name in WORDS[4:7]}
