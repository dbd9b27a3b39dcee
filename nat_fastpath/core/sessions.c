/* SPDX-License-Identifier: Apache-2.0
 *
 * Opening, closing and finding sessions and the mappings, permissions and hosts that they hang on. Opening
 * takes everything that it needs or nothing at all.
 */
#include "sessions.h"
#include "core.h"
#include "mappings.h"

#define ADDRESS_TRIES 64u /* addresses that turn out to have no port, for one packet */

uint32_t session_find(const struct nat_core *core, const struct flow_key *key, uint32_t hash, int direction)
{
    struct flow_cursor cursor = flow_cursor(&core->flows, hash);
    uint32_t value;
    while ((value = flow_cursor_next(&cursor)) != FLOW_TABLE_NONE) {
        value--;
        const struct session *s = &core->sessions[value >> 1];
        if ((int)(value & 1) == direction && s->addrs[direction] == key->addrs &&
            s->ports[direction] == key->ports && s->protocol == key->protocol)
            return value >> 1;
    }
    return NONE32;
}

static uint32_t session_hash(const struct nat_core *core, const struct session *s, int direction)
{
    return flow_hash_of(&core->hasher, s->addrs[direction], s->ports[direction], s->protocol);
}

void session_set_timer(struct session *s)
{
    if (s->protocol == PROTO_UDP)
        s->timer = TIMER_UDP;
    else if (s->protocol == PROTO_ICMP)
        s->timer = TIMER_ICMP;
    else
        s->timer = tcp_is_established[s->tcp_state] ? TIMER_TCP_ESTABLISHED : TIMER_TCP_TRANSITORY;
}

/* --- sessions --------------------------------------------------------------------------------------- */

static bool index_session(struct nat_core *core, uint32_t at, const uint32_t hashes[2])
{
    if (!flow_table_insert(&core->flows, hashes[OUT], 1 + (at << 1 | OUT)))
        return false;
    if (flow_table_insert(&core->flows, hashes[IN], 1 + (at << 1 | IN)))
        return true;
    flow_table_remove(&core->flows, hashes[OUT], 1 + (at << 1 | OUT));
    return false;
}

static void fill_session(struct session *s, const struct session_request *r, uint32_t now_ms)
{
    uint32_t internal = net32(r->internal_addr), external = net32(r->external_addr),
             remote = net32(r->remote_addr);
    uint16_t iport = net16(r->internal_port), eport = net16(r->external_port), rport = net16(r->remote_port);
    *s = (struct session){
        .addrs = {internal | (uint64_t)remote << 32, remote | (uint64_t)external << 32},
        .ports = {iport | (uint32_t)rport << 16, rport | (uint32_t)eport << 16},
        .protocol = r->protocol,
        .flags = r->inbound ? NAT_SESSION_INBOUND : 0,
        .tcp_state = r->tcp_state,
        .neighbour = {r->neighbour[OUT], r->neighbour[IN]},
        .last_ms = now_ms,
    };
    s->l3_delta = delta32(internal, external);
    s->l4_delta = fold((uint32_t)s->l3_delta + delta16(iport, eport));
    session_set_timer(s);
}

/* A free port for the host: of its own address, or, only when that has none left, of another. */
static bool take_port(struct nat_core *core, struct host *host, struct session_request *r, uint32_t *slot)
{
    struct port_pool *pool = &core->pool;
    const unsigned slice = slice_of_host(r->internal_addr, pool->n_slices);
    uint32_t block = host->external;
    int missed = pool_take(pool, block, slice, r->protocol, r->internal_port, &r->external_port, slot);
    for (unsigned try = 0; missed == POOL_EXHAUSTED && try < ADDRESS_TRIES; try++) {
        block = pool_usable_block(pool, r->protocol, block + 1);
        if (block == POOL_NONE)
            break;
        missed = pool_take(pool, block, slice, r->protocol, r->internal_port, &r->external_port, slot);
    }
    if (missed == POOL_EXHAUSTED) {
        core->stats.no_port_resting += pool->resting[pool_protocol(r->protocol)] != 0;
        return false;
    }
    if (block != host->external) {
        if (host->sessions == 0 || (!core->explain && !pool_is_open(pool, host->external)))
            host->external = (uint16_t)block;
        else
            core->stats.unpaired++;
    }
    core->stats.parity_missed += (missed & POOL_PARITY_MISSED) != 0;
    core->stats.class_missed += (missed & POOL_CLASS_MISSED) != 0;
    r->external_addr = pool_address(pool, block);
    explain_note_port(core, block, slice, r->protocol, r->external_port, missed);
    return true;
}

bool place_session(struct nat_core *core, uint32_t at, const struct session_request *r, uint32_t mapping,
                   uint64_t id, const uint32_t hashes[2])
{
    struct session *s = &core->sessions[at];
    fill_session(s, r, core->now_ms);
    if (!index_session(core, at, hashes)) {
        s->protocol = 0;
        return false;
    }
    if (core->has_permissions && !permission_add(core, mapping, r->remote_addr)) {
        flow_table_remove(&core->flows, hashes[OUT], 1 + (at << 1 | OUT));
        flow_table_remove(&core->flows, hashes[IN], 1 + (at << 1 | IN));
        s->protocol = 0;
        return false;
    }
    core->cold[at] = (struct session_cold){
        .id = id, .opened_ms = core->now_ms, .mapping = mapping, .held_first = NONE16, .held_last = NONE16};
    return true;
}

static uint64_t new_id(struct nat_core *core, enum nat_id_class cls)
{
    const struct nat_config *config = &core->config;
    uint32_t *counter = cls == NAT_ID_SESSION ? &core->next_session_id : &core->next_mapping_id;
    uint32_t n = ++*counter;
    if (is_one_of_several(core))
        n = n * config->n_slices + config->slice;
    return nat_id(cls, config->instance, config->epoch, n);
}

/* A session less for its host and its mapping; the last one of a mapping takes that and its port along. */
static bool let_go(struct nat_core *core, uint32_t h, uint32_t mapping, uint32_t slot, bool rests)
{
    struct host *host = &core->hosts[h];
    bool last = true;
    if (core->has_mappings) {
        struct mapping *m = &core->mappings[mapping];
        rests = m->rests |= rests;
        last = --m->sessions == 0;
        if (last)
            mapping_remove(core, mapping);
    }
    if (last) {
        if (rests)
            pool_give(&core->pool, slot, core->now_ns / 1000000);
        else
            pool_return(&core->pool, slot);
        host->mappings--;
    }
    host->sessions--;
    host_drop_if_idle(core, h);
    return last;
}

/* The hash that the packet had is known; where the other direction's entry will be is asked for. */
static void hash_ends(struct nat_core *core, struct opening *opening)
{
    const struct session_request *r = &opening->request;
    const int known = r->inbound ? IN : OUT, other = !known;
    const uint32_t remote = net32(r->remote_addr);
    const uint16_t rport = net16(r->remote_port);
    const struct flow_key key =
        other == IN ? flow_key(remote, net32(r->external_addr), rport, net16(r->external_port), r->protocol)
                    : flow_key(net32(r->internal_addr), remote, net16(r->internal_port), rport, r->protocol);
    opening->hashes[known] = r->hash;
    opening->hashes[other] = flow_hash_of(&core->hasher, key.addrs, key.ports, key.protocol);
    flow_table_expect_first(&core->flows, opening->hashes[other]);
}

static enum nat_verdict begin(struct nat_core *core, struct session_request *r, struct opening *opening)
{
    const struct nat_config *config = &core->config;
    if (!event_room_to_open(core))
        return NAT_DROP_EVENTS_FULL;
    enum nat_verdict why = NAT_DROP_TABLE_FULL;
    uint32_t h = host_find(core, r->internal_addr);
    if (h == NONE32 && (h = host_add(core, r->internal_addr)) == NONE32)
        return why;
    struct host *host = &core->hosts[h];
    NOTE(core, HOST, .address = host->address, .value = host->sessions, .limit = config->sessions_per_host,
         .id = (uint64_t)host->mappings << 32 | config->mappings_per_host);

    uint32_t mapping = NONE32, slot = POOL_NONE;
    bool new_port = !r->inbound;
    if (r->inbound) {
        mapping = r->mapping;
    } else if (config->mapping == NAT_MAPPING_ENDPOINT_INDEPENDENT) {
        mapping = mapping_find(core, r->protocol, r->internal_addr, r->internal_port);
        if (mapping != NONE32) {
            new_port = false;
            r->external_addr = core->mappings[mapping].external_addr;
            r->external_port = core->mappings[mapping].external_port;
            NOTE(core, MAPPING, .address = r->external_addr, .port = r->external_port,
                 .value = core->mappings[mapping].sessions);
        }
    }
    if (new_port)
        NOTE(core, NO_MAPPING, .address = r->internal_addr, .port = r->internal_port);

    if ((config->sessions_per_host && host->sessions >= config->sessions_per_host) ||
        (new_port && config->mappings_per_host && host->mappings >= config->mappings_per_host)) {
        host->refused += !core->explain;
        NOTE(core, QUOTA, .address = host->address);
        why = NAT_DROP_QUOTA;
        goto refuse_host;
    }
    /* after the quota: a host at its limit must not use up what the others may still open */
    bool due = !config->new_sessions_rate || bucket_spend(&core->new_sessions, config->new_sessions_rate,
                                                          config->new_sessions_burst, core->now_ns);
    if (config->new_sessions_rate)
        NOTE(core, BUDGET, .flag = due, .limit = config->new_sessions_rate,
             .value = (uint32_t)(core->new_sessions.credit_ns * config->new_sessions_rate / 1000000000));
    if (!due) {
        why = NAT_DROP_BUDGET;
        goto refuse_host;
    }
    NOTE(core, TABLES, .value = core->session_slab.used, .limit = core->session_slab.capacity);
    if (slab_full(&core->session_slab) || (new_port && core->has_mappings && slab_full(&core->mapping_slab)))
        goto refuse_host;
    if (new_port) {
        if (!take_port(core, host, r, &slot)) {
            NOTE(core, NO_PORT, .limit = core->pool.resting[pool_protocol(r->protocol)]);
            why = NAT_DROP_NO_PORT;
            goto refuse_host;
        }
        if (core->has_mappings) {
            mapping = mapping_add(core, r, slot, 0, true);
            if (mapping == NONE32) {
                pool_return(&core->pool, slot);
                goto refuse_host;
            }
        }
        host->mappings++;
    }
    if (core->has_mappings)
        core->mappings[mapping].sessions++;
    host->sessions++;
    for (int d = 0; d < 2; d++)
        if (r->neighbour[d] != NONE16) {
            explain_remember_neighbour(core, r->neighbour[d]);
            core->neighbours[r->neighbour[d]].sessions++;
        }
    *opening = (struct opening){.request = *r,
                                .at = SLAB_TAKE(&core->session_slab, core->sessions, ports[0]),
                                .host = h,
                                .mapping = mapping,
                                .slot = slot};
    hash_ends(core, opening);
    __builtin_prefetch(&core->sessions[opening->at], 1);
    __builtin_prefetch(&core->cold[opening->at], 1);
    return NAT_FORWARD;

refuse_host:
    host_drop_if_idle(core, h);
    return why;
}

enum nat_verdict session_begin(struct nat_core *core, struct session_request *r, struct opening *opening)
{
    opening->verdict = begin(core, r, opening);
    if (opening->verdict != NAT_FORWARD)
        neighbours_unneeded(core, r->neighbour);
    return opening->verdict;
}

enum nat_verdict session_finish(struct nat_core *core, const struct opening *opening)
{
    const struct session_request *r = &opening->request;
    const uint32_t at = opening->at;
    struct mapping *m = core->has_mappings ? &core->mappings[opening->mapping] : NULL;
    /* those that were begun with this one may have had the last of it */
    const bool room = event_room_to_open(core);
    if (!room || !place_session(core, at, r, opening->mapping, 0, opening->hashes)) {
        SLAB_GIVE(&core->session_slab, core->sessions, ports[0], at);
        for (int d = 0; d < 2; d++)
            if (r->neighbour[d] != NONE16)
                core->neighbours[r->neighbour[d]].sessions--;
        neighbours_unneeded(core, r->neighbour);
        let_go(core, opening->host, opening->mapping, m ? m->slot : opening->slot, false);
        return room ? NAT_DROP_TABLE_FULL : NAT_DROP_EVENTS_FULL;
    }
    core->cold[at].id = new_id(core, NAT_ID_SESSION);
    if (m ? !m->id : true) {
        *pool_user(&core->pool, m ? m->slot : opening->slot) = 1 + (m ? opening->mapping : at);
        core->stats.mappings_opened++;
        if (m)
            m->id = new_id(core, NAT_ID_MAPPING);
    }
    for (int d = 0; d < 2; d++)
        if (r->neighbour[d] != NONE16)
            core->neighbours[r->neighbour[d]].fresh = 0;
    if (core->config.synchronous)
        core->sessions[at].flags |= NAT_SESSION_PENDING;
    core->stats.sessions_opened++;
    explain_opened(core, at);
    event_emit(core, NAT_EVENT_OPEN, 0, at);
    return NAT_FORWARD;
}

enum nat_verdict session_open(struct nat_core *core, struct session_request *r, uint32_t *session)
{
    struct opening opening;
    enum nat_verdict verdict = session_begin(core, r, &opening);
    if (verdict != NAT_FORWARD)
        return verdict;
    *session = opening.at;
    return session_finish(core, &opening);
}

bool session_close(struct nat_core *core, uint32_t at, enum nat_close_reason reason)
{
    if (!event_room(core))
        return false;
    const struct session *s = &core->sessions[at];
    if (core->cold[at].held_first != NONE16)
        hold_release(core, at,
                     reason == NAT_CLOSE_HOLD_TIMEOUT ? NAT_DROP_HOLD_TIMEOUT : NAT_DROP_SESSION_GONE);
    event_emit(core, NAT_EVENT_CLOSE, reason, at);
    /* RFC 6888, REQ-8: a TCP port may be used again at once where connections are tracked. Of one that both
     * sides finished, and were then silent for the transitory time, no segment is left; a reset may be
     * forged. */
    bool rests = s->protocol != PROTO_TCP || s->tcp_state != NAT_TCP_CLOSING || reason != NAT_CLOSE_IDLE;
    session_end(core, at, rests);
    return true;
}

void session_end(struct nat_core *core, uint32_t at, bool rests)
{
    struct session *s = &core->sessions[at];
    const struct session_cold *cold = &core->cold[at];
    flow_table_remove(&core->flows, session_hash(core, s, OUT), 1 + (at << 1 | OUT));
    flow_table_remove(&core->flows, session_hash(core, s, IN), 1 + (at << 1 | IN));
    for (int d = 0; d < 2; d++)
        if (s->neighbour[d] != NONE16)
            neighbour_leave(core, s->neighbour[d]);
    if (core->has_permissions)
        permission_remove(core, cold->mapping, session_remote_addr(s));

    uint32_t slot = core->has_mappings ? core->mappings[cold->mapping].slot
                                       : pool_slot(&core->pool, session_external_addr(s), s->protocol,
                                                   session_external_port(s));
    core->stats.mappings_closed +=
        let_go(core, host_find(core, session_internal_addr(s)), cold->mapping, slot, rests);
    s->protocol = 0;
    SLAB_GIVE(&core->session_slab, core->sessions, ports[0], at);
    core->stats.sessions_closed++;
}

void sessions_expect_end(const struct nat_core *core, const uint32_t *at, unsigned n)
{
    _Static_assert(END_BATCH % 16 == 0, "what the hasher takes at once");
    uint64_t addrs[END_BATCH];
    uint32_t ports[END_BATCH], hashes[END_BATCH];
    uint8_t protocols[END_BATCH] = {0};
    for (int d = OUT; d <= IN; d++) {
        for (unsigned i = 0; i < n; i++) {
            const struct session *s = &core->sessions[at[i]];
            addrs[i] = s->addrs[d];
            ports[i] = s->ports[d];
            protocols[i] = s->protocol;
        }
        core->hasher.many(&core->hasher, addrs, ports, protocols, hashes, n);
        for (unsigned i = 0; i < n; i++)
            flow_table_expect(&core->flows, hashes[i]);
    }
    for (unsigned i = 0; i < n; i++) {
        const struct session *s = &core->sessions[at[i]];
        session_expect(core, s->protocol, session_internal_addr(s), session_internal_port(s));
        __builtin_prefetch(&core->cold[at[i]]);
        __builtin_prefetch(
            pool_user_of(&core->pool, session_external_addr(s), s->protocol, session_external_port(s)), 1);
        if (core->has_mappings)
            __builtin_prefetch(&core->mappings[core->cold[at[i]].mapping], 1);
    }
}

enum nat_verdict mapping_admits(struct nat_core *core, uint32_t external_addr, uint16_t external_port,
                                uint8_t protocol, uint32_t remote_addr, struct session_request *r)
{
    uint32_t slot = pool_slot(&core->pool, external_addr, protocol, external_port);
    explain_note_slot(core, slot, external_addr, external_port);
    if (slot == POOL_NONE)
        return pool_block_of(&core->pool, external_addr) == POOL_NONE ? NAT_DROP_NOT_POOL
                                                                      : NAT_DROP_NO_MAPPING;
    uint32_t user = *pool_user(&core->pool, slot);
    if (user == POOL_FREE || user & POOL_RESTING)
        return NAT_DROP_NO_MAPPING;
    NOTE(core, FILTER, .address = remote_addr, .value = core->config.filtering);
    if (core->config.filtering == NAT_FILTER_ADDRESS_AND_PORT)
        return NAT_DROP_FILTERED;
    if (core->config.filtering == NAT_FILTER_ADDRESS &&
        permission_find(core, user - 1, remote_addr) == NONE32)
        return NAT_DROP_FILTERED;
    const struct mapping *m = &core->mappings[user - 1];
    /* Endpoint-dependent, or after a split: these two ends may have a session by another external port, by
     * which the answer would leave. Two sessions with one outbound key would be the end of telling them
     * apart. */
    struct flow_key outbound = flow_key(net32(m->internal_addr), net32(remote_addr), net16(m->internal_port),
                                        net16(r->remote_port), protocol);
    if ((core->config.mapping == NAT_MAPPING_ENDPOINT_DEPENDENT || core->unlisted) &&
        session_find(core, &outbound, flow_hash_of(&core->hasher, outbound.addrs, outbound.ports, protocol),
                     OUT) != NONE32)
        return NAT_DROP_FILTERED;
    NOTE(core, FILTER, .address = remote_addr, .value = core->config.filtering, .flag = 1);
    r->mapping = user - 1;
    r->internal_addr = m->internal_addr;
    r->internal_port = m->internal_port;
    r->external_addr = external_addr;
    r->external_port = external_port;
    return NAT_FORWARD;
}
