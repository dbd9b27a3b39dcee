/* SPDX-License-Identifier: Apache-2.0
 *
 * Nanoseconds per packet of nat_burst on established sessions, and of the floor: the same loop over the same
 * buffers with parse and MAC swap only. The two take turns, round by round, so that both see the same
 * machine.
 *
 *   core SESSIONS ROUNDS out|in|both independent|dependent [aes] [parity] [preservation] [quarantine] [vlan]
 *
 * Frames are 64 bytes of UDP, each session with its own endpoints, in random order, in a ring of buffers that
 * is larger than the L2 cache. Prints one JSON object.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nat.h"
#include "random.h"
#include "wire.h"

#define RING 16384u /* buffers */
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

/* Parse and MAC swap: what any forwarder must do. */
static void __attribute__((noinline)) floor_burst(struct nat_packet *packets, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        struct nat_packet *p = &packets[i];
        uint8_t *d = p->data, mac[6];

        p->verdict = NAT_DROP_IP_HEADER;
        const uint8_t *ip = d + ETH_BYTES + (with.vlan ? VLAN_BYTES : 0);
        if (p->length < ETH_BYTES + IP_BYTES + UDP_BYTES || get16(ip - 2) != ETHERTYPE_IPV4 ||
            ip[0] != 0x45 || !sums_right(ip, IP_BYTES) || ip[9] != PROTO_UDP)
            continue;
        memcpy(mac, d, 6);
        memcpy(d, d + 6, 6);
        memcpy(d + 6, mac, 6);
        p->port ^= 1;
        p->verdict = NAT_FORWARD;
    }
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
    fprintf(stderr, "bench core: %s\n", why);
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

/* Ends all sessions. Returns ns per session. */
static double close_sessions(struct nat_core *core)
{
    static struct nat_record records[4096];
    static struct nat_event events[8192];
    double spent = 0, closed = 0;
    uint64_t cursor = 0;
    do {
        struct nat_command page = {
            .op = NAT_CMD_SESSIONS, .count = 4096, .cursor = cursor, .buffer = records};
        nat_command_now(core, &page);
        cursor = page.cursor;
        struct nat_command command = {.op = NAT_CMD_DELETE, .count = page.result, .buffer = records};
        const double start = clock_ns();
        nat_command_now(core, &command);
        spent += clock_ns() - start;
        closed += command.result;
        nat_events(core, events, 8192);
    } while (cursor);
    return closed ? spent / closed : 0;
}

/* What the choice of a port cannot be foreseen for: one draw of ChaCha20. */
static double draw_ns(void)
{
    struct random_source source;
    uint32_t sum = 0;
    random_start(&source, (const uint32_t[8]){1});
    const double start = clock_ns();
    for (unsigned i = 0; i < 1u << 20; i++)
        sum += random_below(&source, 64000);
    const double spent = clock_ns() - start;
    return sum ? spent / (1u << 20) : 0;
}

int main(int argc, char **argv)
{
    if (argc < 5)
        die("core SESSIONS ROUNDS out|in|both independent|dependent [OPTION ...]");
    for (int i = 5; i < argc; i++) {
        bool *option = !strcmp(argv[i], "aes")            ? &with.aes
                       : !strcmp(argv[i], "parity")       ? &with.parity
                       : !strcmp(argv[i], "preservation") ? &with.preservation
                       : !strcmp(argv[i], "quarantine")   ? &with.quarantine
                       : !strcmp(argv[i], "vlan")         ? &with.vlan
                                                          : NULL;
        if (option == NULL)
            die("an option is aes, parity, preservation, quarantine or vlan");
        *option = true;
    }
    const uint32_t sessions = (uint32_t)strtoul(argv[1], NULL, 10);
    const unsigned rounds = (unsigned)strtoul(argv[2], NULL, 10);
    const bool both = !strcmp(argv[3], "both"), inbound = !strcmp(argv[3], "in");
    const bool dependent = !strcmp(argv[4], "dependent");
    if (sessions == 0 || rounds == 0)
        die("SESSIONS and ROUNDS are at least 1");

    struct nat_memory memory;
    struct nat_core *core = make_core(sessions, dependent, &memory);
    struct endpoints *all = malloc(sessions * sizeof *all);
    uint8_t *ring = aligned_alloc(4096, (size_t)RING * STRIDE);
    struct nat_packet *packets = calloc(RING, sizeof *packets);
    double *ns[2] = {calloc(rounds, sizeof(double)), calloc(rounds, sizeof(double))};
    uint64_t now = 1000000000;
    if (!all || !ring || !packets || !ns[0] || !ns[1])
        die("no memory");
    const double new_ns = open_sessions(core, all, sessions, now);

    for (unsigned round = 0; round < 2 * rounds; round++) {
        for (unsigned i = 0; i < RING; i++) {
            const struct endpoints *e = &all[next_random() % sessions];
            const unsigned port = both ? next_random() >> 63 : inbound;
            uint8_t *data = ring + (size_t)i * STRIDE + 128;
            packets[i] = packet_in(data, 1024, port, port ? e->in : e->out);
        }
        const double start = clock_ns();
        for (unsigned i = 0; i < RING; i += NAT_BURST) {
            if (round & 1) {
                nat_burst(core, packets + i, NAT_BURST, now += 1000);
            } else {
                for (unsigned k = 0; k < NAT_BURST; k++)
                    __builtin_prefetch(packets[i + k].data);
                floor_burst(packets + i, NAT_BURST);
            }
        }
        ns[round & 1][round / 2] = (clock_ns() - start) / RING;
        for (unsigned i = 0; i < RING; i++)
            if (packets[i].verdict != NAT_FORWARD)
                die("a packet of an established session was not forwarded");
    }

    const double bytes = (double)(memory.sessions + memory.index + memory.mappings);
    printf("{\"sessions\": %" PRIu32 ", \"direction\": \"%s\", \"mapping\": \"%s\", ", sessions, argv[3],
           argv[4]);
    report("nat_ns", ns[1], rounds);
    report("floor_ns", ns[0], rounds);
    printf("\"ratio\": %.2f, \"new_session_ns\": %.1f, \"close_ns\": %.1f, \"draw_ns\": %.2f, "
           "\"bytes_per_session\": %.1f}\n",
           ns[1][rounds / 2] / ns[0][rounds / 2], new_ns, close_sessions(core), draw_ns(),
           bytes / (sessions + sessions / 8 + 64));
    nat_destroy(core);
    free(all);
    free(ring);
    free(packets);
    free(ns[0]);
    free(ns[1]);
    return 0;
}
