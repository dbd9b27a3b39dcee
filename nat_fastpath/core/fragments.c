/* SPDX-License-Identifier: Apache-2.0
 *
 * IPv4 fragments (RFC 4787, REQ-14). Only the first one of a datagram says by which session it goes; the
 * store remembers that for the others, and keeps those that come before it, in order. Nothing is put
 * together: what came in fragments leaves in them. And the other way round: a packet that is too long for its
 * next link is cut (RFC 791, 3.2), by whoever carries it and with the headers made here.
 *
 * Anybody can send fragments that belong to nothing. So the store gives up what is oldest, those that wait
 * can never evict those that are known, and they take a quarter of the room for held packets at most.
 */
#include "core.h"
#include "slices.h"

#define KNOWN_MS 10000u       /* after the last fragment */
#define WAIT_MS 2000u         /* for the first fragment */
#define HELD_PER_DATAGRAM 48u /* 64 KB in fragments of 1500 bytes are 45 */
#define STEP 64u
#define COPIED_OPTION 0x80u

static uint32_t most_held(const struct nat_config *config)
{
    return (config->max_held + 3) / 4;
}

/* Each that waits holds a packet, so the first term is for those that are known. */
uint32_t datagrams_capacity(const struct nat_config *config)
{
    uint32_t n = config->max_sessions / 16;
    return (n < 1024 ? 1024 : n > 65536 ? 65536 : n) + most_held(config);
}

/* --- the store --------------------------------------------------------------------------------------- */

struct datagram_key datagram_key(const struct nat_packet *packet, const uint8_t *ip, bool hairpinned)
{
    return (struct datagram_key){raw32(ip + 12), raw32(ip + 16), raw16(ip + 4), ip[9],
                                 (uint8_t)(packet->port | (hairpinned ? DATAGRAM_TURNED : 0))};
}

static uint32_t datagram_hash(const struct datagram_key *key)
{
    return flow_hash(key->source | (uint64_t)key->destination << 32, key->id | (uint32_t)key->from << 16,
                     key->protocol);
}

static uint32_t datagram_find(const struct nat_core *core, const struct datagram_key *key)
{
    struct flow_cursor cursor = flow_cursor(&core->datagram_index, datagram_hash(key));
    uint32_t value;
    while ((value = flow_cursor_next(&cursor)) != FLOW_TABLE_NONE) {
        const struct datagram *d = &core->datagrams[value - 1];
        if (d->source == key->source && d->destination == key->destination && d->id == key->id &&
            d->protocol == key->protocol && d->from == key->from)
            return value - 1;
    }
    return NONE32;
}

static void list_append(struct nat_core *core, uint32_t at, enum datagram_list list)
{
    struct datagram *d = &core->datagrams[at];
    d->list = (uint8_t)list;
    d->seen_ms = core->now_ms;
    d->before = core->datagram_list[list].last;
    d->after = NONE32;
    *(d->before == NONE32 ? &core->datagram_list[list].first : &core->datagrams[d->before].after) = at;
    core->datagram_list[list].last = at;
}

static void list_remove(struct nat_core *core, uint32_t at)
{
    const struct datagram *d = &core->datagrams[at];
    *(d->before == NONE32 ? &core->datagram_list[d->list].first : &core->datagrams[d->before].after) =
        d->after;
    *(d->after == NONE32 ? &core->datagram_list[d->list].last : &core->datagrams[d->after].before) =
        d->before;
}

static struct held take_held(struct nat_core *core, struct datagram *d)
{
    d->held--;
    core->fragments_held--;
    return unhold(core, &d->held_first, &d->held_last);
}

static void datagram_forget(struct nat_core *core, uint32_t at)
{
    struct datagram *d = &core->datagrams[at];
    while (d->held) {
        struct held held = take_held(core, d);
        finish(core, &held.packet, NAT_DROP_FRAGMENT);
    }
    struct datagram_key key = {d->source, d->destination, d->id, d->protocol, d->from};
    flow_table_remove(&core->datagram_index, datagram_hash(&key), at + 1);
    list_remove(core, at);
    SLAB_GIVE(&core->datagram_slab, core->datagrams, after, at);
}

/* In no list yet. A full store gives up the oldest: who is honest sends a datagram's fragments together. */
static uint32_t datagram_add(struct nat_core *core, const struct datagram_key *key)
{
    for (unsigned list = 0; slab_full(&core->datagram_slab); list++)
        if (core->datagram_list[list].first != NONE32)
            datagram_forget(core, core->datagram_list[list].first);
    uint32_t at = SLAB_TAKE(&core->datagram_slab, core->datagrams, after);
    if (!flow_table_insert(&core->datagram_index, datagram_hash(key), at + 1)) {
        SLAB_GIVE(&core->datagram_slab, core->datagrams, after, at);
        return NONE32;
    }
    core->datagrams[at] = (struct datagram){
        .source = key->source,
        .destination = key->destination,
        .id = key->id,
        .protocol = key->protocol,
        .from = key->from,
        .session = NONE32,
        .held_first = NONE16,
        .held_last = NONE16,
    };
    return at;
}

/* --- fragments on their way -------------------------------------------------------------------------- */

enum nat_verdict fragment_check(const uint8_t *ip)
{
    uint32_t field = get16(ip + 6), start = (field & IP_OFFSET) * 8;
    uint32_t header = (ip[0] & 15u) * 4u, bytes = get16(ip + 2) - header;
    bool overlaps = ip[9] == PROTO_TCP && start && start < TCP_BYTES; /* RFC 1858, 3.2.2; RFC 3128 */
    bool lies = !bytes || header + start + bytes > UINT16_MAX || (field & IP_MF && bytes % 8);
    return overlaps || lies ? NAT_DROP_FRAGMENT_SHAPE : NAT_FORWARD;
}

/* Its first fragment is here. NULL: nothing is remembered, and the others will wait for one in vain. */
static struct datagram *datagram_begin(struct nat_core *core, const struct datagram_key *key)
{
    if (core->explain)
        return NULL;
    uint32_t at = datagram_find(core, key);
    if (at != NONE32)
        list_remove(core, at);
    else if ((at = datagram_add(core, key)) == NONE32)
        return NULL;
    struct datagram *d = &core->datagrams[at];
    list_append(core, at, d->held ? DATAGRAMS_DUE : DATAGRAMS_KNOWN);
    return d;
}

void fragment_first(struct nat_core *core, const struct datagram_key *key, uint32_t session, int direction,
                    bool is_error)
{
    struct datagram *d = datagram_begin(core, key);
    if (!d)
        return;
    d->session = session;
    d->session_id = core->cold[session].id;
    d->direction = (uint8_t)direction;
    d->is_error = is_error;
}

enum nat_verdict fragment_direct(struct nat_core *core, struct nat_packet *packet, const uint8_t *ip)
{
    if (is_later_fragment(ip) || packet->handoff & NAT_HANDOFF_DIRECTED)
        return NAT_FORWARD;
    uint32_t bytes = (uint32_t)(packet->data + packet->segment - ip);
    unsigned slice =
        slice_of_datagram(ip, bytes, core->config.ports[packet->port].side, core->config.n_slices);
    if (slice == NAT_SLICE_ANY || has_slice(core, slice))
        return NAT_FORWARD;
    struct datagram_key key = datagram_key(packet, ip, false);
    struct datagram *d = datagram_begin(core, &key);
    if (d) {
        d->session = NONE32;
        d->slice = (uint8_t)slice;
    }
    return hand_off(core, packet, slice, NAT_HANDOFF_DIRECTED);
}

/* By the session, but for the transport header, which is not there. */
static enum nat_verdict follow(struct nat_core *core, struct nat_packet *packet, unsigned l2, uint32_t at)
{
    const struct datagram *d = &core->datagrams[at];
    uint32_t session = d->session;
    int direction = d->direction;
    if (session == NONE32)
        return hand_off(core, packet, d->slice, NAT_HANDOFF_DIRECTED);
    struct session *s = &core->sessions[session];
    if (!s->protocol || core->cold[session].id != d->session_id)
        return NAT_DROP_FRAGMENT;
    uint8_t *ip = packet->data + l2;
    uint32_t bytes = get16(ip + 2);
    uint16_t neighbour = s->neighbour[direction];
    if (ip[8] <= 1)
        return NAT_DROP_TTL;
    if (neighbour != NONE16 && get16(ip + 6) & IP_DF &&
        bytes > core->config.ports[core->neighbours[neighbour].port].mtu)
        return NAT_DROP_TOO_BIG;

    explain_remember_session(core, session);
    if (!d->is_error) { /* that neither renews nor counts (RFC 5508, REQ-6) */
        s->last_ms = core->now_ms;
        if (++s->packets[direction] == 0)
            core->cold[session].packets_high[direction]++;
        s->bytes[direction] += bytes;
    }
    uint8_t *field = ip + (direction == OUT ? 12 : 16);
    uint32_t address = direction == OUT ? high32(s->addrs[IN]) : low32(s->addrs[OUT]);
    uint32_t delta = delta32(raw32(field), address);
    put_raw32(field, address);
    if (neighbour == NONE16) {
        patch_check(ip + 10, delta);
        core->stats.hairpinned++;
        if (s->flags & NAT_SESSION_PENDING)
            return hold_for_session(core, packet, session, direction);
        enum nat_verdict verdict = hand_off_turned(core, packet, session);
        return verdict == NAT_FORWARD ? fragment_later(core, packet, l2, IN, true) : verdict;
    }
    ip[8]--;
    patch_check(ip + 10, delta + TTL_DELTA);
    if (s->flags & NAT_SESSION_PENDING)
        return hold_for_session(core, packet, session, direction);
    explain_next_hop(core, neighbour);
    return neighbour_send_any(core, packet, neighbour);
}

static enum nat_verdict wait_for_first(struct nat_core *core, struct nat_packet *packet, uint32_t at)
{
    struct datagram *d = &core->datagrams[at];
    if (d->held == HELD_PER_DATAGRAM || core->fragments_held >= most_held(&core->config) ||
        !hold(core, packet, &d->held_first, &d->held_last, NONE32, OUT)) {
        if (!d->held)
            datagram_forget(core, at);
        return NAT_DROP_FRAGMENT;
    }
    d->held++;
    core->fragments_held++;
    return NAT_HELD;
}

/* The same decision for a packet that is only explained. */
static enum nat_verdict would_wait(const struct nat_core *core, uint32_t at, uint32_t oldest)
{
    uint32_t held = core->fragments_held;
    if (held >= most_held(&core->config) && oldest != NONE32 && oldest != at)
        held -= core->datagrams[oldest].held;
    bool room = at == NONE32 || core->datagrams[at].held < HELD_PER_DATAGRAM;
    return room && held < most_held(&core->config) && !slab_full(&core->held_slab) ? NAT_HELD
                                                                                   : NAT_DROP_FRAGMENT;
}

enum nat_verdict fragment_later(struct nat_core *core, struct nat_packet *packet, unsigned l2, int direction,
                                bool hairpinned)
{
    const uint8_t *ip = packet->data + l2;
    struct datagram_key key = datagram_key(packet, ip, hairpinned);
    uint32_t at = datagram_find(core, &key);
    bool known = at != NONE32 && core->datagrams[at].list == DATAGRAMS_KNOWN;
    NOTE(core, FRAGMENT, .flag = known);
    if (known) {
        if (!core->explain) {
            list_remove(core, at);
            list_append(core, at, DATAGRAMS_KNOWN);
        }
        return follow(core, packet, l2, at);
    }
    /* what its first fragment would not get past either does not wait for it */
    if (direction == IN && pool_block_of(&core->pool, get32(ip + 16)) == POOL_NONE)
        return NAT_DROP_NOT_POOL;
    if (direction == IN && !hairpinned && is_routed_to(core, get32(ip + 12), NAT_INTERNAL))
        return NAT_DROP_ADDRESS;
    uint32_t oldest = core->datagram_list[DATAGRAMS_WAITING].first;
    if (core->explain)
        return would_wait(core, at, oldest);
    if (core->fragments_held >= most_held(&core->config) && oldest != NONE32 && oldest != at)
        datagram_forget(core, oldest);
    if (at == NONE32) {
        if ((at = datagram_add(core, &key)) == NONE32)
            return NAT_DROP_FRAGMENT;
        list_append(core, at, DATAGRAMS_WAITING);
    }
    return wait_for_first(core, packet, at);
}

/* Those that came before their first fragment leave after it. */
static unsigned release(struct nat_core *core, uint32_t at)
{
    struct datagram *d = &core->datagrams[at];
    unsigned n = 0;
    list_remove(core, at);
    list_append(core, at, DATAGRAMS_KNOWN);
    for (; d->held; n++) {
        struct held held = take_held(core, d);
        finish(core, &held.packet, follow(core, &held.packet, link_bytes(held.packet.data), at));
    }
    return n;
}

static bool is_old(const struct nat_core *core, enum datagram_list list, uint32_t after_ms)
{
    uint32_t at = core->datagram_list[list].first;
    return at != NONE32 && core->now_ms - core->datagrams[at].seen_ms >= after_ms;
}

bool fragments_step(struct nat_core *core)
{
    unsigned did = 0;
    while (core->datagram_list[DATAGRAMS_DUE].first != NONE32 && did < STEP)
        did += 1 + release(core, core->datagram_list[DATAGRAMS_DUE].first);
    for (; is_old(core, DATAGRAMS_WAITING, WAIT_MS) && did < STEP; did++)
        datagram_forget(core, core->datagram_list[DATAGRAMS_WAITING].first);
    for (; is_old(core, DATAGRAMS_KNOWN, KNOWN_MS) && did < STEP; did++)
        datagram_forget(core, core->datagram_list[DATAGRAMS_KNOWN].first);
    return did;
}

void fragments_flush(struct nat_core *core)
{
    for (unsigned list = 0; list < DATAGRAM_LISTS; list++)
        while (core->datagram_list[list].first != NONE32)
            datagram_forget(core, core->datagram_list[list].first);
}

/* --- cutting ----------------------------------------------------------------------------------------- */

enum nat_verdict neighbour_send_any(struct nat_core *core, struct nat_packet *packet, uint16_t neighbour)
{
    enum nat_verdict verdict = neighbour_send(core, packet, link_bytes(packet->data), neighbour);
    packet->mtu = core->config.ports[packet->port].mtu;
    return verdict == NAT_FORWARD && get16(packet->data + link_bytes(packet->data) + 2) > packet->mtu
               ? NAT_FRAGMENT
               : verdict;
}

/* The header of all fragments but the first has only those options whose copied bit is set. */
static uint32_t later_header(uint8_t *to, const uint8_t *ip)
{
    uint32_t n = IP_BYTES, header = (ip[0] & 15u) * 4u;
    memcpy(to, ip, IP_BYTES);
    for (uint32_t at = IP_BYTES; at < header && ip[at];) {
        uint32_t size = ip[at] == 1 ? 1 : at + 1 < header ? ip[at + 1] : 0;
        if (!size || (ip[at] != 1 && size < 2) || size > header - at)
            break; /* broken: neither the others can be told apart */
        if (ip[at] & COPIED_OPTION) {
            memcpy(to + n, ip + at, size);
            n += size;
        }
        at += size;
    }
    while (n % 4)
        to[n++] = 0;
    to[0] = (uint8_t)(0x40 | n / 4);
    return n;
}

bool nat_cut(const uint8_t *frame, uint16_t mtu, struct nat_piece *piece)
{
    uint32_t l2 = link_bytes(frame);
    const uint8_t *ip = frame + l2;
    uint32_t header = (ip[0] & 15u) * 4u, start = l2 + header, end = l2 + get16(ip + 2);
    piece->at = piece->at ? piece->at + piece->bytes : start;
    if (piece->at >= end)
        return false;
    uint8_t *to = piece->header + l2;
    memcpy(piece->header, frame, l2);
    if (piece->at == start)
        memcpy(to, ip, header);
    else
        header = later_header(to, ip);
    uint16_t field = (uint16_t)(get16(ip + 6) + (piece->at - start) / 8);
    piece->bytes = end - piece->at;
    if (header + piece->bytes > mtu) {
        piece->bytes = (mtu - header) & ~7u;
        field |= IP_MF;
    }
    piece->header_bytes = l2 + header;
    put16(to + 2, (uint16_t)(header + piece->bytes));
    put16(to + 6, field);
    put16(to + 10, 0);
    put_raw16(to + 10, checksum(to, header));
    return true;
}

void count_pieces(struct nat_core *core, const struct nat_packet *packet)
{
    if (packet->verdict != NAT_FRAGMENT) {
        count_tx(core, packet);
        return;
    }
    struct nat_piece piece = {0};
    while (nat_cut(packet->data, packet->mtu, &piece)) {
        core->stats.tx_packets[packet->port]++;
        core->stats.tx_bytes[packet->port] += piece.header_bytes + piece.bytes;
    }
}
