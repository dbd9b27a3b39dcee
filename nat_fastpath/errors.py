# SPDX-License-Identifier: Apache-2.0
"""What a core says when it cannot go on alone."""

from typing import Any


class EventRingFull(BufferError):
    """Of the ``records`` of a call those of ``rest`` are left to be done, and ``result`` is what the others gave."""

    def __init__(self, rest: Any, records: int, result: int) -> None:
        super().__init__(
            f"the event ring is full: {records - len(rest)} of {records} records are done; "
            "take events() and go on with the others"
        )
        self.rest = rest
        self.result = result
