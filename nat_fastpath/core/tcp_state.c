/* SPDX-License-Identifier: Apache-2.0
 *
 * The connection as a NAT sees it (RFC 5382, section 2; RFC 7857, section 2). A reset does not end a session
 * at once: whoever can forge one must not be able to cut a connection off (RFC 7857, 2.2; RFC 6146, 3.5.2.2).
 */
#include "tcp_state.h"

const uint8_t tcp_kinds[16] = {
    [0] = TCP_KIND_ACK,  [1] = TCP_KIND_FIN,  [2] = TCP_KIND_SYN,      [3] = TCP_KIND_SYN,
    [4] = TCP_KIND_RST,  [5] = TCP_KIND_RST,  [6] = TCP_KIND_RST,      [7] = TCP_KIND_RST,
    [8] = TCP_KIND_ACK,  [9] = TCP_KIND_FIN,  [10] = TCP_KIND_SYN_ACK, [11] = TCP_KIND_SYN_ACK,
    [12] = TCP_KIND_RST, [13] = TCP_KIND_RST, [14] = TCP_KIND_RST,     [15] = TCP_KIND_RST,
};

#define SYO NAT_TCP_SYN_OUT
#define SYI NAT_TCP_SYN_IN
#define SYB NAT_TCP_SYN_BOTH
#define EST NAT_TCP_ESTABLISHED
#define FIO NAT_TCP_FIN_OUT
#define FII NAT_TCP_FIN_IN
#define CLO NAT_TCP_CLOSING
#define RST NAT_TCP_RESET

/* A reset that is real ends the conversation, and the transitory timer the session; after a forged one the
 * next segment makes it what it was. Before there is a connection, a reset changes nothing: the timer is
 * short. */
const uint8_t tcp_next[NAT_TCP_STATES][2][TCP_KINDS] = {
    /*         from inside: ACK  SYN  S+A  FIN  RST    from outside: ACK  SYN  S+A  FIN  RST */
    [NAT_TCP_NONE] = {{SYO, SYO, SYO, SYO, SYO}, {SYI, SYI, SYI, SYI, SYI}},
    [SYO] = {{SYO, SYO, SYO, SYO, SYO}, {SYO, SYB, SYB, SYO, SYO}},
    [SYI] = {{SYI, SYB, SYB, SYI, SYI}, {SYI, SYI, SYI, SYI, SYI}},
    [SYB] = {{EST, SYB, SYB, FIO, SYB}, {EST, SYB, SYB, FII, SYB}},
    [EST] = {{EST, EST, EST, FIO, RST}, {EST, EST, EST, FII, RST}},
    /* who has finished, or all, may begin anew */
    [FIO] = {{FIO, SYO, FIO, FIO, RST}, {FIO, FIO, FIO, CLO, RST}},
    [FII] = {{FII, FII, FII, CLO, RST}, {FII, SYI, FII, FII, RST}},
    [CLO] = {{CLO, SYO, CLO, CLO, CLO}, {CLO, SYI, CLO, CLO, CLO}},
    [RST] = {{EST, SYO, EST, FIO, RST}, {EST, SYI, EST, FII, RST}},
};

const uint8_t tcp_is_established[NAT_TCP_STATES] = {
    [NAT_TCP_ESTABLISHED] = 1,
    [NAT_TCP_FIN_OUT] = 1,
    [NAT_TCP_FIN_IN] = 1,
};
