/* SPDX-License-Identifier: Apache-2.0
 *
 * Valid frames from a few numbers, so that the fuzzer gets past the checksums.
 */
#ifndef FRAMES_H
#define FRAMES_H

#include "check.h"

#define MAX_FRAME 256u
enum { FRAME_UDP, FRAME_TCP, FRAME_ECHO, FRAME_ERROR, FRAME_ARP, FRAME_KINDS };

/* Few addresses and ports, that packets may meet: n[0] near, n[1] far, n[2], n[3] their ports. */
static inline uint32_t near_address(uint8_t port, uint8_t n)
{
    return port == 0                     ? INSIDE_NET + 1 + n % 6
           : in_pool(POOL_FIRST + n % 3) ? POOL_FIRST + n % 3
                                         : OUTSIDE_NET + 1;
}
static inline uint32_t far_address(uint8_t n)
{
    return n % 8 == 7 ? OUTSIDE_NET + 77 : n % 8 == 6 ? POOL_FIRST : 0xcb007100u + n % 8;
}

static inline uint32_t put_ip(uint8_t *ip, uint8_t protocol, uint32_t source, uint32_t destination,
                              uint8_t ttl, uint16_t bytes)
{
    memset(ip, 0, IP_BYTES);
    ip[0] = 0x45;
    put16(ip + 2, (uint16_t)(IP_BYTES + bytes));
    put16(ip + 6, ttl & 64 ? IP_DF : 0);
    ip[8] = ttl;
    ip[9] = protocol;
    put32(ip + 12, source);
    put32(ip + 16, destination);
    put_raw16(ip + 10, checksum(ip, IP_BYTES));
    return IP_BYTES + bytes;
}

/* An IP packet from the near end (`from` 0) or to it; returns its length. n: eight numbers. */
static inline uint32_t make_ip(uint8_t kind, uint8_t port, const uint8_t *n, bool reverse, uint8_t *ip)
{
    uint32_t near = near_address(port, n[0]), far = far_address(n[1]);
    uint16_t near_port = (uint16_t)(port ? PORT_FIRST + n[2] % PORTS : 4000 + n[2] % 4);
    uint16_t far_port = (uint16_t)(far == POOL_FIRST ? PORT_FIRST + n[3] % PORTS : 53 + n[3] % 3);
    /* inside sends from near to far, outside from far to near */
    bool from_near = (port == 0) != reverse;
    uint8_t *l4 = ip + IP_BYTES;
    /* the longer ones are too long for the small MTU */
    uint16_t bytes = (uint16_t)((kind == FRAME_TCP ? TCP_BYTES + 4 : 12) + (n[7] & 0x40 ? 72 : 0));
    memset(l4, 0x5a, bytes);
    put16(l4, from_near ? near_port : far_port);
    put16(l4 + 2, from_near ? far_port : near_port);
    uint8_t protocol = kind == FRAME_UDP ? PROTO_UDP : kind == FRAME_TCP ? PROTO_TCP : PROTO_ICMP;
    if (kind == FRAME_UDP) {
        put16(l4 + 4, bytes);
        put16(l4 + 6, 0);
    } else if (kind == FRAME_TCP) {
        l4[12] = 5 << 4;
        l4[13] = n[5] & 0x17;
        put16(l4 + 16, 0);
    } else {
        l4[0] = from_near == (port == 0) ? (port == 0 ? ICMP_ECHO : ICMP_ECHO_REPLY)
                                         : (port == 0 ? ICMP_ECHO_REPLY : ICMP_ECHO);
        l4[1] = 0;
        put16(l4 + 2, 0);
        put16(l4 + 4, near_port);
    }
    uint32_t length = put_ip(ip, protocol, from_near ? near : far, from_near ? far : near, n[6], bytes);
    if (kind == FRAME_UDP && !(n[7] & 1)) {
        uint16_t sum = (uint16_t)~transport_sum(ip, IP_BYTES, bytes);
        put_raw16(l4 + 6, sum ? sum : 0xffff);
    } else if (kind == FRAME_TCP) {
        put_raw16(l4 + 16, (uint16_t)~transport_sum(ip, IP_BYTES, bytes));
    } else if (kind == FRAME_ECHO) {
        put_raw16(l4 + 2, checksum(l4, bytes));
    }
    return length;
}

/* Makes a fragment of a frame: `which` says its place, of three of 8 bytes or so. Returns its length. */
static inline uint32_t make_fragment(uint8_t which, uint8_t *frame, uint32_t length)
{
    uint8_t *ip = frame + ETH_BYTES;
    if (get16(frame + 12) != ETHERTYPE_IPV4 || length < ETH_BYTES + IP_BYTES + 8)
        return length;
    uint32_t bytes = length - ETH_BYTES - IP_BYTES, start = which & 1 ? 8u : which & 2 ? 24u : 0u;
    bool more = !(which & 4);
    if (start)
        memset(ip + IP_BYTES, 0x5a, bytes);
    if (more)
        bytes &= ~7u;
    put16(ip + 2, (uint16_t)(IP_BYTES + bytes));
    put16(ip + 4, which >> 3 & 1);
    put16(ip + 6, (uint16_t)(start / 8 | (more ? IP_MF : 0)));
    put16(ip + 10, 0);
    put_raw16(ip + 10, checksum(ip, IP_BYTES));
    return ETH_BYTES + IP_BYTES + bytes;
}

/* An untagged frame that reaches `port`; returns its length. */
static inline uint32_t make_untagged(uint8_t kind, uint8_t port, const uint8_t *n, uint8_t *frame)
{
    memcpy(frame, port_mac[port], 6);
    memcpy(frame + 6, peer_mac[port], 6);
    frame[11] = (uint8_t)(frame[11] + n[4] % 3);
    uint8_t *ip = frame + ETH_BYTES;
    if (kind == FRAME_ARP) {
        put16(frame + 12, ETHERTYPE_ARP);
        memset(ip, 0, ARP_BYTES);
        put16(ip, 1);
        put16(ip + 2, ETHERTYPE_IPV4);
        ip[4] = 6;
        ip[5] = 4;
        put16(ip + 6, (uint16_t)(1 + n[5] % 2));
        memcpy(ip + 8, frame + 6, 6);
        put32(ip + 14, port ? OUTSIDE_NET + (n[0] & 1 ? 254 : 77) : INSIDE_NET + 1 + n[0] % 6);
        put32(ip + 24, port ? POOL_FIRST + n[1] % 3 : INSIDE_NET + 1 + n[1] % 6);
        return ETH_BYTES + ARP_BYTES;
    }
    put16(frame + 12, ETHERTYPE_IPV4);
    if (kind != FRAME_ERROR)
        return ETH_BYTES + make_ip(kind, port, n, false, ip);
    /* about a packet that went the other way */
    uint8_t *icmp = ip + IP_BYTES;
    uint32_t quoted = make_ip(n[7] % 3, port, n, true, icmp + ICMP_BYTES);
    uint32_t to = get32(icmp + ICMP_BYTES + 12);
    memset(icmp, 0, ICMP_BYTES);
    icmp[0] = n[5] & 1 ? ICMP_UNREACHABLE : ICMP_TIME_EXCEEDED;
    put_raw16(icmp + 2, checksum(icmp, ICMP_BYTES + quoted));
    uint32_t from = port ? far_address(n[4]) : near_address(0, n[4]);
    return ETH_BYTES + put_ip(ip, PROTO_ICMP, from, to, 60, (uint16_t)(ICMP_BYTES + quoted));
}

/* The same with the tag that its port has; `priority` has four bits. */
static inline uint32_t put_tag(uint8_t port, uint8_t priority, uint8_t *frame, uint32_t length)
{
    if (!port_vlan[port])
        return length;
    memmove(frame + ETH_BYTES + VLAN_BYTES - 2, frame + ETH_BYTES - 2, length - ETH_BYTES + 2);
    put16(frame + 12, ETHERTYPE_VLAN);
    put16(frame + 14, (uint16_t)(priority << 12 | port_vlan[port]));
    return length + VLAN_BYTES;
}
static inline uint32_t make_frame(uint8_t kind, uint8_t port, const uint8_t *n, uint8_t *frame)
{
    return put_tag(port, n[6] & 15, frame, make_untagged(kind, port, n, frame));
}

#endif
