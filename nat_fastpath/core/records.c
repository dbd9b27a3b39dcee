/* SPDX-License-Identifier: Apache-2.0
 *
 * Sessions that somebody else tells of: the peer, rules of a switch, the operator.
 */
#include "records.h"
#include "mappings.h"
#include "sessions.h"

static bool is_translated(uint8_t protocol)
{
    return protocol == PROTO_UDP || protocol == PROTO_TCP || protocol == PROTO_ICMP;
}

void session_keys(const struct nat_core *core, const struct nat_record *records, unsigned n, bool install,
                  struct record_keys *keys)
{
    _Static_assert(RECORD_BATCH % 16 == 0, "what the hasher takes at once");
    uint8_t protocols[RECORD_BATCH] = {0};
    for (unsigned i = 0; i < n; i++) {
        const struct nat_record *r = &records[i];
        uint32_t internal = net32(r->internal_addr), external = net32(r->external_addr),
                 remote = net32(r->remote_addr);
        uint16_t iport = net16(r->internal_port), eport = net16(r->external_port),
                 rport = net16(r->remote_port);
        keys->addrs[OUT][i] = internal | (uint64_t)remote << 32;
        keys->addrs[IN][i] = remote | (uint64_t)external << 32;
        keys->ports[OUT][i] = iport | (uint32_t)rport << 16;
        keys->ports[IN][i] = rport | (uint32_t)eport << 16;
        protocols[i] = r->protocol;
    }
    for (int d = 0; d <= (install ? IN : OUT); d++)
        core->hasher.many(&core->hasher, keys->addrs[d], keys->ports[d], protocols, keys->hashes[d], n);
    for (unsigned i = 0; i < n; i++) {
        flow_table_expect(&core->flows, keys->hashes[OUT][i]);
        if (!install)
            continue;
        const struct nat_record *r = &records[i];
        flow_table_expect(&core->flows, keys->hashes[IN][i]);
        session_expect(core, r->protocol, r->internal_addr, r->internal_port);
        uint32_t slot = keys->slots[i] = is_translated(r->protocol) ? pool_slot(&core->pool, r->external_addr,
                                                                                r->protocol, r->external_port)
                                                                    : POOL_NONE;
        if (slot != POOL_NONE)
            __builtin_prefetch(pool_user(&core->pool, slot), 1);
    }
}

uint32_t session_by_key(const struct nat_core *core, const struct record_keys *keys, unsigned i,
                        uint8_t protocol, int direction)
{
    struct flow_key key = {keys->addrs[direction][i], keys->ports[direction][i], protocol};
    return session_find(core, &key, keys->hashes[direction][i], direction);
}

/* Somebody saw its last packet so long ago; we may have seen a later one. */
void session_used(struct nat_core *core, uint32_t at, uint32_t idle_ms)
{
    struct session *s = &core->sessions[at];
    if (idle_ms < core->now_ms - s->last_ms)
        s->last_ms = core->now_ms - idle_ms;
}

/* Unless they are to be added they never go back: who tells them may have seen fewer packets than we. */
static void take_counters(struct nat_core *core, uint32_t at, const struct nat_record *record, bool add)
{
    struct session *s = &core->sessions[at];
    const uint64_t told[2][2] = {{record->packets_in, record->bytes_in},
                                 {record->packets_out, record->bytes_out}};
    for (int d = 0; d < 2; d++) {
        uint16_t *high = &core->cold[at].packets_high[d];
        uint64_t had = (uint64_t)*high << 32 | s->packets[d], packets = told[d == OUT][0];
        uint64_t bytes = told[d == OUT][1], total = add ? had + packets : packets > had ? packets : had;
        s->packets[d] = (uint32_t)total;
        *high = (uint16_t)(total >> 32);
        s->bytes[d] = add ? s->bytes[d] + bytes : bytes > s->bytes[d] ? bytes : s->bytes[d];
    }
}

bool session_follow(struct nat_core *core, uint32_t at, int direction, uint16_t neighbour)
{
    struct session *s = &core->sessions[at];
    if (neighbour == NONE16 || neighbour == s->neighbour[direction])
        return false;
    if (core->explain) { /* which has remembered the session, and has no use for those that it counts */
        s->neighbour[direction] = neighbour;
        return true;
    }
    core->neighbours[neighbour].sessions++;
    core->neighbours[neighbour].fresh = 0;
    neighbour_leave(core, s->neighbour[direction]);
    s->neighbour[direction] = neighbour;
    return true;
}

/* What rules of a switch have carried since they were looked at, beside what packets have shown us. They show
 * SYN, FIN and RST to a core, so the rest is ACK. It may be older than a reset that we have seen: that
 * stands. */
static void session_carried(struct nat_core *core, uint32_t at, const struct nat_record *record)
{
    struct session *s = &core->sessions[at];
    take_counters(core, at, record, true);
    for (int d = 0; d < 2; d++)
        if ((d == OUT ? record->packets_out : record->packets_in) && s->protocol == PROTO_TCP &&
            s->tcp_state == NAT_TCP_SYN_BOTH)
            s->tcp_state = tcp_next[s->tcp_state][d][TCP_KIND_ACK];
    session_set_timer(s);
    session_used(core, at, record->idle_ms);
}

void session_update(struct nat_core *core, uint32_t at, const struct nat_record *record)
{
    if (record->flags & NAT_SESSION_OFFLOAD) {
        session_carried(core, at, record);
        return;
    }
    struct session *s = &core->sessions[at];
    take_counters(core, at, record, false);
    /* Whoever saw its last packet knows its state: traffic may have moved, and the news be old. */
    if (record->idle_ms > core->now_ms - s->last_ms)
        return;
    s->last_ms = core->now_ms - record->idle_ms;
    if (s->protocol == PROTO_TCP && record->tcp_state < NAT_TCP_STATES)
        s->tcp_state = record->tcp_state;
    s->flags = (uint8_t)((s->flags & ~NAT_SESSION_INBOUND) | (record->flags & NAT_SESSION_INBOUND));
    session_set_timer(s);
    enum nat_verdict why;
    if (record->internal_mac)
        session_follow(core, at, IN,
                       neighbour_inside(core, session_internal_addr(s), record->internal_mac, &why));
}

bool session_install(struct nat_core *core, const struct nat_record *record, const struct record_keys *keys,
                     unsigned i)
{
    struct session_request r = {
        .internal_addr = record->internal_addr,
        .remote_addr = record->remote_addr,
        .external_addr = record->external_addr,
        .internal_port = record->internal_port,
        .remote_port = record->remote_port,
        .external_port = record->external_port,
        .protocol = record->protocol,
        .tcp_state = record->tcp_state,
        .neighbour = {NONE16, NONE16},
        .inbound = record->flags & NAT_SESSION_INBOUND,
    };
    const uint32_t slot = keys->slots[i];
    if (slot == POOL_NONE || r.tcp_state >= NAT_TCP_STATES ||
        session_by_key(core, keys, i, r.protocol, IN) != NONE32)
        return false;

    enum nat_verdict why;
    r.neighbour[IN] = neighbour_inside(core, r.internal_addr, record->internal_mac, &why);
    if (r.neighbour[IN] == NONE16)
        return false;
    /* to another inside host's external endpoint: a hairpin session has no next hop outside */
    if (pool_block_of(&core->pool, r.remote_addr) == POOL_NONE &&
        (r.neighbour[OUT] = neighbour_towards(core, r.remote_addr, NAT_EXTERNAL, &why)) == NONE16)
        return false;

    uint32_t h = host_find(core, r.internal_addr);
    if (h == NONE32 && (h = host_add(core, r.internal_addr)) == NONE32)
        return false;
    struct host *host = &core->hosts[h];
    uint32_t mapping = NONE32, known = NONE32;
    bool new_mapping = false;
    if (core->has_mappings) {
        uint32_t user = *pool_user(&core->pool, slot);
        mapping = user == POOL_FREE || user & POOL_RESTING ? NONE32 : user - 1;
        if (mapping != NONE32 && (core->mappings[mapping].internal_addr != r.internal_addr ||
                                  core->mappings[mapping].internal_port != r.internal_port))
            goto refuse;
        known = mapping_find(core, r.protocol, r.internal_addr, r.internal_port);
    }
    /* After a split one inside endpoint has two external ones: both serve the sessions that they have, and
     * packets from outside, and one of them the new sessions. */
    const bool second = known != NONE32 && known != mapping;
    if (mapping == NONE32) {
        if (!pool_claim(&core->pool, slot))
            goto refuse;
        new_mapping = true;
        if (core->has_mappings &&
            (mapping = mapping_add(core, &r, slot, record->mapping_id, !second)) == NONE32)
            goto refuse_port;
    }
    const uint32_t hashes[2] = {keys->hashes[OUT][i], keys->hashes[IN][i]};
    uint32_t at = SLAB_TAKE(&core->session_slab, core->sessions, ports[0]);
    if (at == NONE32)
        goto refuse_mapping;
    if (!place_session(core, at, &r, mapping, record->id, hashes)) {
        SLAB_GIVE(&core->session_slab, core->sessions, ports[0], at);
        goto refuse_mapping;
    }
    for (int d = 0; d < 2; d++)
        if (r.neighbour[d] != NONE16) {
            core->neighbours[r.neighbour[d]].sessions++;
            core->neighbours[r.neighbour[d]].fresh = 0;
        }
    if (new_mapping) {
        *pool_user(&core->pool, slot) = 1 + (core->has_mappings ? mapping : at);
        host->mappings++;
        core->stats.mappings_opened++;
        /* a host that comes with sessions keeps the address that they have */
        if (!host->sessions)
            host->external = (uint16_t)pool_block_of(&core->pool, r.external_addr);
    }
    if (core->has_mappings)
        core->mappings[mapping].sessions++;
    host->sessions++;
    struct session *s = &core->sessions[at];
    s->flags = record->flags & (NAT_SESSION_FOREIGN | NAT_SESSION_INBOUND | NAT_SESSION_OFFLOAD);
    core->cold[at].opened_ms = core->now_ms - record->age_ms;
    s->last_ms = core->now_ms - record->idle_ms;
    take_counters(core, at, record, false);
    core->stats.sessions_installed++;
    if (second && record->flags & NAT_SESSION_PREVAILS)
        mapping_prefer(core, mapping, known);
    return true;

refuse_mapping:
    if (new_mapping && core->has_mappings)
        mapping_remove(core, mapping);
refuse_port:
    if (new_mapping)
        pool_unclaim(&core->pool, slot);
refuse:
    host_drop_if_idle(core, h);
    return false;
}
