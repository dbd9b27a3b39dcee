/* SPDX-License-Identifier: Apache-2.0
 *
 * An index from 32-bit hashes to 32-bit values, in buckets of one cache line: eight signatures and eight
 * values. A key may lie in one of two buckets, and the second follows from the first and the signature, so
 * that entries can be moved without looking at the records behind them. Keys live in those records: a match
 * here is a candidate that the caller compares.
 *
 * Look-up touches at most two lines; insertion at most FLOW_TABLE_SEARCH buckets, then it refuses.
 */
#ifndef FLOW_TABLE_H
#define FLOW_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define FLOW_TABLE_SLOTS 8u
#define FLOW_TABLE_SEARCH 24u
#define FLOW_TABLE_NONE 0u

struct flow_bucket {
    uint32_t signature[FLOW_TABLE_SLOTS];
    uint32_t value[FLOW_TABLE_SLOTS]; /* FLOW_TABLE_NONE: free */
};

struct flow_table {
    struct flow_bucket *buckets;
    uint32_t n_buckets;
    uint32_t entries;
    uint64_t looked_at; /* buckets, by all insertions: what new sessions cost */
};

/* Buckets for `entries` at a load of 0.85. */
uint32_t flow_table_buckets(uint64_t entries);
/* value must not be FLOW_TABLE_NONE. False: no place within the search's bound, and nothing has changed. */
bool flow_table_insert(struct flow_table *table, uint32_t hash, uint32_t value);
/* The entry must be there. */
void flow_table_remove(struct flow_table *table, uint32_t hash, uint32_t value);

static inline uint32_t flow_table_first(const struct flow_table *table, uint32_t hash)
{
    return (uint32_t)((uint64_t)hash * table->n_buckets >> 32);
}

/* The other bucket of a key: an involution, whatever the number of buckets. */
static inline uint32_t flow_table_other(const struct flow_table *table, uint32_t hash, uint32_t bucket)
{
    uint32_t offset = (uint32_t)((uint64_t)(hash * 0x9e3779b1u) * table->n_buckets >> 32);
    return offset >= bucket ? offset - bucket : offset + table->n_buckets - bucket;
}

/* Both are on their way, to be written. */
static inline void flow_table_expect(const struct flow_table *table, uint32_t hash)
{
    uint32_t first = flow_table_first(table, hash);
    __builtin_prefetch(&table->buckets[first], 1);
    __builtin_prefetch(&table->buckets[flow_table_other(table, hash, first)], 1);
}

/* Bit i is set where words[i] is `want`. */
static inline unsigned flow_table_equal(const uint32_t words[FLOW_TABLE_SLOTS], uint32_t want)
{
#if defined(__SSE2__)
    const __m128i *quads = (const __m128i *)words;
    __m128i wanted = _mm_set1_epi32((int)want);
    __m128i low = _mm_cmpeq_epi32(_mm_load_si128(quads), wanted);
    __m128i high = _mm_cmpeq_epi32(_mm_load_si128(quads + 1), wanted);
    return (unsigned)_mm_movemask_ps(_mm_castsi128_ps(low)) |
           (unsigned)_mm_movemask_ps(_mm_castsi128_ps(high)) << 4;
#else
    unsigned mask = 0;
    for (unsigned i = 0; i < FLOW_TABLE_SLOTS; i++)
        mask |= (unsigned)(words[i] == want) << i;
    return mask;
#endif
}

/* For an insertion: the first bucket; and, a little later, the other one, if that has no room. */
static inline void flow_table_expect_first(const struct flow_table *table, uint32_t hash)
{
    __builtin_prefetch(&table->buckets[flow_table_first(table, hash)], 1);
}
static inline void flow_table_expect_room(const struct flow_table *table, uint32_t hash)
{
    uint32_t first = flow_table_first(table, hash);
    if (!flow_table_equal(table->buckets[first].value, FLOW_TABLE_NONE))
        __builtin_prefetch(&table->buckets[flow_table_other(table, hash, first)], 1);
}

/* Of the slots that have this signature; a free one may be among them: its value is FLOW_TABLE_NONE. */
static inline unsigned flow_bucket_match(const struct flow_bucket *bucket, uint32_t hash)
{
    return flow_table_equal(bucket->signature, hash);
}

/* for (FLOW_TABLE_EACH(table, hash, value)) visits every candidate. */
struct flow_cursor {
    const struct flow_table *table;
    uint32_t hash, bucket;
    unsigned mask;
    bool second;
};
static inline struct flow_cursor flow_cursor(const struct flow_table *table, uint32_t hash)
{
    uint32_t first = flow_table_first(table, hash);
    return (struct flow_cursor){table, hash, first, flow_bucket_match(&table->buckets[first], hash), false};
}
static inline uint32_t flow_cursor_next(struct flow_cursor *cursor)
{
    for (;;) {
        while (cursor->mask) {
            unsigned slot = (unsigned)__builtin_ctz(cursor->mask);
            cursor->mask &= cursor->mask - 1;
            uint32_t value = cursor->table->buckets[cursor->bucket].value[slot];
            if (value != FLOW_TABLE_NONE)
                return value;
        }
        if (cursor->second)
            return FLOW_TABLE_NONE;
        cursor->second = true;
        uint32_t other = flow_table_other(cursor->table, cursor->hash, cursor->bucket);
        if (other == cursor->bucket)
            return FLOW_TABLE_NONE;
        cursor->bucket = other;
        cursor->mask = flow_bucket_match(&cursor->table->buckets[other], cursor->hash);
    }
}

#endif
