/* SPDX-License-Identifier: Apache-2.0
 *
 * Nanoseconds per key of a batch look-up of 32: ours, and DPDK's rte_hash, of the same keys in the same
 * order, in turns.
 *
 *   lookup SESSIONS ROUNDS uniform|zipf
 *
 * A key is the 5-tuple of a direction, hashed within the measurement, and compared with the key that is
 * stored. Prints one JSON object.
 */
#include "../nat_fastpath/core/pipeline.c" /* its stages, which nobody else may call */

#include "known.h"

#include <rte_eal.h>
#include <rte_hash.h>
#include <rte_hash_crc.h>

#define KEYS 16384u

struct tuple {
    uint64_t addrs;
    uint32_t ports, protocol;
};

static struct tuple keys[KEYS];
static const void *pointers[KEYS];
static uint32_t sum;

static struct tuple key_of(const uint8_t endpoints[12])
{
    return (struct tuple){raw64(endpoints), raw32(endpoints + 8), PROTO_UDP};
}

/* Two keys of one hash: the second is found the long way, as that of any packet that a batch does not find.
 */
static uint32_t alone(const struct nat_core *core, const struct batch *batch, unsigned i)
{
    const struct flow_key key = {batch->addrs[i], batch->ports[i], batch->protocols[i]};
    for (int direction = 0; direction < 2; direction++) {
        const uint32_t at = session_find(core, &key, batch->hashes[i], direction);
        if (at != NONE32)
            return at;
    }
    die("a key was not found");
    return NONE32;
}

/* As nat_burst does it, but for the packets. */
static void __attribute__((noinline)) ours(struct nat_core *core, unsigned at)
{
    struct batch batch = {.n = NAT_BURST, .common = UINT32_MAX};
    for (unsigned i = 0; i < NAT_BURST; i++) {
        batch.addrs[i] = keys[at + i].addrs;
        batch.ports[i] = keys[at + i].ports;
        batch.protocols[i] = (uint8_t)keys[at + i].protocol;
    }
    batch_hash(core, &batch);
    batch_probe(core, &batch);
    for (unsigned i = 0; i < NAT_BURST; i++) {
        const uint32_t at = batch.session[i];
        const struct session *s = &core->sessions[at];
        const int direction = at != NO_CANDIDATE && s->addrs[IN] == batch.addrs[i] ? IN : OUT;
        if (at == NO_CANDIDATE || s->addrs[direction] != batch.addrs[i] ||
            s->ports[direction] != batch.ports[i] || s->protocol != batch.protocols[i])
            batch.session[i] = alone(core, &batch, i);
        sum += batch.session[i];
    }
}

static void __attribute__((noinline)) theirs(const struct rte_hash *table, unsigned at)
{
    uint64_t hits = 0;
    void *data[NAT_BURST];
    if (rte_hash_lookup_bulk_data(table, pointers + at, NAT_BURST, &hits, data) != NAT_BURST)
        die("rte_hash did not find a key");
    for (unsigned i = 0; i < NAT_BURST; i++)
        sum += (uint32_t)(uintptr_t)data[i];
}

int main(int argc, char **argv)
{
    if (argc != 4)
        die("lookup SESSIONS ROUNDS uniform|zipf");
    const uint32_t sessions = (uint32_t)strtoul(argv[1], NULL, 10);
    const unsigned rounds = (unsigned)strtoul(argv[2], NULL, 10);
    const enum order order = strcmp(argv[3], "zipf") ? ORDER_UNIFORM : ORDER_ZIPF;
    char megabytes[16];
    snprintf(megabytes, sizeof megabytes, "%u", 256 + sessions / 5000);
    const char *eal[] = {"lookup", "--no-huge", "--no-shconf", "--no-pci", "--no-telemetry",
                         "-m",     megabytes,   "--log-level", "error",    "--lcores",
                         "0"};
    if (rte_eal_init(sizeof eal / sizeof *eal, (char **)(uintptr_t)eal) < 0)
        die("EAL does not start");
    struct nat_memory memory;
    struct nat_core *core = make_core(sessions, true, &memory);
    struct endpoints *all = malloc(sessions * sizeof *all);
    double *ns[2] = {calloc(rounds, sizeof(double)), calloc(rounds, sizeof(double))};
    double *speed = calloc(rounds + 1, sizeof *speed);
    const struct rte_hash_parameters parameters = {.name = "sessions",
                                                   .entries = 2 * sessions + sessions / 4 + 64,
                                                   .key_len = sizeof(struct tuple),
                                                   .hash_func = rte_hash_crc};
    struct rte_hash *table = rte_hash_create(&parameters);
    if (!all || !ns[0] || !ns[1] || !speed || !table || !rounds)
        die("no memory");
    open_sessions(core, all, sessions, 1000000000);
    for (uint32_t i = 0; i < sessions; i++) {
        const struct tuple both[2] = {key_of(all[i].out), key_of(all[i].in)};
        for (unsigned k = 0; k < 2; k++)
            if (rte_hash_add_key_data(table, &both[k], (void *)(uintptr_t)i) < 0)
                die("rte_hash is full");
    }
    for (unsigned i = 0; i < KEYS; i++)
        pointers[i] = &keys[i];
    for (unsigned round = 0; round < 2 * rounds; round++) {
        if ((round & 1) == 0)
            speed[round / 2] = probe_ns();
        for (unsigned i = 0; i < KEYS; i++) {
            const struct endpoints *e = &all[pick(order, sessions)];
            keys[i] = key_of(next_random() >> 63 ? e->in : e->out);
        }
        const double start = clock_ns();
        for (unsigned at = 0; at < KEYS; at += NAT_BURST)
            if (round & 1)
                theirs(table, at);
            else
                ours(core, at);
        ns[round & 1][round / 2] = (clock_ns() - start) / KEYS;
    }
    speed[rounds] = probe_ns();
    bool drowned;
    const unsigned kept = calm_rounds(speed, rounds, ns, 2, &drowned);
    double *ratios = calloc(kept, sizeof *ratios);
    for (unsigned i = 0; ratios && i < kept; i++)
        ratios[i] = ns[1][i] / ns[0][i];
    printf("{\"sessions\": %" PRIu32
           ", \"order\": \"%s\", \"rounds\": %u, \"dropped\": %u, \"drowned\": %s, ",
           sessions, argv[3], kept, rounds - kept, drowned ? "true" : "false");
    report("ratio", ratios, kept);
    report("rte_hash_ns", ns[1], kept);
    report("ours_ns", ns[0], kept);
    printf("\"checked\": %u}\n", sum != 0);
    return 0;
}
