# SPDX-License-Identifier: Apache-2.0
"""What an operator asks of a running core beyond its figures: explanations, traces, the stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from typing import Any

import numpy as np

from nat_control.api import PROTOCOL_NAMES, PROTOCOLS, ApiError, Conversation, Verb, parse_endpoint
from nat_control.dataplane import Events
from nat_control.explain import FLAGS, QuestionError, answer, question
from nat_fastpath.cores import AnyCore
from nat_fastpath.engine import EVENT, TCP_STATES, VERDICT_NAMES

SUBSCRIBER_EVENTS = 65536  # kept for one that reads slowly, 10 MB; the oldest are lost then
TRACE_STEP = 0.1  # seconds between two looks at a trace
TRACE_PACKETS, TRACE_SECONDS = 100_000, 3600  # at most
TOP = 256  # hosts in an answer


class Subscriber:
    """Events for one reader, bounded."""

    def __init__(self, bound: int = SUBSCRIBER_EVENTS) -> None:
        self._bound = bound
        self._waiting: deque[Events] = deque()
        self._there = asyncio.Event()
        self._n = 0
        self.lost = 0

    def put(self, events: Events) -> None:
        self._waiting.append(events)
        self._n += len(events)
        while self._n > self._bound:
            oldest, over = self._waiting.popleft(), self._n - self._bound
            if len(oldest) > over:
                self._waiting.appendleft(oldest[over:])
            gone = min(len(oldest), over)
            self._n -= gone
            self.lost += gone
        self._there.set()

    async def take(self) -> tuple[Events, int]:
        """Some events, the oldest first, and how many were lost before them."""
        await self._there.wait()
        events, lost = self._waiting.popleft(), self.lost
        self._n -= len(events)
        self.lost = 0
        if not self._waiting:
            self._there.clear()
        return events, lost


class Live:
    """The verbs of the operator's socket for ``core``, whose ports have these names."""

    def __init__(self, core: AnyCore, ports: Sequence[str]) -> None:
        self._core = core
        self._ports = ports
        self._subscribers: set[Subscriber] = set()
        self._traced = ""  # by the trace that runs

    @property
    def verbs(self) -> Mapping[str, Verb]:
        return {"explain": self._explain, "trace": self._trace, "events": self._events}

    def publish(self, events: Events) -> None:
        """To all that listen; never waits for any of them."""
        for subscriber in self._subscribers:
            subscriber.put(events)

    def hosts(self) -> dict[str, Any]:
        """Inside hosts, those with the most sessions first."""
        hosts = self._core.hosts()
        order = np.argsort(hosts["sessions"], kind="stable")[::-1][:TOP]
        return {
            "total": len(hosts),
            "top": [
                {
                    "address": str(IPv4Address(int(host["address"]))),
                    "external": str(IPv4Address(int(host["external_addr"]))),
                    **{name: int(host[name]) for name in ("sessions", "mappings", "refused")},
                }
                for host in hosts[order]
            ],
        }

    # -- verbs ---------------------------------------------------------------------------------------------

    async def _explain(self, body: object, conversation: Conversation) -> None:
        try:
            asked = question(body)
        except QuestionError as error:
            raise ApiError(str(error)) from None
        told = await conversation.run(answer, self._core, asked, self._ports)
        await conversation.send({"explain": told})

    async def _events(self, body: object, conversation: Conversation) -> None:
        if body not in ({}, True):
            raise ApiError("events: takes nothing but {}")
        subscriber = Subscriber()
        self._subscribers.add(subscriber)
        try:
            await conversation.send_dtype(EVENT)
            async with conversation.until_gone() as gone:
                while not gone.done():
                    taking = asyncio.ensure_future(subscriber.take())
                    try:
                        await asyncio.wait((taking, gone), return_when=asyncio.FIRST_COMPLETED)
                        if not taking.done():
                            break
                    finally:
                        taking.cancel()  # also when we are ended; one that is done stays done
                    events, lost = taking.result()
                    await conversation.send_records(events, lost=lost)
        finally:
            self._subscribers.discard(subscriber)
        await conversation.send({"end": {}})

    async def _trace(self, body: object, conversation: Conversation) -> None:
        flow, packets, seconds = _trace_request(body)
        run = conversation.run
        token = await run(lambda: self._core.trace_start(packets, seconds, **flow))
        if token is None:
            raise ApiError(
                f"another trace runs, of {self._traced or 'any flow'}: it ends by itself; try then"
            )
        self._traced = _flow_text(flow)
        seen, ended = 0, False
        try:
            async with conversation.until_gone() as gone:
                while not ended and not gone.done():
                    await asyncio.wait((gone,), timeout=TRACE_STEP)
                    trace = await run(self._core.trace_read, token)
                    ended = not trace.running
                    seen += len(trace.entries)
                    if len(trace.entries):
                        await conversation.send({"rows": trace_rows(trace.entries, self._ports)})
            why = "packets" if seen + trace.missed >= packets else "time" if ended else "asked to"
            await conversation.send({"end": {"packets": seen, "missed": trace.missed, "why": why}})
        finally:
            # at once, not awaited: this may run while everything ends
            await asyncio.shield(run(self._stop_trace, token))

    def _stop_trace(self, token: int) -> None:
        with contextlib.suppress(KeyError, TimeoutError, RuntimeError):  # it has ended, or the core does
            self._core.trace_read(token, stop=True)


def _trace_request(body: object) -> tuple[dict[str, int], int, float]:
    if not isinstance(body, dict):
        raise ApiError("trace: not an object")
    known = ("internal", "external", "remote", "protocol", "packets", "seconds")
    if unknown := sorted(set(body) - set(known)):
        raise ApiError(f"trace: unknown key {unknown[0]!r}; there are {', '.join(known)}")
    flow: dict[str, int] = {}
    for side in ("internal", "external", "remote"):
        if side in body:
            address, mask, port = parse_endpoint(side, body[side])
            if mask not in (0, 0xFFFFFFFF):
                raise ApiError(
                    f"{side}: {body[side]!r} is a network; a trace takes ADDRESS, ADDRESS:PORT or :PORT"
                )
            flow[f"{side}_addr"], flow[f"{side}_port"] = address, port or 0
    if "protocol" in body:
        if body["protocol"] not in PROTOCOLS:
            raise ApiError(f"protocol: {body['protocol']!r} is none of {', '.join(PROTOCOLS)}")
        flow["protocol"] = PROTOCOLS[body["protocol"]]
    numbers = []
    for key, usual, most in (("packets", 20, TRACE_PACKETS), ("seconds", 10, TRACE_SECONDS)):
        value = body.get(key, usual)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ApiError(f"{key}: {value!r} is not a number up to {most}")
        numbers.append(value)
    return flow, max(int(numbers[0]), 1), float(numbers[1])


def _flow_text(flow: Mapping[str, int]) -> str:
    told = [PROTOCOL_NAMES.get(flow.get("protocol", 0), "any protocol")]
    for side in ("internal", "external", "remote"):
        address, port = flow.get(f"{side}_addr", 0), flow.get(f"{side}_port", 0)
        if address or port:
            told.append(f"{side} {IPv4Address(address) if address else ''}{f':{port}' if port else ''}")
    return ", ".join(told)


def trace_rows(entries: np.ndarray[Any, np.dtype[np.void]], ports: Sequence[str]) -> list[dict[str, Any]]:
    """Traced packets as an operator reads them; ``time`` in seconds of the core's clock."""

    def end(entry: Any, name: str, suffix: str = "") -> str:
        return f"{IPv4Address(int(entry[f'{name}{suffix}']))}:{int(entry[f'{name}_port{suffix}'])}"

    return [
        {
            "time": int(entry["time_ns"]) / 1e9,
            "from": ports[entry["port"]],
            "protocol": PROTOCOL_NAMES.get(int(entry["protocol"]), str(entry["protocol"])),
            "source": end(entry, "source"),
            "destination": end(entry, "destination"),
            "verdict": VERDICT_NAMES[entry["verdict"]],
            "after": None
            if entry["verdict"] > VERDICT_NAMES.index("held")
            else {
                "source": end(entry, "source", "_after"),
                "destination": end(entry, "destination", "_after"),
            },
            "to": ports[entry["port_after"]] if entry["next_hop_mac"] else None,
            "next_hop": int(entry["next_hop_mac"]).to_bytes(6, "big").hex(":")
            if entry["next_hop_mac"]
            else None,
            "flags": "".join(flag for i, flag in enumerate(FLAGS) if entry["tcp_flags"] >> i & 1),
            "state": TCP_STATES[entry["tcp_state"]] if entry["tcp_state"] else "",
            "ttl": int(entry["ttl"]),
            "length": int(entry["length"]),
            "session": f"{int(entry['session']):016x}" if entry["session"] else None,
            "was_held": bool(entry["was_held"]),
        }
        for entry in entries
    ]
