/* SPDX-License-Identifier: Apache-2.0
 *
 * Links of this network namespace that lose their carrier, by the kernel's own word (rtnetlink).
 */
#ifndef LINK_WATCH_H
#define LINK_WATCH_H

#include <stdbool.h>

#define LINK_WATCH_MAX 4u

struct link_watch {
    int fd; /* -1: nothing is watched */
    unsigned n;
    int indexes[LINK_WATCH_MAX];
};

/* These, instead of those before; what the kernel has told until now does not count. 0 or an errno. */
int link_watch_set(struct link_watch *watch, const int *indexes, unsigned n);
/* Reads all that waits. Whether one of them went down, or away. */
bool link_watch_lost(struct link_watch *watch);

#endif
