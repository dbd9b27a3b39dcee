/* SPDX-License-Identifier: Apache-2.0
 *
 * Two servers share their addresses and one MAC, and one of them carries. What they are is a few words of
 * memory that all cores of an instance, its heartbeat and its control side share: whoever changes `state` has
 * changed it for all of them, within a turn of their loops. All of it is read and written atomically.
 */
#ifndef NAT_ROLE_H
#define NAT_ROLE_H

#include <stdint.h>

enum nat_role_state {
    NAT_ROLE_ACTIVE = 0,  /* carries, and answers for the addresses */
    NAT_ROLE_STANDBY = 1, /* holds the sessions; sends nothing, answers nothing */
    NAT_ROLE_PROBING = 2, /* as STANDBY, and asks on all ports whether another one answers: if so it becomes
                             STANDBY, if none does in time ACTIVE */
};

struct nat_role {
    uint32_t state;    /* enum nat_role_state */
    uint32_t term;     /* counts takeovers, over both: of two that carry the one with the higher one stays */
    uint32_t probe_us; /* that nobody answers */
    uint32_t fence_us; /* a core that carries, and has not been polled for so long, probes first; 0: never */
    uint32_t answered; /* how often a probe was */
    uint32_t unanswered; /* and was not */
    uint32_t fenced;     /* how often a core had not been polled for so long */
    uint32_t announce;   /* counts up: who carries shall say so again */
    uint32_t unfit;      /* not 0: it should not carry, since a port has no link; the heartbeat tells */
    uint32_t yields; /* not 0: the other one can carry, so a worker that stands still is reason to stand by */
    uint32_t both;   /* not 0: a death is believed without asking on the ports; the heartbeat tells */
};

#endif
