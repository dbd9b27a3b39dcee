/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames of sessions, which of them comes next, and clocks: what all measurements in C have in common. The
 * addresses are those of bench/nat.py.
 */
#ifndef FRAMES_H
#define FRAMES_H

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nat.h"
#include "wire.h"

#define RING 16384u /* buffers: more than the L2 cache holds */
#define STRIDE 2048u
#define FRAME 60u /* without the checksum of Ethernet */
#define SESSIONS_PER_HOST 16u
#define INSIDE_FIRST 0x0a000100u /* 10.0.1.0 on */
#define POOL_FIRST 0xc6336500u   /* 198.51.101.0 on */
#define PORTS_PER_ADDRESS 64000u

static const uint8_t our_mac[2][6] = {{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}};
static const uint8_t router_mac[2][6] = {{2, 0, 0, 0, 0, 0xf1}, {2, 0, 0, 0, 0, 0xf2}};

/* The bytes that differ from session to session: addresses and ports of both directions, as on the wire. */
struct endpoints {
    uint8_t out[12], in[12];
};

static uint64_t random_state = 88172645463325252u;
static inline uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

static inline double clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* ns of so many additions, each waiting for the one before: how fast this CPU is just now. The best of a few:
 * an interrupt is no speed. */
#define PROBE_ADDITIONS 100000u
#define PROBES 3u
static inline double probe_ns(void)
{
    double best = 0;
    for (unsigned turn = 0; turn < PROBES; turn++) {
        const double start = clock_ns();
        uint64_t sum = 0;
        for (unsigned i = 0; i < PROBE_ADDITIONS; i++) {
            sum += i;
            __asm__ volatile("" : "+r"(sum));
        }
        const double spent = clock_ns() - start;
        best = turn && best < spent ? best : spent;
    }
    return best;
}

static struct {
    bool aes, parity, preservation, quarantine, vlan, small_pages;
} with;

/* Returns the length: FRAME, or four bytes more with a tag. */
static inline uint32_t make_frame(uint8_t *f, unsigned port, const uint8_t endpoints[12])
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

static inline struct nat_packet packet_in(uint8_t *data, uint16_t capacity, unsigned port,
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

/* --- which session comes next ------------------------------------------------------------------------- */

enum order { ORDER_UNIFORM, ORDER_ZIPF, ORDER_SEQUENTIAL };

/* Parse and MAC swap: what any forwarder must do. */
static inline __attribute__((always_inline)) void swap_one(struct nat_packet *p)
{
    uint8_t *d = p->data, mac[6];

    p->verdict = NAT_DROP_IP_HEADER;
    const uint8_t *ip = d + ETH_BYTES + (with.vlan ? VLAN_BYTES : 0);
    if (p->length < ETH_BYTES + IP_BYTES + UDP_BYTES || get16(ip - 2) != ETHERTYPE_IPV4 || ip[0] != 0x45 ||
        !sums_right(ip, IP_BYTES) || ip[9] != PROTO_UDP)
        return;
    memcpy(mac, d, 6);
    memcpy(d, d + 6, 6);
    memcpy(d + 6, mac, 6);
    p->port ^= 1;
    p->verdict = NAT_FORWARD;
}

/* Zipf with exponent 1: rank r has a share of 1 / (r ln N). Neighbours in rank are not neighbours in memory.
 */
static inline uint32_t pick(enum order order, uint32_t sessions)
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
