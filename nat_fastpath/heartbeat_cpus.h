/* SPDX-License-Identifier: Apache-2.0
 *
 * Where the threads of the heartbeat run, and how.
 */
#ifndef HEARTBEAT_CPUS_H
#define HEARTBEAT_CPUS_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>

#define RUNNERS 2u
#define PRIORITY 20 /* above ordinary realtime work, below the kernel's own threads (50) */
#define STACK_BYTES (256u * 1024u)

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

/* 0 or an errno. `realtime` becomes false where SCHED_FIFO is not allowed. */
static int start_on(const cpu_set_t *cpus, pthread_t *thread, void *(*run)(void *), void *argument,
                    bool *realtime)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    if (CPU_COUNT(cpus))
        pthread_attr_setaffinity_np(&attributes, sizeof *cpus, cpus);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's */
    const int rc = pthread_create(thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (!rc)
        *realtime &=
            !pthread_setschedparam(*thread, SCHED_FIFO, &(struct sched_param){.sched_priority = PRIORITY});
    return rc;
}

#endif
