# SPDX-License-Identifier: Apache-2.0
"""`tandem-nat server`: from a configuration to a running NAT, and back to the machine as it was."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nat_control import config as configuration
from nat_control.api import Api, ApiError, Pages
from nat_control.config import Config
from nat_control.core_plane import CorePlane
from nat_control.dataplane import Events
from nat_control.health import NO_RESOURCE, Health, drops_of, state_of, states_of
from nat_control.live import Live
from nat_control.loop import ControlLoop, ending_cleanly, monotonic, no_more_signals, start_epoch
from nat_control.memory import buffer_mtu, buffers, packet_memory_mb
from nat_control.offloader import Offloader, no_switch
from nat_control.pair import Pair, PairError
from nat_control.peer import StateLog, line_of, no_peer
from nat_control.reload import Reload
from nat_control.sync import actions as do
from nat_control.traffic import NO_PEER, Traffic
from nat_control.twin import Twin, role_of
from nat_fastpath import cores, engine
from nat_fastpath.core_config import CoreConfig
from nat_fastpath.dpdk import DpdkError, Eal, InterfaceError, Mempool, Port, Workers, WorkerStuck, repair
from nat_fastpath.watch import hold_memory

WORKER_TROUBLE = ("outbox_no_buffer", "fragment_no_buffer", "handoff_dropped")
SHOWN = 256  # rows of a list that comes as one answer


class ServerError(Exception):
    """The server cannot start, or could not go on; one line."""


def say(line: str) -> None:
    """What the server tells; it goes on when nobody can hear it."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def serve(config: Config, path: Path, *, force: bool = False) -> None:
    """Runs until SIGTERM or SIGINT; SIGHUP reads ``path`` again, where ``config`` comes from. Raises ServerError; whatever
    was done by then is undone."""
    if config.switch:
        raise ServerError("this configuration is a switch agent's: tandem-nat switch runs it")
    with contextlib.ExitStack() as undo, ending_cleanly():
        try:
            Server(config, path, undo, force=force).run()
        except (DpdkError, InterfaceError, engine.CoreError, ApiError, PairError) as error:
            raise ServerError(str(error)) from None
        except MemoryError:
            raise ServerError(
                "the system gives no memory: see `ulimit -v`, and the limits of the service"
            ) from None
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise ServerError(f"{what}{error.strerror or error}") from None
        finally:
            no_more_signals()


class Server:
    """One instance: what `show` tells about it, and its way up. ``undo`` takes it down again."""

    def __init__(self, config: Config, path: Path, undo: contextlib.ExitStack, *, force: bool) -> None:
        self.config = config
        state = _state_dir(config)
        self.health = Health(say, state)
        undo.enter_context(_lock(state / f"{config.instance}.lock", config.instance))
        for line in repair(state):
            say(f"repaired: {line}")

        self.eal = Eal(
            memory_mb=packet_memory_mb(config),
            devices=sorted({port.device for port in config.ports}),
        )
        undo.callback(self.eal.close)
        memory = "hugepages" if self.eal.hugepages else "ordinary memory (no hugepages are free)"
        say(f"tandem-nat {version('tandem-nat')}: instance {config.instance}, {self.eal.version}, {memory}")

        pool = Mempool(f"{os.getpid()}-packets", buffers(config), buffer_mtu(config))
        undo.callback(pool.close)
        self.pool = pool
        self.ports: list[Port] = []
        for i, port in enumerate(config.ports):
            if port.device == config.ports[0].device and self.ports:
                opened = self.ports[0]  # one device is both ports, by VLAN or DSCP
            else:
                on_it = [k for k, other in enumerate(config.ports) if other.device == port.device]
                opened = Port(
                    port.device,
                    pool,
                    index=i,
                    mtu=max(config.ports[k].mtu for k in on_it),
                    mac=config.virtual.mac if config.virtual else port.mac,
                    addresses=[address for k in on_it for address in _addresses(config, k)],
                    state_dir=state,
                    force=force,
                    driver=port.driver,
                    tagged=any(config.ports[k].vlan for k in on_it),
                    queues=len(config.workers.cores),
                    side=port.side if len(on_it) == 1 else None,
                )
                undo.callback(opened.close)
            self.ports.append(opened)
            if not any(opened.mac):
                raise ServerError(
                    f"device {port.device} has no MAC; ports.{port.name}.mac says which the NAT takes"
                )
            carrier = (
                f"{opened.kernel_interface} by {opened.driver}" if opened.kernel_interface else opened.driver
            )
            vlan = f", VLAN {port.vlan}" if port.vlan else ", by DSCP" if config.inside_by_dscp else ""
            say(f"{port.name}: {carrier}{vlan}, MAC {opened.mac.hex(':')}, {port.address}, MTU {port.mtu}")
            if opened.not_af_xdp:
                say(f"{port.name}: not by AF_XDP: {opened.not_af_xdp}")
            if opened.spread:
                say(
                    f"{port.name}: packets are spread over {len(config.workers.cores)} workers by {opened.spread}"
                )
            for change in opened.changes:
                say(f"{port.name}: {change}")

        epoch = start_epoch()
        self.role = role_of(config)

        def to_core(config: Config) -> CoreConfig:
            core = configuration.to_core(config, [port.mac for port in self.ports], epoch=epoch)
            return replace(core, role=self.role.address if self.role else 0)

        self.core = cores.make(to_core(config), len(config.workers.cores))
        undo.callback(self.core.close)
        total = self.core.memory()["total"]
        sessions = config.nat.max_sessions
        say(f"memory: {total / 2**20:.0f} MiB for {sessions} sessions, {total // sessions} bytes each")

        paired = config.peer is not None and config.peer.mode != "off"
        # In synchronous mode a new session's first packet waits for us: the worker wakes us by this.
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if paired else None
        if wake_fd is not None:
            undo.callback(os.close, wake_fd)
        self.workers = Workers(
            cores.parts(self.core),
            self.ports,
            pool,
            cpus=config.workers.cores,
            idle=config.workers.idle,
            wake_fd=wake_fd,
            inside=config.inside_by_dscp,
        )
        self.workers.start()
        undo.callback(self._stop_workers)
        self.worker_stats = self.workers.stats()
        self.stalled = [False] * len(self.worker_stats)
        self.links = [True] * len(self.ports)
        bound = (
            f", asks for sleeps of {Workers.idle_bound_us} µs at most"  # to which the kernel adds
            if config.workers.idle == "adaptive"
            else ""
        )
        for i, cpu in enumerate(config.workers.cores):
            say(f"{self._worker_name(i)}: CPU {cpu}, {config.workers.idle}{bound}")
        self._states = StateLog()
        self.pair: Pair | None = None
        self.offloader: Offloader | None = None
        self.twin: Twin | None = None
        if self.role is not None:
            self.twin = Twin(
                config,
                self.role,
                clock=monotonic,
                say=say,
                fit=lambda: all(port.link().up for port in self.ports),
            )
        if paired:
            plane = CorePlane(self.core)
            self.pair = Pair(
                config,
                plane,
                epoch=epoch,
                clock=monotonic,
                drain=lambda: self.loop.drain(),
                notice=self._notice,
                counters=self.workers.loops_addresses,  # all of them move, or we are dead
                guard=True,
            )
            undo.callback(self.pair.watch.close)
            if self.twin is not None:
                self.twin.bind(self.pair)
            else:
                self.offloader = Offloader(
                    config, self.pair.protocol, self.pair.transport, plane, monotonic, say
                )
            # so that our sockets close at once if we are killed, however much memory we have
            undo.callback(hold_memory().close)
        self.live = Live(self.core, [port.name for port in config.ports])
        self.reload = Reload(
            config,
            path,
            cores.parts(self.core),
            lambda new: cores.sliced(to_core(new), len(config.workers.cores)),
            taken=self._reloaded,
            say=say,
            refuses=self._refuses,
            pair=self.pair,
            mtus=[port.mtu for port in self.ports],
        )
        self.loop = ControlLoop(
            self.core,
            len(self.ports),
            self._watch,
            sink=self._events,
            wake_fd=wake_fd,
            hang_up=self.reload.hang_up,
        )

    def _notice(self, action: do.Action) -> None:
        match action:
            case do.StateChanged():
                line = self._states.line_of(action)
            case do.Unreachable(why):
                line = f"peer: not reached: {why}"
            case do.CarrierTold(carrier, lasting, ""):
                line = f"peer: instance {carrier} carries{', and keeps the traffic' if lasting else ''}"
            case _:
                line = line_of(action)
        if line:
            say(line)
        if self.offloader is not None:
            self.offloader.notice(action)
        if self.twin is not None:
            self.twin.notice(action)

    def _stop_workers(self) -> None:
        try:
            self.workers.stop()
        except WorkerStuck as error:
            # nothing under its feet may be closed, so we end as by a kill -9, which the next start is made for
            say(f"{error}; we end without it, and the next start puts back what was changed on interfaces")
            os._exit(1)

    def run(self) -> None:
        asyncio.run(self._run())

    def _reloaded(self, config: Config) -> None:
        self.config = config
        if self.offloader is not None:
            self.offloader.reconfigured(config)

    def _refuses(self, config: Config) -> list[str]:
        """What is wrong with addresses of another configuration on the devices that we have."""
        found = []
        for i, port in enumerate(self.ports):
            try:
                port.refuse_addresses(_addresses(config, i))
            except InterfaceError as error:
                found.append(str(error))
        return found

    async def _run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self.health.unhandled)
        answers = {"status": self.status, "stats": self.stats, "pool": self.pool_use, "ports": self.port_list}
        verbs = {
            **self.live.verbs,
            "reload": self.reload.verb,
            "peer": no_peer,
            **NO_PEER,
            "offload": no_switch,
        }
        sessions: Pages = self.core.sessions
        if self.pair:
            traffic = Traffic(self.pair, sessions=lambda: self.core.counters()["sessions"], arbiter=self.twin)
            verbs |= {"peer": self.pair.view.verb, **traffic.verbs}
        if self.offloader:
            verbs |= {"offload": self.offloader.verb}
            sessions = self.offloader.marked(sessions)
        api = Api({**answers, "hosts": self.live.hosts}, sessions, verbs)
        await api.start(self.config.control.socket)
        pair = asyncio.ensure_future(self._pair(self.pair)) if self.pair else None
        offloading = asyncio.ensure_future(self.offloader.run()) if self.offloader else None
        if offloading is not None:
            offloading.add_done_callback(self.loop.end_with)
        if pair is not None:
            pair.add_done_callback(self.loop.end_with)
        try:
            say(f"control: {self.config.control.socket}")
            say(f"ended by {await self.loop.run(ready=lambda: say('ready'), leave=self._leave)}")
        finally:
            if offloading is not None:
                offloading.cancel()
            if pair is not None and self.pair is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.pair.stop(), 1)
                pair.cancel()
                await asyncio.wait([pair])
            await api.close()

    async def _pair(self, pair: Pair) -> None:
        await pair.listen()  # what keeps it from that is one line, and no group of them
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pair.run())
            if self.twin is not None:
                tasks.create_task(self.twin.run())

    def _events(self, events: Events) -> None:
        if self.pair is not None:
            self.pair.events(events)
        if self.offloader is not None:
            self.offloader.events(events)
        self.live.publish(events)

    async def _leave(self) -> None:
        """A planned end: the peer has the traffic before we stop forwarding."""
        if self.pair is not None and (self.twin is None or self.twin.here):
            why = await self.pair.hand_over()
            say(f"the peer is not asked to carry: {why}" if why else "the peer carries")
        if self.twin is not None:
            self.twin.leave()

    def _watch(self) -> None:
        before, self.worker_stats = self.worker_stats, self.workers.stats()
        for i, (old, new) in enumerate(zip(before, self.worker_stats, strict=True)):
            stalled = old["loops"] == new["loops"]
            if stalled and not self.stalled[i]:
                say(self._stalled_text(i))
            self.stalled[i] = stalled
        for i, port in enumerate(self.ports):
            try:
                there, up = port.is_there, port.link().up
            except OSError as error:
                if error.errno not in NO_RESOURCE:
                    raise
                self.health.lacking(error)  # nothing to ask with: it is as it was
                continue
            if not there:
                # its sockets and rings never come to life again; a new start takes what is there by then
                raise ServerError(f"device {port.device} is gone: nothing is carried any more")
            if up != self.links[i]:
                say(
                    f"{self.config.ports[i].name}: {port.label} is {'up' if up else f'down: {port.why_down}'}"
                )
                self.links[i] = up
            if not up:
                port.seek_other_end()
        self._look_at_health()
        self.reload.tick()

    def _look_at_health(self) -> None:
        found = drops_of(self.core)
        found |= {name: sum(one[name] for one in self.worker_stats) for name in WORKER_TROUBLE}
        found["events_lost"] = self.loop.events_lost
        for i, (config, port) in enumerate(zip(self.config.ports, self.ports, strict=True)):
            found[f"tx_dropped.{config.name}"] = sum(one[f"tx_dropped.{i}"] for one in self.worker_stats)
            with contextlib.suppress(DpdkError):  # a device that does not count
                stats = port.stats()
                found |= {f"{name}.{config.name}": stats[name] for name in ("rx_nombuf", "imissed")}
        states = states_of(self.core, self.pool.in_use, self.pool.count) | state_of(self.pair)
        states |= self.twin.conditions() if self.twin else {}
        self.health.look(states, found)

    def _worker_name(self, i: int) -> str:
        return "worker" if len(self.config.workers.cores) == 1 else f"worker {i}"

    def _stalled_text(self, i: int) -> str:
        lost = "nothing"
        if len(self.stalled) > 1:
            lost = f"nothing of its hosts (CPU {self.config.workers.cores[i]})"
            if alone := self.workers.alone_on(i):  # where the device does not spread
                lost += f", and nothing at all by {' and '.join(self.config.ports[k].name for k in alone)},"
        return f"the {self._worker_name(i)} has not moved for a second: {lost} is forwarded"

    def degraded(self) -> list[str]:
        """What keeps it from carrying as it should, one line each."""
        found = [self._stalled_text(i) for i, stalled in enumerate(self.stalled) if stalled]
        for config, port, up in zip(self.config.ports, self.ports, self.links, strict=True):
            if not up:
                found.append(f"{config.name}: {port.label} is down: {port.why_down}")
        return found + self.health.lines

    # -- what can be shown; called from threads ------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        counters, nat, workers = self.core.counters(), self.config.nat, self._workers()
        return {
            "instance": self.config.instance,
            "version": version("tandem-nat"),
            "pid": os.getpid(),
            "uptime": round(self.loop.uptime, 3),
            "degraded": self.degraded(),
            "draining": self.reload.draining(),
            "dpdk": self.eal.version,
            "hugepages": self.eal.hugepages,
            "mapping": nat.mapping,
            "filtering": nat.filtering,
            "max_sessions": nat.max_sessions,
            "peer": self.pair.state.value if self.pair else "none",
            "offload": self.offloader.status() if self.offloader else None,
            "role": self.twin.status() if self.twin else None,
            **{name: counters[name] for name in ("sessions", "mappings", "hosts", "neighbours", "held")},
            "rates": {name: round(rate, 1) for name, rate in self.loop.rates.items()},
            "worker": max(workers, key=lambda worker: (worker["stalled"], worker["busy_share"])),
            "workers": workers,
            "memory": self.core.memory(),
            "buffers": {"in_use": self.pool.in_use, "total": self.pool.count},
            "events": {
                "taken": self.loop.events,
                "waiting": counters["events"],
                "lost": self.loop.events_lost,
            },
        }

    def _workers(self) -> list[dict[str, Any]]:
        parts = zip(
            self.config.workers.cores, cores.parts(self.core), self.worker_stats, self.stalled, strict=True
        )
        return [
            {
                "cpu": cpu,
                "idle": self.config.workers.idle,
                "idle_bound_us": Workers.idle_bound_us,
                "stalled": stalled,
                "busy_share": round(stats["busy_share"], 4),
                "sessions": core.counters()["sessions"],
                **{name: stats[name] for name in ("handed_off", "handoff_received", "handoff_dropped")},
            }
            for cpu, core, stats, stalled in parts
        ]

    def stats(self) -> dict[str, Any]:
        verdicts, each = self.core.verdicts().tolist(), self.worker_stats
        return {
            "verdicts": dict(zip(engine.VERDICT_NAMES, verdicts, strict=True)),
            "counters": self.core.counters(),
            "worker": {name: _of_all(name, [one[name] for one in each]) for name in each[0]},
            "workers": each,
        }

    def pool_use(self) -> dict[str, Any]:
        pool, hosts = self.config.nat.pool, self.core.hosts()
        # from the sessions: a host may have mappings on other addresses than its home
        addresses, mappings = np.unique(self._external_endpoints() >> np.uint64(32), return_counts=True)
        home = np.sort(hosts["external_addr"])
        users = np.asarray(np.searchsorted(home, addresses, "right")) - np.asarray(
            np.searchsorted(home, addresses, "left")
        )
        first, last = pool.ports
        counters, verdicts = self.core.counters(), self.core.verdicts()
        return {
            "ranges": [f"{low}-{high}" for low, high in pool.ranges],
            "ports": [first, last],
            "addresses": pool.n_addresses,
            "port_ranges": [list(span) for span in pool.port_ranges],
            "capacity": pool.n_addresses * pool.n_ports,  # of each protocol
            "used": counters["mappings_opened"] - counters["mappings_closed"],
            "unpaired": counters["unpaired"],
            "refused": int(verdicts[engine.Verdict["DROP_NO_PORT"]]),
            "resting": counters["ports_resting"],
            "refused_while_resting": counters["no_port_resting"],
            "rests_cut": counters["rests_cut"],
            "parity_missed": counters["parity_missed"],
            "class_missed": counters["class_missed"],
            "draining": self.reload.draining(),
            "in_use": [
                {"address": _dotted(addresses[i]), "hosts": int(users[i]), "mappings": int(mappings[i])}
                for i in range(min(len(addresses), SHOWN))
            ],
            "in_use_total": len(addresses),
        }

    def _external_endpoints(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Those in use, each once: address << 32 | protocol << 16 | port."""
        found, cursor = [np.zeros(0, np.uint64)], 0
        while True:
            page, cursor = self.core.sessions(cursor)
            address, protocol, port = (
                page[name].astype(np.uint64) for name in ("external_addr", "protocol", "external_port")
            )
            found.append(np.unique(address << np.uint64(32) | protocol << np.uint64(16) | port))
            if not cursor:
                return np.unique(np.concatenate(found))

    def port_list(self) -> dict[str, Any]:
        neighbours = self.core.neighbours()
        return {
            port.name: {
                "device": port.device,
                "driver": opened.driver,
                "kernel_interface": opened.kernel_interface,
                "not_af_xdp": opened.not_af_xdp or None,
                "spread": opened.spread or None,
                "changes": list(opened.changes),
                "mac": opened.mac.hex(":"),
                "address": str(port.address),
                "gateway": str(port.gateway) if port.gateway else None,
                "mtu": port.mtu,
                "vlan": port.vlan or None,
                "link": (link := opened.link())._asdict(),
                "link_why_down": None if link.up else opened.why_down,
                "rates": {
                    name.removesuffix(f".{i}"): round(rate, 1)
                    for name, rate in self.loop.rates.items()
                    if name.endswith(f".{i}")
                },
                "stats": opened.stats(),
                "xstats": opened.xstats(),
                "neighbours": _neighbours(neighbours[neighbours["port"] == i]),
            }
            for i, (port, opened) in enumerate(zip(self.config.ports, self.ports, strict=True))
        }


def _of_all(name: str, values: list[int | float]) -> int | float:
    """One figure for all workers: of shares and longest times the largest."""
    return max(values) if name in ("busy_share", "sleep_max_us") else sum(values)


def _neighbours(records: np.ndarray[Any, np.dtype[np.void]]) -> list[dict[str, Any]]:
    return [
        {
            "address": _dotted(record["address"]) if record["address"] else None,
            "mac": int(record["mac"]).to_bytes(6, "big").hex(":"),
            "state": engine.NEIGHBOUR_STATES[record["state"]],
            "confirmed": int(record["confirmed_ms"]) / 1000,
            "sessions": int(record["sessions"]),
            "held": int(record["held"]),
        }
        for record in records[:SHOWN]
    ]


def _dotted(address: Any) -> str:
    return ".".join(str(byte) for byte in int(address).to_bytes(4, "big"))


def _addresses(config: Config, port: int) -> list[Any]:
    """What the NAT answers for on a port, and the kernel therefore must not."""
    own = [config.ports[port].address.ip]
    if config.ports[port].side == "external":
        for first, last in config.nat.pool.ranges:
            own += [type(first)(number) for number in range(int(first), int(last) + 1)]
    return own


def _state_dir(config: Config) -> Path:
    """Where locks and the notes for repair stand: $TANDEM_NAT_STATE, or beside the socket."""
    state = Path(os.environ.get("TANDEM_NAT_STATE") or config.control.socket.parent)
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServerError(
            f"{state}: {error.strerror}; a server needs root, or set control.socket or TANDEM_NAT_STATE"
        ) from None
    return state


@contextlib.contextmanager
def _lock(path: Path, instance: str) -> Iterator[None]:
    """One server per instance name. The kernel drops the lock of a killed one by itself."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ServerError(f"{path}: {error.strerror}; a server needs root") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode() or "?"
            raise ServerError(
                f"instance {instance!r} runs already (process {pid}, {path}): stop it, or choose another name"
            ) from None
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except OSError as error:
            raise ServerError(f"{path}: {error.strerror}") from None
        yield
        # The file stays: were it unlinked, two servers could hold locks on two files of the same name.
    finally:
        os.close(descriptor)
