/* SPDX-License-Identifier: Apache-2.0
 *
 * The two rings between the core's owner and one other thread: events out, commands in. Each index has one
 * writer; release and acquire order the entries themselves.
 */
#include "core.h"
#include "records.h"

void session_record(const struct nat_core *core, uint32_t at, struct nat_record *record)
{
    const struct session *s = &core->sessions[at];
    const struct session_cold *cold = &core->cold[at];
    const struct neighbour *inside = s->neighbour[IN] == NONE16 ? NULL : &core->neighbours[s->neighbour[IN]];
    const struct neighbour *outside =
        s->neighbour[OUT] == NONE16 ? NULL : &core->neighbours[s->neighbour[OUT]];
    *record = (struct nat_record){
        .id = cold->id,
        .mapping_id = cold->mapping == NONE32 ? 0 : core->mappings[cold->mapping].id,
        .packets_out = (uint64_t)cold->packets_high[OUT] << 32 | s->packets[OUT],
        .packets_in = (uint64_t)cold->packets_high[IN] << 32 | s->packets[IN],
        .bytes_out = s->bytes[OUT],
        .bytes_in = s->bytes[IN],
        .internal_mac = inside ? get48(inside->mac) : 0,
        .internal_addr = session_internal_addr(s),
        .external_addr = session_external_addr(s),
        .remote_addr = session_remote_addr(s),
        .age_ms = core->now_ms - cold->opened_ms,
        .idle_ms = core->now_ms - s->last_ms,
        .timeout_ms = core->timeout_ms[s->timer],
        .internal_port = session_internal_port(s),
        .external_port = session_external_port(s),
        .remote_port = session_remote_port(s),
        .protocol = s->protocol,
        .tcp_state = s->tcp_state,
        .flags = s->flags,
        .internal_if = inside ? inside->port : 0xff,
        .external_if = outside ? outside->port : 0xff,
    };
}

static bool ring_has(struct nat_core *core, uint32_t wanted)
{
    uint32_t tail = atomic_load_explicit(&core->event_tail, memory_order_relaxed);
    if (core->config.event_ring - (tail - core->event_head_seen) >= wanted)
        return true;
    core->event_head_seen = atomic_load_explicit(&core->event_head, memory_order_acquire);
    return core->config.event_ring - (tail - core->event_head_seen) >= wanted;
}

bool event_room(struct nat_core *core)
{
    return ring_has(core, 1);
}

bool event_room_to_open(struct nat_core *core)
{
    return ring_has(core, 1 + core->config.event_ring / 8);
}

bool event_room_to_update(struct nat_core *core)
{
    return ring_has(core, 1 + core->config.event_ring / 4);
}

#define EVENTS_AHEAD 8u

void event_emit(struct nat_core *core, enum nat_event_type type, unsigned reason, uint32_t session)
{
    if (core->explain)
        return;
    uint32_t tail = atomic_load_explicit(&core->event_tail, memory_order_relaxed);
    struct nat_event *event = &core->events[tail & (core->config.event_ring - 1)];
    event->sequence = core->event_sequence++;
    event->time_ns = core->now_ns;
    event->type = (uint8_t)type;
    event->reason = (uint8_t)reason;
    event->reserved2 = 0;
    event->reserved3 = 0;
    session_record(core, session, &event->session);
    atomic_store_explicit(&core->event_tail, tail + 1, memory_order_release);
    /* the reader, on another CPU, had these lines last */
    const char *ahead = (const char *)&core->events[(tail + EVENTS_AHEAD) & (core->config.event_ring - 1)];
    __builtin_prefetch(ahead, 1);
    __builtin_prefetch(ahead + 64, 1);
}

unsigned nat_events(struct nat_core *core, struct nat_event *out, unsigned max)
{
    uint32_t head = atomic_load_explicit(&core->event_head, memory_order_relaxed);
    uint32_t n = atomic_load_explicit(&core->event_tail, memory_order_acquire) - head;
    if (n > max)
        n = max;
    uint32_t mask = core->config.event_ring - 1, at = head & mask;
    uint32_t first = n < core->config.event_ring - at ? n : core->config.event_ring - at;
    memcpy(out, core->events + at, first * sizeof *out);
    memcpy(out + first, core->events, (n - first) * sizeof *out);
    atomic_store_explicit(&core->event_head, head + n, memory_order_release);
    return n;
}

bool nat_events_sleep(struct nat_core *core)
{
    atomic_store(&core->reader_sleeps, true);
    if (atomic_load(&core->event_tail) == atomic_load_explicit(&core->event_head, memory_order_relaxed))
        return true;
    atomic_store(&core->reader_sleeps, false);
    return false;
}

bool events_wake(struct nat_core *core)
{
    /* A sleeper that this look misses is seen by the next one: the worker turns all the time. */
    if (!atomic_load_explicit(&core->reader_sleeps, memory_order_relaxed) ||
        atomic_load_explicit(&core->event_tail, memory_order_relaxed) == atomic_load(&core->event_head))
        return false;
    return atomic_exchange(&core->reader_sleeps, false);
}

bool nat_command_push(struct nat_core *core, struct nat_command *command)
{
    uint32_t tail = atomic_load_explicit(&core->command_tail, memory_order_relaxed);
    if (tail - atomic_load_explicit(&core->command_head, memory_order_acquire) == COMMAND_RING)
        return false;
    command->done = 0;
    core->commands[tail % COMMAND_RING] = command;
    atomic_store_explicit(&core->command_tail, tail + 1, memory_order_release);
    return true;
}

/* Slots or records handled by one step: what a command may cost between two bursts. */
#define COMMAND_STEP 64u

/* The gathering commands share one way: walk the slots of a slab from `cursor` on. */
#define GATHER(slab_name, record_type, present, fill)                                                        \
    ({                                                                                                       \
        record_type *out_ = command->buffer;                                                                 \
        uint64_t at_ = command->cursor, end_ = at_ + COMMAND_STEP;                                           \
        for (; at_ < core->slab_name.top && at_ < end_ && command->result < command->count; at_++) {         \
            uint32_t i = (uint32_t)at_;                                                                      \
            if (present) {                                                                                   \
                record_type *record = &out_[command->result++];                                              \
                fill;                                                                                        \
            }                                                                                                \
        }                                                                                                    \
        command->cursor = at_ >= core->slab_name.top ? 0 : at_;                                              \
        command->cursor == 0 || command->result == command->count;                                           \
    })

/* Its 5-tuple is that of the record already. */
static bool is_session(const struct nat_core *core, uint32_t at, const struct nat_record *record)
{
    const struct session *s = &core->sessions[at];
    return core->cold[at].id == record->id && session_external_addr(s) == record->external_addr &&
           session_external_port(s) == record->external_port;
}

/* Up to a batch; false: the reader of events must make room first. */
static bool for_batch(struct nat_core *core, struct nat_command *command, unsigned n)
{
    struct nat_record *records = (struct nat_record *)command->buffer + command->cursor;
    struct record_keys keys;
    session_keys(core, records, n, command->op == NAT_CMD_INSTALL, &keys);
    for (unsigned i = 0; i < n; i++, command->cursor++) {
        struct nat_record *record = &records[i];
        uint32_t at = session_by_key(core, &keys, i, record->protocol, OUT);
        bool held = at != NONE32 && is_session(core, at, record);
        if (command->op == NAT_CMD_CHECK)
            record->reserved0 = held;
        if (command->op == NAT_CMD_INSTALL) {
            if (at != NONE32 && !held && record->flags & NAT_SESSION_PREVAILS) {
                if (!session_close(core, at, NAT_CLOSE_COMMAND))
                    return false;
                at = NONE32;
            }
            if (held) {
                session_own(&core->sessions[at], record->flags & NAT_SESSION_FOREIGN);
                session_used(core, at, record->idle_ms);
            }
            command->result += held || (at == NONE32 && session_install(core, record, &keys, i));
            continue;
        }
        if (!held)
            continue;
        if (command->op == NAT_CMD_UPDATE) {
            session_update(core, at, record);
        } else if (command->op == NAT_CMD_COMMIT) {
            core->sessions[at].flags &= (uint8_t)~NAT_SESSION_PENDING;
            hold_release(core, at, NAT_FORWARD);
        } else if (command->op == NAT_CMD_DELETE && !session_close(core, at, NAT_CLOSE_COMMAND)) {
            return false;
        }
        command->result++;
    }
    return true;
}

static bool for_records(struct nat_core *core, struct nat_command *command)
{
    uint64_t end = command->cursor + COMMAND_STEP;
    if (end > command->count)
        end = command->count;
    while (command->cursor < end) {
        uint64_t left = end - command->cursor;
        if (!for_batch(core, command, left < RECORD_BATCH ? (unsigned)left : RECORD_BATCH))
            return false;
    }
    return command->cursor == command->count;
}

static bool for_neighbours(struct nat_core *core, struct nat_command *command)
{
    const struct nat_neighbour_record *records = command->buffer;
    uint64_t end = command->cursor + COMMAND_STEP;
    for (; command->cursor < command->count && command->cursor < end; command->cursor++)
        command->result += neighbour_learn(core, &records[command->cursor]);
    return command->cursor == command->count;
}

static bool is_among(uint64_t id, const uint64_t *sorted, uint64_t n)
{
    while (n) {
        uint64_t half = n / 2;
        if (sorted[half] == id)
            return true;
        if (sorted[half] < id) {
            sorted += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return false;
}

/* Ownership goes to whoever carries the traffic: nobody else sees when a session was last used. */
static bool change_owner(struct nat_core *core, struct nat_command *command)
{
    const bool cede = command->op == NAT_CMD_CEDE;
    const uint64_t *ids = command->buffer;
    uint64_t end = command->cursor + COMMAND_STEP;
    for (; command->cursor < core->session_slab.top && command->cursor < end; command->cursor++) {
        struct session *s = &core->sessions[command->cursor];
        uint64_t id = core->cold[command->cursor].id;
        if (!s->protocol || (cede && nat_id_instance(id) != ids[0]))
            continue;
        if (!cede) /* the peer may have carried ours, too, and died before it said so */
            s->last_ms = core->now_ms;
        uint8_t owner = cede && !is_among(id, ids + 1, command->count - 1) ? NAT_SESSION_FOREIGN : 0;
        if ((s->flags & NAT_SESSION_FOREIGN) == owner)
            continue;
        session_own(s, owner);
        if (!owner)
            s->last_ms = core->now_ms;
        command->result += !cede || owner;
    }
    return command->cursor >= core->session_slab.top;
}

/* One bounded step of a command; true when it is finished. */
static bool command_step(struct nat_core *core, struct nat_command *command)
{
    switch (command->op) {
    case NAT_CMD_SESSIONS:
        return GATHER(session_slab, struct nat_record, core->sessions[i].protocol,
                      session_record(core, i, record));
    case NAT_CMD_NEIGHBOURS:
        return GATHER(neighbour_slab, struct nat_neighbour_record, core->neighbours[i].state != NAT_NB_FREE,
                      ({
                          const struct neighbour *n = &core->neighbours[i];
                          *record = (struct nat_neighbour_record){
                              get48(n->mac), n->address, n->sessions, core->now_ms - n->confirmed_ms,
                              n->port,       n->state,   n->held};
                      }));
    case NAT_CMD_HOSTS:
        return GATHER(host_slab, struct nat_host_record, core->hosts[i].sessions, ({
                          const struct host *h = &core->hosts[i];
                          *record =
                              (struct nat_host_record){h->address, pool_address(&core->pool, h->external),
                                                       h->sessions, h->mappings, h->refused};
                      }));
    case NAT_CMD_FIND: {
        struct nat_record *record = command->buffer;
        int direction = record->flags & NAT_SESSION_INBOUND ? IN : OUT;
        struct flow_key key =
            direction == OUT
                ? flow_key(net32(record->internal_addr), net32(record->remote_addr),
                           net16(record->internal_port), net16(record->remote_port), record->protocol)
                : flow_key(net32(record->remote_addr), net32(record->external_addr),
                           net16(record->remote_port), net16(record->external_port), record->protocol);
        uint32_t at = session_find(
            core, &key, flow_hash_of(&core->hasher, key.addrs, key.ports, key.protocol), direction);
        if (at != NONE32) {
            session_record(core, at, record);
            command->result = 1;
        }
        return true;
    }
    case NAT_CMD_INSTALL:
    case NAT_CMD_DELETE:
    case NAT_CMD_COMMIT:
    case NAT_CMD_UPDATE:
    case NAT_CMD_CHECK:
        return for_records(core, command);
    case NAT_CMD_LEARN:
        return for_neighbours(core, command);
    case NAT_CMD_ADOPT:
    case NAT_CMD_CEDE:
        return change_owner(core, command);
    case NAT_CMD_EXPLAIN:
        explain(core, command->buffer);
        return true;
    case NAT_CMD_TRACE:
        command->result = trace_command(core, command->buffer);
        return true;
    case NAT_CMD_RECONFIGURE:
        return reconfigure_step(core, command);
    case NAT_CMD_REROUTE:
        return reroute_step(core, command);
    default:
        return true;
    }
}

void nat_command_now(struct nat_core *core, struct nat_command *command)
{
    uint64_t before;
    do
        before = command->cursor;
    while (!command_step(core, command) && command->cursor != before);
    core->stats.commands++;
    command->done = 1;
}

bool commands_step(struct nat_core *core)
{
    uint32_t head = atomic_load_explicit(&core->command_head, memory_order_relaxed);
    if (head == atomic_load_explicit(&core->command_tail, memory_order_acquire))
        return false;
    struct nat_command *command = core->commands[head % COMMAND_RING];
    if (command_step(core, command)) {
        core->stats.commands++;
        atomic_store_explicit(&core->command_head, head + 1, memory_order_release);
        __atomic_store_n(&command->done, 1, __ATOMIC_RELEASE);
    }
    return true;
}
