/* SPDX-License-Identifier: Apache-2.0
 *
 * Plain forwarding between two ports, as dpdk-testpmd's macswap does it: what devices cost without a NAT,
 * where no other process can have the ports.
 */
#include "forward.h"

#include <string.h>

#include <rte_cycles.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>

#define BURST 32u

static void swap_macs(uint8_t *frame)
{
    uint8_t mac[6];
    memcpy(mac, frame, sizeof mac);
    memcpy(frame, frame + 6, sizeof mac);
    memcpy(frame + 6, mac, sizeof mac);
}

static uint64_t forward_one(struct pktgen_forward *f, unsigned from)
{
    struct rte_mbuf *mbufs[BURST];
    const uint16_t n = rte_eth_rx_burst(f->ports[from], 0, mbufs, BURST);
    for (uint16_t i = 0; i < n; i++)
        rte_prefetch0(rte_pktmbuf_mtod(mbufs[i], void *));
    for (uint16_t i = 0; i < n; i++)
        swap_macs(rte_pktmbuf_mtod(mbufs[i], uint8_t *));
    uint16_t sent = 0;
    for (unsigned tries = 0; sent < n && tries < 4; tries++)
        sent += rte_eth_tx_burst(f->ports[!from], 0, mbufs + sent, (uint16_t)(n - sent));
    if (sent < n)
        rte_pktmbuf_free_bulk(mbufs + sent, n - sent);
    return n;
}

void pktgen_forward(struct pktgen_forward *f)
{
    const double ns_per_cycle = 1e9 / (double)rte_get_tsc_hz();
    uint64_t before = rte_rdtsc();
    while (!__atomic_load_n(&f->stop, __ATOMIC_RELAXED)) {
        const uint64_t n = forward_one(f, 0) + forward_one(f, 1), now = rte_rdtsc();
        if (n) {
            f->packets += n;
            f->busy_ns += (double)(now - before) * ns_per_cycle;
        }
        before = now;
    }
}
