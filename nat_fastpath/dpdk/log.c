/* SPDX-License-Identifier: Apache-2.0
 *
 * DPDK tells in its log why something failed; here the last of it is kept for the exception.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <rte_log.h>

#include "worker.h"

static struct {
    pthread_mutex_t lock;
    char text[8192];
    size_t length;
} kept = {.lock = PTHREAD_MUTEX_INITIALIZER};

static ssize_t keep(void *cookie, const char *text, size_t size)
{
    (void)cookie;
    pthread_mutex_lock(&kept.lock);
    const size_t n = size < sizeof kept.text ? size : sizeof kept.text;
    if (kept.length + n > sizeof kept.text) {
        const size_t gone = kept.length + n - sizeof kept.text;
        memmove(kept.text, kept.text + gone, kept.length - gone);
        kept.length -= gone;
    }
    memcpy(kept.text + kept.length, text + size - n, n);
    kept.length += n;
    pthread_mutex_unlock(&kept.lock);
    return (ssize_t)size;
}

int log_capture(void)
{
    FILE *stream = fopencookie(NULL, "w", (cookie_io_functions_t){.write = keep});
    if (stream == NULL)
        return -1;
    setvbuf(stream, NULL, _IOLBF, 0);
    return rte_openlog_stream(stream);
}

size_t log_take(char *out, size_t size)
{
    pthread_mutex_lock(&kept.lock);
    const size_t n = kept.length < size ? kept.length : size;
    memcpy(out, kept.text + kept.length - n, n);
    kept.length = 0;
    pthread_mutex_unlock(&kept.lock);
    return n;
}
