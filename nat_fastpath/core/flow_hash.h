/* SPDX-License-Identifier: Apache-2.0
 *
 * FNV-1a, 32 bit, of the 13 bytes of a 5-tuple as they lie in the packet: source, destination, source port,
 * destination port, protocol; then a final mix, because FNV's raw bits fill a table unevenly.
 */
#ifndef FLOW_HASH_H
#define FLOW_HASH_H

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

/* hashes[i] = flow_hash(addrs[i], ports[i], protocols[i]) for i < n; the arrays must hold a multiple of 16
 * entries, of which those from n on may be anything. Chosen once for the CPU it runs on. */
typedef void (*flow_hash_many_fn)(const uint64_t *addrs, const uint32_t *ports, const uint8_t *protocols,
                                  uint32_t *hashes, unsigned n);
flow_hash_many_fn flow_hash_choose(const char **name);

#endif
