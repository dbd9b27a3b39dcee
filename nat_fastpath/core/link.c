/* SPDX-License-Identifier: Apache-2.0
 *
 * The link header: Ethernet, and the 802.1Q tag of a port that has one.
 */
#include "core.h"

unsigned put_link(uint8_t *frame, const uint8_t *to, const struct nat_port_config *port, uint16_t ethertype)
{
    unsigned l2 = port->vlan ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
    memcpy(frame, to, 6);
    memcpy(frame + 6, port->mac, 6);
    put16(frame + 12, ETHERTYPE_VLAN);
    put16(frame + 14, port->vlan);
    put16(frame + l2 - 2, ethertype);
    return l2;
}

/* The ethertype stands where it must, in front of the IP header. The priority stays, as a switch leaves it.
 */
enum nat_verdict send_tagged(struct nat_packet *packet, unsigned l2, const uint8_t *to,
                             const struct nat_port_config *port)
{
    unsigned wanted = port->vlan ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
    uint16_t priority = l2 == ETH_BYTES ? 0 : get16(packet->data + 14) & (uint16_t)~VLAN_ID;
    if (wanted > l2 + packet->headroom)
        return NAT_DROP_VLAN;
    packet->data -= (int)(wanted - l2);
    packet->length += wanted - l2;
    packet->segment += wanted - l2;
    packet->capacity = (uint16_t)(packet->capacity + wanted - l2);
    packet->headroom = (uint8_t)(packet->headroom + l2 - wanted);
    memcpy(packet->data, to, 6);
    memcpy(packet->data + 6, port->mac, 6);
    if (port->vlan) {
        put16(packet->data + 12, ETHERTYPE_VLAN);
        put16(packet->data + 14, priority | port->vlan);
    }
    return NAT_FORWARD;
}
