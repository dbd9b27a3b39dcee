/* SPDX-License-Identifier: Apache-2.0
 *
 * The steps of a packet's way one by one, as the thesis's figure 8.11 has them. Each is prepared, and then
 * run on so many items at once that the call from Python does not count.
 */
#include "../nat_fastpath/core/flow_hash.c"
#include "../nat_fastpath/core/pipeline.c" /* their stages, which nobody else may call */

#include "known.h"

#define ITEMS 16384u
#define KEYS 1024u /* of which the caches hold everything: what a step computes, not what it waits for */

static struct {
    struct nat_core *core;
    struct endpoints *all;
    struct flow_hasher aes;
    uint64_t now;
    uint64_t addrs[KEYS];
    uint32_t ports[KEYS], hashes[KEYS];
    uint8_t protocols[KEYS];
    uint8_t frames[KEYS][128];
    struct nat_packet packets[KEYS];
    uint32_t fresh[ITEMS]; /* hashes of which the index knows nothing before */
    bool inserted;         /* and now it does */
    uint32_t order[ITEMS]; /* sessions */
    uint32_t slots[ITEMS]; /* of the ports that were taken */
    unsigned n_taken;
    struct nat_event events[ITEMS];
    uint32_t sum;
} micro;

/* --- what is prepared --------------------------------------------------------------------------------- */

static void nothing(void)
{
}

static void make_packets(void)
{
    for (unsigned i = 0; i < KEYS; i++)
        micro.packets[i] = packet_in(micro.frames[i] + 32, 96, 0, micro.all[i].out);
}

static void drain_events(void)
{
    while (nat_events(micro.core, micro.events, ITEMS) == ITEMS)
        ;
}

static void fill_events(void)
{
    drain_events();
    for (unsigned i = 0; i < ITEMS; i++)
        event_emit(micro.core, NAT_EVENT_OPEN, 0, i % KEYS);
}

/* One that found no place is not there to be removed, which changes nothing. */
static void remove_all(void)
{
    for (unsigned i = 0; i < ITEMS; i++)
        flow_table_remove(&micro.core->flows, micro.fresh[i], UINT32_MAX - i);
    micro.inserted = false;
}

static void insert_all(void)
{
    for (unsigned i = 0; i < ITEMS; i++)
        micro.sum += flow_table_insert(&micro.core->flows, micro.fresh[i], UINT32_MAX - i);
    micro.inserted = true;
}

static void not_inserted(void)
{
    if (micro.inserted)
        remove_all();
    for (unsigned i = 0; i < ITEMS; i++)
        micro.fresh[i] = (uint32_t)next_random();
}

static void inserted(void)
{
    not_inserted();
    insert_all();
}

static void give_ports(void)
{
    for (; micro.n_taken; micro.n_taken--)
        pool_return(&micro.core->pool, micro.slots[micro.n_taken - 1]);
}

/* --- what is measured --------------------------------------------------------------------------------- */

typedef void (*hash_many)(const struct flow_hasher *, const uint64_t *, const uint32_t *, const uint8_t *,
                          uint32_t *, unsigned);

static void hash_with(hash_many many)
{
    for (unsigned i = 0; i < ITEMS; i += NAT_BURST) {
        const unsigned at = i % KEYS;
        many(&micro.aes, micro.addrs + at, micro.ports + at, micro.protocols + at, micro.hashes + at,
             NAT_BURST);
    }
}

static void hash_baseline(void)
{
    hash_with(hash_many_baseline);
}

#if defined(__x86_64__)
static void hash_avx2(void)
{
    hash_with(hash_many_avx2);
}

static void hash_avx512(void)
{
    hash_with(hash_many_avx512);
}

static void hash_aes(void)
{
    hash_with(micro.aes.many);
}
#endif

static void hash_one_by_one(void)
{
    for (unsigned i = 0; i < ITEMS; i++)
        micro.sum += flow_hash(micro.addrs[i % KEYS], micro.ports[i % KEYS], micro.protocols[i % KEYS]);
}

static void parse(void)
{
    struct batch batch;
    for (unsigned at = 0; at < ITEMS; at += NAT_BURST) {
        batch.packets = micro.packets + at % KEYS;
        batch.common = batch.inside = 0;
        for (unsigned i = 0; i < NAT_BURST; i++)
            batch_add(&batch, i, &micro.core->config.ports[0], ETH_BYTES);
        micro.sum += batch.common;
    }
}

/* Of any session of the table: key, hash, index line and candidate. */
static void look_up(void)
{
    struct batch batch = {.n = NAT_BURST, .common = UINT32_MAX};
    for (unsigned at = 0; at < ITEMS; at += NAT_BURST) {
        for (unsigned i = 0; i < NAT_BURST; i++) {
            const struct endpoints *e = &micro.all[micro.order[at + i]];
            batch.addrs[i] = raw64(e->out);
            batch.ports[i] = raw32(e->out + 8);
            batch.protocols[i] = PROTO_UDP;
        }
        batch_hash(micro.core, &batch);
        batch_probe(micro.core, &batch);
        for (unsigned i = 0; i < NAT_BURST; i++)
            micro.sum += batch.session[i];
    }
}

static void random_sessions(void)
{
    for (unsigned i = 0; i < ITEMS; i++)
        micro.order[i] = (uint32_t)(next_random() % micro.core->session_slab.used);
}

static void allocate(void)
{
    struct port_pool *pool = &micro.core->pool;
    for (unsigned i = 0; i < ITEMS; i++) {
        const uint32_t block = pool_block_at(pool, i % pool->view.n_addresses);
        uint16_t port;
        if (pool_take(pool, block, 0, PROTO_UDP, 0, &port, &micro.slots[i]) == POOL_EXHAUSTED)
            break;
        micro.n_taken++;
    }
}

static void rewrite(void)
{
    for (unsigned i = 0; i < KEYS; i++)
        if (translate(micro.core, &micro.packets[i], ETH_BYTES, IP_BYTES, i, OUT, false, false, false) !=
            NAT_FORWARD)
            die("a packet of a known session was not rewritten");
}

static void emit(void)
{
    for (unsigned i = 0; i < ITEMS; i++)
        event_emit(micro.core, NAT_EVENT_OPEN, 0, i % KEYS);
}

static void take_events(void)
{
    micro.sum += nat_events(micro.core, micro.events, ITEMS);
}

static const struct {
    const char *name;
    void (*prepare)(void), (*run)(void);
    unsigned items;
} steps[] = {
    {"hash, one by one", nothing, hash_one_by_one, ITEMS},
    {"hash, baseline", nothing, hash_baseline, ITEMS},
#if defined(__x86_64__)
    {"hash, avx2", nothing, hash_avx2, ITEMS},
    {"hash, avx512", nothing, hash_avx512, ITEMS},
    {"hash, aes", nothing, hash_aes, ITEMS},
#endif
    {"parse", make_packets, parse, ITEMS},
    {"look-up", random_sessions, look_up, ITEMS},
    {"insert", not_inserted, insert_all, ITEMS},
    {"delete", inserted, remove_all, ITEMS},
    {"allocate", give_ports, allocate, ITEMS},
    {"rewrite", make_packets, rewrite, KEYS},
    {"event", drain_events, emit, ITEMS},
    {"event, read", fill_events, take_events, ITEMS},
};

/* --- for Python --------------------------------------------------------------------------------------- */

unsigned micro_steps(void);
unsigned micro_steps(void)
{
    return sizeof steps / sizeof *steps;
}

const char *micro_name(unsigned step);
const char *micro_name(unsigned step)
{
    return steps[step].name;
}

unsigned micro_items(unsigned step);
unsigned micro_items(unsigned step)
{
    return steps[step].items;
}

/* Whether this CPU has what the step needs. */
bool micro_can(unsigned step);
bool micro_can(unsigned step)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return steps[step].run == hash_avx2     ? __builtin_cpu_supports("avx2")
           : steps[step].run == hash_avx512 ? __builtin_cpu_supports("avx512f")
           : steps[step].run == hash_aes    ? micro.aes.many != NULL
                                            : true;
#else
    return step < micro_steps();
#endif
}

void micro_prepare(unsigned step);
void micro_prepare(unsigned step)
{
    steps[step].prepare();
}

void micro_run(unsigned step);
void micro_run(unsigned step)
{
    steps[step].run();
}

void micro_start(uint32_t sessions);
void micro_start(uint32_t sessions)
{
    struct nat_memory memory;
    const uint32_t key[20] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};
    micro.core = make_core(sessions, false, &memory);
    micro.all = malloc(sessions * sizeof *micro.all);
    if (micro.all == NULL || sessions < 8 * ITEMS)
        die("no memory, or so few sessions that what is inserted fills the index");
    flow_hasher_aes(&micro.aes, key);
    open_sessions(micro.core, micro.all, sessions, micro.now = 1000000000);
    for (unsigned i = 0; i < KEYS; i++) {
        micro.addrs[i] = raw64(micro.all[i].out);
        micro.ports[i] = raw32(micro.all[i].out + 8);
        micro.protocols[i] = PROTO_UDP;
    }
}
