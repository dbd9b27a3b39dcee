/* SPDX-License-Identifier: Apache-2.0
 *
 * What the heartbeat does with the role of two servers: tells it, and takes over.
 */
#ifndef HEARTBEAT_ROLE_H
#define HEARTBEAT_ROLE_H

#include "heartbeat.h"
#include "role.h"

/* At the other one's death; a role that somebody has changed already stays. An end of TCP while heartbeats
 * come may be the connection's alone: then the ports are asked in any case. */
static void role_take_over(struct nat_role *role, enum hb_reason reason, uint32_t at_death,
                           uint32_t peer_term)
{
    uint32_t standby = NAT_ROLE_STANDBY;
    if (reason == HB_TCP_END && at_death == NAT_ROLE_ACTIVE)
        at_death = NAT_ROLE_PROBING;
    if (!role || at_death == NAT_ROLE_STANDBY || __atomic_load_n(&role->state, __ATOMIC_RELAXED) != standby)
        return;
    const uint32_t term = __atomic_load_n(&role->term, __ATOMIC_RELAXED);
    __atomic_store_n(&role->term, (term > peer_term ? term : peer_term) + 1, __ATOMIC_RELAXED);
    __atomic_compare_exchange_n(&role->state, &standby, at_death, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

/* `heard`: the other one is. Of several workers the others go on, and would answer it when it asks; so who
 * has one that stands still is silent before the other one decides. */
static void role_tell(struct nat_role *role, struct hb_packet *packet, bool heard)
{
    if (!role)
        return;
    uint32_t active = NAT_ROLE_ACTIVE;
    if (heard && packet->flags & HB_STALLED && __atomic_load_n(&role->yields, __ATOMIC_RELAXED))
        __atomic_compare_exchange_n(&role->state, &active, NAT_ROLE_STANDBY, false, __ATOMIC_RELEASE,
                                    __ATOMIC_RELAXED);
    packet->flags |= __atomic_load_n(&role->both, __ATOMIC_RELAXED) ? HB_BOTH : 0;
    packet->flags |= __atomic_load_n(&role->state, __ATOMIC_ACQUIRE) == NAT_ROLE_ACTIVE ? HB_CARRIES : 0;
    packet->flags |= __atomic_load_n(&role->unfit, __ATOMIC_RELAXED) ? HB_UNFIT : 0;
    packet->term = __atomic_load_n(&role->term, __ATOMIC_RELAXED);
}

/* Who carries says so again once the other one does not any more: what that has sent last has taught the
 * switches where it is. */
static void role_hear(struct nat_role *role, struct hb_stats *stats, const struct hb_packet *packet)
{
    if (role && stats->peer_carries && !(packet->flags & HB_CARRIES))
        __atomic_add_fetch(&role->announce, 1, __ATOMIC_RELAXED);
    stats->peer_term = packet->term;
    stats->peer_carries = !!(packet->flags & HB_CARRIES);
    stats->peer_unfit = !!(packet->flags & HB_UNFIT);
    stats->peer_both = !!(packet->flags & HB_BOTH);
    stats->peer_silence_us = packet->silence_us;
}

#endif
