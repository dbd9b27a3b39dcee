/* SPDX-License-Identifier: Apache-2.0
 *
 * What a worker looks at and mends in a frame, before the core sees it.
 */
#ifndef FRAME_H
#define FRAME_H

#include <stdbool.h>
#include <string.h>

#include <rte_ip.h>
#include <rte_mbuf.h>
#include <rte_tcp.h>
#include <rte_udp.h>

#include "nat.h"

static inline bool is_tagged(const struct rte_mbuf *m)
{
    return rte_pktmbuf_data_len(m) >= RTE_ETHER_HDR_LEN + sizeof(struct rte_vlan_hdr) &&
           rte_pktmbuf_mtod(m, const struct rte_ether_hdr *)->ether_type == RTE_BE16(RTE_ETHER_TYPE_VLAN);
}

/* A packet from a local sender has only the sum of the pseudo-header in its checksum field: the rest is left
 * to hardware, which a veth has not. A finished checksum that happens to look the same stays what it is, for
 * then the sum gives the same value again. */
static inline bool fill_checksum(struct rte_mbuf *m)
{
    uint8_t *data = rte_pktmbuf_mtod(m, uint8_t *);
    const unsigned length = rte_pktmbuf_data_len(m);
    const unsigned l2 = is_tagged(m) ? RTE_ETHER_HDR_LEN + sizeof(struct rte_vlan_hdr) : RTE_ETHER_HDR_LEN;
    const struct rte_ipv4_hdr *ip = (const void *)(data + l2);
    unsigned field;

    if (m->nb_segs != 1 || length < l2 + sizeof *ip || ip->version != 4 ||
        *(const unaligned_uint16_t *)(data + l2 - sizeof(uint16_t)) != RTE_BE16(RTE_ETHER_TYPE_IPV4))
        return false;
    if (ip->next_proto_id == IPPROTO_TCP)
        field = offsetof(struct rte_tcp_hdr, cksum);
    else if (ip->next_proto_id == IPPROTO_UDP)
        field = offsetof(struct rte_udp_hdr, dgram_cksum);
    else
        return false;
    /* nothing is subtracted before it is known to be the smaller one: the core has checked nothing yet */
    const unsigned header = rte_ipv4_hdr_len(ip), total = rte_be_to_cpu_16(ip->total_length);
    if (header < sizeof *ip || total < header + field + sizeof(uint16_t) || l2 + total > length ||
        (ip->fragment_offset & RTE_BE16(RTE_IPV4_HDR_MF_FLAG | RTE_IPV4_HDR_OFFSET_MASK)))
        return false;
    const unsigned l4 = l2 + header, l4_length = total - header;
    uint16_t cksum;
    memcpy(&cksum, data + l4 + field, sizeof cksum);
    if (cksum != rte_ipv4_phdr_cksum(ip, 0))
        return false;
    cksum = (uint16_t)~rte_raw_cksum(data + l4, l4_length);
    if (cksum == 0)
        cksum = 0xffff;
    memcpy(data + l4 + field, &cksum, sizeof cksum);
    return true;
}

static inline void describe(struct nat_packet *packet, struct rte_mbuf *m, unsigned port)
{
    *packet = (struct nat_packet){
        .data = rte_pktmbuf_mtod(m, uint8_t *),
        .length = rte_pktmbuf_pkt_len(m),
        .segment = rte_pktmbuf_data_len(m),
        .capacity = (uint16_t)(rte_pktmbuf_data_len(m) + (m->nb_segs == 1 ? rte_pktmbuf_tailroom(m) : 0)),
        .headroom = (uint8_t)RTE_MIN(rte_pktmbuf_headroom(m), RTE_PKTMBUF_HEADROOM),
        .port = (uint8_t)port,
        .cookie = m,
    };
}

#endif
