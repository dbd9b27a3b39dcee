/* SPDX-License-Identifier: Apache-2.0
 *
 * Next hops (ARP, RFC 826) and the packets that wait for them: in the core, which waits for nobody else.
 */
#include "core.h"

#define ASK_MS 250u /* between two requests for an unknown MAC */
#define ASK_TRIES 4u
#define CONFIRM_MS 30000u /* a MAC this old is asked for again while it is in use */
#define PROBE_MS 1000u    /* between two requests for a known one */
#define PROBE_UNICAST 3u  /* the first of them go to the known MAC (RFC 1122, 2.3.2.1) */
#define PROBE_TRIES 6u
#define IDLE_MS 60000u /* an unused next hop is forgotten */
#define SWEEP_MS 20u
#define SWEEP_STEP 64u
#define HELD_PER_NEIGHBOUR 64u

enum { ARP_REQUEST = 1, ARP_REPLY = 2 };
static const uint8_t broadcast_mac[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
static const uint8_t no_mac[6];

static bool same_mac(const uint8_t *a, const uint8_t *b)
{
    return raw32(a) == raw32(b) && raw16(a + 4) == raw16(b + 4);
}

/* --- the table --------------------------------------------------------------------------------------- */

static uint32_t neighbour_hash(uint8_t port, uint32_t address, const uint8_t *mac)
{
    uint32_t word = address ? address : raw32(mac) ^ (uint32_t)raw16(mac + 4) << 16 ^ 0x5bd1e995u;
    return mix32(word + port * 0x9e3779b1u);
}

uint16_t neighbour_find(const struct nat_core *core, uint8_t port, uint32_t address, const uint8_t *mac)
{
    struct flow_cursor cursor = flow_cursor(&core->neighbour_index, neighbour_hash(port, address, mac));
    uint32_t value;
    while ((value = flow_cursor_next(&cursor)) != FLOW_TABLE_NONE) {
        const struct neighbour *n = &core->neighbours[value - 1];
        if (n->port == port && n->address == address && (address || same_mac(n->mac, mac)))
            return (uint16_t)(value - 1);
    }
    return NONE16;
}

static uint16_t neighbour_add(struct nat_core *core, uint8_t port, uint32_t address, const uint8_t *mac,
                              uint8_t state)
{
    uint32_t at = SLAB_TAKE(&core->neighbour_slab, core->neighbours, address);
    if (at == NONE32)
        return NONE16;
    if (!flow_table_insert(&core->neighbour_index, neighbour_hash(port, address, mac), at + 1)) {
        SLAB_GIVE(&core->neighbour_slab, core->neighbours, address, at);
        return NONE16;
    }
    struct neighbour *n = &core->neighbours[at];
    *n = (struct neighbour){
        .address = address,
        .port = port,
        .state = state,
        .confirmed_ms = core->now_ms,
        .used_ms = core->now_ms,
        .asked_ms = core->now_ms - ASK_MS,
        .fresh = 1,
        .held_first = NONE16,
        .held_last = NONE16,
    };
    memcpy(n->mac, mac, 6);
    explain_added(core, (uint16_t)at);
    return (uint16_t)at;
}

void neighbour_forget(struct nat_core *core, uint16_t at)
{
    struct neighbour *n = &core->neighbours[at];
    flow_table_remove(&core->neighbour_index, neighbour_hash(n->port, n->address, n->mac), at + 1u);
    n->state = NAT_NB_FREE;
    SLAB_GIVE(&core->neighbour_slab, core->neighbours, address, at);
}

uint16_t neighbour_at(struct nat_core *core, uint8_t port, uint32_t address)
{
    uint16_t at = neighbour_find(core, port, address, no_mac);
    return at != NONE16 ? at : neighbour_add(core, port, address, no_mac, NAT_NB_INCOMPLETE);
}

uint16_t neighbour_towards(struct nat_core *core, uint32_t address, enum nat_side side, enum nat_verdict *why)
{
    *why = NAT_DROP_NO_ROUTE;
    unsigned i = route_towards(core, &core->config, address, side);
    if (i == NAT_MAX_ROUTES)
        return NONE16;
    const struct nat_route_config *route = &core->config.routes[i];
    if (!route->connected)
        return core->gateway_neighbour[i];
    if (is_broadcast_of(route, address)) {
        *why = NAT_DROP_MULTICAST;
        return NONE16;
    }
    *why = NAT_DROP_TABLE_FULL;
    return neighbour_at(core, route->port, address);
}

static void neighbour_confirm(struct nat_core *core, uint16_t at, const uint8_t *mac);

static uint16_t neighbour_by_mac(struct nat_core *core, uint8_t port, const uint8_t *mac)
{
    uint16_t at = neighbour_find(core, port, 0, mac);
    return at != NONE16 ? at : neighbour_add(core, port, 0, mac, NAT_NB_REACHABLE);
}

uint16_t neighbour_behind(struct nat_core *core, uint8_t port, uint32_t source, const uint8_t *mac)
{
    uint16_t at = NONE16;
    if (is_on_link(core, port, source)) {
        at = neighbour_at(core, port, source);
    } else {
        for (unsigned i = 0; i < core->config.n_routes && at == NONE16; i++)
            if (core->config.routes[i].port == port && route_covers(&core->config.routes[i], source))
                at = core->gateway_neighbour[i];
    }
    if (at != NONE16) {
        struct neighbour *n = &core->neighbours[at];
        /* a router's packets may come from another MAC than the one that answers for its address */
        if ((n->state == NAT_NB_INCOMPLETE && !n->keep) ||
            (n->state != NAT_NB_STATIC && n->state != NAT_NB_INCOMPLETE && same_mac(n->mac, mac))) {
            neighbour_confirm(core, at, mac);
            return at;
        }
        if (n->state != NAT_NB_INCOMPLETE && same_mac(n->mac, mac))
            return at;
    }
    /* It came from another MAC than its address has: this session's answers go there, no one else's do. */
    return neighbour_by_mac(core, port, mac);
}

void neighbour_leave(struct nat_core *core, uint16_t at)
{
    struct neighbour *n = &core->neighbours[at];
    /* one that is known by its MAC alone serves nobody else */
    if (--n->sessions == 0 && !n->address && !n->held && !core->explain)
        neighbour_forget(core, at);
}

void neighbours_unneeded(struct nat_core *core, const uint16_t neighbour[2])
{
    for (int d = 0; d < 2; d++) {
        if (neighbour[d] == NONE16 || core->explain)
            continue;
        const struct neighbour *n = &core->neighbours[neighbour[d]];
        if (n->fresh && !n->sessions && !n->held && !n->keep && n->state != NAT_NB_FREE &&
            n->state != NAT_NB_STATIC)
            neighbour_forget(core, neighbour[d]);
    }
}

/* --- frames of our own ------------------------------------------------------------------------------- */

static void put_arp(uint8_t *arp, uint16_t operation, const uint8_t *sender_mac, uint32_t sender,
                    const uint8_t *target_mac, uint32_t target)
{
    put16(arp, 1);
    put16(arp + 2, ETHERTYPE_IPV4);
    arp[4] = 6;
    arp[5] = 4;
    put16(arp + 6, operation);
    memcpy(arp + 8, sender_mac, 6);
    put32(arp + 14, sender);
    memcpy(arp + 18, target_mac, 6);
    put32(arp + 24, target);
}

static bool put_request(struct nat_core *core, uint8_t port, const struct nat_port_config *config,
                        const uint8_t *to, uint32_t sender, uint32_t target)
{
    if (core->outbox_tail - core->outbox_head == NAT_OUTBOX || core->explain)
        return false;
    struct outbox_frame *frame = &core->outbox[core->outbox_tail++ % NAT_OUTBOX];
    memset(frame->bytes, 0, sizeof frame->bytes);
    unsigned l2 = put_link(frame->bytes, to, config, ETHERTYPE_ARP);
    put_arp(frame->bytes + l2, ARP_REQUEST, config->mac, sender, no_mac, target);
    frame->port = port;
    frame->length = (uint8_t)(46 + l2); /* the least that Ethernet carries, when the tag is taken away too */
    core->stats.arp_requests_sent++;
    return true;
}

static bool send_request(struct nat_core *core, uint8_t port, const uint8_t *to, uint32_t sender,
                         uint32_t target)
{
    return !core->standby.silent && put_request(core, port, &core->config.ports[port], to, sender, target);
}

unsigned nat_outbox(struct nat_core *core, uint8_t *bytes, uint8_t *port)
{
    if (core->outbox_head == core->outbox_tail)
        return 0;
    const struct outbox_frame *frame = &core->outbox[core->outbox_head++ % NAT_OUTBOX];
    memcpy(bytes, frame->bytes, frame->length);
    *port = frame->port;
    core->stats.tx_packets[frame->port]++;
    core->stats.tx_bytes[frame->port] += frame->length;
    return frame->length;
}

/* Each port's own address first: all have one MAC, so a switch needs no more; then those of the pool. */
static bool announce_step(struct nat_core *core)
{
    uint64_t n_ports = core->config.n_ports, n_pool = core->pool.view.n_addresses;
    uint64_t end = n_ports + n_ports * n_pool;
    bool did = core->announce_at < end;
    for (unsigned budget = SWEEP_STEP; core->announce_at < end && budget; budget--, core->announce_at++) {
        bool own = core->announce_at < n_ports;
        uint64_t at = own ? 0 : core->announce_at - n_ports;
        uint8_t port = (uint8_t)(own ? core->announce_at : at / n_pool);
        const struct nat_port_config *config = &core->config.ports[port];
        uint32_t address = own ? config->address : pool_address_at(&core->pool, (uint32_t)(at % n_pool));
        bool due = own ? address != 0
                       : config->side == NAT_EXTERNAL && address != config->address &&
                             is_on_link(core, port, address);
        if (due && !send_request(core, port, broadcast_mac, address, address))
            break;
    }
    return did;
}

void neighbour_announce(struct nat_core *core)
{
    for (uint8_t port = 0; port < core->config.n_ports; port++)
        if (core->config.ports[port].address)
            send_request(core, port, broadcast_mac, core->config.ports[port].address,
                         core->config.ports[port].address);
}

void neighbour_probe(struct nat_core *core)
{
    for (uint8_t port = 0; port < core->config.n_ports; port++) {
        const struct nat_port_config *config = &core->config.ports[port];
        struct nat_port_config another = *config;
        /* the shared MAC would be learned here by the switches */
        another.mac[0] |= 2;
        another.mac[3] ^= 0x80;
        another.mac[4] = (uint8_t)(another.mac[4] + core->config.instance);
        if (config->address)
            put_request(core, port, &another, broadcast_mac, 0, config->address);
    }
}

/* --- waiting ----------------------------------------------------------------------------------------- */

bool hold(struct nat_core *core, const struct nat_packet *packet, uint16_t *first, uint16_t *last,
          uint32_t session, int direction)
{
    if (core->explain)
        return !slab_full(&core->held_slab);
    uint32_t at = SLAB_TAKE(&core->held_slab, core->held, session);
    if (at == NONE32)
        return false;
    core->held[at] = (struct held){.packet = *packet,
                                   .since_ms = core->now_ms,
                                   .session = session,
                                   .direction = (uint8_t)direction,
                                   .next = NONE16};
    if (*first == NONE16)
        *first = (uint16_t)at;
    else
        core->held[*last].next = (uint16_t)at;
    *last = (uint16_t)at;
    return true;
}

/* Takes the first packet off a list. */
struct held unhold(struct nat_core *core, uint16_t *first, uint16_t *last)
{
    uint16_t at = *first;
    struct held held = core->held[at];
    *first = held.next;
    if (*first == NONE16)
        *last = NONE16;
    SLAB_GIVE(&core->held_slab, core->held, session, at);
    return held;
}

void finish(struct nat_core *core, struct nat_packet *packet, enum nat_verdict verdict)
{
    if (verdict == NAT_HELD)
        return; /* it went from one queue into another */
    packet->verdict = (uint8_t)verdict;
    core->stats.verdicts[verdict]++;
    trace_finished(core, packet);
    /* there is room: its own place was just given back */
    hold(core, packet, &core->done_first, &core->done_last, NONE32, OUT);
}

unsigned nat_take(struct nat_core *core, struct nat_packet *out, unsigned max)
{
    unsigned n = 0;
    while (n < max && core->done_first != NONE16 &&
           !standby_keeps(core, &core->held[core->done_first].packet)) {
        struct nat_packet *packet = &out[n++];
        *packet = unhold(core, &core->done_first, &core->done_last).packet;
        if (packet->verdict == NAT_FORWARD || packet->verdict == NAT_FRAGMENT)
            count_pieces(core, packet);
    }
    return n;
}

static __attribute__((noinline)) enum nat_verdict hold_for_neighbour(struct nat_core *core,
                                                                     struct nat_packet *packet, uint16_t at)
{
    struct neighbour *n = &core->neighbours[at];
    if (n->held == HELD_PER_NEIGHBOUR || !hold(core, packet, &n->held_first, &n->held_last, NONE32, OUT))
        return NAT_DROP_HOLD_LIMIT;
    if (!n->held++ && n->asked >= ASK_TRIES)
        n->asked = 0; /* what was asked in vain before this packet came is no reason to drop it */
    if (core->now_ms - n->asked_ms >= ASK_MS &&
        send_request(core, n->port, broadcast_mac, core->config.ports[n->port].address, n->address)) {
        n->asked_ms = core->now_ms;
        n->asked = 1;
    }
    return NAT_HELD;
}

enum nat_verdict hold_for_session(struct nat_core *core, struct nat_packet *packet, uint32_t session,
                                  int direction)
{
    struct session_cold *cold = &core->cold[session];
    NOTE(core, PENDING);
    return hold(core, packet, &cold->held_first, &cold->held_last, session, direction) ? NAT_HELD
                                                                                       : NAT_DROP_HOLD_LIMIT;
}

void hold_release(struct nat_core *core, uint32_t session, enum nat_verdict verdict)
{
    struct session_cold *cold = &core->cold[session];
    while (cold->held_first != NONE16) {
        struct held held = unhold(core, &cold->held_first, &cold->held_last);
        finish(core, &held.packet,
               verdict == NAT_FORWARD ? send_committed(core, &held.packet, session, held.direction)
                                      : verdict);
    }
}

static void neighbour_release(struct nat_core *core, uint16_t at, enum nat_verdict verdict)
{
    struct neighbour *n = &core->neighbours[at];
    n->held = 0;
    while (n->held_first != NONE16) {
        struct held held = unhold(core, &n->held_first, &n->held_last);
        finish(core, &held.packet,
               verdict == NAT_FORWARD ? neighbour_send_any(core, &held.packet, at) : verdict);
    }
}

bool hold_waits(const struct nat_core *core)
{
    return core->config.synchronous && core->held_slab.used; /* some perhaps for a next hop */
}

/* Sessions whose commit did not come in time. */
bool hold_step(struct nat_core *core)
{
    bool did = false;
    for (unsigned budget = SWEEP_STEP; budget && core->held_slab.used; budget--) {
        if (core->held_sweep >= core->held_slab.top) {
            core->held_sweep = 0;
            break;
        }
        const struct held *held = &core->held[core->held_sweep++];
        /* a free place has a link where the session stands: its list head tells the two apart */
        uint32_t session = held->session;
        if (session < core->session_slab.top && core->sessions[session].protocol &&
            core->cold[session].held_first == core->held_sweep - 1 &&
            (uint32_t)(core->now_ms - held->since_ms) >= core->config.hold_ms)
            did |= session_close(core, session, NAT_CLOSE_HOLD_TIMEOUT);
    }
    return did;
}

void nat_flush(struct nat_core *core)
{
    standby_give_up(core);
    fragments_flush(core);
    for (uint32_t at = 0; at < core->session_slab.top; at++)
        if (core->sessions[at].protocol)
            hold_release(core, at, NAT_DROP_SESSION_GONE);
    for (uint32_t at = 0; at < core->neighbour_slab.top; at++)
        if (core->neighbours[at].state != NAT_NB_FREE)
            neighbour_release(core, (uint16_t)at, NAT_DROP_SESSION_GONE);
}

/* --- sending and learning ---------------------------------------------------------------------------- */

static void neighbour_confirm(struct nat_core *core, uint16_t at, const uint8_t *mac)
{
    struct neighbour *n = &core->neighbours[at];
    explain_remember_neighbour(core, at);
    memcpy(n->mac, mac, 6);
    n->state = NAT_NB_REACHABLE;
    n->confirmed_ms = core->now_ms;
    n->asked = 0;
    if (n->held && !core->explain)
        neighbour_release(core, at, NAT_FORWARD);
}

static void mac_bytes(uint64_t mac, uint8_t *bytes)
{
    for (int i = 0; i < 6; i++)
        bytes[i] = (uint8_t)(mac >> (40 - 8 * i));
}

bool neighbour_learn(struct nat_core *core, const struct nat_neighbour_record *record)
{
    if (record->port >= core->config.n_ports || !record->address ||
        is_answered_address(core, record->port, record->address) ||
        !is_on_link(core, record->port, record->address))
        return false;
    uint16_t at = neighbour_at(core, record->port, record->address);
    if (at == NONE16)
        return false;
    struct neighbour *n = &core->neighbours[at];
    uint8_t mac[6];
    mac_bytes(record->mac, mac);
    if (!record->mac) {
        if (n->state == NAT_NB_INCOMPLETE && core->now_ms - n->asked_ms >= ASK_MS &&
            send_request(core, n->port, broadcast_mac, core->config.ports[n->port].address, n->address))
            n->asked_ms = core->now_ms;
        return false;
    }
    if (mac[0] & 1 || n->state == NAT_NB_STATIC ||
        (n->state != NAT_NB_INCOMPLETE && core->now_ms - n->confirmed_ms <= record->confirmed_ms))
        return false;
    bool news = n->state == NAT_NB_INCOMPLETE || !same_mac(n->mac, mac);
    neighbour_confirm(core, at, mac);
    n->confirmed_ms = core->now_ms - record->confirmed_ms;
    return news;
}

uint16_t neighbour_inside(struct nat_core *core, uint32_t address, uint64_t mac, enum nat_verdict *why)
{
    uint16_t at = neighbour_towards(core, address, NAT_INTERNAL, why);
    if (at == NONE16 || !mac || mac >> 40 & 1)
        return at;
    struct neighbour *n = &core->neighbours[at];
    uint8_t bytes[6];
    mac_bytes(mac, bytes);
    if (n->state == NAT_NB_INCOMPLETE) { /* it is confirmed once it is used */
        neighbour_confirm(core, at, bytes);
        n->confirmed_ms = core->now_ms - CONFIRM_MS;
        return at;
    }
    if (same_mac(n->mac, bytes))
        return at;
    uint16_t by_mac = neighbour_by_mac(core, n->port, bytes);
    return by_mac != NONE16 ? by_mac : at;
}

enum nat_verdict neighbour_send(struct nat_core *core, struct nat_packet *packet, unsigned l2, uint16_t at)
{
    struct neighbour *n = &core->neighbours[at];
    n->used_ms = core->now_ms;
    packet->port = n->port;
    if (n->state == NAT_NB_INCOMPLETE)
        return hold_for_neighbour(core, packet, at);
    const struct nat_port_config *config = &core->config.ports[n->port];
    if (l2 != ETH_BYTES || config->vlan)
        return send_tagged(packet, l2, n->mac, config);
    uint8_t *frame = packet->data;
    memcpy(frame, n->mac, 6);
    memcpy(frame + 6, config->mac, 6);
    return NAT_FORWARD;
}

enum nat_verdict neighbour_arp(struct nat_core *core, struct nat_packet *packet, unsigned l2)
{
    if (packet->segment < l2 + ARP_BYTES)
        return NAT_DROP_RUNT;
    uint8_t *arp = packet->data + l2, *sender_mac = arp + 8;
    const struct nat_port_config *config = &core->config.ports[packet->port];
    uint16_t operation = get16(arp + 6);
    if (get16(arp) != 1 || get16(arp + 2) != ETHERTYPE_IPV4 || arp[4] != 6 || arp[5] != 4 ||
        (operation != ARP_REQUEST && operation != ARP_REPLY) || sender_mac[0] & 1 ||
        same_mac(sender_mac, no_mac) || same_mac(sender_mac, config->mac))
        return NAT_DROP_ARP;
    uint32_t sender = get32(arp + 14), target = get32(arp + 24);

    bool for_us = is_answered_address(core, packet->port, target);
    /* an answer to what another core has asked is as it should be */
    bool awaited = for_us && operation == ARP_REPLY && is_one_of_several(core);
    enum nat_verdict verdict = awaited ? NAT_CONSUMED : NAT_DROP_ARP;
    if (sender && !is_answered_address(core, packet->port, sender)) {
        uint16_t at = neighbour_find(core, packet->port, sender, no_mac);
        if (at != NONE16) {
            if (core->neighbours[at].state != NAT_NB_STATIC)
                neighbour_confirm(core, at, sender_mac);
            verdict = NAT_CONSUMED;
        }
    }
    if (operation == ARP_REPLY || !for_us || packet->handoff & NAT_HANDOFF_COPY)
        return verdict;

    uint8_t asker[6];
    memcpy(asker, sender_mac, 6);
    /* the other server asks from a MAC that is no station's: all hear the answer */
    memcpy(packet->data, core->config.role && !sender ? broadcast_mac : asker, 6);
    memcpy(packet->data + 6, config->mac, 6);
    put_arp(arp, ARP_REPLY, config->mac, target, asker, sender);
    core->stats.arp_replies_sent++;
    return NAT_REPLY;
}

static bool neighbour_tick(struct nat_core *core, uint16_t at)
{
    struct neighbour *n = &core->neighbours[at];
    uint32_t now = core->now_ms, since_asked = now - n->asked_ms, own = core->config.ports[n->port].address;
    bool unused = !n->sessions && !n->keep && !n->held;
    switch (n->state) {
    case NAT_NB_INCOMPLETE:
        if (n->asked >= ASK_TRIES && since_asked >= ASK_MS) {
            neighbour_release(core, at, NAT_DROP_UNREACHABLE);
            if (unused && now - n->used_ms >= PROBE_MS)
                neighbour_forget(core, at);
            else if (n->keep && since_asked >= PROBE_MS)
                n->asked = 0;
            return true;
        }
        /* gateways are asked for before anybody needs them */
        if ((n->held || n->keep) && since_asked >= ASK_MS &&
            send_request(core, n->port, broadcast_mac, own, n->address)) {
            n->asked_ms = now;
            n->asked++;
            return true;
        }
        if (unused && now - n->used_ms >= IDLE_MS)
            neighbour_forget(core, at);
        return false;
    case NAT_NB_REACHABLE:
        if (unused && now - n->used_ms >= IDLE_MS) {
            neighbour_forget(core, at);
        } else if (n->address && now - n->confirmed_ms >= CONFIRM_MS &&
                   (n->keep || now - n->used_ms < CONFIRM_MS)) {
            n->state = NAT_NB_PROBE;
            n->asked = 0;
            n->asked_ms = now - PROBE_MS;
        }
        return false;
    case NAT_NB_PROBE:
        if (since_asked < PROBE_MS)
            return false;
        if (n->asked >= PROBE_TRIES) {
            n->state = NAT_NB_INCOMPLETE;
            n->asked = 0;
        } else if (send_request(core, n->port, n->asked < PROBE_UNICAST ? n->mac : broadcast_mac, own,
                                n->address)) {
            n->asked_ms = now;
            n->asked++;
        }
        return true;
    default:
        return false;
    }
}

bool neighbour_fix(struct nat_core *core, uint16_t at, const uint8_t *mac)
{
    struct neighbour *n = &core->neighbours[at];
    memcpy(n->mac, mac, 6);
    n->state = NAT_NB_STATIC;
    if (!n->held)
        return false;
    neighbour_release(core, at, NAT_FORWARD);
    return true;
}

void neighbour_loosen(struct nat_core *core, uint16_t at)
{
    struct neighbour *n = &core->neighbours[at];
    n->keep = 0;
    if (n->state != NAT_NB_STATIC)
        return;
    n->state =
        NAT_NB_REACHABLE; /* what used it goes on, and the MAC, which may be wrong, is soon asked for */
    n->confirmed_ms = core->now_ms - CONFIRM_MS + PROBE_MS;
    n->used_ms = core->now_ms;
}

bool neighbour_step(struct nat_core *core)
{
    bool did = announce_step(core);
    if (core->neighbour_sweep >= core->neighbour_slab.top) {
        if (core->now_ms - core->neighbour_sweep_ms < SWEEP_MS)
            return did;
        core->neighbour_sweep = 0;
        core->neighbour_sweep_ms = core->now_ms;
    }
    for (unsigned budget = SWEEP_STEP; budget && core->neighbour_sweep < core->neighbour_slab.top; budget--)
        did |= neighbour_tick(core, (uint16_t)core->neighbour_sweep++);
    return did;
}
