# SPDX-License-Identifier: Apache-2.0
"""Sessions from the outside of the core: hairpin, paging, commit, install and delete, events, memory, the API table."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import numpy as np
import pytest
from scapy.layers.inet import UDP

from nat_fastpath.engine import (
    CLOSE_REASONS,
    EVENT_OPEN,
    EVENT_UPDATE,
    FLAG_FOREIGN,
    FLAG_INBOUND,
    FLAG_PENDING,
    FLAG_PREVAILS,
    RECORD,
    TCP_STATES,
    Core,
    CoreError,
    Verdict,
    memory_for,
)
from tests.packets import (
    CLIENT,
    INSIDE,
    OTHER_CLIENT,
    OTHER_SERVER,
    OUTSIDE,
    SERVER,
    Nat,
    config,
    external,
    frame,
    ip,
    number,
    parse,
    records,
    small_pool,
    tcp,
    udp,
    vlan,
)

NAT_H = Path(__file__).parents[2] / "nat_fastpath" / "core" / "nat.h"


def a_record(**changes: int) -> np.ndarray:
    row = {
        "id": 77,
        "mapping_id": 78,
        "protocol": 17,
        "internal_addr": number(CLIENT),
        "internal_port": 4000,
        "external_addr": number("198.51.100.11"),
        "external_port": 5000,
        "remote_addr": number(SERVER),
        "remote_port": 53,
        "packets_out": (3 << 32) + 5,
        "bytes_in": 1 << 40,
        "age_ms": 9000,
        "idle_ms": 1000,
    }
    return records([{**row, **changes}])


@pytest.mark.parametrize("prevails", [False, True])
def test_what_is_left_of_two_external_endpoints_serves_new_sessions(prevails: bool) -> None:
    """After a split there are two; once the one that had the new sessions ends, there shall be no third."""
    nat = Nat()
    other = number(OTHER_SERVER)
    both = [a_record(), a_record(id=79, mapping_id=80, external_port=6000, remote_addr=other)]
    both[1]["flags"] |= FLAG_PREVAILS if prevails else 0
    assert [nat.core.install(one) for one in both] == [1, 1]
    serves, waits = both[::-1] if prevails else both
    sent = nat.out(udp(CLIENT, 4000, SERVER, 54))
    assert sent[UDP].sport == serves["external_port"][0]
    page, _ = nat.core.sessions(0)
    ends = page[page["external_port"] == serves["external_port"][0]]
    assert nat.core.delete(ends) == 2
    after = nat.out(udp(CLIENT, 4000, SERVER, 55))
    assert (after.src, after[UDP].sport) == (sent.src, waits["external_port"][0])
    assert nat.core.counters()["mappings"] == 1
    page, _ = nat.core.sessions(0)
    assert nat.core.delete(page) == 2
    assert nat.core.counters()["mappings"] == 0
    fresh = nat.out(udp(CLIENT, 4000, SERVER, 56))[UDP].sport
    assert fresh not in (5000, 6000), "the index has forgotten both"


def test_hairpin_needs_the_others_consent_and_shows_external_addresses() -> None:
    """RFC 4787, REQ-9: as the sender an inside host sees the other's external endpoint, never its address."""
    nat = Nat()
    first, second = (nat.out(udp(host, 4000, SERVER, 53)) for host in (CLIENT, OTHER_CLIENT))
    assert nat.verdict(udp(CLIENT, 4000, second.src, second[UDP].sport)) == "DROP_FILTERED"
    there = nat.out(udp(OTHER_CLIENT, 4000, first.src, first[UDP].sport))
    assert (there.src, there[UDP].sport, there.dst, there[UDP].dport) == (
        second.src,
        second[UDP].sport,
        CLIENT,
        4000,
    )
    back = nat.out(udp(CLIENT, 4000, second.src, second[UDP].sport))
    assert (back.src, back.dst, back.ttl) == (first.src, OTHER_CLIENT, 63)
    assert nat.counters()["hairpinned"] == 3
    # the same from the wire, with a pool address as the sender, is forged
    assert (
        nat.verdict(udp(second.src, second[UDP].sport, first.src, first[UDP].sport), OUTSIDE)
        == "DROP_ADDRESS"
    )


def test_hairpin_goes_on_at_another_core_that_was_given_its_sessions() -> None:
    nat, twin = Nat(), Nat()
    first, second = (nat.out(udp(host, 4000, SERVER, 53)) for host in (CLIENT, OTHER_CLIENT))
    nat.verdict(udp(CLIENT, 4000, second.src, second[UDP].sport))
    nat.out(udp(OTHER_CLIENT, 4000, first.src, first[UDP].sport))
    assert twin.core.install(nat.sessions()) == 4
    back = twin.out(udp(CLIENT, 4000, second.src, second[UDP].sport))
    assert (back.src, back.dst) == (first.src, OTHER_CLIENT)
    assert twin.counters()["hairpinned"] == 1


def test_ownership_passes_with_the_traffic() -> None:
    """Who does not own a session does not age it; who takes it over gives it its whole time again."""
    nat = Nat(udp_timeout=100)
    for port in range(200):
        nat.out(udp(CLIENT, 4000 + port, SERVER, 53))
    nat.wait(60)
    assert nat.core.cede(9) == 0
    assert nat.core.cede(0) == 200
    assert nat.core.cede(0) == 0
    assert set(nat.sessions()["flags"]) == {FLAG_FOREIGN}
    nat.wait(600)
    assert len(nat.sessions()) == 200
    assert nat.core.adopt() == 200
    assert nat.core.adopt() == 0
    assert set(nat.sessions()["flags"]) == {0}
    nat.wait(99)
    assert len(nat.sessions()) == 200
    nat.wait(2)
    assert len(nat.sessions()) == 0


def test_what_the_carrier_has_seen_is_taken_over() -> None:
    nat, twin = Nat(), Nat()
    nat.out(tcp(CLIENT, 4000, SERVER, 80))
    assert twin.core.install(nat.sessions()) == 1
    out = nat.out(tcp(CLIENT, 4000, SERVER, 80))
    nat.back(tcp(SERVER, 80, out.src, out.payload.sport, "SA"))
    nat.out(tcp(CLIENT, 4000, SERVER, 80, "A"))
    assert twin.core.update(nat.sessions()) == 1
    fields = ["tcp_state", "timeout_ms", "packets_out", "packets_in", "bytes_out", "bytes_in"]
    assert twin.sessions()[fields] == nat.sessions()[fields]
    assert TCP_STATES[int(twin.sessions()["tcp_state"][0])] == "established"


def test_paging_while_sessions_come_and_go() -> None:
    """What is there all the time stands in exactly one page; nothing is seen twice."""
    nat = Nat(max_sessions=1024)
    for at in range(500):
        nat.out(udp(CLIENT, 4000 + at, SERVER, 53))
    steady = {int(record["id"]) for record in nat.sessions() if int(record["internal_port"]) % 2}
    seen: list[int] = []
    cursor, page = 0, 0
    while True:
        records_, cursor = nat.core.sessions(cursor, 33)
        assert len(records_) <= 33
        seen += [int(identity) for identity in records_["id"]]
        if not cursor:
            break
        found = nat.core.find(17, (number(CLIENT), 4000 + 2 * page), (number(SERVER), 53))
        assert nat.core.delete(found) == 1
        nat.out(udp(OTHER_CLIENT, 4000 + page, SERVER, 53))
        page += 1
    assert page > 10
    assert len(seen) == len(set(seen))
    assert steady <= set(seen)


def test_synchronous_packets_leave_after_the_commit_in_order() -> None:
    nat = Nat(synchronous=True)
    sent = [udp(CLIENT, 4000, SERVER, 53, b"%d" % at) for at in range(4)]
    assert [nat.verdict(packet) for packet in sent] == ["HELD"] * 4
    (event,) = nat.core.events()
    assert event["type"] == EVENT_OPEN
    assert int(event["flags"]) & FLAG_PENDING
    assert nat.core.take() == []
    assert nat.core.commit(nat.sessions()) == 1
    taken = nat.core.take()
    assert [bytes(parse(result.frame)[UDP].payload) for result in taken] == [b"0", b"1", b"2", b"3"]
    assert {result.verdict for result in taken} == {Verdict.FORWARD}
    assert nat.verdict(sent[0]) == "FORWARD"
    assert not int(nat.sessions()[0]["flags"]) & FLAG_PENDING


def test_commit_that_does_not_come() -> None:
    nat = Nat(synchronous=True, hold=0.5)
    nat.send(udp(CLIENT, 4000, SERVER, 53))
    nat.pump(0.4)
    assert nat.core.take() == []
    nat.pump(0.2)
    assert [result.verdict for result in nat.core.take()] == [Verdict.DROP_HOLD_TIMEOUT]
    assert nat.counters()["sessions"] == 0
    last = nat.core.events()[-1]
    assert CLOSE_REASONS[int(last["reason"])] == "hold timeout"


def test_session_that_ends_while_its_packets_wait() -> None:
    nat = Nat(synchronous=True)
    nat.send(udp(CLIENT, 4000, SERVER, 53))
    assert nat.core.delete(nat.sessions()) == 1
    assert [result.verdict for result in nat.core.take()] == [Verdict.DROP_SESSION_GONE]
    nat.send(udp(CLIENT, 4000, SERVER, 53))
    assert [result.verdict for result in nat.core.flush()] == [Verdict.DROP_SESSION_GONE]


def test_installed_session_is_as_it_was() -> None:
    nat = Nat()
    assert nat.core.install(a_record(flags=FLAG_FOREIGN)) == 1
    (record,) = nat.sessions()
    for name in ("id", "mapping_id", "packets_out", "bytes_in", "external_port", "flags"):
        assert record[name] == a_record(flags=FLAG_FOREIGN)[0][name], name
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    assert (out.src, out[UDP].sport) == ("198.51.100.11", 5000)
    # a new session of this endpoint goes on under the installed mapping, at its address
    again = nat.out(udp(CLIENT, 4000, OTHER_SERVER, 53))
    assert (again.src, again[UDP].sport) == ("198.51.100.11", 5000)
    assert nat.out(udp(CLIENT, 4001, SERVER, 53)).src == "198.51.100.11"
    nat.wait(10_000)
    assert [int(r["id"]) for r in nat.sessions()] == [77], "the owner ages it, not we"
    assert nat.core.delete(nat.sessions()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"external_addr": number("198.51.100.77")},
        {"external_port": 80},
        {"protocol": 47},
        {"protocol": 0},
        {"tcp_state": 200},
        {"internal_addr": number("192.0.2.1")},
    ],
)
def test_records_that_cannot_be_installed(change: dict[str, int]) -> None:
    nat = Nat()
    assert nat.core.install(a_record()) == 1
    before = nat.sessions()
    bad = a_record(remote_port=99, **change)
    assert nat.core.install(bad) == 0
    assert (nat.sessions() == before).all()
    assert nat.core.delete(before) == 1
    assert nat.counters()["mappings"] == nat.counters()["hosts"] == 0


def test_tcp_states_are_told() -> None:
    nat = Nat()
    out = nat.out(tcp(CLIENT, 4000, SERVER, 80, "S"))
    back = (SERVER, 80, out.src, out.payload.sport)
    for direction, flags in ((1, "SA"), (0, "A"), (0, "FA"), (1, "FA"), (1, "A")):
        packet = tcp(*back, flags) if direction else tcp(CLIENT, 4000, SERVER, 80, flags)
        nat.forward(packet, OUTSIDE if direction else INSIDE)
    events = nat.core.events()
    assert [int(event["type"]) for event in events] == [EVENT_OPEN] + [EVENT_UPDATE] * 4
    states = [TCP_STATES[int(event["tcp_state"])] for event in events]
    assert states == ["syn_out", "syn_both", "established", "fin_out", "closing"]
    timeouts = [int(event["timeout_ms"]) // 1000 for event in events]
    assert timeouts == [240, 240, 7440, 7440, 240]


def test_find_from_both_sides() -> None:
    nat = Nat(filtering="endpoint-independent")
    out = nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.back(udp(OTHER_SERVER, 9, out.src, out[UDP].sport))
    server = (number(OTHER_SERVER), 9)
    inside = nat.core.find(17, (number(CLIENT), 4000), server)
    outside = nat.core.find(17, server, (number(out.src), out[UDP].sport), "external")
    assert inside == outside
    assert int(inside["flags"]) & FLAG_INBOUND
    assert external(inside) == (out.src, out[UDP].sport)
    assert nat.core.find(6, (number(CLIENT), 4000), server) is None


def test_two_hosts_share_a_pool_address_only_by_different_ports() -> None:
    nat = Nat(pool=small_pool(2))
    first, second = (nat.out(udp(host, 4000, SERVER, 53)) for host in (CLIENT, OTHER_CLIENT))
    assert first.src == second.src
    assert first[UDP].sport != second[UDP].sport


def test_a_host_leaves_its_address_only_when_that_is_exhausted() -> None:
    nat = Nat(pool=small_pool(4, addresses=2))
    sources = [nat.out(udp(CLIENT, 4000 + at, SERVER, 53)).src for at in range(8)]
    assert len(set(sources[:4])) == len(set(sources[4:])) == 1
    assert sources[0] != sources[4]
    assert nat.counters()["unpaired"] == 4


def test_what_is_not_carried_has_a_name() -> None:
    nat = Nat()
    whole = udp(CLIENT, 4000, SERVER, 53, b"x" * 64)
    assert nat.raw(vlan(whole, 7)).verdict == Verdict.DROP_VLAN
    assert nat.verdict(ip(CLIENT, SERVER, proto=47) / b"x") == "DROP_PROTOCOL"
    assert nat.verdict(udp(CLIENT, 4000, "224.0.0.5", 53)) == "DROP_MULTICAST"
    assert nat.verdict(udp("127.0.0.1", 4000, SERVER, 53)) == "DROP_ADDRESS"
    assert nat.verdict(udp("198.51.100.10", 4000, SERVER, 53)) == "DROP_ADDRESS"
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53, chksum=1)) == "DROP_IP_CHECKSUM"
    assert nat.verdict(udp(CLIENT, 4000, SERVER, 53, len=19)) == "DROP_IP_HEADER"
    assert nat.raw(frame(whole)[:33]).verdict == Verdict.DROP_RUNT
    data = bytearray(frame(whole))
    for ethertype, verdict in ((b"\x86\xdd", "DROP_IPV6"), (b"\x88\xcc", "DROP_ETHERTYPE")):
        data[12:14] = ethertype
        assert nat.raw(bytes(data)).verdict.name == verdict
    assert nat.counters()["sessions"] == 0


@pytest.mark.parametrize("n", [1, 1000, 65536, 1_000_000])
def test_memory_is_what_it_is_said_to_be(n: int) -> None:
    """88 bytes of records for a session, and an index of 64-byte buckets, eight entries each, filled to 0.85."""
    settings = config(max_sessions=n)
    memory = memory_for(settings)
    assert memory["sessions"] == n * (64 + 24)
    assert memory["index"] == 64 * (-(-2 * n * 20 // (17 * 8)) + 2)
    parts = ("sessions", "index", "mappings", "hosts", "pool", "other")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert memory_for(config(max_sessions=n, mapping="endpoint-dependent"))["mappings"] == 0
    if n <= 65536:
        assert Core(settings).memory() == memory


def test_records_have_the_layout_of_the_header() -> None:
    assert RECORD.itemsize == 96
    assert RECORD.fields["internal_mac"][1] == 48
    assert all(dtype.str.startswith(("<", "|")) for dtype, _ in RECORD.fields.values())


def test_api_table_carries_the_hash_of_the_header() -> None:
    class Api(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint32), ("abi", ctypes.c_uint32), ("header_hash", ctypes.c_uint64)]

    api = Api.from_address(Core.api_address())
    assert api.header_hash == int(hashlib.sha256(NAT_H.read_bytes()).hexdigest()[:16], 16)
    assert api.size >= 16 + 6 * ctypes.sizeof(ctypes.c_void_p)
    assert api.abi == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"max_sessions": 0},
        {"mapping": "symmetric"},
        {"filtering": "none"},
        {"ports": ()},
        {"pool": ()},
        {"pool": small_pool(10)[0:1] * 2},
        {"max_neighbours": 1},
    ],
)
def test_configuration_that_is_none(changes: dict[str, object]) -> None:
    with pytest.raises(CoreError, match=r"."):
        Core(config(**changes))


def test_core_of_a_worker_is_not_touched() -> None:
    nat = Nat()
    nat.core.attach()
    with pytest.raises(RuntimeError, match="worker"):
        nat.send(udp(CLIENT, 4000, SERVER, 53))
    nat.core.detach()
    nat.out(udp(CLIENT, 4000, SERVER, 53))
    nat.core.close()
    with pytest.raises(RuntimeError, match="closed"):
        nat.core.counters()


def test_a_commit_that_is_not_waited_for() -> None:
    nat = Nat(synchronous=True)
    assert nat.send(udp(CLIENT, 4000, SERVER, 53)).verdict is Verdict.HELD
    posted = nat.core.post_commit(nat.sessions())
    assert posted.result() == 1
    assert [result.verdict for result in nat.core.take()] == [Verdict.FORWARD]


def test_the_reader_of_events_may_sleep() -> None:
    nat = Nat()
    assert nat.core.events_sleep()
    nat.send(udp(CLIENT, 4000, SERVER, 53))
    assert not nat.core.events_sleep(), "there is something to read"
    nat.core.events()
    assert nat.core.events_sleep()
