# SPDX-License-Identifier: Apache-2.0
"""Two servers with one MAC and the same addresses, on real bridges: one dies, hangs, or is cut off, and what runs goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nat_control.client import Client
from nat_control.lab import Lab, until
from nat_control.twin_lab import NAMES, OUTSIDE, TwinLab
from tests.stopped_thread import stopped_thread


@contextmanager
def twins(**options: Any) -> Iterator[TwinLab]:
    with Lab() as lab:
        yield TwinLab(lab, **options)


@pytest.fixture
def net() -> Iterator[TwinLab]:
    with twins() as net:
        net.start(*NAMES)
        net.in_step("one")
        yield net


def passes(net: TwinLab) -> None:
    def pings() -> bool:
        said = net.client.attempt("ping", "-q", "-i", "0.1", "-W", "1", "-c", "5", OUTSIDE).stdout
        return " 5 received" in said

    until("five pings in a row are answered", pings, 10)


def where(net: TwinLab, name: str) -> None:
    """Both switches know the shared MAC behind this server."""
    until(
        f"the MAC is at {name}",
        lambda: {net.seen_at(side) for side in ("inner", "outer")} == {f"inner-{name}", f"outer-{name}"},
        5,
    )


def streams(net: TwinLab, seconds: int) -> list[Any]:
    """A UDP stream of 1000 packets per second and a TCP connection, by iperf3."""
    for port in ("5201", "5202"):
        net.outside.start("iperf3", "-s", "-B", OUTSIDE, "--forceflush", "-p", port, name=f"s{port}").ready(
            "Server listening"
        )
    shape = ["-u", "-l", "100", "-b", "800k"]
    return [
        net.client.start(
            "iperf3", "-c", OUTSIDE, "-p", port, *more, "-t", str(seconds), "--json", name=f"c{port}"
        )
        for port, more in (("5201", shape), ("5202", ["-b", "4M"]))
    ]


def ended(processes: list[Any]) -> int:
    """Datagrams lost; the connection must have lived."""
    for process in processes:
        assert process.wait(40) == 0, process.output
    udp, tcp = (json.loads(process.output)["end"] for process in processes)
    assert tcp["sum_received"]["bytes"] > 1 << 20
    return int(udp["sum"]["lost_packets"])


def test_the_active_one_is_killed_and_comes_back(net: TwinLab) -> None:
    where(net, "one")
    running = streams(net, 8)
    until("both streams run", lambda: net.show("one")["sessions"] >= 4)
    until("the other one has them", lambda: net.show("two")["sessions"] >= 4)
    known = {row["id"] for row in net.show("one", "sessions")}
    net.kill("one")
    net.carrier("two")
    where(net, "two")
    assert {row["id"] for row in net.show("two", "sessions")} >= known, "sessions are lost"
    net.start("one")
    net.in_step("two")  # nothing moves back by itself
    lost = ended(running)
    assert lost < 1000, f"{lost} of 8000 packets lost"
    peer = Client(net.lab.directory / "two.sock").peer()
    assert peer["verified"] is True
    assert net.show("one", "stats")["verdicts"]["forward"] == 0
    moved = Client(net.lab.directory / "one.sock").move("takeover")
    assert (moved["result"], moved["carrier"]) == ("done", "here"), moved
    net.in_step("one")
    where(net, "one")
    passes(net)


def test_release_and_takeover_lose_nothing(net: TwinLab) -> None:
    running = streams(net, 6)
    until("both streams run", lambda: net.show("two")["sessions"] >= 4)
    for name, verb, carrier in (
        ("one", "release", "two"),
        ("two", "release", "one"),
        ("two", "takeover", "two"),
    ):
        moved = Client(net.lab.directory / f"{name}.sock").move(verb, force=True)
        assert moved["result"] == "done", moved
        net.in_step(carrier)
        where(net, carrier)
    lost = ended(running)  # on an idle machine none
    assert lost <= 300, f"{lost} of 6000 packets lost"


def test_a_stopped_one_is_replaced_and_stands_down_when_it_wakes(net: TwinLab) -> None:
    passes(net)
    net.servers["one"].signal(signal.SIGSTOP)
    net.carrier("two")
    where(net, "two")
    passes(net)
    net.servers["one"].signal(signal.SIGCONT)
    net.in_step("two")
    where(net, "two")
    passes(net)
    assert net.show("two")["role"]["term"] > 1


def test_one_of_two_workers_stands_still() -> None:
    """The other one goes on, and would answer on the ports for ever."""
    with twins(workers=2) as net:
        net.start(*NAMES)
        net.in_step("one")
        passes(net)
        with stopped_thread(net.servers["one"].pid, "nat-worker-1"):
            net.carrier("two", 5)
            assert net.role("one") == "stands by"
            assert "a worker stands still" in net.show("one")["role"]["why"]
            where(net, "two")
            passes(net)
        net.in_step("two")


def test_sync_network_cut_alone_moves_nothing(net: TwinLab) -> None:
    passes(net)
    net.sync_link(up=False)
    until("both know it", lambda: all(net.show(n)["role"]["peer"] == "not heard" for n in NAMES))
    until("it was asked and answered", lambda: net.show("two")["role"]["probes"]["answered"] >= 2)
    assert (net.role("one"), net.role("two")) == ("carries", "stands by")
    assert any("stays silent" in line for line in net.show("two")["degraded"])
    passes(net)
    where(net, "one")
    net.kill("one")  # and now the ports are silent, too
    net.carrier("two")
    where(net, "two")
    passes(net)


def test_sync_network_cut_with_both() -> None:
    with twins(peer={"on_split": "both"}) as net:
        net.start(*NAMES)
        net.in_step("one")
        passes(net)
        net.sync_link(up=False)
        until("both carry", lambda: [net.role(name) for name in NAMES] == ["carries", "carries"])
        net.sync_link(up=True)
        net.in_step("two")  # the later takeover stays
        where(net, "two")
        passes(net)


def test_data_network_cut_at_the_active_one(net: TwinLab) -> None:
    passes(net)
    net.switch.ip("link", "set", "outer-one", "down")
    net.in_step("two")
    where(net, "two")
    passes(net)
    net.switch.ip("link", "set", "outer-one", "up")
    net.kill("two")
    net.carrier("one")
    passes(net)


def test_a_planned_end_and_one_alone() -> None:
    with twins(peer={"return": "automatic"}) as net:
        net.start("two")
        net.carrier("two")  # nobody else is there
        passes(net)
        net.start("one")
        net.in_step("one")  # the primary takes it back
        where(net, "one")
        assert net.servers["one"].stop() == 0
        net.carrier("two")
        where(net, "two")
        passes(net)
