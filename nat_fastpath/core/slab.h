/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SLAB_H
#define SLAB_H

#include <stdbool.h>
#include <stdint.h>

#define NONE32 UINT32_MAX

/* A record array with a free list threaded through it and a high-water mark: no slot is touched before use.
 */
struct slab {
    uint32_t capacity, used, top, free; /* free: NONE32 ends the list */
};

/* `link` reads or writes the field that threads the free list of that record type. */
#define SLAB_TAKE(slab, records, link)                                                                       \
    ({                                                                                                       \
        uint32_t slab_at_ = NONE32;                                                                          \
        if ((slab)->free != NONE32) {                                                                        \
            slab_at_ = (slab)->free;                                                                         \
            (slab)->free = (records)[slab_at_].link;                                                         \
            (slab)->used++;                                                                                  \
        } else if ((slab)->top < (slab)->capacity) {                                                         \
            slab_at_ = (slab)->top++;                                                                        \
            (slab)->used++;                                                                                  \
        }                                                                                                    \
        slab_at_;                                                                                            \
    })
#define SLAB_GIVE(slab, records, link, at)                                                                   \
    do {                                                                                                     \
        (records)[at].link = (slab)->free;                                                                   \
        (slab)->free = (at);                                                                                 \
        (slab)->used--;                                                                                      \
    } while (0)
static inline bool slab_full(const struct slab *slab)
{
    return slab->used == slab->capacity;
}

#endif
