# SPDX-License-Identifier: Apache-2.0
"""What would happen to a packet: the question as a frame for the core, its answer in words.

The decisions are the core's own: the frame goes through it like any other, and what it changed is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Protocol

import numpy as np

from nat_fastpath.core_config import CoreConfig
from nat_fastpath.engine import (
    NEIGHBOUR_STATES,
    STEP_KINDS,
    TCP_STATES,
    VERDICT_HELP,
    VERDICT_NAMES,
    Explanation,
)

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
HEADER = {"icmp": 8, "tcp": 20, "udp": 8}
FLAGS = "FSRPAU"  # from the lowest bit
UNSEEN_MAC = 0x02_00_00_00_00_FE  # of a sender that nobody has seen yet
FILTERINGS = ("address-and-port-dependent", "address-dependent", "endpoint-independent")
PENDING, FOREIGN = 1, 2
ANSWERS = {
    (0, 0): "echo reply",
    (3, 4): "fragmentation needed",
    (11, 0): "time exceeded",
}  # ICMP types and codes
FREE, RESTING, TAKEN = range(3)  # enum nat_slot
ADDRESS_FAULTS = (  # enum nat_address_fault
    "",
    "is of this network or this host (0.0.0.0/8, 127.0.0.0/8), and never forwarded",
    "is multicast, which sends nothing",
    "is this NAT's own: somebody else uses it, or this comes back in a loop",
    "is of the pool: somebody else uses it, or this comes back in a loop",
    "is the broadcast or network address of a subnet here",
)
DIRECTED, TURNED = 0x20, 0x40  # NAT_HANDOFF_*

Endpoint = tuple[IPv4Address, int]
Records = np.ndarray[Any, np.dtype[np.void]]


class QuestionError(ValueError):
    """One line: what of the question cannot be."""


class ExplainingCore(Protocol):
    """What is needed of a core."""

    @property
    def config(self) -> CoreConfig: ...
    def explain(self, port: int, frame: bytes, length: int | None = None) -> Explanation: ...
    def neighbours(self) -> Records: ...
    def find(
        self, protocol: int, source: tuple[int, int], destination: tuple[int, int], side: str = "internal"
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Question:
    """A packet; ``length`` is that of the IP packet, ``side`` where it comes from ("": where its source is)."""

    protocol: str
    source: Endpoint
    destination: Endpoint
    side: str = ""
    flags: str = ""  # of TCP, such as "SA"; "" is a SYN, or an ACK when there is a session
    length: int = 0  # 0: no more than headers
    ttl: int = 64
    dont_fragment: bool = False


def endpoint(text: str, what: str) -> Endpoint:
    """(address, port) of "10.0.0.7:5000" or "10.0.0.7"."""
    address, colon, port = text.partition(":")
    try:
        number = int(port) if colon else 0
        if not 0 <= number <= 65535 or (colon and not port.isdecimal()):
            raise ValueError
        return IPv4Address(address), number
    except ValueError:
        raise QuestionError(f"{what}: {text!r} is not ADDRESS:PORT, such as 10.0.0.7:5000") from None


def question(body: object) -> Question:
    """A Question from the object of a request; raises QuestionError."""
    if not isinstance(body, dict):
        raise QuestionError("explain: not an object")
    known = ("source", "destination", "protocol", "from", "flags", "length", "ttl", "dont_fragment")
    if unknown := sorted(set(body) - set(known)):
        raise QuestionError(f"explain: unknown key {unknown[0]!r}; there are {', '.join(known)}")
    protocol = body.get("protocol", "udp")
    if protocol not in PROTOCOLS:
        raise QuestionError(f"protocol: {protocol!r} is none of {', '.join(PROTOCOLS)}")
    side = body.get("from", "")
    if side not in ("", "internal", "external"):
        raise QuestionError(f"from: {side!r} is neither internal nor external")
    flags = str(body.get("flags", "")).upper()
    if flags.strip(FLAGS):
        raise QuestionError(f"flags: {flags!r} are not of {FLAGS}")
    least = 20 + HEADER[protocol]
    numbers = {}
    for key, low, high in (("length", least, 65535), ("ttl", 1, 255)):
        value = body.get(key, {"length": least, "ttl": 64}[key])
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise QuestionError(f"{key}: {value!r} is not a number from {low} to {high}")
        numbers[key] = value
    return Question(
        protocol,
        endpoint(str(body.get("source", "")), "source"),
        endpoint(str(body.get("destination", "")), "destination"),
        side=side,
        flags=flags,
        dont_fragment=bool(body.get("dont_fragment")),
        **numbers,
    )


# -- the frame --------------------------------------------------------------------------------------------


def _best(config: CoreConfig, address: IPv4Address, side: str = "") -> Any:
    """The route with the longest prefix that covers it, on a port of that side; None."""
    found = [
        route
        for route in config.routes
        if int(address) >> (32 - route.length) == int(route.prefix) >> (32 - route.length)
        and side in ("", config.ports[route.port].side)
    ]
    return max(found, key=lambda route: route.length, default=None)


def _arrival(core: ExplainingCore, asked: Question) -> tuple[int, int]:
    """The port by which the packet comes, and the MAC that it comes from."""
    config = core.config
    route = _best(config, asked.source[0], asked.side)
    if route is None or (not asked.side and _best(config, asked.source[0]).port != route.port):
        sides = [port.side for port in config.ports]
        return sides.index(asked.side or "external"), UNSEEN_MAC
    hop = int(route.gateway) or int(asked.source[0])
    known = core.neighbours()
    rows = known[(known["port"] == route.port) & (known["address"] == hop) & (known["mac"] != 0)]
    return route.port, int(rows["mac"][0]) if len(rows) else UNSEEN_MAC


def _sum(data: bytes) -> int:
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").sum(dtype=np.uint64)
    total = int(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame_of(core: ExplainingCore, asked: Question) -> tuple[int, bytes, int, str]:
    """(port, the headers as a frame, the frame's whole length, TCP flags)."""
    port, mac = _arrival(core, asked)
    own = core.config.ports[port]
    (source, sport), (destination, dport) = asked.source, asked.destination
    inside = own.side == "internal"
    record = core.find(PROTOCOLS[asked.protocol], (int(source), sport), (int(destination), dport), own.side)
    if record is not None and inside and record["internal_mac"]:
        mac = int(record["internal_mac"])
    flags = asked.flags or ("S" if record is None else "A") if asked.protocol == "tcp" else ""

    length = max(asked.length, 20 + HEADER[asked.protocol])
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    if asked.protocol == "udp":
        transport = ports + (length - 20).to_bytes(2, "big") + b"\0\0"
    elif asked.protocol == "tcp":
        bits = sum(1 << FLAGS.index(flag) for flag in set(flags))
        transport = ports + bytes(8) + bytes((0x50, bits)) + b"\xff\xff" + bytes(4)
    else:
        kind, ident = (8, sport) if inside else (0, dport)
        transport = bytes((kind, 0)) + bytes(2) + ident.to_bytes(2, "big") + b"\0\1"
        transport = transport[:2] + _sum(transport).to_bytes(2, "big") + transport[4:]
    head = b"\x45\0" + length.to_bytes(2, "big") + b"\0\1" + (b"\x40\0" if asked.dont_fragment else b"\0\0")
    head += bytes((asked.ttl, PROTOCOLS[asked.protocol])) + b"\0\0" + source.packed + destination.packed
    head = head[:10] + _sum(head).to_bytes(2, "big") + head[12:]
    tag = b"\x81\0" + own.vlan.to_bytes(2, "big") if own.vlan else b""
    frame = own.mac + mac.to_bytes(6, "big") + tag + b"\x08\0" + head + transport
    if asked.protocol == "icmp":  # its checksum is looked at, over all of it
        frame += bytes(length - 28)
    return (
        port,
        frame,
        len(frame) - len(head) - len(transport) + length if asked.protocol != "icmp" else len(frame),
        flags,
    )


# -- the answer -------------------------------------------------------------------------------------------


def _dotted(address: Any) -> str:
    return str(IPv4Address(int(address)))


def _mac(number: int) -> str:
    return number.to_bytes(6, "big").hex(":")


def _limit(value: int) -> str:
    return f" of {value}" if value else ""


def _session_text(flags: int, state: int, idle: int, timeout: int, ident: int) -> str:
    tcp = f", TCP {TCP_STATES[state]}" if state else ""
    owner = ", owned by the peer" if flags & FOREIGN else ""
    return f"{ident:016x}{tcp}, idle for {idle / 1000:g} s of {timeout / 1000:g} s{owner}"


def step_text(step: Any, ports: Sequence[str], *, opened: bool = False) -> str:
    """One step in words; ``ports`` are their names. ``opened``: its session would come with this packet."""
    kind = STEP_KINDS[step["kind"]]
    address, port = _dotted(step["address"]), int(step["port"])
    value, limit, flag, ident = (int(step[name]) for name in ("value", "limit", "flag", "id"))
    if kind in ("session", "quoted"):
        new = "would be opened: " if opened else ""
        return new + _session_text(flag, port, value, limit, ident)
    if kind == "no_session":
        return "none has these ends"
    if kind == "route":
        way = f"via {_dotted(ident)}" if ident else "connected"
        return f"{address}/{value} {way} ({ports[port]}){'' if flag else ', which is the wrong side'}"
    if kind == "address":
        return f"{address} {ADDRESS_FAULTS[flag]}"
    if kind == "no_route":
        return f"none to {address} on that side"
    if kind == "next_hop":
        who = address if int(step["address"]) else "known by its MAC alone"
        name = NEIGHBOUR_STATES[flag]
        where = (
            f"MAC {_mac(ident)} {name}" if name != "incomplete" else f"MAC not known, {value} packets wait"
        )
        return f"{who} ({ports[port]}), {where}"
    if kind == "hairpin":
        return f"{address} is of the pool: the packet turns round to an inside host"
    if kind == "host":
        mappings, most = ident >> 32, ident & 0xFFFFFFFF
        return f"{address} has {value}{_limit(limit)} sessions, {mappings}{_limit(most)} mappings"
    if kind == "quota":
        return f"{address} is at its limit"
    if kind == "budget":
        if not flag:
            return f"{limit} new sessions per second are used up"
        return f"{limit} new sessions per second; after this one, {value} more may open at once"
    if kind == "tables":
        return f"{value} of {limit} sessions exist"
    if kind == "mapping":
        return f"{address}:{port} already, for {value} sessions"
    if kind == "no_mapping":
        return "none; a new one would be opened"
    if kind == "port":
        other = " and ".join(name for i, name in enumerate(("parity", "class")) if flag >> i & 1)
        why = f", of the other {other}, as none of its own is free" if other else ""
        return f"{address}:{port} would be taken{why}; {value} others are free there{_resting(limit)}"
    if kind == "no_port":
        return f"none is free on any address{_resting(limit)}"
    if kind == "slot":
        if flag == TAKEN:
            return f"{address}:{port} belongs to {_dotted(ident >> 16)}:{ident & 0xFFFF}"
        return (
            f"{address}:{port} {('is mapped to nobody', 'rests after its last use')[flag]}"
            if flag
            in (
                FREE,
                RESTING,
            )
            else f"{address}:{port} is no endpoint of the pool"
        )
    if kind == "filter":
        return f"{FILTERINGS[value]}: {address} {'is admitted' if flag else 'must be admitted'}"
    if kind == "tcp":
        return f"{TCP_STATES[value]} becomes {TCP_STATES[limit]}"
    if kind == "mtu":
        return f"{value} bytes are more than {limit}: {'must not be cut' if flag else 'cut into fragments'}"
    if kind == "handoff":
        if flag & TURNED:
            return f"worker {value} has the external port: it goes on there, from outside to inside"
        return f"worker {value} {'had the first fragment' if flag & DIRECTED else 'has this packet'}"
    if kind == "pending":
        return "waits until the peer, or the switch, has the session"
    return f"a later fragment, whose first {'was seen' if flag else 'was not seen yet'}"


def _resting(number: int) -> str:
    return f", {number} rest" if number else ""


def answer_in(frame: bytes) -> dict[str, Any]:
    """The NAT's own ICMP message in a frame that goes back."""
    ip = 18 if frame[12:14] == b"\x81\0" else 14
    source, destination = (str(IPv4Address(frame[at : at + 4])) for at in (ip + 12, ip + 16))
    kind, code = frame[ip + 20 : ip + 22]
    mtu = int.from_bytes(frame[ip + 26 : ip + 28], "big")
    name = ANSWERS.get((kind, code), f"type {kind} code {code}")
    message = f"icmp {name}" + (f", MTU {mtu}" if (kind, code) == (3, 4) else "")
    return {"message": message, "source": source, "destination": destination}


def ends_after(frame: bytes) -> dict[str, Any]:
    """Addresses of an IPv4 frame as it would leave."""
    ip = 18 if frame[12:14] == b"\x81\0" else 14
    l4 = ip + (frame[ip] & 15) * 4
    source, destination = (str(IPv4Address(frame[at : at + 4])) for at in (ip + 12, ip + 16))
    first, second = (int.from_bytes(frame[at : at + 2], "big") for at in (l4, l4 + 2))
    if frame[ip + 9] == 1:
        ident = int.from_bytes(frame[l4 + 4 : l4 + 6], "big")
        first, second = (ident, 0) if frame[l4] == 8 else (0, ident)
    return {"source": f"{source}:{first}", "destination": f"{destination}:{second}", "ttl": frame[ip + 8]}


def answer(core: ExplainingCore, asked: Question, ports: Sequence[str]) -> dict[str, Any]:
    """What the core says, as an operator reads it."""
    port, frame, length, flags = frame_of(core, asked)
    told = core.explain(port, frame, length)
    verdict = VERDICT_NAMES[told.verdict]
    leaves = verdict in ("forward", "fragment", "held")
    steps = []
    room = False  # was found in the tables: the session after that is a new one
    for step in told.steps:
        kind = STEP_KINDS[step["kind"]]
        room = kind == "tables" or (room and kind != "no_session")
        figures = {name: int(step[name]) for name in ("address", "port", "value", "limit", "flag", "id")}
        steps.append({"step": kind, "text": step_text(step, ports, opened=room), **figures})
    return {
        "packet": {
            "protocol": asked.protocol,
            "source": f"{asked.source[0]}:{asked.source[1]}",
            "destination": f"{asked.destination[0]}:{asked.destination[1]}",
            "flags": flags,
            "from": ports[port],
            "mac": frame[6:12].hex(":"),
            "length": length,
        },
        "steps": steps,
        "verdict": verdict,
        "meaning": VERDICT_HELP[told.verdict],
        "becomes": {**ends_after(told.frame), "to": ports[told.port]} if leaves else None,
        "answer": {**answer_in(told.frame), "to": ports[told.port]} if verdict == "reply" else None,
    }
