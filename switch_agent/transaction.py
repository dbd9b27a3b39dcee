# SPDX-License-Identifier: Apache-2.0
"""What was asked of a switch, and its answer as far as it has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from switch_agent.codec import Error, ProtocolError
from switch_agent.limits import Limits

Rows = np.ndarray[Any, np.dtype[np.void]]  # shape (n,)
Decode = Callable[[bytes], Rows]  # one part of an answer


@dataclass(slots=True)
class Pending:
    """A transaction that waits for its barrier, or for parts of an answer. Times are the loop's."""

    limits: Limits
    done: asyncio.Future[None]
    asked: float
    decode: Decode
    kind: int = 0  # of the multipart answer, 0 for a barrier
    heard: float = 0.0  # when the last part came
    errors: list[Error] = field(default_factory=list)
    parts: list[Rows] = field(default_factory=list)
    rows: int = 0
    empty: int = 0

    @property
    def due(self) -> float:
        """When it is overdue; a long answer comes in time as long as it comes."""
        return min(max(self.asked, self.heard) + self.limits.answer, self.asked + self.limits.statistics)

    @property
    def overdue(self) -> str:
        reason = f"the switch has not answered for {self.limits.answer:g} s"
        if self.parts:
            reason = f"{reason}, or statistics have no end for {self.limits.statistics:g} s"
        return reason

    def complete(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def refused(self, error: Error) -> None:
        """Raises ProtocolError."""
        if len(self.errors) >= self.limits.errors:
            raise ProtocolError("the switch answers with more errors than it was sent messages")
        self.errors.append(error)
        if self.kind:
            self.complete()

    def add(self, body: bytes, more: bool, now: float) -> None:
        """Raises ProtocolError."""
        self.heard = now
        part = self.decode(body)
        self.rows += len(part)
        self.empty += not len(part) and more
        if self.empty > self.limits.empty:
            raise ProtocolError("statistics that say nothing and do not end")
        if self.rows > self.limits.flows:
            raise ProtocolError(f"statistics of more than {self.limits.flows} flows")
        self.parts.append(part)
        if not more:
            self.complete()
