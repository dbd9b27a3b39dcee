# SPDX-License-Identifier: Apache-2.0
"""The traffic of a pair moves on purpose, both ways and from both sides, and no packet is lost."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_control.client import Client
from nat_control.lab import Lab, until
from switch_agent.pair_lab import CLI, PairLab
from tests.netns.test_pair import passes, stream


@pytest.fixture
def net() -> Iterator[PairLab]:
    with Lab() as lab:
        net = PairLab(lab, misses=50)  # loads of the machine are no deaths here
        net.start_agent()
        yield net


def peer(net: PairLab, name: str, *words: str) -> tuple[int, str]:
    """The command `peer` at the server or the agent: its exit code, and what it said."""
    done = subprocess.run(
        [*CLI, "peer", *words, "--socket", str(net.lab.directory / f"{name}.sock")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_both_verbs_at_both_sides_lose_nothing(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    flows = 200
    record = stream(net, 300, rate=2000, flows=flows)
    until("its sessions have their rules", lambda: net.show("agent")["offloaded"] >= flows)
    began = time.monotonic_ns()
    for name, verb, who, kept in (
        ("agent", "takeover", "switch", True),
        ("agent", "release", "server", False),
        ("server", "release", "switch", True),
        ("server", "takeover", "server", False),
    ):
        client = Client(net.lab.directory / f"{name}.sock")
        told = client.move(verb)
        assert (told["result"], told["proven"], told["kept"]) == ("done", True, kept), told
        status = net.show("agent")
        assert (status["carrier"], status["kept"]) == (who, kept)
        assert client.move(verb)["result"] == "unchanged"
    ended = time.monotonic_ns()
    code, said = peer(net, "server", "takeover")
    assert (code, said) == (0, "this side carries already\n")
    seen = record(now=True)
    assert seen.sent[-1] > ended
    assert not len(seen.lost(began)), f"{len(seen.lost(began))} of {len(seen.sent)} are lost"


def kill(process: Any) -> None:
    process.popen.kill()
    process.popen.wait()


@pytest.mark.long
def test_what_an_operator_keeps_at_the_switch_stays_there(net: PairLab) -> None:
    """The server is not there, comes, dies, the agent starts anew: the switch carries until it is released."""
    code, said = peer(net, "agent", "release")
    assert code == 1
    assert "the peer is not in step (alone); `peer release --later` gives it the traffic" in said
    code, said = peer(net, "agent", "takeover")
    assert (code, said.split(":")[0]) == (
        0,
        "this side carries, and keeps the traffic until it is taken back or released",
    )

    def equal() -> bool:
        shown: dict[str, Any] = Client(net.lab.directory / "server.sock").peer()
        return bool(shown["verified"]) and (shown["carrier"], shown["kept"]) == ("peer", True)

    net.start_server()
    until("both hold the same, and the server knows who carries", equal)
    kill(net.server)
    net.start_server()
    until("they do again", equal)
    kill(net.agent)
    net.start_agent()
    until("they do after a restart of the agent", equal)
    assert net.show("agent")["carrier"] == "switch"
    code, said = peer(net, "server", "release", "--later")
    assert (code, "ask there" in said) == (1, True)
    code, said = peer(net, "agent", "release", "--later", "--json")
    assert (code, json.loads(said)["result"]) == (0, "later")
    net.carrier("server")
    passes(net)


def test_refusals_are_one_line_and_change_nothing(net: PairLab) -> None:
    net.start_server()
    net.carrier("server")
    assert peer(net, "agent", "takeover")[0] == 0
    net.nat.ip("link", "set", "nat-in", "down")
    until("the agent sees it", lambda: "has no link" in peer(net, "agent", "release")[1])
    for name, verb in (("agent", "release"), ("server", "takeover")):
        code, said = peer(net, name, verb)
        assert (code, said) == (1, f"tandem-nat: peer {verb}: port 3 (inner) has no link\n")
    assert net.show("agent")["kept"] is True
    net.nat.ip("link", "set", "nat-in", "up")
    until("it is released", lambda: peer(net, "server", "takeover")[0] == 0)
    net.carrier("server")
    passes(net)


def show_peer(net: PairLab, name: str, *words: str) -> tuple[int, str]:
    where = str(net.lab.directory / f"{name}.sock")
    done = subprocess.run(
        [*CLI, "show", "peer", *words, "--socket", where], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
def test_show_peer_names_what_one_side_alone_holds() -> None:
    """The agent has less room than the server: equal, and 0, until that is used up; then 1, with the sessions."""
    with Lab() as lab:
        net = PairLab(lab, misses=50, nat={"max_sessions": 64})
        config = yaml.safe_load(Path(net.server_config).read_text())
        config["nat"]["max_sessions"] = 1024
        Path(net.server_config).write_text(yaml.safe_dump(config))
        net.start_agent()
        net.start_server()
        net.carrier("server")
        for name in ("server", "agent"):
            code, said = show_peer(net, name)
            assert code == 0, said
            assert "equal, " in said
            assert "peer, and keeps" not in said
        assert "this side" in show_peer(net, "server", "--last")[1]

        flows = 100
        record = stream(net, 3, rate=200, flows=flows)
        record()
        until("some are refused", lambda: Client(lab.directory / "server.sock").peer()["refused_total"])
        held = {row["id"]: row for row in net.show("server", "sessions")}
        lacking = set(held) - {row["id"] for row in net.show("agent", "sessions")}
        assert len(lacking) >= flows - 64
        for name, there in (("server", "here"), ("agent", "there")):
            code, said = show_peer(net, name, "--json")
            told = json.loads(said)
            assert code == 1
            assert {row["id"] for row in told["refused"]} == lacking
            assert {row["held"] for row in told["refused"]} == {there}
            code, said = show_peer(net, name)
            assert code == 1
            assert f"{len(lacking)} held at one side alone" in " ".join(said.split())
            one = held[min(lacking)]
            assert one["id"] in said
            assert one["internal"] in said

        code, said = peer(net, "agent", "takeover")
        assert code == 1
        assert said.startswith("tandem-nat: peer takeover: both sides do not hold the same sessions")
        assert net.show("agent")["carrier"] == "server"
        assert peer(net, "agent", "takeover", "--force")[0] == 0
        assert net.show("agent")["carrier"] == "switch"


def test_no_peer_no_verbs() -> None:
    with Lab() as lab:
        net = PairLab(lab)
        config = yaml.safe_load(Path(net.agent_config).read_text())
        del config["peer"], config["heartbeat"]
        Path(net.agent_config).write_text(yaml.safe_dump(config))
        net.start_agent()
        for words in (("takeover",), ("release", "--later")):
            assert peer(net, "agent", *words) == (
                2,
                "tandem-nat: this instance has no peer, or peer.mode is off\n",
            )


def test_both_sides_of_a_split_keep_what_the_carrier_has_done() -> None:
    """Only the sync channel is cut, heartbeats go on: the server opens a session of which the agent hears nothing, then
    the switch carries, and the same endpoint gets another port. Back together both hold the same at once."""
    with Lab() as lab:
        net = PairLab(lab, mode="asynchronous", misses=50)
        net.start_agent()
        net.start_server()
        net.carrier("server")
        for where in (net.nat, net.switch):
            where.ip("rule", "add", "prio", "10", "ipproto", "tcp", "dport", "7000", "blackhole")
            where.ip("rule", "add", "prio", "10", "ipproto", "tcp", "sport", "7000", "blackhole")
        record = stream(net, 300, rate=200, flows=20)
        until("the server has the sessions alone", lambda: net.show("server")["sessions"] >= 20)
        assert net.show("agent")["sessions"] == 0
        assert net.show("agent")["carrier"] == "server"
        net.switch.run("ss", "-K", "sport", "=", ":7000")
        net.carrier("switch")
        until("the agent opens them, too", lambda: net.show("agent")["sessions"] >= 20)

        def endpoints(name: str) -> dict[str, tuple[str, str]]:
            return {row["internal"]: (row["id"], row["external"]) for row in net.show(name, "sessions")}

        first, second = endpoints("server"), endpoints("agent")
        assert first.keys() == second.keys()
        assert not set(first.values()) & set(second.values())
        for where in (net.nat, net.switch):
            where.ip("rule", "del", "prio", "10", "ipproto", "tcp", "dport", "7000", "blackhole")
            where.ip("rule", "del", "prio", "10", "ipproto", "tcp", "sport", "7000", "blackhole")
        mended = time.monotonic_ns()
        net.carrier("server", 40)
        assert endpoints("server") == endpoints("agent") == second, (
            "the carrier's sessions stay, the others have ended"
        )
        code, said = show_peer(net, "server")
        assert code == 0, said
        until("the server carries for a while", lambda: time.monotonic_ns() > mended + 10**9)
        seen = record(now=True)
        assert not len(seen.lost(mended)), "what was established at the carrier loses nothing by the merge"
