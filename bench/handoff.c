/* SPDX-License-Identifier: Apache-2.0
 *
 * What it costs to find whose packet a frame is, and to give it to that core through a ring: both ends of the
 * ring in one thread, so without the time that a cache line needs from one core to the other.
 */
#include <rte_ring.h>

#include "frames.h"

#define SLOTS 4096u

/* Per packet; negative without memory. */
double handoff_ns(unsigned packets);
double handoff_ns(unsigned packets)
{
    static uint8_t frames[NAT_BURST][64];
    const ssize_t bytes = rte_ring_get_memsize(SLOTS);
    struct rte_ring *ring = bytes < 0 ? NULL : aligned_alloc(64, ((size_t)bytes + 63) & ~(size_t)63);
    void *objects[NAT_BURST];
    unsigned sum = 0;

    if (ring == NULL || rte_ring_init(ring, "handoff", SLOTS, RING_F_SC_DEQ) != 0)
        return -1;
    for (unsigned i = 0; i < NAT_BURST; i++) {
        uint8_t out[12] = {10, 0, 1, (uint8_t)i, 8, 8, 0, 1, 0x27, 0x10, 0, 53};
        make_frame(frames[i], 0, out);
        objects[i] = frames[i];
    }
    const double start = clock_ns();
    for (unsigned at = 0; at < packets; at += NAT_BURST) {
        for (unsigned i = 0; i < NAT_BURST; i++)
            sum += nat_slice_of(frames[i], FRAME, NAT_INTERNAL, 2);
        rte_ring_enqueue_burst(ring, objects, NAT_BURST, NULL);
        sum += rte_ring_dequeue_burst(ring, objects, NAT_BURST, NULL);
    }
    const double took = clock_ns() - start;
    free(ring);
    return sum ? took / packets : -1;
}
