/* SPDX-License-Identifier: Apache-2.0
 *
 * Making and ending a core: all memory it will ever use is taken here.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

#include "core.h"
#include "memory.h"
#include "slices.h"

#define LARGEST_TABLE (1u << 30) /* session << 1 | direction, plus one, fits in 32 bits */

static bool mappings_are_kept(const struct nat_config *config)
{
    /* endpoint-dependent sessions are mappings of their own, unless the filter admits others to them */
    return config->mapping == NAT_MAPPING_ENDPOINT_INDEPENDENT ||
           config->filtering != NAT_FILTER_ADDRESS_AND_PORT;
}

struct nat_config config_completed(const struct nat_config *config)
{
    struct nat_config c = *config;
    if (!c.max_mappings || c.max_mappings > c.max_sessions)
        c.max_mappings = c.max_sessions;
    if (!c.max_hosts)
        c.max_hosts = c.max_sessions / 4 > 1024 ? c.max_sessions / 4 : 1024;
    if (c.max_hosts > c.max_sessions)
        c.max_hosts = c.max_sessions;
    if (c.new_sessions_rate && !c.new_sessions_burst)
        c.new_sessions_burst = c.new_sessions_rate / 10 ? c.new_sessions_rate / 10 : 1;
    return c;
}

/* Every array of a core and its length, in one place: for taking, for giving back and for saying the size. */
#define TABLES(T)                                                                                            \
    T(sessions, core->sessions, c->max_sessions, sizeof(struct session))                                     \
    T(sessions, core->cold, c->max_sessions, sizeof(struct session_cold))                                    \
    T(index, core->flows.buckets, flow_table_buckets(2ull * c->max_sessions), sizeof(struct flow_bucket))    \
    T(mappings, core->mappings, kept ? c->max_mappings : 0, sizeof(struct mapping))                          \
    T(mappings, core->mapping_index.buckets, independent ? flow_table_buckets(c->max_mappings) : 0,          \
      sizeof(struct flow_bucket))                                                                            \
    T(mappings, core->permissions, by_address ? c->max_sessions : 0, sizeof(struct permission))              \
    T(mappings, core->permission_index.buckets, by_address ? flow_table_buckets(c->max_sessions) : 0,        \
      sizeof(struct flow_bucket))                                                                            \
    T(hosts, core->hosts, c->max_hosts, sizeof(struct host))                                                 \
    T(hosts, core->host_index.buckets, flow_table_buckets(c->max_hosts), sizeof(struct flow_bucket))         \
    T(other, core->neighbours, c->max_neighbours, sizeof(struct neighbour))                                  \
    T(other, core->neighbour_index.buckets, flow_table_buckets(c->max_neighbours),                           \
      sizeof(struct flow_bucket))                                                                            \
    T(other, core->held, c->max_held, sizeof(struct held))                                                   \
    T(other, core->datagrams, datagrams_capacity(c), sizeof(struct datagram))                                \
    T(other, core->datagram_index.buckets, flow_table_buckets(datagrams_capacity(c)),                        \
      sizeof(struct flow_bucket))                                                                            \
    T(other, core->events, c->event_ring, sizeof(struct nat_event))

#define TABLE_CONDITIONS                                                                                     \
    bool kept = mappings_are_kept(c), independent = c->mapping == NAT_MAPPING_ENDPOINT_INDEPENDENT,          \
         by_address = c->filtering == NAT_FILTER_ADDRESS

void nat_memory_for(const struct nat_config *config, struct nat_memory *out)
{
    struct nat_config complete = config_completed(config), *c = &complete;
    TABLE_CONDITIONS;
    *out = (struct nat_memory){.pool = port_pool_bytes(c), .other = sizeof(struct nat_core)};
#define COUNT(part, array, entries, size) out->part += (uint64_t)(entries) * (size);
    TABLES(COUNT)
#undef COUNT
    out->total = out->sessions + out->index + out->mappings + out->hosts + out->pool + out->other;
}

const char *config_fault(const struct nat_config *c)
{
    bool sides[2] = {false, false};
    if (c->abi != NAT_ABI)
        return "the configuration has the layout of another version";
    if (!c->n_ports || c->n_ports > NAT_MAX_PORTS)
        return "a core has 1 to 8 ports";
    for (unsigned i = 0; i < c->n_ports; i++) {
        if (c->ports[i].side > NAT_EXTERNAL)
            return "a port is internal or external";
        if (c->ports[i].vlan > VLAN_LAST)
            return "a VLAN is 1 to 4094, and 0 without tag";
        if (c->ports[i].mtu < 68)
            return "the MTU of a port is 68 at least (RFC 791)";
        sides[c->ports[i].side] = true;
    }
    if (!sides[NAT_INTERNAL] || !sides[NAT_EXTERNAL])
        return "a core needs an internal and an external port";
    if (c->mapping > NAT_MAPPING_ENDPOINT_DEPENDENT || c->filtering > NAT_FILTER_ENDPOINT_INDEPENDENT)
        return "mapping or filtering is none that exists";
    if (c->flow_hash > NAT_HASH_AES)
        return "flow_hash is none that exists";
    if (!c->max_sessions || c->max_sessions > LARGEST_TABLE)
        return "max_sessions is 1 to 2^30";
    if (!c->max_neighbours || c->max_neighbours >= NONE16 || !c->max_held || c->max_held >= NONE16)
        return "max_neighbours and max_held are 1 to 65534";
    if (!c->event_ring || c->event_ring & (c->event_ring - 1))
        return "event_ring is a power of two";
    if (!c->n_pool || c->n_pool > NAT_MAX_RANGES || c->n_routes > NAT_MAX_ROUTES)
        return "there are 1 to 64 pool ranges and up to 64 routes";
    if (c->n_slices > SLICES_MAX || (c->slice != NAT_EVERY_SLICE && c->slice && c->slice >= c->n_slices))
        return "there are up to 32 slices, and a core's is one of them";
    if (c->n_port_spans > NAT_MAX_PORT_SPANS)
        return "there are up to 16 port ranges";
    for (unsigned i = 0; i < c->n_port_spans; i++)
        if (c->port_spans[i].first > c->port_spans[i].last ||
            (i && c->port_spans[i].first <= c->port_spans[i - 1].last))
            return "port ranges are ascending and do not overlap";
    for (unsigned i = 0; i < c->n_routes; i++)
        if (c->routes[i].length > 32 || c->routes[i].port >= c->n_ports ||
            (!c->routes[i].connected && !c->routes[i].gateway))
            return "a route has a length of up to 32, a port that exists, and a gateway unless it is "
                   "connected";
    return NULL;
}

void config_in_force(struct nat_core *core)
{
    const struct nat_config *c = &core->config;
    core->timeout_ms[TIMER_UDP] = c->timeout_udp_ms;
    core->timeout_ms[TIMER_ICMP] = c->timeout_icmp_ms;
    core->timeout_ms[TIMER_TCP_TRANSITORY] = c->timeout_tcp_transitory_ms;
    core->timeout_ms[TIMER_TCP_ESTABLISHED] = c->timeout_tcp_established_ms;
    addresses_in_force(core);
}

struct nat_core *nat_create(const struct nat_config *config, char *error, size_t error_size)
{
    const char *fault = config_fault(config);
    if (fault) {
        snprintf(error, error_size, "%s", fault);
        return NULL;
    }
    struct nat_core *core = memory_take(sizeof *core);
    if (!core) {
        snprintf(error, error_size, "no memory for the core");
        return NULL;
    }
    core->config = config_completed(config);
    core->config.neighbours = NULL; /* the caller's, and read only here */
    struct nat_config *c = &core->config;
    uint32_t key[8 + 20]; /* of the ports, of the hash */
    for (unsigned i = 0; i < 28; i++)
        key[i] = (uint32_t)(c->seed >> (i & 1 ? 32 : 0));
    if (!c->seed && getrandom(key, sizeof key, 0) != (ssize_t)sizeof key) {
        snprintf(error, error_size, "the system gives no random numbers (getrandom), and ports need them");
        nat_destroy(core);
        return NULL;
    }
    flow_hasher_fnv(&core->hasher);
    if (c->flow_hash == NAT_HASH_AES && !flow_hasher_aes(&core->hasher, key + 8)) {
        snprintf(error, error_size,
                 "flow_hash aes needs a CPU with AES instructions, and this one has none: use fnv");
        nat_destroy(core);
        return NULL;
    }
    TABLE_CONDITIONS;
    bool complete = true;
#define TAKE(part, array, entries, size)                                                                     \
    complete &= !(entries) || (array = memory_take((uint64_t)(entries) * (size)));
    TABLES(TAKE)
#undef TAKE
    if (!complete) {
        struct nat_memory memory;
        nat_memory_for(config, &memory);
        snprintf(error, error_size, "no memory for max_sessions %u: %llu MB are needed", c->max_sessions,
                 (unsigned long long)(memory.total >> 20));
        nat_destroy(core);
        return NULL;
    }
    if (!port_pool_create(&core->pool, c, error, error_size)) {
        nat_destroy(core);
        return NULL;
    }
    random_start(&core->pool.random, key);

    core->flows.n_buckets = flow_table_buckets(2ull * c->max_sessions);
    core->mapping_index.n_buckets = independent ? flow_table_buckets(c->max_mappings) : 0;
    core->permission_index.n_buckets = by_address ? flow_table_buckets(c->max_sessions) : 0;
    core->host_index.n_buckets = flow_table_buckets(c->max_hosts);
    core->neighbour_index.n_buckets = flow_table_buckets(c->max_neighbours);
    core->session_slab = (struct slab){.capacity = c->max_sessions, .free = NONE32};
    core->mapping_slab = (struct slab){.capacity = kept ? c->max_mappings : 0, .free = NONE32};
    core->permission_slab = (struct slab){.capacity = by_address ? c->max_sessions : 0, .free = NONE32};
    core->host_slab = (struct slab){.capacity = c->max_hosts, .free = NONE32};
    core->neighbour_slab = (struct slab){.capacity = c->max_neighbours, .free = NONE32};
    core->held_slab = (struct slab){.capacity = c->max_held, .free = NONE32};
    core->datagram_index.n_buckets = flow_table_buckets(datagrams_capacity(c));
    core->datagram_slab = (struct slab){.capacity = datagrams_capacity(c), .free = NONE32};
    for (unsigned i = 0; i < DATAGRAM_LISTS; i++)
        core->datagram_list[i].first = core->datagram_list[i].last = NONE32;
    core->done_first = core->done_last = NONE16;
    core->has_mappings = kept;
    core->has_permissions = by_address;
    core->announce_at = UINT64_MAX;
    standby_init(core);
    /* buckets start full */
    core->new_sessions.credit_ns = core->icmp_errors.credit_ns = UINT64_MAX / 2;
    if (!neighbours_configure(core, config, error, error_size)) {
        nat_destroy(core);
        return NULL;
    }
    return core;
}

void nat_destroy(struct nat_core *core)
{
    if (!core)
        return;
    const struct nat_config *c = &core->config;
    TABLE_CONDITIONS;
#define GIVE(part, array, entries, size) memory_give(array, (uint64_t)(entries) * (size));
    TABLES(GIVE)
#undef GIVE
    port_pool_destroy(&core->pool);
    memory_give(core, sizeof *core);
}

bool bucket_spend(struct token_bucket *bucket, uint32_t rate, uint32_t depth, uint64_t now_ns)
{
    if (!rate)
        return false;
    uint64_t cost = 1000000000ull / rate, most = cost * depth;
    uint64_t credit = bucket->credit_ns + (now_ns - bucket->at_ns);
    bucket->at_ns = now_ns;
    bucket->credit_ns = credit > most ? most : credit;
    if (bucket->credit_ns < cost)
        return false;
    bucket->credit_ns -= cost;
    return true;
}

bool nat_poll(struct nat_core *core, uint64_t now)
{
    if (core->config.role)
        standby_follow(core, now);
    else
        core_time(core, now);
    bool did = commands_step(core);
    did |= ageing_step(core);
    did |= !core->standby.silent && neighbour_step(core);
    did |= standby_step(core);
    did |= hold_step(core);
    did |= fragments_step(core);
    return did;
}

void nat_announce(struct nat_core *core)
{
    if (has_slice(core, 0))
        core->announce_at = 0;
}

const struct nat_stats *nat_stats(struct nat_core *core)
{
    struct nat_stats *stats = &core->stats;
    stats->sessions = core->session_slab.used;
    stats->mappings = core->has_mappings ? core->mapping_slab.used : core->session_slab.used;
    stats->hosts = core->host_slab.used;
    stats->neighbours = core->neighbour_slab.used;
    stats->ports_resting = 0;
    for (unsigned p = 0; p < POOL_PROTOCOLS; p++)
        stats->ports_resting += core->pool.resting[p];
    stats->index_steps = core->flows.looked_at + core->mapping_index.looked_at + core->host_index.looked_at +
                         core->permission_index.looked_at;
    stats->rests_cut = core->pool.rests_cut;
    stats->held = core->held_slab.used;
    stats->datagrams = core->datagram_slab.used;
    stats->events = atomic_load(&core->event_tail) - atomic_load(&core->event_head);
    return stats;
}

const struct nat_api nat_api = {
    .size = sizeof(struct nat_api),
    .abi = NAT_ABI,
    .header_hash = NAT_HEADER_HASH,
    .burst = nat_burst,
    .slice_of = nat_slice_of,
    .handed = nat_handed,
    .poll = nat_poll,
    .take = nat_take,
    .outbox = nat_outbox,
    .cut = nat_cut,
    .announce = nat_announce,
    .flush = nat_flush,
    .wake = events_wake,
    .waits = hold_waits,
};
