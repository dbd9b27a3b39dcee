# SPDX-License-Identifier: Apache-2.0
"""What a core says when it cannot go on alone."""


class EventRingFull(BufferError):
    """Of the ``records`` of a call only the first ``handled`` are done, and ``result`` is what they gave."""

    def __init__(self, handled: int, records: int, result: int) -> None:
        super().__init__(
            f"the event ring is full: {handled} of {records} records are done; "
            "take events() and go on with the others"
        )
        self.handled = handled
        self.result = result
