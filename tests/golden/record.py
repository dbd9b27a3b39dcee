# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.golden.record [CASE ...]``: runs cases through the core and writes their folders.

Nothing is written that the reference model does not agree with: it sees every packet that it knows the rules
for, and scapy checks every checksum.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scapy.layers.l2 import ARP, Ether
from scapy.utils import PcapWriter, rdpcap

from nat_fastpath.core_config import PoolRange
from nat_fastpath.engine import VERDICT_NAMES, Core, Verdict
from tests.golden.cases import CASES, Case
from tests.packets import START, check_sums, config, number, parse
from tests.side_by_side import Pair, to_datagram

HERE = Path(__file__).parent


def core_of(fields: dict[str, Any]) -> Core:
    """The core that config.json describes: the small NAT of tests/packets.py with these fields changed."""
    fields = dict(fields)
    if "pool" in fields:
        first, last, *ports = fields["pool"]
        fields["pool"] = (PoolRange(number(first), number(last), (ports[0], ports[1])),)
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
    if ARP in Ether(sent):
        if verdict == Verdict.REPLY:
            question, answer = Ether(sent)[ARP], Ether(came_out)[ARP]
            assert (answer.op, answer.psrc, answer.hwdst) == (2, question.pdst, question.hwsrc)
        return
    datagram, payload = to_datagram(parse(sent))
    expected, translated = pair.expected(datagram, port)
    assert verdict.name == expected, f"{datagram} is {verdict.name}, the model says {expected}"
    if came_out:
        check_sums(came_out)
    if translated is not None:
        assert to_datagram(parse(came_out)) == (translated, payload)


def run(case: Case) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]], dict[str, int]]:
    """Plays a case; returns what went in, what came out, and the counters."""
    core = core_of(case.config)
    pair = Pair(core, START)
    into, out = [], []
    script = case.script()
    step = next(script)
    while True:
        wait, port, sent = step
        if wait:
            pair.wait(wait)
        result = core.burst([(port, sent)], pair.now)[0]
        judge(pair, port, sent, result.verdict, result.frame)
        into.append((pair.now, sent))
        if result.frame:
            out.append((pair.now, result.frame))
        try:
            step = script.send(result.frame)
        except StopIteration:
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
