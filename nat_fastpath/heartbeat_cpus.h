/* SPDX-License-Identifier: Apache-2.0
 *
 * Where the threads of the heartbeat run.
 */
#ifndef HEARTBEAT_CPUS_H
#define HEARTBEAT_CPUS_H

#include <pthread.h>
#include <sched.h>
#include <string.h>

#define RUNNERS 2u

/* For each thread one half of our CPUs, or the only one. Neighbours may be one core, and are in one half. */
static unsigned split_cpus(cpu_set_t halves[RUNNERS])
{
    cpu_set_t all;
    pthread_getaffinity_np(pthread_self(), sizeof all, &all);
    const int n = CPU_COUNT(&all);
    memset(halves, 0, RUNNERS * sizeof *halves);
    for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &all))
            CPU_SET(cpu, &halves[seen++ >= (n + 1) / 2]);
    return n > 1 ? 2 : 1;
}

#endif
