/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NAT_SESSIONS_H
#define NAT_SESSIONS_H

#include "core.h"

/* --- hosts.c ------------------------------------------------------------------------------------------ */
#define host_hash(core, address) small_hash_of(&(core)->hasher, mix32(address), address, 0, 0)
uint32_t host_find(const struct nat_core *core, uint32_t address);
/* A new host has no sessions yet: whoever asked for it gives it one, or takes it back. */
uint32_t host_add(struct nat_core *core, uint32_t address);
void host_drop_if_idle(struct nat_core *core, uint32_t at);

/* --- sessions.c --------------------------------------------------------------------------------------- */
/* Everything but the counters of success: the part that open and install share. `slot` is claimed already
 * when a new mapping is due. `hashes`: of both directions, NULL where they are not known yet. */
uint32_t add_session(struct nat_core *core, const struct session_request *r, uint32_t mapping, uint64_t id,
                     const uint32_t *hashes);

#endif
