# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.sim SEED`` replays one run and says what happens; ``FIRST LAST [PROCESSES]`` runs many, on all cores."""

from __future__ import annotations

import multiprocessing
import sys
import time

from tests.sim.world import simulate


def failure(seed: int) -> str:
    """ "": it holds."""
    try:
        simulate(seed)
    except Exception as error:
        return f"seed {seed}: {type(error).__name__}: {error}"
    return ""


def main() -> None:
    seeds = [int(text) for text in sys.argv[1:]]
    if len(seeds) == 1:
        simulate(seeds[0], print)
        return
    if len(seeds) not in (2, 3):
        sys.exit("usage: python -m tests.sim SEED | FIRST LAST [PROCESSES]")
    failed, wanted, began = 0, range(seeds[0], seeds[1] + 1), time.monotonic()
    with multiprocessing.Pool(*seeds[2:]) as pool:
        for done, text in enumerate(pool.imap_unordered(failure, wanted, chunksize=16), 1):
            if text:
                failed += 1
                print(text, flush=True)
            if done % 1000 == 0:
                print(f"{done} of {len(wanted)} seeds done, {failed} fail", flush=True)
    print(f"{len(wanted)} seeds, {failed} fail, in {time.monotonic() - began:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
