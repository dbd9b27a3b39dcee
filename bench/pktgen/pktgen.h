/* SPDX-License-Identifier: Apache-2.0
 *
 * A traffic generator around a NAT: one thread that sends on two ports and looks at all that comes back.
 *
 * A flow is an inside endpoint and a remote one, both of which follow from its number. Packets carry that
 * number, a sequence number and the time at which they should have left, so the other port knows whose they
 * are whatever the NAT has made of their addresses, and learns the flow's external endpoint.
 */
#ifndef PKTGEN_H
#define PKTGEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PKTGEN_STEPS 4096u     /* of 100 ms, in a result */
#define PKTGEN_BUCKETS 2304u   /* of the histogram: 64 to each power of two, nanoseconds */
#define PKTGEN_SIZES 64u       /* frames of which one after the other is sent */
#define PKTGEN_LEAST_FRAME 60u /* without the checksum of Ethernet: headers and what we write behind them */

enum pktgen_order { PKTGEN_SEQUENTIAL, PKTGEN_RANDOM, PKTGEN_ZIPF, PKTGEN_EACH_ONCE };
enum pktgen_what {
    PKTGEN_OUT = 1, /* from inside */
    PKTGEN_IN = 2,  /* from outside, to the endpoints that were learned; flows without one are skipped */
    PKTGEN_UNSOLICITED = 4 /* from outside, to endpoints of the pool that nobody has */
};

struct pktgen_config {
    void *pool;        /* struct rte_mempool */
    uint16_t ports[2]; /* DPDK's ids: inside, outside */
    uint8_t mac[2][6], nat_mac[2][6];
    uint32_t flows;
    uint32_t inside_first; /* host order; flow f is of host f / flows_per_host */
    uint32_t flows_per_host;
    uint32_t remote_first, remotes;
    uint16_t remote_port;
    uint32_t pool_first, pool_last; /* external addresses that the NAT may use */
};

struct pktgen_phase {
    uint32_t what;  /* pktgen_what, several at once take turns */
    uint32_t order; /* enum pktgen_order */
    uint32_t first_flow, flows;
    const uint32_t *only; /* so many `flows`, one after the other, instead of an order; NULL: none */
    double rate;          /* packets per second in all; 0: as many as the port takes */
    uint64_t duration_ns; /* 0: until `packets` were sent */
    uint64_t packets;
    uint64_t drain_ns;    /* of silence after the last packet that was sent */
    uint32_t check_every; /* of the packets that arrive, one in so many is looked at byte by byte */
    uint32_t seed;
    uint16_t sizes[PKTGEN_SIZES]; /* bytes of a frame, at least PKTGEN_LEAST_FRAME; one after the other */
    uint32_t n_sizes;
};

#define PKTGEN_COUNTERS(C)                                                                                   \
    C(checked)           /* looked at byte by byte */                                                        \
    C(new_mappings)      /* external endpoints that were learned */                                          \
    C(not_sent)          /* the port did not take them, or there was no buffer */                            \
    C(wrong_mapping)     /* of a flow that had another external endpoint before */                           \
    C(wrong_shared)      /* external endpoint of two inside endpoints */                                     \
    C(wrong_pool)        /* external address that is not in the pool */                                      \
    C(wrong_destination) /* it came out for somebody else */                                                 \
    C(wrong_checksum)    /* of IP or UDP */                                                                  \
    C(wrong_ttl)         /* not one less than sent */                                                        \
    C(wrong_length)                                                                                          \
    C(out_of_order) /* sequence below one that has come in the same flow (of the flows that are watched) */  \
    C(strange)      /* not one of our packets, and no ARP */                                                 \
    C(arp_answered)

struct pktgen_result {
    uint64_t elapsed_ns; /* from the first packet sent to the last */
    uint64_t sent[2],
        received[2]; /* by the port that they enter: inside, outside; received: of these, on the other side */
    uint64_t sent_bytes;
#define PKTGEN_COUNTER(name) uint64_t name;
    PKTGEN_COUNTERS(PKTGEN_COUNTER)
#undef PKTGEN_COUNTER
    uint64_t latest_ns; /* how late a packet left at most, at a fixed rate */
    uint32_t n_steps;
    uint32_t steps[2][PKTGEN_STEPS]; /* received in each 100 ms, by the port that they entered */
    uint64_t
        histogram[PKTGEN_BUCKETS]; /* of the time from when a packet should have left until it was seen */
};

struct pktgen;

/* NULL and a line in `error`. Asks the NAT's MACs of nobody: the caller knows them. */
struct pktgen *pktgen_create(const struct pktgen_config *config, char *error, size_t error_size);
void pktgen_destroy(struct pktgen *g);
/* Until the phase has ended, or pktgen_stop was called from another thread. */
void pktgen_run(struct pktgen *g, const struct pktgen_phase *phase, struct pktgen_result *result);
void pktgen_stop(struct pktgen *g);
/* Asks for the MAC of `address` on a port, from `from`, all in host order; false: no answer in time. */
bool pktgen_resolve(struct pktgen *g, unsigned port, uint32_t from, uint32_t address, uint8_t mac[6],
                    unsigned wait_ms);
void pktgen_set_nat_mac(struct pktgen *g, unsigned port, const uint8_t mac[6]);
/* External endpoints that were learned: address in the upper half, port in the lower 16 bits; 0: none. */
const uint64_t *pktgen_mappings(const struct pktgen *g);
void pktgen_forget(struct pktgen *g);

#endif
