# SPDX-License-Identifier: Apache-2.0
"""Proof that a switch has done what it was told: packets that come back only by what was written.

Switches are known to answer a barrier before their tables are written. Two kinds of proof, for `barrier: probe`:

- *In order* (`Probes`): each transaction ends with a barrier and a new version of one rule, which matches only what we
  send ourselves (in_port CONTROLLER) and has a number in its cookie. A packet-out comes back with the number of the last
  version that is in the tables, so that one number proves all transactions up to it. This needs a switch that
  carries out what stands before a barrier first, however early it answers.
- *By the very rules* (`frame_of`): a frame that rules would take somewhere else comes back once they are gone.

No customer can send what is taken for a probe: nobody else has the port CONTROLLER, and each frame has a random number.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections.abc import Callable

from switch_agent import codec
from switch_agent.codec import PacketIn
from switch_agent.pipeline import (
    IPV4,
    PROBE_COOKIE,
    PROBE_MASK,
    PROBE_PRIORITY,
    PROBE_TYPE,
    TCP,
    Rule,
    ToController,
    mac_text,
)

NONCE_BYTES = 16
_SEQUENCE_AT, _SALT_AT = 8, 40  # bits of the cookie: kind, 32 bits of sequence, 20 of salt
_SEQUENCE, _SALT = 0xFFFF_FFFF, (1 << 20) - 1
_SHORTEST = 60  # bytes of a frame, without its checksum


def random_mac() -> int:
    """48 bits that no other device has: locally administered, unicast."""
    return secrets.randbits(48) & ~(3 << 40) | 2 << 40


def frame_of(rule: Rule, source: int) -> bytes:
    """A frame from the MAC ``source`` that ``rule`` matches, unlike any other."""

    def wanted(name: str, default: int) -> int:
        return int(str(rule.match.get(name, default)))

    kind, tag = wanted("eth_type", PROBE_TYPE), wanted("vlan_vid", 0) & 0xFFF
    destination = str(rule.match.get("eth_dst", mac_text(source)))
    frame = bytes.fromhex(destination.replace(":", "")) + source.to_bytes(6, "big")
    if tag:
        frame += b"\x81\x00" + tag.to_bytes(2, "big")
    frame += kind.to_bytes(2, "big")
    body = os.urandom(NONCE_BYTES)
    if kind == IPV4:
        flags = rule.match.get("tcp_flags", (0,))
        head = bytes(12) + bytes((0x50, int(flags[0]) if isinstance(flags, tuple) else 0)) + bytes(6)
        body = _ipv4(
            wanted("ip_proto", TCP), wanted("ip_dscp", 0) << 2, head + body
        )  # of TCP; the first bytes of another one's are 0
    return (frame + body).ljust(_SHORTEST, b"\0")


def _ipv4(protocol: int, tos: int, payload: bytes) -> bytes:
    """From and to addresses for documentation (RFC 5737), so that no session matches it."""
    addresses = bytes((192, 0, 2, 1, 192, 0, 2, 2))
    head = struct.pack("!BBHHHBBH", 0x45, tos, 20 + len(payload), 0, 0, 2, protocol, 0) + addresses
    checksum: int = -sum(struct.unpack("!10H", head)) % 0xFFFF
    return head[:10] + checksum.to_bytes(2, "big") + head[12:] + payload


class Probes:
    """Those of one connection. ``encode`` makes the flow-mod that adds a rule."""

    def __init__(self, encode: Callable[[Rule], bytes]) -> None:
        own = Rule(PROBE_PRIORITY, {"in_port": codec.CONTROLLER_PORT}, (ToController(),), PROBE_COOKIE)
        self._salt = secrets.randbits(20)  # what is left of an earlier connection proves nothing
        self._flow_mod = encode(own)
        self._sequence = 0
        self._numbered: dict[int, asyncio.Future[None]] = {}
        self._frames: dict[tuple[int, bytes], asyncio.Future[None]] = {}
        self._own = frame_of(own, random_mac())
        self.packet_out = codec.packet_out(self._own, port=codec.TABLE_PORT)

    def version(self, txid: int) -> tuple[bytes, int]:
        """The flow-mod of the next version of the rule, and its number; to be written in this order."""
        self._sequence = self._sequence + 1 & _SEQUENCE
        cookie = PROBE_COOKIE | self._salt << _SALT_AT | self._sequence << _SEQUENCE_AT
        head = struct.pack("!4sIQ", self._flow_mod[:4], txid, cookie)
        return head + self._flow_mod[len(head) :], self._sequence

    def numbered(self, number: int) -> asyncio.Future[None]:
        """Done once this version of the rule, or a later one, has returned a packet; ``forget`` it then."""
        return self._numbered.setdefault(number, asyncio.get_running_loop().create_future())

    def frame(self, in_port: int, frame: bytes) -> asyncio.Future[None]:
        """Done once this very frame has come back as if from this port; ``forget`` it then."""
        return self._frames.setdefault((in_port, frame), asyncio.get_running_loop().create_future())

    def forget(self, future: asyncio.Future[None]) -> None:
        future.cancel()
        self._numbered = {key: one for key, one in self._numbered.items() if one is not future}
        self._frames = {key: one for key, one in self._frames.items() if one is not future}

    def fail(self, error: Exception) -> None:
        """The connection has ended: nothing that waits will come back."""
        for future in (*self._numbered.values(), *self._frames.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # looked at

    def returned(self, event: PacketIn) -> bool:
        """Whether it is a probe, and none of anybody's traffic."""
        if (wanted := self._frames.get((event.in_port, event.frame))) is not None:
            _done(wanted)
            return True
        if event.in_port != codec.CONTROLLER_PORT:
            return False
        ours = event.frame == self._own and event.cookie & PROBE_MASK == PROBE_COOKIE
        if ours and event.cookie >> _SALT_AT & _SALT == self._salt:
            proved = event.cookie >> _SEQUENCE_AT & _SEQUENCE
            for number, future in self._numbered.items():
                if (proved - number & _SEQUENCE) < 1 << 31:  # up to it, in a circle of 32 bits
                    _done(future)
        return True


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def refused(cookie: int | None) -> bool:
    """Whether the flow-mod with this cookie was a version of the rule."""
    return cookie is not None and cookie & PROBE_MASK == PROBE_COOKIE
