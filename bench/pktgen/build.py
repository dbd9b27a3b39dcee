# SPDX-License-Identifier: Apache-2.0
"""Makes ``_pktgen``: the generator, for cffi in API mode. It shares DPDK, and its ports, with nat_fastpath.dpdk."""

import re
import subprocess
from pathlib import Path

from cffi import FFI

HERE = Path("bench/pktgen")
HEADER = (HERE / "pktgen.h").read_text()
COUNTERS = re.findall(r"^\s*C\((\w+)\)", HEADER, re.MULTILINE)


def declarations() -> str:
    """The header as cffi reads it: without preprocessor, the counters written out."""
    body = HEADER[HEADER.index("enum pktgen_order") : HEADER.rindex("#endif")]
    body = re.sub(r"#define PKTGEN_COUNTERS.*?\n\n", "", body, flags=re.DOTALL)
    fields = "".join(f"    uint64_t {name};\n" for name in COUNTERS)
    body = re.sub(r"#define PKTGEN_COUNTER\(.*?#undef PKTGEN_COUNTER\n", fields, body, flags=re.DOTALL)
    sizes = dict(re.findall(r"#define (PKTGEN_\w+) (\d+)u", HEADER))
    for name, value in sizes.items():
        body = body.replace(f"[{name}]", f"[{value}]")
    return "".join(f"#define {name} {value}\n" for name, value in sizes.items()) + body


def flags() -> list[str]:
    said = subprocess.run(["pkg-config", "--cflags", "libdpdk"], check=True, capture_output=True, text=True)
    return [flag.replace("-I", "-isystem") for flag in said.stdout.split()]


ffibuilder = FFI()
FORWARD = (HERE / "forward.h").read_text()
ffibuilder.cdef(
    declarations()
    + FORWARD[FORWARD.index("struct") : FORWARD.rindex("#endif")]
    + "int pktgen_ring_pair(const char *name, unsigned slots);"
)
ffibuilder.set_source(
    "bench.pktgen._pktgen",
    """
    #include <stdio.h>
    #include <rte_eth_ring.h>
    #include <rte_ring.h>
    #include "forward.h"
    #include "pktgen.h"

    /* Two devices of which each receives what the other sends: net_ring_NAME0, net_ring_NAME1. A negative errno, or -1. */
    static int pktgen_ring_pair(const char *name, unsigned slots)
    {
        char text[64];
        struct rte_ring *rings[2];
        for (unsigned i = 0; i < 2; i++) {
            snprintf(text, sizeof text, "%s%u", name, i);
            rings[i] = rte_ring_create(text, slots, SOCKET_ID_ANY, RING_F_SP_ENQ | RING_F_SC_DEQ);
            if (rings[i] == NULL)
                return -1;
        }
        for (unsigned i = 0; i < 2; i++) {
            snprintf(text, sizeof text, "%s%u", name, i);
            const int rc = rte_eth_from_rings(text, &rings[i], 1, &rings[!i], 1, SOCKET_ID_ANY);
            if (rc < 0)
                return rc;
        }
        return 0;
    }
    """,
    sources=[str(HERE / name) for name in ("pktgen.c", "forward.c")],
    depends=[str(HERE / name) for name in ("pktgen.h", "forward.h")],
    include_dirs=[str(HERE)],
    extra_compile_args=["-O3", "-g", "-std=gnu11", *flags()],
    libraries=["rte_eal", "rte_ethdev", "rte_mempool", "rte_mbuf", "rte_ring", "rte_net_ring"],
)
