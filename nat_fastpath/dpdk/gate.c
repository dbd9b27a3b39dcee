/* SPDX-License-Identifier: Apache-2.0
 *
 * A memif or a virtio_user whose other end comes or goes is set up and taken down in DPDK's interrupt thread,
 * which unmaps the rings even while a worker is within them. Here the two exclude each other.
 *
 * DPDK calls nobody before it handles an interrupt, so its thread is kept in an interrupt of ours, which
 * waits until others have come. It then shuts the gate, leaves, and finds itself called again: what was
 * handled in between was handled with the gate shut. The gate is one for all such devices, as the thread is.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* what makes an interrupt of one's own is marked so in DPDK 22.11, and has stayed as it was */
#define ALLOW_EXPERIMENTAL_API
#include <rte_interrupts.h>

#include "worker.h"

/* How often it looks for interrupts where /proc does not show what it waits for. */
#define BLIND_MS 10

static pthread_rwlock_t gate =
    PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP; /* a busy worker is no excuse */
static sem_t first, parked;
static atomic_bool ending;
static int recall = -1; /* the eventfd of our interrupt */

bool gate_enter(void)
{
    return pthread_rwlock_tryrdlock(&gate) == 0;
}

void gate_leave(void)
{
    pthread_rwlock_unlock(&gate);
}

void gate_shut(void)
{
    pthread_rwlock_wrlock(&gate);
}

void gate_open(void)
{
    pthread_rwlock_unlock(&gate);
}

static bool waits_for_ours(int fd)
{
    char path[32], line[64];
    int found = -1;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    FILE *file = fopen(path, "re");
    while (file != NULL && found != recall && fgets(line, sizeof line, file) != NULL)
        sscanf(line, "tfd: %d", &found);
    if (file != NULL)
        fclose(file);
    return found == recall;
}

/* The epoll in which the interrupt thread waits; it makes a new one whenever a source comes or goes. */
static int interrupts(void)
{
    int epoll = -1;
    DIR *all = opendir("/proc/self/fdinfo");
    if (all == NULL)
        return -1;
    for (const struct dirent *entry; epoll < 0 && (entry = readdir(all)) != NULL;)
        if (waits_for_ours(atoi(entry->d_name)))
            epoll = atoi(entry->d_name);
    closedir(all);
    return epoll;
}

static void keep_interrupt_thread(void *is_shut)
{
    eventfd_t value;
    if (atomic_load(&ending)) {
        sem_post(&parked);
        for (;;)
            pause();
    }
    eventfd_read(recall, &value);
    if (*(bool *)is_shut)
        gate_open();
    else
        sem_post(&first);
    const int epoll = interrupts();
    poll(&(struct pollfd){.fd = epoll, .events = POLLIN}, 1, epoll < 0 ? BLIND_MS : -1);
    gate_shut();
    *(bool *)is_shut = true;
    eventfd_write(recall, 1);
}

int gate_start(void)
{
    static bool is_shut;
    if (recall >= 0)
        return 0;
    sem_init(&first, 0, 0);
    sem_init(&parked, 0, 0);
    struct rte_intr_handle *handle = rte_intr_instance_alloc(RTE_INTR_INSTANCE_F_PRIVATE);
    recall = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = -ENOMEM;
    if (handle != NULL && recall >= 0 && rte_intr_fd_set(handle, recall) == 0 &&
        rte_intr_type_set(handle, RTE_INTR_HANDLE_EXT) == 0)
        rc = rte_intr_callback_register(handle, keep_interrupt_thread, &is_shut);
    rte_intr_instance_free(handle); /* DPDK has its copy */
    if (rc == 0) {
        while (sem_wait(&first) != 0) /* a signal came */
            ;
    } else if (recall >= 0) {
        close(recall);
        recall = -1;
    }
    return rc;
}

void gate_end(void)
{
    struct timespec until;
    if (recall < 0)
        return;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1;
    atomic_store(&ending, true);
    eventfd_write(recall, 1);
    while (sem_timedwait(&parked, &until) != 0 && errno == EINTR)
        ;
}
