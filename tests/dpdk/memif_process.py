# SPDX-License-Identifier: Apache-2.0
"""A memif under load whose other end comes and goes, in a process of its own (see dpdk_process)."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nat_fastpath.cores import make, parts
from nat_fastpath.dpdk import Eal, Mempool, Port, Workers
from tests.dpdk.dpdk_process import main
from tests.dpdk.memif_peer import Peer
from tests.packets import CLIENT, INSIDE, OUR_ADDRESS, config, echo, frame


def come_and_go(state: str, n: int, seconds: float, devices: str) -> dict[str, Any]:
    """``n`` workers; how often the other end connected, and what was received and answered in between."""
    Eal(memory_mb=192)
    pool = Mempool("buffers", 16384)
    socket = f"{state}/memif.sock"
    inside = f"net_memif0,role=server,socket={socket},socket-abstract=no"
    ports = [
        Port(device, pool, index=i, mac=config().ports[i].mac, state_dir=Path(state))
        for i, device in enumerate((inside, devices))
    ]
    core = make(config(), n)
    workers = Workers(parts(core), ports, pool, idle="busy")
    workers.start()
    peer = subprocess.Popen(
        [sys.executable, "-m", "tests.dpdk.memif_process", "peer", f'["{socket}", {seconds}]'],
        stdout=subprocess.PIPE,
        text=True,
    )
    said = peer.communicate(timeout=seconds + 20)[0]
    workers.stop()
    for port in ports:
        port.close()
    return {"peer": said, "in_use": pool.in_use}


def peer(socket: str, seconds: float) -> dict[str, int]:
    request = frame(echo(CLIENT, OUR_ADDRESS[INSIDE], 1), INSIDE)
    end = time.monotonic() + seconds
    times = received = sent = refused = 0
    while time.monotonic() < end:
        try:
            other = Peer(socket, request)
        except OSError:  # it has not yet seen that the last one went
            refused += 1
            continue
        stop = time.monotonic() + random.random() / 500
        while time.monotonic() < stop:
            other.offer()
        times += 1
        received += other.received
        sent += other.sent
        other.close()
    return {"times": times, "received": received, "sent": sent, "refused": refused}


if __name__ == "__main__":
    main(globals())
