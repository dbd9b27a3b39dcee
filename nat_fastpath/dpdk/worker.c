/* SPDX-License-Identifier: Apache-2.0
 *
 * The loop that carries packets: rx burst -> core -> tx burst. It runs without Python's lock, and whatever
 * Python does or fails to do, packets of known sessions go on.
 *
 * Each of several workers has a core, and a ring in which the others give it what is its own: packets of its
 * core's slice, ARP frames to learn from, and frames for a device on which it alone sends. A frame that the
 * device has spread right never sees a ring.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>

#include <rte_cycles.h>
#include <rte_ethdev.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>
#include <rte_ring.h>

#include "frame.h"
#include "mark.h"
#include "worker.h"

#define TX_SLOTS (4 * NAT_BURST)
#define TX_ATTEMPTS 4u
#define IDLE_SPINS 256u /* empty polls before the first sleep */

#define ARP_COPY 64u /* bytes of a frame that the others learn from */
/* From the last frame that was received to the last that is sent: by the directory of fragments, the core
 * that has the session, the one at the other end of a hairpin, and the worker that sends. */
#define HOPS 4u

/* What a frame is, in a ring: its port of the core, and either of these. */
#define TAG_HANDOFF_SHIFT 8 /* as in nat_packet; 0: as it was received */
#define TAG_SEND 0x10000u   /* it has its way already */

struct queue {
    struct rte_mbuf *mbufs[TX_SLOTS];
    unsigned n;
};

struct worker {
    struct workers *all;
    struct nat_core *core;
    unsigned index;
    pthread_t thread;
    uint16_t rx_queue[NAT_MAX_PORTS], tx_queue[NAT_MAX_PORTS];
    bool polls[NAT_MAX_PORTS];     /* the first port of each device on which it receives */
    uint8_t sender[NAT_MAX_PORTS]; /* the worker that sends on this device for it: mostly itself */
    struct queue tx[NAT_MAX_PORTS];
    struct rte_ring *ring; /* from the others; NULL: it is alone */
    struct queue *out;     /* to each of them */
    struct worker_stats stats;
} __rte_cache_aligned;

struct workers {
    struct workers_config config;
    uint8_t device[NAT_MAX_PORTS]; /* the first port on the same device */
    bool shared[NAT_MAX_PORTS];    /* there are others */
    bool fills;                    /* a port may have checksums to be filled in */
    pthread_mutex_t gate;          /* shut until all threads are there, or one is not */
    bool failed;
    atomic_bool stop;
    pthread_barrier_t stopping;
    struct worker worker[];
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

/* Which of the ports on this device a frame is for: its tag says so, or its mark. One that none of them
 * carries goes to the first, where the core drops and counts it. */
static unsigned port_of(const struct workers *w, unsigned device, struct rte_mbuf *m)
{
    const struct rte_vlan_hdr *tag = rte_pktmbuf_mtod_offset(m, const void *, RTE_ETHER_HDR_LEN);
    const unsigned vlan = is_tagged(m) ? rte_be_to_cpu_16(tag->vlan_tci) & RTE_VLAN_ID_MASK : 0;
    const bool marked = w->config.marking.used;
    const unsigned side = marked ? take_mark(m, &w->config.marking) : 0;
    for (unsigned port = device; port < w->config.n_ports; port++)
        if (w->device[port] == device && w->config.ports[port].vlan == vlan &&
            (!marked || w->config.ports[port].side == side))
            return port;
    return device;
}

/* What leaves on a link that both sides share without tags says which it is of. */
static void put_marks(const struct worker_port *ports, const struct nat_packet *packets, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (packets[i].verdict <= NAT_REPLY || packets[i].verdict == NAT_FRAGMENT)
            put_mark(packets[i].data, ports[packets[i].port].side);
}

/* --- to other workers -------------------------------------------------------------------------------- */

static void deliver(struct worker *w, unsigned to)
{
    struct queue *q = &w->out[to];
    const unsigned taken =
        rte_ring_enqueue_burst(w->all->worker[to].ring, (void *const *)q->mbufs, q->n, NULL);
    if (taken < q->n) {
        add(&w->stats.handoff_dropped, q->n - taken);
        rte_pktmbuf_free_bulk(q->mbufs + taken, q->n - taken);
    }
    q->n = 0;
}

static void hand_over(struct worker *w, unsigned to, const struct nat_packet *p, struct rte_mbuf *m)
{
    if (w->out[to].n == TX_SLOTS)
        deliver(w, to);
    m->hash.usr = p->port | (uint32_t)p->handoff << TAG_HANDOFF_SHIFT;
    w->out[to].mbufs[w->out[to].n++] = m;
}

/* One answers, and the others must hear it too: each has next hops of its own. */
static void show_arp(struct worker *w, const struct nat_packet *p)
{
    struct nat_packet copy = *p;
    copy.handoff = NAT_HANDOFF_COPY;
    for (unsigned to = 0; to < w->all->config.n; to++) {
        if (to == w->index)
            continue;
        struct rte_mbuf *m = rte_pktmbuf_copy(p->cookie, w->all->config.pool, 0, ARP_COPY);
        if (m == NULL) {
            add(&w->stats.handoff_dropped, 1);
            continue;
        }
        hand_over(w, to, &copy, m);
        add(&w->stats.arp_copies, 1);
    }
}

/* Gives to the others what is theirs; returns how many packets are left. */
static unsigned spread(struct worker *w, struct nat_packet *packets, unsigned n)
{
    const struct workers_config *config = &w->all->config;
    unsigned kept = 0;

    for (unsigned i = 0; i < n; i++) {
        const struct nat_packet *p = &packets[i];
        const unsigned slice =
            config->api->slice_of(p->data, p->segment, config->ports[p->port].side, config->n);
        if (slice < config->n && slice != w->index) {
            hand_over(w, slice, p, p->cookie);
            add(&w->stats.handed_off, 1);
            continue;
        }
        if (slice == NAT_SLICE_ALL)
            show_arp(w, p);
        packets[kept++] = *p;
    }
    return kept;
}

/* --- sending ----------------------------------------------------------------------------------------- */

static void transmit(struct worker *w, unsigned port)
{
    struct queue *q = &w->tx[port];
    const uint16_t port_id = w->all->config.ports[port].port_id;
    unsigned sent = 0;

    if (w->sender[port] != w->index) {
        for (unsigned i = 0; i < q->n; i++)
            q->mbufs[i]->hash.usr = port | TAG_SEND;
        struct rte_ring *ring = w->all->worker[w->sender[port]].ring;
        sent = rte_ring_enqueue_burst(ring, (void *const *)q->mbufs, q->n, NULL);
        add(&w->stats.tx_passed, sent);
    } else if (gate_pass(w->all->config.ports[port].gated)) {
        for (unsigned attempt = 0; sent < q->n && attempt < TX_ATTEMPTS; attempt++)
            sent += rte_eth_tx_burst(port_id, w->tx_queue[port], q->mbufs + sent, (uint16_t)(q->n - sent));
        if (w->all->config.ports[port].gated)
            gate_leave();
    }
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

/* All that waits to leave this worker. */
static void send_all(struct worker *w)
{
    for (unsigned port = 0; port < w->all->config.n_ports; port++)
        if (w->tx[port].n)
            transmit(w, port);
    for (unsigned to = 0; w->ring != NULL && to < w->all->config.n; to++)
        if (w->out[to].n)
            deliver(w, to);
}

/* In pieces that fit the MTU, and one buffer each. */
static void send_pieces(struct worker *w, const struct nat_packet *p)
{
    const unsigned room = rte_pktmbuf_data_room_size(w->all->config.pool) - RTE_PKTMBUF_HEADROOM;
    const uint16_t mtu = (uint16_t)RTE_MIN(p->mtu, room - (RTE_ETHER_HDR_LEN + sizeof(struct rte_vlan_hdr)));
    struct nat_piece piece = {0};

    while (w->all->config.api->cut(p->data, mtu, &piece)) {
        struct rte_mbuf *m = rte_pktmbuf_alloc(w->all->config.pool);
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
    if (w->all->config.marking.used)
        put_marks(w->all->config.ports, packets, n);
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
            if (p->verdict == NAT_HANDOFF) {
                hand_over(w, p->handoff & NAT_HANDOFF_SLICE, p, m);
                add(&w->stats.handed_off, 1);
                continue;
            }
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

    while ((n = w->all->config.api->take(w->core, packets, NAT_BURST))) {
        dispatch(w, packets, n);
        any = true;
    }
    return any;
}

/* --- the loop ---------------------------------------------------------------------------------------- */

/* Packets from a wire, or such as another core has begun (`handed`). */
static void carry(struct worker *w, struct nat_packet *packets, unsigned n, bool handed, uint64_t now)
{
    const struct workers_config *config = &w->all->config;

    for (unsigned i = 0; w->all->fills && !handed && i < n; i++)
        if (config->ports[packets[i].port].fill_checksums && fill_checksum(packets[i].cookie))
            add(&w->stats.checksums_filled[packets[i].port], 1);
    (handed ? config->api->handed : config->api->burst)(w->core, packets, n, now);
    send_held(w); /* they came before these, and may be of the same flow */
    dispatch(w, packets, n);
}

static bool receive(struct worker *w, unsigned port, uint64_t now)
{
    const struct workers *all = w->all;
    struct rte_mbuf *mbufs[NAT_BURST];
    struct nat_packet packets[NAT_BURST];
    if (!w->polls[port] || !gate_pass(all->config.ports[port].gated))
        return false;
    unsigned n = rte_eth_rx_burst(all->config.ports[port].port_id, w->rx_queue[port], mbufs, NAT_BURST);
    if (all->config.ports[port].gated)
        gate_leave();

    if (n == 0)
        return false;
    for (unsigned i = 0; i < n; i++)
        rte_prefetch0(rte_pktmbuf_mtod(mbufs[i], void *));
    for (unsigned i = 0; i < n; i++)
        describe(&packets[i], mbufs[i], all->shared[port] ? port_of(all, port, mbufs[i]) : port);
    if (w->ring != NULL)
        n = spread(w, packets, n);
    carry(w, packets, n, false, now);
    return true;
}

/* What the others gave to this worker, in the order in which each of them did. */
static bool take_over(struct worker *w, uint64_t now)
{
    struct rte_mbuf *mbufs[NAT_BURST];
    struct nat_packet packets[NAT_BURST];
    const unsigned taken = rte_ring_dequeue_burst(w->ring, (void **)mbufs, NAT_BURST, NULL);
    unsigned n = 0, copies = 0;

    for (unsigned i = 0; i < taken; i++)
        rte_prefetch0(rte_pktmbuf_mtod(mbufs[i], void *));
    for (unsigned i = 0; i < taken; i++) {
        const uint32_t tag = mbufs[i]->hash.usr;
        const unsigned port = tag & UINT8_MAX;
        if (tag & TAG_SEND) {
            enqueue(w, port, mbufs[i]);
            continue;
        }
        describe(&packets[n], mbufs[i], port);
        packets[n].handoff = (uint8_t)(tag >> TAG_HANDOFF_SHIFT);
        copies += (packets[n++].handoff & NAT_HANDOFF_COPY) != 0;
    }
    for (unsigned at = 0, end = 0; at < n; at = end) {
        const bool handed = packets[at].handoff != 0;
        while (end < n && (packets[end].handoff != 0) == handed)
            end++;
        carry(w, packets + at, end - at, handed, now);
    }
    add(&w->stats.handoff_received, n - copies);
    return taken != 0;
}

/* What the core itself wants sent, and packets that it had held. */
static bool send_own(struct worker *w)
{
    const struct nat_api *api = w->all->config.api;
    uint8_t frame[NAT_OUTBOX_BYTES], port;
    unsigned length;
    bool any = send_held(w);

    while ((length = api->outbox(w->core, frame, &port))) {
        struct rte_mbuf *m = rte_pktmbuf_alloc(w->all->config.pool);
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
    const unsigned bound = w->all->config.api->waits(w->core) ? WORKER_HOLD_BOUND_US : WORKER_IDLE_BOUND_US;
    *sleep_us = RTE_MIN(*sleep_us ? *sleep_us * 2 : 1, bound);
    nanosleep(&(struct timespec){.tv_nsec = *sleep_us * 1000}, NULL);
    const uint64_t slept = clock_ns() - now;
    add(&w->stats.sleeps, 1);
    if (slept > w->stats.sleep_max_ns)
        __atomic_store_n(&w->stats.sleep_max_ns, slept, __ATOMIC_RELAXED);
    return now + slept;
}

/* One turn of the loop. Returns the time after it. */
static uint64_t turn(struct worker *w, uint64_t now, bool *worked)
{
    const struct workers_config *config = &w->all->config;
    bool packets = false;

    for (unsigned port = 0; port < config->n_ports; port++)
        packets |= receive(w, port, now);
    if (w->ring != NULL)
        packets |= take_over(w, now);
    *worked = packets | config->api->poll(w->core, now);
    *worked |= send_own(w);
    send_all(w);
    /* who is woken may want this CPU: packets that need not wait for it have left by now */
    if (config->wake_fd >= 0 && config->api->wake(w->core))
        eventfd_write(config->wake_fd, 1);

    const uint64_t after = clock_ns();
    add(&w->stats.loops, 1);
    add(&w->stats.loops_with_packets, packets);
    add(&w->stats.total_ns, after - now);
    add(&w->stats.busy_ns, *worked ? after - now : 0);
    return after;
}

/* Nothing is received any more; what is on its way between workers still arrives. */
static void finish(struct worker *w, uint64_t now)
{
    for (unsigned hop = 0; w->ring != NULL && hop < HOPS; hop++) {
        pthread_barrier_wait(&w->all->stopping);
        while (take_over(w, now))
            ;
        send_all(w);
    }
    w->all->config.api->flush(w->core);
    send_held(w);
}

static void *run(void *argument)
{
    struct worker *w = argument;
    struct workers *all = w->all;
    unsigned idle = 0, sleep_us = 0;
    char name[16] = "nat-worker";

    pthread_mutex_lock(&all->gate);
    const bool failed = all->failed;
    pthread_mutex_unlock(&all->gate);
    if (failed)
        return NULL;
    if (w->ring != NULL)
        snprintf(name, sizeof name, "nat-worker-%u", w->index);
    pthread_setname_np(pthread_self(), name);
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0); /* the usual 50 us would make every short sleep a long one */
    const bool registered = rte_thread_register() == 0; /* without: no mbuf cache, and all else works */

    uint64_t now = clock_ns();
    all->config.api->announce(w->core);
    while (!atomic_load_explicit(&all->stop, memory_order_relaxed)) {
        bool worked;
        now = turn(w, now, &worked);
        if (worked) {
            idle = sleep_us = 0;
        } else if (all->config.adaptive && ++idle > IDLE_SPINS) {
            const uint64_t after = sleep_a_little(w, &sleep_us, now);
            add(&w->stats.total_ns, after - now);
            now = after;
        } else {
            rte_pause();
        }
    }
    finish(w, now);
    if (registered)
        rte_thread_unregister();
    return NULL;
}

/* --- starting and stopping --------------------------------------------------------------------------- */

/* Which queues of which devices are this worker's. A device without a queue for each worker has one that
 * polls it, and another device another one. */
static void assign(struct worker *w)
{
    const struct workers *all = w->all;
    unsigned devices = 0;

    for (unsigned port = 0; port < all->config.n_ports; port++) {
        const struct worker_port *p = &all->config.ports[port];
        const unsigned device = all->device[port];
        const unsigned n = all->config.n;
        if (device != port) {
            w->sender[port] = w->sender[device];
            w->tx_queue[port] = w->tx_queue[device];
            continue;
        }
        const unsigned only = devices++ % n;
        w->polls[port] = p->rx_queues >= n || only == w->index;
        w->rx_queue[port] = (uint16_t)(p->rx_queues >= n ? w->index : 0);
        w->sender[port] = (uint8_t)(p->tx_queues >= n ? w->index : only);
        w->tx_queue[port] = (uint16_t)(p->tx_queues >= n ? w->index : 0);
    }
}

static void workers_free(struct workers *all)
{
    for (unsigned i = 0; i < all->config.n; i++) {
        struct worker *w = &all->worker[i];
        void *left;
        while (w->ring != NULL && rte_ring_dequeue(w->ring, &left) == 0)
            rte_pktmbuf_free(left);
        rte_ring_free(w->ring);
        free(w->out);
    }
    pthread_barrier_destroy(&all->stopping);
    pthread_mutex_destroy(&all->gate);
    free(all);
}

static bool make_ring(struct worker *w)
{
    char name[RTE_RING_NAMESIZE];
    snprintf(name, sizeof name, "to-%p", (void *)w);
    /* one of the others may be descheduled in the midst of it, and does not stop the rest */
    w->ring = rte_ring_create(name, WORKER_RING, SOCKET_ID_ANY, RING_F_MP_RTS_ENQ | RING_F_SC_DEQ);
    w->out = calloc(w->all->config.n, sizeof *w->out);
    return w->ring != NULL && w->out != NULL;
}

struct workers *workers_start(const struct workers_config *config, char *error, size_t error_size)
{
    const struct nat_api *api = config->api;
    if (api->size != sizeof *api || api->abi != NAT_ABI || api->header_hash != NAT_HEADER_HASH) {
        snprintf(error, error_size,
                 "the engine and the DPDK binding were built from different sources (nat.h): "
                 "build both again (make clean build)");
        return NULL;
    }
    const size_t size =
        RTE_ALIGN(sizeof(struct workers) + config->n * sizeof(struct worker), RTE_CACHE_LINE_SIZE);
    struct workers *all = aligned_alloc(RTE_CACHE_LINE_SIZE, size);
    if (all == NULL) {
        snprintf(error, error_size, "no memory for a worker");
        return NULL;
    }
    memset(all, 0, size);
    all->config = *config;
    pthread_mutex_init(&all->gate, NULL);
    pthread_barrier_init(&all->stopping, NULL, config->n);
    for (unsigned port = 0; port < config->n_ports; port++) {
        while (config->ports[all->device[port]].port_id != config->ports[port].port_id)
            all->device[port]++;
        all->shared[all->device[port]] |= all->device[port] != port;
        all->fills |= config->ports[port].fill_checksums;
    }
    for (unsigned i = 0; i < config->n; i++) {
        struct worker *w = &all->worker[i];
        w->all = all;
        w->core = config->cores[i];
        w->index = i;
        assign(w);
        if (config->n > 1 && !make_ring(w)) {
            snprintf(error, error_size, "no memory for the rings between %u workers", config->n);
            workers_free(all);
            return NULL;
        }
    }
    unsigned started = 0;
    pthread_mutex_lock(&all->gate);
    while (started < config->n && thread_start(&all->worker[started].thread, run, &all->worker[started],
                                               config->cpus[started], error, error_size))
        started++;
    all->failed = started < config->n;
    pthread_mutex_unlock(&all->gate);
    if (!all->failed)
        return all;
    for (unsigned i = 0; i < started; i++)
        pthread_join(all->worker[i].thread, NULL);
    workers_free(all);
    return NULL;
}

bool workers_stop(struct workers *all, unsigned patience_s)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += patience_s;
    atomic_store(&all->stop, true);
    for (unsigned i = 0; i < all->config.n; i++)
        if (pthread_clockjoin_np(all->worker[i].thread, NULL, CLOCK_MONOTONIC, &until) != 0)
            return false;
    workers_free(all);
    return true;
}

const uint64_t *worker_loops(const struct workers *workers, unsigned i)
{
    return &workers->worker[i].stats.loops;
}

void worker_read_stats(const struct workers *workers, unsigned i, struct worker_stats *out)
{
    const uint64_t *from = (const uint64_t *)&workers->worker[i].stats;
    uint64_t *to = (uint64_t *)out;
    for (size_t k = 0; k < sizeof *out / sizeof *to; k++)
        to[k] = __atomic_load_n(&from[k], __ATOMIC_RELAXED);
}
