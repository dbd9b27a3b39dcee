/* SPDX-License-Identifier: Apache-2.0
 *
 * What a core is made of. Read nat.h first; pipeline.c shows the packet's way through it.
 */
#ifndef CORE_H
#define CORE_H

#include <assert.h>
#include <stdatomic.h>

#include "flow_hash.h"
#include "flow_table.h"
#include "nat.h"
#include "port_pool.h"
#include "slab.h"
#include "standby.h"
#include "tcp_state.h"
#include "wire.h"

enum { OUT = 0, IN = 1 }; /* direction of a packet: from inside, from outside */
#define NONE16 UINT16_MAX

enum timer { TIMER_UDP, TIMER_ICMP, TIMER_TCP_TRANSITORY, TIMER_TCP_ESTABLISHED, TIMERS };

/* All that an established packet needs, in one cache line. Keys are raw, as in the packet before translation:
 * addrs[OUT] = internal, remote; addrs[IN] = remote, external (first field in the low half). */
struct session {
    uint64_t addrs[2];
    uint32_t ports[2];
    uint8_t protocol; /* 0: the slot is free, and ports[0] links it */
    uint8_t flags;    /* enum nat_session_flag */
    uint8_t tcp_state;
    uint8_t timer;
    uint16_t neighbour[2]; /* [OUT] towards the outside, [IN] towards the inside */
    uint16_t l3_delta;     /* of the translation OUT; its complement is that of IN */
    uint16_t l4_delta;
    uint32_t last_ms;
    uint32_t packets[2]; /* the high parts are in the cold record */
    uint64_t bytes[2];
};
static_assert(sizeof(struct session) == 64, "a session's hot part is one cache line");

struct session_cold {
    uint64_t id;
    uint32_t opened_ms;
    uint32_t mapping; /* NONE32: the session is its own */
    uint16_t packets_high[2];
    uint16_t held_first, held_last; /* packets waiting for its commit */
};
static_assert(sizeof(struct session_cold) == 24, "memory per session is promised");

/* Endpoint-independent mapping: X:x <-> X':x', as long as it has a session. */
struct mapping {
    uint64_t id;
    uint32_t internal_addr, external_addr; /* host order */
    uint32_t sessions;
    uint32_t slot; /* of the pool */
    uint16_t internal_port, external_port;
    uint8_t protocol; /* 0: free, and `slot` links it */
    uint8_t rests;    /* its port, when it ends: not all of its sessions were seen to end */
    uint8_t unlisted; /* another one of its inside endpoint has the new sessions: the two sides of a split */
    uint8_t reserved;
};
static_assert(sizeof(struct mapping) == 32, "memory per mapping is promised");

/* Address-dependent filtering: this mapping has sent to this remote address. */
struct permission {
    uint32_t mapping;
    uint32_t remote;   /* host order */
    uint32_t sessions; /* 0: free, and `mapping` links it */
};

struct host {
    uint32_t address;
    uint32_t sessions; /* 0: free, and `address` links it */
    uint32_t mappings;
    uint32_t refused;
    uint16_t external; /* index of its pool address: paired pooling, RFC 4787 REQ-2 */
    uint16_t reserved;
};

struct neighbour {
    uint32_t address; /* 0: known by its MAC only */
    uint8_t mac[6];
    uint8_t port;
    uint8_t state; /* enum nat_neighbour_state */
    uint32_t sessions;
    uint32_t confirmed_ms, used_ms, asked_ms;
    uint16_t held_first, held_last, held;
    uint8_t asked; /* requests without an answer */
    uint8_t keep;  /* gateways are refreshed even when idle */
    uint8_t fresh; /* no session has used it yet */
};

struct held {
    struct nat_packet packet;
    uint64_t since_ms;
    uint32_t session; /* NONE32: the core's business is done, the packet only waits for its next hop */
    uint16_t next;
    uint8_t direction; /* of the session whose commit it waits for */
};

/* A datagram that comes in fragments: what its first one was translated by, or those that came before it. */
struct datagram {
    uint32_t source, destination; /* raw, before translation */
    uint16_t id;                  /* raw */
    uint8_t protocol;
    uint8_t from; /* port; DATAGRAM_TURNED: the outbound half of a hairpin has been done */
    uint8_t list; /* enum datagram_list */
    uint8_t direction;
    uint8_t is_error; /* ICMP error about the session: no traffic of its own */
    uint8_t held;
    uint16_t held_first, held_last;
    uint32_t session; /* of the first fragment, and its id, for sessions end and slots are used again */
    uint32_t seen_ms;
    uint8_t slice; /* where it has gone; for session NONE32 */
    uint64_t session_id;
    uint32_t before, after; /* in its list; after also links free ones */
};
#define DATAGRAM_TURNED 0x80u
static_assert(sizeof(struct datagram) == 48, "memory per datagram is promised");

/* First fragment seen; not seen; seen, and those that waited are about to follow it. Oldest first. */
enum datagram_list { DATAGRAMS_KNOWN, DATAGRAMS_WAITING, DATAGRAMS_DUE, DATAGRAM_LISTS };

struct outbox_frame {
    uint8_t port;
    uint8_t length;
    uint8_t bytes[NAT_OUTBOX_BYTES];
};

/* Credit is time: one event at `rate` per second costs 1/rate of it. */
struct token_bucket {
    uint64_t credit_ns, at_ns;
};
bool bucket_spend(struct token_bucket *bucket, uint32_t rate, uint32_t depth, uint64_t now_ns);

#define COMMAND_RING 64u

struct nat_core {
    struct nat_config config;
    struct nat_stats stats;
    struct flow_hasher hasher;
    uint32_t now_ms; /* of the burst or poll under way; ages are differences, so wrapping does no harm */
    uint64_t now_ns;
    uint32_t timeout_ms[TIMERS];
    bool has_mappings;
    bool has_permissions;

    struct flow_table flows; /* value: 1 + (session << 1 | direction) */
    struct session *sessions;
    struct session_cold *cold;
    struct slab session_slab;
    uint32_t next_session_id, next_mapping_id;

    struct flow_table mapping_index; /* endpoint-independent only; value: 1 + mapping */
    struct mapping *mappings;
    struct slab mapping_slab;
    uint32_t unlisted; /* mappings */

    struct flow_table permission_index;
    struct permission *permissions;
    struct slab permission_slab;

    struct flow_table host_index;
    struct host *hosts;
    struct slab host_slab;

    struct port_pool pool;

    struct flow_table neighbour_index; /* by port and address */
    struct neighbour *neighbours;
    struct slab neighbour_slab;
    uint32_t neighbour_sweep, neighbour_sweep_ms;
    uint64_t announce_at; /* the next address to announce; beyond the last: nothing to do */
    uint16_t gateway_neighbour[NAT_MAX_ROUTES]; /* NONE16: the route is connected */

    struct held *held;
    struct slab held_slab;
    uint16_t done_first, done_last; /* of those that have a verdict and wait for nat_take */
    uint32_t held_sweep;

    struct flow_table datagram_index;
    struct datagram *datagrams;
    struct slab datagram_slab;
    struct {
        uint32_t first, last;
    } datagram_list[DATAGRAM_LISTS];
    uint32_t fragments_held;

    struct outbox_frame outbox[NAT_OUTBOX];
    uint32_t outbox_head, outbox_tail;

    /* ageing */
    uint32_t sweep_at;
    uint64_t sweep_ns; /* when the sweep last moved */

    uint64_t special[65536 / 64]; /* bit per /16; see is_plain */

    struct token_bucket new_sessions, icmp_errors;
    struct standby standby;

    struct explain *explain; /* NULL: packets are real */
    bool tracing;            /* all bursts go the slow way */
    struct {
        struct nat_trace status; /* with the ring of entries in it */
        uint64_t until_ns;
        uint32_t head, tail;
    } trace;

    /* rings */
    struct nat_event *events;
    uint64_t event_sequence;
    _Alignas(64) _Atomic uint32_t event_tail; /* written by the owner */
    uint32_t event_head_seen;
    _Alignas(64) _Atomic uint32_t event_head; /* written by the reader */
    _Atomic bool reader_sleeps;
    _Alignas(64) struct nat_command *commands[COMMAND_RING];
    _Atomic uint32_t command_tail;
    _Alignas(64) _Atomic uint32_t command_head;
};

/* --- keys ------------------------------------------------------------------------------------------- */

struct flow_key {
    uint64_t addrs; /* raw: source in the low half, destination in the high */
    uint32_t ports;
    uint8_t protocol;
};
static inline struct flow_key flow_key(uint32_t raw_source, uint32_t raw_destination, uint16_t raw_sport,
                                       uint16_t raw_dport, uint8_t protocol)
{
    return (struct flow_key){raw_source | (uint64_t)raw_destination << 32,
                             raw_sport | (uint32_t)raw_dport << 16, protocol};
}
static inline uint32_t low32(uint64_t v)
{
    return (uint32_t)v;
}
static inline uint32_t high32(uint64_t v)
{
    return (uint32_t)(v >> 32);
}
/* host order */
static inline uint32_t session_internal_addr(const struct session *s)
{
    return net32(low32(s->addrs[OUT]));
}
static inline uint32_t session_remote_addr(const struct session *s)
{
    return net32(high32(s->addrs[OUT]));
}
static inline uint32_t session_external_addr(const struct session *s)
{
    return net32(high32(s->addrs[IN]));
}
static inline uint16_t session_internal_port(const struct session *s)
{
    return net16((uint16_t)s->ports[OUT]);
}
static inline uint16_t session_remote_port(const struct session *s)
{
    return net16((uint16_t)(s->ports[OUT] >> 16));
}
static inline uint16_t session_external_port(const struct session *s)
{
    return net16((uint16_t)(s->ports[IN] >> 16));
}

/* --- sessions.c -------------------------------------------------------------------------------------- */

/* The session that a packet with this key in this direction belongs to, NONE32 if none. */
uint32_t session_find(const struct nat_core *core, const struct flow_key *key, uint32_t hash, int direction);

/* What a new session is made from, host order. */
struct session_request {
    uint32_t internal_addr, remote_addr, external_addr;
    uint16_t internal_port, remote_port, external_port; /* external: filled in for OUT, given for IN */
    uint8_t protocol, tcp_state;
    uint16_t neighbour[2];
    bool inbound;
    uint32_t mapping; /* the one that an inbound packet found */
    uint32_t hash;    /* of the packet's key */
};
/* FORWARD and the new session, or the reason why not; then nothing has changed. */
enum nat_verdict session_open(struct nat_core *core, struct session_request *request, uint32_t *session);
/* False: the event ring has no room, and the session lives on. */
bool session_close(struct nat_core *core, uint32_t session, enum nat_close_reason reason);
/* What an inbound packet without a session finds: FORWARD and *request completed, or why it is dropped. */
enum nat_verdict mapping_admits(struct nat_core *core, uint32_t external_addr, uint16_t external_port,
                                uint8_t protocol, uint32_t remote_addr, struct session_request *request);
void session_record(const struct nat_core *core, uint32_t session, struct nat_record *record);
/* What the side that carries the traffic has seen of it. */
void session_update(struct nat_core *core, uint32_t at, const struct nat_record *record);
/* Its packets of this direction go to this next hop from now on; false: they do already, or there is none. */
bool session_follow(struct nat_core *core, uint32_t at, int direction, uint16_t neighbour);
static inline void session_own(struct session *session, uint8_t foreign)
{
    session->flags = (uint8_t)((session->flags & ~NAT_SESSION_FOREIGN) | foreign);
}
void session_used(struct nat_core *core, uint32_t at, uint32_t idle_ms);
void session_set_timer(struct session *session);
/* Undoes what session_open has done. `rests`: its port must not be used again at once. */
void session_end(struct nat_core *core, uint32_t at, bool rests);

/* --- permissions.c ----------------------------------------------------------------------------------- */
/* NONE32: this mapping admits nobody at that address. */
uint32_t permission_find(const struct nat_core *core, uint32_t mapping, uint32_t remote);
bool permission_add(struct nat_core *core, uint32_t mapping, uint32_t remote);
void permission_remove(struct nat_core *core, uint32_t mapping, uint32_t remote);

/* --- explain.c --------------------------------------------------------------------------------------- */
/* A packet that is only explained is carried out like any other. Whatever it changes is undone afterwards in
 * reverse order; whatever cannot be undone (events, frames of our own, held packets) is left out. So these
 * are asked for wherever a packet changes something; the established path asks for nothing. */
void explain_note(struct nat_core *core, const struct nat_step *step);
#define NOTE(core, step, ...)                                                                                \
    ((core)->explain ? explain_note(core, &(struct nat_step){.kind = NAT_STEP_##step, __VA_ARGS__}) : (void)0)
void explain_note_slot(struct nat_core *core, uint32_t slot, uint32_t address, uint16_t port);
void explain_note_session(struct nat_core *core, enum nat_step_kind kind, uint32_t at);
void explain_note_port(struct nat_core *core, uint32_t block, unsigned slice, uint8_t protocol, uint16_t port,
                       int missed);
void explain_remember_session(struct nat_core *core, uint32_t at);
void explain_remember_neighbour(struct nat_core *core, uint16_t at);
void explain_opened(struct nat_core *core, uint32_t at);
void explain_added(struct nat_core *core, uint16_t neighbour);
/* A packet is about to be sent there. */
void explain_next_hop(struct nat_core *core, uint16_t at);
void explain(struct nat_core *core, struct nat_explain *question);

/* --- trace.c ----------------------------------------------------------------------------------------- */
bool trace_command(struct nat_core *core, struct nat_trace *trace);
void trace_burst(struct nat_core *core, struct nat_packet *packets, unsigned n);
/* The decision for one packet, and its entry. */
void trace_packet(struct nat_core *core, struct nat_packet *packet);
/* A packet that was held has its verdict. */
void trace_finished(struct nat_core *core, const struct nat_packet *packet);

/* --- pipeline.c --------------------------------------------------------------------------------------- */
/* A packet of this session, whose headers are checked. */
enum nat_verdict session_packet(struct nat_core *core, struct nat_packet *packet, unsigned l2, uint32_t at,
                                int direction, bool hairpinned);

/* --- alone.c ------------------------------------------------------------------------------------------ */
/* The definition of what this NAT does with a packet. */
enum nat_verdict packet_alone(struct nat_core *core, struct nat_packet *packet);
/* One that is checked, from outside or from inside to a pool address. */
enum nat_verdict inbound(struct nat_core *core, struct nat_packet *packet, unsigned l2, bool hairpinned);

/* --- checks.c ----------------------------------------------------------------------------------------- */
/* The transport header lies within the datagram, and what of it we read or write within the first segment. Of
 * a first fragment it must all be there; what speaks of the whole datagram cannot be checked against it. */
enum nat_verdict transport_check(const struct nat_packet *packet, const uint8_t *ip, unsigned header,
                                 uint32_t total);
static inline bool is_multicast(uint32_t address)
{
    return address >> 28 == 14 || address == 0xffffffffu;
}
static inline bool is_unusable(uint32_t address)
{
    return address >> 24 == 0 || address >> 24 == 127;
}

/* --- slices.c ----------------------------------------------------------------------------------------- */
static inline bool is_one_of_several(const struct nat_core *core)
{
    return core->config.n_slices > 1 && core->config.slice != NAT_EVERY_SLICE;
}
static inline bool has_slice(const struct nat_core *core, unsigned slice)
{
    return slice == core->config.slice || !is_one_of_several(core);
}
/* Of a whole datagram or a first fragment, of which so many bytes are there; NAT_SLICE_ANY too. */
unsigned slice_of_datagram(const uint8_t *ip, uint32_t bytes, enum nat_side side, unsigned n);
/* HANDOFF; `done` are the flags of NAT_HANDOFF_*. */
enum nat_verdict hand_off(struct nat_core *core, struct nat_packet *packet, unsigned slice, unsigned done);
/* The outbound half of a hairpin is done: FORWARD, when the other half is this core's too; else HANDOFF. */
enum nat_verdict hand_off_turned(struct nat_core *core, struct nat_packet *packet, uint32_t session);
/* Goes on with what another core has begun. */
enum nat_verdict packet_handed(struct nat_core *core, struct nat_packet *packet);

/* --- ageing.c ---------------------------------------------------------------------------------------- */
bool ageing_step(struct nat_core *core);

/* --- events.c ---------------------------------------------------------------------------------------- */
bool event_room(struct nat_core *core);
/* An eighth of the ring is kept for what happens to sessions that exist. */
bool event_room_to_open(struct nat_core *core);
bool event_room_to_update(struct nat_core *core);
/* There must be room. */
void event_emit(struct nat_core *core, enum nat_event_type type, unsigned reason, uint32_t session);
bool commands_step(struct nat_core *core);
bool events_wake(struct nat_core *core);

/* --- routes.c ----------------------------------------------------------------------------------------- */
bool is_own_address(const struct nat_core *core, uint32_t address);
/* Nothing is to be said of it: it may be anybody's outside. False: perhaps, and the questions below tell. */
static inline bool is_plain(const struct nat_core *core, uint32_t address)
{
    return !(core->special[address >> 22] >> (address >> 16 & 63) & 1);
}
void addresses_in_force(struct nat_core *core);
/* Ours on this port, the pool's outside included: ARP for it is answered. */
bool is_answered_address(const struct nat_core *core, uint8_t port, uint32_t address);
bool is_on_link(const struct nat_core *core, uint8_t port, uint32_t address);
bool route_covers(const struct nat_route_config *route, uint32_t address);
/* Longest prefix first. */
void sort_routes(struct nat_config *config);
/* The best route to this address, if it leads to this side; else NAT_MAX_ROUTES. */
unsigned route_towards(struct nat_core *core, const struct nat_config *config, uint32_t address,
                       enum nat_side side);
/* Whether the best route to this address leads to this side. */
bool is_routed_to(const struct nat_core *core, uint32_t address, enum nat_side side);
/* Broadcast or network address of the route's subnet, or of any connected one. */
bool is_broadcast_of(const struct nat_route_config *route, uint32_t address);
bool is_subnet_broadcast(const struct nat_core *core, uint32_t address);

/* --- reconfigure.c ------------------------------------------------------------------------------------ */
/* Static neighbours, gateways and timeouts of a core that is being made. */
bool neighbours_configure(struct nat_core *core, const struct nat_config *config, char *error,
                          size_t error_size);
bool reconfigure_step(struct nat_core *core, struct nat_command *command);
bool reroute_step(struct nat_core *core, struct nat_command *command);

/* --- neighbour.c ------------------------------------------------------------------------------------- */
/* By address, or by MAC alone when `address` is 0. NONE16: there is none; or no room for a new one. */
uint16_t neighbour_find(const struct nat_core *core, uint8_t port, uint32_t address, const uint8_t *mac);
uint16_t neighbour_at(struct nat_core *core, uint8_t port, uint32_t address);
/* It has this MAC by the configuration. Returns whether packets had waited for it. */
bool neighbour_fix(struct nat_core *core, uint16_t at, const uint8_t *mac);
/* It is neither static nor a gateway any more. */
void neighbour_loosen(struct nat_core *core, uint16_t at);
/* Index of the next hop towards `address` on a port of `side`; NONE16 and a reason when there is none. */
uint16_t neighbour_towards(struct nat_core *core, uint32_t address, enum nat_side side,
                           enum nat_verdict *why);
/* Next hop back to where this frame came from: the sender itself when it is on the link, else the router. */
uint16_t neighbour_behind(struct nat_core *core, uint8_t port, uint32_t source, const uint8_t *mac);
enum nat_verdict neighbour_arp(struct nat_core *core, struct nat_packet *packet, unsigned l2);
/* A session goes to another next hop, or ends. */
void neighbour_leave(struct nat_core *core, uint16_t at);
void neighbour_forget(struct nat_core *core, uint16_t at);
/* The packet that asked for these was refused: those that only it needed must not fill the table. */
void neighbours_unneeded(struct nat_core *core, const uint16_t neighbour[2]);
bool neighbour_step(struct nat_core *core);
/* What the peer knows: the later confirmation counts. Returns whether it was news. */
bool neighbour_learn(struct nat_core *core, const struct nat_neighbour_record *record);
/* Next hop towards an inside host whose packets, as the peer says, come from this MAC (0: unknown). */
uint16_t neighbour_inside(struct nat_core *core, uint32_t address, uint64_t mac, enum nat_verdict *why);

/* Writes the link header, with the tag of that port, and sends the packet to its next hop, or holds it. */
enum nat_verdict neighbour_send(struct nat_core *core, struct nat_packet *packet, unsigned l2,
                                uint16_t neighbour);
/* The same, for a packet that may be longer than the MTU: then the verdict is FRAGMENT. */
enum nat_verdict neighbour_send_any(struct nat_core *core, struct nat_packet *packet, uint16_t neighbour);
/* Sends a translated packet whose session is committed on its way. */
enum nat_verdict send_committed(struct nat_core *core, struct nat_packet *packet, uint32_t session,
                                int direction);
/* Holds a packet of a session that is not committed yet. */
enum nat_verdict hold_for_session(struct nat_core *core, struct nat_packet *packet, uint32_t session,
                                  int direction);
/* Ends the waiting of a session's packets: FORWARD sends them on, anything else is their verdict. */
void hold_release(struct nat_core *core, uint32_t session, enum nat_verdict verdict);
bool hold_step(struct nat_core *core);
bool hold_waits(const struct nat_core *core);
/* The queue's own work: appends (false: no room), takes the first, and gives a taken one its verdict. */
bool hold(struct nat_core *core, const struct nat_packet *packet, uint16_t *first, uint16_t *last,
          uint32_t session, int direction);
struct held unhold(struct nat_core *core, uint16_t *first, uint16_t *last);
void finish(struct nat_core *core, struct nat_packet *packet, enum nat_verdict verdict);

/* --- link.c ------------------------------------------------------------------------------------------- */
/* Bytes before the IP header, of a frame that was accepted: it has no tag, or that of its port. */
static inline unsigned link_bytes(const uint8_t *frame)
{
    return get16(frame + 12) == ETHERTYPE_VLAN ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
}
static inline bool has_tag(const struct nat_packet *packet, uint16_t vlan)
{
    const uint8_t *tag = packet->data + ETH_BYTES;
    return packet->segment >= ETH_BYTES + VLAN_BYTES && raw16(tag - 2) == net16(ETHERTYPE_VLAN) &&
           (get16(tag) & VLAN_ID) == vlan;
}
/* The header of a frame of our own; returns its length. */
unsigned put_link(uint8_t *frame, const uint8_t *to, const struct nat_port_config *port, uint16_t ethertype);
/* The link header of `port`, which may have a tag, instead of the one of `l2` bytes. Of untagged packets to
 * untagged ports only the MACs change. */
enum nat_verdict send_tagged(struct nat_packet *packet, unsigned l2, const uint8_t *to,
                             const struct nat_port_config *port);

/* --- fragments.c ------------------------------------------------------------------------------------- */
uint32_t datagrams_capacity(const struct nat_config *config);
static inline bool is_fragment(const uint8_t *ip)
{
    return get16(ip + 6) & (IP_MF | IP_OFFSET);
}
static inline bool is_later_fragment(const uint8_t *ip)
{
    return get16(ip + 6) & IP_OFFSET;
}
/* Lengths and offsets that no honest sender makes. */
enum nat_verdict fragment_check(const uint8_t *ip);
/* A datagram from now on goes the way of its first fragment, which is about to be translated. */
struct datagram_key {
    uint32_t source, destination;
    uint16_t id;
    uint8_t protocol, from;
};
struct datagram_key datagram_key(const struct nat_packet *packet, const uint8_t *ip, bool hairpinned);
void fragment_first(struct nat_core *core, const struct datagram_key *key, uint32_t session, int direction,
                    bool is_error);
/* A first fragment that another core must translate, and then the later ones too: HANDOFF; else FORWARD. */
enum nat_verdict fragment_direct(struct nat_core *core, struct nat_packet *packet, const uint8_t *ip);
/* Translates a later fragment as its first one was, or lets it wait for that. */
enum nat_verdict fragment_later(struct nat_core *core, struct nat_packet *packet, unsigned l2, int direction,
                                bool hairpinned);
bool fragments_step(struct nat_core *core);
void fragments_flush(struct nat_core *core);

/* --- icmp.c ------------------------------------------------------------------------------------------ */
/* Turns the packet into an ICMP error about itself, back to its sender; or the drop that stands in for it. */
enum nat_verdict icmp_error(struct nat_core *core, struct nat_packet *packet, unsigned l2, uint8_t type,
                            uint8_t code, uint16_t mtu, enum nat_verdict otherwise);
enum nat_verdict icmp_echo_reply(struct nat_core *core, struct nat_packet *packet, unsigned l2);
/* Translates an ICMP error from outside or inside. */
enum nat_verdict icmp_translate_error(struct nat_core *core, struct nat_packet *packet, unsigned l2,
                                      int direction, bool hairpinned);
/* A redirect speaks of next hops that mean nothing at the other side, source quench is deprecated (RFC 6633).
 */
static inline bool icmp_is_translated(uint8_t type)
{
    return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
}
static inline bool icmp_is_query(uint8_t type)
{
    return type == ICMP_ECHO || type == ICMP_TIMESTAMP;
}
static inline bool icmp_is_query_reply(uint8_t type)
{
    return type == ICMP_ECHO_REPLY || type == ICMP_TIMESTAMP_REPLY;
}
static inline bool icmp_is_error(uint8_t type)
{
    return icmp_is_translated(type) || type == ICMP_SOURCE_QUENCH || type == ICMP_REDIRECT;
}

/* --- core.c ------------------------------------------------------------------------------------------- */
/* What is wrong with a configuration, NULL: nothing; and one in which what was left to us is filled in. */
const char *config_fault(const struct nat_config *config);
struct nat_config config_completed(const struct nat_config *config);
/* What follows from the configuration in force. */
void config_in_force(struct nat_core *core);
static inline void count_tx(struct nat_core *core, const struct nat_packet *packet)
{
    core->stats.tx_packets[packet->port]++;
    core->stats.tx_bytes[packet->port] += packet->length;
}

/* By the frames that go out: one packet may leave as several. */
void count_pieces(struct nat_core *core, const struct nat_packet *packet);

static inline void count_verdict(struct nat_core *core, struct nat_packet *packet, enum nat_verdict verdict)
{
    packet->verdict = (uint8_t)verdict;
    core->stats.verdicts[verdict]++;
    if (verdict <= NAT_REPLY)
        count_tx(core, packet);
    else if (verdict == NAT_FRAGMENT)
        count_pieces(core, packet);
}

static inline void core_time(struct nat_core *core, uint64_t now)
{
    if (now < core->now_ns)
        return; /* idle times are differences: one step back would end every session */
    core->now_ns = now;
    core->now_ms = (uint32_t)(now / 1000000);
}

#endif
