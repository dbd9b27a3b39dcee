/* SPDX-License-Identifier: Apache-2.0
 *
 * The external (address, protocol, port) triples. Each triple has a slot, which says who uses it: so a packet
 * from outside finds its mapping by arithmetic, not by search. Free ports are bits of a three-level bitmap:
 * the next free one from any starting point takes three words, however full the pool is.
 */
#ifndef PORT_POOL_H
#define PORT_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "nat.h"
#include "random.h"

#define POOL_NONE UINT32_MAX /* no such triple */
#define POOL_FREE 0u         /* slot of a triple that nobody uses */
#define POOL_RESTING                                                                                         \
    0x80000000u /* slot of a triple in quarantine; the rest of it is its place in the queue */
#define POOL_PROTOCOLS 3u
#define POOL_MARKS 512u

/* Free ports of one address and protocol: bit set = free. */
struct port_bitmap {
    uint64_t top;
    uint64_t middle[16];
    uint64_t *bits;
    uint32_t free;
};

struct pool_range {
    struct nat_pool_range config;
    uint32_t address_base; /* index of its first address among all of the pool */
    uint32_t slot_base;
    uint32_t span; /* ports per address and protocol */
    unsigned n_own;
    struct nat_port_span own[NAT_MAX_PORT_SPANS]; /* what we hand out, ascending */
};

struct port_pool {
    struct pool_range ranges[NAT_MAX_RANGES]; /* sorted by address */
    unsigned n_ranges;
    uint32_t n_addresses, n_slots;
    uint32_t *slots;
    struct port_bitmap *bitmaps; /* [address][protocol] */
    uint64_t *bits;
    uint64_t *usable[POOL_PROTOCOLS]; /* bit per address: it has a free port */
    struct random_source random;
    bool preservation, parity;
    uint64_t quarantine_ms;
    /* Slots in the order in which they were freed. One that a record of the peer claims meanwhile stays in
     * the queue and is passed over: its slot no longer names this place. */
    uint32_t *queue;
    uint32_t queue_size;
    uint64_t queue_head, queue_tail;
    uint32_t resting[POOL_PROTOCOLS];
    uint64_t rests_cut; /* ended early, because no more ports may rest at once */
    struct {
        uint64_t ms;
        uint32_t count;
    } marks[POOL_MARKS]; /* when the ports in the queue were put there, in steps of quarantine / 256 */
    uint32_t mark_head, mark_tail;
};

/* Bytes it takes, by the configuration alone. */
uint64_t port_pool_bytes(const struct nat_config *config);
bool port_pool_create(struct port_pool *pool, const struct nat_config *config, char *error,
                      size_t error_size);
void port_pool_destroy(struct port_pool *pool);

/* Index of an address in the pool, POOL_NONE when it is not in it. */
uint32_t pool_address_index(const struct port_pool *pool, uint32_t address);
uint32_t pool_address_at(const struct port_pool *pool, uint32_t index);
/* Index of the slot of a triple, POOL_NONE when the pool has no such triple. `protocol` is the IP number. */
uint32_t pool_slot(const struct port_pool *pool, uint32_t address, uint8_t protocol, uint16_t port);
/* Takes a free port of the address for the inside port `wanted`: that one itself (with `preservation`), else
 * one of its parity (with `parity`, UDP) and class (0-1023 or above), from a random point on. What could not
 * be kept comes back as POOL_*_MISSED; POOL_EXHAUSTED: the address has no port at all. */
enum { POOL_EXHAUSTED = -1, POOL_PARITY_MISSED = 1, POOL_CLASS_MISSED = 2 };
int pool_take(struct port_pool *pool, uint32_t address_index, uint8_t protocol, uint16_t wanted,
              uint16_t *port);
/* Any address with a free port for this protocol, searching from `from` on; POOL_NONE: there is none. */
uint32_t pool_usable_address(const struct port_pool *pool, uint8_t protocol, uint32_t from);
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
