/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NAT_RECORDS_H
#define NAT_RECORDS_H

#include "core.h"

/* Records are looked up many at once, so that the memory that they need is on its way. */
#define RECORD_BATCH 32u
struct record_keys {
    uint64_t addrs[2][RECORD_BATCH];
    uint32_t ports[2][RECORD_BATCH];
    uint32_t hashes[2][RECORD_BATCH];
    uint32_t slots[RECORD_BATCH]; /* of the pool; POOL_NONE: it cannot be installed */
};
/* Of up to RECORD_BATCH records; those IN and the slots only for an `install`. */
void session_keys(const struct nat_core *core, const struct nat_record *records, unsigned n, bool install,
                  struct record_keys *keys);
/* The session of keys[i] in this direction, NONE32 if none. */
uint32_t session_by_key(const struct nat_core *core, const struct record_keys *keys, unsigned i,
                        uint8_t protocol, int direction);
/* From the peer or the operator; no session has its key OUT. `i`: of `keys`. */
bool session_install(struct nat_core *core, const struct nat_record *record, const struct record_keys *keys,
                     unsigned i);

#endif
