# SPDX-License-Identifier: Apache-2.0
"""tandem-nat with a million objects that a full garbage collection has to look at, and such a collection each second."""

from __future__ import annotations

import gc
import threading
import time

from nat_control.cli import main

OBJECTS = 1_000_000


def collect() -> None:
    ballast = [{} for _ in range(OBJECTS)]
    while ballast:
        time.sleep(1)
        gc.collect()


if __name__ == "__main__":
    threading.Thread(target=collect, daemon=True).start()
    main()
