/* SPDX-License-Identifier: Apache-2.0
 *
 * A core that knows sessions, and frames of theirs: what the measurements of the core have in common.
 */
#ifndef KNOWN_H
#define KNOWN_H

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nat.h"
#include "random.h"
#include "wire.h"

#define RING 16384u /* buffers: more than the L2 cache holds */
#define STRIDE 2048u
#define FRAME 60u /* without the checksum of Ethernet */
#define SESSIONS_PER_HOST 16u
#define INSIDE_FIRST 0x0a000100u /* 10.0.1.0 on */
#define POOL_FIRST 0xc6336500u   /* 198.51.101.0 on */
#define PORTS_PER_ADDRESS 64000u

static const uint8_t our_mac[2][6] = {{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}};
static const uint8_t router_mac[2][6] = {{2, 0, 0, 0, 1, 1}, {2, 0, 0, 0, 1, 2}};

/* The bytes that differ from session to session: addresses and ports of both directions, as on the wire. */
struct endpoints {
    uint8_t out[12], in[12];
};

static uint64_t random_state = 88172645463325252u;
static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

static double clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static struct {
    bool aes, parity, preservation, quarantine, vlan;
} with;

/* Returns the length: FRAME, or four bytes more with a tag. */
static uint32_t make_frame(uint8_t *f, unsigned port, const uint8_t endpoints[12])
{
    memset(f, 0, FRAME);
    memcpy(f, our_mac[port], 6);
    memcpy(f + 6, router_mac[port], 6);
    put16(f + 12, 0x0800);
    f[14] = 0x45;
    put16(f + 16, FRAME - 14);
    f[22] = 64;
    f[23] = 17;
    memcpy(f + 26, endpoints, 12);
    put_raw16(f + 24, checksum(f + 14, IP_BYTES));
    put16(f + 38, FRAME - 34);
    /* the pseudo-header's protocol and length stand where the header ends, for the time of the sum */
    put16(f + 40, 17 + FRAME - 34);
    put_raw16(f + 40, checksum(f + 26, FRAME - 26));
    if (!with.vlan)
        return FRAME;
    memmove(f + 16, f + 12, FRAME - 12);
    put16(f + 12, ETHERTYPE_VLAN);
    put16(f + 14, 100 + port);
    return FRAME + VLAN_BYTES;
}

static struct nat_packet packet_in(uint8_t *data, uint16_t capacity, unsigned port,
                                   const uint8_t endpoints[12])
{
    const uint32_t length = make_frame(data, port, endpoints);
    return (struct nat_packet){.data = data,
                               .length = length,
                               .segment = length,
                               .capacity = capacity,
                               .headroom = VLAN_BYTES,
                               .port = (uint8_t)port};
}

static int compare(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static void report(const char *name, double *ns, unsigned n)
{
    qsort(ns, n, sizeof *ns, compare);
    printf("\"%s\": {\"median\": %.2f, \"min\": %.2f, \"max\": %.2f}, ", name, ns[n / 2], ns[0], ns[n - 1]);
}

static void die(const char *why)
{
    fprintf(stderr, "bench: %s\n", why);
    exit(1);
}

static struct nat_core *make_core(uint32_t sessions, bool dependent, struct nat_memory *memory)
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
static double open_sessions(struct nat_core *core, struct endpoints *all, uint32_t sessions, uint64_t now)
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

/* --- which session comes next ------------------------------------------------------------------------- */

enum order { ORDER_UNIFORM, ORDER_ZIPF, ORDER_SEQUENTIAL };

/* Zipf with exponent 1: rank r has a share of 1 / (r ln N). Neighbours in rank are not neighbours in memory.
 */
static uint32_t pick(enum order order, uint32_t sessions)
{
    static uint32_t turn;
    if (order == ORDER_SEQUENTIAL)
        return turn++ % sessions;
    if (order == ORDER_UNIFORM)
        return (uint32_t)(next_random() % sessions);
    const double u = (double)(next_random() >> 11) * 0x1p-53;
    const uint64_t rank = (uint64_t)(exp(u * log((double)sessions + 1)) - 1);
    return (uint32_t)(rank * 2654435761u % sessions);
}

#endif
