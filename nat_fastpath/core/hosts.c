/* SPDX-License-Identifier: Apache-2.0
 *
 * Inside hosts, as long as they have sessions: limits, and the pool address that they keep.
 */
#include "sessions.h"

uint32_t host_find(const struct nat_core *core, uint32_t address)
{
    struct flow_cursor cursor = flow_cursor(&core->host_index, host_hash(core, address));
    uint32_t value;
    while ((value = flow_cursor_next(&cursor)) != FLOW_TABLE_NONE)
        if (core->hosts[value - 1].address == address)
            return value - 1;
    return NONE32;
}

uint32_t host_add(struct nat_core *core, uint32_t address)
{
    uint32_t at = SLAB_TAKE(&core->host_slab, core->hosts, address);
    if (at == NONE32)
        return NONE32;
    if (!flow_table_insert(&core->host_index, host_hash(core, address), at + 1)) {
        SLAB_GIVE(&core->host_slab, core->hosts, address, at);
        return NONE32;
    }
    /* where it begins is spread by address and survives nothing else: any pool address serves any host */
    uint32_t start = (uint32_t)((uint64_t)mix32(address ^ 0x5bd1e995u) * core->pool.view.n_addresses >> 32);
    core->hosts[at] =
        (struct host){.address = address, .external = (uint16_t)pool_block_at(&core->pool, start)};
    return at;
}

void host_drop_if_idle(struct nat_core *core, uint32_t at)
{
    struct host *host = &core->hosts[at];
    if (host->sessions)
        return;
    flow_table_remove(&core->host_index, host_hash(core, host->address), at + 1);
    SLAB_GIVE(&core->host_slab, core->hosts, address, at);
}
