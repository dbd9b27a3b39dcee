/* SPDX-License-Identifier: Apache-2.0 */
#include "pktgen.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_byteorder.h>
#include <rte_cycles.h>
#include <rte_ethdev.h>
#include <rte_malloc.h>
#include <rte_mbuf.h>

#define BURST 32u
#define STEP_NS 100000000u
#define ETH 14u
#define IP 20u
#define UDP 8u
#define PAYLOAD (ETH + IP + UDP)
#define MAGIC 0x5447u
#define TTL 64u
#define SOURCE_PORT_FIRST 1024u
#define WATCHED 65536u /* flows whose order is watched */

/* Behind the UDP header, as the machine has it: both ends are this process. */
struct mark {
    uint16_t magic;
    uint32_t flow;
    uint32_t sequence;
    uint64_t due; /* cycles */
} __attribute__((packed));
_Static_assert(PAYLOAD + sizeof(struct mark) == PKTGEN_LEAST_FRAME, "the mark fills the least frame");

struct endpoints {
    uint32_t address[2]; /* inside, remote; host order */
    uint16_t port[2];
};

struct pktgen {
    struct pktgen_config config;
    atomic_bool stop;
    double cycles_per_ns;
    uint64_t *mapping; /* of each flow */
    uint32_t *owner;   /* of each external endpoint: flow + 1 */
    uint64_t owners;
    uint32_t *sequence[2]; /* next one to send, of the watched flows, by direction */
    uint32_t *seen[2];     /* highest + 1 that has come */
    uint64_t random;
    uint32_t turn;
};

static uint64_t next_random(struct pktgen *g)
{
    g->random ^= g->random << 13;
    g->random ^= g->random >> 7;
    return g->random ^= g->random << 17;
}

static uint32_t below(struct pktgen *g, uint32_t bound)
{
    return (uint32_t)((next_random(g) >> 32) * bound >> 32);
}

/* --- bytes -------------------------------------------------------------------------------------------- */

static void put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
    put16(p, (uint16_t)(v >> 16));
    put16(p + 2, (uint16_t)v);
}

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static uint32_t sum_of(const uint8_t *p, unsigned bytes, uint32_t sum)
{
    uint64_t wide = sum;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t v;
        memcpy(&v, p, sizeof v);
        wide += (v & 0xffffffffu) + (v >> 32);
    }
    for (; bytes >= 2; bytes -= 2, p += 2) {
        uint16_t v;
        memcpy(&v, p, sizeof v);
        wide += v;
    }
    if (bytes)
        wide += *p;
    while (wide >> 16)
        wide = (wide & 0xffff) + (wide >> 16);
    return (uint32_t)wide;
}

/* --- flows -------------------------------------------------------------------------------------------- */

static struct endpoints endpoints_of(const struct pktgen_config *c, uint32_t flow)
{
    const uint32_t host = flow / c->flows_per_host, nth = flow % c->flows_per_host;
    return (struct endpoints){
        .address = {c->inside_first + host, c->remote_first + (uint32_t)(flow * 2654435761u) % c->remotes},
        .port = {(uint16_t)(SOURCE_PORT_FIRST + nth), c->remote_port},
    };
}

/* Zipf with exponent 1 over ranks; neighbours in rank are not neighbours in number. */
static uint32_t zipf(struct pktgen *g, uint32_t flows)
{
    const double u = (double)(next_random(g) >> 11) * 0x1p-53;
    return (uint32_t)((uint64_t)(exp(u * log((double)flows + 1)) - 1) * 2654435761u % flows);
}

static uint32_t choose(struct pktgen *g, const struct pktgen_phase *phase, uint64_t number)
{
    if (phase->only != NULL)
        return phase->only[number % phase->flows];
    switch (phase->order) {
    case PKTGEN_RANDOM:
        return phase->first_flow + below(g, phase->flows);
    case PKTGEN_ZIPF:
        return phase->first_flow + zipf(g, phase->flows);
    case PKTGEN_EACH_ONCE: /* a permutation, unless the prime divides the number of flows */
        return phase->first_flow + (uint32_t)(number * 2654435761u % phase->flows);
    default:
        return phase->first_flow + (uint32_t)(number % phase->flows);
    }
}

/* --- sending ------------------------------------------------------------------------------------------ */

static void write_frame(const struct pktgen *g, uint8_t *d, uint16_t bytes, unsigned from, uint32_t source,
                        uint16_t source_port, uint32_t destination, uint16_t destination_port,
                        const struct mark *mark)
{
    const uint16_t total = (uint16_t)(bytes - ETH), udp = (uint16_t)(total - IP);
    memcpy(d, g->config.nat_mac[from], 6);
    memcpy(d + 6, g->config.mac[from], 6);
    put16(d + 12, RTE_ETHER_TYPE_IPV4);
    uint8_t *ip = d + ETH, *l4 = ip + IP;
    memcpy(ip, (const uint8_t[IP]){0x45, 0, 0, 0, 0, 0, 0x40, 0, TTL, IPPROTO_UDP}, IP);
    put16(ip + 2, total);
    put32(ip + 12, source);
    put32(ip + 16, destination);
    const uint16_t ip_check = (uint16_t)~sum_of(ip, IP, 0);
    memcpy(ip + 10, &ip_check, sizeof ip_check);
    put16(l4, source_port);
    put16(l4 + 2, destination_port);
    put16(l4 + 4, udp);
    put16(l4 + 6, 0);
    memcpy(l4 + UDP, mark, sizeof *mark);
    if (bytes > PKTGEN_LEAST_FRAME)
        memset(d + PKTGEN_LEAST_FRAME, 0, bytes - PKTGEN_LEAST_FRAME);
    /* what follows the mark is zero, and adds nothing */
    const uint32_t pseudo = rte_cpu_to_be_16(IPPROTO_UDP) + (uint32_t)rte_cpu_to_be_16(udp);
    uint16_t check = (uint16_t)~sum_of(ip + 12, 8 + UDP + sizeof *mark, pseudo);
    check = check ? check : 0xffff;
    memcpy(l4 + 6, &check, sizeof check);
}

/* One packet of the phase into `m`; false: this flow has nothing to be sent to. */
static bool fill(struct pktgen *g, enum pktgen_what what, uint32_t flow, uint64_t due, uint16_t bytes,
                 struct rte_mbuf *m)
{
    const struct endpoints e = endpoints_of(&g->config, flow);
    struct mark mark = {.magic = MAGIC, .flow = flow, .due = due};
    m->data_len = bytes;
    m->pkt_len = bytes;
    uint8_t *d = rte_pktmbuf_mtod(m, uint8_t *);
    if (flow < WATCHED && what != PKTGEN_UNSOLICITED)
        mark.sequence = g->sequence[what == PKTGEN_IN][flow]++;
    if (what == PKTGEN_OUT) {
        write_frame(g, d, bytes, 0, e.address[0], e.port[0], e.address[1], e.port[1], &mark);
        return true;
    }
    uint64_t external = g->mapping[flow];
    if (what == PKTGEN_UNSOLICITED) {
        uint64_t at = 0;
        for (unsigned tries = 0; tries < 64 && ((at & 0xffff) == 0 || g->owner[at]); tries++)
            at = (uint64_t)(((unsigned __int128)next_random(g) * g->owners) >> 64);
        if (g->owner[at])
            return false;
        external = (uint64_t)(g->config.pool_first + (uint32_t)(at >> 16)) << 32 | (at & 0xffff);
        mark.magic = 0;
    }
    if (external == 0)
        return false;
    write_frame(g, d, bytes, 1, e.address[1], e.port[1], (uint32_t)(external >> 32), (uint16_t)external,
                &mark);
    return true;
}

/* --- receiving ---------------------------------------------------------------------------------------- */

static unsigned bucket_of(uint64_t ns)
{
    if (ns < 64)
        return (unsigned)ns;
    const unsigned shift = 57u - (unsigned)__builtin_clzll(ns);
    const unsigned at = (shift + 1) * 64 + (unsigned)((ns >> shift) - 64);
    return at < PKTGEN_BUCKETS ? at : PKTGEN_BUCKETS - 1;
}

static bool answer_arp(struct pktgen *g, unsigned port, struct rte_mbuf *m)
{
    uint8_t *d = rte_pktmbuf_mtod(m, uint8_t *);
    uint8_t *arp = d + ETH, target[4];
    if (rte_pktmbuf_data_len(m) < ETH + 28 || get16(arp + 6) != 1)
        return false;
    memcpy(d, arp + 8, 6);
    memcpy(d + 6, g->config.mac[port], 6);
    put16(arp + 6, 2);
    memcpy(target, arp + 24, 4);
    memcpy(arp + 18, arp + 8, 10); /* who asked */
    memcpy(arp + 8, g->config.mac[port], 6);
    memcpy(arp + 14, target, 4);
    return rte_eth_tx_burst(g->config.ports[port], 0, &m, 1) == 1;
}

/* The external endpoint of a flow: learned from its first packet, and from then on the same. */
static void learn(struct pktgen *g, uint32_t flow, uint32_t address, uint16_t port, struct pktgen_result *r)
{
    const uint64_t external = (uint64_t)address << 32 | port;
    if (g->mapping[flow] == external)
        return;
    if (address < g->config.pool_first || address > g->config.pool_last) {
        r->wrong_pool++;
        return;
    }
    if (g->mapping[flow]) {
        r->wrong_mapping++;
        return;
    }
    uint32_t *owner = &g->owner[(uint64_t)(address - g->config.pool_first) << 16 | port];
    g->mapping[flow] = external;
    r->new_mappings++;
    if (*owner == 0) {
        *owner = flow + 1;
    } else {
        const struct endpoints one = endpoints_of(&g->config, *owner - 1),
                               other = endpoints_of(&g->config, flow);
        if (one.address[0] != other.address[0] || one.port[0] != other.port[0])
            r->wrong_shared++;
    }
}

static void check(struct pktgen *g, unsigned entered, const struct rte_mbuf *m, uint32_t flow,
                  struct pktgen_result *r)
{
    const uint8_t *ip = rte_pktmbuf_mtod(m, const uint8_t *) + ETH, *l4 = ip + IP;
    const struct endpoints e = endpoints_of(&g->config, flow);
    const unsigned total = get16(ip + 2), udp = get16(l4 + 4);
    r->checked++;
    if (total + ETH != rte_pktmbuf_pkt_len(m) || udp + IP != total) {
        r->wrong_length++;
        return;
    }
    if (get32(ip + 16) != e.address[!entered] || get16(l4 + 2) != e.port[!entered])
        r->wrong_destination++;
    if (entered == 1 && (get32(ip + 12) != e.address[1] || get16(l4) != e.port[1]))
        r->wrong_destination++;
    if (ip[8] != TTL - 1)
        r->wrong_ttl++;
    const uint32_t pseudo = rte_cpu_to_be_16(IPPROTO_UDP) + (uint32_t)rte_cpu_to_be_16((uint16_t)udp);
    if (sum_of(ip, IP, 0) != 0xffff || sum_of(ip + 12, 8 + udp, pseudo) != 0xffff)
        r->wrong_checksum++;
}

/* What we have written into a packet, wherever a NAT has sent it; NULL: it is none of ours. */
static const struct mark *mark_of(const struct pktgen *g, const struct rte_mbuf *m)
{
    const uint8_t *d = rte_pktmbuf_mtod(m, const uint8_t *);
    const struct mark *mark = (const struct mark *)(d + PAYLOAD);
    const bool ours = rte_pktmbuf_data_len(m) >= PKTGEN_LEAST_FRAME && get16(d + 12) == RTE_ETHER_TYPE_IPV4 &&
                      mark->magic == MAGIC && mark->flow < g->config.flows;
    return ours ? mark : NULL;
}

/* What came on `port`, and has entered the NAT on the other one. */
static bool receive(struct pktgen *g, unsigned port, const struct pktgen_phase *phase, uint64_t start,
                    struct pktgen_result *r)
{
    struct rte_mbuf *mbufs[BURST];
    const unsigned entered = !port;
    const uint16_t n = rte_eth_rx_burst(g->config.ports[port], 0, mbufs, BURST);
    if (n == 0)
        return false;
    const uint64_t now = rte_rdtsc();
    const uint64_t step = (uint64_t)((double)(now - start) / g->cycles_per_ns) / STEP_NS;
    unsigned kept = 0, ours = 0;
    for (uint16_t i = 0; i < n; i++)
        rte_prefetch0(rte_pktmbuf_mtod(mbufs[i], void *));
    for (uint16_t i = 0; i < n; i++) {
        const struct mark *mark = mark_of(g, mbufs[i]);
        if (mark != NULL)
            rte_prefetch0(&g->mapping[mark->flow]);
    }
    for (uint16_t i = 0; i < n; i++) {
        struct rte_mbuf *m = mbufs[i];
        const uint8_t *d = rte_pktmbuf_mtod(m, const uint8_t *);
        if (rte_pktmbuf_data_len(m) >= ETH + 28 && get16(d + 12) == RTE_ETHER_TYPE_ARP &&
            answer_arp(g, port, m)) {
            r->arp_answered++;
            continue;
        }
        mbufs[kept++] = m;
        const struct mark *mark = mark_of(g, m);
        if (mark == NULL) {
            r->strange += get16(d + 12) != RTE_ETHER_TYPE_ARP;
            continue;
        }
        ours++;
        const uint32_t flow = mark->flow;
        if (entered == 0)
            learn(g, flow, get32(d + ETH + 12), get16(d + ETH + IP), r);
        if (flow < WATCHED) {
            uint32_t *seen = &g->seen[entered][flow];
            if (mark->sequence < *seen)
                r->out_of_order++;
            else
                *seen = mark->sequence + 1;
        }
        if (phase->check_every && (r->received[entered] + ours) % phase->check_every == 0)
            check(g, entered, m, flow, r);
        r->histogram[bucket_of(
            (uint64_t)((double)(int64_t)RTE_MAX((int64_t)(now - mark->due), 0) / g->cycles_per_ns))]++;
    }
    rte_pktmbuf_free_bulk(mbufs, kept);
    r->received[entered] += ours;
    if (step < PKTGEN_STEPS) {
        r->steps[entered][step] += ours;
        if (step + 1 > r->n_steps)
            r->n_steps = (uint32_t)step + 1;
    }
    return true;
}

/* --- a phase ------------------------------------------------------------------------------------------ */

static enum pktgen_what next_kind(struct pktgen *g, uint32_t what)
{
    static const enum pktgen_what kinds[] = {PKTGEN_OUT, PKTGEN_IN, PKTGEN_UNSOLICITED};
    for (;;) {
        const enum pktgen_what kind = kinds[g->turn++ % 3];
        if (what & kind)
            return kind;
    }
}

/* A burst of one kind. Returns how many numbers of the sequence it has used. */
static unsigned send_burst(struct pktgen *g, const struct pktgen_phase *phase, uint64_t number, unsigned n,
                           uint64_t start, double cycles_per_packet, struct pktgen_result *r)
{
    struct rte_mbuf *mbufs[BURST];
    uint32_t flows[BURST];
    const enum pktgen_what what = next_kind(g, phase->what);
    const unsigned from = what != PKTGEN_OUT;
    const uint64_t now = rte_rdtsc();

    for (unsigned i = 0; i < n; i++) {
        flows[i] = choose(g, phase, number + i);
        if (what == PKTGEN_IN)
            rte_prefetch0(&g->mapping[flows[i]]);
    }
    if (rte_pktmbuf_alloc_bulk(g->config.pool, mbufs, n) != 0) {
        r->not_sent += n;
        return n;
    }
    unsigned filled = 0;
    for (unsigned i = 0; i < n; i++) {
        const uint64_t due =
            cycles_per_packet > 0 ? start + (uint64_t)((double)(number + i) * cycles_per_packet) : now;
        const uint16_t bytes = phase->sizes[(number + i) % phase->n_sizes];
        if (fill(g, what, flows[i], due, bytes, mbufs[filled]))
            filled++;
    }
    if (cycles_per_packet > 0) {
        const uint64_t due = start + (uint64_t)((double)number * cycles_per_packet);
        const uint64_t late = now > due ? (uint64_t)((double)(now - due) / g->cycles_per_ns) : 0;
        r->latest_ns = RTE_MAX(r->latest_ns, late);
    }
    uint64_t bytes = 0;
    uint16_t sent = 0;
    for (unsigned tries = 0; sent < filled && tries < 3; tries++)
        sent += rte_eth_tx_burst(g->config.ports[from], 0, mbufs + sent, (uint16_t)(filled - sent));
    for (unsigned i = 0; i < sent; i++)
        bytes += phase->sizes[(number + i) % phase->n_sizes];
    rte_pktmbuf_free_bulk(mbufs + sent, n - sent);
    r->sent[from] += sent;
    r->sent_bytes += bytes;
    r->not_sent += filled - sent;
    return n;
}

void pktgen_run(struct pktgen *g, const struct pktgen_phase *phase, struct pktgen_result *r)
{
    memset(r, 0, sizeof *r);
    atomic_store(&g->stop, false);
    g->random = 0x9e3779b97f4a7c15u * (phase->seed + 1) | 1;
    const double cycles_per_packet = phase->rate > 0 ? (double)rte_get_tsc_hz() / phase->rate : 0;
    const uint64_t limit = phase->packets ? phase->packets : UINT64_MAX;
    const uint64_t start = rte_rdtsc();
    const uint64_t end =
        phase->duration_ns ? start + (uint64_t)((double)phase->duration_ns * g->cycles_per_ns) : UINT64_MAX;
    uint64_t number = 0, now;

    while (number < limit && (now = rte_rdtsc()) < end &&
           !atomic_load_explicit(&g->stop, memory_order_relaxed)) {
        uint64_t due = number + BURST;
        if (cycles_per_packet > 0)
            due = (uint64_t)((double)(now - start) / cycles_per_packet) + 1;
        due = RTE_MIN(due, limit);
        if (due > number)
            number += send_burst(g, phase, number, (unsigned)RTE_MIN(due - number, (uint64_t)BURST), start,
                                 cycles_per_packet, r);
        for (unsigned port = 0; port < 2; port++)
            for (unsigned again = 0; again < 2 && receive(g, port, phase, start, r); again++)
                ;
    }
    r->elapsed_ns = (uint64_t)((double)(rte_rdtsc() - start) / g->cycles_per_ns);
    const uint64_t patience = (uint64_t)((double)phase->drain_ns * g->cycles_per_ns);
    for (uint64_t last = rte_rdtsc();
         rte_rdtsc() - last < patience && !atomic_load_explicit(&g->stop, memory_order_relaxed);)
        for (unsigned port = 0; port < 2; port++)
            if (receive(g, port, phase, start, r))
                last = rte_rdtsc();
}

void pktgen_stop(struct pktgen *g)
{
    atomic_store(&g->stop, true);
}

/* --- life --------------------------------------------------------------------------------------------- */

struct pktgen *pktgen_create(const struct pktgen_config *config, char *error, size_t error_size)
{
    struct pktgen *g = calloc(1, sizeof *g);
    if (g == NULL) {
        snprintf(error, error_size, "no memory");
        return NULL;
    }
    g->config = *config;
    g->cycles_per_ns = (double)rte_get_tsc_hz() / 1e9;
    g->owners = ((uint64_t)config->pool_last - config->pool_first + 1) << 16;
    g->mapping = calloc(config->flows, sizeof *g->mapping);
    g->owner = calloc(g->owners, sizeof *g->owner);
    bool whole = g->mapping && g->owner;
    for (unsigned i = 0; i < 2; i++) {
        g->sequence[i] = calloc(WATCHED, sizeof **g->sequence);
        g->seen[i] = calloc(WATCHED, sizeof **g->seen);
        whole = whole && g->sequence[i] && g->seen[i];
    }
    if (whole)
        return g;
    snprintf(error, error_size, "no memory for %u flows and %llu external endpoints", config->flows,
             (unsigned long long)g->owners);
    pktgen_destroy(g);
    return NULL;
}

void pktgen_destroy(struct pktgen *g)
{
    free(g->mapping);
    free(g->owner);
    for (unsigned i = 0; i < 2; i++) {
        free(g->sequence[i]);
        free(g->seen[i]);
    }
    free(g);
}

bool pktgen_resolve(struct pktgen *g, unsigned port, uint32_t from, uint32_t address, uint8_t mac[6],
                    unsigned wait_ms)
{
    const uint64_t end = rte_rdtsc() + (uint64_t)wait_ms * rte_get_tsc_hz() / 1000;
    uint64_t next = 0;
    while (rte_rdtsc() < end) {
        if (rte_rdtsc() >= next) {
            struct rte_mbuf *m = rte_pktmbuf_alloc(g->config.pool);
            next = rte_rdtsc() + rte_get_tsc_hz() / 10;
            if (m == NULL)
                continue;
            uint8_t *d = rte_pktmbuf_mtod(m, uint8_t *);
            m->data_len = PKTGEN_LEAST_FRAME;
            m->pkt_len = PKTGEN_LEAST_FRAME;
            memset(d, 0xff, 6);
            memset(d + 6, 0, PKTGEN_LEAST_FRAME - 6);
            memcpy(d + 6, g->config.mac[port], 6);
            put16(d + 12, RTE_ETHER_TYPE_ARP);
            memcpy(d + ETH, (const uint8_t[8]){0, 1, 8, 0, 6, 4, 0, 1}, 8);
            memcpy(d + ETH + 8, g->config.mac[port], 6);
            put32(d + ETH + 14, from);
            put32(d + ETH + 24, address);
            if (rte_eth_tx_burst(g->config.ports[port], 0, &m, 1) == 0)
                rte_pktmbuf_free(m);
        }
        struct rte_mbuf *m;
        if (rte_eth_rx_burst(g->config.ports[port], 0, &m, 1) == 0)
            continue;
        const uint8_t *d = rte_pktmbuf_mtod(m, const uint8_t *);
        const bool arp = rte_pktmbuf_data_len(m) >= ETH + 28 && get16(d + 12) == RTE_ETHER_TYPE_ARP;
        const bool found = arp && get16(d + ETH + 6) == 2 && get32(d + ETH + 14) == address;
        if (found)
            memcpy(mac, d + ETH + 8, 6);
        if (found || !arp || !answer_arp(g, port, m))
            rte_pktmbuf_free(m);
        if (found)
            return true;
    }
    return false;
}

void pktgen_set_nat_mac(struct pktgen *g, unsigned port, const uint8_t mac[6])
{
    memcpy(g->config.nat_mac[port], mac, 6);
}

const uint64_t *pktgen_mappings(const struct pktgen *g)
{
    return g->mapping;
}

void pktgen_forget(struct pktgen *g)
{
    memset(g->mapping, 0, g->config.flows * sizeof *g->mapping);
    memset(g->owner, 0, g->owners * sizeof *g->owner);
    for (unsigned i = 0; i < 2; i++) {
        memset(g->sequence[i], 0, WATCHED * sizeof **g->sequence);
        memset(g->seen[i], 0, WATCHED * sizeof **g->seen);
    }
}
