# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.golden.record [CASE ...]``: runs cases through the core and writes their folders.

Nothing is written that the reference model does not agree with: it sees every packet that it knows the rules
for, and scapy checks every checksum.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scapy.layers.inet import IP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet
from scapy.utils import PcapWriter, rdpcap

from nat_fastpath.core_config import PoolRange
from nat_fastpath.engine import VERDICT_NAMES, Core, Result, Verdict
from tests.golden.cases import CASES, Case
from tests.packets import START, check_sums, config, number, parse, tagged_ports, together
from tests.side_by_side import Pair, to_datagram

HERE = Path(__file__).parent


def core_of(fields: dict[str, Any]) -> Core:
    """The core that config.json describes: the small NAT of tests/packets.py with these fields changed."""
    fields = dict(fields)
    if "pool" in fields:
        first, last, *ports = fields["pool"]
        fields["pool"] = (PoolRange(number(first), number(last), (ports[0], ports[1])),)
    vlans, mtu = fields.pop("vlans", (0, 0)), fields.pop("external_mtu", 1500)
    fields["ports"] = tagged_ports(*vlans, external_mtu=mtu)
    return Core(config(**fields))


def counted(core: Core) -> dict[str, int]:
    """Packets by verdict, those that occurred."""
    return {name: int(n) for name, n in zip(VERDICT_NAMES, core.verdicts(), strict=True) if n}


def save(path: Path, frames: list[tuple[int, bytes]]) -> None:
    """Writes (time in nanoseconds, frame) pairs."""
    with PcapWriter(str(path), linktype=1, nano=True) as writer:
        for at, data in frames:
            packet = Ether(data)
            packet.time = at / 1e9
            writer.write(packet)


def load(path: Path) -> list[tuple[int, bytes]]:
    """(time in nanoseconds, frame) pairs of a capture."""
    return (
        [(round(float(packet.time) * 1e9), bytes(packet)) for packet in rdpcap(str(path))]
        if path.exists()
        else []
    )


def judge(pair: Pair, port: int, sent: bytes, verdict: Verdict, came_out: bytes) -> None:
    """The independent opinion on one packet; AssertionError if it differs."""
    tag = Ether(sent).getlayer(Dot1Q)
    if (tag.vlan if tag else 0) != pair.core.config.ports[port].vlan:
        assert (verdict, came_out) == (Verdict.DROP_VLAN, b"")
        return
    if ARP in Ether(sent):
        if verdict == Verdict.REPLY:
            question, answer = Ether(sent)[ARP], Ether(came_out)[ARP]
            assert (answer.op, answer.psrc, answer.hwdst) == (2, question.pdst, question.hwsrc)
        return
    if is_fragment(sent) or verdict == Verdict.FRAGMENT:
        return  # judge_datagrams does
    datagram, payload = to_datagram(parse(sent))
    expected, translated = pair.expected(datagram, port)
    assert verdict.name == expected, f"{datagram} is {verdict.name}, the model says {expected}"
    if came_out:
        check_sums(came_out)
    if translated is not None:
        assert to_datagram(parse(came_out)) == (translated, payload)


def is_fragment(frame: bytes) -> bool:
    packet = Ether(frame).getlayer(IP)
    return packet is not None and bool(packet.flags.MF or packet.frag)


def datagrams(frames: Sequence[bytes], whole: bool) -> list[Packet]:
    """What a receiver puts together of the fragments in these frames; ``whole``: nothing may be missing."""
    parts: dict[tuple[str, str, int, int], list[bytes]] = defaultdict(list)
    for frame in filter(is_fragment, frames):
        packet = parse(frame)
        parts[packet.src, packet.dst, packet.id, packet.proto].append(frame)
    made = []
    for pieces in parts.values():
        with contextlib.suppress(*() if whole else (AssertionError,)):
            made.append(together(pieces))
    return made


def judge_datagrams(pair: Pair, into: Sequence[tuple[int, bytes]], out: Sequence[bytes]) -> None:
    """Put together, what came out is what the model makes of what went in; whole packets that were cut are too."""
    left = {(bytes(p.payload)[20:], p.id): to_datagram(p)[0] for p in datagrams(out, True)}
    for port in (0, 1):
        sent = [data for at, data in into if at == port]
        whole = datagrams(sent, False) + [
            parse(data) for data in sent if not is_fragment(data) and IP in Ether(data)
        ]
        for packet in whole:
            if (found := left.pop((bytes(packet.payload)[20:], packet.id), None)) is not None:
                verdict, translated = pair.expected(to_datagram(packet)[0], port)
                assert (verdict, found) == ("FORWARD", translated)
    assert not left, "nobody sent these"


def send(core: Core, port: int, data: bytes, now: int) -> list[Result]:
    """One packet, and those that leave because of it."""
    results = core.burst([(port, data)], now)
    core.poll(now)
    return [*results, *core.take()]


def run(case: Case) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]], dict[str, int]]:
    """Plays a case; returns what went in, what came out, and the counters."""
    core = core_of(case.config)
    pair = Pair(core, START)
    into, out, sides = [], [], []
    script = case.script()
    step = next(script)
    while True:
        wait, port, sent = step
        if wait:
            pair.wait(wait)
        result, *others = send(core, port, sent, pair.now)
        judge(pair, port, sent, result.verdict, result.frame)
        into.append((pair.now, sent))
        sides.append((port, sent))
        out += [(pair.now, one) for each in (result, *others) for one in each.frames]
        try:
            step = script.send(result.frame)
        except StopIteration:
            judge_datagrams(pair, sides, [data for _, data in out])
            return into, out, counted(core)


def record(name: str) -> None:
    into, out, counters = run(CASES[name])
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[name].config, indent=2) + "\n")
    (folder / "expected.json").write_text(json.dumps(counters, indent=2) + "\n")
    save(folder / "in.pcap", into)
    save(folder / "expected.pcap", out)
    print(f"{name}: {len(into)} packets in, {len(out)} out, {counters}")


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"no case {', '.join(unknown)}: there are {', '.join(CASES)}")
    for name in names or CASES:
        record(name)


if __name__ == "__main__":
    main(sys.argv[1:])
