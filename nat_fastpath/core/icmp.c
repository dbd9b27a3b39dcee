/* SPDX-License-Identifier: Apache-2.0
 *
 * ICMP: errors of our own (RFC 1812, 4.3), answers to pings, and errors of others, whose quoted packet is
 * translated as well (RFC 5508, section 4).
 */
#include "core.h"

#define QUOTED_DATAGRAM 576u /* RFC 1812, 4.3.2.3: no longer than this in all */
#define OWN_TTL 64u

static bool spend_icmp(struct nat_core *core)
{
    if (!bucket_spend(&core->icmp_errors, core->config.icmp_rate, core->config.icmp_rate, core->now_ns)) {
        core->stats.icmp_errors_limited++;
        return false;
    }
    return true;
}

static void answer_mac(struct nat_core *core, struct nat_packet *packet)
{
    memcpy(packet->data, packet->data + 6, 6);
    memcpy(packet->data + 6, core->config.ports[packet->port].mac, 6);
}

enum nat_verdict icmp_error(struct nat_core *core, struct nat_packet *packet, unsigned l2, uint8_t type,
                            uint8_t code, uint16_t mtu, enum nat_verdict otherwise)
{
    uint8_t *ip = packet->data + l2;
    unsigned header = (ip[0] & 15u) * 4;
    uint32_t own = core->config.ports[packet->port].address;
    bool about_error = ip[9] == PROTO_ICMP && packet->segment > l2 + header && icmp_is_error(ip[header]);
    unsigned ahead = IP_BYTES + ICMP_BYTES;
    /* the quotation: header and eight bytes at least */
    uint32_t quoted = get16(ip + 2);
    if (quoted > packet->segment - l2)
        quoted = packet->segment - l2;
    if (quoted > QUOTED_DATAGRAM - ahead)
        quoted = QUOTED_DATAGRAM - ahead;
    /* RFC 1812, 4.3.2.7: not about a later fragment either */
    if (!own || about_error || is_later_fragment(ip) || packet->capacity < l2 + ahead + header + 8)
        return otherwise;
    if (quoted > packet->capacity - l2 - ahead)
        quoted = packet->capacity - l2 - ahead;
    if (!spend_icmp(core))
        return otherwise;

    uint32_t to = raw32(ip + 12);
    memmove(ip + ahead, ip, quoted);
    uint32_t total = ahead + quoted;
    memset(ip, 0, ahead);
    ip[0] = 0x45;
    put16(ip + 2, (uint16_t)total);
    put16(ip + 6, IP_DF); /* atomic, so that the identification may be 0: RFC 6864 */
    ip[8] = OWN_TTL;
    ip[9] = PROTO_ICMP;
    put32(ip + 12, own);
    put_raw32(ip + 16, to);
    put_raw16(ip + 10, checksum(ip, IP_BYTES));
    uint8_t *icmp = ip + IP_BYTES;
    icmp[0] = type;
    icmp[1] = code;
    put16(icmp + 6, mtu);
    put_raw16(icmp + 2, checksum(icmp, ICMP_BYTES + quoted));
    answer_mac(core, packet);
    packet->length = packet->segment = l2 + total;
    core->stats.icmp_errors_sent++;
    return NAT_REPLY;
}

enum nat_verdict icmp_echo_reply(struct nat_core *core, struct nat_packet *packet, unsigned l2)
{
    uint8_t *ip = packet->data + l2, *icmp = ip + (ip[0] & 15u) * 4;
    if (is_fragment(ip))
        return NAT_DROP_LOCAL; /* nothing is put together here */
    uint32_t from = raw32(ip + 12);
    put_raw32(ip + 12, raw32(ip + 16));
    put_raw32(ip + 16, from);
    uint16_t before = raw16(ip + 8);
    ip[8] = OWN_TTL;
    patch_check(ip + 10, delta16(before, raw16(ip + 8)));
    before = raw16(icmp);
    icmp[0] = ICMP_ECHO_REPLY;
    patch_check(icmp + 2, delta16(before, raw16(icmp)));
    answer_mac(core, packet);
    core->stats.echo_replies_sent++;
    return NAT_REPLY;
}

/* The quoted packet of an ICMP error, checked. */
struct quoted {
    uint8_t *ip, *l4;
    uint32_t l4_bytes; /* that are there */
    struct flow_key
        key; /* of the packets that go against it: so of the direction in which the error travels */
};

static enum nat_verdict quoted_parse(uint8_t *ip, uint32_t bytes, int direction, struct quoted *out)
{
    if (bytes < IP_BYTES || ip[0] >> 4 != 4)
        return NAT_DROP_ICMP_EMBEDDED;
    unsigned header = (ip[0] & 15u) * 4;
    if (header < IP_BYTES || bytes < header + 8 || !sums_right(ip, header) || get16(ip + 6) & IP_OFFSET)
        return NAT_DROP_ICMP_EMBEDDED;
    uint8_t protocol = ip[9], *l4 = ip + header;
    uint16_t source_port = raw16(l4), destination_port = raw16(l4 + 2);
    if (protocol == PROTO_ICMP) {
        /* what we sent out was a query, what we sent in was its answer */
        bool fits = direction == IN ? l4[0] == ICMP_ECHO || l4[0] == ICMP_TIMESTAMP
                                    : l4[0] == ICMP_ECHO_REPLY || l4[0] == ICMP_TIMESTAMP_REPLY;
        if (!fits)
            return NAT_DROP_ICMP_EMBEDDED;
        source_port = direction == IN ? raw16(l4 + 4) : 0;
        destination_port = direction == IN ? 0 : raw16(l4 + 4);
    } else if (protocol != PROTO_UDP && protocol != PROTO_TCP) {
        return NAT_DROP_ICMP_EMBEDDED;
    }
    *out = (struct quoted){
        .ip = ip,
        .l4 = l4,
        .l4_bytes = bytes - header,
        .key = flow_key(raw32(ip + 16), raw32(ip + 12), destination_port, source_port, protocol),
    };
    return NAT_FORWARD;
}

/* Replaces address and port, and mends the quoted checksums; returns the delta of all that changed, for the
 * checksum of the error around it. `at` is the offset of the address in its header. */
static uint32_t quoted_rewrite(const struct quoted *q, unsigned at, uint32_t address, uint16_t port)
{
    uint32_t l3 = delta32(raw32(q->ip + at), address), delta = l3;
    uint16_t before = raw16(q->ip + 10);
    put_raw32(q->ip + at, address);
    patch_check(q->ip + 10, l3);
    delta += delta16(before, raw16(q->ip + 10));

    uint8_t protocol = q->ip[9];
    uint8_t *field = q->l4 + (protocol == PROTO_ICMP ? 4 : at == 12 ? 0 : 2);
    uint32_t l4 = delta16(raw16(field), port);
    delta += l4;
    put_raw16(field, port);
    if (protocol != PROTO_ICMP)
        l4 += l3; /* the pseudo header */
    unsigned check = protocol == PROTO_ICMP ? 2 : protocol == PROTO_UDP ? 6 : 16;
    if (q->l4_bytes >= check + 2) {
        before = raw16(q->l4 + check);
        if (protocol == PROTO_UDP)
            patch_udp_check(q->l4 + check, l4);
        else
            patch_check(q->l4 + check, l4);
        delta += delta16(before, raw16(q->l4 + check));
    }
    return delta;
}

enum nat_verdict icmp_translate_error(struct nat_core *core, struct nat_packet *packet, unsigned l2,
                                      int direction, bool hairpinned)
{
    uint8_t *ip = packet->data + l2;
    unsigned header = (ip[0] & 15u) * 4;
    uint8_t *icmp = ip + header;
    uint32_t end = get16(ip + 2);
    if (end > packet->segment - l2)
        end = packet->segment - l2;

    struct quoted q;
    enum nat_verdict verdict = quoted_parse(icmp + ICMP_BYTES, end - header - ICMP_BYTES, direction, &q);
    if (verdict != NAT_FORWARD)
        return verdict;
    if (raw32(q.ip + 12) != raw32(ip + 16))
        return NAT_DROP_ICMP_EMBEDDED; /* an error goes to whom it quotes */
    uint32_t at = session_find(
        core, &q.key, flow_hash_of(&core->hasher, q.key.addrs, q.key.ports, q.key.protocol), direction);
    if (at == NONE32)
        return NAT_DROP_ICMP_NO_SESSION;
    const struct session *s = &core->sessions[at];
    explain_note_session(core, NAT_STEP_QUOTED, at);
    bool hairpin = direction == OUT && s->neighbour[OUT] == NONE16;
    if (direction == IN && s->neighbour[OUT] == NONE16 && !hairpinned)
        return NAT_DROP_ADDRESS; /* as for the session's own packets: never from the wire */
    if (ip[8] <= 1)
        return NAT_DROP_TTL;
    if (!hairpin && get16(ip + 6) & IP_DF &&
        get16(ip + 2) > core->config.ports[core->neighbours[s->neighbour[direction]].port].mtu)
        return NAT_DROP_TOO_BIG;
    struct datagram_key datagram = datagram_key(packet, ip, hairpinned);
    if (is_fragment(ip))
        fragment_first(core, &datagram, at, direction, true);

    uint32_t delta, before, after;
    if (direction == IN) { /* quoted: X':x' -> Y:y, becomes X:x -> Y:y */
        delta = quoted_rewrite(&q, 12, low32(s->addrs[OUT]), (uint16_t)s->ports[OUT]);
        before = raw32(ip + 16);
        after = low32(s->addrs[OUT]);
        put_raw32(ip + 16, after);
    } else { /* quoted: Y:y -> X:x, becomes Y:y -> X':x'; whoever inside sent it shows as X' */
        delta = quoted_rewrite(&q, 16, high32(s->addrs[IN]), (uint16_t)(s->ports[IN] >> 16));
        before = raw32(ip + 12);
        after = high32(s->addrs[IN]);
        put_raw32(ip + 12, after);
    }
    patch_check(icmp + 2, delta);
    delta = delta32(before, after);
    core->stats.icmp_errors_translated++;
    if (hairpin) {
        patch_check(ip + 10, delta);
        core->stats.hairpinned++;
        verdict = hand_off_turned(core, packet, at);
        return verdict == NAT_FORWARD ? icmp_translate_error(core, packet, l2, IN, true) : verdict;
    }
    ip[8]--;
    patch_check(ip + 10, delta + TTL_DELTA);
    explain_next_hop(core, s->neighbour[direction]);
    return neighbour_send_any(core, packet, s->neighbour[direction]);
}
