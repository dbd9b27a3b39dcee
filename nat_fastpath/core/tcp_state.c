/* SPDX-License-Identifier: Apache-2.0
 *
 * The connection as a NAT sees it (RFC 5382, section 2; RFC 7857, section 2). A reset does not end a session
 * at once: whoever can forge one must not be able to cut a connection off (RFC 7857, 2.2).
 */
#include "tcp_state.h"

const uint8_t tcp_kind[8] = {
    [0] = TCP_KIND_ACK, [1] = TCP_KIND_FIN, [2] = TCP_KIND_SYN, [3] = TCP_KIND_SYN,
    [4] = TCP_KIND_RST, [5] = TCP_KIND_RST, [6] = TCP_KIND_RST, [7] = TCP_KIND_RST,
};

#define SYO NAT_TCP_SYN_OUT
#define SYI NAT_TCP_SYN_IN
#define SYB NAT_TCP_SYN_BOTH
#define EST NAT_TCP_ESTABLISHED
#define FIO NAT_TCP_FIN_OUT
#define FII NAT_TCP_FIN_IN
#define CLO NAT_TCP_CLOSING
#define RST NAT_TCP_RESET

const uint8_t tcp_next[NAT_TCP_STATES][2][TCP_KINDS] = {
    /*         from inside: ACK  SYN  FIN  RST    from outside: ACK  SYN  FIN  RST */
    [NAT_TCP_NONE] = {{SYO, SYO, SYO, RST}, {SYI, SYI, SYI, RST}},
    [SYO] = {{SYO, SYO, SYO, RST}, {SYO, SYB, SYO, RST}},
    [SYI] = {{SYI, SYB, SYI, RST}, {SYI, SYI, SYI, RST}},
    [SYB] = {{EST, SYB, FIO, RST}, {EST, SYB, FII, RST}},
    [EST] = {{EST, EST, FIO, RST}, {EST, EST, FII, RST}},
    [FIO] = {{FIO, FIO, FIO, RST}, {FIO, FIO, CLO, RST}},
    [FII] = {{FII, FII, CLO, RST}, {FII, FII, FII, RST}},
    /* the same endpoints may begin anew */
    [CLO] = {{CLO, SYO, CLO, RST}, {CLO, SYI, CLO, RST}},
    [RST] = {{RST, SYO, RST, RST}, {RST, SYI, RST, RST}},
};

const uint8_t tcp_is_established[NAT_TCP_STATES] = {
    [NAT_TCP_ESTABLISHED] = 1,
    [NAT_TCP_FIN_OUT] = 1,
    [NAT_TCP_FIN_IN] = 1,
};
