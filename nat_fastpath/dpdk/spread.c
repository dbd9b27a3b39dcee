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

static unsigned key_bytes_of(const struct rte_eth_dev_info *info)
{
    return info->hash_key_size ? info->hash_key_size : USUAL_KEY;
}

static struct rte_eth_rss_conf rss_conf(const struct rte_eth_dev_info *info, int side)
{
    static uint8_t keys[2][SLICE_KEY_BYTES]; /* drivers keep the pointer */
    slices_host_key(keys[NAT_INTERNAL]);
    slices_port_key(keys[NAT_EXTERNAL]);
    return (struct rte_eth_rss_conf){
        .rss_key = keys[side],
        .rss_key_len = (uint8_t)key_bytes_of(info),
        .rss_hf = info->flow_type_rss_offloads & (PORTS_HASHED | ADDRESSES_HASHED),
    };
}

int spread_ask(uint16_t port_id, int side, unsigned n, struct rte_eth_conf *conf, char *why, size_t why_size)
{
    struct rte_eth_dev_info info = {.driver_name = "it"};
    rte_eth_dev_info_get(port_id, &info);
    const unsigned key_bytes = key_bytes_of(&info);
    const uint64_t hashed = info.flow_type_rss_offloads;

    if (side < 0)
        snprintf(why, why_size, "inside and outside share the device, and RSS has one key only");
    else if (!info.reta_size || !hashed)
        snprintf(why, why_size, "%s has no RSS", info.driver_name);
    else if (info.max_rx_queues < n || info.max_tx_queues < n)
        snprintf(why, why_size, "%u receive and %u transmit queues are too few for %u workers",
                 info.max_rx_queues, info.max_tx_queues, n);
    else if ((hashed & PORTS_HASHED) != PORTS_HASHED || !(hashed & ADDRESSES_HASHED))
        snprintf(why, why_size, "its RSS does not take the ports of UDP and TCP over IPv4");
    else if (info.reta_size % SLICE_GROUPS || info.reta_size > LONGEST_TABLE)
        snprintf(why, why_size, "its RSS has a table of %u entries, and needs %u or a multiple",
                 info.reta_size, SLICE_GROUPS);
    else if (key_bytes < USUAL_KEY || key_bytes > SLICE_KEY_BYTES)
        snprintf(why, why_size, "its RSS has a key of %u bytes, and needs %u to %u", key_bytes, USUAL_KEY,
                 SLICE_KEY_BYTES);
    else {
        conf->rxmode.mq_mode = RTE_ETH_MQ_RX_RSS;
        conf->rx_adv_conf.rss_conf = rss_conf(&info, side);
        return 1;
    }
    return 0;
}

/* Some drivers take no key when they are configured. */
static int check_key(uint16_t port_id, const struct rte_eth_dev_info *info, int side)
{
    uint8_t key[SLICE_KEY_BYTES];
    struct rte_eth_rss_conf wanted = rss_conf(info, side);
    struct rte_eth_rss_conf is = {.rss_key = key, .rss_key_len = wanted.rss_key_len};
    if (rte_eth_dev_rss_hash_conf_get(port_id, &is) < 0)
        return 0; /* it does not say */
    return memcmp(key, wanted.rss_key, wanted.rss_key_len) ? rte_eth_dev_rss_hash_update(port_id, &wanted)
                                                           : 0;
}

int spread_fill(uint16_t port_id, int side, unsigned n)
{
    struct rte_eth_rss_reta_entry64 table[LONGEST_TABLE / RTE_ETH_RETA_GROUP_SIZE];
    struct rte_eth_dev_info info;
    int rc = rte_eth_dev_info_get(port_id, &info);
    if (rc == 0)
        rc = check_key(port_id, &info, side);
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
