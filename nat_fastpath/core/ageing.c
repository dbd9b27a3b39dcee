/* SPDX-License-Identifier: Apache-2.0
 *
 * Sessions end when they have been idle for their timeout. A sweep walks the hot lines in order, a few per
 * step: reading memory in order costs 2 ns a session, chasing timer lists ten times that.
 */
#include "sessions.h"

#define SWEEP_PERIOD_NS                                                                                      \
    1000000000ull        /* the whole table is seen once in this time, so a timeout is late by no more */
#define SWEEP_STEP 1024u /* sessions looked at in one step at most */
#define CLOSE_STEP 32u   /* and closed at most, which is dearer: END_BATCH at a time */
#define WAKE_STEP 256u   /* more than can be freed in one step, so that no rest is long for want of waking */

static bool expired(const struct nat_core *core, const struct session *s)
{
    return s->protocol && !(s->flags & NAT_SESSION_FOREIGN) &&
           core->now_ms - s->last_ms >= core->timeout_ms[s->timer];
}

/* The next ones that have expired, up to END_BATCH and the end of the table. */
static unsigned find_expired(struct nat_core *core, uint32_t *look, uint32_t *found)
{
    unsigned n = 0;
    if (core->sweep_at >= core->session_slab.top)
        core->sweep_at = 0;
    for (; *look && n < END_BATCH && core->sweep_at < core->session_slab.top; --*look, core->sweep_at++)
        if (expired(core, &core->sessions[core->sweep_at]))
            found[n++] = core->sweep_at;
    return n;
}

/* Looks at up to `look` sessions; returns how many it closed. Stays at one that it could not close. */
static unsigned sweep(struct nat_core *core, uint32_t look, unsigned close)
{
    unsigned closed = 0;
    uint32_t found[END_BATCH];
    while (look && core->session_slab.top && closed < close) {
        const unsigned n = find_expired(core, &look, found);
        sessions_expect_end(core, found, n);
        for (unsigned i = 0; i < n; i++) {
            if (!session_close(core, found[i], NAT_CLOSE_IDLE)) {
                core->sweep_at = found[i];
                return closed;
            }
            closed++;
        }
    }
    return closed;
}

bool ageing_step(struct nat_core *core)
{
    unsigned did = pool_wake(&core->pool, core->now_ns / 1000000, WAKE_STEP);
    uint64_t elapsed = core->now_ns - core->sweep_ns;
    uint64_t due =
        (elapsed < SWEEP_PERIOD_NS ? elapsed : SWEEP_PERIOD_NS) * core->session_slab.top / SWEEP_PERIOD_NS;
    if (due) {
        core->sweep_ns = core->now_ns;
        did += sweep(core, due < SWEEP_STEP ? (uint32_t)due : SWEEP_STEP, CLOSE_STEP);
    }
    return did;
}

void nat_settle(struct nat_core *core, uint64_t now)
{
    core_time(core, now);
    core->sweep_at = 0;
    sweep(core, core->session_slab.top, NONE32);
    pool_wake(&core->pool, now / 1000000, NONE32);
    core->sweep_ns = now;
    nat_poll(core, now);
}
