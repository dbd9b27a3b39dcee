# SPDX-License-Identifier: Apache-2.0
"""What is wrong is told once when it begins, once when it is over, and stands in between."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from nat_control.api import Api
from nat_control.health import QUIET, Health, drops_of, state_of, states_of
from nat_control.sync import actions as do
from nat_control.sync.actions import State
from nat_fastpath.engine import VERDICT_NAMES, Core
from tests.packets import CLIENT, SERVER, Nat, config, udp
from tests.unit.test_pair_reload import pair


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_state_comes_and_goes(said: list[str]) -> None:
    health = Health(said.append)
    for waiting in (9, 10):
        health.look({"events": f"{waiting} events wait"}, {})
    assert said == ["degraded: 9 events wait"]
    assert health.lines == ["10 events wait"]
    health.look({}, {})
    assert said[1:] == ["no longer degraded: 10 events wait"]
    assert health.lines == []


def test_what_is_counted_lasts_until_it_has_been_quiet(said: list[str]) -> None:
    health = Health(said.append)
    health.look({}, {"tx_dropped.external": 0, "drop_no_port": 5})
    assert said == ["degraded: no external port is free: 5 packets of new sessions were refused (nat.pool)"]
    health.look({}, {"tx_dropped.external": 99, "drop_no_port": 5})
    assert len(said) == 1, "a sender that looks for its limit"
    health.look({}, {"tx_dropped.external": 299, "drop_no_port": 5})
    assert said[1:] == ["degraded: external: 200 packets found no room to be sent"]
    for _ in range(QUIET - 2):
        health.look({}, {"tx_dropped.external": 300, "drop_no_port": 5})
    assert len(health.lines) == 1
    health.look({}, {"tx_dropped.external": 400, "drop_no_port": 5})
    assert health.lines == ["external: 100 packets found no room to be sent"]
    assert len(said) == 3


def test_a_directory_without_room(said: list[str], tmp_path: Path) -> None:
    Health(said.append, tmp_path).look({}, {})
    assert said == []
    Health(said.append, tmp_path / "gone").look({}, {})
    assert "No such file or directory: a restart could not note what it changes" in said[0]


def test_states_and_drops_of_a_core(said: list[str]) -> None:
    nat = Nat(event_ring=16, max_sessions=1024)
    assert states_of(nat.core, 97, 100) == {}
    for i in range(20):
        nat.verdict(udp(CLIENT, 4000 + i, SERVER, 53))
    found = states_of(nat.core, 98, 100)
    assert found["events"] == "the control loop does not keep up: 14 of 16 events wait"
    assert found["buffers"] == "packet buffers are used up: 98 of 100 are in use"
    drops = drops_of(nat.core)
    assert drops["drop_events_full"] == 6
    assert drops.keys() < set(VERDICT_NAMES)
    assert "forward" not in drops_of(Core(config()))


def test_an_operator_that_cannot_be_let_in_is_let_in_later(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = Health(said.append)

    async def both() -> str:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(health.unhandled)
        api = Api({"status": lambda: {"instance": "one"}}, lambda *_: None, threads=False)  # type: ignore[arg-type]
        await api.start(tmp_path / "nat.sock")
        assert api._server is not None
        listener = api._server.sockets[0]._sock  # type: ignore[attr-defined]
        refused = iter([OSError(errno.EMFILE, "Too many open files")])
        take = type(listener).accept

        def accept(sock: object) -> object:
            if sock is listener and (error := next(refused, None)):
                raise error
            return take(sock)

        monkeypatch.setattr("socket.socket.accept", accept)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "nat.sock")
        writer.write(b'{"show": "status"}\n')
        answer = await reader.readline()
        writer.close()
        await api.close()
        return answer.decode()

    assert asyncio.run(both()) == '{"status":{"instance":"one"}}\n'
    assert said == ["degraded: the system refuses what is needed: Too many open files"]


def test_a_pair_says_why_it_does_not_protect() -> None:
    """Refused by the peer's greeting, or with sessions that contradict the peer's."""
    made, told = pair(), list[do.Action]()
    made._takes_key, made._bell, made._notice = False, None, told.append
    made._told_carrier = asyncio.Queue()
    made.transport = SimpleNamespace(fileno=lambda: None)  # type: ignore[assignment]
    made.watch = SimpleNamespace(watch_tcp=lambda _: None)  # type: ignore[assignment]
    made.view = SimpleNamespace(notice=lambda _: None)  # type: ignore[assignment]

    def seen(action: do.Action) -> list[str]:
        if isinstance(action, do.StateChanged):
            made.protocol.state = action.after
        made._noticed(action)
        return list(state_of(made).values())

    assert seen(do.StateChanged(State.HANDSHAKE, State.FAILED, "both would hand out X"))[0].endswith(
        ": both would hand out X"
    )
    alone = seen(do.StateChanged(State.FAILED, State.ALONE, "closed"))
    assert alone == ["the peer is not in step (alone): sessions are not protected: both would hand out X"]
    assert seen(do.StateChanged(State.EXCHANGING, State.OPERATIONAL, "")) == []
    assert "(2 of 256 digests differ)" in seen(do.DigestCompared((3, 7)))[0]
    assert seen(do.DigestCompared(())) == []
    seen(do.DigestCompared((3,)))
    assert seen(do.StateChanged(State.OPERATIONAL, State.ALONE, "closed")) == [
        "the peer is not in step (alone): sessions are not protected"
    ]
    assert len(told) == 7
