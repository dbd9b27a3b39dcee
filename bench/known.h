/* SPDX-License-Identifier: Apache-2.0
 *
 * A core that knows sessions, and frames of theirs: what the measurements of the core have in common.
 */
#ifndef KNOWN_H
#define KNOWN_H

#include "frames.h"
#include "random.h"

static inline int compare(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static inline void report(const char *name, double *ns, unsigned n)
{
    qsort(ns, n, sizeof *ns, compare);
    printf("\"%s\": {\"median\": %.2f, \"min\": %.2f, \"max\": %.2f, \"quarter\": %.2f, \"three_quarters\": "
           "%.2f}, ",
           name, ns[n / 2], ns[0], ns[n - 1], ns[n / 4], ns[3 * n / 4]);
}

#define SLOW 1.15 /* times: probes that are further apart are of different speeds of the core */

static inline bool is_speed(const double around[2], double reference)
{
    return around[0] >= reference && around[1] >= reference && around[0] <= SLOW * reference &&
           around[1] <= SLOW * reference;
}

/* Moves the rounds at the CPU's prevailing speed to the front of each series: it has several, which its
 * neighbours change. Returns how many these are. None: all stay, and `drowned` says that they are worth
 * nothing. `speed` are the probes before each round, and one after the last. */
static inline unsigned calm_rounds(const double *speed, unsigned rounds, double *const *series, unsigned n,
                                   bool *drowned)
{
    double reference = 0;
    unsigned most = 0, kept = 0;
    for (unsigned i = 0; i <= rounds; i++) {
        unsigned alike = 0;
        for (unsigned k = 0; k < rounds; k++)
            alike += is_speed(speed + k, speed[i]);
        if (alike > most || (alike == most && speed[i] < reference)) {
            most = alike;
            reference = speed[i];
        }
    }
    for (unsigned i = 0; most && i < rounds; i++) {
        if (!is_speed(speed + i, reference))
            continue;
        for (unsigned k = 0; k < n; k++)
            series[k][kept] = series[k][i];
        kept++;
    }
    *drowned = kept == 0;
    return kept ? kept : rounds;
}

static inline void die(const char *why)
{
    fprintf(stderr, "bench: %s\n", why);
    exit(1);
}

static inline struct nat_core *make_core(uint32_t sessions, bool dependent, struct nat_memory *memory)
{
    static struct nat_config c;
    char error[256];
    c.abi = NAT_ABI;
    c.n_ports = 2;
    c.mapping = dependent ? NAT_MAPPING_ENDPOINT_DEPENDENT : NAT_MAPPING_ENDPOINT_INDEPENDENT;
    c.max_sessions = sessions + sessions / 8 + 64;
    c.max_hosts = sessions / SESSIONS_PER_HOST + 64;
    c.max_neighbours = 64;
    c.max_held = 64;
    c.event_ring = 65536;
    c.hold_ms = 1000;
    c.flow_hash = with.aes ? NAT_HASH_AES : NAT_HASH_FNV;
    c.port_parity = with.parity;
    c.port_preservation = with.preservation;
    c.quarantine_ms = with.quarantine ? 120000 : 0;
    c.timeout_udp_ms = c.timeout_tcp_established_ms = c.timeout_tcp_transitory_ms = c.timeout_icmp_ms =
        3600000;
    c.seed = 1;
    for (unsigned i = 0; i < 2; i++) {
        c.ports[i] = (struct nat_port_config){.side = (uint8_t)i,
                                              .address = i ? 0xc6336401u : 0x0a000001u,
                                              .mtu = 1500,
                                              .vlan = (uint16_t)(with.vlan ? 100 + i : 0)};
        memcpy(c.ports[i].mac, our_mac[i], 6);
        c.routes[i] = (struct nat_route_config){.prefix = i ? 0 : 0x0a000000u,
                                                .length = i ? 0 : 8,
                                                .port = (uint8_t)i,
                                                .gateway = i ? 0xc63364feu : 0x0a0000feu,
                                                .has_mac = 1};
        memcpy(c.routes[i].mac, router_mac[i], 6);
    }
    c.n_routes = 2;
    c.pool[0] = (struct nat_pool_range){POOL_FIRST,
                                        POOL_FIRST + sessions / (PORTS_PER_ADDRESS / 2) + 1,
                                        65535 - PORTS_PER_ADDRESS,
                                        65534,
                                        65535 - PORTS_PER_ADDRESS,
                                        65534};
    c.n_pool = 1;
    struct nat_core *core = nat_create(&c, error, sizeof error);
    if (core == NULL)
        die(error);
    nat_memory_for(&c, memory);
    return core;
}

/* Opens all sessions, and learns their outside endpoints from what comes out. Returns ns per new session. */
static inline double open_sessions(struct nat_core *core, struct endpoints *all, uint32_t sessions,
                                   uint64_t now)
{
    static uint8_t frames[NAT_BURST][192];
    static struct nat_event events[4096];
    struct nat_packet packets[NAT_BURST];
    double spent = 0;

    for (uint32_t at = 0; at < sessions; at += NAT_BURST) {
        const unsigned n = sessions - at < NAT_BURST ? sessions - at : NAT_BURST;
        for (unsigned i = 0; i < n; i++) {
            struct endpoints *e = &all[at + i];
            put32(e->out, INSIDE_FIRST + (at + i) / SESSIONS_PER_HOST);
            put32(e->out + 4, 0x08080000u + (uint32_t)(next_random() & 0xffff));
            put16(e->out + 8, 10000 + (at + i) % SESSIONS_PER_HOST);
            put16(e->out + 10, 53);
            packets[i] = packet_in(frames[i] + 64, 128, 0, e->out);
        }
        const double start = clock_ns();
        nat_burst(core, packets, n, now);
        spent += clock_ns() - start;
        for (unsigned i = 0; i < n; i++) {
            struct endpoints *e = &all[at + i];
            if (packets[i].verdict != NAT_FORWARD)
                die("a session could not be opened");
            const uint8_t *ip = packets[i].data + packets[i].length - (FRAME - ETH_BYTES);
            memcpy(e->in, ip + 16, 4);
            memcpy(e->in + 4, ip + 12, 4);
            memcpy(e->in + 8, ip + 22, 2);
            memcpy(e->in + 10, ip + 20, 2);
        }
        if (at % 4096 == 0)
            while (nat_events(core, events, 4096) == 4096)
                ;
    }
    return spent / sessions;
}

#endif
