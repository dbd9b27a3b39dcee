/* SPDX-License-Identifier: Apache-2.0
 *
 * The decisions for the next packets of a flow. While a trace runs, every burst takes the long way, packet by
 * packet; the established path of an untraced core only asks once per burst whether there is one. It ends by
 * itself, after so many packets or so much time, also when nobody reads it.
 */
#include "core.h"

struct ends {
    uint32_t source, destination; /* host order */
    uint16_t source_port, destination_port;
    uint8_t protocol, ttl, tcp_flags;
};

/* Of an IPv4 packet; ports of a later fragment and of ICMP errors are 0, and fit no filter that names one. */
static bool ends_of(const struct nat_packet *packet, struct ends *ends)
{
    const uint8_t *data = packet->data;
    unsigned l2 = ETH_BYTES;
    if (packet->segment >= ETH_BYTES + VLAN_BYTES && get16(data + 12) == ETHERTYPE_VLAN)
        l2 += VLAN_BYTES;
    const uint8_t *ip = data + l2;
    if (packet->segment < l2 + IP_BYTES || get16(ip - 2) != ETHERTYPE_IPV4 || ip[0] >> 4 != 4)
        return false;
    unsigned header = (ip[0] & 15u) * 4;
    const uint8_t *l4 = ip + header;
    *ends = (struct ends){
        .source = get32(ip + 12), .destination = get32(ip + 16), .protocol = ip[9], .ttl = ip[8]};
    if (header < IP_BYTES || is_later_fragment(ip) || packet->segment < l2 + header + 8)
        return true;
    if (ip[9] == PROTO_TCP || ip[9] == PROTO_UDP) {
        ends->source_port = get16(l4);
        ends->destination_port = get16(l4 + 2);
        if (ip[9] == PROTO_TCP && packet->segment >= l2 + header + TCP_BYTES)
            ends->tcp_flags = l4[13];
    } else if (ip[9] == PROTO_ICMP && !icmp_is_error(l4[0])) {
        /* a query's identifier is its sender's port, and that of who is answered */
        *(icmp_is_query(l4[0]) ? &ends->source_port : &ends->destination_port) = get16(l4 + 4);
    }
    return true;
}

static bool fits(uint32_t wanted, uint16_t wanted_port, uint32_t address, uint16_t port)
{
    return (!wanted || wanted == address) && (!wanted_port || wanted_port == port);
}

/* What came and what left, from inside or from outside: a packet that is dropped has no other half. */
static bool is_wanted(const struct nat_trace *filter, bool from_inside, const struct ends *came,
                      const struct ends *left)
{
    if (filter->protocol && filter->protocol != came->protocol)
        return false;
    if (from_inside)
        return fits(filter->internal_addr, filter->internal_port, came->source, came->source_port) &&
               fits(filter->remote_addr, filter->remote_port, came->destination, came->destination_port) &&
               fits(filter->external_addr, filter->external_port, left->source, left->source_port);
    return fits(filter->remote_addr, filter->remote_port, came->source, came->source_port) &&
           fits(filter->external_addr, filter->external_port, came->destination, came->destination_port) &&
           fits(filter->internal_addr, filter->internal_port, left->destination, left->destination_port);
}

static void end_if_due(struct nat_core *core)
{
    if (core->now_ns >= core->trace.until_ns || !core->trace.status.packets)
        core->tracing = false;
}

static struct nat_trace_entry *next_entry(struct nat_core *core)
{
    core->trace.status.packets--;
    if (core->trace.tail - core->trace.head == NAT_TRACE_RING) {
        core->trace.status.missed++;
        return NULL;
    }
    return &core->trace.status.entries[core->trace.tail++ % NAT_TRACE_RING];
}

/* The session by its key in the packet as it came. */
static uint32_t session_of(const struct nat_core *core, const struct ends *came, bool from_inside)
{
    struct flow_key key = flow_key(net32(came->source), net32(came->destination), net16(came->source_port),
                                   net16(came->destination_port), came->protocol);
    uint32_t hash = flow_hash_of(&core->hasher, key.addrs, key.ports, key.protocol);
    return session_find(core, &key, hash, from_inside ? OUT : IN);
}

static void record(struct nat_core *core, const struct ends *came, const struct nat_packet *packet,
                   uint8_t port, uint32_t length, bool from_inside)
{
    struct ends left = *came;
    enum nat_verdict verdict = packet->verdict;
    bool sent = verdict == NAT_FORWARD || verdict == NAT_FRAGMENT || verdict == NAT_REPLY;
    /* a held packet is translated already, unless it waits for its first fragment */
    if (verdict <= NAT_HELD)
        ends_of(packet, &left);
    if (!is_wanted(&core->trace.status, from_inside, came, &left))
        return;
    struct nat_trace_entry *entry = next_entry(core);
    if (!entry)
        return;
    uint32_t at = session_of(core, came, from_inside);
    *entry = (struct nat_trace_entry){
        .time_ns = core->now_ns,
        .session = at == NONE32 ? 0 : core->cold[at].id,
        .next_hop_mac = sent ? get48(packet->data) : 0,
        .source = came->source,
        .destination = came->destination,
        .source_after = left.source,
        .destination_after = left.destination,
        .length = length,
        .source_port = came->source_port,
        .destination_port = came->destination_port,
        .source_port_after = left.source_port,
        .destination_port_after = left.destination_port,
        .protocol = came->protocol,
        .verdict = (uint8_t)verdict,
        .port = port,
        .port_after = sent ? packet->port : port,
        .tcp_flags = came->tcp_flags,
        .tcp_state = at == NONE32 ? 0 : core->sessions[at].tcp_state,
        .ttl = came->ttl,
    };
    end_if_due(core);
}

void trace_packet(struct nat_core *core, struct nat_packet *packet)
{
    struct ends came;
    uint8_t port = packet->port;
    uint32_t length = packet->length;
    /* one whose outbound half another core has done comes as if from outside */
    bool from_inside =
        core->config.ports[port].side == NAT_INTERNAL && !(packet->handoff & NAT_HANDOFF_TURNED);
    end_if_due(core);
    bool is_ip = core->tracing && ends_of(packet, &came);
    count_verdict(core, packet, packet_handed(core, packet));
    if (is_ip && core->tracing)
        record(core, &came, packet, port, length, from_inside);
}

void trace_burst(struct nat_core *core, struct nat_packet *packets, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        core->stats.rx_packets[packets[i].port]++;
        core->stats.rx_bytes[packets[i].port] += packets[i].length;
        trace_packet(core, &packets[i]);
    }
}

void trace_finished(struct nat_core *core, const struct nat_packet *packet)
{
    end_if_due(core);
    struct ends now;
    if (!core->tracing || !ends_of(packet, &now))
        return;
    /* It was translated when it was held, so it has the addresses that it leaves with, and nothing says any
     * more which they were. Where it goes says where it came from. */
    bool to_outside = core->config.ports[packet->port].side == NAT_EXTERNAL;
    const struct nat_trace *f = &core->trace.status;
    bool wanted =
        (!f->protocol || f->protocol == now.protocol) &&
        (to_outside ? fits(f->external_addr, f->external_port, now.source, now.source_port) &&
                          fits(f->remote_addr, f->remote_port, now.destination, now.destination_port)
                    : fits(f->remote_addr, f->remote_port, now.source, now.source_port) &&
                          fits(f->internal_addr, f->internal_port, now.destination, now.destination_port));
    struct nat_trace_entry *entry = wanted ? next_entry(core) : NULL;
    if (!entry)
        return;
    bool sent = packet->verdict <= NAT_FRAGMENT;
    *entry = (struct nat_trace_entry){
        .time_ns = core->now_ns,
        .next_hop_mac = sent ? get48(packet->data) : 0,
        .source = now.source,
        .destination = now.destination,
        .source_after = now.source,
        .destination_after = now.destination,
        .length = packet->length,
        .source_port = now.source_port,
        .destination_port = now.destination_port,
        .source_port_after = now.source_port,
        .destination_port_after = now.destination_port,
        .protocol = now.protocol,
        .verdict = packet->verdict,
        .port = packet->port,
        .port_after = packet->port,
        .tcp_flags = now.tcp_flags,
        .ttl = now.ttl,
        .was_held = 1,
    };
    end_if_due(core);
}

bool trace_command(struct nat_core *core, struct nat_trace *trace)
{
    struct nat_trace *status = &core->trace.status;
    end_if_due(core);
    trace->n_entries = 0;
    trace->running = core->tracing;
    if (trace->action == NAT_TRACE_START) {
        uint32_t token = status->token;
        if (core->tracing || !trace->packets) {
            trace->packets = status->packets;
            trace->milliseconds =
                core->tracing ? (uint32_t)((core->trace.until_ns - core->now_ns) / 1000000) : 0;
            return false;
        }
        *status = *trace;
        trace->token = status->token = token + 1;
        status->missed = 0;
        core->trace.head = core->trace.tail = 0;
        core->trace.until_ns = core->now_ns + (uint64_t)trace->milliseconds * 1000000;
        core->tracing = true;
        trace->running = 1;
        return true;
    }
    if (trace->token != status->token)
        return false;
    for (; core->trace.head != core->trace.tail; core->trace.head++)
        trace->entries[trace->n_entries++] = status->entries[core->trace.head % NAT_TRACE_RING];
    if (trace->action == NAT_TRACE_STOP)
        core->tracing = false;
    trace->running = core->tracing;
    trace->packets = status->packets;
    trace->missed = status->missed;
    return true;
}
