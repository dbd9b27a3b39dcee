# SPDX-License-Identifier: Apache-2.0
"""What a seed draws: what goes wrong, and how both sides are set up."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nat_control.sync.actions import Limits, Mode

FAULTS = {
    "crash": "an instance dies between any two actions, and starts anew",
    "cut": "the connection is lost at any byte, which each side notices in its own time",
    "ack": "the connection or the instance dies as it acknowledges what it has done",
    "leave": "an instance leaves on purpose",
    "split": "no connection for up to half a minute, and both sides carry traffic",
    "hang": "a data plane does nothing for a while",
    "slow": "a data plane takes its time, and installs in parts",
    "stall": "the control program stands still, its packets go on",
    "freeze": "an instance stands still with all its packets; its peer may take it for dead",
    "full": "a data plane has room for a few sessions, at times for fewer or more",
    "refuse": "a data plane refuses some sessions for a while",
    "clock": "a clock jumps ahead, and runs at another pace",
    "early": "a switch acknowledges rules that it has not written yet, or never writes",
    "mute": "a data plane never answers",
    "forgetful": "events of a data plane are lost",
    "gaps": "changes never come",
    "replay": "messages come twice, in another order, or again from an earlier connection",
}
# What a peer or a plane must not do; both sides must agree in the end all the same.
BROKEN = frozenset(("forgetful", "gaps", "early", "replay"))


@dataclass(frozen=True, slots=True)
class Scenario:
    faults: frozenset[str]
    mode: Mode
    probe: bool  # a plane asks the rule itself whether it is there, and not the switch
    limits: Limits
    crash_rate: float  # of each action
    hands_over: bool
    timeout: float  # seconds that a session lives without packets
    purpose: float  # sessions per second that end on purpose

    @property
    def text(self) -> str:
        few = f"batch {self.limits.batch}, window {self.limits.window}, waiting {self.limits.waiting}"
        return f"{self.mode.value}, {few}, timeout {self.timeout:.0f}; faults: {', '.join(sorted(self.faults)) or 'none'}"

    @property
    def lies(self) -> bool:
        """Whether an acknowledgement may be wrong."""
        return "early" in self.faults and not self.probe

    @property
    def broken(self) -> bool:
        return bool(self.faults & BROKEN - {"early"}) or self.lies


def draw(seed: int, rng: random.Random) -> Scenario:
    """One seed in nine has no faults; the others have one for certain, so that none is rare, and perhaps others."""
    names = list(FAULTS)
    chosen = []
    if seed % 9:
        chosen = [names[seed % len(names)]]
        chosen += [name for name in names if rng.random() < rng.choice([0.0, 0.1, 0.2])]
    faults = frozenset(chosen)
    return Scenario(
        faults,
        rng.choice([Mode.SYNCHRONOUS, Mode.SYNCHRONOUS, Mode.ASYNCHRONOUS]),
        rng.random() < 0.5,
        Limits(
            batch=rng.choice([1, 3, 64]),
            window=rng.choice([1, 2, 8]),
            waiting=rng.choice([20, 400]),
            digest=3.0,
            offer=5.0,
        ),
        rng.choice([0.005, 0.02]) if "crash" in faults else 0.0,
        rng.random() < 0.3,
        rng.choice([6.0, 15.0]),
        rng.choice([0.2, 1.0, 3.0]),
    )
