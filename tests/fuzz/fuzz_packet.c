/* SPDX-License-Identifier: Apache-2.0
 *
 * One packet of any bytes into a NAT that has one session of each protocol. Input: mode, port, frame.
 */
#include "frames.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size < 2 || size > 2048)
        return 0;
    struct nat_core *core = make_core((uint8_t)((input[0] & ~8u) | 32), input[1] & 128); /* nothing waits */
    uint64_t now = 1000000000, final = 0;
    for (uint8_t kind = 0; kind < 3; kind++) {
        uint8_t frame[MAX_FRAME];
        uint8_t numbers[8] = {4, 0, 0, 0, 0, TCP_SYN, 64, 0};
        struct nat_packet opening = make_packet(0, frame, make_frame(kind, 0, numbers, frame), true);
        check_burst(core, &opening, 1, now, &final);
    }
    struct nat_packet packet = make_packet(input[1] & 1, input + 2, (uint32_t)size - 2, input[1] & 2);
    check_burst(core, &packet, 1, now, &final);
    nat_flush(core);
    check_take(core, &final);
    nat_destroy(core);
    return 0;
}
