/* SPDX-License-Identifier: Apache-2.0
 *
 * What must be right in a packet before anything is done with it, besides what pipeline.c looks at itself.
 */
#include "core.h"

enum nat_verdict transport_check(const struct nat_packet *packet, const uint8_t *ip, unsigned header,
                                 uint32_t total)
{
    const uint8_t *l4 = ip + header;
    uint32_t bytes = total - header, there = (uint32_t)(packet->data + packet->segment - l4);
    unsigned least;
    bool fragment = is_fragment(ip);
    switch (ip[9]) {
    case PROTO_UDP:
        least = UDP_BYTES;
        break;
    case PROTO_TCP:
        least = TCP_BYTES;
        break;
    case PROTO_ICMP:
        least = ICMP_BYTES;
        break;
    default:
        return NAT_DROP_PROTOCOL;
    }
    enum nat_verdict verdict = fragment ? fragment_check(ip) : NAT_FORWARD;
    if (verdict != NAT_FORWARD || is_later_fragment(ip))
        return verdict;
    if (bytes < least)
        return fragment ? NAT_DROP_FRAGMENT_SHAPE : NAT_DROP_L4_HEADER;
    if (there < least)
        return NAT_DROP_RUNT;
    if (ip[9] == PROTO_UDP) {
        uint16_t length = get16(l4 + 4);
        if (length < UDP_BYTES || (length > bytes && !fragment))
            return NAT_DROP_L4_HEADER;
    } else if (ip[9] == PROTO_TCP) {
        unsigned offset = (l4[12] >> 4) * 4u;
        if (offset < TCP_BYTES || offset > bytes)
            return fragment && offset >= TCP_BYTES ? NAT_DROP_FRAGMENT_SHAPE : NAT_DROP_L4_HEADER;
    } else if (!fragment && there >= bytes && !sums_right(l4, bytes)) {
        return NAT_DROP_ICMP_CHECKSUM;
    }
    return NAT_FORWARD;
}
