# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Failure detection for Python: the heartbeat thread, and the holder that lets sockets close at once.

The typed face with the documentation of every call is watch.pyi.
"""

from libc.errno cimport errno
from libc.stdint cimport int16_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

import os
import secrets
import socket
from errno import ECANCELED

cdef extern from "heartbeat.h" nogil:
    enum:
        HB_MAX_COUNTERS, HB_MAX_PREPARED, HB_KEY_BYTES
    struct hb_config:
        int udp_fd
        bint connected
        uint8_t *key
        uint8_t instance
        int16_t peer_instance
        uint32_t epoch
        uint64_t nonce
        uint64_t interval_ns
        uint64_t patience_ns
        unsigned misses
        unsigned n_counters
        const uint64_t **counters
    struct hb_stats:
        pass
    struct hb_times:
        uint64_t last_heartbeat
        uint64_t detected
        uint64_t written
    struct heartbeat:
        pass
    heartbeat *hb_create(const hb_config *config)
    void hb_destroy(heartbeat *hb)
    int hb_start(heartbeat *hb)
    void hb_stop(heartbeat *hb)
    int hb_arm(heartbeat *hb, const void *data, size_t n, int fd)
    int hb_update(heartbeat *hb, const void *data, size_t n)
    bint hb_disarm(heartbeat *hb)
    void hb_follow(heartbeat *hb, void *role, uint32_t at_death)
    void hb_rekey(heartbeat *hb, const uint8_t *key)
    void hb_leave(heartbeat *hb, bint leave)
    void hb_watch_tcp(heartbeat *hb, const int *fds)
    int hb_watch_links(heartbeat *hb, const int *indexes, unsigned n)
    int hb_fired(heartbeat *hb, hb_times *times)
    void hb_read_stats(heartbeat *hb, hb_stats *out)
    int hb_event_fd(const heartbeat *hb)

cdef extern from "link_watch.h" nogil:
    enum:
        LINK_WATCH_MAX

cdef extern from *:
    """
    static const char *const hb_stats_names[] = {
    #define HB_NAME(name) #name,
        HB_STATS_FIELDS(HB_NAME)
    #undef HB_NAME
    };
    enum { N_HB_STATS = sizeof hb_stats_names / sizeof *hb_stats_names };
    """
    const char **hb_stats_names
    enum:
        N_HB_STATS

cdef extern from "memory_holder.h" nogil:
    struct memory_holder:
        int pid
    int memory_holder_start(memory_holder *holder)
    bint memory_holder_alive(const memory_holder *holder)
    void memory_holder_stop(memory_holder *holder)

MAX_PREPARED = HB_MAX_PREPARED
MAX_COUNTERS = HB_MAX_COUNTERS
REASONS = (None, "silence", "stalled worker", "TCP end", "link down")  # enum hb_reason


def _in_range(name, value, low, high):
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")
    return value


def _failed(number):
    return OSError(number, os.strerror(number))


def _udp_socket(listen, peer):
    """The bound socket, connected when the peer is known: then the kernel keeps strangers out of its buffer."""
    if isinstance(listen, int):
        udp = socket.socket(fileno=os.dup(listen))
        if udp.type != socket.SOCK_DGRAM:
            udp.close()
            raise ValueError("listen must be a UDP socket")
    else:
        family, kind, protocol, _, address = socket.getaddrinfo(
            *listen, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
        )[0]
        udp = socket.socket(family, kind, protocol)
    try:
        if not isinstance(listen, int):
            udp.bind(address)
        if peer is not None:
            udp.connect(socket.getaddrinfo(*peer, family=udp.family, type=socket.SOCK_DGRAM)[0][4])
    except BaseException:
        udp.close()
        raise
    return udp


cdef const char *_key_bytes(bytes key) except NULL:
    if len(key) != HB_KEY_BYTES:
        raise ValueError(f"key must have {HB_KEY_BYTES} bytes, not {len(key)}")
    return key


cdef class Watch:
    cdef heartbeat *_hb
    cdef object _address

    def __cinit__(
        self, listen, peer, bytes key not None, *, instance, epoch, interval_ms=2.0, misses=3, patience_ms=None,
        counters=(), peer_instance=None, tcp_fd=None, second_fd=None,
    ):
        cdef hb_config config
        memset(&config, 0, sizeof(config))
        memcpy(config.key, _key_bytes(key), HB_KEY_BYTES)
        config.instance = _in_range("instance", instance, 0, 255)
        config.peer_instance = -1 if peer_instance is None else _in_range("peer_instance", peer_instance, 0, 255)
        if config.peer_instance == config.instance:
            raise ValueError(f"instance and peer_instance are both {instance}")
        config.epoch = _in_range("epoch", epoch, 0, 0xFFFFFFFF)
        config.nonce = secrets.randbits(64)
        config.interval_ns = int(_in_range("interval_ms", interval_ms, 0.1, 10_000) * 1e6)
        config.misses = _in_range("misses", misses, 1, 1000)
        patience_ms = interval_ms * misses if patience_ms is None else patience_ms
        config.patience_ns = int(_in_range("patience_ms", patience_ms, 0.1, 10_000_000) * 1e6)
        counters = [address for address in counters if address]
        config.n_counters = _in_range("number of counters", len(counters), 0, HB_MAX_COUNTERS)
        for i, address in enumerate(counters):
            config.counters[i] = <const uint64_t *><uintptr_t>address
        udp = _udp_socket(listen, peer)
        self._address = udp.getsockname()[:2]
        config.connected = peer is not None
        config.udp_fd = udp.detach()
        self._hb = hb_create(&config)
        if self._hb is NULL:
            raise _failed(errno)
        self.watch_tcp(tcp_fd, second_fd)

    def __dealloc__(self):
        self.close()

    cdef heartbeat *_open(self) except NULL:
        if self._hb is NULL:
            raise ValueError("this watch is closed")
        return self._hb

    def start(self):
        cdef int error = hb_start(self._open())
        if error:
            raise _failed(error)

    def stop(self):
        cdef heartbeat *hb = self._open()
        with nogil:
            hb_stop(hb)

    def close(self):
        cdef heartbeat *hb = self._hb
        self._hb = NULL
        if hb is not NULL:
            with nogil:
                hb_destroy(hb)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, value, trace):
        self.close()

    def arm(self, bytes data not None, fd):
        cdef heartbeat *hb = self._open()
        _in_range("length of data", len(data), 0, HB_MAX_PREPARED)
        cdef int stream_fd = -1
        if fd is not None:
            stream_fd = fd
            with socket.socket(fileno=os.dup(fd)) as stream:
                if stream.type != socket.SOCK_STREAM:
                    raise ValueError("fd must be a stream socket")
        cdef const char *start = data
        cdef size_t n = len(data)
        cdef int error
        with nogil:
            error = hb_arm(hb, start, n, stream_fd)
        if error:
            raise _failed(error)

    def update(self, bytes data not None):
        cdef heartbeat *hb = self._open()
        _in_range("length of data", len(data), 0, HB_MAX_PREPARED)
        cdef const char *start = data
        cdef size_t n = len(data)
        cdef int error
        with nogil:
            error = hb_update(hb, start, n)
        if error and error != ECANCELED:
            raise _failed(error)
        return not error

    def disarm(self):
        cdef heartbeat *hb = self._open()
        cdef bint in_time
        with nogil:
            in_time = hb_disarm(hb)
        return in_time

    def follow(self, role_address, unsigned at_death):
        cdef heartbeat *hb = self._open()
        hb_follow(hb, <void *><uintptr_t>role_address, at_death)

    def rekey(self, bytes key not None):
        cdef heartbeat *hb = self._open()
        hb_rekey(hb, <const uint8_t *>_key_bytes(key))

    def leave(self, bint leave=True):
        cdef heartbeat *hb = self._open()
        with nogil:
            hb_leave(hb, leave)

    def watch_tcp(self, tcp_fd=None, second_fd=None):
        cdef heartbeat *hb = self._open()
        cdef int fds[2]
        fds[0] = -1 if tcp_fd is None else tcp_fd
        fds[1] = -1 if second_fd is None else second_fd
        with nogil:
            hb_watch_tcp(hb, fds)

    def watch_links(self, indexes):
        cdef heartbeat *hb = self._open()
        cdef int wanted[LINK_WATCH_MAX]
        cdef unsigned n = _in_range("number of links", len(indexes), 0, LINK_WATCH_MAX)
        for i, index in enumerate(indexes):
            wanted[i] = index
        cdef int error
        with nogil:
            error = hb_watch_links(hb, wanted, n)
        if error:
            raise _failed(error)

    @property
    def fired(self):
        cdef hb_times times
        return REASONS[hb_fired(self._open(), &times)]

    @property
    def times(self):
        cdef hb_times times
        hb_fired(self._open(), &times)
        return {
            "last_heartbeat": times.last_heartbeat or None,
            "detected": times.detected or None,
            "written": times.written or None,
        }

    @property
    def eventfd(self):
        return hb_event_fd(self._open())

    @property
    def address(self):
        return self._address

    def stats(self):
        cdef hb_stats stats
        hb_read_stats(self._open(), &stats)
        cdef const uint64_t *values = <const uint64_t *>&stats
        return {hb_stats_names[i].decode(): values[i] for i in range(N_HB_STATS)}


cdef class MemoryHolder:
    cdef memory_holder _holder
    cdef int _owner

    def __cinit__(self):
        self._owner = os.getpid()
        cdef int error = memory_holder_start(&self._holder)
        if error:
            raise _failed(error)

    def __dealloc__(self):
        self.close()

    @property
    def pid(self):
        return self._holder.pid

    @property
    def alive(self):
        return self._holder.pid != 0 and memory_holder_alive(&self._holder)

    def close(self):
        if self._holder.pid and self._owner == os.getpid():
            memory_holder_stop(&self._holder)


def hold_memory():
    return MemoryHolder()
