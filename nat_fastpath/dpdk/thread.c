/* SPDX-License-Identifier: Apache-2.0
 *
 * A thread of a worker's: on its CPU, and deaf to signals.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "worker.h"

bool thread_start(pthread_t *thread, void *(*run)(void *), void *argument, int cpu, char *error,
                  size_t error_size)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    if (cpu >= 0) {
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        CPU_SET(cpu, &cpus);
        pthread_attr_setaffinity_np(&attributes, sizeof cpus, &cpus);
    }
    sigset_t all, before; /* signals are for Python's main thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int rc = pthread_create(thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (rc)
        snprintf(error, error_size, "cannot start a worker on CPU %d (workers.cores): %s", cpu,
                 rc == EINVAL ? "there is no such CPU, or this process may not use it" : strerror(rc));
    return rc == 0;
}
