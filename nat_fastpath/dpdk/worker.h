/* SPDX-License-Identifier: Apache-2.0
 *
 * The DPDK driver of cores: a thread for each that polls ports, and the log lines of DPDK for error messages.
 */
#ifndef WORKER_H
#define WORKER_H

#include <pthread.h>
#include <stdbool.h>

#include "nat.h"

/* Longest sleep of an idle adaptive worker, in microseconds: the most that idling adds to a packet's latency,
 * besides what the kernel adds to any sleep (`sleep_max_ns` shows it). */
#define WORKER_IDLE_BOUND_US 200u
/* The same while packets wait for a commit. */
#define WORKER_HOLD_BOUND_US 16u
#define WORKERS_MAX (NAT_HANDOFF_SLICE + 1)
#define WORKER_RING 4096u /* frames from other workers: of that time, 20 millions per second */

struct worker_port {
    uint16_t port_id;
    uint8_t fill_checksums; /* a kernel interface may leave checksums to hardware that is not there */
    uint8_t side;           /* enum nat_side, of the core's port */
    uint16_t vlan;          /* likewise: tells apart those that share a device; 0: untagged */
    uint16_t rx_queues, tx_queues;
    uint8_t gated; /* it is connected and taken down while it is polled */
};

/* How the sides of one device without tags are told apart: mark.h. */
struct marking {
    uint8_t used;
    uint32_t network, mask; /* the inside's subnet */
};

struct workers_config {
    const struct nat_api *api;
    void *pool;   /* struct rte_mempool, for frames that we make */
    int adaptive; /* sleep when idle; otherwise poll all the time */
    int wake_fd;  /* eventfd that wakes the reader of events, -1 without */
    unsigned n_ports;
    struct worker_port ports[NAT_MAX_PORTS];
    struct marking marking;
    unsigned n;
    struct nat_core *cores[WORKERS_MAX]; /* of several, each has the slice that is its place here */
    int cpus[WORKERS_MAX];               /* -1: wherever the system likes */
};

/* Written by the worker alone. */
struct worker_stats {
    uint64_t loops, loops_with_packets, sleeps;
    uint64_t total_ns, busy_ns, sleep_max_ns;
    uint64_t outbox_no_buffer;   /* frames of the core's own that found no mbuf */
    uint64_t fragment_no_buffer; /* fragments that were to be made, likewise */
    uint64_t handed_off;         /* packets for the worker whose core has their slice */
    uint64_t handoff_received;   /* such packets from others */
    uint64_t handoff_dropped;    /* that found its ring full; or an ARP frame to be shown no mbuf */
    uint64_t arp_copies;         /* ARP frames for the others to learn from */
    uint64_t tx_passed;          /* frames for the worker that alone sends on their device */
    uint64_t tx_dropped[NAT_MAX_PORTS], checksums_filled[NAT_MAX_PORTS];
};

struct workers;

/* Starts the threads. NULL and a line in `error` when that is impossible. */
struct workers *workers_start(const struct workers_config *config, char *error, size_t error_size);
/* Ends the threads, gives held packets up, frees the workers. The cores belong to the caller again. False:
 * one has not ended in so long, and nothing is freed; nothing that it uses may be closed then. */
bool workers_stop(struct workers *workers, unsigned patience_s);
/* The counter that every turn of one's loop advances; it lives as long as the workers. */
const uint64_t *worker_loops(const struct workers *workers, unsigned i);
void worker_read_stats(const struct workers *workers, unsigned i, struct worker_stats *out);

/* --- spread.c: RSS that brings each packet to the worker whose core has its slice -------------------------
 */
struct rte_eth_conf;
/* Asks in `conf` for it; `side` is NAT_INTERNAL, NAT_EXTERNAL, or -1 where both are on this device. Returns
 * false, and the reason in `why`, when the device cannot. */
int spread_ask(uint16_t port_id, int side, unsigned n, struct rte_eth_conf *conf, char *why, size_t why_size);
/* Once the port is started: which queue gets which hash, and that the key is ours; a negative errno when it
 * does not take that. */
int spread_fill(uint16_t port_id, int side, unsigned n);

/* Starts a worker's thread on a CPU, -1 for any; false, and a line in `error`, when that is impossible. */
bool thread_start(pthread_t *thread, void *(*run)(void *), void *argument, int cpu, char *error,
                  size_t error_size);

/* --- gate.c: who is within a device that connects, and who sets it up or takes it down -------------------
 */
/* Once, before the first such device is opened; a negative errno when DPDK does not take it. */
int gate_start(void);
/* Keeps the interrupt thread from now on: it would look at memory that rte_eal_cleanup has unmapped. */
void gate_end(void);
/* Around a burst on such a device. False, at once, while it is shut. */
bool gate_enter(void);
void gate_leave(void);
static inline bool gate_pass(bool gated)
{
    return !gated || gate_enter();
}
/* Around what changes such a device; waits until no worker is within one. Both from the same thread. */
void gate_shut(void);
void gate_open(void);

/* Takes DPDK's log instead of stderr: the last lines of it, for exceptions. */
int log_capture(void);
/* Likewise what libbpf and libxdp say, if a driver has loaded them. */
void log_capture_xdp(void);
/* Copies what was logged since the last call and returns its length. */
size_t log_take(char *out, size_t size);

#endif
