/* SPDX-License-Identifier: Apache-2.0
 *
 * Failure detection: a loop in threads of its own that sends heartbeats to the peer, judges the peer's,
 * watches the end of the TCP connection to it and the links to it, and at its death writes prepared bytes on
 * a stream. It needs neither Python nor DPDK, and waits for nobody.
 *
 * Times are nanoseconds of CLOCK_MONOTONIC. All functions but create and destroy may be called from any
 * thread.
 */
#ifndef HEARTBEAT_H
#define HEARTBEAT_H

#include "heartbeat_packet.h"
#include "role.h"

#define HB_MAX_COUNTERS 64u
#define HB_MAX_PREPARED 65536u
#define HB_TCP_FDS 2u

enum hb_reason { HB_NOT_FIRED = 0, HB_SILENCE, HB_STALL, HB_TCP_END, HB_LINK_DOWN };

struct hb_config {
    int udp_fd;     /* bound, and the heartbeat's own from now on */
    bool connected; /* to the peer; otherwise its address is learned from what it sends */
    uint8_t key[HB_KEY_BYTES];
    uint8_t instance;
    int16_t peer_instance; /* -1: any but our own */
    uint32_t epoch;
    uint64_t nonce;       /* random */
    uint64_t interval_ns; /* between two heartbeats */
    uint64_t patience_ns; /* that a worker may stand still */
    unsigned misses;      /* heartbeats in a row, missing or saying "stalled", that make a death */
    unsigned n_counters;
    const uint64_t *counters[HB_MAX_COUNTERS]; /* each written by a worker; readable until hb_stop */
};

#define HB_STATS_FIELDS(F)                                                                                   \
    F(sent)                                                                                                  \
    F(send_errors)                                                                                           \
    F(received)         /* heartbeats of the peer that count */                                              \
    F(received_stalled) /* of these: a worker of the peer stands still */                                    \
    F(unproved)         /* authentic, but not an answer to us: the peer does not know us yet, or a replay */ \
    F(bad_auth)         /* not a heartbeat, or without the key */                                            \
    F(bad_replay)       /* sequence seen before */                                                           \
    F(bad_foreign)      /* another instance, epoch or conversation while the peer lives */                   \
    F(missed)           /* intervals without a heartbeat that counted against the peer */                    \
    F(late_wakeups)     /* of ours, by more than half an interval: these intervals count for nobody */       \
    F(max_late_ns)                                                                                           \
    F(longest_silence_ns) /* between two heartbeats that count */                                            \
    F(alive)              /* heartbeats of the peer arrive, and its workers advance */                       \
    F(left)               /* the peer said that it leaves */                                                 \
    F(armed)                                                                                                 \
    F(realtime) /* the threads run with SCHED_FIFO */                                                        \
    F(peer_instance)                                                                                         \
    F(peer_epoch)                                                                                            \
    F(peer_term)                                                                                             \
    F(peer_carries) /* by its last heartbeat that counts; and so the next one */                             \
    F(peer_unfit)                                                                                            \
    F(peer_both)                                                                                             \
    F(peer_silence_us) /* after which it holds us dead; 0: it has not told */                                \
    F(stalled)         /* a worker of ours stands still */                                                   \
    F(peer_progress)                                                                                         \
    F(write_error) /* errno that ended the writing of the prepared bytes, 0 if none did */

struct hb_stats {
#define HB_STATS_FIELD(name) uint64_t name;
    HB_STATS_FIELDS(HB_STATS_FIELD)
#undef HB_STATS_FIELD
};

struct hb_times {
    uint64_t last_heartbeat, detected, written; /* 0: not yet */
};

struct heartbeat;

/* NULL and errno when memory or descriptors are short. Takes udp_fd in any case. */
struct heartbeat *hb_create(const struct hb_config *config);
void hb_destroy(struct heartbeat *hb); /* stops first */
/* 0 or an errno. A heartbeat that was stopped may be started again. */
int hb_start(struct heartbeat *hb);
void hb_stop(struct heartbeat *hb);

/* Copies the bytes; `fd` is a stream socket that stays open until disarmed or fired, or -1: a death is told,
 * and nothing written. 0 or an errno. */
int hb_arm(struct heartbeat *hb, const void *data, size_t n, int fd);
/* Other bytes, all at once. 0; ECANCELED when not armed, or fired already; ENOMEM, EMSGSIZE. */
int hb_update(struct heartbeat *hb, const void *data, size_t n);
/* After it returns nothing is written. Whether it came before the death (false: fired, bytes may be out). */
bool hb_disarm(struct heartbeat *hb);
/* Heartbeats tell this role (NULL: none), which must live until hb_destroy. At the peer's death, if armed,
 * STANDBY becomes `at_death`, and its term the highest one plus 1; with STANDBY it stays. */
void hb_follow(struct heartbeat *hb, struct nat_role *role, uint32_t at_death);
/* Both sides must change their keys; what comes with another one meanwhile counts as no heartbeat. */
void hb_rekey(struct heartbeat *hb, const uint8_t key[HB_KEY_BYTES]);
/* From the next heartbeat on, one of which is sent at once, say that we leave (or that we do not). */
void hb_leave(struct heartbeat *hb, bool leave);
/* Connections whose end is a death; -1: none. What was watched before may be closed once this has returned.
 */
void hb_watch_tcp(struct heartbeat *hb, const int fds[HB_TCP_FDS]);

/* By interface index, at most LINK_WATCH_MAX (0: none), of the network namespace of the caller: one that goes
 * down is as good as a death. 0 or an errno. */
int hb_watch_links(struct heartbeat *hb, const int *indexes, unsigned n);

enum hb_reason hb_fired(struct heartbeat *hb, struct hb_times *times);
void hb_read_stats(struct heartbeat *hb, struct hb_stats *out);
/* Becomes readable when the peer's death was detected, and again when writing has ended. */
int hb_event_fd(const struct heartbeat *hb);

#endif
