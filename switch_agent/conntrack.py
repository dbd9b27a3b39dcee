# SPDX-License-Identifier: Apache-2.0
"""Sessions as entries of Open vSwitch's connection tracking instead of pairs of rules: what is sent, and what is read back.

One packet of each session is sent through ``ct(commit,nat)`` and goes nowhere; the entry that it leaves carries both directions, with
the session's id and next hops in its label. Below the forward rules, packets of known flows take these steps:

=====  ====  ======================================================================================
table  prio  what it does
=====  ====  ======================================================================================
0      301   a TTL that ends here: to the agent, as it came
0      300   TCP and UDP that is no fragment: through the tracker, which translates, and on in table 10
10     300   translated, label names a next hop: dec_ttl, VLAN of the other side, its group
10     200   translated, but the next hop is not there any more: dropped
10     0     unknown to the tracker, so as it came: back to table 0, below 300
=====  ====  ======================================================================================
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nat_control.dataplane import Mask, Records
from switch_agent.codec import EXPERIMENTER, NO_BUFFER, PACKET_OUT, VERSION
from switch_agent.compile import PROTOCOLS, Compiler, NextHopGroups, Numbers
from switch_agent.pipeline import (
    AGENT_PRIORITY,
    CLASS_MASK,
    INBOUND,
    IPV4,
    REST_PRIORITY,
    SESSION_CLASS,
    SESSION_PRIORITY,
    STATIC_CLASS,
    TCP,
    DecTtl,
    Group,
    Kind,
    Match,
    NextHop,
    Pipeline,
    Resubmit,
    Rule,
    ToController,
    Track,
    masked,
    retag,
)
from switch_agent.recovery import RULE

Rows = np.ndarray[Any, np.dtype[np.void]]  # shape (n,)

ZONE = 20033  # of the tracker, ours alone
TABLE = 10  # behind the tracker
IDLE = 1_000_000  # seconds after which the tracker itself forgets an entry; until then the agent ends it
PAGE = 2000  # lines of a dump that are read in one go

_NICIRA, _CT_FLUSH, _CT_FLUSH_ZONE = 0x2320, 32, 29
_TRACKED, _SOURCE, _DESTINATION = 0x20, 0x40, 0x80  # bits of ct_state
_IP = {"eth_type_nxm": IPV4}  # in this spelling it stands before Nicira's other fields, which need it
_GROUP_AT = {"external": 64, "internal": 96}  # first bit in the label; below them is the session's id


# -- rules -------------------------------------------------------------------------------------------------


def rules(pipeline: Pipeline) -> tuple[Rule, ...]:
    """All that there is one of; those of next hops come with their groups."""
    ours: list[tuple[Match, Kind]] = [
        (pipeline._inside(pipeline.internal, **pipeline._ours, **_IP), Kind.NEW_FLOW)
    ]
    ours += [
        (pipeline._inside(pipeline.external, ipv4_dst=masked(network), **_IP), Kind.UNSOLICITED)
        for network in pipeline.external.networks
    ]
    found = [
        Rule(REST_PRIORITY, {}, (Resubmit(0),), Kind.TRACK.cookie, table=TABLE),
        *(
            Rule(AGENT_PRIORITY, {"ct_state": (bit, bit)}, (), Kind.TRACK.cookie, table=TABLE)
            for bit in (_SOURCE, _DESTINATION)
        ),
    ]
    for match, kind in ours:
        meter = kind.value if kind in pipeline.rates else 0
        for protocol in PROTOCOLS:
            new: Match = {**match, "ip_proto": protocol, "ct_state": (0, _TRACKED), "ip_frag": 0}
            found.append(Rule(SESSION_PRIORITY, new, (Track(ZONE, TABLE),), Kind.TRACK.cookie))
            for ttl in (0, 1):
                ends: Match = {**new, "nw_ttl": ttl}
                found.append(Rule(SESSION_PRIORITY + 1, ends, (ToController(),), Kind.TRACK.cookie, meter))
    return tuple(found)


def towards(pipeline: Pipeline, hop: NextHop, group: int) -> Rule:
    """What is translated, and leaves to this next hop."""
    here, there = pipeline.internal, pipeline.external
    bit = _SOURCE
    if hop.side == "internal":
        here, there, bit = there, here, _DESTINATION
    at = _GROUP_AT[hop.side]
    label = group << at, 0xFFFF_FFFF << at
    match = pipeline._inside(here, eth_type=IPV4, ct_state=(bit, bit), ct_label=label)
    actions = (DecTtl(), *retag(here.vlan, there.vlan), Group(group))
    return Rule(SESSION_PRIORITY, match, actions, towards_cookie(group), table=TABLE)


def towards_cookie(group: int) -> int:
    return Kind.TOWARDS.cookie | group << 8


def group_of(cookie: int) -> int | None:
    """Of such a rule's cookie; None: it is another rule's."""
    found = (cookie & ~STATIC_CLASS) >> 8
    return found if cookie == towards_cookie(found) else None


# -- entries come and go -----------------------------------------------------------------------------------


_COMMIT = [
    ("version", "u1"), ("type", "u1"), ("length", ">u2"), ("txid", ">u4"),
    ("buffer", ">u4"), ("in_port", ">u4"), ("actions", ">u2"), ("pad", "V6"),
    # ct(commit,zone=ZONE, ...), without a table to go on in
    ("ct", "V10"), ("ct_flags", ">u2"), ("zone_field", ">u4"), ("zone", ">u2"), ("table", "u1"), ("ct_pad", "V5"),
    # nat(src=ADDRESS:PORT)
    ("nat", "V12"), ("nat_flags", ">u2"), ("given", ">u2"), ("external_addr", ">u4"), ("external_port", ">u2"),
    ("nat_pad", "V2"),
    # load:id->NXM_NX_CT_LABEL[0..63], load:groups->NXM_NX_CT_LABEL[64..127]
    ("load_id", "V16"), ("id", ">u8"), ("load_groups", "V16"), ("groups", ">u8"),
    # the packet
    ("ethernet", "V14"), ("ip", ">u2"), ("ip_length", ">u2"), ("ip_id", ">u4"), ("ttl", "u1"), ("protocol", "u1"),
    ("ip_sum", ">u2"), ("internal_addr", ">u4"), ("remote_addr", ">u4"), ("internal_port", ">u2"),
    ("remote_port", ">u2"),
]  # fmt: skip
_COMMITS = {
    17: np.dtype([*_COMMIT, ("udp_length", ">u2"), ("sum", ">u2")]),
    6: np.dtype([*_COMMIT, ("numbers", "V8"), ("flags", ">u2"), ("window", ">u2"), ("sum", ">u2"), ("urgent", ">u2")]),
}  # fmt: skip
_TUPLE = ("protocol", "internal_addr", "remote_addr", "internal_port", "remote_port")
_FLUSH = np.dtype(
    [
        ("version", "u1"), ("type", "u1"), ("length", ">u2"), ("txid", ">u4"), ("vendor", ">u4"), ("subtype", ">u4"),
        ("protocol", "u1"), ("pad", "V7"), ("tuple", ">u2"), ("tuple_length", ">u2"), ("tuple_pad", "V4"),
        ("from", "V14"), ("from_ones", ">u2"), ("internal_addr", ">u4"), ("from_pad", "V4"),
        ("to", "V14"), ("to_ones", ">u2"), ("remote_addr", ">u4"), ("to_pad", "V4"),
        ("from_port", ">u4"), ("internal_port", ">u2"), ("from_port_pad", "V2"),
        ("to_port", ">u4"), ("remote_port", ">u2"), ("to_port_pad", "V2"),
        ("zone_property", ">u4"), ("zone", ">u2"), ("zone_pad", "V2"),
    ]
)  # fmt: skip


def _action(subtype: int, size: int, rest: bytes = b"") -> bytes:
    return struct.pack("!HHIH", 0xFFFF, size, _NICIRA, subtype) + rest


def _load(first: int) -> bytes:
    """64 bits of the label."""
    return _action(7, 24, struct.pack("!HI", first << 6 | 63, 0x0001_D810))


def _filled(kind: np.dtype[np.void], n: int, values: Mapping[str, Any]) -> Rows:
    made = np.zeros(n, kind)
    for name, value in values.items():
        made[name] = value
    return made


def _sum(*words: Numbers | int) -> Numbers:
    """The internet checksum of 16-bit words, and of 32-bit ones."""
    total = sum((np.asarray(word, np.uint64) for word in words), np.uint64(0))
    for _ in range(4):
        total = (total & np.uint64(0xFFFF)) + (total >> np.uint64(16))
    return np.asarray(~total & np.uint64(0xFFFF))


def commits(records: Records, groups: Numbers, in_port: int, mac: int, txid: int) -> bytes:
    """Makes the entries of TCP and UDP records, or gives them other ``groups`` (as SessionRules has them), shape (n,)."""
    parts = []
    for protocol, kind in _COMMITS.items():
        chosen = records["protocol"] == protocol
        some = records[chosen]
        if not len(some):
            continue
        frame = kind.itemsize - int(kind.fields["ethernet"][1]) if kind.fields else 0
        ip_length, length = frame - 14, frame - 34
        addresses = some["internal_addr"], some["remote_addr"]
        ports = some["internal_port"], some["remote_port"]
        values: dict[str, Any] = {
            "version": VERSION, "type": PACKET_OUT, "length": kind.itemsize, "txid": txid, "buffer": NO_BUFFER,
            "in_port": in_port, "actions": 96, "ct": np.void(_action(35, 96)), "ct_flags": 1, "zone": ZONE,
            "table": 0xFF, "nat": np.void(_action(36, 24, bytes(2))), "nat_flags": 1, "given": 0x11,
            "load_id": np.void(_load(0)), "load_groups": np.void(_load(64)), "groups": groups[chosen],
            "ethernet": np.void(mac.to_bytes(6, "big") * 2 + IPV4.to_bytes(2, "big")), "ip": 0x4500,
            "ip_length": ip_length, "ttl": 64, "protocol": protocol,
            "ip_sum": _sum(0x4500, ip_length, 64 << 8 | protocol, *addresses),
        }  # fmt: skip
        values |= {
            name: some[name]
            for name in ("id", "external_addr", "external_port", "internal_addr", "remote_addr")
        }
        values |= {"internal_port": ports[0], "remote_port": ports[1]}
        if protocol == TCP:  # as in the middle of a connection
            flags, window = 0x5010, 0xFFFF
            values |= {"flags": flags, "window": window}
            values["sum"] = _sum(protocol, length, *addresses, *ports, flags, window)
        else:
            values["udp_length"] = length  # and no checksum
        parts.append(_filled(kind, len(some), values).tobytes())
    return b"".join(parts)


def flushes(tuples: Rows, txid: int) -> bytes:
    """Ends the entries of these inside and remote endpoints; what is not there is no error."""
    values: dict[str, Any] = {
        "version": VERSION, "type": EXPERIMENTER, "length": _FLUSH.itemsize, "txid": txid, "vendor": _NICIRA,
        "subtype": _CT_FLUSH, "tuple_length": 72, "from": np.void(struct.pack("!HH10x", 0, 20)), "from_ones": 0xFFFF,
        "to": np.void(struct.pack("!HH10x", 1, 20)), "to_ones": 0xFFFF, "from_port": 2 << 16 | 8,
        "to_port": 3 << 16 | 8, "zone_property": 2 << 16 | 8, "zone": ZONE,
    }  # fmt: skip
    for name in _TUPLE:
        values[name] = tuples[name]
    return _filled(_FLUSH, len(tuples), values).tobytes()


def flush_all(txid: int) -> bytes:
    """Ends all entries of our zone."""
    return struct.pack("!BBHIII6xH", VERSION, EXPERIMENTER, 24, txid, _NICIRA, _CT_FLUSH_ZONE, ZONE)


_KEY = np.dtype([(name, _FLUSH[name]) for name in _TUPLE])
_BACK = [name.replace("internal", "external") for name in _TUPLE]


def _keys(records: Rows, fields: Sequence[str]) -> list[bytes]:
    made = np.zeros(len(records), _KEY)
    for name, of in zip(_TUPLE, fields, strict=True):
        made[name] = records[of]
    data, size = made.tobytes(), _KEY.itemsize
    return [data[at : at + size] for at in range(0, len(data), size)]


class Owners:
    """Whose the tracker's entries are. There is one of each 5-tuple, seen from inside and seen from outside; another of
    either would be refused silently."""

    def __init__(self) -> None:
        self._owners: dict[bytes, tuple[int, bytes]] = {}  # 5-tuple inside → id, and 5-tuple outside
        self._inside: dict[bytes, bytes] = {}  # 5-tuple outside → inside

    def enter(self, records: Rows) -> tuple[Rows, Mask]:
        """Sessions that get entries; returns the tuples of those that have to go first, and who of ``records`` is not
        succeeded by another one behind it, shape (n,)."""
        gone = []
        ids, keys, backs = records["id"].tolist(), _keys(records, _TUPLE), _keys(records, _BACK)
        for one, key, back in zip(ids, keys, backs, strict=True):
            if (owner := self._owners.get(key)) and owner != (one, back):
                gone.append(key)
                self._inside.pop(owner[1], None)
            if (other := self._inside.get(back, key)) != key:
                gone.append(other)
                self._owners.pop(other, None)
            self._owners[key] = one, back
            self._inside[back] = key
        stay = [self._owners.get(key) == (one, back) for one, key, back in zip(ids, keys, backs, strict=True)]
        return np.frombuffer(b"".join(gone), _KEY), np.array(stay, np.bool_)

    def adopt(self, found: Rows) -> None:
        """Entries that are there, as far as it is not known whose they are."""
        for one, key, back in zip(
            found["id"].tolist(), _keys(found, _TUPLE), _keys(found, _BACK), strict=True
        ):
            if key not in self._owners and back not in self._inside:
                self._owners[key] = one, back
                self._inside[back] = key

    def leave(self, records: Rows) -> Mask:
        """Sessions that lose theirs; shape (n,): who had one."""
        had = np.zeros(len(records), np.bool_)
        for i, (one, key) in enumerate(zip(records["id"].tolist(), _keys(records, _TUPLE), strict=True)):
            owner = self._owners.get(key)
            if owner and owner[0] == one:
                had[i] = True
                del self._owners[key]
                self._inside.pop(owner[1], None)
        return had


class EntryCompiler(Compiler):
    """Makes entries where its base class makes rules; a priority means nothing to it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def install(
        self,
        records: Records,
        groups: NextHopGroups,
        txid: int,
        priority: Numbers | int = SESSION_PRIORITY,
    ) -> bytes:
        pairs = groups.internal.astype(np.uint64) << np.uint64(32) | groups.external.astype(np.uint64)
        return commits(records, pairs, self._pipeline.internal.port, self._pipeline.mac, txid)

    def delete(self, records: Records, txid: int, priority: Numbers | int = SESSION_PRIORITY) -> bytes:
        return flushes(records, txid)


# -- entries read back -------------------------------------------------------------------------------------

# An entry, by the fields of a session's record; ``idle`` in seconds.
ENTRY = np.dtype(
    [
        ("id", "<u8"), ("groups", "<u8"), ("protocol", "u1"), ("idle", "<u4"),
        *((f"{end}_{what}", size) for end in ("internal", "remote", "external") for what, size in (("addr", "<u4"), ("port", "<u2"))),
    ]
)  # fmt: skip
Entries = Rows
_LINE = re.compile(
    r"^(tcp|udp),orig=\(src=([\d.]+),dst=([\d.]+),sport=(\d+),dport=(\d+)\),"
    r"reply=\(src=[\d.]+,dst=([\d.]+),sport=\d+,dport=(\d+)\),.*?\btimeout=(\d+)\b.*?\blabels=0x([0-9a-f]+)\b",
    re.MULTILINE,
)


def entries(lines: str) -> Entries:
    """Those of ``dpctl/dump-conntrack -s`` that are of sessions."""
    found = _LINE.findall(lines)
    made = np.zeros(len(found), ENTRY)
    if not found:
        return made
    text = " ".join(" ".join(one[1:7]) + " " + one[7] for one in found).replace(".", " ")
    numbers = np.fromstring(text, np.int64, sep=" ").reshape(len(found), 16)
    octets = np.array([1 << 24, 1 << 16, 1 << 8, 1])
    for name, at in (("internal_addr", 0), ("remote_addr", 4), ("external_addr", 10)):
        made[name] = numbers[:, at : at + 4] @ octets
    for name, at in (("internal_port", 8), ("remote_port", 9), ("external_port", 14)):
        made[name] = numbers[:, at]
    made["idle"] = np.maximum(IDLE - 1 - numbers[:, 15], 0)  # whole seconds, what is begun left out
    labels = [int(one[8], 16) for one in found]
    made["id"] = np.array([label & (1 << 64) - 1 for label in labels], np.uint64)
    made["groups"] = np.array([label >> 64 for label in labels], np.uint64)
    made["protocol"] = np.array([TCP if one[0] == "tcp" else 17 for one in found], np.uint8)
    return np.asarray(made[made["id"] & np.uint64(CLASS_MASK | INBOUND) == SESSION_CLASS])


def as_rules(found: Entries) -> Rows:
    """The pair of rules that each entry stands for, without counters; shape (2 n,), dtype recovery.RULE."""
    made = np.zeros((2, len(found)), RULE)
    made["priority"] = SESSION_PRIORITY
    made["protocol"] = found["protocol"]
    ways = (("internal", "remote", "external"), ("remote", "external", "internal"))
    for one, ends in zip(made, ways, strict=True):
        for name, end in zip(("source", "destination", "translated"), ends, strict=True):
            one[name], one[f"{name}_port"] = found[f"{end}_addr"], found[f"{end}_port"]
    made[0]["cookie"], made[1]["cookie"] = found["id"], found["id"] | np.uint64(INBOUND)
    made[0]["group"] = found["groups"] & np.uint64(0xFFFF_FFFF)
    made[1]["group"] = found["groups"] >> np.uint64(32)
    return made.reshape(-1)
