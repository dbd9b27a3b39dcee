# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz.seeds FOLDER``: the fuzzers' first inputs, made from the golden captures.

Formats: see LLVMFuzzerTestOneInput in fuzz_packet.c and fuzz_burst.c; fuzz_cores.c finds its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scapy.utils import rdpcap

GOLDEN = Path(__file__).parent.parent / "golden"
LARGEST = 300  # bytes of a frame; longer ones teach the fuzzer nothing and slow it down
RAW = 8  # the operation of fuzz_burst that sends a frame as it stands
ROOM = 32


def frames(capture: Path) -> list[tuple[int, bytes]]:
    """(port, frame) pairs; the port stands in the last byte of our MAC."""
    return [(data[5] & 1 ^ 1, data) for data in map(bytes, rdpcap(str(capture))) if len(data) <= LARGEST]


def write(folder: Path) -> int:
    """Writes one seed of fuzz_burst for each case, and one of fuzz_packet for each frame; returns how many."""
    n = 0
    for capture in sorted(GOLDEN.glob("*/in.pcap")):
        # the cases with VLANs have those of check.h
        vlans = json.loads((capture.parent / "config.json").read_text()).get("vlans", (0, 0))
        modes = bytes(128 if vlan else 0 for vlan in vlans)
        story = bytearray(modes)
        for port, data in frames(capture):
            n += 1
            (folder / "fuzz_packet" / f"{capture.parent.name}-{n}").write_bytes(
                bytes((modes[0], modes[1] | port | 2)) + data
            )
            story += bytes((RAW | port << 4 | ROOM,)) + len(data).to_bytes(2, "little") + data
        (folder / "fuzz_burst" / capture.parent.name).write_bytes(story[:1500])
        n += 1
    return n


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.fuzz.seeds FOLDER")
    print(write(Path(sys.argv[1])), "seeds")
