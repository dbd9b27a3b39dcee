/* SPDX-License-Identifier: Apache-2.0 */
#include "port_pool.h"

#define ORDER_PORTS(order) (256u * (order)->n) /* of one parity */

/* --- where things lie -------------------------------------------------------------------------------- */

const struct pool_range *pool_range_of(const struct pool_view *view, uint32_t address)
{
    unsigned low = 0, high = view->n_ranges;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        if (view->ranges[middle].config.last < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low < view->n_ranges && view->ranges[low].config.first <= address ? &view->ranges[low] : NULL;
}

uint32_t pool_block_of(const struct port_pool *pool, uint32_t address)
{
    const struct pool_range *range = pool_range_of(&pool->view, address);
    return range ? pool->view.block_at[range->at + (address - range->config.first)] : POOL_NONE;
}

/* NULL: that slice is another core's. */
static const struct port_order *order_of(const struct port_pool *pool, unsigned slice)
{
    unsigned at = slice - pool->first_slice;
    return at < pool->n_orders ? &pool->orders[at] : NULL;
}

static uint32_t position_of(const struct port_order *order, uint32_t port)
{
    return order->base + (port & 1) * ORDER_PORTS(order) + (port >> 8) * order->n +
           order->before[port >> 1 & 127];
}

static uint32_t port_at(const struct port_pool *pool, uint32_t position)
{
    const struct port_order *order = pool->orders;
    while (position - order->base >= 2 * ORDER_PORTS(order))
        order++;
    uint32_t at = position - order->base, odd = at >= ORDER_PORTS(order);
    at -= odd * ORDER_PORTS(order);
    return at / order->n << 8 | (uint32_t)order->group[at % order->n] << 1 | odd;
}

/* The block of a triple and its place there. */
static bool find_triple(const struct port_pool *pool, uint32_t address, uint8_t protocol, uint16_t port,
                        uint32_t *block, uint32_t *in_block)
{
    const struct pool_range *range = pool_range_of(&pool->view, address);
    const struct port_order *order = order_of(pool, slice_of_port(port, pool->n_slices));
    if (!range || !order || port < range->config.port_first || port > range->config.port_last)
        return false;
    *block = pool->view.block_at[range->at + (address - range->config.first)];
    *in_block = pool_protocol(protocol) * pool->positions + position_of(order, port);
    return true;
}

uint32_t pool_slot(const struct port_pool *pool, uint32_t address, uint8_t protocol, uint16_t port)
{
    uint32_t block, at;
    return find_triple(pool, address, protocol, port, &block, &at)
               ? block * POOL_PROTOCOLS * pool->positions + at
               : POOL_NONE;
}

uint32_t *pool_user_of(const struct port_pool *pool, uint32_t address, uint8_t protocol, uint16_t port)
{
    uint32_t block, at;
    return find_triple(pool, address, protocol, port, &block, &at) ? &pool->view.blocks[block]->slots[at]
                                                                   : NULL;
}

/* Where a slot lies. */
struct place {
    struct pool_block *block;
    uint32_t number, position, in_block;
    unsigned protocol;
};

static struct place place_of(const struct port_pool *pool, uint32_t slot)
{
    uint32_t map = slot / pool->positions, number = map / POOL_PROTOCOLS;
    return (struct place){.block = pool->view.blocks[number],
                          .number = number,
                          .protocol = map % POOL_PROTOCOLS,
                          .position = slot % pool->positions,
                          .in_block = slot - number * POOL_PROTOCOLS * pool->positions};
}

uint32_t *pool_user(const struct port_pool *pool, uint32_t slot)
{
    struct place at = place_of(pool, slot);
    return &at.block->slots[at.in_block];
}

static bool hands_out(const struct pool_range *range, uint32_t port)
{
    for (unsigned i = 0; i < range->n_own; i++)
        if (port >= range->own[i].first && port <= range->own[i].last)
            return true;
    return false;
}

static bool is_ours(const struct port_pool *pool, const struct place *at)
{
    const struct pool_range *range = pool_range_of(&pool->view, at->block->address);
    return range && hands_out(range, port_at(pool, at->position));
}

bool pool_is_open(const struct port_pool *pool, uint32_t block)
{
    const struct pool_range *range = pool_range_of(&pool->view, pool_address(pool, block));
    return range && range->n_own;
}

uint32_t port_pool_live(const struct port_pool *pool, uint32_t address)
{
    uint32_t block = pool_block_of(pool, address);
    return block == POOL_NONE ? 0 : pool->view.blocks[block]->live;
}

/* --- bitmaps ----------------------------------------------------------------------------------------- */

static void bitmap_set(struct port_bitmap *map, uint32_t bit)
{
    map->bits[bit / 64] |= 1ull << bit % 64;
    map->middle[bit / 4096] |= 1ull << bit / 64 % 64;
    map->top |= 1ull << bit / 4096;
}

static void bitmap_clear(struct port_bitmap *map, uint32_t bit)
{
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

static uint32_t bitmap_count(const struct port_bitmap *map, uint32_t from, uint32_t last)
{
    uint32_t n = 0;
    for (uint32_t at = from / 64; at <= last / 64; at++) {
        uint64_t word = map->bits[at];
        if (at == from / 64)
            word &= ~0ull << from % 64;
        if (at == last / 64)
            word &= ~0ull >> (63 - last % 64);
        n += (uint32_t)__builtin_popcountll(word);
    }
    return n;
}

/* --- choice ------------------------------------------------------------------------------------------ */

/* Ports of this parity that come before `port`, which may be 65536. */
static uint32_t ports_before(const struct port_order *order, uint32_t odd, uint32_t port)
{
    return (port >> 8) * order->n + order->before[(port >> 1 & 127) + ((port & 1) > odd)];
}

/* The positions of the ports of one parity in low..high; false: there are none. */
static bool positions_of(const struct port_order *order, uint32_t odd, uint32_t low, uint32_t high,
                         uint32_t *first, uint32_t *last)
{
    uint32_t base = order->base + odd * ORDER_PORTS(order);
    if (low > high)
        return false;
    *first = base + ports_before(order, odd, low);
    *last = base + ports_before(order, odd, high + 1) - 1;
    return *first <= *last && ports_before(order, odd, high + 1) != 0;
}

/* Where the ports of one parity in low..high lie that we hand out. */
struct intervals {
    uint32_t total;
    struct {
        uint32_t first, last;
    } of[NAT_MAX_PORT_SPANS];
    unsigned n;
};

static void intervals_of(const struct pool_range *range, const struct port_order *order, uint32_t odd,
                         uint32_t low, uint32_t high, struct intervals *out)
{
    out->n = out->total = 0;
    for (unsigned i = 0; i < range->n_own; i++) {
        uint32_t from = range->own[i].first > low ? range->own[i].first : low;
        uint32_t to = range->own[i].last < high ? range->own[i].last : high;
        if (!positions_of(order, odd, from, to, &out->of[out->n].first, &out->of[out->n].last))
            continue;
        out->total += out->of[out->n].last - out->of[out->n].first + 1;
        out->n++;
    }
}

/* The first free position from a random one on, wrapping round; POOL_NONE: there is none. */
static uint32_t free_from(const struct port_bitmap *map, const struct intervals *intervals, uint32_t draw)
{
    if (!intervals->total)
        return POOL_NONE;
    uint32_t ahead = random_scale(draw, intervals->total);
    unsigned i = 0;
    for (; ahead > intervals->of[i].last - intervals->of[i].first; i++)
        ahead -= intervals->of[i].last - intervals->of[i].first + 1;
    uint32_t from = intervals->of[i].first + ahead, found = bitmap_first(map, from, intervals->of[i].last);
    for (unsigned k = 0; found == POOL_NONE && k < intervals->n; k++) {
        i = i + 1 == intervals->n ? 0 : i + 1;
        found = bitmap_first(map, intervals->of[i].first, intervals->of[i].last);
    }
    return found;
}

int pool_take(struct port_pool *pool, uint32_t number, unsigned slice, uint8_t protocol, uint16_t wanted,
              uint16_t *port, uint32_t *slot)
{
    const unsigned p = pool_protocol(protocol);
    const struct port_order *order = order_of(pool, slice);
    const struct pool_range *range = pool_range_of(&pool->view, pool_address(pool, number));
    if (!range || !range->n_own || !order)
        return POOL_EXHAUSTED;
    struct pool_block *block = pool->view.blocks[number];
    struct port_bitmap *map = &block->maps[p];
    uint32_t found = POOL_NONE;
    int missed = 0;
    if (pool->view.preservation && hands_out(range, wanted) &&
        slice_of_port(wanted, pool->n_slices) == slice) {
        uint32_t bit = position_of(order, wanted);
        if (map->bits[bit / 64] >> bit % 64 & 1)
            found = bit;
    }
    /* Parity before class, since somebody asked for it: RTP's pair of ports needs it. A query's identifier
     * has neither (RFC 5508), a TCP port no parity (RFC 5382). */
    const bool parity = pool->view.parity && protocol == 17, classes = protocol != 1,
               low_class = wanted < 1024;
    const uint32_t draw = found == POOL_NONE ? random_draw(&pool->random) : 0;
    const uint32_t odd = parity ? wanted & 1 : draw & 1;
    bool has_class = false;
    for (unsigned try = 0; found == POOL_NONE && try < 4; try++) {
        unsigned other_class = parity ? try & 1 : try >> 1, other_parity = parity ? try >> 1 : try & 1;
        if (other_class && !classes)
            continue;
        bool is_low = low_class != other_class;
        uint32_t low = classes && !is_low ? 1024 : 0, high = classes && is_low ? 1023 : UINT16_MAX;
        struct intervals intervals;
        intervals_of(range, order, odd ^ other_parity, low, high, &intervals);
        has_class |= !other_class && intervals.total;
        found = free_from(map, &intervals, draw);
        if (other_class && found != POOL_NONE && has_class)
            missed |= POOL_CLASS_MISSED;
    }
    if (found == POOL_NONE) {
        if (pool->n_orders == 1) /* else others may have some */
            pool->view.usable[p][number / 64] &= ~(1ull << number % 64);
        return POOL_EXHAUSTED;
    }
    *port = (uint16_t)port_at(pool, found);
    if (parity && (*port ^ wanted) & 1)
        missed |= POOL_PARITY_MISSED;
    bitmap_clear(map, found);
    block->live++;
    *slot = (number * POOL_PROTOCOLS + p) * pool->positions + found;
    __builtin_prefetch(&block->slots[p * pool->positions + found], 1);
    return missed;
}

uint32_t pool_usable_block(const struct port_pool *pool, uint8_t protocol, uint32_t from)
{
    const uint64_t *usable = pool->view.usable[pool_protocol(protocol)];
    uint32_t n = (pool->view.n_blocks + 63) / 64, at = from / 64 < n ? from / 64 : 0;
    uint64_t word = usable[at] & (from / 64 < n ? ~0ull << from % 64 : ~0ull);
    for (uint32_t i = 0; i <= n; i++) {
        if (word)
            return at * 64 + (uint32_t)__builtin_ctzll(word);
        at = at + 1 == n ? 0 : at + 1;
        word = usable[at];
    }
    return POOL_NONE;
}

uint32_t pool_free_ports(const struct port_pool *pool, uint32_t number, unsigned slice, uint8_t protocol)
{
    const struct port_order *order = order_of(pool, slice);
    const struct pool_range *range = pool_range_of(&pool->view, pool_address(pool, number));
    uint32_t n = 0, first, last;
    for (unsigned i = 0; range && order && i < range->n_own; i++)
        for (uint32_t odd = 0; odd < 2; odd++)
            if (positions_of(order, odd, range->own[i].first, range->own[i].last, &first, &last))
                n += bitmap_count(&pool->view.blocks[number]->maps[pool_protocol(protocol)], first, last);
    return n;
}

/* --- taking and giving back -------------------------------------------------------------------------- */

static void set_free(struct port_pool *pool, const struct place *at)
{
    at->block->slots[at->in_block] = POOL_FREE;
    bitmap_set(&at->block->maps[at->protocol], at->position);
    if (is_ours(pool, at))
        pool->view.usable[at->protocol][at->number / 64] |= 1ull << at->number % 64;
}

bool pool_claim(struct port_pool *pool, uint32_t slot)
{
    struct place at = place_of(pool, slot);
    uint32_t user = at.block->slots[at.in_block];
    if (user & POOL_RESTING)
        pool->resting[at.protocol]--;
    else if (user == POOL_FREE)
        bitmap_clear(&at.block->maps[at.protocol], at.position);
    else
        return false;
    at.block->live++;
    return true;
}

void pool_return(struct port_pool *pool, uint32_t slot)
{
    struct place at = place_of(pool, slot);
    at.block->live--;
    set_free(pool, &at);
}

void pool_unclaim(struct port_pool *pool, uint32_t slot)
{
    struct place at = place_of(pool, slot);
    at.block->live--;
    if (at.block->slots[at.in_block] & POOL_RESTING)
        pool->resting[at.protocol]++;
    else
        set_free(pool, &at);
}

/* The queue of resting slots, in the order in which they were freed, is linked through queue_after: the slot
 * after this one, plus one, or QUEUE_END. One that a record of the peer claims meanwhile stays in the queue
 * and is passed over; should it rest again before that, it goes to the end when its old turn comes. */
#define QUEUE_END 0x7fffffffu
#define QUEUE_AGAIN 0x80000000u

static void queue_append(struct port_pool *pool, struct place *at, uint32_t slot)
{
    at->block->queue_after[at->in_block] = QUEUE_END;
    at->block->queued++;
    if (pool->queue_tail == POOL_NONE) {
        pool->queue_head = slot;
    } else {
        struct place last = place_of(pool, pool->queue_tail);
        uint32_t *after = &last.block->queue_after[last.in_block];
        *after = (*after & QUEUE_AGAIN) | (slot + 1);
    }
    pool->queue_tail = slot;
}

/* Takes the first of the queue out of it. Whether that has ended a rest. */
static bool queue_advance(struct port_pool *pool, bool is_due)
{
    uint32_t slot = pool->queue_head;
    struct place at = place_of(pool, slot);
    uint32_t after = at.block->queue_after[at.in_block];
    at.block->queue_after[at.in_block] = 0;
    at.block->queued--;
    pool->queue_head = (after & ~QUEUE_AGAIN) == QUEUE_END ? POOL_NONE : (after & ~QUEUE_AGAIN) - 1;
    if (pool->queue_head == POOL_NONE)
        pool->queue_tail = POOL_NONE;
    if (!(at.block->slots[at.in_block] & POOL_RESTING))
        return false;
    if (after & QUEUE_AGAIN && !is_due) {
        queue_append(pool, &at, slot);
        return false;
    }
    pool->resting[at.protocol]--;
    set_free(pool, &at);
    return true;
}

static uint32_t rest_clock(uint64_t now_ms)
{
    return (uint32_t)(now_ms / 2) & ~POOL_RESTING;
}

void pool_give(struct port_pool *pool, uint32_t slot, uint64_t now_ms)
{
    struct place at = place_of(pool, slot);
    const uint64_t most = pool->view.quarantine_ports;
    if (!pool->view.quarantine_ms || !is_ours(pool, &at)) {
        pool_return(pool, slot);
        return;
    }
    while (most && (uint64_t)pool->resting[0] + pool->resting[1] + pool->resting[2] >= most)
        pool->rests_cut += queue_advance(pool, false);
    at.block->live--;
    at.block->slots[at.in_block] = POOL_RESTING | rest_clock(now_ms);
    pool->resting[at.protocol]++;
    if (at.block->queue_after[at.in_block])
        at.block->queue_after[at.in_block] |= QUEUE_AGAIN;
    else
        queue_append(pool, &at, slot);
}

unsigned pool_wake(struct port_pool *pool, uint64_t now_ms, unsigned bound)
{
    unsigned did = 0;
    for (; pool->queue_head != POOL_NONE && did < bound; did++) {
        struct place at = place_of(pool, pool->queue_head);
        uint32_t user = at.block->slots[at.in_block];
        bool is_due = ((rest_clock(now_ms) - user) & ~POOL_RESTING) > pool->view.quarantine_ms / 2;
        if (user & POOL_RESTING && !is_due && !(at.block->queue_after[at.in_block] & QUEUE_AGAIN))
            break;
        queue_advance(pool, is_due);
    }
    return did;
}
