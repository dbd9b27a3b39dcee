/* SPDX-License-Identifier: Apache-2.0
 *
 * Endpoint-independent mappings, X:x <-> X':x', found by their inside endpoint.
 */
#include "mappings.h"

static uint32_t mapping_hash(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port)
{
    uint32_t plain = mix32(mix32(address) + ((uint32_t)port << 8 | protocol));
    return small_hash_of(&core->hasher, plain, address, port, protocol);
}

uint32_t mapping_find(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port)
{
    if (!core->mapping_index.n_buckets)
        return NONE32;
    struct flow_cursor cursor =
        flow_cursor(&core->mapping_index, mapping_hash(core, protocol, address, port));
    uint32_t value;
    while ((value = flow_cursor_next(&cursor)) != FLOW_TABLE_NONE) {
        const struct mapping *m = &core->mappings[value - 1];
        if (m->internal_addr == address && m->internal_port == port && m->protocol == protocol)
            return value - 1;
    }
    return NONE32;
}

void mapping_expect(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port)
{
    const struct flow_table *table = &core->mapping_index;
    if (!table->n_buckets)
        return;
    uint32_t hash = mapping_hash(core, protocol, address, port), first = flow_table_first(table, hash);
    __builtin_prefetch(&table->buckets[first], 1);
    __builtin_prefetch(&table->buckets[flow_table_other(table, hash, first)], 1);
}

static uint32_t hash_of_mapping(const struct nat_core *core, uint32_t at)
{
    const struct mapping *m = &core->mappings[at];
    return mapping_hash(core, m->protocol, m->internal_addr, m->internal_port);
}

void mapping_remove(struct nat_core *core, uint32_t at)
{
    struct mapping *m = &core->mappings[at];
    if (m->unlisted)
        core->unlisted--;
    else if (core->mapping_index.n_buckets)
        flow_table_remove(&core->mapping_index, hash_of_mapping(core, at), at + 1);
    m->protocol = 0;
    SLAB_GIVE(&core->mapping_slab, core->mappings, slot, at);
}

void mapping_prefer(struct nat_core *core, uint32_t unlisted, uint32_t listed)
{
    flow_table_remove(&core->mapping_index, hash_of_mapping(core, listed), listed + 1);
    flow_table_insert(&core->mapping_index, hash_of_mapping(core, unlisted),
                      unlisted + 1); /* that has left room */
    core->mappings[listed].unlisted = 1;
    core->mappings[unlisted].unlisted = 0;
}

uint32_t mapping_add(struct nat_core *core, const struct session_request *r, uint32_t slot, uint64_t id,
                     bool listed)
{
    uint32_t at = SLAB_TAKE(&core->mapping_slab, core->mappings, slot);
    if (at == NONE32)
        return NONE32;
    if (listed && core->mapping_index.n_buckets &&
        !flow_table_insert(&core->mapping_index,
                           mapping_hash(core, r->protocol, r->internal_addr, r->internal_port), at + 1)) {
        SLAB_GIVE(&core->mapping_slab, core->mappings, slot, at);
        return NONE32;
    }
    core->mappings[at] = (struct mapping){
        .id = id,
        .internal_addr = r->internal_addr,
        .external_addr = r->external_addr,
        .internal_port = r->internal_port,
        .external_port = r->external_port,
        .protocol = r->protocol,
        .unlisted = !listed,
        .slot = slot,
    };
    core->unlisted += !listed;
    return at;
}
