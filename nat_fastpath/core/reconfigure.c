/* SPDX-License-Identifier: Apache-2.0
 *
 * Another configuration for a core that runs. All that can fail comes first and changes nothing: memory is
 * taken by whoever prepares, next hops are found or made by the owner, and the pool says whether it can do
 * without the addresses that go. Then it is in force, and what is left cannot fail.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "core.h"

#define HOPS_STEP 64u    /* next hops found or made in one step */
#define LOOSEN_STEP 256u /* next hops looked at, of which most are none of the configuration's */
#define REROUTE_STEP 64u /* sessions, for each of which up to 2 x 64 routes are compared */

enum phase { FIND, COMMIT, LOOSEN, FIX, UNDO };
enum progress { WAITING, BEGUN, ENDED, WITHDRAWN };

struct nat_change {
    struct nat_config config; /* once it is in force: the one that was */
    struct nat_neighbour_config *neighbours;
    struct pool_change *pool;
    enum phase phase;
    atomic_uint progress; /* of the owner, or that it need not begin */
    uint32_t at;
    uint32_t found;   /* hops that must not be forgotten meanwhile: they count one session more */
    bool rerouted;    /* routes are others than before */
    bool readdressed; /* the pool has addresses that it had not */
    const char *refused;
    uint16_t gateway[NAT_MAX_ROUTES]; /* of config's routes */
    uint16_t hops[];                  /* of static neighbours, then of routes; NONE16: needs none */
};

/* --- before --------------------------------------------------------------------------------------------- */

static int by_port_and_address(const void *a, const void *b)
{
    const struct nat_neighbour_config *x = a, *y = b;
    return x->port != y->port ? x->port - y->port : x->address < y->address ? -1 : x->address > y->address;
}

static bool same_ports(const struct nat_config *a, const struct nat_config *b)
{
    bool same = a->n_ports == b->n_ports;
    for (unsigned i = 0; same && i < a->n_ports; i++) {
        const struct nat_port_config *x = &a->ports[i], *y = &b->ports[i];
        same = x->side == y->side && x->address == y->address && x->vlan == y->vlan &&
               !memcmp(x->mac, y->mac, sizeof x->mac);
    }
    return same;
}

/* What the tables were made for, and what others rely on. */
static const char *needs_another_core(const struct nat_config *old, const struct nat_config *new)
{
    if (!same_ports(old, new))
        return "side, address, MAC and VLAN of ports";
    if (old->mapping != new->mapping)
        return "the mapping";
    if (old->filtering != new->filtering &&
        (old->mapping != NAT_MAPPING_ENDPOINT_INDEPENDENT || old->filtering == NAT_FILTER_ADDRESS ||
         new->filtering == NAT_FILTER_ADDRESS))
        return "the filtering, other than from and to endpoint-independent with that mapping";
    if (old->flow_hash != new->flow_hash)
        return "the flow hash";
    if (old->max_sessions != new->max_sessions || old->max_mappings != new->max_mappings ||
        old->max_hosts != new->max_hosts || old->max_neighbours != new->max_neighbours ||
        old->max_held != new->max_held || old->event_ring != new->event_ring)
        return "the sizes of tables";
    if (old->n_slices != new->n_slices || old->slice != new->slice)
        return "slices";
    if (old->instance != new->instance || old->synchronous != new->synchronous)
        return "instance and synchronous mode";
    return NULL;
}

static bool is_within(const struct nat_pool_range *range, const struct nat_config *config)
{
    for (unsigned i = 0; i < config->n_pool; i++)
        if (config->pool[i].first <= range->first && range->last <= config->pool[i].last)
            return true;
    return false;
}

static struct nat_change *change_of(const struct nat_config *config, char *error, size_t error_size)
{
    uint32_t n = config->n_neighbours + config->n_routes;
    struct nat_change *change = calloc(1, sizeof *change + n * sizeof change->hops[0]);
    if (change)
        change->neighbours = calloc(config->n_neighbours + 1u, sizeof *change->neighbours);
    if (!change || !change->neighbours) {
        snprintf(error, error_size, "no memory for another configuration");
        nat_change_free(change);
        return NULL;
    }
    change->config = config_completed(config);
    change->config.neighbours = NULL;
    sort_routes(&change->config);
    if (config->n_neighbours)
        memcpy(change->neighbours, config->neighbours, config->n_neighbours * sizeof *change->neighbours);
    qsort(change->neighbours, config->n_neighbours, sizeof *change->neighbours, by_port_and_address);
    for (unsigned i = 0; i < config->n_neighbours; i++) {
        const struct nat_neighbour_config *hop = &change->neighbours[i];
        if (hop->address && hop->port < config->n_ports && (!i || by_port_and_address(hop - 1, hop)))
            continue;
        snprintf(error, error_size,
                 "a static neighbour has no address, no port that exists, or stands twice");
        nat_change_free(change);
        return NULL;
    }
    return change;
}

struct nat_change *nat_prepare(const struct nat_core *core, const struct nat_config *config, char *error,
                               size_t error_size)
{
    const char *fault = config_fault(config);
    if (fault) {
        snprintf(error, error_size, "%s", fault);
        return NULL;
    }
    struct nat_change *change = change_of(config, error, error_size);
    if (!change)
        return NULL;
    const struct nat_config *old = &core->config;
    struct nat_config *new = &change->config;
    if ((fault = needs_another_core(old, new))) {
        snprintf(error, error_size, "%s cannot be changed while the core runs", fault);
        nat_change_free(change);
        return NULL;
    }
    new->epoch = old->epoch;
    new->seed = old->seed;
    new->role = old->role;
    change->rerouted = old->n_routes != new->n_routes ||
                       memcmp(old->routes, new->routes, new->n_routes * sizeof new->routes[0]) != 0;
    for (unsigned i = 0; i < new->n_pool; i++)
        change->readdressed |= !is_within(&new->pool[i], old);
    change->pool = port_pool_prepare(&core->pool, new, error, error_size);
    if (!change->pool) {
        nat_change_free(change);
        return NULL;
    }
    return change;
}

void nat_change_free(struct nat_change *change)
{
    if (!change)
        return;
    if (change->pool)
        port_pool_change_free(change->pool);
    free(change->neighbours);
    free(change);
}

static bool from_waiting(struct nat_change *change, enum progress to)
{
    unsigned waiting = WAITING;
    return atomic_compare_exchange_strong(&change->progress, &waiting, to);
}

bool nat_change_withdraw(struct nat_change *change)
{
    return from_waiting(change, WITHDRAWN);
}

bool nat_change_is_under_way(const struct nat_change *change)
{
    return atomic_load(&change->progress) == BEGUN;
}

const char *nat_change_refused(const struct nat_change *change)
{
    return change->refused;
}

uint32_t nat_mappings_on(const struct nat_core *core, uint32_t address)
{
    return port_pool_live(&core->pool, address);
}

/* --- by the owner ----------------------------------------------------------------------------------------
 */

static uint32_t hops_of(const struct nat_change *change)
{
    return change->config.n_neighbours + change->config.n_routes;
}

/* True when all are there. False with `refused`: there is no room for the next one. */
static bool find_hops(struct nat_core *core, struct nat_change *change)
{
    const uint32_t n = hops_of(change), end = change->found + HOPS_STEP;
    for (; change->found < n && change->found < end; change->found++) {
        uint32_t i = change->found, r = i - change->config.n_neighbours;
        bool is_static = i < change->config.n_neighbours;
        const struct nat_route_config *route = is_static ? NULL : &change->config.routes[r];
        uint16_t hop = NONE16;
        if (is_static || !route->connected) {
            hop = is_static ? neighbour_at(core, change->neighbours[i].port, change->neighbours[i].address)
                            : neighbour_at(core, route->port, route->gateway);
            if (hop == NONE16) {
                change->refused = "there is no room in max_neighbours for its static neighbours and gateways";
                return false;
            }
            core->neighbours[hop].sessions++;
        }
        change->hops[i] = hop;
        if (!is_static)
            change->gateway[r] = hop;
    }
    return change->found == n;
}

static void put_in_force(struct nat_core *core, struct nat_change *change)
{
    struct nat_config old = core->config;
    core->config = change->config;
    config_in_force(core);
    /* what it replaces stays with the change: sessions that go the old ways are to be found */
    change->config = old;
    for (unsigned i = 0; i < NAT_MAX_ROUTES; i++) {
        uint16_t gateway = core->gateway_neighbour[i];
        core->gateway_neighbour[i] = change->gateway[i];
        change->gateway[i] = gateway;
    }
    if (change->readdressed)
        nat_announce(core);
}

static bool loosen_hops(struct nat_core *core, struct nat_change *change)
{
    const uint32_t end = change->at + LOOSEN_STEP;
    for (; change->at < core->neighbour_slab.top && change->at < end; change->at++)
        if (core->neighbours[change->at].state != NAT_NB_FREE)
            neighbour_loosen(core, (uint16_t)change->at);
    return change->at >= core->neighbour_slab.top;
}

/* Of static neighbours first: a gateway may be one. */
static bool fix_hops(struct nat_core *core, struct nat_change *change)
{
    const struct nat_config *config = &core->config;
    for (unsigned budget = HOPS_STEP; change->at < change->found && budget; budget--) {
        uint32_t i = change->at++;
        uint16_t hop = change->hops[i];
        if (hop == NONE16)
            continue;
        const struct nat_route_config *route =
            i < config->n_neighbours ? NULL : &config->routes[i - config->n_neighbours];
        const uint8_t *mac = !route ? change->neighbours[i].mac : route->has_mac ? route->mac : NULL;
        core->neighbours[hop].keep |= route != NULL;
        bool released = mac && neighbour_fix(core, hop, mac);
        neighbour_leave(core, hop);
        if (released)
            break; /* up to 64 packets were sent */
    }
    return change->at == change->found;
}

/* One bounded step; true at the end. */
static bool change_step(struct nat_core *core, struct nat_change *change)
{
    switch (change->phase) {
    case FIND:
        if (find_hops(core, change))
            change->phase = COMMIT;
        else if (change->refused)
            change->phase = UNDO;
        return false;
    case COMMIT:
        if (change->pool && !port_pool_change(&core->pool, change->pool)) {
            change->refused = "an address that leaves the pool has mappings";
            change->phase = UNDO;
            return false;
        }
        put_in_force(core, change);
        change->phase = LOOSEN;
        return false;
    case LOOSEN:
        if (loosen_hops(core, change)) {
            change->at = 0;
            change->phase = FIX;
        }
        return false;
    case FIX:
        return fix_hops(core, change);
    case UNDO: /* those that were made for it are forgotten like any that nobody uses */
        for (unsigned budget = HOPS_STEP; change->found && budget; budget--)
            if (change->hops[--change->found] != NONE16)
                neighbour_leave(core, change->hops[change->found]);
        return !change->found;
    }
    return true;
}

bool neighbours_configure(struct nat_core *core, const struct nat_config *config, char *error,
                          size_t error_size)
{
    struct nat_change *change = change_of(config, error, error_size);
    if (!change)
        return false;
    while (!change_step(core, change))
        ;
    bool done = !change->refused;
    if (!done)
        snprintf(error, error_size, "%s", change->refused);
    nat_change_free(change);
    return done;
}

bool reconfigure_step(struct nat_core *core, struct nat_command *command)
{
    struct nat_change *change = command->buffer;
    if (!from_waiting(change, BEGUN) && atomic_load(&change->progress) == WITHDRAWN)
        return true;
    command->cursor++; /* who waits sees that it goes on */
    if (!change_step(core, change))
        return false;
    command->result = !change->refused;
    atomic_store(&change->progress, ENDED);
    return true;
}

/* --- sessions ----------------------------------------------------------------------------------------------
 */

/* The next hop that the routes before this change lead to; NONE16: none that anybody used. */
static uint16_t old_hop(struct nat_core *core, const struct nat_change *change, uint32_t address,
                        enum nat_side side)
{
    static const uint8_t no_mac[6];
    unsigned i = route_towards(core, &change->config, address, side);
    if (i == NAT_MAX_ROUTES)
        return NONE16;
    const struct nat_route_config *route = &change->config.routes[i];
    return route->connected ? neighbour_find(core, route->port, address, no_mac) : change->gateway[i];
}

/* A session that went where the old routes lead goes where the new ones do. One that answers to another
 * sender, or has no route any more, stays as it is. */
static bool reroute(struct nat_core *core, const struct nat_change *change, uint32_t at, int direction)
{
    const struct session *s = &core->sessions[at];
    uint32_t address = direction == OUT ? session_remote_addr(s) : session_internal_addr(s);
    enum nat_side side = direction == OUT ? NAT_EXTERNAL : NAT_INTERNAL;
    enum nat_verdict why;
    if (s->neighbour[direction] == NONE16 || s->neighbour[direction] != old_hop(core, change, address, side))
        return false;
    return session_follow(core, at, direction, neighbour_towards(core, address, side, &why));
}

bool reroute_step(struct nat_core *core, struct nat_command *command)
{
    const struct nat_change *change = command->buffer;
    if (!change->rerouted) {
        command->cursor = 0;
        return true;
    }
    for (unsigned budget = REROUTE_STEP; budget && command->count && command->cursor < core->session_slab.top;
         budget--, command->count--, command->cursor++) {
        uint32_t at = (uint32_t)command->cursor;
        if (!core->sessions[at].protocol)
            continue;
        bool outside = reroute(core, change, at, OUT), inside = reroute(core, change, at, IN);
        command->result += outside || inside;
        if (inside && event_room_to_update(core))
            event_emit(core, NAT_EVENT_UPDATE, 0, at); /* the peer's answers must go there too */
    }
    if (command->cursor >= core->session_slab.top)
        command->cursor = 0;
    return !command->cursor || !command->count;
}
