/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TCP_STATE_H
#define TCP_STATE_H

#include <stdint.h>

#include "nat.h"

enum tcp_kind { TCP_KIND_ACK, TCP_KIND_SYN, TCP_KIND_SYN_ACK, TCP_KIND_FIN, TCP_KIND_RST, TCP_KINDS };

/* RST outweighs SYN, SYN outweighs FIN. By FIN, SYN and RST, and ACK as the fourth bit. */
extern const uint8_t tcp_kinds[16];
static inline unsigned tcp_kind(uint8_t flags)
{
    return tcp_kinds[(flags & 7) | (flags & 16) >> 1];
}
/* [state][direction: 0 from inside, 1 from outside][kind] */
extern const uint8_t tcp_next[NAT_TCP_STATES][2][TCP_KINDS];
/* Whether the state lives by the established timer (RFC 5382, REQ-5). */
extern const uint8_t tcp_is_established[NAT_TCP_STATES];

#endif
