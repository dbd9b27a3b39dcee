/* SPDX-License-Identifier: Apache-2.0
 *
 * What must hold of every packet, whatever was sent. Both fuzzers send through `check_burst`; a broken rule
 * aborts with a line that names it.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "nat.h"
#include "wire.h"

#define MAX_FRAMES 48u
#define ANSWER_ROOM 600u

#define REQUIRE(condition, what)                                                                             \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "rule broken: %s (%s:%d)\n", what, __FILE__, __LINE__);                          \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

static const uint8_t port_mac[2][6] = {{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}};
static const uint8_t peer_mac[2][6] = {{2, 0, 0xa, 0, 0, 5}, {2, 0, 0, 0, 1, 0xfe}};
#define INSIDE_NET 0x0a000000u  /* 10.0.0.0/24 */
#define OUTSIDE_NET 0xc6336400u /* 198.51.100.0/24 */
#define POOL_FIRST (OUTSIDE_NET + 10)
#define POOL_LAST (OUTSIDE_NET + 11)
#define PORT_FIRST 2000u
#define PORTS 32u
#define HEADROOM 4u

/* The tag of each port, 0: none; of the core of this run. */
static uint16_t port_vlan[2];

/* Of several cores, which the next one is. */
static uint8_t core_slices, core_slice;

static inline uint32_t link_of(uint8_t port)
{
    return port_vlan[port] ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
}
/* Bytes before the IP header, whatever port it is for. */
static inline uint32_t link_bytes(const uint8_t *data, uint32_t length)
{
    return length >= ETH_BYTES && get16(data + 12) == ETHERTYPE_VLAN ? ETH_BYTES + VLAN_BYTES : ETH_BYTES;
}

static inline bool in_pool(uint32_t address)
{
    return address >= POOL_FIRST && address <= POOL_LAST;
}
static inline bool is_inside(uint32_t address)
{
    return (address & 0xffffff00u) == INSIDE_NET;
}

/* The bits of `shape` choose among the modes. */
static inline struct nat_core *make_core(uint8_t shape, uint8_t limits)
{
    static const struct nat_neighbour_config neighbours[] = {
        {.address = INSIDE_NET + 5, .port = 0, .mac = {2, 0, 0xa, 0, 0, 5}},
        {.address = OUTSIDE_NET + 254, .port = 1, .mac = {2, 0, 0, 0, 1, 0xfe}},
    };
    struct nat_config c = {
        .abi = NAT_ABI,
        .mapping = shape & 1,
        .filtering = (shape >> 1 & 3) % 3,
        .synchronous = shape >> 3 & 1,
        .n_ports = 2,
        .max_sessions = limits & 1 ? 8 : 96,
        .max_mappings = limits & 2 ? 4 : 0,
        .max_neighbours = limits & 4 ? 6 : 32,
        .max_held = limits & 8 ? 2 : 32,
        .event_ring = limits & 16 ? 8 : 256,
        .sessions_per_host = limits & 32 ? 5 : 0,
        .new_sessions_rate = limits & 64 ? 4 : 0,
        .icmp_rate = 100,
        .hold_ms = 500,
        .timeout_udp_ms = 3000,
        .timeout_icmp_ms = 1000,
        .timeout_tcp_transitory_ms = 2000,
        .timeout_tcp_established_ms = 5000,
        .quarantine_ms = shape & 16 ? 2000 : 0,
        .quarantine_ports = limits & 128 ? 2 : 0,
        .port_parity = shape & 32 ? 1 : 0,
        .port_preservation = shape & 64 ? 1 : 0,
        .seed = 5,
        .n_slices = core_slices,
        .slice = core_slice,
        .n_pool = 1,
        .n_routes = 3,
        .n_neighbours = shape & 32 ? 2 : 0,
        .neighbours = neighbours,
        .ports = {{.side = NAT_INTERNAL, .address = INSIDE_NET + 1, .mtu = 1500},
                  {.side = NAT_EXTERNAL, .address = OUTSIDE_NET + 1, .mtu = shape & 64 ? 68 : 1500}},
        .routes = {{.prefix = INSIDE_NET, .length = 24, .port = 0, .connected = 1},
                   {.prefix = OUTSIDE_NET, .length = 24, .port = 1, .connected = 1},
                   {.port = 1, .gateway = OUTSIDE_NET + 254}},
        .pool = {{.first = POOL_FIRST,
                  .last = POOL_LAST,
                  .port_first = PORT_FIRST,
                  .port_last = PORT_FIRST + PORTS - 1,
                  .own_first = PORT_FIRST,
                  .own_last = PORT_FIRST + PORTS - 1}},
    };
    memcpy(c.ports[0].mac, port_mac[0], 6);
    memcpy(c.ports[1].mac, port_mac[1], 6);
    c.ports[0].vlan = port_vlan[0] = shape & 128 ? 10 : 0;
    c.ports[1].vlan = port_vlan[1] = limits & 128 ? (shape & 16 ? 10 : 20) : 0;
    char error[256];
    struct nat_core *core = nat_create(&c, error, sizeof error);
    REQUIRE(core, error);
    return core;
}

static inline uint16_t transport_sum(const uint8_t *ip, uint32_t header, uint32_t bytes)
{
    uint8_t pseudo[12] = {0};
    memcpy(pseudo, ip + 12, 8);
    pseudo[9] = ip[9];
    put16(pseudo + 10, (uint16_t)bytes);
    return fold(sum_words(pseudo, sizeof pseudo) + sum_words(ip + header, bytes));
}

/* Whether the transport checksum is there and right. */
static inline bool transport_right(const uint8_t *ip, uint32_t bytes)
{
    uint32_t header = (ip[0] & 15u) * 4;
    const uint8_t *l4 = ip + header;
    bytes -= header;
    if (ip[9] == PROTO_ICMP)
        return sums_right(l4, bytes);
    /* UDP may be shorter than the datagram; its checksum covers its own length */
    if (ip[9] == PROTO_UDP)
        return raw16(l4 + 6) && transport_sum(ip, header, get16(l4 + 4)) == 0xffff;
    return transport_sum(ip, header, bytes) == 0xffff;
}

/* What a frame was before it went in. */
struct sent {
    uint8_t *buffer; /* data may have moved in it */
    bool was_right, was_udp_unsummed;
};

static inline bool is_fragment(const uint8_t *ip)
{
    return get16(ip + 6) & (IP_MF | IP_OFFSET);
}

static inline void inspect(const uint8_t *data, uint32_t length, struct sent *sent)
{
    sent->was_right = sent->was_udp_unsummed = false;
    uint32_t l2 = link_bytes(data, length);
    const uint8_t *ip = data + l2;
    if (length < l2 + IP_BYTES || get16(ip - 2) != ETHERTYPE_IPV4 || ip[0] >> 4 != 4)
        return;
    uint32_t header = (ip[0] & 15u) * 4, total = get16(ip + 2);
    if (header < IP_BYTES || total > length - l2 || total < header + 8 || is_fragment(ip))
        return;
    uint32_t least = ip[9] == PROTO_TCP ? TCP_BYTES : 8;
    if (total < header + least || (ip[9] == PROTO_UDP && get16(ip + header + 4) > total - header))
        return;
    sent->was_right = transport_right(ip, total);
    sent->was_udp_unsummed = ip[9] == PROTO_UDP && !raw16(ip + header + 6);
}

/* The pieces of a packet that is cut: each fits, and together they are the packet. */
static inline void check_pieces(const struct nat_packet *p)
{
    const uint32_t l2 = link_of(p->port);
    const uint8_t *whole = p->data + l2;
    uint32_t at = l2 + (whole[0] & 15u) * 4;
    struct nat_piece piece = {0};
    while (nat_cut(p->data, p->mtu, &piece)) {
        const uint8_t *ip = piece.header + l2;
        uint32_t header = (ip[0] & 15u) * 4, first = (get16(whole + 6) & IP_OFFSET) * 8;
        bool last = piece.at + piece.bytes == l2 + get16(whole + 2);
        REQUIRE(!memcmp(piece.header, p->data, l2), "a piece has the link header of the packet");
        REQUIRE(piece.at == at && piece.bytes, "pieces follow each other");
        REQUIRE(piece.header_bytes == l2 + header && get16(ip + 2) == header + piece.bytes,
                "a piece is as long as it says");
        REQUIRE(get16(ip + 2) <= p->mtu && sums_right(ip, header), "a piece fits, and its header is right");
        REQUIRE((get16(ip + 6) & IP_OFFSET) * 8 == first + at - l2 - (whole[0] & 15u) * 4,
                "a piece knows its place");
        REQUIRE(last ? !((get16(ip + 6) ^ get16(whole + 6)) & IP_MF)
                     : get16(ip + 6) & IP_MF && piece.bytes % 8 == 0,
                "only the last piece ends the datagram");
        at += piece.bytes;
    }
    REQUIRE(at == l2 + get16(whole + 2), "the pieces are the packet");
}

static inline void check_result(const struct nat_packet *p, const struct sent *sent)
{
    if (p->verdict > NAT_FRAGMENT)
        return;
    if (p->verdict == NAT_FRAGMENT)
        check_pieces(p);
    REQUIRE(p->port < 2 && p->length <= p->capacity, "an answer lies within its buffer");
    REQUIRE(!memcmp(p->data + 6, port_mac[p->port], 6), "the source MAC is that of the port");
    const uint32_t l2 = link_bytes(p->data, p->length);
    const uint8_t *ip = p->data + l2;
    REQUIRE(l2 == link_of(p->port), "what leaves has a tag where its port has one, and no other");
    REQUIRE(l2 == ETH_BYTES || (get16(p->data + 14) & VLAN_ID) == port_vlan[p->port],
            "the tag is that of its port");
    if (get16(ip - 2) == ETHERTYPE_ARP)
        return;
    REQUIRE(get16(ip - 2) == ETHERTYPE_IPV4, "nothing but ARP and IPv4 leaves");
    uint32_t header = (ip[0] & 15u) * 4, total = get16(ip + 2);
    REQUIRE(sums_right(ip, header), "the IP checksum is right");
    uint32_t source = get32(ip + 12), destination = get32(ip + 16);
    if (p->verdict == NAT_REPLY) {
        REQUIRE(in_pool(source) || source == INSIDE_NET + 1 || source == OUTSIDE_NET + 1,
                "an answer comes from one of our addresses");
        REQUIRE(transport_right(ip, total), "the checksum of an answer is right");
        return;
    }
    if (p->port == 1)
        REQUIRE(in_pool(source) && !in_pool(destination) && !is_inside(destination),
                "nothing leaves with an address that is not the pool's");
    else
        REQUIRE(is_inside(destination), "what comes in goes to an inside host");
    if (get16(ip + 6) & IP_OFFSET)
        return; /* it has no transport header, and its bytes are the driver's */
    REQUIRE(!sent->was_right || transport_right(ip, total), "a right transport checksum stays right");
    REQUIRE(!sent->was_udp_unsummed || !raw16(ip + header + 6), "UDP without checksum stays without");
    if (ip[9] == PROTO_ICMP && ip[header] != 0 && ip[header] != 8 && ip[header] != 13 && ip[header] != 14) {
        const uint8_t *quoted = ip + header + 8;
        REQUIRE(sums_right(quoted, (quoted[0] & 15u) * 4), "the quoted IP checksum is right");
        if (p->port == 1)
            REQUIRE(in_pool(get32(quoted + 16)), "no quotation shows an inside address");
    }
}

/* Buffers end where the frame or its answer ends, so that the sanitizer sees every step too far. */
static inline struct nat_packet make_packet(uint8_t port, const uint8_t *bytes, uint32_t length, bool room)
{
    uint32_t capacity = room && length < ANSWER_ROOM ? ANSWER_ROOM : length;
    uint8_t headroom = room ? HEADROOM : 0;
    struct sent *sent = malloc(sizeof *sent);
    if (!sent)
        abort();
    sent->buffer = malloc(headroom + capacity ? headroom + capacity : 1);
    if (!sent->buffer)
        abort();
    uint8_t *data = sent->buffer + headroom;
    if (length)
        memcpy(data, bytes, length);
    inspect(data, length, sent);
    return (struct nat_packet){.data = data,
                               .length = length,
                               .segment = length,
                               .capacity = (uint16_t)capacity,
                               .headroom = headroom,
                               .port = port,
                               .cookie = sent};
}

static inline void free_packet(const struct nat_packet *p)
{
    free(((struct sent *)p->cookie)->buffer);
    free(p->cookie);
}

static inline uint64_t verdict_total(struct nat_core *core)
{
    uint64_t total = 0;
    for (unsigned v = 0; v < NAT_VERDICT_COUNT; v++)
        total += nat_stats(core)->verdicts[v];
    return total;
}

static inline void check_burst(struct nat_core *core, struct nat_packet *packets, unsigned n, uint64_t now,
                               uint64_t *final)
{
    nat_burst(core, packets, n, now);
    *final += n;
    for (unsigned i = 0; i < n; i++) {
        REQUIRE(packets[i].verdict < NAT_VERDICT_COUNT, "every verdict is one that exists");
        check_result(&packets[i], packets[i].cookie);
        if (packets[i].verdict != NAT_HELD)
            free_packet(&packets[i]);
    }
}

/* Packets that were held: `*final` counts them a second time, as the verdicts do. */
static inline void check_take(struct nat_core *core, uint64_t *final)
{
    struct nat_packet p;
    while (nat_take(core, &p, 1)) {
        REQUIRE(p.verdict < NAT_VERDICT_COUNT && p.verdict != NAT_HELD, "a taken packet has a final verdict");
        check_result(&p, p.cookie);
        free_packet(&p);
        ++*final;
    }
    REQUIRE(verdict_total(core) == *final, "one verdict for every packet, and one more for each held");
}

#endif
