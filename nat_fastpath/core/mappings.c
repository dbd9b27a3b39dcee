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

/* Unlisted ones are in the index too, elsewhere: nobody finds them who looks for the endpoint. */
static uint32_t elsewhere(uint32_t hash, bool unlisted)
{
    return unlisted ? mix32(hash ^ 0x9e3779b9u) : hash;
}

static uint32_t find(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port,
                     bool unlisted)
{
    if (!core->mapping_index.n_buckets)
        return NONE32;
    const uint32_t hash = elsewhere(mapping_hash(core, protocol, address, port), unlisted);
    struct flow_cursor cursor = flow_cursor(&core->mapping_index, hash);
    uint32_t value;
    while ((value = flow_cursor_next(&cursor)) != FLOW_TABLE_NONE) {
        const struct mapping *m = &core->mappings[value - 1];
        if (m->internal_addr == address && m->internal_port == port && m->protocol == protocol &&
            m->unlisted == unlisted)
            return value - 1;
    }
    return NONE32;
}

uint32_t mapping_find(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port)
{
    return find(core, protocol, address, port, false);
}

void mapping_expect(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port)
{
    const struct flow_table *table = &core->mapping_index;
    if (table->n_buckets)
        flow_table_expect(table, mapping_hash(core, protocol, address, port));
}

static uint32_t hash_of_mapping(const struct nat_core *core, uint32_t at)
{
    const struct mapping *m = &core->mappings[at];
    return elsewhere(mapping_hash(core, m->protocol, m->internal_addr, m->internal_port), m->unlisted);
}

/* In the index, as `unlisted` or not; there is room where one of the same endpoint has just left its place.
 */
static bool enter(struct nat_core *core, uint32_t at, bool unlisted)
{
    struct mapping *m = &core->mappings[at];
    m->unlisted = unlisted;
    if (core->mapping_index.n_buckets &&
        !flow_table_insert(&core->mapping_index, hash_of_mapping(core, at), at + 1))
        return false;
    core->unlisted += unlisted;
    return true;
}

static void leave(struct nat_core *core, uint32_t at)
{
    core->unlisted -= core->mappings[at].unlisted;
    if (core->mapping_index.n_buckets)
        flow_table_remove(&core->mapping_index, hash_of_mapping(core, at), at + 1);
}

void mapping_remove(struct nat_core *core, uint32_t at)
{
    struct mapping *m = &core->mappings[at];
    leave(core, at);
    /* what an endpoint had besides after a split is all that it has now */
    const uint32_t other = m->unlisted || !core->unlisted
                               ? NONE32
                               : find(core, m->protocol, m->internal_addr, m->internal_port, true);
    if (other != NONE32) {
        leave(core, other);
        enter(core, other, false);
    }
    m->protocol = 0;
    SLAB_GIVE(&core->mapping_slab, core->mappings, slot, at);
}

void mapping_prefer(struct nat_core *core, uint32_t unlisted, uint32_t listed)
{
    leave(core, listed);
    leave(core, unlisted);
    enter(core, unlisted, false);
    enter(core, listed, true);
}

uint32_t mapping_add(struct nat_core *core, const struct session_request *r, uint32_t slot, uint64_t id,
                     bool listed)
{
    uint32_t at = SLAB_TAKE(&core->mapping_slab, core->mappings, slot);
    if (at == NONE32)
        return NONE32;
    core->mappings[at] = (struct mapping){
        .id = id,
        .internal_addr = r->internal_addr,
        .external_addr = r->external_addr,
        .internal_port = r->internal_port,
        .external_port = r->external_port,
        .protocol = r->protocol,
        .slot = slot,
    };
    if (enter(core, at, !listed))
        return at;
    core->mappings[at].protocol = 0;
    SLAB_GIVE(&core->mapping_slab, core->mappings, slot, at);
    return NONE32;
}
