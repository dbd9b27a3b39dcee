/* SPDX-License-Identifier: Apache-2.0
 *
 * Which of several cores a host and an external port belong to. Hosts and ports fall into 128 groups, and
 * core `slice` of `n` has a run of them. The groups are what the low seven bits of a Toeplitz hash are, over
 * IPv4 addresses and ports (the common RSS of UDP and TCP), with keys of which most bits are zero:
 *
 *   inside   slices_host_key: all that counts is the source address, also where ports are hashed along;
 *   outside  slices_port_key: all that counts is the destination port, and of it bits 1 to 7.
 *
 * So any device with such a hash, a key of 40 bytes and 128 entries sends every packet to the core that has
 * its session, and software gets the same answer from a few instructions. Ports 2k and 2k+1 share a core: a
 * pair of RTP ports needs it.
 */
#ifndef SLICES_H
#define SLICES_H

#include <stdint.h>
#include <string.h>

#define SLICE_GROUPS 128u
#define SLICES_MAX 32u
#define SLICE_HOSTS 0x9e3779b1u /* odd, so that 128 addresses in a row are in 128 groups */
#define SLICE_KEY_BYTES 52u     /* the longest that devices take; shorter ones take its beginning */

static inline unsigned slice_host_group(uint32_t address)
{
    unsigned group = 0;
    for (unsigned bit = 0; bit < 7; bit++)
        group |= (unsigned)__builtin_parity(address & SLICE_HOSTS << (6 - bit)) << bit;
    return group;
}

static inline unsigned slice_port_group(uint16_t port)
{
    unsigned group = 0;
    for (unsigned bit = 0; bit < 7; bit++)
        group |= (unsigned)(port >> (7 - bit) & 1) << bit;
    return group;
}

static inline unsigned slice_of_group(unsigned group, unsigned n)
{
    return group * n / SLICE_GROUPS;
}

/* The first group of a slice; that of slice n is one beyond the last. */
static inline unsigned slice_first_group(unsigned slice, unsigned n)
{
    return (slice * SLICE_GROUPS + n - 1) / n;
}

static inline unsigned slice_of_host(uint32_t address, unsigned n)
{
    return n > 1 ? slice_of_group(slice_host_group(address), n) : 0;
}

static inline unsigned slice_of_port(uint16_t port, unsigned n)
{
    return n > 1 ? slice_of_group(slice_port_group(port), n) : 0;
}

static inline void slices_host_key(uint8_t key[SLICE_KEY_BYTES])
{
    memset(key, 0, SLICE_KEY_BYTES);
    const uint64_t first = (uint64_t)SLICE_HOSTS << 7; /* bits 25 to 56 */
    for (unsigned i = 0; i < 8; i++)
        key[i] = (uint8_t)(first >> (56 - 8 * i));
}

static inline void slices_port_key(uint8_t key[SLICE_KEY_BYTES])
{
    memset(key, 0, SLICE_KEY_BYTES);
    key[14] = 1; /* bit 119 */
}

#endif
