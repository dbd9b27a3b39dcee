# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz.guided TARGET [options of libFuzzer] CORPUS``: Python code fuzzed by coverage, with atheris.

``python -m tests.fuzz.guided TARGET --seeds CORPUS`` writes the first inputs.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

TARGETS = {
    "fuzz_sync": "tests.fuzz.sync_target",
    "fuzz_openflow": "tests.fuzz.openflow_target",
    "fuzz_config": "tests.fuzz.config_target",
    "fuzz_control": "tests.fuzz.control_target",
}
MAX_LEN = "-max_len=4096"  # the last one counts
INSTRUMENTED = [
    "nat_control.sync",
    "nat_control.dataplane",
    "nat_control.config",
    "nat_control.config_reader",
    "nat_control.pool_config",
    "nat_control.pair_config",
    "nat_control.api",
    "nat_control.live",
    "nat_control.explain",
    "nat_control.reload",
    "switch_agent.codec",
]


def main(name: str, *options: str) -> None:
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = importlib.import_module(TARGETS[name])
    if options[0] == "--seeds":
        folder = Path(options[1])
        folder.mkdir(parents=True, exist_ok=True)
        for at, data in enumerate(target.seeds()):
            (folder / f"seed-{at}").write_bytes(data)
        return
    atheris.Setup([name, *options, MAX_LEN], target.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
