/* SPDX-License-Identifier: Apache-2.0
 *
 * The loop that carries packets: rx burst -> core -> tx burst. It runs without Python's lock, and whatever
 * Python does or fails to do, packets of known sessions go on.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>

#include <rte_cycles.h>
#include <rte_ethdev.h>
#include <rte_ip.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>

#include "worker.h"

#define TX_SLOTS (4 * NAT_BURST)
#define TX_ATTEMPTS 4u
#define IDLE_SPINS 256u /* empty polls before the first sleep */

struct tx_queue {
    struct rte_mbuf *mbufs[TX_SLOTS];
    unsigned n;
};

struct worker {
    struct worker_config config;
    pthread_t thread;
    atomic_bool stop;
    uint8_t device[NAT_MAX_PORTS]; /* the first port on the same device: that one is polled */
    bool shared[NAT_MAX_PORTS];    /* there are others */
    struct tx_queue tx[NAT_MAX_PORTS];
    struct worker_stats stats;
};

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Others read the statistics while we write them: a plain store must not be torn or hoisted. */
static void add(uint64_t *counter, uint64_t n)
{
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

static bool is_tagged(const struct rte_mbuf *m)
{
    return rte_pktmbuf_data_len(m) >= RTE_ETHER_HDR_LEN + sizeof(struct rte_vlan_hdr) &&
           rte_pktmbuf_mtod(m, const struct rte_ether_hdr *)->ether_type == RTE_BE16(RTE_ETHER_TYPE_VLAN);
}

/* Which of the ports on this device a frame is for: its tag says so. One that none of them carries goes to
 * the first, where the core drops and counts it. */
static unsigned port_of(const struct worker *w, unsigned device, const struct rte_mbuf *m)
{
    const struct rte_vlan_hdr *tag = rte_pktmbuf_mtod_offset(m, const void *, RTE_ETHER_HDR_LEN);
    const unsigned vlan = is_tagged(m) ? rte_be_to_cpu_16(tag->vlan_tci) & RTE_VLAN_ID_MASK : 0;
    for (unsigned port = device; port < w->config.n_ports; port++)
        if (w->device[port] == device && w->config.ports[port].vlan == vlan)
            return port;
    return device;
}

/* A packet from a local sender has only the sum of the pseudo-header in its checksum field: the rest is left
 * to hardware, which a veth has not. A finished checksum that happens to look the same stays what it is, for
 * then the sum gives the same value again. */
static bool fill_checksum(struct rte_mbuf *m)
{
    uint8_t *data = rte_pktmbuf_mtod(m, uint8_t *);
    const unsigned length = rte_pktmbuf_data_len(m);
    const unsigned l2 = is_tagged(m) ? RTE_ETHER_HDR_LEN + sizeof(struct rte_vlan_hdr) : RTE_ETHER_HDR_LEN;
    const struct rte_ipv4_hdr *ip = (const void *)(data + l2);
    unsigned field;

    if (m->nb_segs != 1 || length < l2 + sizeof *ip || ip->version != 4 ||
        *(const unaligned_uint16_t *)(data + l2 - sizeof(uint16_t)) != RTE_BE16(RTE_ETHER_TYPE_IPV4))
        return false;
    if (ip->next_proto_id == IPPROTO_TCP)
        field = offsetof(struct rte_tcp_hdr, cksum);
    else if (ip->next_proto_id == IPPROTO_UDP)
        field = offsetof(struct rte_udp_hdr, dgram_cksum);
    else
        return false;
    /* nothing is subtracted before it is known to be the smaller one: the core has checked nothing yet */
    const unsigned header = rte_ipv4_hdr_len(ip), total = rte_be_to_cpu_16(ip->total_length);
    if (header < sizeof *ip || total < header + field + sizeof(uint16_t) || l2 + total > length ||
        (ip->fragment_offset & RTE_BE16(RTE_IPV4_HDR_MF_FLAG | RTE_IPV4_HDR_OFFSET_MASK)))
        return false;
    const unsigned l4 = l2 + header, l4_length = total - header;
    uint16_t cksum;
    memcpy(&cksum, data + l4 + field, sizeof cksum);
    if (cksum != rte_ipv4_phdr_cksum(ip, 0))
        return false;
    cksum = (uint16_t)~rte_raw_cksum(data + l4, l4_length);
    if (cksum == 0)
        cksum = 0xffff;
    memcpy(data + l4 + field, &cksum, sizeof cksum);
    return true;
}

static void transmit(struct worker *w, unsigned port)
{
    struct tx_queue *q = &w->tx[port];
    unsigned sent = 0;

    for (unsigned attempt = 0; sent < q->n && attempt < TX_ATTEMPTS; attempt++)
        sent += rte_eth_tx_burst(w->config.ports[port].port_id, 0, q->mbufs + sent, (uint16_t)(q->n - sent));
    if (sent < q->n) {
        add(&w->stats.tx_dropped[port], q->n - sent);
        rte_pktmbuf_free_bulk(q->mbufs + sent, q->n - sent);
    }
    q->n = 0;
}

static void enqueue(struct worker *w, unsigned port, struct rte_mbuf *m)
{
    if (w->tx[port].n == TX_SLOTS)
        transmit(w, port);
    w->tx[port].mbufs[w->tx[port].n++] = m;
}

/* In pieces that fit the MTU, and one buffer each. */
static void send_pieces(struct worker *w, const struct nat_packet *p)
{
    const unsigned room = rte_pktmbuf_data_room_size(w->config.pool) - RTE_PKTMBUF_HEADROOM;
    const uint16_t mtu = (uint16_t)RTE_MIN(p->mtu, room - (RTE_ETHER_HDR_LEN + sizeof(struct rte_vlan_hdr)));
    struct nat_piece piece = {0};

    while (w->config.api->cut(p->data, mtu, &piece)) {
        struct rte_mbuf *m = rte_pktmbuf_alloc(w->config.pool);
        if (m == NULL) {
            add(&w->stats.fragment_no_buffer, 1);
            continue;
        }
        uint8_t *to = (uint8_t *)rte_pktmbuf_append(m, (uint16_t)(piece.header_bytes + piece.bytes));
        memcpy(to, piece.header, piece.header_bytes);
        to += piece.header_bytes;
        const void *data = rte_pktmbuf_read(p->cookie, piece.at, piece.bytes, to);
        if (data != to) /* it lies in one segment; from several it has been copied */
            memcpy(to, data, piece.bytes);
        enqueue(w, p->port, m);
    }
}

/* Sends what has a way to go, frees what was dropped; held packets stay with the core. */
static void dispatch(struct worker *w, const struct nat_packet *packets, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        const struct nat_packet *p = &packets[i];
        struct rte_mbuf *m = p->cookie;

        if (p->verdict == NAT_HELD)
            continue;
        const int moved = (int)(p->data - rte_pktmbuf_mtod(m, uint8_t *)); /* a VLAN tag came or went */
        if (moved < 0)
            rte_pktmbuf_prepend(m, (uint16_t)-moved);
        else if (moved > 0)
            rte_pktmbuf_adj(m, (uint16_t)moved);
        if (p->verdict > NAT_REPLY) {
            if (p->verdict == NAT_FRAGMENT)
                send_pieces(w, p);
            rte_pktmbuf_free(m);
            continue;
        }
        if (p->length != rte_pktmbuf_pkt_len(m)) { /* an answer of another length, all in the first segment */
            rte_pktmbuf_free(m->next);
            m->next = NULL;
            m->nb_segs = 1;
            m->data_len = (uint16_t)p->length;
            m->pkt_len = p->length;
        }
        enqueue(w, p->port, m);
    }
}

/* Packets that the core had held, and that have their verdict now. */
static bool send_held(struct worker *w)
{
    struct nat_packet packets[NAT_BURST];
    bool any = false;
    unsigned n;

    while ((n = w->config.api->take(w->config.core, packets, NAT_BURST))) {
        dispatch(w, packets, n);
        any = true;
    }
    return any;
}

static bool receive(struct worker *w, unsigned port, uint64_t now)
{
    const struct worker_port *in = &w->config.ports[port];
    struct rte_mbuf *mbufs[NAT_BURST];
    struct nat_packet packets[NAT_BURST];
    if (w->device[port] != port)
        return false; /* it is polled already */
    const unsigned n = rte_eth_rx_burst(in->port_id, 0, mbufs, NAT_BURST);

    if (n == 0)
        return false;
    for (unsigned i = 0; i < n; i++)
        rte_prefetch0(rte_pktmbuf_mtod(mbufs[i], void *));
    for (unsigned i = 0; i < n; i++) {
        struct rte_mbuf *m = mbufs[i];

        if (in->fill_checksums && fill_checksum(m))
            add(&w->stats.checksums_filled[port], 1);
        packets[i] = (struct nat_packet){
            .data = rte_pktmbuf_mtod(m, uint8_t *),
            .length = rte_pktmbuf_pkt_len(m),
            .segment = rte_pktmbuf_data_len(m),
            .capacity = (uint16_t)(rte_pktmbuf_data_len(m) + (m->nb_segs == 1 ? rte_pktmbuf_tailroom(m) : 0)),
            .headroom = rte_pktmbuf_headroom(m),
            .port = (uint8_t)(w->shared[port] ? port_of(w, port, m) : port),
            .cookie = m,
        };
    }
    w->config.api->burst(w->config.core, packets, n, now);
    send_held(w); /* they came before these, and may be of the same flow */
    dispatch(w, packets, n);
    return true;
}

/* What the core itself wants sent, and packets that it had held. */
static bool send_own(struct worker *w)
{
    const struct nat_api *api = w->config.api;
    uint8_t frame[NAT_OUTBOX_BYTES], port;
    unsigned length;
    bool any = send_held(w);

    while ((length = api->outbox(w->config.core, frame, &port))) {
        struct rte_mbuf *m = rte_pktmbuf_alloc(w->config.pool);
        any = true;
        if (m == NULL) {
            add(&w->stats.outbox_no_buffer, 1);
            continue;
        }
        memcpy(rte_pktmbuf_append(m, (uint16_t)length), frame, length);
        enqueue(w, port, m);
    }
    return any;
}

/* Twice as long each time, up to the bound. Returns the time after the sleep. */
static uint64_t sleep_a_little(struct worker *w, unsigned *sleep_us, uint64_t now)
{
    *sleep_us = RTE_MIN(*sleep_us ? *sleep_us * 2 : 1, WORKER_IDLE_BOUND_US);
    nanosleep(&(struct timespec){.tv_nsec = *sleep_us * 1000}, NULL);
    const uint64_t slept = clock_ns() - now;
    add(&w->stats.sleeps, 1);
    if (slept > w->stats.sleep_max_ns)
        __atomic_store_n(&w->stats.sleep_max_ns, slept, __ATOMIC_RELAXED);
    return now + slept;
}

static void *run(void *argument)
{
    struct worker *w = argument;
    unsigned idle = 0, sleep_us = 0;

    pthread_setname_np(pthread_self(), "nat-worker");
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0); /* the usual 50 us would make every short sleep a long one */
    const bool registered = rte_thread_register() == 0; /* without: no mbuf cache, and all else works */

    uint64_t now = clock_ns();
    w->config.api->announce(w->config.core);
    while (!atomic_load_explicit(&w->stop, memory_order_relaxed)) {
        bool packets = false;

        for (unsigned port = 0; port < w->config.n_ports; port++)
            packets |= receive(w, port, now);
        bool worked = packets | w->config.api->poll(w->config.core, now);
        worked |= send_own(w);
        if (w->config.wake_fd >= 0 && w->config.api->wake(w->config.core))
            eventfd_write(w->config.wake_fd, 1);
        for (unsigned port = 0; port < w->config.n_ports; port++)
            if (w->tx[port].n)
                transmit(w, port);

        const uint64_t after = clock_ns();
        add(&w->stats.loops, 1);
        add(&w->stats.loops_with_packets, packets);
        add(&w->stats.total_ns, after - now);
        add(&w->stats.busy_ns, worked ? after - now : 0);
        now = after;
        if (worked) {
            idle = sleep_us = 0;
        } else if (w->config.adaptive && ++idle > IDLE_SPINS) {
            now = sleep_a_little(w, &sleep_us, after);
            add(&w->stats.total_ns, now - after);
        } else {
            rte_pause();
        }
    }
    w->config.api->flush(w->config.core);
    send_own(w);
    for (unsigned port = 0; port < w->config.n_ports; port++)
        transmit(w, port);
    if (registered)
        rte_thread_unregister();
    return NULL;
}

struct worker *worker_start(const struct worker_config *config, char *error, size_t error_size)
{
    const struct nat_api *api = config->api;
    if (api->size != sizeof *api || api->abi != NAT_ABI || api->header_hash != NAT_HEADER_HASH) {
        snprintf(error, error_size,
                 "the engine and the DPDK binding were built from different sources (nat.h): "
                 "build both again (make clean build)");
        return NULL;
    }
    struct worker *w = calloc(1, sizeof *w);
    if (w == NULL) {
        snprintf(error, error_size, "no memory for a worker");
        return NULL;
    }
    w->config = *config;
    for (unsigned port = 0; port < config->n_ports; port++) {
        while (config->ports[w->device[port]].port_id != config->ports[port].port_id)
            w->device[port]++;
        w->shared[w->device[port]] |= w->device[port] != port;
    }

    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    if (config->cpu >= 0) {
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        CPU_SET(config->cpu, &cpus);
        pthread_attr_setaffinity_np(&attributes, sizeof cpus, &cpus);
    }
    sigset_t all, before; /* signals are for Python's main thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int rc = pthread_create(&w->thread, &attributes, run, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (rc) {
        snprintf(error, error_size, "cannot start a worker on CPU %d: %s", config->cpu, strerror(rc));
        free(w);
        return NULL;
    }
    return w;
}

void worker_stop(struct worker *worker)
{
    atomic_store(&worker->stop, true);
    pthread_join(worker->thread, NULL);
    free(worker);
}

const uint64_t *worker_loops(const struct worker *worker)
{
    return &worker->stats.loops;
}

void worker_read_stats(const struct worker *worker, struct worker_stats *out)
{
    const uint64_t *from = (const uint64_t *)&worker->stats;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
