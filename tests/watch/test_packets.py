# SPDX-License-Identifier: Apache-2.0
"""Whose datagrams keep a peer alive: its own of this conversation, and no others."""

import socket
from collections.abc import Callable

import pytest

from nat_fastpath.watch import MAX_COUNTERS, Watch

from .helpers import BODY, KEY, Forger, siphash, until, watch


def test_siphash_against_its_paper() -> None:
    """Appendix A: the key 00..0f and the message 00..0e."""
    assert siphash(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5


def test_the_packet_is_as_documented() -> None:
    with watch(None, epoch=0xABCDE) as w, Forger(w, nonce=99) as peer:
        peer.send(peer.heartbeat())
        heard = peer.hear()
    assert BODY.size + 8 == 64
    assert heard["magic"] == b"TNHB"
    assert (heard["version"], heard["instance"], heard["epoch"]) == (2, 1, 0xABCDE)
    assert (heard["flags"], heard["workers"], heard["progress"]) == (0, 0, 0)
    assert heard["interval_us"] == 20_000
    assert heard["echo"] == 99
    assert heard["nonce"] != 0
    assert heard["sequence"] >= 1


BAD: dict[str, tuple[Callable[[Forger, list[bytes]], bytes], str]] = {
    "another key": (lambda peer, sent: peer.heartbeat(key=bytes(16)), "bad_auth"),
    "a changed bit": (lambda peer, sent: flip(peer.heartbeat()), "bad_auth"),
    "another version": (lambda peer, sent: peer.heartbeat(version=1), "bad_auth"),
    "another magic": (lambda peer, sent: peer.heartbeat(magic=b"BHNT"), "bad_auth"),
    "cut short": (lambda peer, sent: peer.heartbeat()[:-1], "bad_auth"),
    "too long": (lambda peer, sent: peer.heartbeat() + b"\0", "bad_auth"),
    "empty": (lambda peer, sent: b"", "bad_auth"),
    "replayed": (lambda peer, sent: sent[-1], "bad_replay"),
    "sequence 0": (lambda peer, sent: peer.heartbeat(sequence=0), "bad_replay"),
    "our own instance": (lambda peer, sent: peer.heartbeat(instance=1), "bad_foreign"),
    "a third instance": (lambda peer, sent: peer.heartbeat(instance=3), "bad_foreign"),
    "another epoch": (lambda peer, sent: peer.heartbeat(epoch=201), "bad_foreign"),
    "another conversation": (lambda peer, sent: peer.heartbeat(nonce=78), "bad_foreign"),
    "no answer to us": (lambda peer, sent: peer.heartbeat(echo=0), "unproved"),
}


def flip(datagram: bytes) -> bytes:
    return datagram[:20] + bytes([datagram[20] ^ 1]) + datagram[21:]


@pytest.mark.parametrize("kind", BAD)
def test_bad_heartbeats_do_not_keep_a_peer_alive(
    kind: str, stream: tuple[socket.socket, socket.socket]
) -> None:
    make, counter = BAD[kind]
    with watch(peer_instance=2) as w, Forger(w) as peer:
        sent = peer.converse()
        w.arm(b"take over", stream[0].fileno())
        before = w.stats()[counter]

        def dead() -> bool:
            peer.send(make(peer, sent))
            return w.fired is not None

        until(dead)
        assert w.fired == "silence"
        assert w.stats()[counter] > before


def test_our_own_heartbeats_sent_back_to_us_are_not_the_peer() -> None:
    """Both sides have one key; without the instance a mirror would be a peer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mirror:
        mirror.bind(("127.0.0.1", 0))
        mirror.settimeout(20)
        with watch(mirror.getsockname()) as w:
            for _ in range(5):
                mirror.sendto(*mirror.recvfrom(2048))
            until(lambda: w.stats()["bad_foreign"] == 5)
            assert not w.stats()["alive"]


def test_a_restarted_peer_is_heard_once_its_former_life_is_over() -> None:
    with watch() as w, Forger(w, nonce=1) as first, Forger(w, nonce=2) as second:
        second.fields["epoch"] = 201
        first.converse()
        assert w.stats()["peer_epoch"] == 200
        until(lambda: not w.stats()["alive"])
        second.send(second.heartbeat())
        until(lambda: w.stats()["peer_epoch"] == 201)
        second.converse()
        assert w.stats()["alive"]


def test_a_recording_of_a_former_life_proves_nothing() -> None:
    """Everything that the first life said was true then, and was an answer to us."""
    with watch() as w, Forger(w, nonce=1) as first, Forger(w, nonce=2) as second:
        recorded = first.converse()
        until(lambda: not w.stats()["alive"])
        second.converse()
        until(lambda: not w.stats()["alive"])
        received, unproved = w.stats()["received"], w.stats()["unproved"]
        for datagram in recorded:
            first.send(datagram)
        until(lambda: w.stats()["unproved"] == unproved + len(recorded))
        assert w.stats()["received"] == received
        assert not w.stats()["alive"]


def test_a_peer_that_was_lost_for_a_while_goes_on() -> None:
    with watch() as w, Forger(w) as peer:
        peer.converse()
        until(lambda: not w.stats()["alive"])
        peer.send(peer.heartbeat())
        until(lambda: w.stats()["alive"])


def test_a_flood_of_garbage_hides_neither_life_nor_death(stream: tuple[socket.socket, socket.socket]) -> None:
    with watch() as w, Forger(w) as flood, watch(w.address, instance=2) as peer:
        until(lambda: w.stats()["alive"])
        w.arm(b"take over", stream[0].fileno())
        received = w.stats()["received"]

        def flooded() -> bool:
            for _ in range(20):
                flood.send(b"garbage")
            return w.stats()["received"] > received + 20

        until(flooded)
        assert w.fired is None
        peer.stop()

        def dead() -> bool:
            for _ in range(20):
                flood.send(b"garbage")
            return w.fired is not None

        until(dead)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": bytes(15)}, "key must have 16 bytes, not 15"),
        ({"instance": 256}, "instance must be between 0 and 255, not 256"),
        ({"peer_instance": 1}, "instance and peer_instance are both 1"),
        ({"epoch": -1}, "epoch must be between 0 and 4294967295, not -1"),
        ({"interval_ms": 0}, "interval_ms must be between"),
        ({"misses": 0}, "misses must be between 1 and 1000, not 0"),
        ({"patience_ms": 0}, "patience_ms must be between"),
        ({"counters": [8] * (MAX_COUNTERS + 1)}, "number of counters must be between 0 and 64, not 65"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        watch(**({"key": KEY} | changes))  # type: ignore[arg-type]


def test_a_bound_socket_can_be_handed_over() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        handed = Watch(udp.fileno(), None, KEY, instance=1, epoch=1)
        address = udp.getsockname()
    with handed, watch(handed.address, instance=2) as peer:
        assert handed.address == address
        until(lambda: handed.stats()["alive"] and peer.stats()["alive"])


def test_only_a_udp_socket_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, pytest.raises(ValueError, match="UDP socket"):
        Watch(tcp.fileno(), None, KEY, instance=1, epoch=1)


def test_an_address_in_use_is_an_error() -> None:
    with watch() as w, pytest.raises(OSError, match="in use"):
        Watch(w.address, None, KEY, instance=1, epoch=1)
