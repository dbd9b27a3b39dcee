/* SPDX-License-Identifier: Apache-2.0
 *
 * Nanoseconds per packet of nat_burst on established sessions, and of two floors: the same loop over the same
 * buffers with parse and MAC swap, and that with as many random cache lines as a session needs, prefetched a
 * batch ahead, over as much memory as the tables have. The three take turns, round by round, so that all see
 * the same machine.
 *
 *   core SESSIONS [NAME=VALUE ...]
 *
 *   rounds=61      of RING packets each
 *   direction=both out, in, both
 *   mapping=independent|dependent
 *   order=uniform  or zipf, sequential
 *   batch=32       packets that nat_burst is given at once
 *   aes=1, parity=1, preservation=1, quarantine=1, vlan=1
 *   small_pages=1  of 4 KB, unless there are huge ones set apart
 *
 * Frames are 64 bytes of UDP, each session with its own endpoints, in a ring of buffers that is larger than
 * the L2 cache. Prints one JSON object.
 */
#include <sys/prctl.h>

#include "known.h"
#include "memory.h"

#define LINES 2u /* of memory that an established packet needs: a bucket of the index, and the session */

/* Memory like that of the tables, and what each packet of the ring needs of it. */
static struct {
    uint64_t (*line)[8];
    uint64_t n, bytes, sum;
    uint32_t of[RING][LINES];
} table;

/* The same ones for the same session, as in a table. */
static void choose_lines(unsigned packet, uint64_t session)
{
    for (unsigned k = 0; k < LINES; k++) {
        uint64_t mixed = (LINES * session + k + 1) * 0x9e3779b97f4a7c15u;
        mixed = (mixed ^ mixed >> 29) * 0x94d049bb133111ebu;
        table.of[packet][k] = (uint32_t)((mixed >> 32) * table.n >> 32);
    }
}

static void ask_for_frames(const struct nat_packet *packets, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        __builtin_prefetch(packets[i].data);
}

/* A batch's frames are asked for two batches ahead, its lines one batch ahead: nothing is waited for. */
static void __attribute__((noinline)) lines_ring(struct nat_packet *packets)
{
    for (unsigned at = 0; at < RING; at += NAT_BURST) {
        ask_for_frames(packets + (at + 2 * NAT_BURST) % RING, NAT_BURST);
        const unsigned next = (at + NAT_BURST) % RING;
        for (unsigned i = next; i < next + NAT_BURST; i++)
            for (unsigned k = 0; k < LINES; k++)
                __builtin_prefetch(table.line[table.of[i][k]], k);
        for (unsigned i = at; i < at + NAT_BURST; i++) {
            table.sum += *table.line[table.of[i][0]];
            ++*table.line[table.of[i][1]];
            swap_one(&packets[i]);
        }
    }
}

static void __attribute__((noinline)) swap_ring(struct nat_packet *packets)
{
    for (unsigned at = 0; at < RING; at += NAT_BURST) {
        ask_for_frames(packets + (at + NAT_BURST) % RING, NAT_BURST);
        for (unsigned i = 0; i < NAT_BURST; i++)
            swap_one(&packets[at + i]);
    }
}

/* As a driver does it; the frames of the next burst are in the cache when it comes. */
static void nat_ring(struct nat_core *core, struct nat_packet *packets, unsigned batch, uint64_t now)
{
    for (unsigned at = 0; at < RING; at += batch) {
        ask_for_frames(packets + (at + batch) % RING, batch);
        nat_burst(core, packets + at, batch, now + at);
    }
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
        sum += random_scale(random_draw(&source), 64000);
    const double spent = clock_ns() - start;
    return sum ? spent / (1u << 20) : 0;
}

enum way { SWAP, LINES_TOO, NAT, WAYS };

struct asked {
    uint32_t sessions;
    unsigned rounds, batch;
    unsigned direction, dependent;
    enum order order;
};
static const char *const directions[] = {"out", "in", "both", NULL};
static const char *const mappings[] = {"independent", "dependent", NULL};
static const char *const orders[] = {"uniform", "zipf", "sequential", NULL};

static unsigned one_of(const char *value, const char *const *names)
{
    for (unsigned i = 0; names[i]; i++)
        if (!strcmp(value, names[i]))
            return i;
    die(value);
    return 0;
}

static struct asked read_arguments(int argc, char **argv)
{
    struct asked asked = {.rounds = 61, .batch = NAT_BURST, .direction = 2};
    struct {
        const char *name;
        bool *flag;
    } flags[] = {{"aes", &with.aes},
                 {"parity", &with.parity},
                 {"preservation", &with.preservation},
                 {"quarantine", &with.quarantine},
                 {"vlan", &with.vlan},
                 {"small_pages", &with.small_pages}};

    asked.sessions = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 0;
    for (int i = 2; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (value == NULL)
            die(argv[i]);
        *value++ = 0;
        bool known = true;
        if (!strcmp(argv[i], "rounds"))
            asked.rounds = (unsigned)strtoul(value, NULL, 10);
        else if (!strcmp(argv[i], "batch"))
            asked.batch = (unsigned)strtoul(value, NULL, 10);
        else if (!strcmp(argv[i], "direction"))
            asked.direction = one_of(value, directions);
        else if (!strcmp(argv[i], "mapping"))
            asked.dependent = one_of(value, mappings);
        else if (!strcmp(argv[i], "order"))
            asked.order = one_of(value, orders);
        else
            known = false;
        for (unsigned k = 0; !known && k < sizeof flags / sizeof *flags; k++)
            if (!strcmp(argv[i], flags[k].name)) {
                *flags[k].flag = *value == '1';
                known = true;
            }
        if (!known)
            die(argv[i]);
    }
    if (asked.sessions == 0 || asked.rounds == 0 || asked.batch == 0 || RING % asked.batch)
        die("SESSIONS and rounds are at least 1, batch a power of two to 16384");
    return asked;
}

int main(int argc, char **argv)
{
    const struct asked asked = read_arguments(argc, argv);
    if (with.small_pages)
        prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    struct nat_memory memory;
    struct nat_core *core = make_core(asked.sessions, asked.dependent, &memory);
    struct endpoints *all = malloc(asked.sessions * sizeof *all);
    uint8_t *ring = memory_take((uint64_t)RING * STRIDE);
    struct nat_packet *packets = calloc(RING, sizeof *packets);
    double *ns[WAYS], *speed = calloc(asked.rounds + 1, sizeof *speed);
    uint64_t now = 1000000000;
    for (unsigned way = 0; way < WAYS; way++)
        if (!(ns[way] = calloc(asked.rounds, sizeof *ns[way])))
            die("no memory");
    table.bytes = 2ull * asked.sessions * 8 * 100 / 85 + 64ull * asked.sessions + 128;
    table.n = table.bytes / 64;
    table.line = memory_take(table.bytes);
    if (!all || !ring || !packets || !table.line || !speed)
        die("no memory");
    const double new_ns = open_sessions(core, all, asked.sessions, now);

    for (unsigned round = 0; round < WAYS * asked.rounds; round++) {
        const enum way way = round % WAYS;
        if (way == 0)
            speed[round / WAYS] = probe_ns();
        for (unsigned i = 0; i < RING; i++) {
            const uint32_t session = pick(asked.order, asked.sessions);
            const struct endpoints *e = &all[session];
            const unsigned port = asked.direction == 2 ? next_random() >> 63 : asked.direction;
            uint8_t *data = ring + (size_t)i * STRIDE + 128;
            packets[i] = packet_in(data, 1024, port, port ? e->in : e->out);
            choose_lines(i, session);
        }
        const double start = clock_ns();
        if (way == NAT)
            nat_ring(core, packets, asked.batch, now += 1000000);
        else
            (way == SWAP ? swap_ring : lines_ring)(packets);
        ns[way][round / WAYS] = (clock_ns() - start) / RING;
        for (unsigned i = 0; i < RING; i++)
            if (packets[i].verdict != NAT_FORWARD)
                die("a packet of an established session was not forwarded");
    }
    speed[asked.rounds] = probe_ns();
    bool drowned;
    const unsigned kept = calm_rounds(speed, asked.rounds, ns, WAYS, &drowned);

    const double bytes = (double)(memory.sessions + memory.index + memory.mappings);
    double *ratios = calloc(kept, sizeof *ratios);
    for (unsigned i = 0; ratios && i < kept; i++)
        ratios[i] = ns[NAT][i] / ns[LINES_TOO][i];
    printf("{\"sessions\": %" PRIu32 ", \"direction\": \"%s\", \"mapping\": \"%s\", \"order\": \"%s\", "
           "\"batch\": %u, \"rounds\": %u, \"dropped\": %u, \"drowned\": %s, ",
           asked.sessions, directions[asked.direction], mappings[asked.dependent], orders[asked.order],
           asked.batch, kept, asked.rounds - kept, drowned ? "true" : "false");
    report("ratio", ratios, kept);
    report("nat_ns", ns[NAT], kept);
    report("floor_ns", ns[LINES_TOO], kept);
    report("swap_ns", ns[SWAP], kept);
    printf("\"new_session_ns\": %.1f, \"close_ns\": %.1f, \"draw_ns\": %.2f, \"bytes_per_session\": %.1f}\n",
           new_ns, close_sessions(core), draw_ns(), bytes / (asked.sessions + asked.sessions / 8 + 64));
    nat_destroy(core);
    memory_give(table.line, table.bytes);
    memory_give(ring, (uint64_t)RING * STRIDE);
    free(all);
    free(packets);
    free(ratios);
    free(speed);
    for (unsigned way = 0; way < WAYS; way++)
        free(ns[way]);
    return 0;
}
