/* SPDX-License-Identifier: Apache-2.0
 *
 * A core that stands by, and the moments when that begins and ends. It is silent on all ports, so that the
 * switches between keep the shared MAC where it is answered for, and learns from ARP what cannot be wrong.
 */
#include "standby.h"
#include "core.h"

#define PROBE_NS 500000u /* between two probes */
/* One turn counts for so much at most: an answer that came while this core was away is heard before it
 * carries. */
#define TURN_NS (2u * PROBE_NS)
/* A switch that misses the first announcement sends to the wrong port until we send anything there. */
#define ANNOUNCE_TIMES 4u
#define ANNOUNCE_MS 25u

static uint32_t get(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* Changes the role unless somebody else has changed it first. */
static void change(struct nat_role *role, uint32_t from, uint32_t to, uint32_t *counter)
{
    if (__atomic_compare_exchange_n(&role->state, &from, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED);
}

void standby_init(struct nat_core *core)
{
    if (!core->config.role)
        return;
    core->standby.state = get(&core->config.role->state);
    core->standby.silent = core->standby.state != NAT_ROLE_ACTIVE;
}

static __attribute__((noinline)) void become(struct nat_core *core, uint32_t state)
{
    struct standby *s = &core->standby;
    const bool news = state != s->state;
    s->announced = get(&core->config.role->announce);
    s->state = state;
    s->silent = state != NAT_ROLE_ACTIVE;
    s->announce_left = 0;
    if (state == NAT_ROLE_ACTIVE) {
        nat_announce(core);
        s->announce_left = has_slice(core, 0) ? ANNOUNCE_TIMES : 0;
        s->announce_ms = core->now_ms;
        return;
    }
    if (!news)
        return;
    s->probe_next_ns = s->probe_at_ns = core->now_ns;
    s->probe_left_ns = get(&core->config.role->probe_us) * 1000ull;
    core->outbox_head = core->outbox_tail;
    if (state == NAT_ROLE_STANDBY && core->held_slab.used)
        nat_flush(core);
}

bool standby_follow(struct nat_core *core, uint64_t now)
{
    struct nat_role *role = core->config.role;
    const uint64_t before = core->now_ns, fence = get(&role->fence_us) * 1000ull;
    core_time(core, now);
    /* Who was stopped, or a CPU was taken from, may have been given up meanwhile: it asks before it sends. */
    if (fence && before && now > before + fence && !core->standby.silent)
        change(role, NAT_ROLE_ACTIVE, NAT_ROLE_PROBING, &role->fenced);
    const uint32_t state = get(&role->state);
    if (state != core->standby.state || get(&role->announce) != core->standby.announced)
        become(core, state);
    return core->standby.silent;
}

static enum nat_verdict standby_packet(struct nat_core *core, struct nat_packet *packet)
{
    const struct nat_port_config *config = &core->config.ports[packet->port];
    const unsigned l2 = config->vlan ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
    if (packet->segment < l2 + ARP_BYTES || (config->vlan && !has_tag(packet, config->vlan)) ||
        get16(packet->data + l2 - 2) != ETHERTYPE_ARP)
        return NAT_DROP_STANDBY;
    if (!memcmp(packet->data + l2 + 8, config->mac, 6)) /* the other one speaks */
        change(core->config.role, NAT_ROLE_PROBING, NAT_ROLE_STANDBY, &core->config.role->answered);
    const uint8_t handoff = packet->handoff;
    packet->handoff |= NAT_HANDOFF_COPY; /* to learn from, and nothing else */
    const enum nat_verdict verdict = neighbour_arp(core, packet, l2);
    packet->handoff = handoff;
    return verdict == NAT_CONSUMED ? NAT_CONSUMED : NAT_DROP_STANDBY;
}

void standby_burst(struct nat_core *core, struct nat_packet *packets, unsigned n, bool handed)
{
    for (unsigned i = 0; i < n; i++) {
        struct nat_packet *packet = &packets[i];
        if (!handed) {
            core->stats.rx_packets[packet->port]++;
            core->stats.rx_bytes[packet->port] += packet->length;
        }
        const enum nat_verdict verdict = standby_packet(core, packet);
        if (packet->handoff & NAT_HANDOFF_COPY)
            packet->verdict = NAT_CONSUMED;
        else
            count_verdict(core, packet, verdict);
    }
}

static bool leaves(const struct nat_packet *packet)
{
    return packet->verdict == NAT_FORWARD || packet->verdict == NAT_FRAGMENT || packet->verdict == NAT_REPLY;
}

bool standby_keeps(const struct nat_core *core, const struct nat_packet *packet)
{
    return core->standby.state == NAT_ROLE_PROBING && leaves(packet);
}

void standby_give_up(struct nat_core *core)
{
    for (uint16_t at = core->done_first; core->standby.silent && at != NONE16; at = core->held[at].next) {
        struct nat_packet *packet = &core->held[at].packet;
        if (!leaves(packet))
            continue;
        core->stats.verdicts[packet->verdict]--;
        core->stats.verdicts[packet->verdict = NAT_DROP_STANDBY]++;
    }
}

bool standby_step(struct nat_core *core)
{
    struct standby *s = &core->standby;
    if (s->state == NAT_ROLE_PROBING && has_slice(core, 0)) {
        const uint64_t passed = core->now_ns - s->probe_at_ns, lived = passed < TURN_NS ? passed : TURN_NS;
        s->probe_at_ns = core->now_ns;
        s->probe_left_ns -= lived < s->probe_left_ns ? lived : s->probe_left_ns;
        if (!s->probe_left_ns) {
            change(core->config.role, NAT_ROLE_PROBING, NAT_ROLE_ACTIVE, &core->config.role->unanswered);
        } else if (core->now_ns >= s->probe_next_ns) {
            s->probe_next_ns = core->now_ns + PROBE_NS;
            neighbour_probe(core);
        }
        return true;
    }
    if (!s->announce_left || core->now_ms - s->announce_ms < ANNOUNCE_MS)
        return false;
    s->announce_left--;
    s->announce_ms = core->now_ms;
    neighbour_announce(core);
    return true;
}
