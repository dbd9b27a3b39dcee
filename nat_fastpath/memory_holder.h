/* SPDX-License-Identifier: Apache-2.0
 *
 * A process that shares our memory and does nothing.
 *
 * When a process is killed the kernel takes its memory apart before it closes its descriptors: with 1 GB of 4
 * KB pages the peer sees the end of a TCP connection 75 ms late. While somebody else uses the memory too,
 * that step costs nothing, the sockets close at once, and the memory goes when the holder follows: once the
 * last thread has closed them.
 */
#ifndef MEMORY_HOLDER_H
#define MEMORY_HOLDER_H

#include <stdbool.h>
#include <sys/types.h>

struct memory_holder {
    pid_t pid;
    void *stack;
};

/* 0 or an errno. */
int memory_holder_start(struct memory_holder *holder);
bool memory_holder_alive(const struct memory_holder *holder);
/* Ends and reaps it. */
void memory_holder_stop(struct memory_holder *holder);

#endif
