/* SPDX-License-Identifier: Apache-2.0
 *
 * Address-dependent filtering (RFC 4787, REQ-8): whom a mapping has sent to, and so admits. One entry for
 * each mapping and remote address, as long as a session of the two exists.
 */
#include "core.h"

static uint32_t permission_hash(const struct nat_core *core, uint32_t mapping, uint32_t remote)
{
    return small_hash_of(&core->hasher, mix32(mix32(remote) + mapping), remote, mapping, 0);
}

uint32_t permission_find(const struct nat_core *core, uint32_t mapping, uint32_t remote)
{
    struct flow_cursor cursor = flow_cursor(&core->permission_index, permission_hash(core, mapping, remote));
    uint32_t value;
    while ((value = flow_cursor_next(&cursor)) != FLOW_TABLE_NONE)
        if (core->permissions[value - 1].mapping == mapping && core->permissions[value - 1].remote == remote)
            return value - 1;
    return NONE32;
}

bool permission_add(struct nat_core *core, uint32_t mapping, uint32_t remote)
{
    uint32_t at = permission_find(core, mapping, remote);
    if (at == NONE32) {
        at = SLAB_TAKE(&core->permission_slab, core->permissions, mapping);
        if (at == NONE32)
            return false;
        if (!flow_table_insert(&core->permission_index, permission_hash(core, mapping, remote), at + 1)) {
            SLAB_GIVE(&core->permission_slab, core->permissions, mapping, at);
            return false;
        }
        core->permissions[at] = (struct permission){.mapping = mapping, .remote = remote};
    }
    core->permissions[at].sessions++;
    return true;
}

void permission_remove(struct nat_core *core, uint32_t mapping, uint32_t remote)
{
    uint32_t at = permission_find(core, mapping, remote);
    if (--core->permissions[at].sessions)
        return;
    flow_table_remove(&core->permission_index, permission_hash(core, mapping, remote), at + 1);
    SLAB_GIVE(&core->permission_slab, core->permissions, mapping, at);
}
