/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FORWARD_H
#define FORWARD_H

#include <stdint.h>

struct pktgen_forward {
    uint16_t ports[2];
    int stop; /* by another thread */
    uint64_t packets;
    double busy_ns; /* of turns that had packets */
};

/* Until it is stopped. */
void pktgen_forward(struct pktgen_forward *f);

#endif
