/* SPDX-License-Identifier: Apache-2.0
 *
 * Zeroed memory for the tables: in huge pages where the host has them, otherwise in pages that the kernel may
 * make huge; present from the start, so that no packet ever waits for a page fault.
 */
#ifndef MEMORY_H
#define MEMORY_H

#include <stdint.h>

/* NULL when there is none. Aligned to a cache line at least. */
void *memory_take(uint64_t bytes);
/* `bytes` as they were asked for; NULL is let through. */
void memory_give(void *memory, uint64_t bytes);

#endif
