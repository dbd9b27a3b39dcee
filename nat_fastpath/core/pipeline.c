/* SPDX-License-Identifier: Apache-2.0
 *
 * A packet's whole way, top to bottom. nat_burst takes the common shape (IPv4 without options, whole UDP or
 * TCP, of a known session) through in batches, so that memory is asked for long before it is needed.
 * Whatever differs in anything goes through `packet_alone`, which is the definition of what this NAT does.
 */
#include "core.h"
#include "sessions.h"

#include <string.h>

/* --- one packet of a known session -------------------------------------------------------------------- */

static enum nat_verdict translate_too_big(struct nat_core *core, struct nat_packet *packet, unsigned l2,
                                          uint32_t at, int direction, bool hairpinned, uint16_t mtu);

static void tcp_advance(struct nat_core *core, uint32_t at, uint8_t state, int direction)
{
    struct session *s = &core->sessions[at];
    int opener = s->flags & NAT_SESSION_INBOUND ? IN : OUT;
    /* the third step of the handshake is the opener's */
    if (s->tcp_state == NAT_TCP_SYN_BOTH && direction != opener)
        return;
    /* both ends gone, the same endpoints begin anew, perhaps the other way round */
    if (state == NAT_TCP_SYN_OUT)
        s->flags &= (uint8_t)~NAT_SESSION_INBOUND;
    else if (state == NAT_TCP_SYN_IN)
        s->flags |= NAT_SESSION_INBOUND;
    NOTE(core, TCP, .value = s->tcp_state, .limit = state);
    s->tcp_state = state;
    session_set_timer(s);
    if (event_room_to_update(core))
        event_emit(core, NAT_EVENT_UPDATE, 0, at);
}

/* Once per millisecond and session at most: answers go back to where its packets now come from. */
static void follow_sender(struct nat_core *core, uint32_t session, const struct nat_packet *packet)
{
    const struct session *s = &core->sessions[session];
    const struct neighbour *n = &core->neighbours[s->neighbour[IN]];
    const uint8_t *mac = packet->data + 6;
    bool fresh = n->state != NAT_NB_REACHABLE || !n->address || core->now_ms - n->confirmed_ms < 1000;
    if (fresh && raw32(mac) == raw32(n->mac) && raw16(mac + 4) == raw16(n->mac + 4))
        return;
    if (session_follow(core, session, IN,
                       neighbour_behind(core, packet->port, session_internal_addr(s), mac)) &&
        event_room_to_update(core))
        event_emit(core, NAT_EVENT_UPDATE, 0, session); /* the peer's answers must go there too */
}

/* The other half of a hairpin. */
static enum nat_verdict turn(struct nat_core *core, struct nat_packet *packet, unsigned l2, uint32_t at)
{
    enum nat_verdict verdict = hand_off_turned(core, packet, at);
    return verdict == NAT_FORWARD ? inbound(core, packet, l2, true) : verdict;
}

/* `ip_header` and `l2` are constants where the caller knows them, and the compiler makes use of it. */
static inline __attribute__((always_inline)) enum nat_verdict
translate(struct nat_core *core, struct nat_packet *packet, unsigned l2, unsigned ip_header, uint32_t at,
          int direction, bool hairpinned, bool cut, bool explained)
{
    struct session *s = &core->sessions[at];
    if (explained)
        explain_remember_session(core, at);
    uint8_t *ip = packet->data + l2, *l4 = ip + ip_header;
    uint16_t neighbour = s->neighbour[direction];
    uint32_t bytes = get16(ip + 2);
    bool hairpin = neighbour == NONE16;

    /* the other half of a hairpin session comes from our own translation, never from the wire */
    if (direction == IN && s->neighbour[OUT] == NONE16 && !hairpinned)
        return NAT_DROP_ADDRESS;
    if (ip[8] <= 1)
        return hairpinned ? NAT_DROP_TTL
                          : icmp_error(core, packet, l2, ICMP_TIME_EXCEEDED, 0, 0, NAT_DROP_TTL);
    if (!hairpin && !cut) {
        uint16_t mtu = core->config.ports[core->neighbours[neighbour].port].mtu;
        if (bytes > mtu)
            return translate_too_big(core, packet, l2, at, direction, hairpinned, mtu);
    }

    if (s->protocol == PROTO_TCP) {
        uint8_t state = tcp_next[s->tcp_state][direction][tcp_kind(l4[13])];
        if (state != s->tcp_state)
            tcp_advance(core, at, state, direction);
    }
    if (s->last_ms != core->now_ms) {
        s->last_ms = core->now_ms;
        if (direction == OUT)
            follow_sender(core, at, packet);
        neighbour = s->neighbour[direction];
    }
    if (++s->packets[direction] == 0)
        core->cold[at].packets_high[direction]++;
    s->bytes[direction] += bytes;

    uint32_t l3 = direction == OUT ? s->l3_delta : (uint16_t)~s->l3_delta;
    uint32_t l4_delta = direction == OUT ? s->l4_delta : (uint16_t)~s->l4_delta;
    uint16_t before, after;
    if (direction == OUT) {
        before = (uint16_t)s->ports[OUT];
        after = (uint16_t)(s->ports[IN] >> 16);
        put_raw32(ip + 12, high32(s->addrs[IN]));
    } else {
        before = (uint16_t)(s->ports[IN] >> 16);
        after = (uint16_t)s->ports[OUT];
        put_raw32(ip + 16, low32(s->addrs[OUT]));
    }
    unsigned field = direction == OUT ? 0 : 2;
    if (s->protocol == PROTO_TCP) {
        put_raw16(l4 + field, after);
        patch_check(l4 + 16, l4_delta);
    } else if (s->protocol == PROTO_UDP) {
        put_raw16(l4 + field, after);
        patch_udp_check(l4 + 6, l4_delta);
    } else {
        put_raw16(l4 + 4, after);
        patch_check(l4 + 2, delta16(before, after));
    }

    if (hairpin) {
        patch_check(ip + 10, l3);
        core->stats.hairpinned++;
        return s->flags & NAT_SESSION_PENDING ? hold_for_session(core, packet, at, direction)
                                              : turn(core, packet, l2, at);
    }
    ip[8]--;
    patch_check(ip + 10, l3 + TTL_DELTA);
    if (s->flags & NAT_SESSION_PENDING)
        return hold_for_session(core, packet, at, direction);
    if (explained)
        explain_next_hop(core, neighbour);
    return cut ? neighbour_send_any(core, packet, neighbour) : neighbour_send(core, packet, l2, neighbour);
}

static enum nat_verdict translate_too_big(struct nat_core *core, struct nat_packet *packet, unsigned l2,
                                          uint32_t at, int direction, bool hairpinned, uint16_t mtu)
{
    const uint8_t *ip = packet->data + l2;
    NOTE(core, MTU, .value = get16(ip + 2), .limit = mtu, .flag = (get16(ip + 6) & IP_DF) != 0);
    if (!(get16(ip + 6) & IP_DF))
        return translate(core, packet, l2, (ip[0] & 15u) * 4, at, direction, hairpinned, true, core->explain);
    return hairpinned ? NAT_DROP_TOO_BIG
                      : icmp_error(core, packet, l2, ICMP_UNREACHABLE, 4, mtu, NAT_DROP_TOO_BIG);
}

enum nat_verdict send_committed(struct nat_core *core, struct nat_packet *packet, uint32_t session,
                                int direction)
{
    uint16_t neighbour = core->sessions[session].neighbour[direction];
    return neighbour == NONE16 ? turn(core, packet, link_bytes(packet->data), session)
                               : neighbour_send_any(core, packet, neighbour);
}

enum nat_verdict session_packet(struct nat_core *core, struct nat_packet *packet, unsigned l2, uint32_t at,
                                int direction, bool hairpinned)
{
    const uint8_t *ip = packet->data + l2;
    explain_note_session(core, NAT_STEP_SESSION, at);
    struct datagram_key datagram = datagram_key(packet, ip, hairpinned);
    bool first = is_fragment(ip);
    enum nat_verdict verdict =
        translate(core, packet, l2, (ip[0] & 15u) * 4, at, direction, hairpinned, false, core->explain);
    if (first && verdict <= NAT_HELD && verdict != NAT_REPLY)
        fragment_first(core, &datagram, at, direction, false);
    return verdict;
}

/* --- bursts ------------------------------------------------------------------------------------------- */

#define NO_CANDIDATE NONE32

/* One batch on its way. Arrays, because the hashing takes them sixteen at a time. */
struct batch {
    uint64_t addrs[NAT_BURST];
    uint32_t ports[NAT_BURST];
    uint8_t protocols[NAT_BURST];
    uint32_t hashes[NAT_BURST];
    uint32_t session[NAT_BURST]; /* candidate; NO_CANDIDATE: goes alone */
    const uint32_t
        *user[NAT_BURST]; /* of those from outside without a candidate: who has the port, or NULL */
    struct nat_packet *packets;
    unsigned n;
    uint64_t opened; /* sessions, when candidates were looked for */
    uint32_t common; /* bit per packet: of the common shape */
    uint32_t new;    /* bit per packet: of those, from inside, and no session has its signature */
    uint32_t inside; /* bit per packet: from inside */
    uint32_t tagged; /* bit per packet */
};

/* The common shape. What it does not look at (addresses) the session's existence vouches for. */
static inline __attribute__((always_inline)) bool is_common(const struct nat_port_config *port,
                                                            const struct nat_packet *packet, unsigned l2)
{
    const uint8_t *data = packet->data, *ip = data + l2;
    if (packet->segment < l2 + IP_BYTES + UDP_BYTES || raw32(data) != raw32(port->mac) ||
        raw16(data + 4) != raw16(port->mac + 4) || data[6] & 1 || raw16(ip - 2) != net16(ETHERTYPE_IPV4) ||
        ip[0] != 0x45)
        return false;
    uint32_t total = get16(ip + 2), bytes = total - IP_BYTES;
    if (total < IP_BYTES + UDP_BYTES || total > packet->length - l2 || get16(ip + 6) & (IP_MF | IP_OFFSET) ||
        !sums_right(ip, IP_BYTES))
        return false;
    const uint8_t *l4 = ip + IP_BYTES;
    if (ip[9] == PROTO_UDP)
        return get16(l4 + 4) >= UDP_BYTES && get16(l4 + 4) <= bytes;
    if (ip[9] != PROTO_TCP || packet->segment < l2 + IP_BYTES + TCP_BYTES || bytes < TCP_BYTES)
        return false;
    unsigned offset = (l4[12] >> 4) * 4u;
    return offset >= TCP_BYTES && offset <= bytes;
}

static inline __attribute__((always_inline)) void batch_add(struct batch *batch, unsigned i,
                                                            const struct nat_port_config *port, unsigned l2)
{
    const struct nat_packet *packet = &batch->packets[i];
    if (!is_common(port, packet, l2))
        return;
    const uint8_t *ip = packet->data + l2;
    batch->common |= 1u << i;
    batch->inside |= (uint32_t)(port->side == NAT_INTERNAL) << i;
    batch->addrs[i] = raw64(ip + 12);
    batch->ports[i] = raw32(ip + IP_BYTES);
    batch->protocols[i] = ip[9];
}

/* Apart, as all that knows of tags: the way of untagged packets has one comparison for them. */
static __attribute__((noinline)) void batch_add_tagged(struct batch *batch, unsigned i,
                                                       const struct nat_port_config *port)
{
    if (!has_tag(&batch->packets[i], port->vlan))
        return;
    batch->tagged |= 1u << i;
    batch_add(batch, i, port, ETH_BYTES + VLAN_BYTES);
}

/* The first line of the index is on its way. */
static void batch_hash(struct nat_core *core, struct batch *batch)
{
    core->hasher.many(&core->hasher, batch->addrs, batch->ports, batch->protocols, batch->hashes, batch->n);
    for (unsigned i = 0; i < batch->n; i++)
        if (batch->common >> i & 1)
            __builtin_prefetch(&core->flows.buckets[flow_table_first(&core->flows, batch->hashes[i])]);
}

/* Keys and hashes. */
static void batch_parse(struct nat_core *core, struct batch *batch, struct nat_packet *packets, unsigned n)
{
    batch->packets = packets;
    batch->n = n;
    batch->common = batch->new = batch->inside = batch->tagged = 0;
    for (unsigned i = 0; i < n; i++) {
        const struct nat_packet *packet = &packets[i];
        core->stats.rx_packets[packet->port]++;
        core->stats.rx_bytes[packet->port] += packet->length;
        const struct nat_port_config *port = &core->config.ports[packet->port];
        if (port->vlan)
            batch_add_tagged(batch, i, port);
        else
            batch_add(batch, i, port, ETH_BYTES);
    }
    if (batch->common)
        batch_hash(core, batch);
}

static inline uint32_t bucket_candidate(const struct flow_bucket *bucket, uint32_t hash)
{
    unsigned mask = flow_bucket_match(bucket, hash);
    uint32_t value = mask ? bucket->value[__builtin_ctz(mask)] : FLOW_TABLE_NONE;
    return value == FLOW_TABLE_NONE ? NO_CANDIDATE : (value - 1) >> 1;
}

/* A candidate session for each, and its line is on its way. */
static void batch_probe(struct nat_core *core, struct batch *batch)
{
    uint32_t second = 0;
    batch->opened = core->stats.sessions_opened;
    for (unsigned i = 0; i < batch->n; i++) {
        batch->session[i] = NO_CANDIDATE;
        if (!(batch->common >> i & 1))
            continue;
        uint32_t hash = batch->hashes[i], bucket = flow_table_first(&core->flows, hash);
        batch->session[i] = bucket_candidate(&core->flows.buckets[bucket], hash);
        if (batch->session[i] != NO_CANDIDATE) {
            __builtin_prefetch(&core->sessions[batch->session[i]], 1);
        } else {
            second |= 1u << i;
            __builtin_prefetch(&core->flows.buckets[flow_table_other(&core->flows, hash, bucket)]);
        }
    }
    for (; second; second &= second - 1) {
        unsigned i = (unsigned)__builtin_ctz(second);
        uint32_t hash = batch->hashes[i];
        uint32_t bucket = flow_table_other(&core->flows, hash, flow_table_first(&core->flows, hash));
        batch->session[i] = bucket_candidate(&core->flows.buckets[bucket], hash);
        if (batch->session[i] != NO_CANDIDATE) {
            __builtin_prefetch(&core->sessions[batch->session[i]], 1);
        } else if (!(batch->inside >> i & 1)) {
            batch->user[i] = pool_user_of(&core->pool, net32(high32(batch->addrs[i])), batch->protocols[i],
                                          net16((uint16_t)(batch->ports[i] >> 16)));
            __builtin_prefetch(batch->user[i]);
        } else {
            batch->new |= 1u << i;
            session_expect(core, batch->protocols[i], net32(low32(batch->addrs[i])),
                           net16((uint16_t)batch->ports[i]));
        }
    }
}

static __attribute__((noinline)) enum nat_verdict
translate_tagged(struct nat_core *core, struct nat_packet *packet, uint32_t at, int direction)
{
    if (direction == OUT)
        return translate(core, packet, ETH_BYTES + VLAN_BYTES, IP_BYTES, at, OUT, false, false, false);
    return translate(core, packet, ETH_BYTES + VLAN_BYTES, IP_BYTES, at, IN, false, false, false);
}

/* From outside, and no session has its signature: what packet_alone would come to, when nothing is to be said
 * of its source, its destination is the pool's, and only who was asked may answer. */
static __attribute__((noinline)) enum nat_verdict unasked(struct nat_core *core, struct batch *batch,
                                                          unsigned i)
{
    const uint32_t *user = batch->user[i];
    if (!user || !is_plain(core, net32(low32(batch->addrs[i]))) ||
        core->config.filtering != NAT_FILTER_ADDRESS_AND_PORT || core->stats.sessions_opened != batch->opened)
        return packet_alone(core, &batch->packets[i]);
    return *user == POOL_FREE || *user & POOL_RESTING ? NAT_DROP_NO_MAPPING : NAT_DROP_FILTERED;
}

static inline __attribute__((always_inline)) enum nat_verdict
batch_one(struct nat_core *core, struct batch *batch, unsigned i, bool tags)
{
    struct nat_packet *packet = &batch->packets[i];
    uint32_t at = batch->session[i];
    if (at == NO_CANDIDATE)
        return batch->common >> i & 1 && !(batch->inside >> i & 1) ? unasked(core, batch, i)
                                                                   : packet_alone(core, packet);
    const struct session *s = &core->sessions[at];
    int direction = batch->inside >> i & 1 ? OUT : IN;
    /* equal signatures are rare and different keys behind them rarer; then the long way finds the right one
     */
    if (s->addrs[direction] != batch->addrs[i] || s->ports[direction] != batch->ports[i] ||
        s->protocol != batch->protocols[i])
        return packet_alone(core, packet);
    if (tags && batch->tagged >> i & 1)
        return translate_tagged(core, packet, at, direction);
    if (direction == OUT)
        return translate(core, packet, ETH_BYTES, IP_BYTES, at, OUT, false, false, false);
    return translate(core, packet, ETH_BYTES, IP_BYTES, at, IN, false, false, false);
}

static inline __attribute__((always_inline)) void batch_each(struct nat_core *core, struct batch *batch,
                                                             bool tags)
{
    for (unsigned i = 0; i < batch->n; i++) {
        enum nat_verdict verdict = batch_one(core, batch, i, tags);
        count_verdict(core, &batch->packets[i], verdict);
    }
}

static __attribute__((noinline)) void batch_finish_tagged(struct nat_core *core, struct batch *batch)
{
    batch_each(core, batch, true);
}

/* --- new sessions of a batch -------------------------------------------------------------------------- */

static bool has_begun(const struct batch *batch, uint32_t begun, uint32_t hash)
{
    for (; begun; begun &= begun - 1)
        if (batch->hashes[__builtin_ctz(begun)] == hash)
            return true;
    return false;
}

#define ROOM_AHEAD                                                                                           \
    6u /* packets before it is needed, it is known whether an entry's first bucket has room                  \
        */

/* What was begun of a batch. */
struct begun {
    struct opening of[NAT_BURST];
    uint32_t bits;
    uint64_t seen[4]; /* of their hashes, a byte each */
};

static bool may_open(const struct nat_core *core, const struct batch *batch, unsigned i)
{
    const bool is_outside = batch->common >> i & 1 && !(batch->inside >> i & 1);
    return batch->session[i] == NO_CANDIDATE &&
           !(is_outside && core->config.filtering == NAT_FILTER_ADDRESS_AND_PORT);
}

/* Begins new sessions from packet `from` on, as long as they are of the common shape, nobody would refuse
 * them for what they are, and their next hop is there. Returns the first packet that goes alone and might
 * open a session, too: what it takes is not to be taken before it. */
static unsigned batch_begin(struct nat_core *core, struct batch *batch, unsigned from, struct begun *begun)
{
    unsigned i = from;
    for (; i < batch->n; i++) {
        if (!(batch->new >> i & 1)) {
            if (may_open(core, batch, i))
                break;
            continue;
        }
        const unsigned byte = batch->hashes[i] & 0xff;
        const unsigned l2 = batch->tagged >> i & 1 ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
        /* the second packet of a session that is begun goes alone: it finds that */
        if ((begun->seen[byte / 64] >> byte % 64 & 1 && has_begun(batch, begun->bits, batch->hashes[i])) ||
            !outbound_begin(core, &batch->packets[i], l2, batch->hashes[i], &begun->of[i]))
            break;
        begun->seen[byte / 64] |= 1ull << byte % 64;
        begun->bits |= 1u << i;
    }
    return i;
}

static enum nat_verdict batch_open(struct nat_core *core, struct batch *batch, unsigned i,
                                   struct opening *opening)
{
    if (opening->verdict != NAT_FORWARD)
        return opening->verdict;
    enum nat_verdict verdict = session_finish(core, opening);
    if (verdict != NAT_FORWARD)
        return verdict;
    const unsigned l2 = batch->tagged >> i & 1 ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
    return translate(core, &batch->packets[i], l2, IP_BYTES, opening->at, OUT, false, false, false);
}

static __attribute__((noinline)) void batch_finish_new(struct nat_core *core, struct batch *batch)
{
    struct begun begun;
    begun.bits = 0;
    memset(begun.seen, 0, sizeof begun.seen);
    unsigned alone = batch_begin(core, batch, 0, &begun);
    for (unsigned i = 0; i < batch->n; i++) {
        const unsigned later = i + ROOM_AHEAD;
        if (later < batch->n && begun.bits >> later & 1)
            flow_table_expect_room(&core->flows, begun.of[later].hashes[IN]);
        const uint64_t opened = core->stats.sessions_opened;
        enum nat_verdict verdict =
            begun.bits >> i & 1 ? batch_open(core, batch, i, &begun.of[i]) : batch_one(core, batch, i, true);
        count_verdict(core, &batch->packets[i], verdict);
        if (i != alone)
            continue;
        if (opened != core->stats.sessions_opened)
            batch->new = 0; /* what it has opened may be the session of another one */
        alone = batch_begin(core, batch, i + 1, &begun);
    }
}

static __attribute__((noinline)) void batch_finish(struct nat_core *core, struct batch *batch)
{
    if (batch->new)
        batch_finish_new(core, batch);
    else if (batch->tagged)
        batch_finish_tagged(core, batch);
    else
        batch_each(core, batch, false);
}

void nat_burst(struct nat_core *core, struct nat_packet *packets, unsigned n, uint64_t now)
{
    if (!n)
        return;
    if (core->config.role && standby_follow(core, now)) {
        standby_burst(core, packets, n, false);
        return;
    }
    core_time(core, now);
    if (core->tracing) {
        trace_burst(core, packets, n);
        return;
    }
    struct batch batches[2];
    struct batch *current = &batches[0], *next = &batches[1];
    unsigned at = n < NAT_BURST ? n : NAT_BURST;
    batch_parse(core, current, packets, at);
    batch_probe(core, current);
    while (at < n) {
        unsigned size = n - at < NAT_BURST ? n - at : NAT_BURST;
        batch_parse(core, next, packets + at, size);
        batch_finish(core, current);
        batch_probe(core, next);
        struct batch *swap = current;
        current = next;
        next = swap;
        at += size;
    }
    batch_finish(core, current);
}
