/* SPDX-License-Identifier: Apache-2.0
 *
 * Making a pool, and changing its configuration while it is in use: all memory is taken and all is computed
 * before the owner of the core hears of it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "port_pool.h"

/* Memory of blocks that were made together. */
struct pool_arena {
    uint64_t bytes;
    uint32_t n, in_use;
};

struct pool_change {
    struct pool_view view;    /* the next one; once in force, the one before */
    struct pool_arena *fresh; /* of the blocks that come; NULL: none, or they are in force */
    uint32_t *leaving;        /* blocks whose address goes away, or has gone and had slots in the queue */
    uint32_t *coming;         /* those that had gone so, and are back: what rests goes on resting */
    struct pool_block **dead;
    uint32_t n_leaving, n_coming, n_dead;
};

static uint64_t range_addresses(const struct nat_pool_range *range)
{
    return (uint64_t)range->last - range->first + 1;
}

static uint64_t words(uint64_t bits)
{
    return (bits + 63) / 64;
}

static unsigned slices_of(const struct nat_config *config)
{
    return config->n_slices > 1 ? config->n_slices : 1;
}

/* Groups of ports that have positions in this core. */
static unsigned groups_of(const struct nat_config *config)
{
    const unsigned n = slices_of(config);
    if (n == 1 || config->slice == NAT_EVERY_SLICE)
        return SLICE_GROUPS;
    return slice_first_group(config->slice + 1u, n) - slice_first_group(config->slice, n);
}

static uint64_t block_bytes(uint32_t positions)
{
    return (sizeof(struct pool_block) + 63) / 64 * 64 +
           (uint64_t)POOL_PROTOCOLS * positions * 2 * sizeof(uint32_t) +
           POOL_PROTOCOLS * words(positions) * sizeof(uint64_t);
}

static uint64_t view_bytes(uint64_t addresses)
{
    return addresses * (sizeof(uint16_t) + sizeof(struct pool_block *)) +
           POOL_PROTOCOLS * words(addresses) * sizeof(uint64_t);
}

uint64_t port_pool_bytes(const struct nat_config *config)
{
    uint64_t addresses = 0;
    for (unsigned i = 0; i < config->n_pool; i++)
        addresses += range_addresses(&config->pool[i]);
    return addresses * block_bytes(groups_of(config) * 512) + view_bytes(addresses);
}

/* --- the view ---------------------------------------------------------------------------------------- */

static int by_address(const void *a, const void *b)
{
    uint32_t x = ((const struct pool_range *)a)->config.first,
             y = ((const struct pool_range *)b)->config.first;
    return x < y ? -1 : x > y;
}

/* What this core hands out of a range: its own part, less what the configuration leaves out. */
static void set_own(const struct nat_config *config, struct pool_range *range)
{
    struct nat_port_span all = {1, UINT16_MAX};
    range->n_own = 0;
    for (unsigned i = 0; i < (config->n_port_spans ? config->n_port_spans : 1); i++) {
        const struct nat_port_span *span = config->n_port_spans ? &config->port_spans[i] : &all;
        uint16_t first = span->first > range->config.own_first ? span->first : range->config.own_first;
        uint16_t last = span->last < range->config.own_last ? span->last : range->config.own_last;
        if (first < 1)
            first = 1;
        if (first <= last)
            range->own[range->n_own++] = (struct nat_port_span){first, last};
    }
}

/* Whether this core, or each of its slices, has a port in the range. */
static bool has_ports(const struct port_pool *pool, const struct pool_range *range)
{
    for (unsigned i = 0; i < pool->n_orders; i++) {
        bool any = false;
        for (unsigned k = 0; k < range->n_own; k++)
            for (uint32_t port = range->own[k].first; !any && port <= range->own[k].last; port++)
                any = slice_of_port((uint16_t)port, pool->n_slices) == pool->first_slice + i;
        if (!any)
            return false;
    }
    return true;
}

static void view_free(struct pool_view *view)
{
    free(view->block_at);
    free(view->blocks);
    free(view->usable[0]);
    memset(view, 0, sizeof *view);
}

/* The block of an address that may have left the pool a moment ago; POOL_NONE: it has none. */
static uint32_t known_block(const struct port_pool *pool, uint32_t address)
{
    uint32_t number = pool_block_of(pool, address);
    for (uint32_t i = 0; number == POOL_NONE && pool->view.n_gone && i < pool->view.n_blocks; i++) {
        const struct pool_block *block = pool->view.blocks[i];
        if (block && block->gone && block->address == address)
            number = i;
    }
    return number;
}

static uint32_t count_fresh(const struct port_pool *pool, const struct pool_view *view)
{
    uint32_t fresh = 0;
    for (unsigned i = 0; i < view->n_ranges; i++)
        for (uint64_t at = view->ranges[i].config.first; at <= view->ranges[i].config.last; at++)
            fresh += known_block(pool, (uint32_t)at) == POOL_NONE;
    return fresh;
}

/* All but the blocks. `fresh`: how many addresses the pool does not have yet. */
static bool view_make(struct pool_view *view, uint32_t *fresh, const struct port_pool *pool,
                      const struct nat_config *config, char *error, size_t error_size)
{
    memset(view, 0, sizeof *view);
    uint64_t addresses = 0;
    bool any = false;
    for (unsigned i = 0; i < config->n_pool; i++)
        view->ranges[i].config = config->pool[i];
    view->n_ranges = config->n_pool;
    qsort(view->ranges, view->n_ranges, sizeof view->ranges[0], by_address);
    for (unsigned i = 0; i < view->n_ranges; i++) {
        struct pool_range *range = &view->ranges[i];
        const struct nat_pool_range *c = &range->config;
        bool owns = c->own_first <= c->own_last;
        if (c->last < c->first || c->port_last < c->port_first ||
            (owns && (c->own_first < c->port_first || c->own_last > c->port_last)) ||
            (i && c->first <= view->ranges[i - 1].config.last)) {
            snprintf(error, error_size,
                     "pool range %u is reversed, overlaps another, or owns ports it does not have", i);
            return false;
        }
        set_own(config, range);
        any |= has_ports(pool, range);
        range->at = (uint32_t)addresses;
        addresses += range_addresses(c);
    }
    uint64_t blocks = pool->view.n_blocks;
    if (addresses && addresses <= POOL_ADDRESSES) {
        *fresh = count_fresh(pool, view);
        uint32_t holes = 0;
        for (uint32_t i = 0; i < pool->view.n_blocks; i++)
            holes += !pool->view.blocks[i];
        blocks += *fresh > holes ? *fresh - holes : 0;
    }
    /* slots have numbers of 31 bits, the last of which ends the queue */
    if (!addresses || addresses > POOL_ADDRESSES || blocks > POOL_ADDRESSES ||
        blocks * POOL_PROTOCOLS * pool->positions >= POOL_RESTING - 1) {
        snprintf(error, error_size,
                 "the pool needs 1 to 65535 addresses and fewer than 2^31 (address, protocol, port) triples");
        return false;
    }
    if (!any) {
        snprintf(error, error_size, "the port ranges leave this core no port to hand out");
        return false;
    }
    view->n_addresses = (uint32_t)addresses;
    view->n_blocks = (uint32_t)blocks;
    view->preservation = config->port_preservation;
    view->parity = config->port_parity;
    view->quarantine_ms = config->quarantine_ms;
    view->quarantine_ports = config->quarantine_ports;
    view->block_at = calloc(view->n_addresses, sizeof *view->block_at);
    view->blocks = calloc(view->n_blocks, sizeof(struct pool_block *));
    view->usable[0] = calloc(POOL_PROTOCOLS * words(view->n_blocks), sizeof(uint64_t));
    if (!view->block_at || !view->blocks || !view->usable[0]) {
        view_free(view);
        snprintf(error, error_size, "no memory for the port pool");
        return false;
    }
    for (unsigned p = 1; p < POOL_PROTOCOLS; p++)
        view->usable[p] = view->usable[0] + p * words(view->n_blocks);
    return true;
}

static void view_place(struct pool_view *view, const struct pool_range *range, uint32_t place,
                       uint32_t number)
{
    view->block_at[place] = (uint16_t)number;
    for (unsigned p = 0; range->n_own && p < POOL_PROTOCOLS; p++)
        view->usable[p][number / 64] |= 1ull << number % 64;
}

/* --- blocks ------------------------------------------------------------------------------------------ */

static struct pool_arena *arena_make(uint32_t n, uint32_t positions)
{
    uint64_t bytes = 64 + n * block_bytes(positions);
    struct pool_arena *arena = memory_take(bytes);
    if (arena)
        *arena = (struct pool_arena){.bytes = bytes, .n = n};
    return arena;
}

/* The next block of the arena: all of its ports are free. */
static struct pool_block *block_make(struct pool_arena *arena, uint32_t address, uint32_t positions)
{
    uint8_t *at = (uint8_t *)arena + 64 + arena->in_use++ * block_bytes(positions);
    struct pool_block *block = (void *)at;
    at += (sizeof *block + 63) / 64 * 64;
    block->address = address;
    block->arena = arena;
    block->slots = (void *)at;
    block->queue_after = block->slots + (size_t)POOL_PROTOCOLS * positions;
    uint64_t *bits = (void *)(block->queue_after + (size_t)POOL_PROTOCOLS * positions);
    memset(bits, 0xff, POOL_PROTOCOLS * words(positions) * sizeof *bits);
    for (unsigned p = 0; p < POOL_PROTOCOLS; p++) {
        struct port_bitmap *map = &block->maps[p];
        map->bits = bits + p * words(positions);
        for (uint32_t word = 0; word < words(positions); word++)
            map->middle[word / 64] |= 1ull << word % 64;
        for (unsigned i = 0; i < 16; i++)
            map->top |= (uint64_t)(map->middle[i] != 0) << i;
    }
    return block;
}

static void block_free(struct pool_block *block)
{
    if (block && --block->arena->in_use == 0)
        memory_give(block->arena, block->arena->bytes);
}

bool port_pool_create(struct port_pool *pool, const struct nat_config *config, char *error, size_t error_size)
{
    memset(pool, 0, sizeof *pool);
    pool->n_slices = slices_of(config);
    pool->n_orders = config->slice == NAT_EVERY_SLICE ? pool->n_slices : 1;
    pool->first_slice = pool->n_orders > 1 || pool->n_slices == 1 ? 0 : config->slice;
    pool->queue_head = pool->queue_tail = POOL_NONE;
    for (unsigned i = 0; i < pool->n_orders; i++) {
        struct port_order *order = &pool->orders[i];
        order->base = pool->positions;
        for (unsigned group = 0; group < SLICE_GROUPS; group++) {
            if (slice_of_port((uint16_t)(group << 1), pool->n_slices) == pool->first_slice + i)
                order->group[order->n++] = (uint8_t)group;
            order->before[group + 1] = (uint8_t)order->n;
        }
        pool->positions += 512 * order->n;
    }
    struct pool_change *first = port_pool_prepare(pool, config, error, error_size);
    if (!first)
        return false;
    port_pool_change(pool, first);
    port_pool_change_free(first);
    return true;
}

void port_pool_destroy(struct port_pool *pool)
{
    for (uint32_t i = 0; i < pool->view.n_blocks; i++)
        block_free(pool->view.blocks[i]);
    view_free(&pool->view);
}

/* --- changes ----------------------------------------------------------------------------------------- */

struct pool_change *port_pool_prepare(const struct port_pool *pool, const struct nat_config *config,
                                      char *error, size_t error_size)
{
    const struct pool_view *before = &pool->view;
    uint32_t fresh;
    struct pool_change *change = calloc(1, sizeof *change);
    if (change && !view_make(&change->view, &fresh, pool, config, error, error_size)) {
        free(change);
        return NULL;
    }
    struct pool_view *view = change ? &change->view : NULL;
    if (change) {
        change->fresh = fresh ? arena_make(fresh, pool->positions) : NULL;
        change->leaving = calloc(before->n_blocks + 1, sizeof *change->leaving);
        change->coming = calloc(before->n_blocks + 1, sizeof *change->coming);
        change->dead = calloc(before->n_blocks + 1, sizeof(struct pool_block *));
    }
    if (!change || (fresh && !change->fresh) || !change->leaving || !change->coming || !change->dead) {
        port_pool_change_free(change);
        snprintf(error, error_size, "no memory for the port pool");
        return NULL;
    }
    for (uint32_t i = 0; i < before->n_blocks; i++) {
        view->blocks[i] = before->blocks[i];
        if (view->blocks[i] && !pool_range_of(view, view->blocks[i]->address))
            change->leaving[change->n_leaving++] = i;
        else if (view->blocks[i] && view->blocks[i]->gone)
            change->coming[change->n_coming++] = i;
    }
    uint32_t place = 0, hole = 0;
    for (unsigned i = 0; i < view->n_ranges; i++) {
        const struct pool_range *range = &view->ranges[i];
        for (uint64_t k = 0; k < range_addresses(&range->config); k++) {
            uint32_t address = range->config.first + (uint32_t)k, number = known_block(pool, address);
            if (number == POOL_NONE) {
                while (view->blocks[hole])
                    hole++;
                number = hole;
                view->blocks[number] = block_make(change->fresh, address, pool->positions);
            }
            view_place(view, range, place++, number);
        }
    }
    return change;
}

bool port_pool_change(struct port_pool *pool, struct pool_change *change)
{
    for (uint32_t i = 0; i < change->n_leaving; i++)
        if (pool->view.blocks[change->leaving[i]]->live)
            return false;
    for (uint32_t i = 0; i < change->n_leaving; i++) {
        struct pool_block *block = pool->view.blocks[change->leaving[i]];
        block->gone = block->queued != 0;
        change->view.n_gone += block->gone;
        if (!block->gone) {
            change->view.blocks[change->leaving[i]] = NULL;
            change->dead[change->n_dead++] = block;
        }
    }
    for (uint32_t i = 0; i < change->n_coming; i++)
        pool->view.blocks[change->coming[i]]->gone = false;
    struct pool_view before = pool->view;
    pool->view = change->view;
    change->view = before;
    change->fresh = NULL;
    return true;
}

void port_pool_change_free(struct pool_change *change)
{
    if (!change)
        return;
    for (uint32_t i = 0; i < change->n_dead; i++)
        block_free(change->dead[i]);
    if (change->fresh)
        memory_give(change->fresh, change->fresh->bytes);
    view_free(&change->view);
    free(change->dead);
    free(change->leaving);
    free(change->coming);
    free(change);
}
