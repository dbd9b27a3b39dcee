/* SPDX-License-Identifier: Apache-2.0
 *
 * A whole story: several bursts, time steps and commands. Input: two bytes of configuration, then steps, each
 * an operation and its operands; see `step`.
 */
#include "frames.h"

struct story {
    const uint8_t *at, *end;
    struct nat_core *core;
    struct nat_packet burst[MAX_FRAMES];
    unsigned waiting;
    uint64_t now, final, sequence;
};

static uint8_t next(struct story *s)
{
    return s->at < s->end ? *s->at++ : 0;
}

/* What explain says of the first packet; nothing has changed afterwards that the checks would not find. */
static bool explained(struct story *s, struct nat_explain *question)
{
    const struct nat_packet *packet = &s->burst[0];
    if (!s->waiting || !packet->headroom || packet->segment > NAT_EXPLAIN_BYTES)
        return false;
    question->port = packet->port;
    question->length = packet->length;
    question->handoff = 0;
    memcpy(question->frame, packet->data, packet->segment);
    struct nat_command command = {.op = NAT_CMD_EXPLAIN, .count = 1, .buffer = question};
    nat_command_now(s->core, &command);
    return true;
}

static void send_burst(struct story *s)
{
    struct nat_explain question;
    bool asked = explained(s, &question);
    check_burst(s->core, s->burst, s->waiting, s->now, &s->final);
    REQUIRE(!asked || question.verdict == s->burst[0].verdict, "what explain says is what happens");
    s->waiting = 0;
}

static void add(struct story *s, uint8_t port, const uint8_t *bytes, uint32_t length, bool room)
{
    if (s->waiting == MAX_FRAMES)
        send_burst(s);
    s->burst[s->waiting++] = make_packet(port, bytes, length, room);
}

static void read_events(struct story *s)
{
    struct nat_event events[16];
    unsigned n;
    while ((n = nat_events(s->core, events, 16)))
        for (unsigned i = 0; i < n; i++)
            REQUIRE(events[i].sequence == s->sequence++, "no event is lost");
}

static void on_sessions(struct story *s, uint32_t op, uint8_t which)
{
    struct nat_record records[128];
    struct nat_command command = {.op = NAT_CMD_SESSIONS, .count = 128, .buffer = records};
    nat_command_now(s->core, &command);
    REQUIRE(command.result == nat_stats(s->core)->sessions, "the table holds as many as the counter says");
    if (!command.result)
        return;
    struct nat_record *record = &records[which % command.result];
    if (op == NAT_CMD_INSTALL) { /* one like it, somewhere else */
        record->internal_port ^= next(s);
        record->external_port ^= next(s);
        record->remote_addr ^= next(s);
        record->protocol ^= next(s) & 0x17;
        record->tcp_state = next(s);
        record->flags = next(s);
    }
    struct nat_command act = {.op = op, .count = 1, .buffer = record};
    nat_command_now(s->core, &act);
}

static void step(struct story *s)
{
    uint8_t op = next(s), frame[MAX_FRAME], numbers[8];
    switch (op & 15) {
    case 0:
    case 1: /* time */
        send_burst(s);
        s->now += (uint64_t)(1 + next(s)) * (op & 1 ? 50 : 1) * 1000000;
        nat_poll(s->core, s->now);
        break;
    case 2:
        send_burst(s);
        nat_settle(s->core, s->now);
        break;
    case 3: {
        send_burst(s);
        check_take(s->core, &s->final);
        uint8_t bytes[NAT_OUTBOX_BYTES], port;
        while (nat_outbox(s->core, bytes, &port)) {
            const uint8_t *type = bytes + link_of(port) - 2;
            REQUIRE(port < 2 && get16(type) == ETHERTYPE_ARP, "only ARP of our own");
            REQUIRE(!port_vlan[port] ||
                        (get16(bytes + 12) == ETHERTYPE_VLAN && get16(bytes + 14) == port_vlan[port]),
                    "ARP of our own has the tag of its port");
        }
        break;
    }
    case 4:
        read_events(s);
        break;
    case 5:
        send_burst(s);
        on_sessions(s, NAT_CMD_DELETE, op >> 4);
        break;
    case 6:
        send_burst(s);
        on_sessions(s, NAT_CMD_COMMIT, op >> 4);
        break;
    case 7:
        send_burst(s);
        on_sessions(s, NAT_CMD_INSTALL, op >> 4);
        break;
    case 8: { /* any bytes */
        uint32_t length = next(s);
        length |= (uint32_t)next(s) << 8;
        if (length > (uint32_t)(s->end - s->at))
            length = (uint32_t)(s->end - s->at);
        add(s, op >> 4 & 1, s->at, length, op >> 5 & 1);
        s->at += length;
        break;
    }
    default: { /* a valid frame, one byte of it perhaps changed, or its end cut off */
        for (unsigned i = 0; i < sizeof numbers; i++)
            numbers[i] = next(s);
        uint8_t port = op >> 4 & 1;
        uint32_t length = make_untagged((op & 15) % FRAME_KINDS, port, numbers, frame);
        if (numbers[7] & 0x80)
            length = make_fragment(numbers[7] >> 1, frame, length);
        length = put_tag(port, numbers[6] & 15, frame, length);
        if (op & 32)
            frame[next(s) % length] = next(s);
        if (op & 64)
            length = next(s) % length;
        add(s, port, frame, length, op & 128);
    }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size < 3)
        return 0;
    struct story s = {.at = input + 2, .end = input + size, .now = 1000000000};
    s.core = make_core(input[0], input[1]);
    nat_poll(s.core, s.now);
    struct nat_trace trace = {.action = NAT_TRACE_START, .packets = 100, .milliseconds = 10000};
    struct nat_command command = {.op = NAT_CMD_TRACE, .count = 1, .buffer = &trace};
    if (size & 1) /* the long way and the short one */
        nat_command_now(s.core, &command);
    while (s.at < s.end)
        step(&s);
    send_burst(&s);
    /* everything ages: first by itself, then the table is empty */
    for (unsigned i = 0; i < 40; i++) {
        s.now += 1000000000;
        read_events(&s);
        nat_settle(s.core, s.now);
        check_take(s.core, &s.final);
    }
    nat_flush(s.core);
    check_take(s.core, &s.final);
    const struct nat_stats *stats = nat_stats(s.core);
    REQUIRE(stats->held == 0, "no packet is forgotten");
    REQUIRE(stats->sessions_opened + stats->sessions_installed - stats->sessions_closed == stats->sessions,
            "sessions opened and closed add up");
    nat_destroy(s.core);
    return 0;
}
