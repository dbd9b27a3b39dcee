# SPDX-License-Identifier: Apache-2.0
"""TLS for OpenFlow connections, in a process of its own that does nothing else.

The takeover is written by a C thread, as plain bytes on a descriptor, while the agent may be busy or in a garbage collection. So the
encryption cannot be the agent's: this process takes the switch's connection, and gives the agent one end of a pair of
sockets for it. It ends when the agent does, by whatever death, since its descriptor of the agent's ends then.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

from nat_control.tls import Tls, context, reason

CONNECTIONS = 8  # at a time, those in their handshake among them; a switch needs one
HANDSHAKE = 5.0  # seconds
PRIORITY = 19  # beneath the heartbeat's threads
MESSAGE = 512  # bytes about a connection that came to nothing, at most
RESTART = 1.0  # seconds until a relay that has ended is started again


class _Pipe(asyncio.Protocol):
    """One of two ends: passes what comes to the other end, no faster than that takes it."""

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        self.other: _Pipe | None = None
        self.transport: asyncio.Transport | None = None
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.other and self.other.transport:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other and self.other.transport:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other and self.other.transport:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """What was written to the other end still leaves."""
        other, self.other, self.transport = self.other, None, None
        if other and other.transport:
            other.transport.close()
        self._ended()


class _Relay:
    """The process: ``listener`` has the address, ``agent`` is told of each connection."""

    def __init__(self, listener: socket.socket, agent: socket.socket, tls: ssl.SSLContext) -> None:
        self._listener, self._agent, self._tls = listener, agent, tls
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._agent, ended.set)  # it never says anything
        accepting = loop.create_task(self._accept())
        await ended.wait()
        accepting.cancel()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    continue  # it went away before it was taken
                await asyncio.sleep(RESTART)
                continue
            if self._number >= CONNECTIONS:
                self._tell(f"{CONNECTIONS} TLS connections stand already")
                connection.close()
                continue
            self._number += 1
            task = loop.create_task(self._relay(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _relay(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ours, agents = socket.socketpair()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        ours.setblocking(False)
        plain, secret = _Pipe(self._end), _Pipe()
        plain.other, secret.other = secret, plain
        with agents:
            await loop.connect_accepted_socket(lambda: plain, ours)
            try:
                await loop.connect_accepted_socket(
                    lambda: secret, connection, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE
                )
                socket.send_fds(self._agent, [b"+"], [agents.fileno()])
            except OSError as error:
                if plain.transport:
                    plain.transport.abort()
                self._tell(_why(error))

    def _end(self) -> None:
        self._number -= 1
        asyncio.get_running_loop().call_soon(
            gc.collect
        )  # what hung together in circles; nobody is kept waiting

    def _tell(self, text: str) -> None:
        with contextlib.suppress(BlockingIOError):  # an agent that is busy has enough such lines
            self._agent.send(text.encode()[:MESSAGE])


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the switch's certificate is refused: {error.verify_message}"
    if isinstance(error, ConnectionAbortedError):  # asyncio's word for a handshake that takes too long
        return f"no TLS handshake within {HANDSHAKE:g} s"
    return reason(error) if isinstance(error, ssl.SSLError) or error.errno else "it ends in the TLS handshake"


def main() -> None:
    listener, agent, ca, certificate, key, urgent = sys.argv[1:]
    for ignored in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they are the agent's, which may have something left to say
        signal.signal(ignored, signal.SIG_IGN)
    tls = context(Tls(Path(ca), Path(certificate), Path(key)), listens=True, minimum=ssl.TLSVersion.TLSv1_2)
    if urgent == "urgent":
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    gc.collect()
    gc.freeze()
    gc.disable()
    sockets = socket.socket(fileno=int(listener)), socket.socket(fileno=int(agent))
    for one in sockets:
        one.setblocking(False)
    asyncio.run(_Relay(*sockets, tls).run())


# -- the agent's side --------------------------------------------------------------------------------------


class Relay:
    """Listens at an address, and keeps the process alive. ``taken`` gets each connection, ``refused`` why one came to nothing.

    ``urgent``: with a realtime priority, where that is allowed; for a connection on which next to nothing is written.
    """

    def __init__(
        self,
        tls: Tls,
        *,
        urgent: bool,
        taken: Callable[[socket.socket], None],
        refused: Callable[[str], None],
    ) -> None:
        context(tls, listens=True, minimum=ssl.TLSVersion.TLSv1_2)
        self._tls, self._urgent, self._taken, self._refused = tls, urgent, taken, refused
        self._listener: socket.socket | None = None
        self._running: asyncio.Task[None] | None = None
        self.pid = 0

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises OSError."""
        self._listener = socket.create_server((host, port))
        self._listener.setblocking(False)
        self._running = asyncio.create_task(self._keep(self._listener))
        return int(self._listener.getsockname()[1])

    async def stop(self) -> None:
        if self._running:
            self._running.cancel()
            await asyncio.wait([self._running])
        if self._listener:
            self._listener.close()

    async def _keep(self, listener: socket.socket) -> None:
        while True:
            try:
                await self._once(listener)
                self._refused("the process that does TLS has ended, and is started again")
            except OSError as error:
                self._refused(f"the process that does TLS cannot be started: {error.strerror}")
            await asyncio.sleep(RESTART)

    async def _once(self, listener: socket.socket) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its:
            fds = listener.fileno(), its.fileno()
            files = (str(path) for path in (self._tls.ca, self._tls.certificate, self._tls.key))
            how = "urgent" if self._urgent else "ordinary"
            module = [sys.executable, "-P", "-m", "switch_agent.relay"]
            process = await asyncio.create_subprocess_exec(
                *module, *map(str, fds), *files, how, pass_fds=fds, stdin=asyncio.subprocess.DEVNULL
            )
            its.close()
            self.pid = process.pid
            try:
                await self._hear(ours)
            finally:
                ours.close()  # its order to end
                await process.wait()

    async def _hear(self, ours: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ours.setblocking(False)
        arrived = asyncio.Event()
        loop.add_reader(ours, arrived.set)
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                try:
                    said, fds, _, _ = socket.recv_fds(ours, MESSAGE, 1)
                except BlockingIOError:
                    continue
                if not said:
                    return
                for fd in fds:
                    self._taken(socket.socket(fileno=fd))
                if not fds:
                    self._refused(said.decode(errors="replace"))
        except ConnectionError:
            return
        finally:
            loop.remove_reader(ours)


if __name__ == "__main__":
    main()
