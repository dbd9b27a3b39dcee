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
    return bytes + (addresses + 63) / 64 * 8 * POOL_PROTOCOLS;
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

/* First set bit at or after `from`, wrapping round; the bitmap must not be empty. */
static uint32_t bitmap_next(const struct port_bitmap *map, uint32_t from)
{
    uint64_t word = map->bits[from / 64] & ~0ull << from % 64;
    if (word)
        return from / 64 * 64 + (uint32_t)__builtin_ctzll(word);
    /* later words of the same 4096 */
    uint32_t group = from / 4096, in_group = from / 64 % 64;
    word = in_group == 63 ? 0 : map->middle[group] & ~0ull << (in_group + 1);
    if (!word) {
        uint64_t later = map->top & ~0ull << (group + 1);
        group = (uint32_t)__builtin_ctzll(later ? later : map->top);
        word = map->middle[group];
    }
    uint32_t at = group * 64 + (uint32_t)__builtin_ctzll(word);
    return at * 64 + (uint32_t)__builtin_ctzll(map->bits[at]);
}

bool port_pool_create(struct port_pool *pool, const struct nat_config *config, char *error, size_t error_size)
{
    memset(pool, 0, sizeof *pool);
    uint64_t addresses = 0, slots = 0, bit_words = 0;
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
    pool->n_addresses = (uint32_t)addresses;
    pool->n_slots = (uint32_t)slots;
    pool->quarantine_ms = config->quarantine_ms;
    pool->slots = memory_take(slots * sizeof *pool->slots);
    pool->bitmaps = memory_take(addresses * POOL_PROTOCOLS * sizeof *pool->bitmaps);
    pool->bits = memory_take(bit_words * sizeof *pool->bits);
    pool->usable[0] = memory_take(POOL_PROTOCOLS * words(pool->n_addresses) * sizeof(uint64_t));
    if (!pool->slots || !pool->bitmaps || !pool->bits || !pool->usable[0]) {
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
                for (uint32_t port = c->own_first; port <= c->own_last; port++)
                    bitmap_set(map, port - c->port_first);
                pool->usable[p][index / 64] |= 1ull << index % 64;
            }
    }
    pool->random = config->seed | 1;
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
    memset(pool, 0, sizeof *pool);
}

uint64_t pool_random(struct port_pool *pool)
{
    uint64_t x = pool->random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    pool->random = x;
    return x * 0x2545f4914f6cdd1dull;
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

bool pool_take(struct port_pool *pool, uint32_t index, uint8_t protocol, uint16_t *port)
{
    unsigned p = pool_protocol(protocol);
    struct port_bitmap *map = &pool->bitmaps[index * POOL_PROTOCOLS + p];
    if (!map->free)
        return false;
    const struct nat_pool_range *c = &range_at(pool, index)->config;
    uint32_t own = (uint32_t)c->own_last - c->own_first + 1;
    uint32_t from = (uint32_t)((pool_random(pool) >> 32) * own >> 32) + (c->own_first - c->port_first);
    uint32_t bit = bitmap_next(map, from);
    bitmap_clear(map, bit);
    usable_changed(pool, index, p);
    *port = (uint16_t)(c->port_first + bit);
    return true;
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

/* Where a slot's triple lies: its bitmap, its bit, and whether the port is one that we may hand out. */
static const struct pool_range *locate(const struct port_pool *pool, uint32_t slot, uint32_t *index,
                                       unsigned *protocol, uint32_t *bit)
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
    *bit = offset % range->span;
    *protocol = offset / range->span % POOL_PROTOCOLS;
    *index = range->address_base + offset / range->span / POOL_PROTOCOLS;
    return range;
}

static bool ours(const struct pool_range *range, uint32_t bit)
{
    uint32_t port = range->config.port_first + bit;
    return port >= range->config.own_first && port <= range->config.own_last;
}

bool pool_claim(struct port_pool *pool, uint32_t slot)
{
    uint32_t index, bit;
    unsigned protocol;
    const struct pool_range *range = locate(pool, slot, &index, &protocol, &bit);
    if (pool->slots[slot] != POOL_FREE)
        return false;
    if (ours(range, bit)) {
        struct port_bitmap *map = &pool->bitmaps[index * POOL_PROTOCOLS + protocol];
        if (!(map->bits[bit / 64] >> bit % 64 & 1))
            return false;
        bitmap_clear(map, bit);
        usable_changed(pool, index, protocol);
    }
    return true;
}

void pool_return(struct port_pool *pool, uint32_t slot)
{
    uint32_t index, bit;
    unsigned protocol;
    const struct pool_range *range = locate(pool, slot, &index, &protocol, &bit);
    pool->slots[slot] = POOL_FREE;
    if (ours(range, bit)) {
        bitmap_set(&pool->bitmaps[index * POOL_PROTOCOLS + protocol], bit);
        usable_changed(pool, index, protocol);
    }
}

void pool_give(struct port_pool *pool, uint32_t slot, uint64_t now_ms)
{
    if (!pool->quarantine_ms) {
        pool_return(pool, slot);
        return;
    }
    if (pool->resting++)
        pool->slots[pool->queue_tail] = POOL_RESTING | slot;
    else
        pool->queue_head = slot;
    pool->queue_tail = slot;
    pool->slots[slot] = POOL_RESTING;
    /* one mark per step: with 256 steps to a rest, 512 marks cannot run out while pool_wake is called */
    uint32_t last = (pool->mark_tail + POOL_MARKS - 1) % POOL_MARKS;
    bool full = (pool->mark_tail + 1) % POOL_MARKS == pool->mark_head;
    if (pool->mark_head != pool->mark_tail &&
        (full || now_ms < pool->marks[last].ms + pool->quarantine_ms / 256 + 1)) {
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
    while (pool->mark_head != pool->mark_tail && woken < bound) {
        uint64_t due = pool->marks[pool->mark_head].ms + pool->quarantine_ms + pool->quarantine_ms / 256 + 1;
        if (now_ms < due)
            break;
        uint32_t slot = pool->queue_head;
        pool->queue_head = pool->slots[slot] & ~POOL_RESTING;
        pool->resting--;
        pool_return(pool, slot);
        woken++;
        if (--pool->marks[pool->mark_head].count == 0)
            pool->mark_head = (pool->mark_head + 1) % POOL_MARKS;
    }
    return woken;
}
