# SPDX-License-Identifier: Apache-2.0
"""The other end of a memif, either role, as far as it takes to connect, to flood, and to go away in the midst of it.

The protocol is that of libmemif 2.0: messages of 128 bytes over a SOCK_SEQPACKET, a shared region with two rings.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct

ACK, HELLO, INIT, ADD_REGION, ADD_RING, CONNECT, CONNECTED = range(1, 8)
VERSION, COOKIE, NO_INTERRUPT, CLIENT_TO_SERVER = 0x200, 0x3E31F20, 1, 1
SLOTS_LOG2, BUFFER = 10, 2048
SLOTS = 1 << SLOTS_LOG2
RING = 128 + 16 * SLOTS  # two cache lines with head and tail, then the descriptors
HEAD, TAIL = 6, 64
SIZE = 2 * RING + 2 * SLOTS * BUFFER


class Client:
    """Connects to a memif server; ``offer`` fills its receive ring with the frame again. Raises OSError if it is refused."""

    def __init__(self, path: str, frame: bytes) -> None:
        self._memory = os.memfd_create("memif", os.MFD_ALLOW_SEALING)
        self._interrupts = [os.eventfd(0), os.eventfd(0)]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(10)
        try:
            os.ftruncate(self._memory, SIZE)
            self._shared = mmap.mmap(self._memory, SIZE)
            for ring in range(2):
                struct.pack_into("=IHH", self._shared, ring * RING, COOKIE, NO_INTERRUPT, 0)
                for slot in range(SLOTS):
                    at = 2 * RING + (ring * SLOTS + slot) * BUFFER
                    length = BUFFER if ring else len(frame)
                    struct.pack_into(
                        "=HHIII", self._shared, ring * RING + 128 + 16 * slot, 0, 0, length, at, 0
                    )
                    if not ring:
                        self._shared[at : at + len(frame)] = frame
            self._connect(path)
        except BaseException:
            self.close()
            raise

    def _connect(self, path: str) -> None:
        self._socket.connect(path)
        self._expect(HELLO)
        self._ask(INIT, struct.pack("=HIB", VERSION, 0, 0))
        self._ask(ADD_REGION, struct.pack("=HQ", 0, SIZE), self._memory)
        for ring, interrupt in enumerate(self._interrupts):
            flags = 0 if ring else CLIENT_TO_SERVER
            self._ask(ADD_RING, struct.pack("=HHHIBH", flags, 0, 0, ring * RING, SLOTS_LOG2, 0), interrupt)
        self._ask(CONNECT, b"peer", answer=CONNECTED)

    def _ask(self, kind: int, body: bytes, fd: int = -1, answer: int = ACK) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        self._socket.sendmsg([(struct.pack("=H", kind) + body).ljust(128, b"\0")], rights)
        self._expect(answer)

    def _expect(self, kind: int) -> None:
        message = self._socket.recv(128)
        found = struct.unpack_from("=H", message)[0] if message else None
        if found != kind:
            raise ConnectionError(f"message {found}, not {kind}")

    def _get(self, ring: int, what: int) -> int:
        return int(struct.unpack_from("=H", self._shared, ring * RING + what)[0])

    def offer(self) -> None:
        """All slots of both rings are the server's."""
        for ring in range(2):
            head = (self._get(ring, TAIL) + SLOTS) & 0xFFFF
            struct.pack_into("=H", self._shared, ring * RING + HEAD, head)

    @property
    def received(self) -> int:
        """Frames that the server took, modulo 65536."""
        return self._get(0, TAIL)

    @property
    def sent(self) -> int:
        """Frames that it sent, likewise."""
        return self._get(1, TAIL)

    def close(self) -> None:
        """Like a process that is killed: no message, the socket is just gone."""
        self._socket.close()
        for fd in (self._memory, *self._interrupts):
            os.close(fd)


class Server:
    """Takes a client; ``offer`` fills its receive ring with whatever its buffers hold. Raises OSError if it goes."""

    def __init__(self, listener: socket.socket) -> None:
        self._socket, _ = listener.accept()
        self._socket.settimeout(10)
        self._files: list[int] = []
        self._ring = -1
        try:
            self._send(HELLO, struct.pack("=32sHHHHHB", b"peer", VERSION, VERSION, 255, 255, 255, 14))
            while self._answer():
                pass
        except BaseException:
            self.close()
            raise

    def _send(self, kind: int, body: bytes = b"") -> None:
        self._socket.send((struct.pack("=H", kind) + body).ljust(128, b"\0"))

    def _answer(self) -> bool:
        """Takes the next message; false when that was the last."""
        message, files, *_ = socket.recv_fds(self._socket, 128, 1)
        self._files += files
        if not message:
            raise ConnectionError("gone")
        kind = struct.unpack_from("=H", message)[0]
        if kind == ADD_REGION:
            _, size = struct.unpack_from("=HQ", message, 2)
            self._shared = mmap.mmap(files[0], size)
        elif kind == ADD_RING:
            flags, _, _, offset, *_ = struct.unpack_from("=HHHIBH", message, 2)
            self._ring = self._ring if flags & CLIENT_TO_SERVER else offset
        self._send(CONNECTED if kind == CONNECT else ACK)
        return bool(kind != CONNECT)

    def offer(self) -> None:
        """All buffers of the ring are the client's again."""
        self._shared[self._ring + TAIL : self._ring + TAIL + 2] = self._shared[
            self._ring + HEAD : self._ring + HEAD + 2
        ]

    @property
    def received(self) -> int:
        """Buffers that the client gave or gave again, modulo 65536."""
        return int(struct.unpack_from("=H", self._shared, self._ring + HEAD)[0])

    def close(self) -> None:
        self._socket.close()
        for fd in self._files:
            os.close(fd)
