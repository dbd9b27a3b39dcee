/* SPDX-License-Identifier: Apache-2.0
 *
 * One link for both sides, without tags: the lowest bit of the DSCP is set in the inside's packets, in either
 * direction. It is there on the link only: taken away before the core sees a packet, put on behind it.
 * Codepoints of RFC 2474's pool 1 have 0 there, so of these nothing is lost; of the standards only LE
 * (000001, RFC 8622) has 1, and arrives as default. ARP has no DSCP: it tells by its addresses.
 */
#ifndef MARK_H
#define MARK_H

#include <stdbool.h>

#include <rte_arp.h>
#include <rte_ether.h>
#include <rte_ip.h>
#include <rte_mbuf.h>

#include "worker.h"

#define INSIDE_MARK 0x04 /* behind it are the two bits of ECN */

/* RFC 1624, equation 3, of the word whose second byte the type of service is. */
static inline void set_mark(struct rte_ipv4_hdr *ip, bool inside)
{
    const uint8_t before = ip->type_of_service;
    ip->type_of_service = (uint8_t)((before & ~INSIDE_MARK) | (inside ? INSIDE_MARK : 0));
    if (ip->type_of_service == before)
        return;
    uint32_t sum = (uint16_t)~rte_be_to_cpu_16(ip->hdr_checksum);
    sum += (uint16_t)~before + ip->type_of_service;
    sum = (sum & 0xffff) + (sum >> 16);
    ip->hdr_checksum = rte_cpu_to_be_16((uint16_t) ~((sum & 0xffff) + (sum >> 16)));
}

/* Who asks for one that has no address yet says with which it would be (RFC 5227). */
static inline bool is_inside_arp(const struct rte_arp_hdr *arp, const struct marking *marking)
{
    const uint32_t sender = rte_be_to_cpu_32(arp->arp_data.arp_sip);
    return ((sender ? sender : rte_be_to_cpu_32(arp->arp_data.arp_tip)) & marking->mask) == marking->network;
}

/* The side that a received frame is of, and its mark is gone. What tells no side is for the core to drop. */
static inline unsigned take_mark(struct rte_mbuf *m, const struct marking *marking)
{
    const struct rte_ether_hdr *frame = rte_pktmbuf_mtod(m, const struct rte_ether_hdr *);
    const unsigned bytes = rte_pktmbuf_data_len(m);
    bool inside = false;

    if (bytes >= sizeof *frame + sizeof(struct rte_arp_hdr) &&
        frame->ether_type == RTE_BE16(RTE_ETHER_TYPE_ARP)) {
        inside = is_inside_arp((const void *)(frame + 1), marking);
    } else if (bytes >= sizeof *frame + sizeof(struct rte_ipv4_hdr) &&
               frame->ether_type == RTE_BE16(RTE_ETHER_TYPE_IPV4)) {
        struct rte_ipv4_hdr *ip = rte_pktmbuf_mtod_offset(m, struct rte_ipv4_hdr *, sizeof *frame);
        inside = ip->type_of_service & INSIDE_MARK;
        set_mark(ip, false);
    }
    return inside ? NAT_INTERNAL : NAT_EXTERNAL;
}

/* A frame that the core sends has a whole header, if it is of IPv4. */
static inline void put_mark(uint8_t *data, unsigned side)
{
    const struct rte_ether_hdr *frame = (const void *)data;
    if (frame->ether_type == RTE_BE16(RTE_ETHER_TYPE_IPV4))
        set_mark((void *)(data + sizeof *frame), side == NAT_INTERNAL);
}

#endif
