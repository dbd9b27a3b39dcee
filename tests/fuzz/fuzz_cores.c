/* SPDX-License-Identifier: Apache-2.0
 *
 * Two cores with a slice each, and a driver between them. Input: two bytes of configuration, then steps: an
 * operation, and the numbers of a frame or its bytes.
 */
#include "frames.h"

static struct nat_core *cores[2];
static uint64_t now, frames;

/* From one core to the other until it has its last verdict. */
static void arrive(unsigned at, struct nat_packet *p, bool handed)
{
    for (unsigned hop = 0;; hop++, handed = true) {
        (handed ? nat_handed : nat_burst)(cores[at], p, 1, now);
        if (p->verdict != NAT_HANDOFF)
            break;
        unsigned to = p->handoff & NAT_HANDOFF_SLICE;
        REQUIRE(to == 1 - at && p->handoff != to, "a packet goes to the other core, which hears why");
        REQUIRE(hop < 3, "a packet comes to an end");
        at = to;
    }
    REQUIRE(p->verdict < NAT_VERDICT_COUNT, "every verdict is one that exists");
    check_result(p, p->cookie);
    if (p->verdict != NAT_HELD)
        free_packet(p);
}

static void receive(unsigned by, uint8_t port, const uint8_t *bytes, uint32_t length, bool room)
{
    struct nat_packet p = make_packet(port, bytes, length, room);
    unsigned owner = nat_slice_of(p.data, p.segment, port == 0 ? NAT_INTERNAL : NAT_EXTERNAL, 2);
    REQUIRE(owner < 2 || owner == NAT_SLICE_ANY || owner == NAT_SLICE_ALL, "an owner that exists");
    if (owner == NAT_SLICE_ALL) {
        struct nat_packet copy = make_packet(port, bytes, length, room);
        copy.handoff = NAT_HANDOFF_COPY;
        arrive(1 - by, &copy, true);
    }
    frames++;
    arrive(owner < 2 ? owner : by, &p, false);
}

static void take_all(void)
{
    struct nat_packet p;
    uint8_t bytes[NAT_OUTBOX_BYTES], port;
    for (unsigned at = 0; at < 2; at++) {
        while (nat_outbox(cores[at], bytes, &port))
            ;
        while (nat_take(cores[at], &p, 1)) {
            REQUIRE(p.verdict != NAT_HELD, "a taken packet is not held");
            if (p.verdict == NAT_HANDOFF) {
                arrive(p.handoff & NAT_HANDOFF_SLICE, &p, true);
                continue;
            }
            check_result(&p, p.cookie);
            free_packet(&p);
        }
    }
}

static void commit_all(void)
{
    struct nat_record records[128];
    for (unsigned at = 0; at < 2; at++) {
        struct nat_command command = {.op = NAT_CMD_SESSIONS, .count = 128, .buffer = records};
        nat_command_now(cores[at], &command);
        struct nat_command act = {.op = NAT_CMD_COMMIT, .count = command.result, .buffer = records};
        nat_command_now(cores[at], &act);
    }
}

/* Frames, events and time, of both. */
static void pass(uint64_t milliseconds)
{
    struct nat_event events[16];
    now += milliseconds * 1000000;
    for (unsigned at = 0; at < 2; at++) {
        while (nat_events(cores[at], events, 16))
            ;
        nat_poll(cores[at], now);
    }
    take_all();
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size < 3)
        return 0;
    const uint8_t *at = input + 2, *end = input + size;
    now = 1000000000;
    frames = 0;
    core_slices = 2;
    for (core_slice = 0; core_slice < 2; core_slice++)
        cores[core_slice] = make_core(input[0], input[1] & 0xf8);
    while (end - at > 9) {
        uint8_t op = *at++, frame[MAX_FRAME], port = op >> 4 & 1;
        const uint8_t *numbers = at;
        at += 8;
        if ((op & 15) == 15) {
            uint32_t length = numbers[0] < end - at ? numbers[0] : (uint32_t)(end - at);
            receive(op >> 6 & 1, port, at, length, op & 128);
            at += length;
            continue;
        }
        if ((op & 15) >= 13) {
            pass(numbers[0]);
            if (op & 128)
                commit_all();
            continue;
        }
        uint32_t length = make_untagged((op & 15) % FRAME_KINDS, port, numbers, frame);
        if (numbers[7] & 0x80)
            length = make_fragment(numbers[7] >> 1, frame, length);
        length = put_tag(port, numbers[6] & 15, frame, length);
        if (op & 32)
            length = *at % length;
        receive(op >> 6 & 1, port, frame, length, op & 128);
    }
    pass(3000); /* fragments that wait for ever end here, and so may go on to the other core */
    pass(0);
    for (unsigned i = 0; i < 2; i++)
        nat_flush(cores[i]);
    take_all();
    uint64_t verdicts = 0, more = 0, received = 0;
    for (unsigned i = 0; i < 2; i++) {
        const struct nat_stats *stats = nat_stats(cores[i]);
        REQUIRE(stats->held == 0, "no packet is forgotten");
        verdicts += verdict_total(cores[i]);
        more += stats->verdicts[NAT_HELD] + stats->verdicts[NAT_HANDOFF];
        received += stats->rx_packets[0] + stats->rx_packets[1];
        nat_destroy(cores[i]);
    }
    REQUIRE(verdicts == frames + more,
            "one verdict for each, and one for each time that it was not the last");
    REQUIRE(received == frames, "each is counted once");
    core_slices = core_slice = 0;
    return 0;
}
