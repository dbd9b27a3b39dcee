# SPDX-License-Identifier: Apache-2.0
"""What comes on a connection, without a task between: a stream wakes one for each piece, a turn of the loop later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Straight(asyncio.Protocol):
    """Gives ``received`` what comes on a stream's connection from here on, at once; the rest stays with the stream.

    An exception of ``received`` ends it: see ``ended``.
    """

    def __init__(self, writer: asyncio.StreamWriter, received: Callable[[bytes], None]) -> None:
        self._stream = writer.transport.get_protocol()
        self._received = received
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.over = asyncio.Event()  # nothing comes any more
        writer.transport.set_protocol(self)

    async def ended(self, reader: asyncio.StreamReader) -> None:
        """Until the other end closes; what ``reader`` has by now comes first. Raises ConnectionError, and what ``received`` does."""
        reader.feed_eof()
        if early := await reader.read():
            self.data_received(early)
        await self._end

    def data_received(self, data: bytes) -> None:
        if self._end.done():
            return
        try:
            self._received(data)
        except Exception as error:  # whoever waits for the end gets it
            self._end.set_exception(error)

    def eof_received(self) -> bool | None:
        self._ends(None)
        assert isinstance(self._stream, asyncio.Protocol)
        return self._stream.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._ends(error)
        self._stream.connection_lost(error)

    def _ends(self, error: Exception | None) -> None:
        self.over.set()
        if self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)

    def pause_writing(self) -> None:
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        self._stream.resume_writing()
