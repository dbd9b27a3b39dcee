/* SPDX-License-Identifier: Apache-2.0
 *
 * The heartbeat as bytes: one fixed layout of 64 bytes, little-endian, authenticated with SipHash-2-4.
 */
#ifndef HEARTBEAT_PACKET_H
#define HEARTBEAT_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HB_MAGIC 0x42484e54u /* "TNHB" */
#define HB_VERSION 2u
#define HB_PACKET_BYTES 64u
#define HB_KEY_BYTES 16u

enum hb_flag {
    HB_LEAVE = 1,   /* the sender goes away, or hands over, on purpose */
    HB_STALLED = 2, /* the process lives, and one of its workers does not advance */
    HB_CARRIES = 4, /* of two servers, the one that answers for their addresses */
    HB_UNFIT = 8,   /* it should not be: a port has no link */
    HB_BOTH = 16,   /* it believes our death without asking on its ports */
};

struct hb_packet {
    uint32_t magic;
    uint8_t version;
    uint8_t instance;
    uint8_t flags;   /* enum hb_flag */
    uint8_t workers; /* counters that the sender watches */
    uint32_t epoch;  /* of the sender's start */
    uint32_t interval_us;
    uint64_t nonce; /* drawn by the sender at its start */
    uint64_t
        echo; /* the nonce that the sender last heard: a recording of an earlier conversation has another */
    uint64_t sequence;   /* counts up from 1 */
    uint64_t progress;   /* sum of the workers' loop counters */
    uint32_t term;       /* of its role, or 0 */
    uint32_t silence_us; /* after so long without a heartbeat the sender holds us dead; 0: it does not tell */
    uint64_t tag;        /* SipHash-2-4 of all the bytes before it */
} __attribute__((packed));

uint64_t hb_siphash(const uint8_t key[HB_KEY_BYTES], const uint8_t *data, size_t n);
/* Fills in magic, version and tag. */
void hb_seal(struct hb_packet *packet, const uint8_t key[HB_KEY_BYTES]);
/* Whether these bytes are a heartbeat of somebody who has the key. */
bool hb_open(struct hb_packet *out, const void *bytes, size_t n, const uint8_t key[HB_KEY_BYTES]);

#endif
