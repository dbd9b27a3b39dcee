/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes and checksums. Nothing here trusts a length: callers check, once, before they read.
 */
#ifndef WIRE_H
#define WIRE_H

#include <stdint.h>
#include <string.h>

enum {
    ETH_BYTES = 14,
    VLAN_BYTES = 4,
    IP_BYTES = 20,
    UDP_BYTES = 8,
    TCP_BYTES = 20,
    ICMP_BYTES = 8,
    ARP_BYTES = 28,
};
enum {
    ETHERTYPE_IPV4 = 0x0800,
    ETHERTYPE_ARP = 0x0806,
    ETHERTYPE_VLAN = 0x8100,
    ETHERTYPE_IPV6 = 0x86dd,
    ETHERTYPE_SERVICE_VLAN = 0x88a8, /* 802.1ad */
};
enum { VLAN_ID = 0xfff, VLAN_LAST = 4094 };
enum { PROTO_ICMP = 1, PROTO_TCP = 6, PROTO_UDP = 17 };
enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };
enum {
    ICMP_ECHO_REPLY = 0,
    ICMP_UNREACHABLE = 3,
    ICMP_SOURCE_QUENCH = 4,
    ICMP_REDIRECT = 5,
    ICMP_ECHO = 8,
    ICMP_TIME_EXCEEDED = 11,
    ICMP_PARAMETER_PROBLEM = 12,
    ICMP_TIMESTAMP = 13,
    ICMP_TIMESTAMP_REPLY = 14,
};
enum { IP_DF = 0x4000, IP_MF = 0x2000, IP_OFFSET = 0x1fff };

/* raw: as the bytes lie in memory; without: host order */
static inline uint16_t raw16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}
static inline uint32_t raw32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}
static inline uint64_t raw64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}
static inline void put_raw16(uint8_t *p, uint16_t v)
{
    memcpy(p, &v, 2);
}
static inline void put_raw32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
static inline uint16_t net16(uint16_t v)
{
    return __builtin_bswap16(v);
}
static inline uint32_t net32(uint32_t v)
{
    return __builtin_bswap32(v);
}
#else
#error "records are little-endian and are written as they lie in memory: big-endian hosts need a port"
#endif

static inline uint16_t get16(const uint8_t *p)
{
    return net16(raw16(p));
}
static inline uint32_t get32(const uint8_t *p)
{
    return net32(raw32(p));
}
static inline uint64_t get48(const uint8_t *p) /* a MAC as a number */
{
    return (uint64_t)get16(p) << 32 | get32(p + 2);
}
static inline void put16(uint8_t *p, uint16_t v)
{
    put_raw16(p, net16(v));
}
static inline void put32(uint8_t *p, uint32_t v)
{
    put_raw32(p, net32(v));
}

/* One's complement sums do not care for byte order (RFC 1071): all sums here are of raw words. */
static inline uint16_t fold(uint32_t sum)
{
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

static inline uint32_t sum_words(const uint8_t *p, uint32_t length)
{
    uint64_t sum = 0;
    for (; length >= 4; p += 4, length -= 4)
        sum += raw32(p);
    if (length >= 2) {
        sum += raw16(p);
        p += 2;
        length -= 2;
    }
    if (length) {
        uint8_t last[2] = {*p, 0};
        sum += raw16(last);
    }
    sum = (sum & 0xffffffffu) + (sum >> 32);
    sum = (sum & 0xffffffffu) + (sum >> 32);
    return fold((uint32_t)sum);
}

/* A valid header sums to 0xffff; so would nothing but zeros, which no header is. */
static inline int sums_right(const uint8_t *p, uint32_t length)
{
    return sum_words(p, length) == 0xffff;
}

static inline uint16_t checksum(const uint8_t *p, uint32_t length)
{
    return (uint16_t)~sum_words(p, length);
}

/* RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). delta is fold(~m + m') over all changed words. */
static inline uint16_t delta16(uint16_t before, uint16_t after)
{
    return fold((uint32_t)(uint16_t)~before + after);
}
static inline uint16_t delta32(uint32_t before, uint32_t after)
{
    return fold((uint32_t)(uint16_t)~before + (uint16_t)(~before >> 16) + (uint16_t)after + (after >> 16));
}
/* The word that begins with the TTL, when that goes down by one. */
#define TTL_DELTA 0xfffeu
static inline uint16_t apply_delta(uint16_t check, uint32_t delta)
{
    return (uint16_t)~fold((uint32_t)(uint16_t)~check + delta);
}
static inline void patch_check(uint8_t *check, uint32_t delta)
{
    put_raw16(check, apply_delta(raw16(check), delta));
}
/* UDP: 0 means "no checksum" and stays; a sum that comes out as 0 is sent as 0xffff (RFC 768). */
static inline void patch_udp_check(uint8_t *check, uint32_t delta)
{
    uint16_t v = raw16(check);
    if (v) {
        v = apply_delta(v, delta);
        put_raw16(check, v ? v : 0xffff);
    }
}

#endif
