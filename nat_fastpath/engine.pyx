# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The NAT core for Python: sessions, events and counters as numpy arrays, frames as bytes.

The typed face with the documentation of every call is engine.pyi.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport usleep

import threading
import time
from collections import namedtuple
from enum import IntEnum

import numpy as np

from nat_fastpath.errors import EventRingFull
from nat_fastpath.tables import copied

cdef extern from "engine_tables.h" nogil:
    enum:
        NAT_ABI, NAT_VERDICT_COUNT, NAT_MAX_PORTS, NAT_MAX_ROUTES, NAT_MAX_RANGES, NAT_MAX_PORT_SPANS, NAT_OUTBOX_BYTES
        NAT_EVERY_SLICE
        NAT_FORWARD, NAT_REPLY, NAT_FRAGMENT, NAT_HANDOFF, NAT_HELD
        NAT_SLICE_ANY, NAT_SLICE_ALL
        NAT_EVENT_OPEN, NAT_EVENT_CLOSE, NAT_EVENT_UPDATE
        NAT_CLOSE_IDLE, NAT_CLOSE_COMMAND, NAT_CLOSE_HOLD_TIMEOUT
        NAT_SESSION_PENDING, NAT_SESSION_FOREIGN, NAT_SESSION_INBOUND, NAT_SESSION_OFFLOAD, NAT_SESSION_PREVAILS
        NAT_CMD_SESSIONS, NAT_CMD_INSTALL, NAT_CMD_DELETE, NAT_CMD_COMMIT, NAT_CMD_FIND
        NAT_CMD_NEIGHBOURS, NAT_CMD_HOSTS, NAT_CMD_ADOPT, NAT_CMD_CEDE, NAT_CMD_UPDATE, NAT_CMD_CHECK
        NAT_CMD_LEARN, NAT_CMD_EXPLAIN, NAT_CMD_TRACE, NAT_CMD_RECONFIGURE, NAT_CMD_REROUTE
        NAT_STEP_KINDS, NAT_EXPLAIN_STEPS, NAT_EXPLAIN_BYTES, NAT_TRACE_RING
        NAT_TRACE_START, NAT_TRACE_READ, NAT_TRACE_STOP
        N_COUNTER_ROWS, N_RECORD_ROWS, N_EVENT_ROWS, N_NEIGHBOUR_ROWS, N_HOST_ROWS
        N_STEP_ROWS, N_TRACE_ROWS, N_TRACE_FILTER_ROWS

    struct name_row:
        const char *name
        const char *text
        const char *help
    struct field_row:
        const char *name
        uint32_t offset
        uint32_t size
    const name_row *verdict_rows
    const field_row *counter_rows
    const field_row *record_rows
    const field_row *event_rows
    const field_row *neighbour_rows
    const field_row *host_rows
    const name_row *step_name_rows
    const field_row *step_rows
    const field_row *trace_rows
    const field_row *trace_filter_rows

    struct nat_stats:
        uint64_t *verdicts
        uint64_t *rx_packets
        uint64_t *rx_bytes
        uint64_t *tx_packets
        uint64_t *tx_bytes
    struct nat_packet:
        uint8_t *data
        uint32_t length
        uint32_t segment
        uint16_t capacity
        uint8_t headroom
        uint8_t handoff
        uint8_t port
        uint8_t verdict
        uint16_t mtu
        void *cookie
    struct nat_piece:
        uint32_t at
        uint32_t bytes
        uint32_t header_bytes
        uint8_t *header
    struct nat_record:
        pass
    struct nat_event:
        pass
    struct nat_neighbour_record:
        pass
    struct nat_host_record:
        pass
    struct nat_step:
        pass
    struct nat_explain:
        pass
    struct nat_trace_entry:
        pass
    struct nat_trace:
        nat_trace_entry *entries
    struct nat_port_config:
        uint8_t side
        uint8_t *mac
        uint32_t address
        uint16_t mtu
        uint16_t vlan
    struct nat_route_config:
        uint32_t prefix
        uint8_t length
        uint8_t port
        uint8_t connected
        uint8_t has_mac
        uint8_t *mac
        uint32_t gateway
    struct nat_neighbour_config:
        uint32_t address
        uint8_t port
        uint8_t *mac
    struct nat_pool_range:
        uint32_t first
        uint32_t last
        uint16_t port_first
        uint16_t port_last
        uint16_t own_first
        uint16_t own_last
    struct nat_port_span:
        uint16_t first
        uint16_t last
    struct nat_config:
        uint32_t abi
        uint8_t instance
        uint8_t mapping
        uint8_t filtering
        uint8_t n_ports
        uint8_t synchronous
        uint8_t port_preservation
        uint8_t port_parity
        uint8_t flow_hash
        uint8_t n_slices
        uint8_t slice
        uint32_t epoch
        uint32_t max_sessions
        uint32_t max_mappings
        uint32_t max_hosts
        uint32_t max_neighbours
        uint32_t max_held
        uint32_t event_ring
        uint32_t sessions_per_host
        uint32_t mappings_per_host
        uint32_t new_sessions_rate
        uint32_t new_sessions_burst
        uint32_t icmp_rate
        uint32_t hold_ms
        uint32_t timeout_udp_ms
        uint32_t timeout_tcp_established_ms
        uint32_t timeout_tcp_transitory_ms
        uint32_t timeout_icmp_ms
        uint32_t quarantine_ms
        uint32_t quarantine_ports
        uint8_t n_port_spans
        nat_port_span *port_spans
        uint64_t seed
        uint8_t n_pool
        uint8_t n_routes
        uint16_t n_neighbours
        nat_port_config *ports
        nat_route_config *routes
        nat_pool_range *pool
        const nat_neighbour_config *neighbours
        void *role
    struct nat_memory:
        uint64_t sessions
        uint64_t index
        uint64_t mappings
        uint64_t hosts
        uint64_t pool
        uint64_t other
        uint64_t total
    struct nat_command:
        uint32_t op
        uint32_t count
        uint64_t cursor
        void *buffer
        uint32_t result
        uint32_t done
    struct nat_core:
        pass
    struct nat_api_table "nat_api":
        pass
    const nat_api_table nat_api

    struct nat_change:
        pass
    nat_change *nat_prepare(const nat_core *core, const nat_config *config, char *error, size_t error_size)
    void nat_change_free(nat_change *change)
    bint nat_change_withdraw(nat_change *change)
    bint nat_change_is_under_way(const nat_change *change)
    const char *nat_change_refused(const nat_change *change)
    uint32_t nat_mappings_on(const nat_core *core, uint32_t address)
    nat_core *nat_create(const nat_config *config, char *error, size_t error_size)
    void nat_destroy(nat_core *core)
    void nat_memory_for(const nat_config *config, nat_memory *out)
    void nat_burst(nat_core *core, nat_packet *packets, unsigned n, uint64_t now)
    void nat_handed(nat_core *core, nat_packet *packets, unsigned n, uint64_t now)
    unsigned nat_slice_of(const uint8_t *frame, uint32_t bytes, unsigned side, unsigned n)
    bint nat_poll(nat_core *core, uint64_t now)
    void nat_settle(nat_core *core, uint64_t now)
    unsigned nat_take(nat_core *core, nat_packet *out, unsigned max)
    unsigned nat_outbox(nat_core *core, uint8_t *frame, uint8_t *port)
    bint nat_cut(const uint8_t *frame, uint16_t mtu, nat_piece *piece)
    void nat_announce(nat_core *core)
    void nat_flush(nat_core *core)
    void nat_command_now(nat_core *core, nat_command *command)
    bint nat_command_push(nat_core *core, nat_command *command)
    unsigned nat_events(nat_core *core, nat_event *out, unsigned max)
    bint nat_events_sleep(nat_core *core)
    const nat_stats *nat_stats_of "nat_stats"(nat_core *core)

cdef extern from "slices.h" nogil:
    unsigned slice_of_host(uint32_t address, unsigned n)
    unsigned slice_of_port(uint16_t port, unsigned n)

cdef extern from "flow_hash.h":
    struct flow_hasher:
        const char *name
    void flow_hasher_fnv(flow_hasher *hasher)

cdef extern from * nogil:
    """
    static inline unsigned command_done(const struct nat_command *c) { return __atomic_load_n(&c->done, __ATOMIC_ACQUIRE); }
    """
    unsigned command_done(const nat_command *command)


cdef _dtype(const field_row *rows, unsigned n, size_t size):
    fields = [(rows[i].name.decode(), f"<u{rows[i].size}", rows[i].offset) for i in range(n)]
    names, formats, offsets = zip(*fields)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


RECORD = _dtype(record_rows, N_RECORD_ROWS, sizeof(nat_record))
EVENT = _dtype(event_rows, N_EVENT_ROWS, sizeof(nat_event))
NEIGHBOUR = _dtype(neighbour_rows, N_NEIGHBOUR_ROWS, sizeof(nat_neighbour_record))
HOST = _dtype(host_rows, N_HOST_ROWS, sizeof(nat_host_record))
STEP = _dtype(step_rows, N_STEP_ROWS, sizeof(nat_step))
STEP_KINDS = tuple(step_name_rows[i].text.decode() for i in range(NAT_STEP_KINDS))
TRACE = _dtype(trace_rows, N_TRACE_ROWS, sizeof(nat_trace_entry))
TRACE_FILTER = _dtype(trace_filter_rows, N_TRACE_FILTER_ROWS, sizeof(nat_trace) - NAT_TRACE_RING * sizeof(nat_trace_entry))
_EXPLAIN = np.dtype([
    ("length", "<u4"), ("mtu", "<u2"), ("port", "u1"), ("verdict", "u1"), ("n_steps", "<u2"), ("handoff", "u1"),
    ("reserved", "u1"), ("steps", STEP, NAT_EXPLAIN_STEPS), ("room", "u1", 4), ("frame", "u1", NAT_EXPLAIN_BYTES),
])
_TRACE = np.dtype([("head", TRACE_FILTER), ("entries", TRACE, NAT_TRACE_RING)])
assert _EXPLAIN.itemsize == sizeof(nat_explain) and _TRACE.itemsize == sizeof(nat_trace)

Verdict = IntEnum("Verdict", {verdict_rows[i].name.decode(): i for i in range(NAT_VERDICT_COUNT)}, module=__name__)
VERDICT_NAMES = tuple(verdict_rows[i].text.decode() for i in range(NAT_VERDICT_COUNT))
VERDICT_HELP = tuple(verdict_rows[i].help.decode() for i in range(NAT_VERDICT_COUNT))
_VERDICTS = tuple(Verdict)

EVENT_OPEN = NAT_EVENT_OPEN
EVENT_CLOSE = NAT_EVENT_CLOSE
EVENT_UPDATE = NAT_EVENT_UPDATE
CLOSE_REASONS = {NAT_CLOSE_IDLE: "idle", NAT_CLOSE_COMMAND: "command", NAT_CLOSE_HOLD_TIMEOUT: "hold timeout"}
TCP_STATES = (
    "none", "syn_out", "syn_in", "syn_both", "established", "fin_out", "fin_in", "closing", "reset"
)  # fmt: skip
NEIGHBOUR_STATES = ("free", "incomplete", "reachable", "probe", "static")
FLAG_PENDING = NAT_SESSION_PENDING
FLAG_FOREIGN = NAT_SESSION_FOREIGN
FLAG_INBOUND = NAT_SESSION_INBOUND
FLAG_OFFLOAD = NAT_SESSION_OFFLOAD
FLAG_PREVAILS = NAT_SESSION_PREVAILS  # of a record to be installed: see nat.h
SLICE_ANY = NAT_SLICE_ANY
SLICE_ALL = NAT_SLICE_ALL

_SIDES = {"internal": 0, "external": 1}
_MAPPINGS = {"endpoint-independent": 0, "endpoint-dependent": 1}
_HASHES = {"fnv": 0, "aes": 1}
_FILTERINGS = {"address-and-port-dependent": 0, "address-dependent": 1, "endpoint-independent": 2}

Result = namedtuple("Result", ("verdict", "port", "frame", "frames", "handoff"), defaults=(0,))
Explanation = namedtuple("Explanation", ("verdict", "port", "frame", "mtu", "steps", "handoff"), defaults=(0,))
Trace = namedtuple("Trace", ("entries", "running", "packets", "missed"))


class CoreError(Exception):
    """The configuration or the memory does not allow a core; the message says why."""


def _choice(choices, value, what):
    try:
        return choices[value]
    except KeyError:
        raise CoreError(f"{what}: {value!r} is none of {', '.join(choices)}") from None


def _milliseconds(seconds):
    return min(round(seconds * 1000), 0xFFFFFFFF)


cdef int _put_mac(uint8_t *out, mac) except -1:
    if len(mac) != 6:
        raise CoreError(f"a MAC has 6 bytes, not {len(mac)}")
    cdef const uint8_t[::1] view = mac
    memcpy(out, &view[0], 6)
    return 0


cdef class _Configuration:
    """struct nat_config, with the memory of its neighbours."""

    cdef nat_config c
    cdef nat_neighbour_config *neighbours

    def __cinit__(self, config):
        memset(&self.c, 0, sizeof(self.c))
        self.neighbours = NULL
        cdef nat_config *c = &self.c
        limits = ("ports", NAT_MAX_PORTS), ("pool", NAT_MAX_RANGES), ("routes", NAT_MAX_ROUTES)
        for name, limit in (*limits, ("port_ranges", NAT_MAX_PORT_SPANS)):
            if len(getattr(config, name)) > limit:
                raise CoreError(f"{name}: {len(getattr(config, name))}, and a core takes {limit} at most")
        if len(config.neighbours) >= 1 << 16:
            raise CoreError(f"neighbours: {len(config.neighbours)}, and a core takes 65535 at most")
        c.abi = NAT_ABI
        c.instance = config.instance
        c.epoch = config.epoch
        c.n_slices, c.slice = config.n_slices, NAT_EVERY_SLICE if config.slice is None else config.slice
        c.mapping = _choice(_MAPPINGS, config.mapping, "mapping")
        c.filtering = _choice(_FILTERINGS, config.filtering, "filtering")
        c.synchronous = config.synchronous
        c.max_sessions = config.max_sessions
        c.max_mappings = config.max_mappings
        c.max_hosts = config.max_hosts
        c.max_neighbours = config.max_neighbours
        c.max_held = config.max_held
        c.event_ring = 1 << max(config.event_ring - 1, 0).bit_length()
        c.sessions_per_host = config.sessions_per_host
        c.mappings_per_host = config.mappings_per_host
        c.new_sessions_rate = config.new_sessions_rate
        c.new_sessions_burst = config.new_sessions_burst
        c.icmp_rate = config.icmp_rate
        c.hold_ms = _milliseconds(config.hold)
        c.timeout_udp_ms = _milliseconds(config.udp_timeout)
        c.timeout_tcp_established_ms = _milliseconds(config.tcp_established_timeout)
        c.timeout_tcp_transitory_ms = _milliseconds(config.tcp_transitory_timeout)
        c.timeout_icmp_ms = _milliseconds(config.icmp_timeout)
        c.quarantine_ms = _milliseconds(config.quarantine)
        c.quarantine_ports = config.quarantine_ports
        c.port_preservation = config.port_preservation
        c.port_parity = config.port_parity
        c.flow_hash = _choice(_HASHES, config.flow_hash, "flow_hash")
        c.n_port_spans = len(config.port_ranges)
        for i, (first, last) in enumerate(config.port_ranges):
            c.port_spans[i].first, c.port_spans[i].last = first, last
        c.seed, c.role = config.seed, <void *><uintptr_t>config.role
        c.n_ports = len(config.ports)
        for i, port in enumerate(config.ports):
            c.ports[i].side = _choice(_SIDES, port.side, f"ports[{i}].side")
            _put_mac(c.ports[i].mac, port.mac)
            c.ports[i].address = int(port.address)
            c.ports[i].mtu = port.mtu
            c.ports[i].vlan = port.vlan
        c.n_routes = len(config.routes)
        for i, route in enumerate(config.routes):
            c.routes[i].prefix = int(route.prefix)
            c.routes[i].length = route.length
            c.routes[i].port = route.port
            c.routes[i].gateway = int(route.gateway)
            c.routes[i].connected = not int(route.gateway)
            if route.gateway_mac is not None:
                c.routes[i].has_mac = 1
                _put_mac(c.routes[i].mac, route.gateway_mac)
        c.n_pool = len(config.pool)
        for i, part in enumerate(config.pool):
            own = part.own or part.ports
            c.pool[i].first = int(part.first)
            c.pool[i].last = int(part.last)
            c.pool[i].port_first, c.pool[i].port_last = part.ports
            c.pool[i].own_first, c.pool[i].own_last = own
        c.n_neighbours = len(config.neighbours)
        if config.neighbours:
            self.neighbours = <nat_neighbour_config *>calloc(len(config.neighbours), sizeof(nat_neighbour_config))
            if self.neighbours == NULL:
                raise MemoryError
            c.neighbours = self.neighbours
        for i, neighbour in enumerate(config.neighbours):
            self.neighbours[i].address = int(neighbour.address)
            self.neighbours[i].port = neighbour.port
            _put_mac(self.neighbours[i].mac, neighbour.mac)

    def __dealloc__(self):
        free(self.neighbours)

    def memory(self):
        cdef nat_memory m
        nat_memory_for(&self.c, &m)
        return dict(m)


def hash_path():
    """The code that hashes on this CPU: "avx512", "avx2" or "baseline"."""
    cdef flow_hasher hasher
    flow_hasher_fnv(&hasher)
    return hasher.name.decode()


def memory_for(config):
    """What ``Core(config)`` would take, in bytes by part, without taking it."""
    return _Configuration(config).memory()


cdef _slices(given, unsigned n, bint of_ports):
    found = np.empty(np.shape(given), np.uint8)
    cdef const uint32_t[::1] values = given.astype(np.uint32).reshape(-1)
    cdef uint8_t[::1] out = found.reshape(-1)
    cdef Py_ssize_t i
    for i in range(values.shape[0]):
        out[i] = slice_of_port(<uint16_t>values[i], n) if of_ports else slice_of_host(values[i], n)
    return found


def slice_of_hosts(addresses, unsigned n):
    """The slice of each inside address, of ``n``; shape of ``addresses``, uint8."""
    return _slices(np.asarray(addresses, np.uint32), n, False)


def slice_of_ports(ports, unsigned n):
    """The slice of each external port, of ``n``; shape of ``ports``, uint8."""
    return _slices(np.asarray(ports, np.uint16), n, True)


def slice_of(frame, side, n_slices):
    """Whose packet a frame from a wire is, of ``n_slices`` cores: a slice, SLICE_ANY or SLICE_ALL."""
    cdef const uint8_t[::1] view = frame
    return nat_slice_of(&view[0] if len(view) else NULL, <uint32_t>len(view), _choice(_SIDES, side, "side"), n_slices)


# An answer may be longer than the question: an ICMP error has up to 576 bytes.
cdef enum:
    ANSWER_BYTES = 640
    HEADROOM = 4  # for a VLAN tag
    MOST_CAPACITY = 0xFFFF - HEADROOM
# Without any progress for so long, the worker is taken for dead.
COMMAND_PATIENCE = 2.0  # seconds
SILENT = "the worker does not answer: it is stopped, or events are not taken"
_POSTS = {"install": NAT_CMD_INSTALL, "delete": NAT_CMD_DELETE, "commit": NAT_CMD_COMMIT,
          "update": NAT_CMD_UPDATE, "holds": NAT_CMD_CHECK}


cdef object _result(const nat_packet *packet):
    cdef nat_piece piece
    frame, frames = b"", ()
    if packet.verdict <= NAT_FRAGMENT:
        frame = PyBytes_FromStringAndSize(<char *>packet.data, packet.length)
        frames = (frame,)
    if packet.verdict == NAT_FRAGMENT:
        pieces = []
        memset(&piece, 0, sizeof(piece))
        while nat_cut(packet.data, packet.mtu, &piece):
            pieces.append(piece.header[:piece.header_bytes] + frame[piece.at : piece.at + piece.bytes])
        frames = tuple(pieces)
    if packet.verdict == NAT_HANDOFF:
        frame = PyBytes_FromStringAndSize(<char *>packet.data, packet.length)
    return Result(_VERDICTS[packet.verdict], packet.port, frame, frames,
                  packet.handoff if packet.verdict == NAT_HANDOFF else 0)


cdef bint _done(nat_command *command):
    """Waits for it as long as the worker gets on with it."""
    patience = time.monotonic() + COMMAND_PATIENCE
    cdef uint64_t seen = command.cursor
    while not command_done(command):
        with nogil:
            usleep(50)
        if command.cursor != seen:
            seen = command.cursor
            patience = time.monotonic() + COMMAND_PATIENCE
        elif time.monotonic() > patience:
            return False
    return True


cdef class Posted:
    """A command that was given to the worker and is not waited for."""

    cdef nat_command *command
    cdef readonly object records  # the worker reads and writes them until it is done

    def result(self):
        """How many records were handled, or None as long as the worker has not come to it."""
        return self.command.result if command_done(self.command) else None

    def wait(self):
        """How many records were handled, when they are. Raises EventRingFull and TimeoutError."""
        if not _done(self.command):
            raise TimeoutError(SILENT)
        if self.command.cursor < self.command.count:
            raise EventRingFull(self.records[self.command.cursor:], self.command.count, self.command.result)
        return self.command.result

    def __dealloc__(self):
        # one that the worker may still come to must stay where it is
        if self.command != NULL and command_done(self.command):
            free(self.command)


cdef class Change:
    """Another configuration for a core, prepared: memory is taken, and nothing is changed yet."""

    cdef Core core
    cdef nat_change *change
    cdef _Configuration configuration
    cdef readonly object config
    cdef bint over

    def __cinit__(self, Core core, config):
        cdef char error[256]
        self.core, self.config, self.configuration, self.change = core, config, _Configuration(config), NULL
        with nogil:
            self.change = nat_prepare(core.core, &self.configuration.c, error, sizeof(error))
        if self.change == NULL:
            raise CoreError(error.decode())

    def apply(self):
        """Puts it in force. Raises CoreError when it is refused or not begun, TimeoutError when the worker stops in it."""
        if self.over:
            raise RuntimeError("this change was applied, or refused, already")
        self.over = True
        try:
            applied, _ = self.core._carry_out(NAT_CMD_RECONFIGURE, 1, 0, self.change, self)
        except TimeoutError as error:
            if nat_change_withdraw(self.change):
                raise CoreError(str(error)) from None
            raise
        if not applied:
            raise CoreError(nat_change_refused(self.change).decode())
        self.core.config, self.core.configuration = self.config, self.configuration

    def reroute(self):
        """After ``apply``: sessions whose routes are others now go the new ways, in pages; returns how many did."""
        moved, cursor = 0, 0
        while True:
            some, cursor = self.core._carry_out(NAT_CMD_REROUTE, 4096, cursor, self.change, self)
            moved += some
            if not cursor:
                return moved

    def __dealloc__(self):
        nat_change_free(self.change)


cdef class Core:
    """One NAT core, owned by the thread that calls it, until a worker takes it over with ``attach``."""

    cdef nat_core *core
    cdef readonly object config  # in force
    cdef _Configuration configuration
    cdef bint attached
    cdef object lock
    cdef list abandoned

    def __cinit__(self, config):
        self.core = NULL
        self.attached = False
        self.lock = threading.Lock()
        self.abandoned = []
        self.config = config
        self.configuration = _Configuration(config)
        cdef char error[256]
        with nogil:
            self.core = nat_create(&self.configuration.c, error, sizeof(error))
        if self.core == NULL:
            raise CoreError(error.decode())

    def __dealloc__(self):
        # A worker that still runs on this memory must never find it gone.
        cdef nat_packet packet
        if self.core != NULL and not self.attached:
            nat_flush(self.core)
            while nat_take(self.core, &packet, 1):
                free(packet.cookie)
            nat_destroy(self.core)

    def close(self):
        """Gives the memory back. Raises RuntimeError while a worker is attached."""
        with self.lock:  # another thread may be about to carry out a command
            if self.core == NULL:
                return
            self._own()
            self.flush()
            nat_destroy(self.core)
            self.core = NULL

    cdef int _alive(self) except -1:
        if self.core == NULL:
            raise RuntimeError("this core is closed")
        return 0

    cdef int _own(self) except -1:
        self._alive()
        if self.attached:
            raise RuntimeError("a worker owns this core: stop it first")
        return 0

    @property
    def address(self):
        """The ``struct nat_core *`` as an integer, for a native worker. Keep the Core alive while it is used."""
        self._alive()
        return <uintptr_t>self.core

    @staticmethod
    def api_address():
        """The ``const struct nat_api *`` as an integer."""
        return <uintptr_t>&nat_api

    def attach(self):
        """From now on a worker owns the core: commands go through the ring instead of being carried out at once."""
        with self.lock:
            self._own()
            self.attached = True

    def detach(self):
        """The worker has ended; the core belongs to the caller again."""
        with self.lock:
            self.attached = False

    # -- packets ---------------------------------------------------------------------------------------

    def burst(self, frames, now_ns):
        """Sends (port, frame) pairs through the core as one call; one Result each, in order."""
        return self._burst([(port, frame, 0) for port, frame in frames], now_ns, False)

    def handed(self, frames, now_ns):
        """As ``burst``, for (port, frame, handoff) that another core had."""
        return self._burst(frames, now_ns, True)

    cdef list _burst(self, frames, now_ns, bint handed):
        self._own()
        cdef unsigned n = len(frames), i
        cdef uint64_t now = now_ns
        cdef const uint8_t[::1] view
        cdef nat_packet *packets = <nat_packet *>calloc(n or 1, sizeof(nat_packet))
        if packets == NULL:
            raise MemoryError
        try:
            for i, (port, frame, handoff) in enumerate(frames):
                if not 0 <= port < self.configuration.c.n_ports:
                    raise ValueError(f"port {port}: there are {self.configuration.c.n_ports}")
                packets[i].length = packets[i].segment = len(frame)
                packets[i].capacity = min(max(len(frame), ANSWER_BYTES), MOST_CAPACITY)
                packets[i].headroom = HEADROOM
                packets[i].port, packets[i].handoff = port, handoff
                packets[i].cookie = malloc(HEADROOM + max(len(frame), ANSWER_BYTES))
                if packets[i].cookie == NULL:
                    raise MemoryError
                packets[i].data = <uint8_t *>packets[i].cookie + HEADROOM
                if len(frame):
                    view = frame
                    memcpy(packets[i].data, &view[0], len(frame))
            with nogil:
                (nat_handed if handed else nat_burst)(self.core, packets, n, now)
            results = []
            for i in range(n):
                results.append(_result(&packets[i]))
                if packets[i].verdict == NAT_HELD:
                    packets[i].cookie = NULL  # until take()
            return results
        finally:
            for i in range(n):
                free(packets[i].cookie)
            free(packets)

    def poll(self, now_ns):
        """Bounded work between bursts; returns whether it found anything to do."""
        self._own()
        return nat_poll(self.core, now_ns)

    def settle(self, now_ns):
        """Polls until the ageing sweep has seen every session once at ``now_ns``."""
        self._own()
        cdef uint64_t now = now_ns
        with nogil:
            nat_settle(self.core, now)

    def take(self):
        """Held packets that have a final verdict now."""
        self._own()
        cdef nat_packet packet
        results = []
        while nat_take(self.core, &packet, 1):
            results.append(_result(&packet))
            free(packet.cookie)
        return results

    def flush(self):
        """Gives up all held packets, and returns them."""
        self._own()
        nat_flush(self.core)
        return self.take()

    def outbox(self):
        """(port, frame) pairs that the core itself wants sent."""
        self._own()
        cdef uint8_t frame[NAT_OUTBOX_BYTES]
        cdef uint8_t port
        cdef unsigned length
        frames = []
        while True:
            length = nat_outbox(self.core, frame, &port)
            if not length:
                return frames
            frames.append((port, PyBytes_FromStringAndSize(<char *>frame, length)))

    def announce(self):
        """Announces our addresses by gratuitous ARP, through the outbox."""
        self._own()
        nat_announce(self.core)

    # -- commands --------------------------------------------------------------------------------------

    cdef tuple _command(self, unsigned op, buffer, uint64_t cursor):
        """Carries out a command on a record array; returns (result, cursor)."""
        cdef uint8_t[::1] view = buffer.view(np.uint8)
        return self._carry_out(op, len(buffer), cursor, &view[0] if len(view) else NULL, buffer)

    cdef tuple _carry_out(self, unsigned op, unsigned count, uint64_t cursor, void *buffer, keeper):
        """The same for any memory, which ``keeper`` holds."""
        cdef nat_command *command = <nat_command *>calloc(1, sizeof(nat_command))
        if command == NULL:
            raise MemoryError
        command.op = op
        command.count = count
        command.cursor = cursor
        command.buffer = buffer
        with self.lock:
            if self.core == NULL:
                free(command)
                self._alive()
            if not self.attached:
                with nogil:
                    nat_command_now(self.core, command)
            elif not (self._push(command) and _done(command)):
                # The worker may still come back and write there: this memory must stay.
                self.abandoned.append(keeper)
                raise TimeoutError(SILENT)
        answer = (command.result, command.cursor)
        free(command)
        return answer

    cdef bint _push(self, nat_command *command):
        patience = time.monotonic() + COMMAND_PATIENCE
        while not nat_command_push(self.core, command):
            if time.monotonic() > patience:
                return False
            with nogil:
                usleep(50)
        return True

    def sessions(self, cursor=0, maximum=4096):
        """Up to ``maximum`` records and the cursor of the next page, 0 at the end."""
        records = np.zeros(maximum, RECORD)
        n, following = self._command(NAT_CMD_SESSIONS, records, cursor)
        return records[:n], following

    def find(self, protocol, source, destination, side="internal"):
        """The record of the session that a packet with this 5-tuple belongs to, or None."""
        record = np.zeros(1, RECORD)
        record["protocol"] = protocol
        (source_address, source_port), (destination_address, destination_port) = source, destination
        if _choice(_SIDES, side, "side") == 0:
            record["internal_addr"], record["internal_port"] = int(source_address), source_port
            record["remote_addr"], record["remote_port"] = int(destination_address), destination_port
        else:
            record["flags"] = NAT_SESSION_INBOUND
            record["remote_addr"], record["remote_port"] = int(source_address), source_port
            record["external_addr"], record["external_port"] = int(destination_address), destination_port
        found, _ = self._command(NAT_CMD_FIND, record, 0)
        return record[0] if found else None

    cdef _records(self, unsigned op, records):
        given = copied(records, RECORD)
        done, cursor = self._command(op, given, 0)
        if cursor < len(given):
            raise EventRingFull(given[cursor:], len(given), done)
        return done

    def install(self, records):
        """Installs sessions from the peer or the operator; returns how many are held now."""
        return self._records(NAT_CMD_INSTALL, records)

    def delete(self, records):
        """Ends the sessions of these records (by 5-tuple and id); returns how many there were."""
        return self._records(NAT_CMD_DELETE, records)

    def commit(self, records):
        """Lets the packets of these pending sessions go; returns how many sessions there were."""
        return self._records(NAT_CMD_COMMIT, records)

    def post_commit(self, records):
        """As ``commit``, without waiting for the worker; returns a Posted."""
        return self.post("commit", records)

    def post(self, what, records):
        """Begins ``what``: install, delete, commit, update or holds; returns a Posted."""
        cdef Posted posted = Posted()
        posted.records = copied(records, RECORD)
        posted.records["reserved0"] = 0  # where ``holds`` is answered
        cdef uint8_t[::1] view = posted.records.view(np.uint8)
        posted.command = <nat_command *>calloc(1, sizeof(nat_command))
        if posted.command == NULL:
            raise MemoryError
        posted.command.op, posted.command.count = _POSTS[what], len(posted.records)
        posted.command.buffer = &view[0] if len(view) else NULL
        with self.lock:
            self._alive()
            self.abandoned = [one for one in self.abandoned if not isinstance(one, Posted) or one.result() is None]
            self.abandoned.append(posted)
            if not self.attached:
                nat_command_now(self.core, posted.command)
            elif not self._push(posted.command):
                raise TimeoutError(SILENT)
        return posted

    def adopt(self):
        """The peer's sessions become ours, and all timers restart; returns how many became ours."""
        return self._command(NAT_CMD_ADOPT, np.zeros(1, RECORD), 0)[0]

    def cede(self, instance, besides=()):
        """Sessions with this instance in their id become the peer's, but those with the ids ``besides`` ours; how many."""
        ids = np.unique(np.asarray(besides, np.uint64))
        return self._command(NAT_CMD_CEDE, np.insert(ids, 0, instance), 0)[0]

    def update(self, records):
        """TCP state, idle time and counters of the sessions that are held; returns how many were."""
        return self._records(NAT_CMD_UPDATE, records)

    def holds(self, records):
        """Whether each is held under its 5-tuple and id; shape (n,), bool."""
        asked = copied(records, RECORD)
        asked["reserved0"] = 0
        self._command(NAT_CMD_CHECK, asked, 0)
        return asked["reserved0"] == 1

    cdef _all(self, unsigned op, dtype):
        parts, cursor = [], 0
        while True:
            part = np.zeros(4096, dtype)
            n, cursor = self._command(op, part, cursor)
            parts.append(part[:n])
            if not cursor:
                return np.concatenate(parts)

    def neighbours(self):
        """The next hops, dtype NEIGHBOUR."""
        return self._all(NAT_CMD_NEIGHBOURS, NEIGHBOUR)

    def learn(self, neighbours):
        """Next hops that the peer knows, dtype NEIGHBOUR: the later confirmation counts; returns how many were news."""
        return self._command(NAT_CMD_LEARN, np.array(neighbours, NEIGHBOUR, copy=True, ndmin=1), 0)[0]

    def hosts(self):
        """The inside hosts that have a session, dtype HOST."""
        return self._all(NAT_CMD_HOSTS, HOST)

    def prepare(self, config):
        """Another configuration, checked, with all memory that it takes; ``apply`` of the Change puts it in force."""
        self._alive()
        for one in self.abandoned:
            if isinstance(one, Change) and nat_change_is_under_way((<Change>one).change):
                raise CoreError("the worker has stopped in the midst of another change")
        return Change(self, config)

    def mappings_on(self, address):
        """How many mappings an address of the pool has, about now."""
        with self.lock:  # a change replaces what is looked at
            self._alive()
            return nat_mappings_on(self.core, int(address))

    def explain(self, port, frame, length=None, handoff=0):
        """What would become of a frame that came by ``port`` now, and why; nothing is changed or sent."""
        if not 0 <= port < self.configuration.c.n_ports:
            raise ValueError(f"port {port}: there are {self.configuration.c.n_ports}")
        question = np.zeros(1, _EXPLAIN)
        there = min(len(frame), NAT_EXPLAIN_BYTES)
        question["port"], question["length"] = port, len(frame) if length is None else max(length, len(frame))
        question["handoff"] = handoff
        question["frame"][0, :there] = np.frombuffer(frame, np.uint8, there)
        self._command(NAT_CMD_EXPLAIN, question, 0)
        answer = question[0]
        left = b""
        if answer["verdict"] <= NAT_HELD:
            left = answer["frame"].tobytes()[: min(int(answer["length"]), NAT_EXPLAIN_BYTES)]
        return Explanation(_VERDICTS[answer["verdict"]], int(answer["port"]), left, int(answer["mtu"]),
                           answer["steps"][: int(answer["n_steps"])].copy(), int(answer["handoff"]))

    def trace_start(self, packets, seconds, **flow):
        """Begins to trace; returns the token, or None when another trace runs."""
        trace = np.zeros(1, _TRACE)
        head = trace["head"]
        head["action"], head["packets"], head["milliseconds"] = NAT_TRACE_START, packets, _milliseconds(seconds)
        for name, value in flow.items():
            head[name] = value
        started, _ = self._command(NAT_CMD_TRACE, trace, 0)
        return int(head["token"][0]) if started else None

    def trace_read(self, token, stop=False):
        """Takes what has been traced; ``stop`` ends the trace. Raises KeyError when it is not this token's."""
        trace = np.zeros(1, _TRACE)
        trace["head"]["action"] = NAT_TRACE_STOP if stop else NAT_TRACE_READ
        trace["head"]["token"] = token
        known, _ = self._command(NAT_CMD_TRACE, trace, 0)
        if not known:
            raise KeyError(token)
        head = trace["head"][0]
        return Trace(trace["entries"][0, : int(head["n_entries"])].copy(), bool(head["running"]),
                     int(head["packets"]), int(head["missed"]))

    # -- what may be read at any time --------------------------------------------------------------------

    def events(self, maximum=65536):
        """Takes up to ``maximum`` events out of the ring; shape (n,), dtype EVENT."""
        self._alive()
        waiting = (<const uint64_t *>(<const uint8_t *>nat_stats_of(self.core) + counter_rows[N_COUNTER_ROWS - 1].offset))[0]
        events = np.empty(min(maximum, waiting), EVENT)
        cdef uint8_t[::1] view
        cdef unsigned n = 0
        if len(events):
            view = events.view(np.uint8)
            n = nat_events(self.core, <nat_event *>&view[0], <unsigned>len(events))
        return events[:n]

    def events_sleep(self):
        """Before waiting for the worker's wake-up: true when there is nothing to take, and the next event wakes."""
        self._alive()
        return nat_events_sleep(self.core)

    def verdicts(self):
        """Packets by verdict; shape (len(Verdict),)."""
        self._alive()
        cdef const nat_stats *stats = nat_stats_of(self.core)
        return np.array([stats.verdicts[i] for i in range(NAT_VERDICT_COUNT)], np.uint64)

    def counters(self):
        """All other counters and gauges by name: rx_packets.0, tx_bytes.1, sessions, mappings, ..."""
        self._alive()
        cdef const nat_stats *stats = nat_stats_of(self.core)
        cdef unsigned i
        out = {}
        for i in range(self.configuration.c.n_ports):
            out[f"rx_packets.{i}"] = stats.rx_packets[i]
            out[f"rx_bytes.{i}"] = stats.rx_bytes[i]
            out[f"tx_packets.{i}"] = stats.tx_packets[i]
            out[f"tx_bytes.{i}"] = stats.tx_bytes[i]
        for i in range(N_COUNTER_ROWS):
            out[counter_rows[i].name.decode()] = (
                <const uint64_t *>(<const uint8_t *>stats + counter_rows[i].offset))[0]
        return out

    def memory(self):
        """Bytes by part: sessions, index, mappings, hosts, pool, other, total."""
        return self.configuration.memory()
