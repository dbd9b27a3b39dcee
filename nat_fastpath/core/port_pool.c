/* SPDX-License-Identifier: Apache-2.0 */
#include "port_pool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

static uint32_t range_span(const struct nat_pool_range *range)
{
    return (uint32_t)range->port_last - range->port_first + 1;
}

static uint32_t words(uint32_t bits)
{
    return (bits + 63) / 64;
}

static uint64_t range_addresses(const struct nat_pool_range *range)
{
    return (uint64_t)range->last - range->first + 1;
}

/* What this core hands out of a range: its own part, less what the configuration leaves out. Returns how
 * many. */
static uint32_t own_spans(const struct nat_config *config, const struct nat_pool_range *range,
                          struct nat_port_span own[NAT_MAX_PORT_SPANS], unsigned *n)
{
    struct nat_port_span all = {1, UINT16_MAX};
    uint32_t ports = 0;
    *n = 0;
    for (unsigned i = 0; i < (config->n_port_spans ? config->n_port_spans : 1); i++) {
        const struct nat_port_span *span = config->n_port_spans ? &config->port_spans[i] : &all;
        uint16_t first = span->first > range->own_first ? span->first : range->own_first;
        uint16_t last = span->last < range->own_last ? span->last : range->own_last;
        if (first > last)
            continue;
        own[(*n)++] = (struct nat_port_span){first, last};
        ports += (uint32_t)last - first + 1;
    }
    return ports;
}

/* How many ports may rest at once. */
static uint64_t queue_size(const struct nat_config *config)
{
    if (!config->quarantine_ms)
        return 0;
    uint64_t own = 0;
    struct nat_port_span spans[NAT_MAX_PORT_SPANS];
    unsigned n;
    for (unsigned i = 0; i < config->n_pool; i++)
        own += range_addresses(&config->pool[i]) * POOL_PROTOCOLS *
               own_spans(config, &config->pool[i], spans, &n);
    return config->quarantine_ports && config->quarantine_ports < own ? config->quarantine_ports : own;
}

uint64_t port_pool_bytes(const struct nat_config *config)
{
    uint64_t bytes = 0, addresses = 0;
    for (unsigned i = 0; i < config->n_pool; i++) {
        const struct nat_pool_range *range = &config->pool[i];
        uint64_t per_protocol = range_span(range) * sizeof(uint32_t) +
                                words(range_span(range)) * sizeof(uint64_t) + sizeof(struct port_bitmap);
        bytes += range_addresses(range) * POOL_PROTOCOLS * per_protocol;
        addresses += range_addresses(range);
    }
    return bytes + (addresses + 63) / 64 * 8 * POOL_PROTOCOLS + queue_size(config) * sizeof(uint32_t);
}

static int by_address(const void *a, const void *b)
{
    uint32_t x = ((const struct pool_range *)a)->config.first,
             y = ((const struct pool_range *)b)->config.first;
    return x < y ? -1 : x > y;
}

static void bitmap_set(struct port_bitmap *map, uint32_t bit)
{
    map->bits[bit / 64] |= 1ull << bit % 64;
    map->middle[bit / 4096] |= 1ull << bit / 64 % 64;
    map->top |= 1ull << bit / 4096;
    map->free++;
}

static void bitmap_clear(struct port_bitmap *map, uint32_t bit)
{
    map->free--;
    if ((map->bits[bit / 64] &= ~(1ull << bit % 64)))
        return;
    if ((map->middle[bit / 4096] &= ~(1ull << bit / 64 % 64)))
        return;
    map->top &= ~(1ull << bit / 4096);
}

/* First set bit of `from`..`last`, POOL_NONE if there is none: three words however full the pool is. */
static uint32_t bitmap_first(const struct port_bitmap *map, uint32_t from, uint32_t last)
{
    uint64_t word = map->bits[from / 64] & ~0ull << from % 64;
    uint32_t at = from / 64;
    if (!word) {
        /* later words of the same 4096 */
        uint32_t group = from / 4096, in_group = from / 64 % 64;
        word = in_group == 63 ? 0 : map->middle[group] & ~0ull << (in_group + 1);
        if (!word) {
            uint64_t later = map->top & ~0ull << (group + 1);
            if (!later)
                return POOL_NONE;
            group = (uint32_t)__builtin_ctzll(later);
            word = map->middle[group];
        }
        at = group * 64 + (uint32_t)__builtin_ctzll(word);
        word = map->bits[at];
    }
    uint32_t bit = at * 64 + (uint32_t)__builtin_ctzll(word);
    return bit <= last ? bit : POOL_NONE;
}

/* Even ports come first, then the odd ones, so that those of one parity are neighbours and a search for them
 * is no longer than any other. Without `parity` bits are in the order of ports. */
static uint32_t bit_of(const struct port_pool *pool, const struct pool_range *range, uint32_t port)
{
    uint32_t first = range->config.port_first, last = range->config.port_last;
    if (!pool->parity)
        return port - first;
    uint32_t first_even = (first + 1) / 2;
    return port & 1 ? last / 2 + 1 - first_even + port / 2 - first / 2 : port / 2 - first_even;
}

static bool ours(const struct pool_range *range, uint32_t port)
{
    for (unsigned i = 0; i < range->n_own; i++)
        if (port >= range->own[i].first && port <= range->own[i].last)
            return true;
    return false;
}

bool port_pool_create(struct port_pool *pool, const struct nat_config *config, char *error, size_t error_size)
{
    memset(pool, 0, sizeof *pool);
    uint64_t addresses = 0, slots = 0, bit_words = 0, own = 0;
    for (unsigned i = 0; i < config->n_pool; i++)
        pool->ranges[i].config = config->pool[i];
    pool->n_ranges = config->n_pool;
    qsort(pool->ranges, pool->n_ranges, sizeof pool->ranges[0], by_address);
    for (unsigned i = 0; i < pool->n_ranges; i++) {
        struct pool_range *range = &pool->ranges[i];
        const struct nat_pool_range *c = &range->config;
        if (c->last < c->first || c->port_last < c->port_first || c->own_last < c->own_first ||
            c->own_first < c->port_first || c->own_last > c->port_last ||
            (i && c->first <= pool->ranges[i - 1].config.last)) {
            snprintf(error, error_size,
                     "pool range %u is reversed, overlaps another, or owns ports it does not have", i);
            return false;
        }
        range->span = range_span(c);
        own += own_spans(config, c, range->own, &range->n_own);
        range->address_base = (uint32_t)addresses;
        range->slot_base = (uint32_t)slots;
        addresses += range_addresses(c);
        slots += range_addresses(c) * POOL_PROTOCOLS * range->span;
        bit_words += range_addresses(c) * POOL_PROTOCOLS * words(range->span);
    }
    if (!addresses || addresses > UINT16_MAX || slots >= POOL_RESTING) {
        snprintf(error, error_size,
                 "the pool needs 1 to 65535 addresses and fewer than 2^31 (address, protocol, port) triples");
        return false;
    }
    if (!own) {
        snprintf(error, error_size, "the port ranges leave this core no port to hand out");
        return false;
    }
    pool->n_addresses = (uint32_t)addresses;
    pool->n_slots = (uint32_t)slots;
    pool->preservation = config->port_preservation;
    pool->parity = config->port_parity;
    pool->quarantine_ms = config->quarantine_ms;
    pool->queue_size = (uint32_t)queue_size(config);
    pool->slots = memory_take(slots * sizeof *pool->slots);
    pool->bitmaps = memory_take(addresses * POOL_PROTOCOLS * sizeof *pool->bitmaps);
    pool->bits = memory_take(bit_words * sizeof *pool->bits);
    pool->usable[0] = memory_take(POOL_PROTOCOLS * words(pool->n_addresses) * sizeof(uint64_t));
    if (pool->queue_size)
        pool->queue = memory_take((uint64_t)pool->queue_size * sizeof *pool->queue);
    if (!pool->slots || !pool->bitmaps || !pool->bits || !pool->usable[0] ||
        (pool->queue_size && !pool->queue)) {
        port_pool_destroy(pool);
        snprintf(error, error_size, "no memory for the port pool");
        return false;
    }
    for (unsigned p = 1; p < POOL_PROTOCOLS; p++)
        pool->usable[p] = pool->usable[0] + p * words(pool->n_addresses);

    uint64_t *bits = pool->bits;
    for (unsigned i = 0; i < pool->n_ranges; i++) {
        struct pool_range *range = &pool->ranges[i];
        const struct nat_pool_range *c = &range->config;
        for (uint32_t a = 0; a < range_addresses(c); a++)
            for (unsigned p = 0; p < POOL_PROTOCOLS; p++) {
                uint32_t index = range->address_base + a;
                struct port_bitmap *map = &pool->bitmaps[index * POOL_PROTOCOLS + p];
                map->bits = bits;
                bits += words(range->span);
                for (unsigned k = 0; k < range->n_own; k++)
                    for (uint32_t port = range->own[k].first; port <= range->own[k].last; port++)
                        bitmap_set(map, bit_of(pool, range, port));
                if (map->free)
                    pool->usable[p][index / 64] |= 1ull << index % 64;
            }
    }
    return true;
}

void port_pool_destroy(struct port_pool *pool)
{
    uint64_t bit_words = 0;
    for (unsigned i = 0; i < pool->n_ranges; i++)
        bit_words += range_addresses(&pool->ranges[i].config) * POOL_PROTOCOLS * words(pool->ranges[i].span);
    memory_give(pool->slots, (uint64_t)pool->n_slots * sizeof *pool->slots);
    memory_give(pool->bitmaps, (uint64_t)pool->n_addresses * POOL_PROTOCOLS * sizeof *pool->bitmaps);
    memory_give(pool->bits, bit_words * sizeof *pool->bits);
    memory_give(pool->usable[0], (uint64_t)POOL_PROTOCOLS * words(pool->n_addresses) * sizeof(uint64_t));
    memory_give(pool->queue, (uint64_t)pool->queue_size * sizeof *pool->queue);
    memset(pool, 0, sizeof *pool);
}

static const struct pool_range *range_of(const struct port_pool *pool, uint32_t address)
{
    unsigned low = 0, high = pool->n_ranges;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        if (pool->ranges[middle].config.last < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low < pool->n_ranges && pool->ranges[low].config.first <= address ? &pool->ranges[low] : NULL;
}

uint32_t pool_address_index(const struct port_pool *pool, uint32_t address)
{
    const struct pool_range *range = range_of(pool, address);
    return range ? range->address_base + (address - range->config.first) : POOL_NONE;
}

static const struct pool_range *range_at(const struct port_pool *pool, uint32_t index)
{
    unsigned low = 0, high = pool->n_ranges;
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        if (pool->ranges[middle].address_base <= index)
            low = middle;
        else
            high = middle;
    }
    return &pool->ranges[low];
}

uint32_t pool_address_at(const struct port_pool *pool, uint32_t index)
{
    const struct pool_range *range = range_at(pool, index);
    return range->config.first + (index - range->address_base);
}

static uint32_t slot_in(const struct pool_range *range, uint32_t address_offset, unsigned protocol,
                        uint32_t port_offset)
{
    return range->slot_base + (address_offset * POOL_PROTOCOLS + protocol) * range->span + port_offset;
}

uint32_t pool_slot(const struct port_pool *pool, uint32_t address, uint8_t protocol, uint16_t port)
{
    const struct pool_range *range = range_of(pool, address);
    if (!range || port < range->config.port_first || port > range->config.port_last)
        return POOL_NONE;
    return slot_in(range, address - range->config.first, pool_protocol(protocol),
                   (uint32_t)port - range->config.port_first);
}

static void usable_changed(struct port_pool *pool, uint32_t index, unsigned protocol)
{
    uint64_t bit = 1ull << index % 64;
    if (pool->bitmaps[index * POOL_PROTOCOLS + protocol].free)
        pool->usable[protocol][index / 64] |= bit;
    else
        pool->usable[protocol][index / 64] &= ~bit;
}

/* A random one of the ports in low..high that we hand out; POOL_NONE: there are none. */
static uint32_t any_own(struct port_pool *pool, const struct pool_range *range, uint32_t low, uint32_t high)
{
    uint32_t n = 0, first[NAT_MAX_PORT_SPANS], many[NAT_MAX_PORT_SPANS];
    for (unsigned i = 0; i < range->n_own; i++) {
        uint32_t from = range->own[i].first > low ? range->own[i].first : low;
        uint32_t to = range->own[i].last < high ? range->own[i].last : high;
        first[i] = from;
        many[i] = from <= to ? to - from + 1 : 0;
        n += many[i];
    }
    if (!n)
        return POOL_NONE;
    uint32_t at = random_below(&pool->random, n);
    unsigned i = 0;
    for (; at >= many[i]; i++)
        at -= many[i];
    return first[i] + at;
}

/* The first free port from `start` on, wrapping round in low..high; with the pool's parity layout, only those
 * of the parity of `start`. POOL_NONE: there is none. */
static uint32_t free_within(const struct port_pool *pool, const struct pool_range *range,
                            const struct port_bitmap *map, uint32_t low, uint32_t high, uint32_t start)
{
    if (low < range->config.port_first)
        low = range->config.port_first;
    if (high > range->config.port_last)
        high = range->config.port_last;
    uint32_t step = 1;
    if (pool->parity) {
        step = 2;
        low += (low ^ start) & 1;
        high -= (high ^ start) & 1;
    }
    if (low > high)
        return POOL_NONE;
    if (start < low || start > high)
        start = low;
    uint32_t first = bit_of(pool, range, low), from = bit_of(pool, range, start);
    uint32_t bit = bitmap_first(map, from, bit_of(pool, range, high));
    if (bit == POOL_NONE && from > first)
        bit = bitmap_first(map, first, from - 1);
    return bit == POOL_NONE ? POOL_NONE : low + (bit - first) * step;
}

int pool_take(struct port_pool *pool, uint32_t index, uint8_t protocol, uint16_t wanted, uint16_t *port)
{
    unsigned p = pool_protocol(protocol);
    struct port_bitmap *map = &pool->bitmaps[index * POOL_PROTOCOLS + p];
    if (!map->free)
        return POOL_EXHAUSTED;
    const struct pool_range *range = range_at(pool, index);
    uint32_t found = POOL_NONE;
    int missed = 0;
    if (pool->preservation && ours(range, wanted)) {
        uint32_t bit = bit_of(pool, range, wanted);
        if (map->bits[bit / 64] >> bit % 64 & 1)
            found = wanted;
    }
    /* Parity before class, since somebody asked for it: RTP's pair of ports needs it. A query's identifier
     * has neither (RFC 5508), a TCP port no parity (RFC 5382). */
    bool parity = pool->parity && protocol == 17, classes = protocol != 1, low_class = wanted < 1024;
    uint32_t start[2]; /* in the class of `wanted`, in the other one */
    for (unsigned try = 0; found == POOL_NONE && try < 4; try++) {
        unsigned other_class = parity ? try & 1 : try >> 1, other_parity = parity ? try >> 1 : try & 1;
        if ((other_class && !classes) || (other_parity && !pool->parity))
            continue;
        bool is_low = low_class != other_class;
        uint32_t low = classes && !is_low ? 1024 : 0, high = classes && is_low ? 1023 : UINT16_MAX;
        if (!other_parity) {
            start[other_class] = any_own(pool, range, low, high);
            if (parity && start[other_class] != POOL_NONE)
                start[other_class] ^= (start[other_class] ^ wanted) & 1;
        }
        if (start[other_class] == POOL_NONE)
            continue;
        found = free_within(pool, range, map, low, high, start[other_class] ^ other_parity);
        if (other_class && found != POOL_NONE && start[0] != POOL_NONE)
            missed |= POOL_CLASS_MISSED;
    }
    if (parity && (found ^ wanted) & 1)
        missed |= POOL_PARITY_MISSED;
    *port = (uint16_t)found;
    bitmap_clear(map, bit_of(pool, range, found));
    usable_changed(pool, index, p);
    return missed;
}

uint32_t pool_usable_address(const struct port_pool *pool, uint8_t protocol, uint32_t from)
{
    const uint64_t *usable = pool->usable[pool_protocol(protocol)];
    uint32_t n = words(pool->n_addresses), at = from / 64;
    uint64_t word = usable[at] & ~0ull << from % 64;
    for (uint32_t i = 0; i <= n; i++) {
        if (word)
            return at * 64 + (uint32_t)__builtin_ctzll(word);
        at = at + 1 == n ? 0 : at + 1;
        word = usable[at];
    }
    return POOL_NONE;
}

/* Where a slot's triple lies: its bitmap and its port. */
static const struct pool_range *locate(const struct port_pool *pool, uint32_t slot, uint32_t *index,
                                       unsigned *protocol, uint32_t *port)
{
    unsigned low = 0, high = pool->n_ranges;
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        if (pool->ranges[middle].slot_base <= slot)
            low = middle;
        else
            high = middle;
    }
    const struct pool_range *range = &pool->ranges[low];
    uint32_t offset = slot - range->slot_base;
    *port = range->config.port_first + offset % range->span;
    *protocol = offset / range->span % POOL_PROTOCOLS;
    *index = range->address_base + offset / range->span / POOL_PROTOCOLS;
    return range;
}

bool pool_claim(struct port_pool *pool, uint32_t slot)
{
    uint32_t index, port;
    unsigned protocol;
    const struct pool_range *range = locate(pool, slot, &index, &protocol, &port);
    if (pool->slots[slot] & POOL_RESTING) {
        pool->resting[protocol]--;
        return true;
    }
    if (pool->slots[slot] != POOL_FREE)
        return false;
    if (ours(range, port)) {
        bitmap_clear(&pool->bitmaps[index * POOL_PROTOCOLS + protocol], bit_of(pool, range, port));
        usable_changed(pool, index, protocol);
    }
    return true;
}

void pool_return(struct port_pool *pool, uint32_t slot)
{
    uint32_t index, port;
    unsigned protocol;
    const struct pool_range *range = locate(pool, slot, &index, &protocol, &port);
    pool->slots[slot] = POOL_FREE;
    if (ours(range, port)) {
        bitmap_set(&pool->bitmaps[index * POOL_PROTOCOLS + protocol], bit_of(pool, range, port));
        usable_changed(pool, index, protocol);
    }
}

void pool_unclaim(struct port_pool *pool, uint32_t slot)
{
    uint32_t index, port;
    unsigned protocol;
    locate(pool, slot, &index, &protocol, &port);
    if (pool->slots[slot] & POOL_RESTING)
        pool->resting[protocol]++;
    else
        pool_return(pool, slot);
}

/* Takes the first of the queue out of it. Whether it was still resting: a claimed one is not. */
static bool wake_first(struct port_pool *pool)
{
    uint64_t place = pool->queue_head++;
    uint32_t slot = pool->queue[place % pool->queue_size];
    if (--pool->marks[pool->mark_head].count == 0)
        pool->mark_head = (pool->mark_head + 1) % POOL_MARKS;
    if (pool->slots[slot] != (POOL_RESTING | (uint32_t)place))
        return false;
    uint32_t index, port;
    unsigned protocol;
    locate(pool, slot, &index, &protocol, &port);
    pool->resting[protocol]--;
    pool_return(pool, slot);
    return true;
}

void pool_give(struct port_pool *pool, uint32_t slot, uint64_t now_ms)
{
    uint32_t index, port;
    unsigned protocol;
    const struct pool_range *range = locate(pool, slot, &index, &protocol, &port);
    if (!pool->queue_size || !ours(range, port)) {
        pool_return(pool, slot);
        return;
    }
    if (pool->queue_tail - pool->queue_head == pool->queue_size)
        pool->rests_cut += wake_first(pool);
    pool->queue[pool->queue_tail % pool->queue_size] = slot;
    pool->slots[slot] = POOL_RESTING | (uint32_t)pool->queue_tail;
    pool->queue_tail++;
    pool->resting[protocol]++;
    /* One mark per step: 512 marks are two rests. Should they run out nevertheless, because nobody calls
     * pool_wake, the last one takes all on: a rest may be longer then, never shorter. */
    uint32_t last = (pool->mark_tail + POOL_MARKS - 1) % POOL_MARKS;
    bool full = (pool->mark_tail + 1) % POOL_MARKS == pool->mark_head;
    if (pool->mark_head != pool->mark_tail &&
        (full || now_ms < pool->marks[last].ms + pool->quarantine_ms / 256 + 1)) {
        if (full)
            pool->marks[last].ms = now_ms;
        pool->marks[last].count++;
        return;
    }
    pool->marks[pool->mark_tail].ms = now_ms;
    pool->marks[pool->mark_tail].count = 1;
    pool->mark_tail = (pool->mark_tail + 1) % POOL_MARKS;
}

unsigned pool_wake(struct port_pool *pool, uint64_t now_ms, unsigned bound)
{
    unsigned woken = 0;
    while (pool->mark_head != pool->mark_tail && woken < bound &&
           now_ms >= pool->marks[pool->mark_head].ms + pool->quarantine_ms + pool->quarantine_ms / 256 + 1) {
        wake_first(pool);
        woken++;
    }
    return woken;
}
