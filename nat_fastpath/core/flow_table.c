/* SPDX-License-Identifier: Apache-2.0 */
#include "flow_table.h"

uint32_t flow_table_buckets(uint64_t entries)
{
    /* 0.85 = 17/20; a small table gets one bucket more, since chance weighs heavier there */
    return (uint32_t)((entries * 20 + 17 * FLOW_TABLE_SLOTS - 1) / (17 * FLOW_TABLE_SLOTS)) + 2;
}

/* -1: it has none. */
static int free_slot(const struct flow_bucket *bucket)
{
    unsigned mask = flow_table_equal(bucket->value, FLOW_TABLE_NONE);
    return mask ? __builtin_ctz(mask) : -1;
}

/* Breadth first: the shortest chain of moves that frees a slot in one of the key's two buckets. A node is a
 * bucket that would have room if one of its entries could move on to the node's child. */
struct step {
    uint32_t bucket;
    int8_t parent; /* node whose entry `slot` moves into this bucket; -1 for the two roots */
    uint8_t slot;
};

static void put(struct flow_table *table, struct flow_bucket *bucket, int slot, uint32_t hash, uint32_t value)
{
    bucket->signature[slot] = hash;
    bucket->value[slot] = value;
    table->entries++;
}

static __attribute__((noinline)) bool insert_by_moves(struct flow_table *table, uint32_t hash, uint32_t value)
{
    struct step steps[FLOW_TABLE_SEARCH];
    unsigned n = 0;
    uint32_t first = flow_table_first(table, hash);
    uint32_t other = flow_table_other(table, hash, first);
    steps[n++] = (struct step){first, -1, 0};
    if (other != first)
        steps[n++] = (struct step){other, -1, 0};

    for (unsigned at = 0; at < n; at++) {
        struct flow_bucket *bucket = &table->buckets[steps[at].bucket];
        int slot = free_slot(bucket);
        table->looked_at++;
        if (slot < 0) {
            for (unsigned i = 0; i < FLOW_TABLE_SLOTS && n < FLOW_TABLE_SEARCH; i++) {
                uint32_t to = flow_table_other(table, bucket->signature[i], steps[at].bucket);
                bool known = false;
                for (unsigned k = 0; k < n && !known; k++)
                    known = steps[k].bucket == to;
                if (!known)
                    steps[n++] = (struct step){to, (int8_t)at, (uint8_t)i};
            }
            continue;
        }
        /* move the chain up, last link first */
        int node = (int)at;
        while (steps[node].parent >= 0) {
            struct flow_bucket *from = &table->buckets[steps[steps[node].parent].bucket];
            unsigned leaving = steps[node].slot;
            struct flow_bucket *to = &table->buckets[steps[node].bucket];
            to->signature[slot] = from->signature[leaving];
            to->value[slot] = from->value[leaving];
            slot = (int)leaving;
            node = steps[node].parent;
        }
        put(table, &table->buckets[steps[node].bucket], slot, hash, value);
        return true;
    }
    return false;
}

bool flow_table_insert(struct flow_table *table, uint32_t hash, uint32_t value)
{
    uint32_t at = flow_table_first(table, hash);
    for (int round = 0; round < 2; round++, at = flow_table_other(table, hash, at)) {
        int slot = free_slot(&table->buckets[at]);
        if (slot < 0)
            continue;
        table->looked_at += 1 + (unsigned)round;
        put(table, &table->buckets[at], slot, hash, value);
        return true;
    }
    return insert_by_moves(table, hash, value);
}

void flow_table_remove(struct flow_table *table, uint32_t hash, uint32_t value)
{
    uint32_t at = flow_table_first(table, hash);
    for (int round = 0; round < 2; round++, at = flow_table_other(table, hash, at)) {
        struct flow_bucket *bucket = &table->buckets[at];
        for (unsigned mask = flow_bucket_match(bucket, hash); mask; mask &= mask - 1) {
            unsigned slot = (unsigned)__builtin_ctz(mask);
            if (bucket->value[slot] == value) {
                bucket->value[slot] = FLOW_TABLE_NONE;
                table->entries--;
                return;
            }
        }
    }
}
