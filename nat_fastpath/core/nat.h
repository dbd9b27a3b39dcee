/* SPDX-License-Identifier: Apache-2.0
 *
 * The waist: everything that crosses the border of the NAT core. Drivers (DPDK worker, pcap driver, switch
 * agent) and Python know this header and nothing behind it.
 *
 * Conventions: IPv4 addresses and ports are host-order integers everywhere but in packet bytes. `now` is
 * always an argument, in nanoseconds of any monotonic clock. A core has no globals and one owner: the thread
 * that calls it. The two rings (commands in, events out) are the only things another thread may touch.
 */
#ifndef NAT_H
#define NAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "role.h"

#define NAT_BURST 32u          /* packets handled together; a caller may pass any number */
#define NAT_MAX_PORTS 8u       /* interfaces of one core */
#define NAT_MAX_ROUTES 64u     /* per core, connected ones included */
#define NAT_MAX_RANGES 64u     /* address ranges of the pool */
#define NAT_MAX_PORT_SPANS 16u /* and of its ports */
#define NAT_OUTBOX 256u        /* frames the core may have waiting to be sent on its own behalf */
#define NAT_OUTBOX_BYTES 128u

enum nat_side { NAT_INTERNAL = 0, NAT_EXTERNAL = 1 };
enum nat_mapping_mode { NAT_MAPPING_ENDPOINT_INDEPENDENT = 0, NAT_MAPPING_ENDPOINT_DEPENDENT = 1 };
enum nat_filtering {
    NAT_FILTER_ADDRESS_AND_PORT = 0,
    NAT_FILTER_ADDRESS = 1,
    NAT_FILTER_ENDPOINT_INDEPENDENT = 2,
};

enum nat_flow_hash { NAT_HASH_FNV = 0, NAT_HASH_AES = 1 };

/* What became of a packet. Every verdict has a counter, so no packet can vanish unnamed. HANDOFF and HELD are
 * not its last: another one follows, of the other core or of nat_take. */
#define NAT_VERDICTS(V)                                                                                      \
    V(FORWARD, "forward", "translated and sent on")                                                          \
    V(REPLY, "reply", "answered by the NAT itself; the frame now holds the answer")                          \
    V(FRAGMENT, "fragment", "translated, and sent on in fragments that fit the outgoing MTU")                \
    V(HANDOFF, "handoff", "given to the core that has its slice, where it gets its other verdict")           \
    V(HELD, "held", "kept: for its next hop, for its session's commit, or for its first fragment")           \
    V(CONSUMED, "consumed", "understood and finished, such as an ARP reply")                                 \
    V(DROP_RUNT, "drop_runt", "shorter than its headers say it must be")                                     \
    V(DROP_NOT_FOR_US, "drop_not_for_us", "the destination MAC is not ours")                                 \
    V(DROP_MULTICAST, "drop_multicast", "multicast or broadcast is not translated")                          \
    V(DROP_IPV6, "drop_ipv6", "IPv6 is not translated by a NAT44")                                           \
    V(DROP_ETHERTYPE, "drop_ethertype", "neither IPv4 nor ARP")                                              \
    V(DROP_VLAN, "drop_vlan", "not the VLAN tag of this port")                                               \
    V(DROP_ARP, "drop_arp", "ARP that is malformed or not for us")                                           \
    V(DROP_IP_HEADER, "drop_ip_header", "IP version, header length or total length is wrong")                \
    V(DROP_IP_CHECKSUM, "drop_ip_checksum", "IP header checksum is wrong")                                   \
    V(DROP_ADDRESS, "drop_address", "source or destination address that may not be forwarded")               \
    V(DROP_FRAGMENT, "drop_fragment", "fragment whose first one did not come, or too many that wait for it") \
    V(DROP_FRAGMENT_SHAPE, "drop_fragment_shape",                                                            \
      "fragment that cuts or overlaps a transport header (RFC 1858), or of an impossible length")            \
    V(DROP_PROTOCOL, "drop_protocol", "IP protocol other than UDP, TCP and ICMP")                            \
    V(DROP_L4_HEADER, "drop_l4_header", "UDP, TCP or ICMP header with a wrong length or offset")             \
    V(DROP_ICMP_CHECKSUM, "drop_icmp_checksum", "ICMP checksum is wrong")                                    \
    V(DROP_ICMP_TYPE, "drop_icmp_type", "ICMP message that a NAT does not translate")                        \
    V(DROP_ICMP_EMBEDDED, "drop_icmp_embedded", "ICMP error quoting a broken packet")                        \
    V(DROP_ICMP_NO_SESSION, "drop_icmp_no_session", "ICMP error about a session that does not exist")        \
    V(DROP_TTL, "drop_ttl", "time to live used up, and no time exceeded was due")                            \
    V(DROP_TOO_BIG, "drop_too_big", "larger than the outgoing MTU and may not be fragmented")                \
    V(DROP_NO_MAPPING, "drop_no_mapping", "from outside, to a pool port that is mapped to nobody")           \
    V(DROP_FILTERED, "drop_filtered", "from outside, to a mapping that does not admit this sender")          \
    V(DROP_NOT_POOL, "drop_not_pool", "from outside, to an address that is not ours")                        \
    V(DROP_TCP_NOT_SYN, "drop_tcp_not_syn", "TCP without a session, and not the start of one")               \
    V(DROP_NO_PORT, "drop_no_port", "no free external port in the pool")                                     \
    V(DROP_TABLE_FULL, "drop_table_full", "session, mapping, host or index table is full")                   \
    V(DROP_QUOTA, "drop_quota", "the inside host is at its limit")                                           \
    V(DROP_BUDGET, "drop_budget", "more new sessions per second than configured")                            \
    V(DROP_EVENTS_FULL, "drop_events_full", "the control loop does not keep up with new sessions")           \
    V(DROP_NO_ROUTE, "drop_no_route", "no route to the destination")                                         \
    V(DROP_HOLD_LIMIT, "drop_hold_limit", "too many packets held already")                                   \
    V(DROP_UNREACHABLE, "drop_unreachable", "held, and the next hop did not answer ARP")                     \
    V(DROP_HOLD_TIMEOUT, "drop_hold_timeout", "held, and the peer did not acknowledge the session in time")  \
    V(DROP_SESSION_GONE, "drop_session_gone", "held, and its session ended meanwhile")                       \
    V(DROP_LOCAL, "drop_local", "to one of our own addresses, and not for a service that we offer")          \
    V(DROP_OUTBOX, "drop_outbox", "the answer found no room to be sent")                                     \
    V(DROP_STANDBY, "drop_standby", "this server stands by, and the other one carries")

#define NAT_VERDICT_ENUM(name, text, help) NAT_##name,
enum nat_verdict { NAT_VERDICTS(NAT_VERDICT_ENUM) NAT_VERDICT_COUNT };
#undef NAT_VERDICT_ENUM

/* Counters that are no verdicts. */
#define NAT_GAUGES(G)                                                                                        \
    G(sessions, "sessions that exist")                                                                       \
    G(mappings, "mappings that exist")                                                                       \
    G(hosts, "inside hosts that have a session")                                                             \
    G(neighbours, "next hops that are known or being resolved")                                              \
    G(ports_resting, "freed external ports that rest before they are used again")                            \
    G(held, "packets held now")                                                                              \
    G(datagrams, "datagrams whose fragments are told apart now")                                             \
    G(events, "events waiting to be read")
#define NAT_COUNTERS(C)                                                                                      \
    C(sessions_opened, "sessions opened")                                                                    \
    C(sessions_closed, "sessions closed")                                                                    \
    C(sessions_installed, "sessions installed by command")                                                   \
    C(mappings_opened, "mappings opened")                                                                    \
    C(mappings_closed, "mappings closed")                                                                    \
    C(unpaired, "mappings on another address than their host's, because that was exhausted")                 \
    C(parity_missed, "mappings on a port of the other parity, because none of the right one was free")       \
    C(class_missed, "mappings on a port of the other class (0-1023, or above), for the same reason")         \
    C(no_port_resting, "packets refused for want of a port while ports were resting")                        \
    C(rests_cut, "ports that rested for less than their time, because no more may rest at once")             \
    C(index_steps, "buckets that insertions into the indexes looked at")                                     \
    C(icmp_errors_translated, "ICMP errors translated")                                                      \
    C(icmp_errors_sent, "ICMP errors of our own")                                                            \
    C(icmp_errors_limited, "ICMP errors of our own not sent because of the rate limit")                      \
    C(arp_requests_sent, "ARP requests sent")                                                                \
    C(arp_replies_sent, "ARP replies sent")                                                                  \
    C(echo_replies_sent, "pings to our own addresses answered")                                              \
    C(hairpinned, "packets from an inside host to another one's external endpoint")                          \
    C(commands, "commands carried out")

struct nat_stats {
    uint64_t verdicts[NAT_VERDICT_COUNT];
    uint64_t rx_packets[NAT_MAX_PORTS], rx_bytes[NAT_MAX_PORTS];
    uint64_t tx_packets[NAT_MAX_PORTS], tx_bytes[NAT_MAX_PORTS];
#define NAT_COUNTER_FIELD(name, help) uint64_t name;
    NAT_COUNTERS(NAT_COUNTER_FIELD)
    NAT_GAUGES(NAT_COUNTER_FIELD)
#undef NAT_COUNTER_FIELD
};

/* Of several cores (slices.h) each has a slice of the inside hosts and of the external ports. A packet that
 * another core has to go on with has the verdict HANDOFF, and these bits say whose it is and what is done;
 * the driver gives it to that core's nat_handed with them. */
#define NAT_HANDOFF_SLICE 0x1fu
#define NAT_HANDOFF_DIRECTED 0x20u /* a fragment, by where its first one went */
#define NAT_HANDOFF_TURNED 0x40u   /* a hairpin: its outbound half is done */
#define NAT_HANDOFF_COPY 0x80u     /* an ARP frame that another core has; to learn from, and nothing else */

/* A packet on its way through the core. The driver owns the bytes; `cookie` is the driver's own. `data` moves
 * where a VLAN tag is put in front (without headroom for it: DROP_VLAN) or taken away. */
struct nat_packet {
    uint8_t *data;     /* Ethernet header; the first `contiguous` bytes are at data */
    uint32_t length;   /* of the whole frame */
    uint32_t segment;  /* bytes readable at data; equals length unless the driver chains buffers */
    uint16_t capacity; /* bytes writable at data, for answers that are longer than the question */
    uint8_t headroom;  /* bytes writable before data, for a VLAN tag: 251 at most; with capacity below 2^16 */
    uint8_t handoff;   /* out: for HANDOFF, NAT_HANDOFF_*; in: the same, for nat_handed */
    uint8_t port;      /* in: where it came from; out: where it goes, for FORWARD, FRAGMENT and REPLY */
    uint8_t verdict;   /* out: enum nat_verdict */
    uint16_t mtu;      /* out: for FRAGMENT, what nat_cut is to be told */
    void *cookie;
};

/* One session as the rest of the system sees it: the wire record of the sync protocol, the row of
 * `show sessions`, the body of an event. Little-endian, fixed offsets, no padding. */
#define NAT_RECORD_FIELDS(F)                                                                                 \
    F(uint64_t, id)          /* identity; see nat_id */                                                      \
    F(uint64_t, mapping_id)  /* 0 when the session is its own mapping (endpoint-dependent) */                \
    F(uint64_t, packets_out) /* internal to external */                                                      \
    F(uint64_t, packets_in)                                                                                  \
    F(uint64_t, bytes_out) /* IP bytes */                                                                    \
    F(uint64_t, bytes_in)                                                                                    \
    F(uint64_t, internal_mac) /* next hop towards the inside: the 48 bits of its MAC, 0 unknown */           \
    F(uint32_t, internal_addr)                                                                               \
    F(uint32_t, external_addr)                                                                               \
    F(uint32_t, remote_addr)                                                                                 \
    F(uint32_t, age_ms)        /* since it was opened: ages travel, clocks do not */                         \
    F(uint32_t, idle_ms)       /* since its last packet */                                                   \
    F(uint32_t, timeout_ms)    /* that applies in its present state */                                       \
    F(uint16_t, internal_port) /* ICMP: query identifier */                                                  \
    F(uint16_t, external_port)                                                                               \
    F(uint16_t, remote_port) /* ICMP: 0 */                                                                   \
    F(uint8_t, protocol)                                                                                     \
    F(uint8_t, tcp_state)   /* enum nat_tcp_state; 0 for UDP and ICMP */                                     \
    F(uint8_t, flags)       /* NAT_SESSION_* */                                                              \
    F(uint8_t, internal_if) /* port index towards the inside */                                              \
    F(uint8_t, external_if)                                                                                  \
    F(uint8_t, reserved0)                                                                                    \
    F(uint32_t, reserved1)

#define NAT_STRUCT_FIELD(type, name) type name;
struct nat_record {
    NAT_RECORD_FIELDS(NAT_STRUCT_FIELD)
} __attribute__((packed));

enum nat_session_flag {
    NAT_SESSION_PENDING = 1, /* opened here, not yet committed: its packets are held */
    NAT_SESSION_FOREIGN = 2, /* owned by the peer: not aged here */
    NAT_SESSION_INBOUND = 4, /* opened by a packet from outside */
    NAT_SESSION_OFFLOAD = 8, /* of an update: what a switch has carried beside us */
    NAT_SESSION_DYING = 16,  /* delete when the event ring has room */
    /* Of a record to be installed: one of the same 5-tuple ends for it, and new sessions of its inside
     * endpoint use its external one. Never of a session. */
    NAT_SESSION_PREVAILS = 32,
};

enum nat_tcp_state {
    NAT_TCP_NONE = 0,
    NAT_TCP_SYN_OUT,  /* SYN from inside seen */
    NAT_TCP_SYN_IN,   /* SYN from outside seen */
    NAT_TCP_SYN_BOTH, /* SYNs of both sides seen, the last ACK is due */
    NAT_TCP_ESTABLISHED,
    NAT_TCP_FIN_OUT, /* inside has finished sending */
    NAT_TCP_FIN_IN,
    NAT_TCP_CLOSING, /* both have */
    NAT_TCP_RESET,
    NAT_TCP_STATES
};

/* An UPDATE may be left out when the ring is full; an OPEN or a CLOSE never is. */
enum nat_event_type {
    NAT_EVENT_OPEN = 1, /* session opened */
    NAT_EVENT_CLOSE,    /* session ended; reason says why */
    NAT_EVENT_UPDATE,   /* TCP state or the next hop inside changed */
};
enum nat_close_reason { NAT_CLOSE_IDLE = 1, NAT_CLOSE_COMMAND, NAT_CLOSE_HOLD_TIMEOUT };

#define NAT_EVENT_FIELDS(F)                                                                                  \
    F(uint64_t, sequence) /* counts up by one, without a gap */                                              \
    F(uint64_t, time_ns)  /* `now` of the packet or tick that caused it */                                   \
    F(uint8_t, type)      /* enum nat_event_type */                                                          \
    F(uint8_t, reason)    /* enum nat_close_reason */                                                        \
    F(uint16_t, reserved2)                                                                                   \
    F(uint32_t, reserved3)
struct nat_event {
    NAT_EVENT_FIELDS(NAT_STRUCT_FIELD)
    struct nat_record session;
} __attribute__((packed));
#undef NAT_STRUCT_FIELD

/* Identity of a session or mapping, also its OpenFlow cookie:
 * direction 1 | class 3 | instance 8 | start epoch 20 | counter 32, from the highest bit down. The counters
 * of n cores go in steps of n. */
enum nat_id_class { NAT_ID_SESSION = 1, NAT_ID_MAPPING = 2 };
static inline uint64_t nat_id(unsigned cls, unsigned instance, unsigned epoch, uint32_t counter)
{
    return (uint64_t)(cls & 7u) << 60 | (uint64_t)(instance & 0xffu) << 52 |
           (uint64_t)(epoch & 0xfffffu) << 32 | counter;
}

static inline unsigned nat_id_instance(uint64_t id)
{
    return (unsigned)(id >> 52) & 0xffu;
}

struct nat_port_config {
    uint8_t side; /* enum nat_side */
    uint8_t mac[6];
    uint8_t reserved;
    uint32_t address; /* 0: none */
    uint16_t mtu;     /* IP bytes */
    uint16_t vlan;    /* 0: untagged */
};

struct nat_route_config {
    uint32_t prefix;
    uint8_t length;
    uint8_t port;
    uint8_t connected; /* the destination itself is the next hop */
    uint8_t has_mac;   /* `mac` of the gateway stands in the configuration */
    uint8_t mac[6];
    uint8_t reserved[2];
    uint32_t gateway;
};

/* Static neighbour. */
struct nat_neighbour_config {
    uint32_t address;
    uint8_t port;
    uint8_t mac[6];
    uint8_t reserved;
};

/* External addresses. Both instances of a pair know all ports; each opens mappings only on its own. */
struct nat_pool_range {
    uint32_t first, last;           /* addresses, inclusive */
    uint16_t port_first, port_last; /* ports that are ours or the peer's, inclusive */
    uint16_t own_first, own_last;   /* ports that this core may hand out */
};

struct nat_port_span {
    uint16_t first, last; /* inclusive */
};

struct nat_config {
    uint32_t abi; /* NAT_ABI */
    uint8_t instance;
    uint8_t mapping;   /* enum nat_mapping_mode */
    uint8_t filtering; /* enum nat_filtering */
    uint8_t n_ports;
    uint8_t synchronous;       /* a new session is pending until committed */
    uint8_t port_preservation; /* the inside port, where it is free */
    uint8_t port_parity;       /* even for even (UDP) */
    uint8_t flow_hash;         /* enum nat_flow_hash */
    uint8_t n_slices;          /* cores that share hosts and ports (slices.h); 0: this one has all */
    uint8_t slice;             /* this core's, or NAT_EVERY_SLICE: each host gets a port of its own slice */
    uint32_t epoch;
    uint32_t max_sessions;
    uint32_t max_mappings; /* 0: max_sessions */
    uint32_t max_hosts;    /* 0: from max_sessions */
    uint32_t max_neighbours;
    uint32_t max_held;
    uint32_t event_ring;         /* entries, a power of two */
    uint32_t sessions_per_host;  /* 0: no limit */
    uint32_t mappings_per_host;  /* 0: no limit */
    uint32_t new_sessions_rate;  /* per second; 0: no limit */
    uint32_t new_sessions_burst; /* depth of the token bucket */
    uint32_t icmp_rate;          /* ICMP errors of our own per second */
    uint32_t hold_ms;            /* a packet is held no longer */
    uint32_t timeout_udp_ms, timeout_tcp_established_ms, timeout_tcp_transitory_ms, timeout_icmp_ms;
    uint32_t quarantine_ms;                              /* a freed external port rests so long */
    uint32_t quarantine_ports;                           /* so many at once at most; 0: all */
    uint8_t n_port_spans;                                /* 0: all of each range's own ports are handed out */
    struct nat_port_span port_spans[NAT_MAX_PORT_SPANS]; /* ascending: only these of them */
    uint64_t seed; /* for tests, which need the same choices again; 0 takes keys from the system */
    uint8_t n_pool, n_routes;
    uint16_t n_neighbours;
    struct nat_port_config ports[NAT_MAX_PORTS];
    struct nat_route_config routes[NAT_MAX_ROUTES];
    struct nat_pool_range pool[NAT_MAX_RANGES];
    const struct nat_neighbour_config *neighbours;
    struct nat_role *role; /* NULL: it always carries. Kept as long as the core, and by a reload */
};
#define NAT_EVERY_SLICE 0xffu
#define NAT_ABI 1u

/* What the tables take, in bytes. */
struct nat_memory {
    uint64_t sessions, index, mappings, hosts, pool, other, total;
};

/* A command to the owner of the core. `result` is valid once `done` is non-zero. */
enum nat_command_op {
    NAT_CMD_SESSIONS = 1, /* gather records of slots [cursor, …) into buffer; cursor moves on, 0 at the end */
    NAT_CMD_INSTALL,      /* install the `count` records at buffer; result: how many are held now. One that
                             was held under its id already only takes the record's ownership. One that has
                             NAT_SESSION_PREVAILS ends another of its 5-tuple */
    NAT_CMD_DELETE,       /* delete the sessions of the `count` records at buffer, by 5-tuple and id */
    NAT_CMD_COMMIT,       /* commit the sessions of the `count` records at buffer: their packets may leave */
    NAT_CMD_FIND,         /* buffer: one record with its 5-tuple filled in; filled whole if it exists */
    NAT_CMD_NEIGHBOURS,   /* gather nat_neighbour_record */
    NAT_CMD_HOSTS,        /* gather nat_host_record */
    NAT_CMD_ADOPT,        /* the peer's sessions become ours, and their timers restart; result: how many */
    NAT_CMD_CEDE, /* buffer: an instance number, then ids in order, all uint64. Sessions with this instance in
                     their id become the peer's, but those of these ids ours; result: how many became the
                     peer's */
    NAT_CMD_UPDATE,  /* TCP state, idle time and counters of the sessions of the records at buffer; with
                        NAT_SESSION_OFFLOAD what a switch has carried, which is added */
    NAT_CMD_CHECK,   /* sets reserved0 to 1 in those records at buffer whose sessions are held */
    NAT_CMD_LEARN,   /* the nat_neighbour_records at buffer are what the peer knows; result: how many were
                        news. A mac of 0 asks for that next hop */
    NAT_CMD_EXPLAIN, /* buffer: one struct nat_explain */
    NAT_CMD_TRACE,   /* buffer: one struct nat_trace; result: 1, or 0 when the trace is another's or none */
    NAT_CMD_RECONFIGURE, /* buffer: a struct nat_change *; result: 1, or 0 when it is refused */
    NAT_CMD_REROUTE,     /* buffer: the same, after it was put in force: up to `count` sessions from cursor on
                            go the new ways; result: how many had another one. cursor moves on, 0 at the end */
};
struct nat_command {
    uint32_t op;
    uint32_t count; /* entries that fit, or that there are, in buffer */
    uint64_t cursor;
    void *buffer;
    uint32_t result; /* entries written or handled */
    uint32_t done;   /* set last, with release order */
};

#define NAT_NEIGHBOUR_FIELDS(F)                                                                              \
    F(uint64_t, mac)                                                                                         \
    F(uint32_t, address) /* 0: known by its MAC only */                                                      \
    F(uint32_t, sessions)                                                                                    \
    F(uint32_t, confirmed_ms) /* since it was last confirmed */                                              \
    F(uint8_t, port)                                                                                         \
    F(uint8_t, state)                                                                                        \
    F(uint16_t, held)
#define NAT_HOST_FIELDS(F)                                                                                   \
    F(uint32_t, address)                                                                                     \
    F(uint32_t, external_addr)                                                                               \
    F(uint32_t, sessions)                                                                                    \
    F(uint32_t, mappings)                                                                                    \
    F(uint64_t, refused)
#define NAT_STRUCT_FIELD(type, name) type name;
struct nat_neighbour_record {
    NAT_NEIGHBOUR_FIELDS(NAT_STRUCT_FIELD)
} __attribute__((packed));
struct nat_host_record {
    NAT_HOST_FIELDS(NAT_STRUCT_FIELD)
} __attribute__((packed));
#undef NAT_STRUCT_FIELD

/* One thing that was looked at on a packet's way. What the values mean, each kind says by itself. */
#define NAT_STEPS(S)                                                                                         \
    S(SESSION, "session") /* found: id; value idle and limit timeout in ms; port TCP state; flag flags */    \
    S(NO_SESSION, "no_session")                                                                              \
    S(ADDRESS, "address")   /* address may not be forwarded from or to; flag: enum nat_address_fault */      \
    S(ROUTE, "route")       /* address/value by gateway id through port; flag: it leads to the right side */ \
    S(NO_ROUTE, "no_route") /* to address */                                                                 \
    S(NEXT_HOP, "next_hop") /* address (0: by MAC alone), id MAC, port, flag state, value packets held */    \
    S(HAIRPIN, "hairpin")   /* address: of the pool, reached from inside */                                  \
    S(HOST, "host")         /* address: value of limit sessions, high half of id of its low half mappings */ \
    S(QUOTA, "quota")       /* the host is at its limit */                                                   \
    S(BUDGET, "budget")     /* limit new sessions per second; value are left now; flag: one is */            \
    S(TABLES, "tables")     /* value of limit sessions exist */                                              \
    S(MAPPING, "mapping")   /* of this inside endpoint: address:port outside, value sessions hang on it */   \
    S(NO_MAPPING, "no_mapping")                                                                              \
    S(PORT, "port")         /* address:port is taken; value are left, limit rest; flag: POOL_*_MISSED */     \
    S(NO_PORT, "no_port")   /* none is free; limit rest */                                                   \
    S(SLOT, "slot")         /* address:port outside belongs to id (address << 16 | port); flag: nat_slot */  \
    S(FILTER, "filter")     /* address asks; flag: it is admitted; value: enum nat_filtering */              \
    S(TCP, "tcp")           /* state value becomes limit */                                                  \
    S(MTU, "mtu")           /* value bytes are more than limit; flag: it must not be cut */                  \
    S(PENDING, "pending")   /* the peer has not acknowledged the session */                                  \
    S(QUOTED, "quoted")     /* an ICMP error about the session id */                                         \
    S(FRAGMENT, "fragment") /* a later one; flag: its first was seen */                                      \
    S(HANDOFF, "handoff")   /* to the core of slice value; flag: NAT_HANDOFF_* */
#define NAT_STEP_ENUM(name, text) NAT_STEP_##name,
enum nat_step_kind { NAT_STEPS(NAT_STEP_ENUM) NAT_STEP_KINDS };
#undef NAT_STEP_ENUM
enum nat_address_fault {
    NAT_ADDRESS_GOOD,
    NAT_ADDRESS_UNUSABLE,
    NAT_ADDRESS_MULTICAST,
    NAT_ADDRESS_OWN,
    NAT_ADDRESS_POOL,
    NAT_ADDRESS_BROADCAST,
};
enum nat_slot { NAT_SLOT_FREE, NAT_SLOT_RESTING, NAT_SLOT_TAKEN, NAT_SLOT_NONE };
#define NAT_STEP_FIELDS(F)                                                                                   \
    F(uint64_t, id)                                                                                          \
    F(uint32_t, address)                                                                                     \
    F(uint32_t, value)                                                                                       \
    F(uint32_t, limit)                                                                                       \
    F(uint16_t, port)                                                                                        \
    F(uint8_t, kind)                                                                                         \
    F(uint8_t, flag)
#define NAT_STRUCT_FIELD(type, name) type name;
struct nat_step {
    NAT_STEP_FIELDS(NAT_STRUCT_FIELD)
} __attribute__((packed));
/* A packet that is not sent: it goes its way, and then all that it has changed is undone. */
#define NAT_EXPLAIN_STEPS 24u
#define NAT_EXPLAIN_BYTES 2048u
struct nat_explain {
    uint32_t length; /* of the frame, which may be longer than what is here of it; out: of the answer */
    uint16_t mtu;
    uint8_t port, verdict; /* port: in, where it comes from; out, where it would go */
    uint16_t n_steps;
    uint8_t handoff; /* in and out, as that of nat_packet: each core explains its part */
    uint8_t reserved;
    struct nat_step steps[NAT_EXPLAIN_STEPS];
    uint8_t room[4];                  /* for a VLAN tag in front of the frame */
    uint8_t frame[NAT_EXPLAIN_BYTES]; /* out: as it would leave */
} __attribute__((packed));

/* A packet of a flow under trace. Addresses are those of its IP header, as it came and as it left. */
#define NAT_TRACE_FIELDS(F)                                                                                  \
    F(uint64_t, time_ns)                                                                                     \
    F(uint64_t, session)      /* id, 0: none */                                                              \
    F(uint64_t, next_hop_mac) /* 0: it did not leave */                                                      \
    F(uint32_t, source)                                                                                      \
    F(uint32_t, destination)                                                                                 \
    F(uint32_t, source_after)                                                                                \
    F(uint32_t, destination_after)                                                                           \
    F(uint32_t, length) /* of the frame, as it came */                                                       \
    F(uint16_t, source_port)                                                                                 \
    F(uint16_t, destination_port)                                                                            \
    F(uint16_t, source_port_after)                                                                           \
    F(uint16_t, destination_port_after)                                                                      \
    F(uint8_t, protocol)                                                                                     \
    F(uint8_t, verdict)                                                                                      \
    F(uint8_t, port)                                                                                         \
    F(uint8_t, port_after)                                                                                   \
    F(uint8_t, tcp_flags)                                                                                    \
    F(uint8_t, tcp_state) /* of the session, afterwards */                                                   \
    F(uint8_t, ttl)                                                                                          \
    F(uint8_t, was_held) /* it was held before; only what it is now is known */
struct nat_trace_entry {
    NAT_TRACE_FIELDS(NAT_STRUCT_FIELD)
} __attribute__((packed));
/* One trace at a time. A filter's 0 means any. Its token is the trace's: who does not know it cannot read it.
 */
enum nat_trace_action { NAT_TRACE_START = 1, NAT_TRACE_READ, NAT_TRACE_STOP };
#define NAT_TRACE_RING 256u
#define NAT_TRACE_FILTER_FIELDS(F)                                                                           \
    F(uint32_t, token) /* START: out, if there is one already too; else in */                                \
    F(uint32_t, packets)                                                                                     \
    F(uint32_t, milliseconds)                                                                                \
    F(uint32_t, internal_addr)                                                                               \
    F(uint32_t, external_addr)                                                                               \
    F(uint32_t, remote_addr)                                                                                 \
    F(uint16_t, internal_port)                                                                               \
    F(uint16_t, external_port)                                                                               \
    F(uint16_t, remote_port)                                                                                 \
    F(uint8_t, protocol)                                                                                     \
    F(uint8_t, action)  /* enum nat_trace_action */                                                          \
    F(uint8_t, running) /* out */                                                                            \
    F(uint8_t, reserved4)                                                                                    \
    F(uint16_t, reserved5)                                                                                   \
    F(uint32_t, missed)    /* out: found no room, because nobody read */                                     \
    F(uint32_t, n_entries) /* out */
struct nat_trace {
    NAT_TRACE_FILTER_FIELDS(NAT_STRUCT_FIELD)
    struct nat_trace_entry entries[NAT_TRACE_RING];
} __attribute__((packed));
#undef NAT_STRUCT_FIELD
enum nat_neighbour_state { NAT_NB_FREE, NAT_NB_INCOMPLETE, NAT_NB_REACHABLE, NAT_NB_PROBE, NAT_NB_STATIC };

struct nat_core;

/* Returns NULL and a line in `error` when memory or the configuration do not allow it. */
struct nat_core *nat_create(const struct nat_config *config, char *error, size_t error_size);
void nat_destroy(struct nat_core *core);
/* What nat_create would take, without taking it. */
void nat_memory_for(const struct nat_config *config, struct nat_memory *out);

/* Another configuration for a core that runs. Any thread but the owner checks it and takes all memory for it
 * (NULL and a line in `error` when it is impossible); NAT_CMD_RECONFIGURE puts it in force, whole or not at
 * all; then it is freed, with what it replaced. Ports (but for their MTU), tables and modes stay as they are:
 * epoch and seed are the core's. One change at a time. */
struct nat_change *nat_prepare(const struct nat_core *core, const struct nat_config *config, char *error,
                               size_t error_size);
void nat_change_free(struct nat_change *change);
/* By who has waited for the owner in vain: true when it has not begun, and will not do so any more. */
bool nat_change_withdraw(struct nat_change *change);
/* Whether the owner has begun and not ended: until then there must be no other one. */
bool nat_change_is_under_way(const struct nat_change *change);
/* Why the owner has refused it. */
const char *nat_change_refused(const struct nat_change *change);
/* Mappings on an address of the pool, about now; from the thread that prepares. */
uint32_t nat_mappings_on(const struct nat_core *core, uint32_t address);

/* The packet's way. Every packet gets a verdict; HELD ones belong to the core until nat_take returns them. */
void nat_burst(struct nat_core *core, struct nat_packet *packets, unsigned n, uint64_t now);
/* Whose packet a frame from a wire is, of `n` cores: a slice, or one of these. No session is asked: it says
 * the same whoever asks. */
#define NAT_SLICE_ANY 0xffu /* who receives it does what is to be done */
#define NAT_SLICE_ALL 0xfeu /* likewise, and all others get a copy (NAT_HANDOFF_COPY) */
unsigned nat_slice_of(const uint8_t *frame, uint32_t bytes, enum nat_side side, unsigned n);
/* As nat_burst, for packets that another core had from a wire and has counted. */
void nat_handed(struct nat_core *core, struct nat_packet *packets, unsigned n, uint64_t now);
/* Work between bursts: commands, ageing, neighbours, held packets' deadlines; each bounded. Returns whether
 * it found anything to do. */
bool nat_poll(struct nat_core *core, uint64_t now);
/* Packets that were held and now have a final verdict; returns how many were written. */
unsigned nat_take(struct nat_core *core, struct nat_packet *out, unsigned max);
/* Sweeps the whole session table at once. For captures and tests: a worker relies on nat_poll's small steps.
 */
void nat_settle(struct nat_core *core, uint64_t now);
/* Frames of the core's own (ARP): copies one into `frame` (NAT_OUTBOX_BYTES), returns its length, 0 if none.
 */
unsigned nat_outbox(struct nat_core *core, uint8_t *frame, uint8_t *port);
/* Announces our addresses (gratuitous ARP) through the outbox; of several cores the first does. */
void nat_announce(struct nat_core *core);
/* One fragment of a frame whose verdict is FRAGMENT: its headers, and where its data lies in the frame.
 * Headers are within the first segment; the data may be anywhere, and the driver copies it. */
#define NAT_HEADERS_BYTES 78u /* Ethernet, one tag, IPv4 with all options */
struct nat_piece {
    uint32_t at, bytes; /* of the frame */
    uint32_t header_bytes;
    uint8_t header[NAT_HEADERS_BYTES];
};
/* Makes the first piece from one of zeros, then each following one; false when there are no more. `mtu` is
 * that of the packet or less. */
bool nat_cut(const uint8_t *frame, uint16_t mtu, struct nat_piece *piece);
/* All sessions handed back, at the end: held packets become DROP_SESSION_GONE and can be taken. */
void nat_flush(struct nat_core *core);

/* Carries a command out at once, for the thread that owns the core. A DELETE ends early, with a cursor that
 * says where, when the event ring is full. */
void nat_command_now(struct nat_core *core, struct nat_command *command);

/* From any one other thread. */
bool nat_command_push(struct nat_core *core, struct nat_command *command);
/* The reader of events is about to sleep and wants to be woken by the next one; false: there are some
 * already. */
bool nat_events_sleep(struct nat_core *core);
unsigned nat_events(struct nat_core *core, struct nat_event *out, unsigned max);
/* The gauges in it are brought up to date by this call. */
const struct nat_stats *nat_stats(struct nat_core *core);

/* How native code outside the engine reaches the core, which is compiled exactly once. */
struct nat_api {
    uint32_t size;
    uint32_t abi;
    uint64_t header_hash; /* of this file; a worker built against another one is refused */
    void (*burst)(struct nat_core *, struct nat_packet *, unsigned, uint64_t);
    unsigned (*slice_of)(const uint8_t *, uint32_t, enum nat_side, unsigned);
    void (*handed)(struct nat_core *, struct nat_packet *, unsigned, uint64_t);
    bool (*poll)(struct nat_core *, uint64_t);
    unsigned (*take)(struct nat_core *, struct nat_packet *, unsigned);
    unsigned (*outbox)(struct nat_core *, uint8_t *, uint8_t *);
    bool (*cut)(const uint8_t *, uint16_t, struct nat_piece *);
    void (*announce)(struct nat_core *);
    void (*flush)(struct nat_core *);
    /* For the driver, after a burst or a poll: whether a reader of events that sleeps has some. True once. */
    bool (*wake)(struct nat_core *);
    /* Whether packets wait for what may be told at any moment: that the peer has their session. */
    bool (*waits)(const struct nat_core *);
};
extern const struct nat_api nat_api;

#endif
