/* SPDX-License-Identifier: Apache-2.0
 *
 * A core of an instance that may stand by (role.h).
 */
#ifndef NAT_STANDBY_H
#define NAT_STANDBY_H

#include "nat.h"

/* What this core has made of the role so far. */
struct standby {
    uint32_t state;
    bool silent; /* not ACTIVE */
    uint64_t probe_left_ns, probe_at_ns, probe_next_ns;
    uint32_t announced, announce_left, announce_ms;
};

void standby_init(struct nat_core *core);
/* Follows the role; true: this core is silent now. Takes the time, as core_time does. */
bool standby_follow(struct nat_core *core, uint64_t now);
/* What a silent core makes of packets; `handed` ones were counted where they were received. */
void standby_burst(struct nat_core *core, struct nat_packet *packets, unsigned n, bool handed);
/* neighbour.c: announces each port's own address; asks on each port whether another one has it, as from no
 * MAC of ours. */
void neighbour_announce(struct nat_core *core);
void neighbour_probe(struct nat_core *core);
/* Whether a packet that has its verdict waits until it is known who carries; and what happens to those that
 * waited when it is another one. */
bool standby_keeps(const struct nat_core *core, const struct nat_packet *packet);
void standby_give_up(struct nat_core *core);
/* Probes and repeated announcements; whether there was anything to do. */
bool standby_step(struct nat_core *core);

#endif
