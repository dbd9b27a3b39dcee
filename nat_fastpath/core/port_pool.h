/* SPDX-License-Identifier: Apache-2.0
 *
 * The external (address, protocol, port) triples. Each triple has a slot, which says who uses it: so a packet
 * from outside finds its mapping by arithmetic, not by search. Free ports are bits of a three-level bitmap:
 * the next free one from any starting point takes three words, however full the pool is.
 *
 * Every address has a block of its own, whose number it keeps while it is in the pool. So a change of the
 * configuration adds and removes blocks, and touches nothing of those that stay.
 */
#ifndef PORT_POOL_H
#define PORT_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nat.h"
#include "random.h"
#include "slices.h"

#define POOL_NONE UINT32_MAX /* no such triple */
#define POOL_FREE 0u         /* slot of a triple that nobody uses */
#define POOL_RESTING                                                                                         \
    0x80000000u /* slot of a triple in quarantine; the rest of it is when that began, in 2 ms */
#define POOL_PROTOCOLS 3u
#define POOL_ADDRESSES 65535u

/* Ports of one address and protocol that nobody uses: bit set = free. Whether we hand them out is another
 * question, which own spans answer. */
struct port_bitmap {
    uint64_t top;
    uint64_t middle[16];
    uint64_t *bits;
};

struct pool_block {
    uint32_t address;
    uint32_t live; /* triples that somebody uses */
    uint32_t queued;
    bool gone; /* it has left the pool, and some of its slots are still in the queue */
    struct pool_arena *arena;
    uint32_t *slots;       /* [protocol][position] */
    uint32_t *queue_after; /* of each slot: 0 is not in the queue; see pool_give */
    struct port_bitmap maps[POOL_PROTOCOLS];
};

struct pool_range {
    struct nat_pool_range config;
    uint32_t at; /* of its first address, in the order of addresses */
    unsigned n_own;
    struct nat_port_span own[NAT_MAX_PORT_SPANS]; /* what we hand out, ascending */
};

/* The ports of a slice in the order of their positions: even ones first, then odd ones, each ascending. So
 * what is free among the ports from one to another, of either parity, is a search of one interval. */
struct port_order {
    uint32_t base; /* position of its first port */
    unsigned n;    /* groups, which have 512 ports each: two in every 256 */
    uint8_t group[SLICE_GROUPS];
    uint8_t before[SLICE_GROUPS + 1]; /* groups of this slice among the first i ones */
};

/* What a configuration says of the pool: it is replaced as a whole. */
struct pool_view {
    struct pool_range ranges[NAT_MAX_RANGES]; /* sorted by address */
    unsigned n_ranges;
    uint32_t n_addresses, n_blocks; /* of them some may be empty */
    uint32_t n_gone;
    uint16_t *block_at; /* in the order of addresses */
    struct pool_block **blocks;
    uint64_t *usable[POOL_PROTOCOLS]; /* bit per block: it may have a port to hand out */
    bool preservation, parity;
    uint64_t quarantine_ms;
    uint64_t quarantine_ports;
};

struct port_pool {
    struct pool_view view;
    struct port_order orders[SLICES_MAX];
    unsigned n_slices, n_orders, first_slice; /* we have the orders of all slices, or of one */
    uint32_t positions;                       /* per address and protocol */
    struct random_source random;
    uint32_t queue_head, queue_tail; /* slots at rest, the oldest first; POOL_NONE: there are none */
    uint32_t resting[POOL_PROTOCOLS];
    uint64_t rests_cut; /* ended early, because no more ports may rest at once */
};

/* Bytes it takes, by the configuration alone. */
uint64_t port_pool_bytes(const struct nat_config *config);
bool port_pool_create(struct port_pool *pool, const struct nat_config *config, char *error,
                      size_t error_size);
void port_pool_destroy(struct port_pool *pool);

/* Another configuration of ranges, own ports, preferences and quarantine. Whoever may wait prepares it; NULL
 * and a line in `error` when it is impossible. The owner puts it in force: false, and nothing has changed,
 * when an address that goes away is used. Then whoever prepared it frees it, with what it replaced. */
struct pool_change *port_pool_prepare(const struct port_pool *pool, const struct nat_config *config,
                                      char *error, size_t error_size);
bool port_pool_change(struct port_pool *pool, struct pool_change *change);
void port_pool_change_free(struct pool_change *change);
/* Mappings on an address. */
uint32_t port_pool_live(const struct port_pool *pool, uint32_t address);

/* NULL: the address is in none. */
const struct pool_range *pool_range_of(const struct pool_view *view, uint32_t address);
/* Number of an address's block, POOL_NONE when it is not in the pool. */
uint32_t pool_block_of(const struct port_pool *pool, uint32_t address);
/* That of the one with this place in the order of addresses. */
static inline uint32_t pool_block_at(const struct port_pool *pool, uint32_t place)
{
    return pool->view.block_at[place];
}
static inline uint32_t pool_address(const struct port_pool *pool, uint32_t block)
{
    const struct pool_block *at = block < pool->view.n_blocks ? pool->view.blocks[block] : NULL;
    return at && !at->gone ? at->address : 0;
}
static inline uint32_t pool_address_at(const struct port_pool *pool, uint32_t place)
{
    return pool_address(pool, pool_block_at(pool, place));
}
/* Whether it has ports of ours. */
bool pool_is_open(const struct port_pool *pool, uint32_t block);
/* Index of the slot of a triple, POOL_NONE when the pool has no such triple. `protocol` is the IP number. */
uint32_t pool_slot(const struct port_pool *pool, uint32_t address, uint8_t protocol, uint16_t port);
uint32_t *pool_user(const struct port_pool *pool, uint32_t slot);
/* The same of a triple, NULL when there is none. */
uint32_t *pool_user_of(const struct port_pool *pool, uint32_t address, uint8_t protocol, uint16_t port);
/* Takes a free port of the block for a host of `slice` and its inside port `wanted`: that one itself (with
 * `preservation`), else one of its parity (with `parity`, UDP) and class (0-1023 or above), from a random
 * point on; its slot is on its way. What could not be kept comes back as POOL_*_MISSED; POOL_EXHAUSTED: the
 * address has no port. */
enum { POOL_EXHAUSTED = -1, POOL_PARITY_MISSED = 1, POOL_CLASS_MISSED = 2 };
int pool_take(struct port_pool *pool, uint32_t block, unsigned slice, uint8_t protocol, uint16_t wanted,
              uint16_t *port, uint32_t *slot);
/* A block that may have a free port for this protocol, searching from `from` on; POOL_NONE: there is none. */
uint32_t pool_usable_block(const struct port_pool *pool, uint8_t protocol, uint32_t from);
/* Ports of a block and slice that could be handed out. For people: it counts bits. */
uint32_t pool_free_ports(const struct port_pool *pool, uint32_t block, unsigned slice, uint8_t protocol);
/* Takes one given triple out of the free or resting ones: the peer knows why. False: it is used already. The
 * slot itself is the caller's to write, or pool_unclaim makes all as it was. */
bool pool_claim(struct port_pool *pool, uint32_t slot);
void pool_unclaim(struct port_pool *pool, uint32_t slot);
/* Gives a triple back; one that we hand out is free after its rest, the peer's at once: the peer lets it
 * rest. */
void pool_give(struct port_pool *pool, uint32_t slot, uint64_t now_ms);
/* Gives back a triple that need not rest. */
void pool_return(struct port_pool *pool, uint32_t slot);
/* Ends the rest of ports whose time has come, at most `bound`. Returns how many. */
unsigned pool_wake(struct port_pool *pool, uint64_t now_ms, unsigned bound);

static inline unsigned pool_protocol(uint8_t protocol)
{
    return protocol == 17 ? 0 : protocol == 6 ? 1 : 2;
}

#endif
