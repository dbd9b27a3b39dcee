/* SPDX-License-Identifier: Apache-2.0
 *
 * DPDK tells in its log why something failed, and the libraries of AF_XDP on stderr; here the last of both is
 * kept for the exception.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
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

static int keep_xdp(int level, const char *format, va_list values)
{
    char line[512];
    const int n =
        level > 1 ? 0
                  : vsnprintf(line, sizeof line, format, values); /* 0: a warning, 1: a note, 2: to debug */
    if (n > 0)
        keep(NULL, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
    return n;
}

void log_capture_xdp(void)
{
    static const char *const setters[][2] = {{"libbpf.so.1", "libbpf_set_print"},
                                             {"libbpf.so.0", "libbpf_set_print"},
                                             {"libxdp.so.1", "libxdp_set_print"}};
    for (size_t i = 0; i < sizeof setters / sizeof *setters; i++) {
        void *library = dlopen(setters[i][0], RTLD_LAZY | RTLD_NOLOAD);
        void *(*set)(int (*)(int, const char *, va_list)) = NULL;
        if (library != NULL)
            *(void **)&set = dlsym(library, setters[i][1]);
        if (set != NULL)
            set(keep_xdp);
    }
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
