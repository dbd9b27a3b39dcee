# SPDX-License-Identifier: Apache-2.0
"""What can happen to a pair: each fault breaks something, waits, and mends it again. None waits for the recovery."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

from nat_control.client import Client
from nat_control.lab import Process
from switch_agent.pair_lab import PairLab

Fault = Callable[[PairLab, random.Random], None]
FAULTS: dict[str, Fault] = {}


def fault(one: Fault) -> Fault:
    FAULTS[one.__name__.removeprefix("_").replace("_", " ")] = one
    return one


def _killed(process: Process) -> None:
    process.popen.kill()
    process.popen.wait()


def _while(chance: random.Random, longest: float = 2.0) -> None:
    """How long something stays broken: often shorter than any detection, sometimes long."""
    time.sleep(chance.choice([0.002, 0.05, 0.3, longest]) * chance.uniform(0.5, 1))


@fault
def _server_killed(net: PairLab, chance: random.Random) -> None:
    _killed(net.server)
    _while(chance)
    net.start_server()


@fault
def _server_ended(net: PairLab, chance: random.Random) -> None:
    net.server.stop()
    _while(chance)
    net.start_server()


@fault
def _server_stopped(net: PairLab, chance: random.Random) -> None:
    net.server.signal(signal.SIGSTOP)
    _while(chance)
    net.server.signal(signal.SIGCONT)


@fault
def _agent_killed(net: PairLab, chance: random.Random) -> None:
    _killed(net.agent)
    _while(chance)
    net.start_agent()


@fault
def _agent_ended(net: PairLab, chance: random.Random) -> None:
    net.agent.stop()
    _while(chance)
    net.start_agent()


@fault
def _agent_stopped(net: PairLab, chance: random.Random) -> None:
    net.agent.signal(signal.SIGSTOP)
    _while(chance)
    net.agent.signal(signal.SIGCONT)


@fault
def _one_link_down(net: PairLab, chance: random.Random) -> None:
    _down(net, chance, chance.choice(["inner", "outer"]))


@fault
def _data_network_cut(net: PairLab, chance: random.Random) -> None:
    _down(net, chance, "inner", "outer")


@fault
def _sync_network_cut(net: PairLab, chance: random.Random) -> None:
    _down(net, chance, "sync")


def _down(net: PairLab, chance: random.Random, *devices: str) -> None:
    for device in devices:
        net.switch.ip("link", "set", device, "down")
    _while(chance)
    for device in devices:
        net.switch.ip("link", "set", device, "up")


@fault
def _openflow_cut(net: PairLab, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 3)):
        net.switch.run("ss", "-K", "sport", "=", ":6653", "or", "sport", "=", ":6654")
        _while(chance, 0.5)


@fault
def _switch_restarted(net: PairLab, chance: random.Random) -> None:
    net.ovs.restart()


@fault
def _switch_restarted_while_it_carries(net: PairLab, chance: random.Random) -> None:
    _killed(net.server)
    net.carrier("switch")
    net.ovs.restart()
    _while(chance)
    net.start_server()


@fault
def _agent_killed_while_the_switch_carries(net: PairLab, chance: random.Random) -> None:
    _killed(net.server)
    net.carrier("switch")
    time.sleep(chance.uniform(0, 0.5))
    _killed(net.agent)
    _while(chance)
    net.start_agent()
    net.start_server()


@fault
def _server_killed_twice(net: PairLab, chance: random.Random) -> None:
    """The second time during its return."""
    _killed(net.server)
    net.start_server()
    time.sleep(chance.uniform(0, 1))
    _killed(net.server)
    _while(chance)
    net.start_server()


def _moved(net: PairLab, who: str, verb: str, **options: bool) -> None:
    Client(net.lab.directory / f"{who}.sock").move(verb, **options)


def _some(net: PairLab, chance: random.Random) -> list[str]:
    """Ids of sessions that the server has."""
    ids = [row["id"] for row in net.show("server", "sessions")]
    return chance.sample(ids, min(20, len(ids)))


@fault
def _planned_there_and_back(net: PairLab, chance: random.Random) -> None:
    asked = chance.choice(["agent", "server"])
    _moved(net, asked, "takeover" if asked == "agent" else "release")
    _while(chance)
    _moved(net, *chance.choice([("agent", "release"), ("server", "takeover")]))


@fault
def _server_killed_after_it_released(net: PairLab, chance: random.Random) -> None:
    """The switch keeps the traffic until it is told otherwise."""
    _moved(net, "server", "release")
    _killed(net.server)
    _while(chance)
    net.start_server()
    net.carrier("switch")
    _moved(net, "agent", "release", later=True)


@fault
def _server_killed_in_front_of_offloaded(net: PairLab, chance: random.Random) -> None:
    """Some sessions have rules in front of the server; then it dies, or the agent does."""
    Client(net.lab.directory / "server.sock").offload("add", _some(net, chance))
    _while(chance, 0.5)
    if chance.random() < 0.5:
        _server_killed(net, chance)
    else:
        _agent_killed(net, chance)


@fault
def _offloaded_and_back(net: PairLab, chance: random.Random) -> None:
    operator = Client(net.lab.directory / "server.sock")
    chosen = _some(net, chance)
    for what in ("add", "remove"):
        operator.offload(what, chosen)
        _while(chance, 0.3)
