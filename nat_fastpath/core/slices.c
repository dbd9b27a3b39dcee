/* SPDX-License-Identifier: Apache-2.0
 *
 * Several cores: whose a frame is, and how one goes on with a packet that another has begun. Each core has a
 * slice of the hosts and of the external ports, so nearly all packets concern one core only. Two kinds do
 * not: a hairpin between hosts of two cores, whose halves are done one after the other, and fragments, of
 * which only the first says where the datagram belongs. Those from outside all come to the first core, those
 * from inside to that of their sender; its store of datagrams says where they go on.
 */
#include "slices.h"
#include "core.h"

unsigned slice_of_datagram(const uint8_t *ip, uint32_t bytes, enum nat_side side, unsigned n)
{
    uint32_t l4 = (ip[0] & 15u) * 4;
    bool is_icmp = ip[9] == PROTO_ICMP && bytes >= l4 + ICMP_BYTES;
    if (is_icmp && icmp_is_translated(ip[l4]) && bytes >= l4 + ICMP_BYTES + IP_BYTES) {
        /* its sender may be a router: what counts is the session that it quotes a packet of */
        const uint8_t *quoted = ip + l4 + ICMP_BYTES;
        if (side == NAT_INTERNAL)
            return slice_of_host(get32(quoted + 16), n);
        l4 += ICMP_BYTES + (quoted[0] & 15u) * 4 + (quoted[9] == PROTO_ICMP ? 4 : 0);
        return bytes >= l4 + 2 ? slice_of_port(get16(ip + l4), n) : NAT_SLICE_ANY;
    }
    if (side == NAT_INTERNAL)
        return slice_of_host(get32(ip + 12), n);
    if (is_icmp)
        return icmp_is_query_reply(ip[l4]) ? slice_of_port(get16(ip + l4 + 4), n) : NAT_SLICE_ANY;
    bool has_ports = ip[9] == PROTO_UDP || ip[9] == PROTO_TCP;
    return has_ports && bytes >= l4 + 4 ? slice_of_port(get16(ip + l4 + 2), n) : NAT_SLICE_ANY;
}

unsigned nat_slice_of(const uint8_t *frame, uint32_t bytes, enum nat_side side, unsigned n)
{
    if (bytes < ETH_BYTES + IP_BYTES)
        return NAT_SLICE_ANY;
    uint32_t l2 = link_bytes(frame);
    const uint8_t *ip = frame + l2;
    uint16_t ethertype = get16(ip - 2);
    if (ethertype != ETHERTYPE_IPV4 || bytes < l2 + IP_BYTES)
        return ethertype == ETHERTYPE_ARP ? NAT_SLICE_ALL : NAT_SLICE_ANY;
    if (is_fragment(ip))
        return side == NAT_INTERNAL ? slice_of_host(get32(ip + 12), n) : 0;
    return slice_of_datagram(ip, bytes - l2, side, n);
}

enum nat_verdict hand_off(struct nat_core *core, struct nat_packet *packet, unsigned slice, unsigned done)
{
    packet->handoff = (uint8_t)(slice | done);
    NOTE(core, HANDOFF, .value = slice, .flag = packet->handoff);
    return NAT_HANDOFF;
}

enum nat_verdict hand_off_turned(struct nat_core *core, struct nat_packet *packet, uint32_t session)
{
    unsigned slice = slice_of_port(session_remote_port(&core->sessions[session]), core->config.n_slices);
    return has_slice(core, slice) ? NAT_FORWARD : hand_off(core, packet, slice, NAT_HANDOFF_TURNED);
}

enum nat_verdict packet_handed(struct nat_core *core, struct nat_packet *packet)
{
    return packet->handoff & NAT_HANDOFF_TURNED ? inbound(core, packet, link_bytes(packet->data), true)
                                                : packet_alone(core, packet);
}

void nat_handed(struct nat_core *core, struct nat_packet *packets, unsigned n, uint64_t now)
{
    if (core->config.role && standby_follow(core, now)) {
        standby_burst(core, packets, n, true);
        return;
    }
    core_time(core, now);
    for (unsigned i = 0; i < n; i++) {
        struct nat_packet *packet = &packets[i];
        if (packet->handoff & NAT_HANDOFF_COPY) {
            packet_handed(core, packet);
            packet->verdict = NAT_CONSUMED; /* it is counted where it was received */
        } else if (core->tracing) {
            trace_packet(core, packet);
        } else {
            count_verdict(core, packet, packet_handed(core, packet));
        }
    }
}
