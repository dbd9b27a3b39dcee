/* SPDX-License-Identifier: Apache-2.0
 *
 * The DPDK driver of a core: one thread that polls ports, and the log lines of DPDK for error messages.
 */
#ifndef WORKER_H
#define WORKER_H

#include "nat.h"

/* Longest sleep of an idle adaptive worker, in microseconds: the most that idling adds to a packet's latency,
 * besides what the kernel adds to any sleep (`sleep_max_ns` shows it). */
#define WORKER_IDLE_BOUND_US 200u

struct worker_port {
    uint16_t port_id;
    uint8_t fill_checksums; /* a kernel interface may leave checksums to hardware that is not there */
    uint16_t vlan;          /* of the core's port: tells apart those that share a device; 0: untagged */
};

struct worker_config {
    const struct nat_api *api;
    struct nat_core *core;
    void *pool;   /* struct rte_mempool, for the core's own frames */
    int cpu;      /* -1: wherever the system likes */
    int adaptive; /* sleep when idle; otherwise poll all the time */
    int wake_fd;  /* eventfd that wakes the reader of events, -1 without */
    unsigned n_ports;
    struct worker_port ports[NAT_MAX_PORTS];
};

/* Written by the worker alone. */
struct worker_stats {
    uint64_t loops, loops_with_packets, sleeps;
    uint64_t total_ns, busy_ns, sleep_max_ns;
    uint64_t outbox_no_buffer;   /* frames of the core's own that found no mbuf */
    uint64_t fragment_no_buffer; /* fragments that were to be made, likewise */
    uint64_t tx_dropped[NAT_MAX_PORTS], checksums_filled[NAT_MAX_PORTS];
};

struct worker;

/* Starts the thread. NULL and a line in `error` when that is impossible. */
struct worker *worker_start(const struct worker_config *config, char *error, size_t error_size);
/* Ends the thread, gives held packets up, frees the worker. The core belongs to the caller again. */
void worker_stop(struct worker *worker);
/* The counter that every turn of the loop advances; it lives as long as the worker. */
const uint64_t *worker_loops(const struct worker *worker);
void worker_read_stats(const struct worker *worker, struct worker_stats *out);

/* Takes DPDK's log instead of stderr: the last lines of it, for exceptions. */
int log_capture(void);
/* Copies what was logged since the last call and returns its length. */
size_t log_take(char *out, size_t size);

#endif
