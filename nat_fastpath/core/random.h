/* SPDX-License-Identifier: Apache-2.0
 *
 * Numbers that nobody can foresee (RFC 6056, RFC 7857 section 9): ChaCha20 (RFC 8439) in counter mode. Each
 * core has its own, keyed at the start: one draw is a load, and every sixteenth makes the next block.
 */
#ifndef RANDOM_H
#define RANDOM_H

#include <stdint.h>

struct random_source {
    uint32_t state[16]; /* constants, key, block counter (12, 13), nonce */
    uint32_t block[16];
    uint32_t used; /* words of the block that were handed out */
};

void random_start(struct random_source *source, const uint32_t key[8]);
/* The next 16 words; the counter moves on. */
void random_block(struct random_source *source);

static inline uint32_t random_draw(struct random_source *source)
{
    if (source->used == 16)
        random_block(source);
    return source->block[source->used++];
}

/* A draw as one of 0 to n-1; the bias is n / 2^32. */
static inline uint32_t random_scale(uint32_t draw, uint32_t n)
{
    return (uint32_t)((uint64_t)draw * n >> 32);
}

#endif
