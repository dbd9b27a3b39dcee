/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NAT_SESSIONS_H
#define NAT_SESSIONS_H

#include "core.h"
#include "mappings.h"

/* --- hosts.c ------------------------------------------------------------------------------------------ */
#define host_hash(core, address) small_hash_of(&(core)->hasher, mix32(address), address, 0, 0)
uint32_t host_find(const struct nat_core *core, uint32_t address);
/* A new host has no sessions yet: whoever asked for it gives it one, or takes it back. */
uint32_t host_add(struct nat_core *core, uint32_t address);
void host_drop_if_idle(struct nat_core *core, uint32_t at);

/* --- sessions.c --------------------------------------------------------------------------------------- */
/* The part that opening and installing share: the session and its entries in the indexes, at a slot that was
 * taken for it. False, and nothing has changed: there is no place in an index. */
bool place_session(struct nat_core *core, uint32_t at, const struct session_request *r, uint32_t mapping,
                   uint64_t id, const uint32_t hashes[2]);

/* A new session in two steps. The first takes all that others might take too; the second needs the index
 * entry of the external end, which the first has asked for. What was begun must be finished, in its order. */
struct opening {
    enum nat_verdict verdict; /* of session_begin */
    struct session_request request;
    uint32_t at, host, mapping;
    uint32_t slot; /* of a new port; else POOL_NONE */
    uint32_t hashes[2];
};
/* FORWARD, or the reason why not; then nothing has changed, and next hops that only it needed are gone. */
enum nat_verdict session_begin(struct nat_core *core, struct session_request *request,
                               struct opening *opening);
/* FORWARD and the session is opening->at; or the reason why not, and all is undone. */
enum nat_verdict session_finish(struct nat_core *core, const struct opening *opening);
/* What session_begin will need for a packet from inside. */
static inline void session_expect(const struct nat_core *core, uint8_t protocol, uint32_t address,
                                  uint16_t port)
{
    __builtin_prefetch(
        &core->host_index.buckets[flow_table_first(&core->host_index, host_hash(core, address))]);
    mapping_expect(core, protocol, address, port);
}

/* What the end of up to END_BATCH of them will need. */
#define END_BATCH 32u
void sessions_expect_end(const struct nat_core *core, const uint32_t *at, unsigned n);

/* --- alone.c ------------------------------------------------------------------------------------------ */
/* As packet_alone begins with a packet of the common shape from inside that has no session. False: it has
 * not begun, for something is unusual about it. Else the verdict of session_begin is in *opening. */
bool outbound_begin(struct nat_core *core, const struct nat_packet *packet, unsigned l2, uint32_t hash,
                    struct opening *opening);

#endif
