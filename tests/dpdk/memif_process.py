# SPDX-License-Identifier: Apache-2.0
"""A memif under load whose other end comes and goes, in a process of its own (see dpdk_process)."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from nat_fastpath.cores import make, parts
from nat_fastpath.dpdk import Eal, Mempool, Port, Workers
from tests.dpdk.dpdk_process import main
from tests.dpdk.memif_peer import Client, Server
from tests.packets import CLIENT, INSIDE, OUR_ADDRESS, config, echo, frame


def come_and_go(state: str, role: str, n: int, seconds: float) -> dict[str, int]:
    """``n`` workers on a memif of this role: how often it was connected, what it took and sent, and what is lost."""
    Eal(memory_mb=192)
    pool = Mempool("buffers", 16384)
    path = f"{state}/memif.sock"
    others = {"server": "clients", "client": "servers"}[role]
    other = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, others, json.dumps([path, seconds])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    other.stdout.readline()  # it listens, if it has to
    devices = (f"net_memif0,role={role},socket={path},socket-abstract=no", "net_null0,no-rx=1")
    ports = [
        Port(device, pool, index=i, mac=config().ports[i].mac, state_dir=Path(state))
        for i, device in enumerate(devices)
    ]
    core = make(config(), n)
    workers = Workers(parts(core), ports, pool)
    workers.start()
    assert other.stdin is not None
    other.stdin.close()
    while other.poll() is None:
        if not ports[0].link().up:
            ports[0].seek_other_end()
        time.sleep(0.001)
    workers.stop()
    for port in ports:
        port.close()
    said: dict[str, int] = json.loads(other.stdout.read().splitlines()[-1])
    return {**said, "in_use": pool.in_use}


def _flood(other: Client | Server) -> None:
    stop = time.monotonic() + random.random() / 500
    while time.monotonic() < stop:
        other.offer()


def clients(path: str, seconds: float) -> dict[str, int]:
    print("ready", flush=True)
    sys.stdin.read()
    request = frame(echo(CLIENT, OUR_ADDRESS[INSIDE], 1), INSIDE)
    end = time.monotonic() + seconds
    times = received = sent = 0
    while time.monotonic() < end:
        try:
            other = Client(path, request)
        except OSError:  # the NAT has not yet seen that the last one went
            continue
        _flood(other)
        times, received, sent = times + 1, received + other.received, sent + other.sent
        other.close()
    return {"times": times, "received": received, "sent": sent}


def servers(path: str, seconds: float) -> dict[str, int]:
    end = time.monotonic() + seconds
    times = received = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(10)
        print("ready", flush=True)
        while time.monotonic() < end:
            try:
                other = Server(listener)
            except OSError:  # it began again
                continue
            _flood(other)
            times, received = times + 1, received + other.received
            other.close()
    return {"times": times, "received": received}


if __name__ == "__main__":
    main(globals())
