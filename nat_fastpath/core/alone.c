/* SPDX-License-Identifier: Apache-2.0
 *
 * One packet, whatever it is: the definition of what this NAT does. What pipeline.c does in batches has the
 * same outcome.
 */
#include "sessions.h"

/* The key of a packet whose headers are checked. An ICMP query has one identifier for both ends. */
static struct flow_key packet_key(const uint8_t *ip, const uint8_t *l4, int direction)
{
    uint16_t source = raw16(l4), destination = raw16(l4 + 2);
    if (ip[9] == PROTO_ICMP) {
        source = direction == OUT ? raw16(l4 + 4) : 0;
        destination = direction == OUT ? 0 : raw16(l4 + 4);
    }
    return flow_key(raw32(ip + 12), raw32(ip + 16), source, destination, ip[9]);
}

static bool opens_tcp(const uint8_t *l4)
{
    return (l4[13] & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

static enum nat_address_fault source_fault(const struct nat_core *core, uint32_t source)
{
    return is_unusable(source)                               ? NAT_ADDRESS_UNUSABLE
           : is_multicast(source)                            ? NAT_ADDRESS_MULTICAST
           : is_own_address(core, source)                    ? NAT_ADDRESS_OWN
           : pool_block_of(&core->pool, source) != POOL_NONE ? NAT_ADDRESS_POOL
           : is_subnet_broadcast(core, source)               ? NAT_ADDRESS_BROADCAST
                                                             : NAT_ADDRESS_GOOD;
}

/* What a packet from inside asks for; or why it will not get it. */
static enum nat_verdict outbound_request(struct nat_core *core, const struct nat_packet *packet, unsigned l2,
                                         uint32_t hash, bool hairpin, struct session_request *request)
{
    const uint8_t *ip = packet->data + l2, *l4 = ip + (ip[0] & 15u) * 4;
    const bool is_icmp = ip[9] == PROTO_ICMP;
    enum nat_verdict why = NAT_FORWARD;
    *request = (struct session_request){
        .internal_addr = get32(ip + 12),
        .remote_addr = get32(ip + 16),
        .internal_port = get16(is_icmp ? l4 + 4 : l4),
        .remote_port = is_icmp ? 0 : get16(l4 + 2),
        .protocol = ip[9],
        .tcp_state = ip[9] == PROTO_TCP ? NAT_TCP_SYN_OUT : NAT_TCP_NONE,
        .neighbour = {NONE16, NONE16},
        .hash = hash,
    };
    if (!hairpin && (request->neighbour[OUT] =
                         neighbour_towards(core, request->remote_addr, NAT_EXTERNAL, &why)) == NONE16)
        return why;
    request->neighbour[IN] = neighbour_behind(core, packet->port, request->internal_addr, packet->data + 6);
    if (request->neighbour[IN] != NONE16)
        return NAT_FORWARD;
    neighbours_unneeded(core, request->neighbour);
    return NAT_DROP_TABLE_FULL;
}

bool outbound_begin(struct nat_core *core, const struct nat_packet *packet, unsigned l2, uint32_t hash,
                    struct opening *opening)
{
    const uint8_t *ip = packet->data + l2;
    const uint32_t destination = get32(ip + 16);
    struct session_request request;
    if (ip[8] <= 1 || (ip[9] == PROTO_TCP && !opens_tcp(ip + IP_BYTES)) ||
        source_fault(core, get32(ip + 12)) || !is_plain(core, destination) ||
        outbound_request(core, packet, l2, hash, false, &request) != NAT_FORWARD)
        return false;
    session_begin(core, &request, opening);
    return true;
}

static enum nat_verdict outbound(struct nat_core *core, struct nat_packet *packet, unsigned l2)
{
    uint8_t *ip = packet->data + l2, *l4 = ip + (ip[0] & 15u) * 4;
    if (is_later_fragment(ip))
        return fragment_later(core, packet, l2, OUT, false);
    bool is_icmp = ip[9] == PROTO_ICMP;
    if (is_icmp && icmp_is_translated(l4[0]))
        return icmp_translate_error(core, packet, l2, OUT, false);
    if (is_icmp && !icmp_is_query(l4[0]))
        return icmp_is_query_reply(l4[0]) ? NAT_DROP_ICMP_NO_SESSION : NAT_DROP_ICMP_TYPE;

    struct flow_key key = packet_key(ip, l4, OUT);
    uint32_t hash = flow_hash_of(&core->hasher, key.addrs, key.ports, key.protocol);
    uint32_t at = session_find(core, &key, hash, OUT);
    if (at != NONE32)
        return session_packet(core, packet, l2, at, OUT, false);
    NOTE(core, NO_SESSION);

    uint32_t remote = get32(ip + 16);
    bool to_pool = pool_block_of(&core->pool, remote) != POOL_NONE;
    if (to_pool && is_icmp)
        return l4[0] == ICMP_ECHO ? icmp_echo_reply(core, packet, l2) : NAT_DROP_ICMP_TYPE;
    if (ip[8] <= 1)
        return icmp_error(core, packet, l2, ICMP_TIME_EXCEEDED, 0, 0, NAT_DROP_TTL);
    if (ip[9] == PROTO_TCP && !opens_tcp(l4))
        return NAT_DROP_TCP_NOT_SYN;

    if (to_pool)
        NOTE(core, HAIRPIN, .address = remote);
    struct session_request request;
    enum nat_verdict verdict = outbound_request(core, packet, l2, hash, to_pool, &request);
    if (verdict != NAT_FORWARD)
        return verdict;
    verdict = session_open(core, &request, &at);
    return verdict == NAT_FORWARD ? session_packet(core, packet, l2, at, OUT, false) : verdict;
}

enum nat_verdict inbound(struct nat_core *core, struct nat_packet *packet, unsigned l2, bool hairpinned)
{
    uint8_t *ip = packet->data + l2, *l4 = ip + (ip[0] & 15u) * 4;
    if (is_later_fragment(ip))
        return fragment_later(core, packet, l2, IN, hairpinned);
    bool is_icmp = ip[9] == PROTO_ICMP;
    uint32_t external = get32(ip + 16);
    if (is_icmp && !icmp_is_query_reply(l4[0])) {
        if (pool_block_of(&core->pool, external) == POOL_NONE)
            return NAT_DROP_NOT_POOL;
        if (icmp_is_translated(l4[0]))
            return icmp_translate_error(core, packet, l2, IN, hairpinned);
        return l4[0] == ICMP_ECHO && !hairpinned ? icmp_echo_reply(core, packet, l2) : NAT_DROP_ICMP_TYPE;
    }

    struct flow_key key = packet_key(ip, l4, IN);
    uint32_t hash = flow_hash_of(&core->hasher, key.addrs, key.ports, key.protocol);
    uint32_t at = session_find(core, &key, hash, IN);
    if (at != NONE32)
        return session_packet(core, packet, l2, at, IN, hairpinned);
    NOTE(core, NO_SESSION);

    uint32_t remote = get32(ip + 12);
    struct session_request request = {
        .remote_addr = remote,
        .remote_port = net16((uint16_t)key.ports),
        .protocol = ip[9],
        .tcp_state = ip[9] == PROTO_TCP ? NAT_TCP_SYN_IN : NAT_TCP_NONE,
        .hash = hash,
        .inbound = true,
    };
    /* an inside source, from outside, is forged (RFC 1812, 5.3.8) */
    if (!hairpinned && is_routed_to(core, remote, NAT_INTERNAL))
        return NAT_DROP_ADDRESS;
    enum nat_verdict verdict =
        mapping_admits(core, external, net16((uint16_t)(key.ports >> 16)), ip[9], remote, &request);
    if (is_icmp && verdict != NAT_DROP_NOT_POOL)
        return NAT_DROP_ICMP_NO_SESSION; /* only what was asked for */
    if (verdict != NAT_FORWARD)
        return verdict;
    if (ip[9] == PROTO_TCP && !opens_tcp(l4))
        return NAT_DROP_TCP_NOT_SYN;
    if (ip[8] <= 1)
        return hairpinned ? NAT_DROP_TTL
                          : icmp_error(core, packet, l2, ICMP_TIME_EXCEEDED, 0, 0, NAT_DROP_TTL);
    request.neighbour[IN] = neighbour_towards(core, request.internal_addr, NAT_INTERNAL, &verdict);
    if (request.neighbour[IN] == NONE16)
        return verdict;
    request.neighbour[OUT] =
        hairpinned ? NONE16 : neighbour_behind(core, packet->port, remote, packet->data + 6);
    if (!hairpinned && request.neighbour[OUT] == NONE16) {
        neighbours_unneeded(core, request.neighbour);
        return NAT_DROP_TABLE_FULL;
    }
    verdict = session_open(core, &request, &at);
    return verdict == NAT_FORWARD ? session_packet(core, packet, l2, at, IN, hairpinned) : verdict;
}

enum nat_verdict packet_alone(struct nat_core *core, struct nat_packet *packet)
{
    uint8_t *data = packet->data;
    const struct nat_port_config *port = &core->config.ports[packet->port];
    if (packet->segment < ETH_BYTES)
        return NAT_DROP_RUNT;
    unsigned l2 = ETH_BYTES;
    uint16_t ethertype = get16(data + 12);
    if (port->vlan) {
        if (!has_tag(packet, port->vlan))
            return NAT_DROP_VLAN;
        l2 += VLAN_BYTES;
        ethertype = get16(data + 16);
    }
    if (ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_SERVICE_VLAN)
        return NAT_DROP_VLAN;
    if (data[0] & 1) {
        bool broadcast = raw32(data) == 0xffffffffu && raw16(data + 4) == 0xffffu;
        if (!broadcast || ethertype != ETHERTYPE_ARP)
            return NAT_DROP_MULTICAST;
    } else if (raw32(data) != raw32(port->mac) || raw16(data + 4) != raw16(port->mac + 4)) {
        return NAT_DROP_NOT_FOR_US;
    }
    if (data[6] & 1)
        return NAT_DROP_ADDRESS;
    if (ethertype == ETHERTYPE_ARP)
        return neighbour_arp(core, packet, l2);
    if (ethertype != ETHERTYPE_IPV4)
        return ethertype == ETHERTYPE_IPV6 ? NAT_DROP_IPV6 : NAT_DROP_ETHERTYPE;

    uint8_t *ip = data + l2;
    if (packet->segment < l2 + IP_BYTES)
        return NAT_DROP_RUNT;
    unsigned header = (ip[0] & 15u) * 4;
    uint32_t total = get16(ip + 2);
    if (ip[0] >> 4 != 4 || header < IP_BYTES || total < header || total > packet->length - l2)
        return NAT_DROP_IP_HEADER;
    if (packet->segment < l2 + header)
        return NAT_DROP_RUNT;
    if (!sums_right(ip, header))
        return NAT_DROP_IP_CHECKSUM;

    uint32_t source = get32(ip + 12), destination = get32(ip + 16);
    bool to_pool = pool_block_of(&core->pool, destination) != POOL_NONE;
    enum nat_address_fault fault = source_fault(core, source);
    if (fault) {
        NOTE(core, ADDRESS, .address = source, .flag = fault);
        return NAT_DROP_ADDRESS;
    }
    if (is_multicast(destination))
        return NAT_DROP_MULTICAST;
    if (is_unusable(destination)) {
        NOTE(core, ADDRESS, .address = destination, .flag = NAT_ADDRESS_UNUSABLE);
        return NAT_DROP_ADDRESS;
    }
    enum nat_verdict verdict = transport_check(packet, ip, header, total);
    if (is_own_address(core, destination) && !to_pool) {
        if (is_fragment(ip))
            return NAT_DROP_LOCAL;
        if (ip[9] == PROTO_ICMP && (verdict != NAT_FORWARD || ip[header] == ICMP_ECHO))
            return verdict == NAT_FORWARD ? icmp_echo_reply(core, packet, l2) : verdict;
        return NAT_DROP_LOCAL;
    }
    if (verdict == NAT_FORWARD && is_fragment(ip))
        verdict = fragment_direct(core, packet, ip);
    if (verdict != NAT_FORWARD)
        return verdict;
    return port->side == NAT_INTERNAL ? outbound(core, packet, l2) : inbound(core, packet, l2, false);
}
