/* SPDX-License-Identifier: Apache-2.0
 *
 * A measured UDP stream, for what a failover costs: bench/failover.py steers it.
 *
 *   send SOURCE DESTINATION PORT RATE FLOWS PACKETS FILE   packets at fixed times, round the flows; FILE gets
 *                                                          each one's time of sending. SIGTERM ends it
 *   receive ADDRESS PORT FILE                              until SIGTERM; FILE gets an `arrival` for each
 *   echo ADDRESS PORT                                      until SIGTERM: sends back what comes
 *   ask DESTINATION PORT FLOWS GAP_US FILE                 for each new flow two questions, one after the
 *                                                          other; FILE gets both round-trip times in ns
 *   tap INTERFACE OTHER PORT FILE                          until SIGTERM; FILE gets a `seen` for each
 * question and answer of ask that passes one of these interfaces witness ADDRESS PORT until SIGTERM: answers
 * with what it sees as source churn SOURCE DESTINATION PORT RATE FIRST FLOWS WAIT FILE RATE new flows per
 * second, from flow FIRST on, and "asked"; then (WAIT 1: after SIGUSR1) again in those that were answered;
 * FILE gets a `flow` each
 *
 * Times are CLOCK_MONOTONIC in ns, which is one clock for all namespaces of a machine. A flow is a source
 * port; the sender writes IP headers itself, so that 50 000 of them need one socket.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <netpacket/packet.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define FIRST_PORT 10000u
#define PORTS 50000u
#define ANSWER_MS 2000
#define TRIES 4               /* of churn's second round: a packet may be lost, a session not */
#define WAIT_NS 1000000000ull /* for answers, after each of them */

struct payload {
    uint64_t sequence, sent_ns;
};
struct arrival {
    uint64_t sequence, sent_ns, arrived_ns;
    uint32_t address; /* host order: what the receiver saw as the source */
    uint16_t port, reserved;
};
struct packet {
    struct iphdr ip;
    struct udphdr udp;
    struct payload payload;
} __attribute__((packed));

struct sighting {
    uint64_t sequence, sent_ns;
    uint32_t address; /* host order: what the witness saw as the source */
    uint16_t port, reserved;
};
struct flow {
    struct {
        uint64_t asked_ns, answered_ns; /* 0: never */
        uint32_t address;
        uint16_t port, tries;
    } round[2];
};

struct seen {
    uint64_t number, at_ns; /* CLOCK_REALTIME */
    uint32_t other, outgoing;
};

static volatile sig_atomic_t ended;

static void end(int number)
{
    (void)number;
    ended = 1;
}

static void die(const char *what)
{
    fprintf(stderr, "stream: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t at)
{
    struct timespec t = {.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR && !ended) {
    }
}

static struct sockaddr_in place(const char *address, unsigned port)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, address, &in.sin_addr) != 1) {
        errno = EINVAL;
        die(address);
    }
    return in;
}

static FILE *create(const char *path)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL)
        die(path);
    return file;
}

static uint16_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static uint16_t udp_checksum(const struct packet *p)
{
    uint16_t words[(sizeof p->udp + sizeof p->payload) / 2];
    uint64_t sum = fold((uint64_t)p->ip.saddr + p->ip.daddr) + htons(IPPROTO_UDP) + (uint64_t)p->udp.len;
    memcpy(words, &p->udp, sizeof words);
    for (unsigned i = 0; i < sizeof words / sizeof *words; i++)
        sum += words[i];
    const uint16_t check = (uint16_t)~fold(sum);
    return check ? check : 0xffff;
}

static void fill(struct packet *p, uint64_t sequence, uint64_t now, uint64_t flow)
{
    p->payload = (struct payload){sequence, now};
    p->udp.source = htons((uint16_t)(FIRST_PORT + flow % PORTS));
    p->udp.check = 0;
    p->udp.check = udp_checksum(p);
}

static struct packet blank(const struct sockaddr_in *from, const struct sockaddr_in *to)
{
    return (struct packet){
        .ip = {.version = 4,
               .ihl = 5,
               .ttl = 64,
               .protocol = IPPROTO_UDP,
               .saddr = from->sin_addr.s_addr,
               .daddr = to->sin_addr.s_addr,
               .tot_len = htons(sizeof(struct packet)),
               .frag_off = htons(0x4000)},
        .udp = {.dest = to->sin_port, .len = htons(sizeof(struct udphdr) + sizeof(struct payload))},
    };
}

/* What is late goes out at once, and its time says so. */
static int send_stream(char **a)
{
    const struct sockaddr_in from = place(a[0], 0), to = place(a[1], (unsigned)atoi(a[2]));
    const double rate = atof(a[3]);
    const uint64_t flows = strtoull(a[4], NULL, 10), packets = strtoull(a[5], NULL, 10);
    FILE *file = create(a[6]);
    uint64_t *times = calloc(packets, sizeof *times);
    static struct packet batch[BATCH];
    struct iovec vectors[BATCH];
    struct mmsghdr messages[BATCH];
    const int s = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);

    if (times == NULL || s < 0 || flows == 0 || flows > PORTS || rate <= 0)
        die("send");
    setsockopt(s, SOL_SOCKET, SO_SNDBUFFORCE, &(int){16 << 20}, sizeof(int));
    for (unsigned i = 0; i < BATCH; i++) {
        batch[i] = blank(&from, &to);
        vectors[i] = (struct iovec){&batch[i], sizeof *batch};
        messages[i].msg_hdr = (struct msghdr){.msg_name = (void *)(uintptr_t)&to,
                                              .msg_namelen = sizeof to,
                                              .msg_iov = &vectors[i],
                                              .msg_iovlen = 1};
    }
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
    const uint64_t begin = now_ns() + 1000000;
    printf("begin %llu\n", (unsigned long long)begin);
    fflush(stdout);
    uint64_t next = 0;
    while (next < packets && !ended) {
        sleep_until(begin + (uint64_t)((double)next * 1e9 / rate));
        const uint64_t now = now_ns();
        unsigned n = 0;
        for (; n < BATCH && next + n < packets && begin + (uint64_t)((double)(next + n) * 1e9 / rate) <= now;
             n++) {
            fill(&batch[n], next + n, now, (next + n) % flows);
            times[next + n] = now;
        }
        for (unsigned sent = 0; sent < n;) {
            const int rc = sendmmsg(s, messages + sent, n - sent, 0);
            if (rc < 0 && errno != EINTR && errno != ENOBUFS)
                die("sendmmsg");
            if (rc > 0)
                sent += (unsigned)rc;
        }
        next += n;
    }
    if (fwrite(times, sizeof *times, next, file) != next || fclose(file))
        die(a[6]);
    return 0;
}

static int listen_at(const char *address, const char *port)
{
    const struct sockaddr_in here = place(address, (unsigned)atoi(port));
    const int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s < 0 || bind(s, (const struct sockaddr *)&here, sizeof here))
        die(address);
    setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &(int){256 << 20}, sizeof(int));
    printf("listening\n");
    fflush(stdout);
    return s;
}

static int receive_stream(char **a)
{
    const int s = listen_at(a[0], a[1]);
    FILE *file = create(a[2]);
    struct payload payloads[BATCH];
    struct sockaddr_in from[BATCH];
    struct iovec vectors[BATCH];
    struct mmsghdr messages[BATCH];

    while (!ended) {
        for (unsigned i = 0; i < BATCH; i++) {
            vectors[i] = (struct iovec){&payloads[i], sizeof *payloads};
            messages[i].msg_hdr = (struct msghdr){
                .msg_name = &from[i], .msg_namelen = sizeof *from, .msg_iov = &vectors[i], .msg_iovlen = 1};
        }
        const int n = recvmmsg(s, messages, BATCH, MSG_WAITFORONE, NULL);
        const uint64_t now = now_ns();
        if (n < 0 && errno != EINTR)
            die("recvmmsg");
        for (int i = 0; i < n; i++) {
            const struct arrival arrival = {payloads[i].sequence,           payloads[i].sent_ns,     now,
                                            ntohl(from[i].sin_addr.s_addr), ntohs(from[i].sin_port), 0};
            if (messages[i].msg_len == sizeof *payloads && fwrite(&arrival, sizeof arrival, 1, file) != 1)
                die(a[2]);
        }
    }
    if (fclose(file))
        die(a[2]);
    return 0;
}

static int echo(char **a)
{
    const int s = listen_at(a[0], a[1]);
    char data[2048];

    while (!ended) {
        struct sockaddr_in from;
        socklen_t size = sizeof from;
        const ssize_t n = recvfrom(s, data, sizeof data, 0, (struct sockaddr *)&from, &size);
        if (n >= 0)
            sendto(s, data, (size_t)n, 0, (const struct sockaddr *)&from, size);
    }
    return 0;
}

/* Round-trip time in ns, 0 when no answer came. */
static uint64_t ask_once(int s, uint64_t number)
{
    uint64_t answer = 0;
    const uint64_t before = now_ns();
    if (send(s, &number, sizeof number, 0) < 0)
        return 0;
    while (poll(&(struct pollfd){.fd = s, .events = POLLIN}, 1, ANSWER_MS) == 1)
        if (recv(s, &answer, sizeof answer, 0) == sizeof answer && answer == number)
            return now_ns() - before;
    return 0;
}

static int ask(char **a)
{
    const struct sockaddr_in to = place(a[0], (unsigned)atoi(a[1]));
    const uint64_t flows = strtoull(a[2], NULL, 10), gap_ns = strtoull(a[3], NULL, 10) * 1000;
    FILE *file = create(a[4]);

    for (uint64_t i = 0; i < flows && !ended; i++) {
        const int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (s < 0 || connect(s, (const struct sockaddr *)&to, sizeof to))
            die("socket");
        uint64_t times[2];
        for (unsigned k = 0; k < 2; k++) {
            times[k] = ask_once(s, 2 * i + k);
            sleep_until(now_ns() + gap_ns);
        }
        if (fwrite(times, sizeof times, 1, file) != 1)
            die(a[4]);
        close(s);
    }
    if (fclose(file))
        die(a[4]);
    return 0;
}

/* Times are the kernel's, of when it had the frame. */
static int tap(char **a)
{
    const uint16_t port = htons((uint16_t)atoi(a[2]));
    FILE *file = create(a[3]);
    struct pollfd taps[2];

    for (unsigned i = 0; i < 2; i++) {
        const struct sockaddr_ll here = {.sll_family = AF_PACKET,
                                         .sll_protocol = htons(ETH_P_ALL),
                                         .sll_ifindex = (int)if_nametoindex(a[i])};
        const int s = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (s < 0 || here.sll_ifindex == 0 ||
            setsockopt(s, SOL_SOCKET, SO_TIMESTAMPNS, &(int){1}, sizeof(int)) ||
            bind(s, (const struct sockaddr *)&here, sizeof here))
            die(a[i]);
        taps[i] = (struct pollfd){.fd = s, .events = POLLIN};
    }
    printf("listening\n");
    fflush(stdout);
    while (!ended) {
        poll(taps, 2, -1);
        for (unsigned i = 0; i < 2; i++) {
            struct {
                uint8_t link[14];
                struct iphdr ip;
                struct udphdr udp;
                uint64_t number;
            } __attribute__((packed)) frame;
            struct sockaddr_ll from;
            char control[CMSG_SPACE(sizeof(struct timespec))];
            struct iovec vector = {&frame, sizeof frame};
            struct msghdr message = {.msg_name = &from,
                                     .msg_namelen = sizeof from,
                                     .msg_iov = &vector,
                                     .msg_iovlen = 1,
                                     .msg_control = control,
                                     .msg_controllen = sizeof control};
            const ssize_t n = recvmsg(taps[i].fd, &message, 0);
            const struct cmsghdr *stamp = n < 0 ? NULL : CMSG_FIRSTHDR(&message);
            if (stamp == NULL || n < (ssize_t)sizeof frame || frame.ip.protocol != IPPROTO_UDP ||
                frame.ip.ihl != 5 || frame.udp.len != htons(sizeof frame.udp + sizeof frame.number) ||
                (frame.udp.dest != port && frame.udp.source != port))
                continue;
            struct timespec t;
            memcpy(&t, CMSG_DATA(stamp), sizeof t);
            const struct seen seen = {frame.number, (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec, i,
                                      from.sll_pkttype == PACKET_OUTGOING};
            if (fwrite(&seen, sizeof seen, 1, file) != 1)
                die(a[3]);
        }
    }
    if (fclose(file))
        die(a[3]);
    return 0;
}

static int witness(char **a)
{
    const int s = listen_at(a[0], a[1]);

    while (!ended) {
        struct payload asked;
        struct sockaddr_in from;
        socklen_t size = sizeof from;
        if (recvfrom(s, &asked, sizeof asked, 0, (struct sockaddr *)&from, &size) != sizeof asked)
            continue;
        const struct sighting seen = {asked.sequence, asked.sent_ns, ntohl(from.sin_addr.s_addr),
                                      ntohs(from.sin_port), 0};
        sendto(s, &seen, sizeof seen, 0, (const struct sockaddr *)&from, size);
    }
    return 0;
}

/* Answers that have come; the sequence is the flow, and above it the round. */
static void hear(int s, uint16_t port, struct flow *table, uint64_t flows)
{
    struct {
        struct iphdr ip;
        struct udphdr udp;
        struct sighting seen;
    } __attribute__((packed)) data;

    for (ssize_t n; (n = recv(s, &data, sizeof data, MSG_DONTWAIT)) >= 0;) {
        const uint64_t flow = data.seen.sequence & 0xffffffff, round = data.seen.sequence >> 32;
        if (n != sizeof data || data.udp.source != port || flow >= flows || round > 1)
            continue;
        if (table[flow].round[round].answered_ns == 0) {
            table[flow].round[round].answered_ns = now_ns();
            table[flow].round[round].address = data.seen.address;
            table[flow].round[round].port = data.seen.port;
        }
    }
}

static int churn(char **a)
{
    const struct sockaddr_in from = place(a[0], 0), to = place(a[1], (unsigned)atoi(a[2]));
    const double rate = atof(a[3]);
    const uint64_t first = strtoull(a[4], NULL, 10), flows = strtoull(a[5], NULL, 10);
    const int waits = atoi(a[6]);
    FILE *file = create(a[7]);
    struct flow *table = calloc(flows, sizeof *table);
    const int out = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
    const int in = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_UDP);
    struct packet packet = blank(&from, &to);
    sigset_t go_on;

    sigemptyset(&go_on);
    sigaddset(&go_on, SIGUSR1);
    sigprocmask(SIG_BLOCK, &go_on, NULL);
    if (table == NULL || out < 0 || in < 0 || flows == 0 || flows > PORTS || rate <= 0)
        die("churn");
    setsockopt(in, SOL_SOCKET, SO_RCVBUFFORCE, &(int){64 << 20}, sizeof(int));
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
    for (uint64_t round = 0; round < 2 && !ended; round++) {
        printf(round ? "asked\n" : "begin\n");
        fflush(stdout);
        if (round && waits && !ended)
            sigwaitinfo(&go_on, NULL); /* or SIGTERM */
        for (unsigned tries = 0; tries < (round ? TRIES : 1) && !ended; tries++) {
            const uint64_t begin = now_ns();
            uint64_t asked = 0;
            for (uint64_t flow = 0; flow < flows && !ended; flow++) {
                if (round && (table[flow].round[0].answered_ns == 0 || table[flow].round[1].answered_ns))
                    continue;
                sleep_until(begin + (uint64_t)((double)asked++ * 1e9 / rate));
                const uint64_t now = now_ns();
                fill(&packet, round << 32 | flow, now, first + flow);
                if (table[flow].round[round].tries++ == 0)
                    table[flow].round[round].asked_ns = now;
                if (sendto(out, &packet, sizeof packet, 0, (const struct sockaddr *)&to, sizeof to) < 0 &&
                    errno != EINTR && errno != ENOBUFS)
                    die("sendto");
                hear(in, to.sin_port, table, flows);
            }
            for (const uint64_t end = now_ns() + WAIT_NS; now_ns() < end && !ended;) {
                poll(&(struct pollfd){.fd = in, .events = POLLIN}, 1, 10);
                hear(in, to.sin_port, table, flows);
            }
        }
    }
    if (fwrite(table, sizeof *table, flows, file) != flows || fclose(file))
        die(a[7]);
    return 0;
}

int main(int n, char **a)
{
    static const struct {
        const char *name;
        int arguments;
        int (*run)(char **);
    } modes[] = {
        {"send", 7, send_stream}, {"receive", 3, receive_stream}, {"echo", 2, echo},  {"ask", 5, ask},
        {"tap", 4, tap},          {"witness", 2, witness},        {"churn", 8, churn}};

    const struct sigaction action = {.sa_handler = end};
    sigaction(SIGTERM, &action, NULL);
    for (unsigned i = 0; i < sizeof modes / sizeof *modes; i++)
        if (n == modes[i].arguments + 2 && strcmp(a[1], modes[i].name) == 0)
            return modes[i].run(a + 2);
    fprintf(stderr, "usage: see the top of stream.c\n");
    return 2;
}
