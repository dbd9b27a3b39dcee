# SPDX-License-Identifier: Apache-2.0
"""What the tests of the DPDK binding run in processes of their own, for EAL starts once per process.

``run(function, ...)`` calls ``function`` of this module in such a process and returns what it returns, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nat_fastpath.dpdk._dpdk import ffi, lib
from scapy.utils import PcapReader, PcapWriter

from nat_fastpath.core_config import NeighbourConfig, PoolRange, PortConfig, RouteConfig
from nat_fastpath.dpdk import DpdkError, Eal, InterfaceError, Mempool, Port, Worker, binding, ports
from nat_fastpath.engine import VERDICT_NAMES, Core
from tests.packets import GATEWAY, GATEWAY_MAC, INSIDE, OUR_MAC, OUTSIDE, POOL, config, mac_bytes, number

MTU_OF_JUMBO = 9000
# two NATs in a row: the far one is the gateway of the near one
FAR_POOL, FAR_GATEWAY_MAC = "192.0.2.10", "02:00:00:00:02:fe"
FAR: dict[str, Any] = {
    "ports": (
        PortConfig("internal", mac_bytes(GATEWAY_MAC), number(GATEWAY)),
        PortConfig("external", mac_bytes("02:00:00:00:02:01"), number("192.0.2.1")),
    ),
    "pool": (PoolRange(number(FAR_POOL), number(FAR_POOL)),),
    "routes": (
        RouteConfig(number("198.51.100.0"), 24, INSIDE),
        RouteConfig(0, 0, OUTSIDE, number("192.0.2.254"), mac_bytes(FAR_GATEWAY_MAC)),
    ),
    "neighbours": tuple(
        NeighbourConfig(number(POOL[0]) + i, INSIDE, mac_bytes(OUR_MAC[OUTSIDE])) for i in range(4)
    ),
}


def run(function: Callable[..., Any], *arguments: Any, command: tuple[str, ...] = ()) -> Any:
    """A function of a module with ``main`` at its end; ``command`` goes before the interpreter, such as ``ip netns exec``."""
    done = subprocess.run(
        [*command, sys.executable, "-m", function.__module__, function.__name__, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def eal_twice() -> dict[str, Any]:
    before = os.sched_getaffinity(0)
    eal = Eal(memory_mb=64)
    try:
        Eal(memory_mb=64)
    except DpdkError as error:
        return {
            "error": str(error),
            "version": eal.version,
            "same_affinity": before == os.sched_getaffinity(0),
        }
    return {}


def errors(state: str) -> dict[str, str]:
    """What DPDK and we say about devices that cannot be used."""
    Eal(memory_mb=64, devices=["0000:ff:1f.7"])
    pool = Mempool("buffers", 1024)
    said = {}
    for device in (
        "no-such-interface",
        "net_pcap0,rx_pcap=/does/not/exist.pcap",
        "net_nosuchdriver0",
        "0000:ff:1f.7",
        "0000:zz:00.0",
        "net_tap0,iface=sixteen-is-longer",
    ):
        try:
            Port(device, pool, index=0, state_dir=Path(state))
        except DpdkError as error:
            said[device] = str(error)
    try:
        Port("net_null0", pool, index=0, state_dir=Path(state), driver="af_xdp")
    except DpdkError as error:
        said["driver"] = str(error)
    try:
        Mempool("too many", 10_000_000)
    except DpdkError as error:
        said["mempool"] = str(error)
    said["left"] = ",".join(port.name for port in ports())
    return said


def said_by_libbpf(stderr: str) -> list[str]:
    """Of a program that is not there, on stderr and to us."""
    Eal(memory_mb=64)
    before = os.dup(2)
    with open(stderr, "wb") as file:
        os.dup2(file.fileno(), 2)
    ctypes.CDLL("libbpf.so.1").bpf_object__open(b"/no/such/program")
    os.dup2(before, 2)
    return binding._log()


def no_such_cpu(state: str) -> str:
    Eal(memory_mb=64)
    pool = Mempool("buffers", 2048)
    devices = [
        Port(f"net_null{i}", pool, index=i, mac=config().ports[i].mac, state_dir=Path(state)) for i in (0, 1)
    ]
    try:
        Worker(Core(config()), devices, pool, cpu=1000).start()
    except DpdkError as error:
        return str(error)
    return ""


def device_facts(state: str) -> dict[str, Any]:
    Eal(memory_mb=64)
    pool = Mempool("buffers", 2048)
    port = Port("net_null0", pool, index=0, mac=bytes.fromhex("02aabbccddee"), state_dir=Path(state))
    facts = {
        "driver": port.driver,
        "mac": port.mac.hex(),
        "link": port.link()._asdict(),
        "stats": port.stats(),
        "xstats": port.xstats(),
        "ports": [(p.name, p.driver) for p in ports()],
        "available": pool.available,
        "in_use": pool.in_use,
    }
    port.close()
    port.close()
    return {**facts, "after": [p.name for p in ports()], "in_use_after": pool.in_use}


def capture_through_worker(
    inside: str, outside: str, out: str, idle: str, external_mtu: str = ""
) -> dict[str, Any]:
    """Two capture files in, two out; the worker between them."""
    Eal(memory_mb=128)
    pool = Mempool("buffers", 8192)
    devices = [
        Port(f"net_pcap{i},rx_pcap={path},tx_pcap={out}{i}.pcap", pool, index=i, state_dir=Path(out).parent)
        for i, path in enumerate((inside, outside))
    ]
    near, far = (_jumbo(port) for port in config().ports)
    core = Core(config(ports=(near, replace(far, mtu=int(external_mtu or far.mtu)))))
    worker = Worker(core, devices, pool, idle=idle)
    expected = sum(len(list(PcapReader(path))) for path in (inside, outside))
    worker.start()
    try:
        twice = ""
        try:
            worker.start()
        except RuntimeError as error:
            twice = str(error)
        owned = ""
        try:
            core.poll(0)
        except RuntimeError as error:
            owned = str(error)
        end = time.monotonic() + 20
        while sum(core.counters()[f"rx_packets.{i}"] for i in (0, 1)) < expected and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)  # some idle rounds
        sessions, _ = core.sessions()
        stats = worker.stats()
    finally:
        worker.stop()
    result = {
        "verdicts": {name: int(n) for name, n in zip(VERDICT_NAMES, core.verdicts(), strict=True) if n},
        "sessions": len(sessions),
        "stats": stats,
        "running": worker.running,
        "twice": twice,
        "owned": owned,
    }
    core.poll(time.monotonic_ns())  # ours again
    for device in devices:
        device.close()
    return {**result, "in_use": pool.in_use}


def sleeps_with_a_held_packet(inside: str, state: str) -> list[int]:
    """How often a worker sleeps in 0.3 s while a packet waits for its session's commit, and afterwards."""
    Eal(memory_mb=64)
    pool = Mempool("buffers", 2048)
    devices = [
        Port(device, pool, index=i, mac=config().ports[i].mac, state_dir=Path(state))
        for i, device in enumerate(
            (f"net_pcap0,rx_pcap={inside}", "net_pcap1,tx_pcap=/dev/null,rx_pcap=" + inside)
        )
    ]
    core = Core(config(synchronous=True, hold=60.0))
    worker = Worker(core, devices, pool)
    worker.start()
    found = []
    try:
        while not core.counters()["held"]:
            time.sleep(0.01)
        for _ in range(2):
            time.sleep(0.05)
            before = worker.stats()["sleeps"]
            time.sleep(0.3)
            found.append(worker.stats()["sleeps"] - before)
            core.commit(core.sessions()[0])
    finally:
        worker.stop()
    return found


def ring_between_two_nats(inside: str, out: str) -> dict[str, Any]:
    """capture - near NAT - ring - far NAT - capture, with two workers of this process."""
    Eal(memory_mb=128)
    pool = Mempool("buffers", 8192)
    rings, net_ring = ctypes.CDLL("librte_ring.so.23"), ctypes.CDLL("librte_net_ring.so.23")
    rings.rte_ring_create.restype = ctypes.c_void_p
    outward, inward = (
        (ctypes.c_void_p * 1)(rings.rte_ring_create(name, 1024, -1, 0)) for name in (b"outward", b"inward")
    )
    assert net_ring.rte_eth_from_rings(b"near0", inward, 1, outward, 1, 0) >= 0
    assert net_ring.rte_eth_from_rings(b"far0", outward, 1, inward, 1, 0) >= 0
    state = Path(out).parent

    def port(device: str) -> Port:
        return Port(device, pool, index=0, state_dir=state)

    sides = (
        (config(), [port(f"net_pcap0,rx_pcap={inside},tx_pcap={out}0.pcap"), port("net_ring_near0")]),
        (config(**FAR), [port("net_ring_far0"), port(f"net_pcap1,rx_pcap={out},tx_pcap={out}1.pcap")]),
    )
    cores = [Core(settings) for settings, _ in sides]
    workers = [Worker(core, devices, pool) for core, (_, devices) in zip(cores, sides, strict=True)]
    near, far = cores
    expected = len(list(PcapReader(inside)))
    for worker in reversed(workers):
        worker.start()
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end and (
            far.counters()["rx_packets.0"] < expected or near.counters()["rx_packets.1"] < 1
        ):
            time.sleep(0.01)
        time.sleep(0.2)
        links = [device.link().up for _, devices in sides for device in devices]
    finally:
        for worker in workers:
            worker.stop()
    verdicts = [
        {name: int(n) for name, n in zip(VERDICT_NAMES, core.verdicts(), strict=True) if n} for core in cores
    ]
    for _, devices in sides:
        for device in devices:
            device.close()
    return {"verdicts": verdicts, "links": links}


def _jumbo(port: Any) -> Any:
    return type(port)(port.side, port.mac, port.address, MTU_OF_JUMBO)


def other_header(state: str) -> dict[str, str]:
    """A worker that was built from another nat.h than the engine."""
    Eal(memory_mb=64)
    pool = Mempool("buffers", 1024)
    core = Core(config())
    original = ffi.cast("uint8_t *", Core.api_address())
    said = {}
    for name, at in (("size", 0), ("abi", 4), ("hash", 8)):
        copy = ffi.new("uint8_t[]", ffi.unpack(ffi.cast("char *", original), 128))
        copy[at] ^= 1
        settings = ffi.new("struct workers_config *")
        settings.api = ffi.cast("const struct nat_api *", copy)
        settings.n, settings.cores[0] = 1, ffi.cast("struct nat_core *", core.address)
        settings.pool = pool._pool
        error = ffi.new("char[256]")
        assert lib.workers_start(settings, error, len(error)) == ffi.NULL
        said[name] = ffi.string(error).decode()
    return said


def borrow(
    device: str,
    state: str,
    force: bool = False,
    seconds: float = 0,
    address: str = "",
    tagged: bool = False,
) -> dict[str, Any]:
    """Takes a kernel interface and keeps it until the end, or tells why not."""
    from ipaddress import IPv4Address

    from nat_fastpath.dpdk.kernel_interface import Interface

    try:
        interface = Interface(
            device,
            mtu=1600,
            mac=bytes.fromhex("020000000042"),
            addresses=[IPv4Address(address)] if address else [],
            state_dir=Path(state),
            force=force,
        )
        if tagged:
            interface.for_af_xdp(tagged=True)
        else:
            interface.for_af_packet()
    except InterfaceError as error:
        return {"error": str(error)}
    print("borrowed", flush=True)
    time.sleep(seconds)
    changes = interface.changes
    interface.restore()
    interface.restore()
    return {"changes": changes}


def by_dpdks_words(state: str, force: bool = False) -> list[str]:
    """What is said of a kernel interface that stands in devargs, and of a tap that is taken; "" is opened."""
    Eal(memory_mb=64)
    pool = Mempool("buffers", 2048)
    said, opened = [], []
    for device in ("net_pcap0,iface=port", "net_tap0,iface=lan", "net_tap1,iface=lan", "net_tap2,iface=wan"):
        try:
            opened.append(Port(device, pool, index=0, state_dir=Path(state), force=force))
            said.append("")
        except DpdkError as error:
            said.append(str(error))
    for port in opened:
        port.close()
    Port("net_tap3,iface=lan", pool, index=0, state_dir=Path(state)).close()
    return said


def put_back(state: str) -> list[str]:
    from nat_fastpath.dpdk import repair

    return repair(Path(state))


def write_capture(path: str, frames: list[bytes]) -> None:
    with PcapWriter(path, linktype=1) as writer:
        for frame in frames:
            writer.write(frame)


def main(functions: dict[str, Any]) -> None:
    name, arguments = sys.argv[1:]
    print(json.dumps(functions[name](*json.loads(arguments))))


if __name__ == "__main__":
    main(globals())
