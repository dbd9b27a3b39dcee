/* SPDX-License-Identifier: Apache-2.0 */
#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_BYTES (2ull << 20)
#ifndef MAP_HUGE_2MB
#define MAP_HUGE_2MB (21 << 26) /* the host's default may be another size */
#endif

static uint64_t whole(uint64_t bytes, uint64_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

/* Below one huge page malloc does better; the tables of a small NAT are such. */
static int is_small(uint64_t bytes)
{
    return bytes < HUGE_BYTES;
}

void *memory_take(uint64_t bytes)
{
    if (is_small(bytes)) {
        uint64_t size = whole(bytes ? bytes : 1, 64);
        void *memory = aligned_alloc(64, size);
        return memory ? memset(memory, 0, size) : NULL;
    }
    uint64_t size = whole(bytes, HUGE_BYTES);
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB | MAP_POPULATE, -1, 0);
    if (memory != MAP_FAILED)
        return memory;
    /* one huge page more than needed, to begin at a boundary: only then can all of it be huge */
    uint8_t *raw = mmap(NULL, size + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    uint8_t *aligned = (uint8_t *)whole((uint64_t)(uintptr_t)raw, HUGE_BYTES);
    if (aligned > raw)
        munmap(raw, (size_t)(aligned - raw));
    munmap(aligned + size, (size_t)(raw + HUGE_BYTES - aligned));
    madvise(aligned, size, MADV_HUGEPAGE);
#ifdef MADV_POPULATE_WRITE
    if (madvise(aligned, size, MADV_POPULATE_WRITE) == 0)
        return aligned;
#endif
    for (uint64_t at = 0; at < size; at += 4096)
        *(volatile uint8_t *)(aligned + at) = 0;
    return aligned;
}

void memory_give(void *memory, uint64_t bytes)
{
    if (!memory)
        return;
    if (is_small(bytes))
        free(memory);
    else
        munmap(memory, whole(bytes, HUGE_BYTES));
}
