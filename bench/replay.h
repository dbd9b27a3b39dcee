/* SPDX-License-Identifier: Apache-2.0
 *
 * The cheapest device that there can be: in this process, frames are copied from a trace into buffers, go
 * through a core as a worker gives them to it, and are forgotten. So what is measured is the core, with the
 * clock, the polls and the copying that every device has.
 */
#ifndef REPLAY_H
#define REPLAY_H

#include <stdbool.h>
#include <stdint.h>

#define REPLAY_BUCKETS 2304u /* of a histogram: 64 to each power of two, nanoseconds */
#define REPLAY_QUEUE                                                                                         \
    1024u /* packets that wait at most, as in a device's receive ring; what comes then is lost */

/* Of `known` flows packets come at known_rate per second (0: one burst after the other), and new ones from
 * new_first on at new_rate. */
struct replay_phase {
    double seconds, known_rate, new_rate;
    uint32_t new_first, new_flows; /* of which the phase ends when all have begun; 0: by time only */
    bool has_known;
    bool swap; /* parse and MAC swap instead of the core: what the device itself costs */
};

struct replay_result {
    uint64_t packets[2], lost[2], refused[2]; /* known, new; refused: by the core */
    uint64_t opened;
    double core_ns, wall_ns; /* within burst and poll, and in all */
    double worst_ns;         /* burst, or poll, that nobody interrupted */
    uint64_t bursts, polls, interrupted;
    uint64_t latency[2][REPLAY_BUCKETS]; /* from when a packet was due to when its burst was done */
    uint64_t cost[REPLAY_BUCKETS];       /* of each burst with its poll */
};

#endif
