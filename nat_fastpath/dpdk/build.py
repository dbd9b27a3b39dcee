# SPDX-License-Identifier: Apache-2.0
"""Makes ``_dpdk``: what we use of EAL, ethdev and mempool, and the worker, for cffi in API mode."""

import hashlib
import os
import subprocess
from pathlib import Path

from cffi import FFI

HERE = Path("nat_fastpath/dpdk")
CORE = Path("nat_fastpath/core")
# as setup.py; of DPDK's rings the variant that a sanitizer of threads can follow
SANITIZERS = os.environ.get("TANDEM_SANITIZE")
SANITIZE = [f"-fsanitize={SANITIZERS}", "-DRTE_USE_C11_MEM_MODEL"] if SANITIZERS else []
LIBRARIES = ["rte_eal", "rte_ethdev", "rte_mempool", "rte_mbuf", "rte_ring"]

ffibuilder = FFI()
ffibuilder.cdef(
    """
    /* EAL */
    int rte_eal_init(int argc, char **argv);
    int rte_eal_cleanup(void);
    int rte_eal_has_hugepages(void);
    const char *rte_version(void);
    const char *rte_strerror(int errnum);
    int error_number(void);
    int rte_dev_probe(const char *devargs);
    int log_capture(void);
    void log_capture_xdp(void);
    size_t log_take(char *out, size_t size);

    /* mempool, mbuf */
    struct rte_mempool { ...; };
    #define RTE_PKTMBUF_HEADROOM ...
    struct rte_mempool *pool_create(const char *name, unsigned n, uint16_t room, int pages);
    void rte_mempool_free(struct rte_mempool *pool);
    unsigned int rte_mempool_avail_count(const struct rte_mempool *pool);
    unsigned int rte_mempool_in_use_count(const struct rte_mempool *pool);

    /* ethdev */
    #define RTE_ETHER_HDR_LEN ...
    #define RTE_ETHER_CRC_LEN ...
    #define RTE_ETH_TX_OFFLOAD_MULTI_SEGS ...
    #define RTE_ETH_RX_OFFLOAD_SCATTER ...
    struct rte_ether_addr { uint8_t addr_bytes[6]; ...; };
    struct rte_eth_rxmode { uint32_t mtu; uint64_t offloads; ...; };
    struct rte_eth_txmode { uint64_t offloads; ...; };
    struct rte_eth_conf { struct rte_eth_rxmode rxmode; struct rte_eth_txmode txmode; ...; };
    struct rte_eth_dev_info {
        const char *driver_name; unsigned int if_index; uint16_t min_mtu; uint16_t max_mtu; uint32_t max_rx_pktlen;
        uint64_t rx_offload_capa; uint64_t tx_offload_capa; ...; };
    struct rte_eth_stats {
        uint64_t ipackets; uint64_t opackets; uint64_t ibytes; uint64_t obytes;
        uint64_t imissed; uint64_t ierrors; uint64_t oerrors; uint64_t rx_nombuf; ...; };
    struct rte_eth_link { uint32_t link_speed; ...; };
    struct rte_eth_xstat { uint64_t id; uint64_t value; };
    struct rte_eth_xstat_name { char name[...]; };

    int rte_eth_dev_get_port_by_name(const char *name, uint16_t *port_id);
    int rte_eth_dev_get_name_by_port(uint16_t port_id, char *name);
    uint16_t rte_eth_find_next(uint16_t port_id);
    #define RTE_MAX_ETHPORTS ...
    int rte_eth_dev_info_get(uint16_t port_id, struct rte_eth_dev_info *info);
    int rte_eth_dev_configure(uint16_t port_id, uint16_t nb_rx, uint16_t nb_tx, const struct rte_eth_conf *conf);
    int rte_eth_dev_adjust_nb_rx_tx_desc(uint16_t port_id, uint16_t *nb_rx, uint16_t *nb_tx);
    int rte_eth_rx_queue_setup(uint16_t port_id, uint16_t queue, uint16_t nb_desc, unsigned int socket,
        const void *conf, struct rte_mempool *pool);
    int rte_eth_tx_queue_setup(uint16_t port_id, uint16_t queue, uint16_t nb_desc, unsigned int socket,
        const void *conf);
    int rte_eth_dev_socket_id(uint16_t port_id);
    int rte_eth_dev_set_mtu(uint16_t port_id, uint16_t mtu);
    int rte_eth_dev_get_mtu(uint16_t port_id, uint16_t *mtu);
    int rte_eth_macaddr_get(uint16_t port_id, struct rte_ether_addr *mac);
    int rte_eth_dev_default_mac_addr_set(uint16_t port_id, struct rte_ether_addr *mac);
    int rte_eth_dev_start(uint16_t port_id);
    int rte_eth_dev_stop(uint16_t port_id);
    int rte_eth_dev_close(uint16_t port_id);
    int rte_eth_dev_is_removed(uint16_t port_id);
    int rte_eth_stats_get(uint16_t port_id, struct rte_eth_stats *stats);
    int rte_eth_xstats_get_names(uint16_t port_id, struct rte_eth_xstat_name *names, unsigned int n);
    int rte_eth_xstats_get(uint16_t port_id, struct rte_eth_xstat *xstats, unsigned int n);
    struct link { int up; int full_duplex; uint32_t speed_mbps; };
    int link_get(uint16_t port_id, struct link *out);
    void port_pause(uint16_t port_id);
    int spread_ask(uint16_t port_id, int side, unsigned n, struct rte_eth_conf *conf, char *why, size_t why_size);
    int spread_fill(uint16_t port_id, int side, unsigned n);

    int gate_start(void);
    void gate_end(void);
    void gate_shut(void);
    void gate_open(void);

    /* worker */
    #define NAT_MAX_PORTS ...
    #define WORKER_IDLE_BOUND_US ...
    struct nat_api;
    struct nat_core;
    #define WORKERS_MAX ...
    #define WORKER_RING ...
    struct workers;
    struct worker_port {
        uint16_t port_id; uint8_t fill_checksums; uint8_t side; uint16_t vlan; uint16_t rx_queues; uint16_t tx_queues;
        uint8_t gated; };
    struct marking { uint8_t used; uint32_t network; uint32_t mask; };
    struct workers_config {
        const struct nat_api *api; void *pool; int adaptive; int wake_fd; unsigned n_ports;
        struct worker_port ports[...]; struct marking marking; unsigned n; struct nat_core *cores[...]; int cpus[...]; };
    struct worker_stats {
        uint64_t loops, loops_with_packets, sleeps, total_ns, busy_ns, sleep_max_ns, outbox_no_buffer,
            fragment_no_buffer, handed_off, handoff_received, handoff_dropped, arp_copies, tx_passed;
        uint64_t tx_dropped[...], checksums_filled[...]; };
    struct workers *workers_start(const struct workers_config *config, char *error, size_t error_size);
    bool workers_stop(struct workers *workers, unsigned patience_s);
    const uint64_t *worker_loops(const struct workers *workers, unsigned i);
    void worker_read_stats(const struct workers *workers, unsigned i, struct worker_stats *out);
    """
)


def pkg_config(flag: str) -> list[str]:
    return subprocess.run(
        ["pkg-config", flag, "libdpdk"], check=True, capture_output=True, text=True
    ).stdout.split()


ffibuilder.set_source(
    "nat_fastpath.dpdk._dpdk",
    """
    #include <rte_eal.h>
    #include <rte_dev.h>
    #include <rte_errno.h>
    #include <rte_ethdev.h>
    #include <rte_mbuf.h>
    #include <rte_mbuf_pool_ops.h>
    #include <rte_version.h>
    #include <unistd.h>
    #include "worker.h"

    /* rte_errno is per thread and not a function */
    static int error_number(void) { return rte_errno; }

    /* ``pages``: the memory is of ordinary pages. A buffer never crosses one, and AF_XDP registers as much memory as the
     * buffers have bytes: with space between them the last ones would lie outside, and what the kernel is
     * given there never comes back. So each fills its page, as it would use one anyway. */
    static struct rte_mempool *pool_create(const char *name, unsigned n, uint16_t room, int pages)
    {
        const unsigned cache = 256, page = (unsigned)getpagesize(), flags = RTE_MEMPOOL_F_NO_SPREAD;
        const unsigned size = rte_mempool_calc_obj_size((unsigned)sizeof(struct rte_mbuf) + room, flags, NULL);
        if (!pages || size > page)
            return rte_pktmbuf_pool_create(name, n, cache, 0, room, SOCKET_ID_ANY);
        room = (uint16_t)(room + page - size);
        struct rte_pktmbuf_pool_private about = {.mbuf_data_room_size = room};
        struct rte_mempool *pool = rte_mempool_create_empty(
            name, n, (unsigned)sizeof(struct rte_mbuf) + room, cache, sizeof about, SOCKET_ID_ANY, flags);
        if (pool == NULL)
            return NULL;
        const int rc = rte_mempool_set_ops_byname(pool, rte_mbuf_best_mempool_ops(), NULL);
        if (rc == 0)
            rte_pktmbuf_pool_init(pool, &about);
        if (rc != 0 || rte_mempool_populate_default(pool) < 0) {
            rte_mempool_free(pool);
            return NULL;
        }
        rte_mempool_obj_iter(pool, rte_pktmbuf_init, NULL);
        return pool;
    }

    struct link { int up; int full_duplex; uint32_t speed_mbps; };
    static int link_get(uint16_t port_id, struct link *out)
    {
        struct rte_eth_link link = {0};
        const int rc = rte_eth_link_get_nowait(port_id, &link);
        *out = (struct link){link.link_status, link.link_duplex, link.link_speed};
        return rc;
    }

    /* A stopped port that is polled makes DPDK complain, with a trace of the stack; until it is started this is silent. */
    static uint16_t no_packets(void *queue, struct rte_mbuf **mbufs, uint16_t n)
    {
        (void)queue, (void)mbufs, (void)n;
        return 0;
    }
    static void port_pause(uint16_t port_id)
    {
        rte_eth_fp_ops[port_id].rx_pkt_burst = no_packets;
        rte_eth_fp_ops[port_id].tx_pkt_burst = no_packets;
    }
    """,
    sources=[str(HERE / name) for name in ("worker.c", "thread.c", "spread.c", "gate.c", "log.c")],
    depends=[
        *(str(HERE / name) for name in ("worker.h", "frame.h", "mark.h")),
        *(str(CORE / name) for name in ("nat.h", "slices.h")),
    ],
    include_dirs=[str(HERE), str(CORE)],
    define_macros=[
        ("NAT_HEADER_HASH", "0x" + hashlib.sha256((CORE / "nat.h").read_bytes()).hexdigest()[:16] + "ULL")
    ],
    # -isystem: DPDK's headers are not ours to mend
    extra_compile_args=[
        "-O3",
        "-g",
        "-std=gnu11",
        *SANITIZE,
        *(f.replace("-I", "-isystem") for f in pkg_config("--cflags")),
    ],
    extra_link_args=SANITIZE[:1],
    libraries=LIBRARIES,
    library_dirs=[f[2:] for f in pkg_config("--libs-only-L")],
)
