/* SPDX-License-Identifier: Apache-2.0
 *
 * FNV-1a, 32 bit, of the 13 bytes of a 5-tuple as they lie in the packet: source, destination, source port,
 * destination port, protocol; then a final mix, because FNV's raw bits fill a table unevenly.
 *
 * FNV has no key, so whoever knows it finds keys that crowd chosen buckets. Where the CPU has AES, the same
 * key as one block through four rounds under secret round keys is for those who must not be able to.
 */
#ifndef FLOW_HASH_H
#define FLOW_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FNV_BASIS 2166136261u
#define FNV_PRIME 16777619u

/* murmur3's finalizer */
static inline uint32_t mix32(uint32_t h)
{
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    return h ^ h >> 16;
}

/* The words are raw (network order bytes in memory): byte i of the key is byte i of its word. */
static inline uint32_t fnv_word(uint32_t h, uint32_t word)
{
    h = (h ^ (word & 0xff)) * FNV_PRIME;
    h = (h ^ (word >> 8 & 0xff)) * FNV_PRIME;
    h = (h ^ (word >> 16 & 0xff)) * FNV_PRIME;
    return (h ^ word >> 24) * FNV_PRIME;
}

static inline uint32_t flow_hash(uint64_t addrs, uint32_t ports, uint8_t protocol)
{
    uint32_t h = fnv_word(FNV_BASIS, (uint32_t)addrs);
    h = fnv_word(h, (uint32_t)(addrs >> 32));
    h = fnv_word(h, ports);
    h = (h ^ protocol) * FNV_PRIME;
    return mix32(h);
}

/* What a core hashes with, chosen once at its start. */
struct flow_hasher {
    /* hashes[i] of (addrs[i], ports[i], protocols[i]) for i < n; the arrays must hold a multiple of 16
     * entries, of which those from n on may be anything. */
    void (*many)(const struct flow_hasher *hasher, const uint64_t *addrs, const uint32_t *ports,
                 const uint8_t *protocols, uint32_t *hashes, unsigned n);
    /* The same of one; NULL: flow_hash() itself, inline. */
    uint32_t (*one)(const struct flow_hasher *hasher, uint64_t addrs, uint32_t ports, uint8_t protocol);
    const char *name;
    _Alignas(16) uint32_t key[20]; /* five round keys */
};
void flow_hasher_fnv(struct flow_hasher *hasher);
/* False: the CPU has no AES instructions. */
bool flow_hasher_aes(struct flow_hasher *hasher, const uint32_t key[20]);

static inline uint32_t flow_hash_of(const struct flow_hasher *hasher, uint64_t addrs, uint32_t ports,
                                    uint8_t protocol)
{
    return __builtin_expect(hasher->one != NULL, 0) ? hasher->one(hasher, addrs, ports, protocol)
                                                    : flow_hash(addrs, ports, protocol);
}

/* Of the keys of the smaller tables: `plain` is their hash without a key, the rest is what it was made from.
 */
static inline uint32_t small_hash_of(const struct flow_hasher *hasher, uint32_t plain, uint64_t a, uint32_t b,
                                     uint8_t c)
{
    return __builtin_expect(hasher->one != NULL, 0) ? hasher->one(hasher, a, b, c) : plain;
}

#endif
