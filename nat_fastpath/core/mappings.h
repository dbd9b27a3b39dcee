/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NAT_MAPPINGS_H
#define NAT_MAPPINGS_H

#include "core.h"

/* The listed mapping of this inside endpoint, or NONE32. */
uint32_t mapping_find(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port);

/* What mapping_find and mapping_add will need. */
void mapping_expect(const struct nat_core *core, uint8_t protocol, uint32_t address, uint16_t port);

/* NONE32 without room. An unlisted one serves its sessions and packets from outside, and no new sessions from
 * inside, unless the listed one goes before it. */
uint32_t mapping_add(struct nat_core *core, const struct session_request *r, uint32_t slot, uint64_t id,
                     bool listed);

void mapping_remove(struct nat_core *core, uint32_t at);

/* New sessions of their inside endpoint go by the unlisted one from here on. */
void mapping_prefer(struct nat_core *core, uint32_t unlisted, uint32_t listed);

#endif
