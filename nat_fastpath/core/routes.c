/* SPDX-License-Identifier: Apache-2.0
 *
 * What the configuration says about an address: whose it is, and to which side it is routed.
 */
#include "core.h"

#include <string.h>

bool is_own_address(const struct nat_core *core, uint32_t address)
{
    for (unsigned i = 0; i < core->config.n_ports; i++)
        if (core->config.ports[i].address == address && address)
            return true;
    return false;
}

bool is_answered_address(const struct nat_core *core, uint8_t port, uint32_t address)
{
    const struct nat_port_config *config = &core->config.ports[port];
    return address && (config->address == address ||
                       (config->side == NAT_EXTERNAL && pool_block_of(&core->pool, address) != POOL_NONE));
}

static uint32_t prefix_mask(uint8_t length)
{
    return length ? ~0u << (32 - length) : 0;
}

bool route_covers(const struct nat_route_config *route, uint32_t address)
{
    return ((address ^ route->prefix) & prefix_mask(route->length)) == 0;
}

void sort_routes(struct nat_config *config)
{
    /* few enough that plain insertion does */
    struct nat_route_config *routes = config->routes;
    for (unsigned i = 1; i < config->n_routes; i++)
        for (unsigned k = i; k && routes[k - 1].length < routes[k].length; k--) {
            struct nat_route_config swap = routes[k];
            routes[k] = routes[k - 1];
            routes[k - 1] = swap;
        }
}

unsigned route_towards(struct nat_core *core, const struct nat_config *config, uint32_t address,
                       enum nat_side side)
{
    unsigned length = 32;
    bool matched = false;
    for (unsigned i = 0; i < config->n_routes; i++) {
        const struct nat_route_config *route = &config->routes[i];
        if (matched && route->length < length)
            break; /* the best route leads to the other side */
        if (!route_covers(route, address))
            continue;
        matched = true;
        length = route->length;
        bool right = config->ports[route->port].side == side;
        NOTE(core, ROUTE, .address = route->prefix, .value = route->length, .id = route->gateway,
             .port = route->port, .flag = right);
        if (right)
            return i;
    }
    NOTE(core, NO_ROUTE, .address = address);
    return NAT_MAX_ROUTES;
}

bool is_on_link(const struct nat_core *core, uint8_t port, uint32_t address)
{
    for (unsigned i = 0; i < core->config.n_routes; i++) {
        const struct nat_route_config *route = &core->config.routes[i];
        if (route->connected && route->port == port && route_covers(route, address))
            return true;
    }
    return false;
}

bool is_routed_to(const struct nat_core *core, uint32_t address, enum nat_side side)
{
    for (unsigned i = 0; i < core->config.n_routes; i++)
        if (route_covers(&core->config.routes[i], address))
            return core->config.ports[core->config.routes[i].port].side == side;
    return false;
}

bool is_broadcast_of(const struct nat_route_config *route, uint32_t address)
{
    uint32_t host = address & ~prefix_mask(route->length);
    return route->length < 31 && (host == 0 || host == ~prefix_mask(route->length));
}

bool is_subnet_broadcast(const struct nat_core *core, uint32_t address)
{
    for (unsigned i = 0; i < core->config.n_routes; i++) {
        const struct nat_route_config *route = &core->config.routes[i];
        if (route->connected && route_covers(route, address) && is_broadcast_of(route, address))
            return true;
    }
    return false;
}

static void mark(struct nat_core *core, uint32_t first, uint32_t last)
{
    for (uint32_t block = first >> 16; block <= last >> 16; block++)
        core->special[block / 64] |= 1ull << block % 64;
}

/* Whatever source_fault, or an address's place inside, might be about. */
void addresses_in_force(struct nat_core *core)
{
    const struct nat_config *config = &core->config;
    memset(core->special, 0, sizeof core->special);
    mark(core, 0, 0x00ffffff);
    mark(core, 0x7f000000, 0x7fffffff);
    mark(core, 0xe0000000, 0xffffffff);
    for (unsigned i = 0; i < config->n_ports; i++)
        mark(core, config->ports[i].address, config->ports[i].address);
    for (unsigned i = 0; i < config->n_pool; i++)
        mark(core, config->pool[i].first, config->pool[i].last);
    for (unsigned i = 0; i < config->n_routes; i++) {
        const struct nat_route_config *route = &config->routes[i];
        const uint32_t mask = prefix_mask(route->length), first = route->prefix & mask, last = first | ~mask;
        if (config->ports[route->port].side == NAT_INTERNAL)
            mark(core, first, last);
        mark(core, first, first); /* broadcast addresses, where it is connected */
        mark(core, last, last);
    }
}
