/* SPDX-License-Identifier: Apache-2.0
 *
 * RSS: a device computes with these keys what slices.h does, and so brings a packet to the queue of the
 * worker that has its session. What it does not hash that way (ICMP and fragments from outside, ARP) comes to
 * the first queue. Workers look again at what they get, so a device that spreads otherwise costs time only.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <rte_ethdev.h>

#include "slices.h"
#include "worker.h"

#define PORTS_HASHED (RTE_ETH_RSS_NONFRAG_IPV4_UDP | RTE_ETH_RSS_NONFRAG_IPV4_TCP)
#define ADDRESSES_HASHED (RTE_ETH_RSS_IPV4 | RTE_ETH_RSS_FRAG_IPV4 | RTE_ETH_RSS_NONFRAG_IPV4_OTHER)
#define USUAL_KEY 40u
#define LONGEST_TABLE 4096u

int spread_ask(uint16_t port_id, int side, unsigned n, struct rte_eth_conf *conf, char *why, size_t why_size)
{
    static uint8_t keys[2][SLICE_KEY_BYTES]; /* drivers keep the pointer */
    struct rte_eth_dev_info info;
    if (rte_eth_dev_info_get(port_id, &info) < 0)
        return snprintf(why, why_size, "it tells nothing about itself"), 0;
    const unsigned key_bytes = info.hash_key_size ? info.hash_key_size : USUAL_KEY;

    if (side < 0)
        return snprintf(why, why_size, "inside and outside share the device, and RSS has one key only"), 0;
    if (!info.reta_size || !info.flow_type_rss_offloads)
        return snprintf(why, why_size, "%s has no RSS", info.driver_name), 0;
    if (info.max_rx_queues < n || info.max_tx_queues < n)
        return snprintf(why, why_size, "%u receive and %u transmit queues are too few for %u workers",
                        info.max_rx_queues, info.max_tx_queues, n),
               0;
    if ((info.flow_type_rss_offloads & PORTS_HASHED) != PORTS_HASHED ||
        !(info.flow_type_rss_offloads & ADDRESSES_HASHED))
        return snprintf(why, why_size, "its RSS does not take the ports of UDP and TCP over IPv4"), 0;
    if (info.reta_size % SLICE_GROUPS || info.reta_size > LONGEST_TABLE)
        return snprintf(why, why_size, "its RSS has a table of %u entries, and needs %u or a multiple",
                        info.reta_size, SLICE_GROUPS),
               0;
    if (key_bytes < USUAL_KEY || key_bytes > SLICE_KEY_BYTES)
        return snprintf(why, why_size, "its RSS has a key of %u bytes, and needs %u to %u", key_bytes,
                        USUAL_KEY, SLICE_KEY_BYTES),
               0;
    slices_host_key(keys[NAT_INTERNAL]);
    slices_port_key(keys[NAT_EXTERNAL]);
    conf->rxmode.mq_mode = RTE_ETH_MQ_RX_RSS;
    conf->rx_adv_conf.rss_conf = (struct rte_eth_rss_conf){
        .rss_key = keys[side],
        .rss_key_len = (uint8_t)key_bytes,
        .rss_hf = info.flow_type_rss_offloads & (PORTS_HASHED | ADDRESSES_HASHED),
    };
    return 1;
}

int spread_fill(uint16_t port_id, unsigned n)
{
    struct rte_eth_rss_reta_entry64 table[LONGEST_TABLE / RTE_ETH_RETA_GROUP_SIZE];
    struct rte_eth_dev_info info;
    const int rc = rte_eth_dev_info_get(port_id, &info);
    if (rc < 0)
        return rc;
    memset(table, 0, sizeof table);
    for (unsigned i = 0; i < info.reta_size; i++) {
        struct rte_eth_rss_reta_entry64 *group = &table[i / RTE_ETH_RETA_GROUP_SIZE];
        group->mask = UINT64_MAX;
        group->reta[i % RTE_ETH_RETA_GROUP_SIZE] = (uint16_t)slice_of_group(i % SLICE_GROUPS, n);
    }
    return rte_eth_dev_rss_reta_update(port_id, table, info.reta_size);
}
