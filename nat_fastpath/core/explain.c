/* SPDX-License-Identifier: Apache-2.0
 *
 * What would happen to a packet, and why: it goes through packet_alone like any other, and then everything
 * that it has changed is undone in reverse order. So there is no second set of rules that could disagree.
 */
#include "core.h"
#include "slices.h"

/* A packet opens two sessions at most (hairpin), and asks for five next hops. */
#define UNDO 24u

struct explain {
    struct nat_explain *out;
    unsigned n;
    struct undo {
        enum { SESSION_OPENED, SESSION_WAS, NEIGHBOUR_ADDED, NEIGHBOUR_WAS } what;
        uint32_t at;
        union {
            struct {
                struct session hot;
                struct session_cold cold;
            } session;
            struct neighbour neighbour;
        } was;
    } undo[UNDO];
};

static struct undo *remember(struct nat_core *core, unsigned what, uint32_t at)
{
    struct explain *e = core->explain;
    assert(e->n < UNDO);
    struct undo *undo = &e->undo[e->n++];
    undo->what = what;
    undo->at = at;
    return undo;
}

void explain_remember_session(struct nat_core *core, uint32_t at)
{
    if (!core->explain)
        return;
    struct undo *undo = remember(core, SESSION_WAS, at);
    undo->was.session.hot = core->sessions[at];
    undo->was.session.cold = core->cold[at];
}

void explain_remember_neighbour(struct nat_core *core, uint16_t at)
{
    if (core->explain)
        remember(core, NEIGHBOUR_WAS, at)->was.neighbour = core->neighbours[at];
}

void explain_opened(struct nat_core *core, uint32_t at)
{
    if (core->explain)
        remember(core, SESSION_OPENED, at);
}

void explain_added(struct nat_core *core, uint16_t neighbour)
{
    if (core->explain)
        remember(core, NEIGHBOUR_ADDED, neighbour);
}

static void undo_one(struct nat_core *core, const struct undo *undo)
{
    switch (undo->what) {
    case SESSION_OPENED:
        session_end(core, undo->at, false);
        break;
    case SESSION_WAS:
        core->sessions[undo->at] = undo->was.session.hot;
        core->cold[undo->at] = undo->was.session.cold;
        break;
    case NEIGHBOUR_ADDED:
        neighbour_forget(core, (uint16_t)undo->at);
        break;
    case NEIGHBOUR_WAS:
        core->neighbours[undo->at] = undo->was.neighbour;
        break;
    }
}

/* --- what is told ------------------------------------------------------------------------------------ */

void explain_note(struct nat_core *core, const struct nat_step *step)
{
    struct nat_explain *out = core->explain->out;
    if (out->n_steps < NAT_EXPLAIN_STEPS)
        out->steps[out->n_steps++] = *step;
}

void explain_note_session(struct nat_core *core, enum nat_step_kind kind, uint32_t at)
{
    if (!core->explain)
        return;
    const struct session *s = &core->sessions[at];
    explain_note(core, &(struct nat_step){
                           .kind = (uint8_t)kind,
                           .id = core->cold[at].id,
                           .value = core->now_ms - s->last_ms,
                           .limit = core->timeout_ms[s->timer],
                           .port = s->tcp_state,
                           .flag = s->flags,
                       });
}

void explain_note_port(struct nat_core *core, uint32_t block, unsigned slice, uint8_t protocol, uint16_t port,
                       int missed)
{
    NOTE(core, PORT, .address = pool_address(&core->pool, block), .port = port,
         .value = pool_free_ports(&core->pool, block, slice, protocol),
         .limit = core->pool.resting[pool_protocol(protocol)], .flag = (uint8_t)missed);
}

void explain_note_slot(struct nat_core *core, uint32_t slot, uint32_t address, uint16_t port)
{
    if (!core->explain)
        return;
    uint32_t user = slot == POOL_NONE ? 0 : *pool_user(&core->pool, slot);
    struct nat_step step = {.kind = NAT_STEP_SLOT, .address = address, .port = port, .flag = NAT_SLOT_TAKEN};
    if (slot == POOL_NONE) {
        step.flag = NAT_SLOT_NONE;
    } else if (user == POOL_FREE || user & POOL_RESTING) {
        step.flag = user == POOL_FREE ? NAT_SLOT_FREE : NAT_SLOT_RESTING;
    } else if (core->has_mappings) {
        const struct mapping *m = &core->mappings[user - 1];
        step.id = (uint64_t)m->internal_addr << 16 | m->internal_port;
    } else {
        const struct session *s = &core->sessions[user - 1];
        step.id = (uint64_t)session_internal_addr(s) << 16 | session_internal_port(s);
    }
    explain_note(core, &step);
}

void explain_next_hop(struct nat_core *core, uint16_t at)
{
    if (!core->explain)
        return;
    explain_remember_neighbour(core, at);
    const struct neighbour *n = &core->neighbours[at];
    uint64_t mac = 0;
    for (int i = 0; i < 6; i++)
        mac = mac << 8 | n->mac[i];
    NOTE(core, NEXT_HOP, .address = n->address, .id = mac, .port = n->port, .flag = n->state,
         .value = n->held);
}

/* --- the question ------------------------------------------------------------------------------------ */

void explain(struct nat_core *core, struct nat_explain *question)
{
    question->n_steps = 0;
    if (question->port >= core->config.n_ports) {
        question->verdict = NAT_VERDICT_COUNT;
        return;
    }
    struct explain explained = {.out = question};
    struct nat_packet packet = {
        .data = question->frame,
        .length = question->length,
        .segment = question->length < NAT_EXPLAIN_BYTES ? question->length : NAT_EXPLAIN_BYTES,
        .capacity = NAT_EXPLAIN_BYTES,
        .headroom = sizeof question->room,
        .port = question->port,
        .handoff = question->handoff & (uint8_t)~NAT_HANDOFF_SLICE,
    };
    unsigned slice = nat_slice_of(packet.data, packet.segment, core->config.ports[packet.port].side,
                                  core->config.n_slices);
    bool is_ours = packet.handoff || slice >= NAT_SLICE_ALL || has_slice(core, slice);
    /* small things that anything may touch */
    struct nat_stats stats = core->stats;
    struct token_bucket new_sessions = core->new_sessions, icmp_errors = core->icmp_errors;
    struct random_source random = core->pool.random;
    uint64_t in_flows = core->flows.looked_at, in_mappings = core->mapping_index.looked_at,
             in_hosts = core->host_index.looked_at, in_permissions = core->permission_index.looked_at;
    uint32_t session_id = core->next_session_id, mapping_id = core->next_mapping_id;

    core->explain = &explained;
    enum nat_verdict verdict = core->standby.silent ? NAT_DROP_STANDBY
                               : is_ours            ? packet_handed(core, &packet)
                                                    : hand_off(core, &packet, slice, 0);
    while (explained.n)
        undo_one(core, &explained.undo[--explained.n]);
    core->explain = NULL;

    core->stats = stats;
    core->new_sessions = new_sessions;
    core->icmp_errors = icmp_errors;
    core->pool.random = random;
    core->flows.looked_at = in_flows;
    core->mapping_index.looked_at = in_mappings;
    core->host_index.looked_at = in_hosts;
    core->permission_index.looked_at = in_permissions;
    core->next_session_id = session_id;
    core->next_mapping_id = mapping_id;
    question->verdict = (uint8_t)verdict;
    question->port = packet.port;
    question->length = packet.length;
    question->mtu = packet.mtu;
    question->handoff = verdict == NAT_HANDOFF ? packet.handoff : 0;
    /* a tag in front of it, or none any more */
    memmove(question->frame, packet.data,
            packet.segment < NAT_EXPLAIN_BYTES ? packet.segment : NAT_EXPLAIN_BYTES);
}
