/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "link_watch.h"

#include <errno.h>
#include <linux/if.h>
#include <linux/rtnetlink.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define DRAIN 256u /* more than a default receive buffer holds: a flood of news does not keep the thread */

int link_watch_set(struct link_watch *watch, const int *indexes, unsigned n)
{
    if (watch->fd >= 0)
        close(watch->fd);
    watch->fd = -1;
    watch->n = n;
    if (!n)
        return 0;
    memcpy(watch->indexes, indexes, n * sizeof *indexes);
    watch->fd = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_ROUTE);
    const struct sockaddr_nl news = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK};
    if (watch->fd >= 0 && !bind(watch->fd, (const struct sockaddr *)&news, sizeof news))
        return 0;
    const int error = errno;
    link_watch_set(watch, NULL, 0);
    return error;
}

static bool watched(const struct link_watch *watch, int index)
{
    for (unsigned i = 0; i < watch->n; i++)
        if (watch->indexes[i] == index)
            return true;
    return false;
}

bool link_watch_lost(struct link_watch *watch)
{
    bool any = false;
    for (unsigned i = 0; watch->fd >= 0 && i < DRAIN; i++) {
        struct {
            struct nlmsghdr header;
            struct ifinfomsg link;
        } news; /* one a datagram; of the attributes behind we need none */
        struct sockaddr_nl from;
        socklen_t from_length = sizeof from;
        const ssize_t n = recvfrom(watch->fd, &news, sizeof news, 0, (struct sockaddr *)&from, &from_length);
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            break;
        if (n < (ssize_t)sizeof news || from.nl_pid || news.link.ifi_family != AF_UNSPEC ||
            !watched(watch, news.link.ifi_index))
            continue; /* also news that were too many for the buffer: the switch tells what is missed */
        const bool there = news.header.nlmsg_type == RTM_NEWLINK;
        const bool up = news.link.ifi_flags & IFF_UP && news.link.ifi_flags & IFF_LOWER_UP;
        any |= (there && !up) || news.header.nlmsg_type == RTM_DELLINK;
    }
    return any;
}
