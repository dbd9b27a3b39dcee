/* SPDX-License-Identifier: Apache-2.0 */
#include "random.h"

#include <string.h>

/* One row of ChaCha's four by four state: the compiler makes one SSE or NEON operation of each line. */
typedef uint32_t row __attribute__((vector_size(16)));

#define ROTATE(v, n) ((v) << (n) | (v) >> (32 - (n)))
#define TURN(v, a, b, c, d) __builtin_shufflevector(v, v, a, b, c, d)

static inline void quarter_rounds(row r[4])
{
    r[0] += r[1];
    r[3] = ROTATE(r[3] ^ r[0], 16);
    r[2] += r[3];
    r[1] = ROTATE(r[1] ^ r[2], 12);
    r[0] += r[1];
    r[3] = ROTATE(r[3] ^ r[0], 8);
    r[2] += r[3];
    r[1] = ROTATE(r[1] ^ r[2], 7);
}

void random_block(struct random_source *source)
{
    row start[4], r[4];
    memcpy(start, source->state, sizeof start);
    memcpy(r, start, sizeof r);
    for (unsigned i = 0; i < 10; i++) {
        quarter_rounds(r); /* columns */
        r[1] = TURN(r[1], 1, 2, 3, 0);
        r[2] = TURN(r[2], 2, 3, 0, 1);
        r[3] = TURN(r[3], 3, 0, 1, 2);
        quarter_rounds(r); /* diagonals */
        r[1] = TURN(r[1], 3, 0, 1, 2);
        r[2] = TURN(r[2], 2, 3, 0, 1);
        r[3] = TURN(r[3], 1, 2, 3, 0);
    }
    for (unsigned i = 0; i < 4; i++)
        r[i] += start[i];
    memcpy(source->block, r, sizeof r);
    source->used = 0;
    if (!++source->state[12])
        source->state[13]++;
}

void random_start(struct random_source *source, const uint32_t key[8])
{
    *source = (struct random_source){.state = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}, .used = 16};
    memcpy(source->state + 4, key, 8 * sizeof *key);
}
