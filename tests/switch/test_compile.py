# SPDX-License-Identifier: Apache-2.0
"""Flow-mods in bulk: byte for byte what the OpenFlow library encodes for each, and back again."""

import numpy as np
import pytest
from os_ken.ofproto import ofproto_v1_3_parser as parser
from os_ken.ofproto.ofproto_parser import msg
from os_ken.ofproto.ofproto_protocol import ProtocolDesc

from nat_control.dataplane import Records
from nat_fastpath.engine import RECORD
from switch_agent import channel as openflow
from switch_agent import compile as compiling
from switch_agent.codec import FLOW_MOD, messages
from switch_agent.compile import FEW, Compiler, NextHopGroups, make_template
from switch_agent.pipeline import FRONT_PRIORITY, INBOUND, SESSION_PRIORITY, Pipeline, Side
from tests.switch.net import pipeline


def compiler(pipe: Pipeline) -> Compiler:
    return Compiler(
        pipe,
        openflow.flow_mod,
        openflow.delete_by_cookie,
        add=openflow.ADD,
        delete_strict=openflow.DELETE_STRICT,
    )


def any_records(n: int) -> tuple[Records, NextHopGroups]:
    """Any values, the extremes among them."""
    rng = np.random.default_rng(n)
    records = np.zeros(n, RECORD)
    records["id"] = 1 << 60 | rng.integers(0, 1 << 60, n)
    for side in ("internal", "external", "remote"):
        records[f"{side}_addr"] = rng.choice([0, 0xFFFFFFFF, *rng.integers(0, 1 << 32, 6)], n)
        records[f"{side}_port"] = rng.choice([0, 0xFFFF, *rng.integers(0, 1 << 16, 6)], n)
    records["protocol"] = rng.choice([1, 6, 17], n)
    groups = [rng.integers(1, 1 << 31, n).astype(np.uint32) for _ in range(2)]
    return records, NextHopGroups(*groups)


def test_few_are_made_like_many(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler(pipeline(internal=Side(1, 3, 7)))
    priorities = np.array([SESSION_PRIORITY, FRONT_PRIORITY] * FEW)

    def deletions(n: int) -> list[list[bytes]]:
        records, _ = any_records(n)
        return [sorted(parts(made.delete(records, 9, *of))) for of in ((), (priorities[:n],))]

    few = [deletions(n) for n in range(FEW + 1)]
    monkeypatch.setattr(compiling, "FEW", -1)
    assert few == [deletions(n) for n in range(FEW + 1)]


def test_a_single_one_is_made_like_many() -> None:
    made = compiler(pipeline(internal=Side(1, 3, 7)))
    records, groups = any_records(200)
    fields = zip(records.tolist(), groups.internal.tolist(), groups.external.tolist(), strict=True)
    singles = b"".join(made.one(record, 9, inside, outside) for record, inside, outside in fields)
    assert sorted(parts(singles)) == sorted(parts(made.install(records, groups, 9)))
    assert len(parts(singles)) == 2 * int(np.isin(records["protocol"], (6, 17)).sum())


def parts(data: bytes) -> list[bytes]:
    return [data[at : at + size] for _, at, size in messages(data)]


VLANS = [(0, 0), (7, 0), (0, 7), (7, 8), (7, 7)]


@pytest.mark.parametrize("vlans", VLANS)
def test_many_are_what_the_library_makes_of_each(vlans: tuple[int, int]) -> None:
    pipe = pipeline(internal=Side(1, 3, vlans[0]), external=Side(2, 4, vlans[1]))
    records, groups = any_records(150)
    made = compiler(pipe)
    priorities = np.where(np.arange(len(records)) % 3, SESSION_PRIORITY, FRONT_PRIORITY)
    for command, data in (
        (openflow.ADD, made.install(records, groups, 77, priorities)),
        (openflow.DELETE_STRICT, made.delete(records, 77, priorities)),
    ):
        expected = []
        for protocol in (6, 17):
            for inbound in (False, True):
                for i in np.flatnonzero(records["protocol"] == protocol).tolist():
                    one = records[i]
                    inside, outside, remote = (
                        (int(one[f"{side}_addr"]), int(one[f"{side}_port"]))
                        for side in ("internal", "external", "remote")
                    )
                    rule = pipe.session(
                        protocol,
                        inbound,
                        cookie=int(one["id"]) | (INBOUND if inbound else 0),
                        source=remote if inbound else inside,
                        destination=outside if inbound else remote,
                        translated=inside if inbound else outside,
                        group_id=int((groups.internal if inbound else groups.external)[i]),
                        priority=int(priorities[i]),
                    )
                    expected.append(openflow.flow_mod(rule, command, 77))
        assert data == b"".join(expected)


def test_the_library_reads_what_was_made() -> None:
    records, groups = any_records(20)
    data = compiler(pipeline()).install(records, groups, 5)
    found = set()
    for kind, at, length in messages(data):
        assert kind == FLOW_MOD
        read = msg(ProtocolDesc(4), 4, kind, length, 5, data[at : at + length])
        assert isinstance(read, parser.OFPFlowMod)
        found.add(read.cookie)
        assert read.match["in_port"] == (2 if read.cookie & INBOUND else 1)
    some = records[np.isin(records["protocol"], (6, 17))]["id"].tolist()
    assert found == {*some, *(one | INBOUND for one in some)}


def test_deletion_by_cookie() -> None:
    cookies = np.array([1, INBOUND | 5, (1 << 64) - 1], np.uint64)
    made = compiler(pipeline())
    expected = b"".join(openflow.delete_by_cookie(cookie, txid=9) for cookie in cookies.tolist())
    assert made.delete_cookies(cookies, 9) == expected
    assert made.delete_cookies(cookies[:0], 9) == b""


def test_nothing_makes_nothing() -> None:
    made = compiler(pipeline())
    empty, none = np.zeros(0, RECORD), np.zeros(0, np.uint32)
    assert made.install(empty, NextHopGroups(none, none), 1) == b""
    assert made.delete(empty, 1) == b""


def test_a_field_without_a_place_of_its_own_is_noticed() -> None:
    with pytest.raises(ValueError, match="cookie has no place"):
        make_template(lambda values: bytes(16), ("cookie",))
    with pytest.raises(ValueError, match="length"):
        make_template(lambda values: bytes(16 + (values["group"] & 1)), ("group",))
