/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "replay.h"

#include <sys/resource.h>

#include "frames.h"

#define BUFFERS 1024u   /* as many as a receive ring has */
#define SLOW_NS 10000.0 /* a burst that is looked at: has the kernel run somebody else meanwhile? */

struct replay {
    const struct nat_api *api;
    struct nat_core *core;
    struct endpoints *all; /* of the known flows */
    uint32_t known, n_trace, at;
    uint8_t (*trace)[64];
    uint8_t *ports; /* of each frame of the trace */
    uint8_t (*buffers)[STRIDE];
    uint32_t buffer;
    uint64_t ahead; /* ns by which the core's clock is before ours */
    long switches;
};

static unsigned bucket_of(double value)
{
    const uint64_t ns = value > 0 ? (uint64_t)value : 0;
    if (ns < 64)
        return (unsigned)ns;
    const unsigned shift = 57u - (unsigned)__builtin_clzll(ns);
    const unsigned at = (shift + 1) * 64 + (unsigned)((ns >> shift) - 64);
    return at < REPLAY_BUCKETS ? at : REPLAY_BUCKETS - 1;
}

/* Whether the kernel has taken the CPU away since it was last asked. */
static bool interrupted(struct replay *r)
{
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    const bool yes = usage.ru_nivcsw != r->switches;
    r->switches = usage.ru_nivcsw;
    return yes;
}

static void note(struct replay *r, double took, struct replay_result *result)
{
    result->core_ns += took;
    result->cost[bucket_of(took)]++;
    if (took <= result->worst_ns || took < SLOW_NS)
        return;
    if (interrupted(r))
        result->interrupted++;
    else
        result->worst_ns = took;
}

static uint8_t *next_buffer(struct replay *r)
{
    r->buffer = (r->buffer + 1) % BUFFERS;
    return r->buffers[r->buffer] + 128;
}

/* Of an inside endpoint that nobody else has, to an address that says nothing. */
static void endpoints_of(uint32_t flow, uint8_t out[12])
{
    put32(out, INSIDE_FIRST + flow / SESSIONS_PER_HOST);
    put32(out + 4, 0x08080000u + (flow * 2654435761u >> 16));
    put16(out + 8, (uint16_t)(10000 + flow % SESSIONS_PER_HOST));
    put16(out + 10, 53);
}

static struct nat_packet new_packet(struct replay *r, uint32_t flow)
{
    uint8_t out[12];
    endpoints_of(flow, out);
    return packet_in(next_buffer(r), 1024, 0, out);
}

static struct nat_packet known_packet(struct replay *r)
{
    const uint32_t at = r->at++ & (r->n_trace - 1);
    uint8_t *data = next_buffer(r);
    memcpy(data, r->trace[at], sizeof r->trace[at]);
    return (struct nat_packet){.data = data,
                               .length = FRAME,
                               .segment = FRAME,
                               .capacity = 1024,
                               .headroom = VLAN_BYTES,
                               .port = r->ports[at]};
}

/* One turn of a worker's loop: a burst, which may be empty, and the core's own work. */
static double turn(struct replay *r, struct nat_packet *packets, unsigned n, bool swapped,
                   struct replay_result *result)
{
    const double start = clock_ns();
    if (swapped) {
        for (unsigned i = 0; i < n; i++)
            swap_one(&packets[i]);
    } else {
        r->api->burst(r->core, packets, n, (uint64_t)start + r->ahead);
        r->api->poll(r->core, (uint64_t)start + r->ahead);
    }
    const double end = clock_ns();
    note(r, end - start, result);
    result->bursts += n != 0;
    result->polls++;
    return end;
}

/* --- for Python --------------------------------------------------------------------------------------- */

struct replay *replay_create(const struct nat_api *api, struct nat_core *core, uint32_t known);
struct replay *replay_create(const struct nat_api *api, struct nat_core *core, uint32_t known)
{
    struct replay *r = calloc(1, sizeof *r);
    if (r == NULL)
        return NULL;
    r->api = api;
    r->core = core;
    r->known = known;
    for (r->n_trace = 1u << 16; r->n_trace < known && r->n_trace < 1u << 22;)
        r->n_trace *= 2;
    r->all = calloc(known ? known : 1, sizeof *r->all);
    r->trace = aligned_alloc(64, (size_t)r->n_trace * 64);
    r->ports = calloc(r->n_trace, 1);
    r->buffers = aligned_alloc(4096, (size_t)BUFFERS * STRIDE);
    if (r->all && r->trace && r->ports && r->buffers) {
        memset(r->buffers, 0, (size_t)BUFFERS * STRIDE);
        return r;
    }
    free(r->all), free(r->trace), free(r->ports), free(r->buffers), free(r);
    return NULL;
}

void replay_destroy(struct replay *r);
void replay_destroy(struct replay *r)
{
    free(r->all), free(r->trace), free(r->ports), free(r->buffers), free(r);
}

/* Opens flows, and learns the outside endpoints of those that are known ones. A flow for whose event there is
 * no room is tried again when there is: so the rate is that of the core and of whoever reads the events. */
void replay_open(struct replay *r, uint32_t first, uint32_t flows, struct replay_result *result);
void replay_open(struct replay *r, uint32_t first, uint32_t flows, struct replay_result *result)
{
    struct nat_packet packets[NAT_BURST];
    uint32_t flow[NAT_BURST], again[NAT_BURST];
    unsigned n_again = 0;
    const double start = clock_ns();

    interrupted(r);
    for (uint32_t at = 0; at < flows || n_again;) {
        unsigned n = 0;
        for (; n < n_again; n++)
            flow[n] = again[n];
        for (; n < NAT_BURST && at < flows; n++)
            flow[n] = first + at++;
        for (unsigned i = 0; i < n; i++)
            packets[i] = new_packet(r, flow[i]);
        turn(r, packets, n, false, result);
        n_again = 0;
        for (unsigned i = 0; i < n; i++) {
            if (packets[i].verdict == NAT_DROP_EVENTS_FULL) {
                again[n_again++] = flow[i];
                continue;
            }
            result->packets[1]++;
            if (packets[i].verdict != NAT_FORWARD) {
                result->refused[1]++;
                continue;
            }
            result->opened++;
            if (flow[i] >= r->known)
                continue;
            const uint8_t *ip = packets[i].data + ETH_BYTES;
            struct endpoints *e = &r->all[flow[i]];
            endpoints_of(flow[i], e->out);
            memcpy(e->in, ip + 16, 4);
            memcpy(e->in + 4, ip + 12, 4);
            memcpy(e->in + 8, ip + 22, 2);
            memcpy(e->in + 10, ip + 20, 2);
        }
    }
    result->wall_ns = clock_ns() - start;
}

/* Draws the trace of the known flows, all of which are open: as many ways out as in. Or, `unsolicited`, what
 * comes from outside to their external endpoints and was never asked for. */
void replay_draw(struct replay *r, unsigned order, bool unsolicited);
void replay_draw(struct replay *r, unsigned order, bool unsolicited)
{
    for (uint32_t i = 0; i < r->n_trace; i++) {
        const struct endpoints *e = &r->all[pick((enum order)order, r->known)];
        if (unsolicited) {
            struct endpoints forged = *e;
            put32(forged.in, 0x09090000u + (uint32_t)(next_random() & 0xffff));
            r->ports[i] = 1;
            make_frame(r->trace[i], 1, forged.in);
            continue;
        }
        r->ports[i] = next_random() >> 63;
        make_frame(r->trace[i], r->ports[i], r->ports[i] ? e->in : e->out);
    }
}

/* How many packets of a kind there are at `now` of which none has come yet; those that found no room are
 * lost. */
static unsigned due(double now, double start, double rate, uint64_t *next, uint64_t *lost)
{
    const uint64_t until = (uint64_t)((now - start) * rate / 1e9);
    if (until > *next + REPLAY_QUEUE) {
        *lost += until - *next - REPLAY_QUEUE;
        *next = until - REPLAY_QUEUE;
    }
    return until > *next + NAT_BURST ? NAT_BURST : (unsigned)(until - *next);
}

void replay_run(struct replay *r, const struct replay_phase *phase, struct replay_result *result);
void replay_run(struct replay *r, const struct replay_phase *phase, struct replay_result *result)
{
    struct nat_packet packets[2 * NAT_BURST];
    const double start = clock_ns(), end = start + phase->seconds * 1e9;
    uint64_t next[2] = {0, 0};
    double now = start;

    interrupted(r);
    while (now < end && !(phase->new_flows && next[1] >= phase->new_flows)) {
        unsigned n[2] = {0, 0};
        if (phase->has_known)
            n[0] = phase->known_rate > 0 ? due(now, start, phase->known_rate, &next[0], &result->lost[0])
                                         : NAT_BURST;
        if (phase->new_rate > 0)
            n[1] = due(now, start, phase->new_rate, &next[1], &result->lost[1]);
        for (unsigned i = 0; i < n[0]; i++)
            packets[i] = known_packet(r);
        for (unsigned i = 0; i < n[1]; i++)
            packets[n[0] + i] = new_packet(r, phase->new_first + (uint32_t)(next[1] + i));
        now = turn(r, packets, n[0] + n[1], phase->swap, result);
        for (unsigned kind = 0, i = 0; kind < 2; kind++) {
            const double rate = kind ? phase->new_rate : phase->known_rate;
            for (unsigned k = 0; k < n[kind]; k++, i++) {
                result->packets[kind]++;
                if (packets[i].verdict != NAT_FORWARD)
                    result->refused[kind]++;
                else if (kind)
                    result->opened++;
                if (rate > 0)
                    result->latency[kind][bucket_of(now - start - (double)(next[kind] + k) * 1e9 / rate)]++;
            }
            next[kind] += n[kind];
        }
    }
    result->wall_ns = now - start;
}

/* So many turns without packets, `step_ns` after each other for the core, which begins `ahead_ns` later than
 * it was. */
void replay_age(struct replay *r, uint64_t ahead_ns, uint64_t step_ns, uint32_t turns,
                struct replay_result *result);
void replay_age(struct replay *r, uint64_t ahead_ns, uint64_t step_ns, uint32_t turns,
                struct replay_result *result)
{
    const double start = clock_ns();
    r->ahead += ahead_ns;
    interrupted(r);
    for (uint32_t i = 0; i < turns; i++) {
        r->ahead += step_ns;
        turn(r, NULL, 0, false, result);
    }
    result->wall_ns += clock_ns() - start;
}

/* The longest time for which this machine, and not the kernel's own choice, holds up a loop that does
 * nothing. */
double replay_machine_worst(struct replay *r, double seconds);
double replay_machine_worst(struct replay *r, double seconds)
{
    double before = clock_ns(), worst = 0;
    const double end = before + seconds * 1e9;
    interrupted(r);
    while (before < end) {
        const double now = clock_ns();
        if (now - before > worst && (now - before < SLOW_NS || !interrupted(r)))
            worst = now - before;
        before = now;
    }
    return worst;
}
