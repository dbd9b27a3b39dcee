/* SPDX-License-Identifier: Apache-2.0
 *
 * One loop, one mutex. A thread holds it for the whole of a lap, but for the wait in ppoll; callers hold it
 * for a few assignments. So a caller that has returned knows that the loop acts on what it said: after
 * hb_disarm no byte is written. It inherits priority, since the threads outrank their callers.
 * Two CPUs have a thread each, with the same loop: a hypervisor takes a CPU away for 10 ms now and then, and
 * no priority helps against that. Whoever wakes first does what is due; the other finds it done.
 */
#define _GNU_SOURCE
#include "heartbeat.h"
#include "heartbeat_cpus.h"
#include "heartbeat_role.h"
#include "link_watch.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000u
#define LEAVE_COPIES 3u /* a datagram may be lost, and nothing follows this one */
/* Datagrams read in one lap: more than a default receive buffer holds, so that what waited when the lap began
 * has been read when the peer is judged, and a flood does not keep the thread from judging. */
#define DRAIN 1024u

struct prepared {
    size_t length;
    uint8_t bytes[];
};

struct runner {
    struct heartbeat *hb;
    pthread_t thread;
    int kick_fd;
};

struct heartbeat {
    struct hb_config config;
    pthread_mutex_t mutex;
    struct runner runners[RUNNERS];
    unsigned running; /* threads */
    bool stop;
    int event_fd;

    /* the sender */
    uint64_t next_send, last_look, sequence;
    uint64_t seen[HB_MAX_COUNTERS], still_ns[HB_MAX_COUNTERS];
    bool leave;
    struct sockaddr_storage peer;
    socklen_t peer_length; /* 0: the socket is connected, or the peer has not been heard */

    /* the judge */
    uint64_t peer_nonce, peer_sequence, peer_interval_ns;
    uint64_t due; /* when the next heartbeat counts as missing */
    uint64_t last_heartbeat;
    bool proved;   /* the peer answered us: it is there, now */
    bool answered; /* somebody has answered our present nonce */
    bool left;
    unsigned missed, stalled;

    /* the reaction */
    bool armed;
    enum hb_reason fired;
    struct nat_role *role; /* NULL: none */
    uint32_t at_death;
    int stream_fd; /* -1: nothing to write */
    int tcp_fds[HB_TCP_FDS];
    struct link_watch links;
    unsigned generation; /* of the descriptors: what ppoll said about an older one does not count */
    struct prepared *prepared;
    size_t written;
    struct hb_times times;
    struct hb_stats stats;
};

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void signal_fd(int fd)
{
    while (eventfd_write(fd, 1) && errno == EINTR)
        ;
}

static void kick(struct heartbeat *hb)
{
    for (unsigned i = 0; i < RUNNERS; i++)
        signal_fd(hb->runners[i].kick_fd);
}

/* -- the reaction -----------------------------------------------------------------------------------------
 */

static void write_prepared(struct heartbeat *hb)
{
    while (hb->fired && hb->stream_fd >= 0) {
        const size_t rest = hb->prepared->length - hb->written;
        const ssize_t n =
            rest ? send(hb->stream_fd, hb->prepared->bytes + hb->written, rest, MSG_DONTWAIT | MSG_NOSIGNAL)
                 : 0;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (n < 0)
            hb->stats.write_error = (uint64_t)errno;
        else if ((hb->written += (size_t)n) < hb->prepared->length)
            continue;
        else
            hb->times.written = clock_ns();
        hb->stream_fd = -1;
        signal_fd(hb->event_fd);
    }
}

static void die(struct heartbeat *hb, enum hb_reason reason)
{
    if (!hb->armed || hb->fired || hb->left)
        return;
    hb->fired = reason;
    hb->times.last_heartbeat = hb->last_heartbeat;
    hb->times.detected = clock_ns();
    role_take_over(hb->role, reason, hb->at_death, (uint32_t)hb->stats.peer_term);
    write_prepared(hb);
    signal_fd(hb->event_fd);
}

/* -- the judge --------------------------------------------------------------------------------------------
 */

static uint64_t period(const struct heartbeat *hb)
{
    /* A peer that was told to send less often than we expect is slow, not dead. */
    return hb->peer_interval_ns > hb->config.interval_ns ? hb->peer_interval_ns : hb->config.interval_ns;
}

static void expect_next(struct heartbeat *hb, uint64_t now)
{
    hb->missed = 0;
    hb->due = now + period(hb) + period(hb) / 4; /* a quarter for what the sender and the network are late */
}

/* Whether we come too late for the appointment to say anything about the peer. */
static bool late(struct heartbeat *hb, uint64_t now, uint64_t appointment)
{
    const uint64_t by = now - appointment;
    if (by > hb->stats.max_late_ns)
        hb->stats.max_late_ns = by;
    hb->stats.late_wakeups += by > hb->config.interval_ns / 2;
    return by > hb->config.interval_ns / 2;
}

static bool lost(const struct heartbeat *hb)
{
    return !hb->proved || hb->missed >= hb->config.misses;
}

/* `now` was read before the socket was drained: whatever came until then has moved `due`. */
static void judge_silence(struct heartbeat *hb, uint64_t now)
{
    if (!hb->proved || now < hb->due)
        return;
    if (late(hb, now, hb->due)) {
        hb->due = now + period(hb);
        return;
    }
    hb->due += period(hb);
    hb->missed++;
    hb->stats.missed++;
    if (lost(hb))
        die(hb, HB_SILENCE);
}

/* A conversation is named by both nonces. While the peer of one lives, no other can begin: not even with the
 * key can a recording, or a second process with the peer's configuration, speak for it. */
static bool same_conversation(struct heartbeat *hb, const struct hb_packet *p)
{
    if (p->nonce == hb->peer_nonce && p->epoch == hb->stats.peer_epoch &&
        p->instance == hb->stats.peer_instance)
        return true;
    if (!lost(hb))
        return false;
    if (hb->answered) /* what was once an answer must not prove the same peer again when it is replayed */
        hb->config.nonce =
            hb_siphash(hb->config.key, (const uint8_t *)&hb->config.nonce, sizeof hb->config.nonce);
    hb->answered = false;
    hb->peer_nonce = p->nonce;
    hb->stats.peer_epoch = p->epoch;
    hb->stats.peer_instance = p->instance;
    hb->peer_sequence = 0;
    hb->proved = hb->left = false;
    return true;
}

static void hear(struct heartbeat *hb, const struct hb_packet *p, uint64_t now)
{
    if (p->instance == hb->config.instance ||
        (hb->config.peer_instance >= 0 && p->instance != hb->config.peer_instance) ||
        !same_conversation(hb, p)) {
        hb->stats.bad_foreign++;
        return;
    }
    if (p->sequence <= hb->peer_sequence) {
        hb->stats.bad_replay++;
        return;
    }
    hb->peer_sequence = p->sequence;
    if (p->echo != hb->config.nonce) {
        hb->stats.unproved++;
        return;
    }
    if (hb->proved && now - hb->last_heartbeat > hb->stats.longest_silence_ns)
        hb->stats.longest_silence_ns = now - hb->last_heartbeat;
    hb->proved = hb->answered = true;
    hb->last_heartbeat = now;
    hb->peer_interval_ns = (uint64_t)p->interval_us * 1000;
    hb->left = p->flags & HB_LEAVE;
    hb->stalled = p->flags & HB_STALLED ? hb->stalled + 1 : 0;
    hb->stats.received++;
    hb->stats.received_stalled += hb->stalled > 0;
    hb->stats.peer_progress = p->progress;
    role_hear(hb->role, &hb->stats, p);
    expect_next(hb, now);
    if (hb->stalled >= hb->config.misses)
        die(hb, HB_STALL);
}

static void drain(struct heartbeat *hb)
{
    uint8_t bytes[HB_PACKET_BYTES + 1]; /* one more: a longer datagram shows */
    struct sockaddr_storage from;

    for (unsigned i = 0; i < DRAIN; i++) {
        socklen_t from_length = sizeof from;
        const ssize_t n = recvfrom(hb->config.udp_fd, bytes, sizeof bytes, MSG_DONTWAIT,
                                   (struct sockaddr *)&from, &from_length);
        struct hb_packet packet;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (n < 0)
            continue; /* an ICMP error about what we sent: it says nothing that silence does not */
        if (!hb_open(&packet, bytes, (size_t)n, hb->config.key)) {
            hb->stats.bad_auth++;
            continue;
        }
        const uint64_t accepted = hb->peer_sequence;
        hear(hb, &packet, clock_ns());
        if (!hb->config.connected && hb->peer_nonce == packet.nonce && hb->peer_sequence != accepted) {
            hb->peer = from;
            hb->peer_length = from_length;
        }
    }
}

/* -- the sender -------------------------------------------------------------------------------------------
 */

/* Adds up progress; "stalled" when a worker has stood still for longer than the patience. Only time in which
 * this thread ran counts: after a stop of the whole process the workers get their chance first. */
static void look_at_workers(struct heartbeat *hb, uint64_t now, struct hb_packet *packet)
{
    const uint64_t interval = hb->config.interval_ns;
    const uint64_t passed = now - hb->last_look < interval ? now - hb->last_look : interval;

    hb->last_look = now;
    hb->stats.stalled = false;
    for (unsigned i = 0; i < hb->config.n_counters; i++) {
        const uint64_t loops = __atomic_load_n(hb->config.counters[i], __ATOMIC_RELAXED);
        hb->still_ns[i] = loops == hb->seen[i] ? hb->still_ns[i] + passed : 0;
        hb->seen[i] = loops;
        packet->progress += loops;
        hb->stats.stalled |= hb->still_ns[i] > hb->config.patience_ns;
    }
    packet->flags |= hb->stats.stalled ? HB_STALLED : 0;
}

static void send_heartbeat(struct heartbeat *hb, uint64_t now)
{
    struct hb_packet packet = {
        .instance = hb->config.instance,
        .workers = (uint8_t)hb->config.n_counters,
        .flags = hb->leave ? HB_LEAVE : 0,
        .epoch = hb->config.epoch,
        .interval_us = (uint32_t)(hb->config.interval_ns / 1000),
        .nonce = hb->config.nonce,
        .echo = hb->peer_nonce,
        .sequence = ++hb->sequence,
        .silence_us = (uint32_t)(hb->config.interval_ns * hb->config.misses / 1000),
    };
    look_at_workers(hb, now, &packet);
    role_tell(hb->role, &packet, !lost(hb) && !hb->left);
    if (!hb->config.connected && !hb->peer_length)
        return;
    hb_seal(&packet, hb->config.key);
    const ssize_t n = sendto(hb->config.udp_fd, &packet, sizeof packet, MSG_DONTWAIT | MSG_NOSIGNAL,
                             hb->peer_length ? (struct sockaddr *)&hb->peer : NULL, hb->peer_length);
    hb->stats.sent += n == sizeof packet;
    hb->stats.send_errors += n != sizeof packet;
}

static void send_when_due(struct heartbeat *hb, uint64_t now)
{
    if (now < hb->next_send)
        return;
    late(hb, now, hb->next_send);
    send_heartbeat(hb, now);
    hb->next_send += hb->config.interval_ns;
    if (hb->next_send <= now)
        hb->next_send = now + hb->config.interval_ns;
}

/* -- the thread -------------------------------------------------------------------------------------------
 */

enum { KICK, UDP, LINKS, STREAM, TCP, N_FDS = TCP + HB_TCP_FDS };

static void wait_for_work(struct runner *runner, struct pollfd fds[N_FDS])
{
    struct heartbeat *hb = runner->hb;
    const bool writing = hb->fired && hb->stream_fd >= 0;
    const bool watching = hb->armed && !hb->fired && !hb->left;
    const unsigned generation = hb->generation;

    fds[KICK] = (struct pollfd){.fd = runner->kick_fd, .events = POLLIN};
    fds[UDP] = (struct pollfd){.fd = hb->config.udp_fd, .events = POLLIN};
    fds[LINKS] = (struct pollfd){.fd = hb->links.fd, .events = POLLIN};
    fds[STREAM] = (struct pollfd){.fd = writing ? hb->stream_fd : -1, .events = POLLOUT};
    for (unsigned i = 0; i < HB_TCP_FDS; i++) /* no POLLIN: the data is somebody else's */
        fds[TCP + i] = (struct pollfd){.fd = watching ? hb->tcp_fds[i] : -1, .events = POLLRDHUP};

    uint64_t next = hb->proved && hb->due < hb->next_send ? hb->due : hb->next_send;
    if (runner != hb->runners) { /* the second one need not wake for what the first one does in time */
        fds[UDP].fd = -1;
        next += hb->config.interval_ns / 8; /* less than the slack of the judge */
    }
    pthread_mutex_unlock(&hb->mutex);
    const uint64_t now = clock_ns();
    const uint64_t wait = next > now ? next - now : 0;
    const int ready =
        ppoll(fds, N_FDS,
              &(struct timespec){.tv_sec = (time_t)(wait / SECOND), .tv_nsec = (long)(wait % SECOND)}, NULL);
    pthread_mutex_lock(&hb->mutex);
    for (unsigned i = 0; i < N_FDS; i++)
        if (ready <= 0 || (i >= TCP && generation != hb->generation))
            fds[i].revents = 0;
}

static void *run(void *argument)
{
    struct runner *runner = argument;
    struct heartbeat *hb = runner->hb;
    struct pollfd fds[N_FDS];

    pthread_setname_np(pthread_self(), "nat-heartbeat");
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0); /* where SCHED_FIFO, which has none, is not allowed */
    pthread_mutex_lock(&hb->mutex);
    while (!hb->stop) {
        wait_for_work(runner, fds);
        const uint64_t now = clock_ns();
        if (fds[KICK].revents)
            eventfd_read(runner->kick_fd, &(eventfd_t){0});
        if (link_watch_lost(&hb->links))
            die(hb, HB_LINK_DOWN);
        drain(hb); /* first: a peer that said that it leaves may close its connections */
        for (unsigned i = 0; i < HB_TCP_FDS; i++)
            if (fds[TCP + i].revents & POLLNVAL)
                hb->tcp_fds[i] = -1;
            else if (fds[TCP + i].revents & (POLLRDHUP | POLLHUP | POLLERR))
                die(hb, HB_TCP_END);
        judge_silence(hb, now);
        write_prepared(hb);
        send_when_due(hb, now);
    }
    pthread_mutex_unlock(&hb->mutex);
    return NULL;
}

/* -- for callers ------------------------------------------------------------------------------------------
 */

struct heartbeat *hb_create(const struct hb_config *config)
{
    struct heartbeat *hb = calloc(1, sizeof *hb);
    if (!hb) {
        close(config->udp_fd);
        errno = ENOMEM;
        return NULL;
    }
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&hb->mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    hb->config = *config;
    hb->stream_fd = hb->tcp_fds[0] = hb->tcp_fds[1] = hb->links.fd = -1;
    hb->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    bool short_of_fds = hb->event_fd < 0;
    for (unsigned i = 0; i < RUNNERS; i++) {
        hb->runners[i] = (struct runner){.hb = hb, .kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
        short_of_fds |= hb->runners[i].kick_fd < 0;
    }
    if (!short_of_fds)
        return hb;
    hb_destroy(hb);
    errno = EMFILE;
    return NULL;
}

void hb_destroy(struct heartbeat *hb)
{
    hb_stop(hb);
    close(hb->config.udp_fd);
    link_watch_set(&hb->links, NULL, 0);
    for (unsigned i = 0; i < RUNNERS; i++)
        if (hb->runners[i].kick_fd >= 0)
            close(hb->runners[i].kick_fd);
    if (hb->event_fd >= 0)
        close(hb->event_fd);
    pthread_mutex_destroy(&hb->mutex);
    free(hb->prepared);
    free(hb);
}

int hb_start(struct heartbeat *hb)
{
    if (hb->running)
        return EALREADY;
    const uint64_t now = clock_ns();
    hb->stop = false;
    hb->next_send = hb->last_look = now;
    expect_next(hb, now);
    cpu_set_t halves[RUNNERS];
    const unsigned wanted = split_cpus(halves);
    int rc = 0;
    bool realtime = true;
    while (!rc && hb->running < wanted) {
        struct runner *runner = &hb->runners[hb->running];
        rc = start_on(&halves[hb->running], &runner->thread, run, runner, &realtime);
        hb->running += !rc;
    }
    pthread_mutex_lock(&hb->mutex);
    hb->stats.realtime = realtime;
    pthread_mutex_unlock(&hb->mutex);
    if (rc)
        hb_stop(hb);
    return rc;
}

void hb_stop(struct heartbeat *hb)
{
    pthread_mutex_lock(&hb->mutex);
    hb->stop = true;
    pthread_mutex_unlock(&hb->mutex);
    kick(hb);
    while (hb->running)
        pthread_join(hb->runners[--hb->running].thread, NULL);
}

static int copy(struct prepared **out, const void *data, size_t n)
{
    if (n > HB_MAX_PREPARED)
        return EMSGSIZE;
    if (!(*out = malloc(sizeof **out + n)))
        return ENOMEM;
    (*out)->length = n;
    memcpy((*out)->bytes, data, n);
    return 0;
}

int hb_arm(struct heartbeat *hb, const void *data, size_t n, int fd)
{
    struct prepared *new, *old;
    const int rc = copy(&new, data, n);
    if (rc)
        return rc;
    pthread_mutex_lock(&hb->mutex);
    link_watch_lost(&hb->links); /* before: the caller has looked, or is told by others */
    old = hb->prepared;
    hb->prepared = new;
    hb->written = 0;
    hb->stream_fd = fd;
    hb->armed = true;
    hb->fired = HB_NOT_FIRED;
    hb->times = (struct hb_times){0};
    hb->stats.write_error = 0;
    hb->stalled = 0;
    hb->generation++;
    expect_next(hb, clock_ns()); /* the silence before is not counted twice */
    pthread_mutex_unlock(&hb->mutex);
    kick(hb);
    free(old);
    return 0;
}

int hb_update(struct heartbeat *hb, const void *data, size_t n)
{
    struct prepared *old;
    int rc = copy(&old, data, n);
    if (rc)
        return rc;
    pthread_mutex_lock(&hb->mutex);
    if (hb->armed && !hb->fired) {
        struct prepared *swap = hb->prepared;
        hb->prepared = old;
        old = swap;
    } else
        rc = ECANCELED;
    pthread_mutex_unlock(&hb->mutex);
    free(old);
    return rc;
}

bool hb_disarm(struct heartbeat *hb)
{
    pthread_mutex_lock(&hb->mutex);
    hb->armed = false;
    hb->stream_fd = -1;
    hb->generation++;
    const bool in_time = !hb->fired;
    pthread_mutex_unlock(&hb->mutex);
    kick(hb);
    return in_time;
}

void hb_follow(struct heartbeat *hb, struct nat_role *role, uint32_t at_death)
{
    pthread_mutex_lock(&hb->mutex);
    hb->role = role, hb->at_death = at_death;
    pthread_mutex_unlock(&hb->mutex);
}

void hb_rekey(struct heartbeat *hb, const uint8_t key[HB_KEY_BYTES])
{
    pthread_mutex_lock(&hb->mutex);
    memcpy(hb->config.key, key, HB_KEY_BYTES);
    pthread_mutex_unlock(&hb->mutex);
}

void hb_leave(struct heartbeat *hb, bool leave)
{
    pthread_mutex_lock(&hb->mutex);
    hb->leave = leave;
    for (unsigned i = 0; hb->running && i < LEAVE_COPIES; i++)
        send_heartbeat(hb, clock_ns());
    pthread_mutex_unlock(&hb->mutex);
}

void hb_watch_tcp(struct heartbeat *hb, const int fds[HB_TCP_FDS])
{
    pthread_mutex_lock(&hb->mutex);
    memcpy(hb->tcp_fds, fds, sizeof hb->tcp_fds);
    hb->generation++;
    pthread_mutex_unlock(&hb->mutex);
    kick(hb);
}

int hb_watch_links(struct heartbeat *hb, const int *indexes, unsigned n)
{
    pthread_mutex_lock(&hb->mutex);
    const int rc = link_watch_set(&hb->links, indexes, n);
    pthread_mutex_unlock(&hb->mutex);
    kick(hb);
    return rc;
}

enum hb_reason hb_fired(struct heartbeat *hb, struct hb_times *times)
{
    pthread_mutex_lock(&hb->mutex);
    const enum hb_reason reason = hb->fired;
    *times = hb->times;
    if (!reason)
        times->last_heartbeat = hb->last_heartbeat;
    pthread_mutex_unlock(&hb->mutex);
    return reason;
}

void hb_read_stats(struct heartbeat *hb, struct hb_stats *out)
{
    pthread_mutex_lock(&hb->mutex);
    *out = hb->stats;
    out->alive = !lost(hb) && hb->stalled < hb->config.misses && !hb->left;
    out->left = hb->left;
    out->armed = hb->armed && !hb->fired;
    pthread_mutex_unlock(&hb->mutex);
}

int hb_event_fd(const struct heartbeat *hb)
{
    return hb->event_fd;
}
