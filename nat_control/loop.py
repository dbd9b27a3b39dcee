# SPDX-License-Identifier: Apache-2.0
"""The control loop: the only place of the control side that reads a clock, keeps a timer or catches a signal.

It takes the core's events and keeps rates for `show`. Packets never wait for it: the ring of events holds
what comes while it is away, and only new sessions would be refused, by name, if that were ever full.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 (asyncio's first thread would, when no descriptor may be left)
import contextlib
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import FrameType

from nat_control.dataplane import Events
from nat_fastpath.cores import AnyCore, parts

EVENTS = 16384  # taken at once, in less than a millisecond
STEP = 0.01  # seconds between two looks at the events at most: of 65 536 in the ring, seven eighths are for new sessions
RATE_PERIOD = 1.0  # seconds over which rates are taken
ENDING = (signal.SIGTERM, signal.SIGINT)
RATES = ("sessions_opened", "sessions_closed")
PORT_RATES = ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes")


def start_epoch() -> int:
    """The 20 bits that tell this start from earlier ones: seconds of the wall clock, modulo twelve days."""
    return int(time.time()) & 0xFFFFF


# Signals that came before there was somebody to hear them; they are the process's, so is this.
_early: list[int] = []


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """SIGTERM raises SystemExit in here, so that a start that is interrupted undoes what it did. SIGHUP waits until
    there is something to reload."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    def later(number: int, frame: FrameType | None) -> None:
        _early.append(number)

    wanted = {signal.SIGTERM: leave, signal.SIGHUP: later}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def no_more_signals() -> None:
    """From here on we end anyway, and a second signal must not keep us from doing it cleanly."""
    for number in (*ENDING, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def monotonic() -> float:
    """Seconds; for those who are given a clock."""
    return time.monotonic()


def monotonic_ns() -> int:
    """The same, in nanoseconds: the core's time."""
    return time.monotonic_ns()


def pause(step: float, events: int, seconds: float) -> float:
    """Seconds until the next look: ``step``, or less when more than one batch would come meanwhile, as in the last ``seconds``."""
    return min(step, EVENTS * seconds / events) if events else step


class ControlLoop:
    """Turns until SIGTERM or SIGINT; ``watch`` is called once per second and may end it by an exception, ``hang_up`` at
    SIGHUP, and one that comes meanwhile calls it once more."""

    def __init__(
        self,
        core: AnyCore,
        n_ports: int,
        watch: Callable[[], None],
        *,
        sink: Callable[[Events], None] | None = None,
        step: float = STEP,
        wake_fd: int | None = None,
        hang_up: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._core = core
        self._rings = parts(core)
        self._next_sequence = [0] * len(self._rings)
        self._watch = watch
        self._sink = sink
        self._step = step
        self._wake_fd = wake_fd
        self._hang_up = hang_up
        self._hung_up = asyncio.Event()
        self._names = (*RATES, *(f"{name}.{i}" for i in range(n_ports) for name in PORT_RATES))
        self._started = time.monotonic()
        self._before: tuple[float, Mapping[str, int]] = (self._started, core.counters())
        self._end: asyncio.Future[str] | None = None
        self.events = 0
        self.events_lost = 0
        self.rates: dict[str, float] = dict.fromkeys(self._names, 0.0)

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    async def run(self, ready: Callable[[], None], leave: Callable[[], Awaitable[None]] | None = None) -> str:
        """Runs until a signal, and on until ``leave`` is done; returns the signal's name."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[str] = loop.create_future()
        self._end = end
        for number in ENDING:
            loop.add_signal_handler(number, _finish, end, signal.Signals(number).name)
        if self._wake_fd is not None:
            loop.add_reader(self._wake_fd, self._woken)
            self._sleep()
        tasks = [asyncio.create_task(self._steps())]
        if self._hang_up is not None:
            loop.add_signal_handler(signal.SIGHUP, self._hung_up.set)
            if _early:
                _early.clear()
                self._hung_up.set()
            tasks.append(asyncio.create_task(self._hang_ups(self._hang_up)))
        for task in tasks:
            task.add_done_callback(lambda task: _fail(end, task))
        # What is there by now stays: a look at all of it, some 100 000 objects of modules, would hold up everything else.
        gc.collect()
        gc.freeze()
        try:
            ready()
            name = await end
            if leave is not None:
                await leave()
            return name
        finally:
            for task in tasks:
                task.cancel()
            if self._wake_fd is not None:
                loop.remove_reader(self._wake_fd)

    async def _hang_ups(self, hang_up: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            await hang_up()

    def end_with(self, task: asyncio.Task[None]) -> None:
        """A part that must not end has ended: so do we, with its exception."""
        if self._end is not None:
            _fail(self._end, task)

    def drain(self) -> bool:
        """Takes what events there are, one batch of each core; whether there may be more."""
        return EVENTS in [self._take(ring) for ring in range(len(self._rings))]

    def _take(self, ring: int) -> int:
        events = self._rings[ring].events(EVENTS)
        if len(events):
            first, last = int(events["sequence"][0]), int(events["sequence"][-1])
            if self._next_sequence[ring]:
                self.events_lost += first - self._next_sequence[ring]
            self._next_sequence[ring] = last + 1
            self.events += len(events)
            if self._sink is not None:
                self._sink(events)
        return len(events)

    def _woken(self) -> None:
        """By the worker: events have come since we slept."""
        assert self._wake_fd is not None
        os.eventfd_read(self._wake_fd)
        self._again()

    def _sleep(self) -> None:
        """One batch at a time: the rest of a flood is left to the steps, between which others have their turn."""
        if not all(ring.events_sleep() for ring in self._rings):
            asyncio.get_running_loop().call_soon(self._again)

    def _again(self) -> None:
        self.drain()
        self._sleep()

    async def _steps(self) -> None:
        events, since = self.events, time.monotonic()
        while True:
            wait = self._step
            try:
                while self.drain():
                    await asyncio.sleep(0)
                now = time.monotonic()
                wait = pause(self._step, self.events - events, now - since)
                events, since = self.events, now
                if now - self._before[0] >= RATE_PERIOD:
                    self._take_rates(now)
                    self._watch()
            except MemoryError as error:  # events stay in the ring meanwhile
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "no memory", "exception": error}
                )
            await asyncio.sleep(wait)

    def _take_rates(self, now: float) -> None:
        then, old = self._before
        new = self._core.counters()
        self.rates = {name: (new[name] - old[name]) / (now - then) for name in self._names}
        self._before = now, new


def _finish(end: asyncio.Future[str], name: str) -> None:
    if not end.done():
        end.set_result(name)


def _fail(end: asyncio.Future[str], task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) and not end.done():
        end.set_exception(error)
