/* SPDX-License-Identifier: Apache-2.0
 *
 * For tests: rings as wires, and before them what a device with RSS does. A frame that is sent comes into the
 * queue that DPDK's own software hash says, by the keys of slices.h.
 */
#include <string.h>

#include <rte_ethdev.h>
#include <rte_mbuf.h>
#include <rte_ring.h>
#include <rte_thash.h>

#include "slices.h"

void *wire_ring(const char *name)
{
    return rte_ring_create(name, 16384, SOCKET_ID_ANY, 0);
}

static uint32_t word(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static unsigned queue_of(const uint8_t *frame, unsigned length, int external, unsigned n)
{
    uint8_t key[SLICE_KEY_BYTES];
    const uint8_t *ip = frame + 14 + (frame[12] == 0x81 ? 4 : 0);
    if (length < 42 || ip[-2] != 8 || ip[-1] != 0)
        return 0; /* no IPv4: the first queue */
    const int has_ports = (ip[9] == 6 || ip[9] == 17) && !((ip[6] & 0x3f) | ip[7]);
    uint32_t tuple[3] = {word(ip + 12), word(ip + 16), word(ip + (ip[0] & 15) * 4)};
    if (external)
        slices_port_key(key);
    else
        slices_host_key(key);
    return (rte_softrss(tuple, has_ports ? 3 : 2, key) & 127) * n / 128;
}

/* False: the wire is full, or there is no buffer. */
int wire_send(void *pool, void **queues, unsigned n, int external, const uint8_t *frame, unsigned length)
{
    struct rte_mbuf *m = rte_pktmbuf_alloc(pool);
    if (m == NULL)
        return 0;
    memcpy(rte_pktmbuf_append(m, (uint16_t)length), frame, length);
    if (rte_ring_enqueue(queues[queue_of(frame, length, external, n)], m) == 0)
        return 1;
    rte_pktmbuf_free(m);
    return 0;
}

/* The length of a frame, 0: there is none. */
unsigned wire_receive(void *ring, uint8_t *frame, unsigned size)
{
    void *m;
    if (rte_ring_dequeue(ring, &m) < 0)
        return 0;
    const unsigned length = rte_pktmbuf_pkt_len((struct rte_mbuf *)m);
    const void *data = length <= size ? rte_pktmbuf_read(m, 0, length, frame) : NULL;
    if (data != NULL && data != frame)
        memcpy(frame, data, length);
    rte_pktmbuf_free(m);
    return data != NULL ? length : 0;
}

/* What a device was told: queue of each entry of its table into `queues`, key and hash types. */
int wire_rss(uint16_t port_id, uint8_t *queues, unsigned entries, uint8_t *key, uint64_t *types)
{
    struct rte_eth_rss_reta_entry64 table[8];
    struct rte_eth_rss_conf conf = {.rss_key = key, .rss_key_len = 40};
    memset(table, 0xff, sizeof table);
    int rc = rte_eth_dev_rss_reta_query(port_id, table, (uint16_t)entries);
    for (unsigned i = 0; rc == 0 && i < entries; i++)
        queues[i] = (uint8_t)table[i / 64].reta[i % 64];
    if (rc == 0)
        rc = rte_eth_dev_rss_hash_conf_get(port_id, &conf);
    *types = conf.rss_hf;
    return rc;
}
