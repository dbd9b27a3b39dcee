# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.sim SEED`` replays one run and says what happens; ``FIRST LAST`` runs many."""

from __future__ import annotations

import sys

from tests.sim.world import simulate


def main() -> None:
    seeds = [int(text) for text in sys.argv[1:]]
    if len(seeds) == 1:
        simulate(seeds[0], print)
        return
    if len(seeds) != 2:
        sys.exit("usage: python -m tests.sim SEED | FIRST LAST")
    failed = []
    for seed in range(seeds[0], seeds[1] + 1):
        try:
            simulate(seed)
        except Exception as error:
            print(f"seed {seed}: {type(error).__name__}: {error}")
            failed.append(seed)
    sys.exit(f"{len(failed)} seeds fail" if failed else 0)


main()
