# SPDX-License-Identifier: Apache-2.0
"""EAL, mempools and ports of DPDK for Python.  Whatever DPDK refuses raises DpdkError with DPDK's own text."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NamedTuple

from nat_fastpath import devargs as words
from nat_fastpath.dpdk._dpdk import ffi, lib
from nat_fastpath.dpdk.kernel_interface import Interface, InterfaceError, below_default_route, interface_names
from nat_fastpath.dpdk.packet_ring import SOL_PACKET, Ring

RX_DESCRIPTORS = TX_DESCRIPTORS = 1024
PACKET_STATISTICS = 6  # linux/if_packet.h
ETHERNET_OVERHEAD = 14 + 2 * 4  # header and two VLAN tags
TPACKET_OVERHEAD = 128  # what AF_PACKET writes before a frame in its ring, rounded up
PMDS_THAT_CONNECT = {"net_memif", "net_virtio_user"}
PMDS_OF_KERNEL_PACKETS = {"net_af_packet", "net_af_xdp", "net_pcap"}
AF_XDP_BUFFERS = 16384  # with a smaller pool AF_XDP opens, and receives nothing
AF_XDP_FRAME = 2048  # a buffer with its headers lies in a page; the next size does not
UNKNOWN_DRIVER = "failed to parse device"  # in DPDK's words
HANDSHAKE = 10  # seconds that the other end of a memif has, once it is connected; it may be starting itself
_open: set[int] = set()  # port ids: DPDK gives one out again for the same name


class DpdkError(Exception):
    """DPDK refused; one line: what was tried, and DPDK's own reason."""


def _log() -> list[str]:
    buffer = ffi.new("char[]", 8192)
    n = lib.log_take(buffer, len(buffer))
    return [
        line.strip() for line in ffi.unpack(buffer, n).decode(errors="replace").splitlines() if line.strip()
    ]


def _check(rc: int, what: str) -> int:
    """Returns ``rc``, or raises with DPDK's text for it: a negative errno, or -1 and rte_errno."""
    if rc >= 0:
        return rc
    code = lib.error_number() if rc == -1 else -rc
    reasons = [ffi.string(lib.rte_strerror(code)).decode(), *_log()[-3:]]
    raise DpdkError(f"{what}: {'; '.join(reasons)}")


class Eal:
    """The environment of DPDK; once per process, for DPDK cannot be started again.

    Memory comes from hugepages when ``memory_mb`` of them are free, from ordinary pages otherwise.  The calling
    thread keeps its CPU affinity, which DPDK would take away.  Of PCI devices only those among ``devices``
    are touched.  ``arguments`` are added to EAL's own.
    """

    def __init__(
        self,
        *,
        memory_mb: int = 256,
        cpu: int | None = None,
        devices: Sequence[str] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        self.hugepages = _free_hugepages_mb() >= memory_mb
        affinity = os.sched_getaffinity(0)
        line = ["tandem-nat", f"--lcores=0@{min(affinity) if cpu is None else cpu}", "--no-telemetry"]
        line += ["--in-memory", "--iova-mode=va"] if self.hugepages else ["--no-huge", "--no-shconf"]
        line.append("--single-file-segments")  # another process maps it: vhost-user, memif without a copy
        line += ["-m", str(memory_mb)]
        allowed = [
            word
            for device in devices
            if words.pci_address(device)
            for word in ("-a", words.canonical(device))
        ]
        line += [*(allowed or ["--no-pci"]), *arguments]
        # EAL keeps pointers into its argument list
        self._strings = [ffi.new("char[]", argument.encode()) for argument in line]
        self._argv = ffi.new("char *[]", self._strings)
        if lib.log_capture() < 0:
            raise DpdkError("no memory for DPDK's log")
        try:
            _check(lib.rte_eal_init(len(line), self._argv), f"DPDK does not start ({' '.join(line[1:])})")
            lib.log_capture_xdp()
        finally:
            os.sched_setaffinity(0, affinity)

    @property
    def version(self) -> str:
        return str(ffi.string(lib.rte_version()).decode())

    def close(self) -> None:
        """Gives all of DPDK's resources back; nothing of DPDK may be used afterwards."""
        lib.gate_end()
        lib.rte_eal_cleanup()


def _free_hugepages_mb() -> int:
    total = 0
    for folder in Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB"):
        total += int((folder / "free_hugepages").read_text()) * int(folder.name[10:-2]) // 1024
    return total


def _frame_size(mtu: int) -> int:
    """Bytes of a slot that holds a frame of this MTU, as AF_PACKET wants it: a power of two."""
    return max(2048, 1 << (mtu + ETHERNET_OVERHEAD + TPACKET_OVERHEAD - 1).bit_length())


class Mempool:
    """``count`` packet buffers, each for a frame of ``mtu`` IP bytes in one piece."""

    def __init__(self, name: str, count: int = 16384, mtu: int = 1500) -> None:
        self.name, self.count, self.mtu = name, count, mtu
        room = lib.RTE_PKTMBUF_HEADROOM + _frame_size(mtu)
        self._pool = lib.pool_create(name.encode(), count, room, not lib.rte_eal_has_hugepages())
        if self._pool == ffi.NULL:
            _check(-1, f"no mempool of {count} buffers ({count * room >> 20} MB)")

    @property
    def address(self) -> int:
        """Of the struct rte_mempool, for other native code of this process."""
        return int(ffi.cast("uintptr_t", self._pool))

    @property
    def available(self) -> int:
        return int(lib.rte_mempool_avail_count(self._pool))

    @property
    def in_use(self) -> int:
        return int(lib.rte_mempool_in_use_count(self._pool))

    def close(self) -> None:
        """Only when no port and no packet uses it any more."""
        lib.rte_mempool_free(self._pool)


class Link(NamedTuple):
    """State of a port's link; ``speed_mbps`` is 0 where the device does not know."""

    up: bool
    speed_mbps: int
    full_duplex: bool


class PortInfo(NamedTuple):
    """A port that DPDK knows."""

    port_id: int
    name: str
    driver: str
    mac: bytes


def ports() -> list[PortInfo]:
    """All ports that DPDK has probed, ours or not."""
    found = []
    port_id = lib.rte_eth_find_next(0)
    while port_id < lib.RTE_MAX_ETHPORTS:
        name = ffi.new("char[64]")
        lib.rte_eth_dev_get_name_by_port(port_id, name)
        found.append(PortInfo(port_id, ffi.string(name).decode(), _driver(port_id), _mac(port_id)))
        port_id = lib.rte_eth_find_next(port_id + 1)
    return found


def _info(port_id: int) -> Any:
    info = ffi.new("struct rte_eth_dev_info *")
    _check(lib.rte_eth_dev_info_get(port_id, info), f"port {port_id}")
    return info


def _driver(port_id: int) -> str:
    return str(ffi.string(_info(port_id).driver_name).decode())


def _mac(port_id: int) -> bytes:
    mac = ffi.new("struct rte_ether_addr *")
    _check(lib.rte_eth_macaddr_get(port_id, mac), f"port {port_id}: MAC")
    return bytes(mac.addr_bytes)


class Port:
    """A started port, with a receive and a transmit queue for each of ``queues`` workers if its RSS can bring each of
    them its packets, else with one of each; ``spread`` says which ("rss", "software: why"; "" for one worker).

    ``device`` is the name of a kernel interface of this network namespace, or DPDK's devargs
    (``net_memif0,role=client``, ``0000:03:00.0``).  AF_XDP carries a kernel interface where it opens, AF_PACKET
    otherwise; ``driver`` (``af_xdp``, ``af_packet``) wants one of them.  ``mac`` overrides the device's own.  A kernel
    interface is prepared first and put back by ``close``: see kernel_interface.  ``addresses`` are those that
    the NAT will answer for: the kernel must not have them.  ``tagged``: VLAN tags must come within the frames.
    ``side``: whose packets come here ("internal", "external"), None for both.

    Raises DpdkError, or InterfaceError where the kernel interface cannot be used.
    """

    def __init__(
        self,
        device: str,
        pool: Mempool,
        *,
        index: int,
        mtu: int = 1500,
        mac: bytes | None = None,
        addresses: Sequence[IPv4Address] = (),
        state_dir: Path,
        force: bool = False,
        driver: str = "auto",
        tagged: bool = False,
        queues: int = 1,
        side: str | None = None,
    ) -> None:
        self.device, self.mtu, self.tagged = device, mtu, tagged
        self.spread, self.rx_queues, self.tx_queues = "", 1, 1
        self._workers, self._side = queues, {"internal": 0, "external": 1}.get(side or "", -1)
        self.not_af_xdp = ""  # why AF_PACKET carries the kernel interface
        self._interface: Interface | None = None
        self._port_id: int | None = None
        self._sockets: list[socket.socket] = []
        self._missed = 0
        self._paused, self._patience = False, HANDSHAKE
        self._tap, self._tap_files, self._tap_up = "", tuple[Path, ...](), True
        self._lock = threading.Lock()
        if device in interface_names():
            self._interface = Interface(
                device, mtu=mtu, mac=mac, addresses=addresses, state_dir=state_dir, force=force
            )
        elif not words.DEVARGS.match(device):
            raise DpdkError(
                f"device {device}: no kernel interface of this network namespace (which has "
                f"{', '.join(interface_names())}), and no DPDK devargs such as net_memif0 or 0000:03:00.0"
            )
        else:
            if fault := words.fault_of(device, driver):
                raise DpdkError(f"device {device}: {fault}")
            named = words.kernel_interfaces(device)
            needed = set() if force or not (named or words.pci_address(device)) else below_default_route()
            if cut := ", ".join(named & needed):
                raise DpdkError(
                    f"device {device}: {cut} carries this host's default route, which the NAT would cut off; "
                    "name another device, or say --force"
                )
            if problem := words.problem_of(device, needed=needed):
                raise DpdkError(f"device {device}: {problem}")
        try:
            if self._interface is None:
                self._open(words.canonical(device), pool, mac)
            else:
                self._open_kernel_interface(self._interface, pool, index, mac, driver)
        except BaseException:
            self.close()
            raise

    def _open_kernel_interface(
        self, interface: Interface, pool: Mempool, index: int, mac: bytes | None, driver: str
    ) -> None:
        if driver != "af_packet":
            try:
                self._open_af_xdp(interface, pool, index, mac)
            except (DpdkError, InterfaceError) as error:
                if driver == "af_xdp":
                    raise
                self.not_af_xdp = str(error).removeprefix(f"device {self.device}: ")
                self._close_port()
                interface.after_af_xdp()
            else:
                return
        else:
            self.not_af_xdp = "the configuration wants AF_PACKET"
        interface.for_af_packet()
        size = _frame_size(self.mtu)
        ring = Ring(max(size, 1 << 16), size, 2048)
        self._open(
            f"net_af_packet{index},iface={self.device},qdisc_bypass=1,"
            f"blocksz={ring.block_size},framesz={size},framecnt={ring.frames}",
            pool,
            mac,
            ring,
        )
        self._sockets = list(interface.packet_sockets().values())

    def _open_af_xdp(self, interface: Interface, pool: Mempool, index: int, mac: bytes | None) -> None:
        what = f"device {self.device}"
        if _frame_size(pool.mtu) > AF_XDP_FRAME:
            raise DpdkError(f"{what}: the buffers for an MTU of {pool.mtu} are larger than AF_XDP takes")
        if pool.count < AF_XDP_BUFFERS:
            raise DpdkError(f"{what}: AF_XDP needs {AF_XDP_BUFFERS} packet buffers, not {pool.count}")
        if self.tagged and interface.kind == "veth":
            raise DpdkError(
                f"{what}: AF_XDP does not see VLAN tags on a veth, which keeps them beside the frame"
            )
        interface.before_af_xdp()
        self._open(f"net_af_xdp{index},iface={self.device}", pool, mac)
        interface.for_af_xdp(tagged=self.tagged)

    def _open(self, devargs: str, pool: Mempool, mac: bytes | None, ring: Ring | None = None) -> None:
        what = f"device {self.device}"
        _log()
        self.name = words.name_of(devargs)
        if self.gated:
            _check(lib.gate_start(), f"{what}: DPDK's interrupts")
        number = ffi.new("uint16_t *")
        if lib.rte_eth_dev_get_port_by_name(self.name.encode(), number) < 0:  # a PCI device is there already
            try:
                _check(lib.rte_dev_probe(devargs.encode()), what)
            except DpdkError as error:
                if UNKNOWN_DRIVER in str(error) and (driver := words.driver_of(devargs)):
                    raise DpdkError(f"{what}: {words.no_driver(driver)}") from None
                raise
            # a virtual device that fails to probe is not always reported
            _check(lib.rte_eth_dev_get_port_by_name(self.name.encode(), number), what)
        if number[0] in _open:
            raise DpdkError(f"{what}: {self.name} is another port's device already; choose another")
        port = self._port_id = int(number[0])
        _open.add(port)
        if self._interface is not None and ring is not None:
            self._interface.keep_fragments(ring)
        info = _info(port)
        self.driver = _driver(port)
        if self.mtu > info.max_mtu:
            raise DpdkError(f"{what}: an MTU of {self.mtu} is more than its driver's {info.max_mtu}")
        conf = ffi.new("struct rte_eth_conf *")
        conf.txmode.offloads = info.tx_offload_capa & lib.RTE_ETH_TX_OFFLOAD_MULTI_SEGS
        conf.rxmode.offloads = info.rx_offload_capa & lib.RTE_ETH_RX_OFFLOAD_SCATTER
        if self._interface is None:
            largest = info.max_rx_pktlen - lib.RTE_ETHER_HDR_LEN - lib.RTE_ETHER_CRC_LEN
            # memif says 1500, and takes frames of any size in several of its buffers
            conf.rxmode.mtu = min(self.mtu, largest) if self.driver == "net_memif" else self.mtu
        if self._workers == 1 or not self._set_up_for_rss(conf, pool):
            self._set_up(conf, pool, 1)
        if self.driver == "net_tap":
            mac = self._taps(mac)
        elif mac is not None and mac != _mac(port):
            wanted = ffi.new("struct rte_ether_addr *")
            wanted.addr_bytes = list(mac)
            done = lib.rte_eth_dev_default_mac_addr_set(port, wanted)
            # memif and its like cannot set one, and deliver whatever comes
            if done != -errno.ENOTSUP or words.pci_address(self.device):
                _check(done, f"{what}: MAC {mac.hex(':')}")
        with self._untouched():
            started = lib.rte_eth_dev_start(port)
            if not self._connects:
                _check(started, what)
            elif started < 0:
                self._pause()
        if self.spread == "rss":
            self._fill_rss_table(conf, pool)
        self.mac = mac or _mac(port)

    def _set_up(self, conf: Any, pool: Mempool, queues: int) -> None:
        port, what = self.port_id, f"device {self.device}"
        _check(lib.rte_eth_dev_configure(port, queues, queues, conf), what)
        rx, tx = ffi.new("uint16_t *", RX_DESCRIPTORS), ffi.new("uint16_t *", TX_DESCRIPTORS)
        _check(lib.rte_eth_dev_adjust_nb_rx_tx_desc(port, rx, tx), what)
        numa = max(lib.rte_eth_dev_socket_id(port), 0)
        for queue in range(queues):
            received = lib.rte_eth_rx_queue_setup(port, queue, rx[0], numa, ffi.NULL, pool._pool)
            _check(received, f"{what}: receive queue")
            _check(lib.rte_eth_tx_queue_setup(port, queue, tx[0], numa, ffi.NULL), f"{what}: transmit queue")
        self.rx_queues = self.tx_queues = queues

    def _set_up_for_rss(self, conf: Any, pool: Mempool) -> bool:
        """With a queue for each worker; false, and ``spread`` says why, where that is impossible."""
        why, wanted = ffi.new("char[160]"), ffi.new("struct rte_eth_conf *", conf[0])
        try:
            if not lib.spread_ask(self.port_id, self._side, self._workers, wanted, why, len(why)):
                raise DpdkError(ffi.string(why).decode())
            self._set_up(wanted, pool, self._workers)
        except DpdkError as error:
            self.spread = f"software: {str(error).removeprefix(f'device {self.device}: ')}"
            return False
        self.spread = "rss"
        return True

    def _fill_rss_table(self, conf: Any, pool: Mempool) -> None:
        """Of the started port; one that does not take it gets along without."""
        try:
            _check(
                lib.spread_fill(self.port_id, self._side, self._workers),
                "its RSS does not take our key and table",
            )
        except DpdkError as error:
            self.spread = f"software: {error}"
            lib.rte_eth_dev_stop(self.port_id)
            self._set_up(conf, pool, 1)
            _check(lib.rte_eth_dev_start(self.port_id), f"device {self.device}")

    def _taps(self, mac: bytes | None) -> bytes:
        """The NAT's MAC, which is not that of the kernel's end: these are two stations."""
        self._tap = words.tap_interface(self.device)
        self._tap_files = words.tap_files(self._tap)
        kernels = _mac(self.port_id)
        return mac or bytes([kernels[0] | 2, *kernels[1:5], kernels[5] ^ 1])

    @property
    def port_id(self) -> int:
        if self._port_id is None:
            raise DpdkError(f"device {self.device} is closed")
        return self._port_id

    @property
    def kernel_interface(self) -> str | None:
        """The kernel interface that carries it, if one does."""
        return self._interface.name if self._interface else None

    def refuse_addresses(self, addresses: Sequence[IPv4Address]) -> None:
        """Raises InterfaceError when the NAT cannot answer for them here."""
        if self._interface is not None:
            self._interface.refuse_addresses(addresses)

    @property
    def label(self) -> str:
        """What a person calls it: the device without its arguments."""
        return self.kernel_interface or self.name

    @property
    def changes(self) -> tuple[str, ...]:
        """What was changed on the kernel interface, one line each."""
        return self._interface.changes if self._interface else ()

    @property
    def fill_checksums(self) -> bool:
        """Whether packets may come with checksums that were left to hardware."""
        return self.driver in PMDS_OF_KERNEL_PACKETS

    @property
    def gated(self) -> bool:
        """Whether DPDK sets it up and takes it down while it is polled: workers are kept out meanwhile (gate.c)."""
        return words.driver_of(self.device) in PMDS_THAT_CONNECT

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """No worker and no interrupt of DPDK's is within it."""
        if not self.gated:
            yield
            return
        lib.gate_shut()
        try:
            yield
        finally:
            lib.gate_open()

    def link(self) -> Link:
        link = ffi.new("struct link *")
        with (
            self._lock,
            self._untouched(),
        ):  # to look may be to connect: a virtio_user takes its waiting other end now
            _check(lib.link_get(self.port_id, link), f"device {self.device}: link")
            if link.up:
                self._patience = 0
        unknown = 0xFFFFFFFF
        if self._interface is not None:  # the driver knows only how it was at the start
            link.up = self._interface.is_running
        elif self._tap_files:
            link.up = self._tap_up = self._tap_link(bool(link.up))
        return Link(
            bool(link.up), 0 if link.speed_mbps == unknown else link.speed_mbps, bool(link.full_duplex)
        )

    def _tap_link(self, driver: bool) -> bool:
        """The driver does not see a tap in another namespace. While this process can open nothing more it is as it was."""
        try:
            if self._tap in interface_names():
                return driver
            return any(words.is_attached(file) for file in self._tap_files)
        except OSError:
            return self._tap_up

    @property
    def _connects(self) -> bool:
        """A memif of this kind looks for its other end when its port is started, and never again.

        With zero-copy a second start comes to nothing (DPDK 22.11), so there the first one must succeed.
        """
        arguments = words.arguments_of(self.device)
        client = self.driver == "net_memif" and arguments.get("role", "client") in ("client", "slave")
        return client and arguments.get("zero-copy", "no") == "no"

    def _pause(self) -> None:
        lib.port_pause(self.port_id)
        self._paused = True

    def seek_other_end(self) -> None:
        """For a port without a link, once per second; whether there is one, ``link`` will say.

        Workers may go on polling.
        """
        if not self._connects:
            return
        with self._lock, self._untouched():
            if not self._paused:
                self._patience -= 1
                if self._patience > 0:
                    return
                lib.rte_eth_dev_stop(self.port_id)
                self._pause()
            self._paused = lib.rte_eth_dev_start(self.port_id) < 0
            self._patience = HANDSHAKE

    @property
    def why_down(self) -> str:
        """What it means that this link is down."""
        if self._interface is not None:
            return "not up, or no carrier"
        return words.NO_LINK.get(self.driver, "no signal")

    @property
    def is_there(self) -> bool:
        """Whether the device still exists. A kernel interface that went away does not come back by its name."""
        if self._interface is not None:
            return self._interface.is_there
        return not lib.rte_eth_dev_is_removed(self.port_id)

    def stats(self) -> dict[str, int]:
        """The counters that every device has: packets, bytes, missed, errors, out of buffers."""
        stats = ffi.new("struct rte_eth_stats *")
        _check(lib.rte_eth_stats_get(self.port_id, stats), f"device {self.device}: statistics")
        names = ("ipackets", "opackets", "ibytes", "obytes", "imissed", "ierrors", "oerrors", "rx_nombuf")
        found: dict[str, int] = {name: getattr(stats, name) for name in names}
        with self._lock:
            for (
                ring
            ) in self._sockets:  # the kernel counts what found its ring full, and forgets it when asked
                _, dropped = struct.unpack("II", ring.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
                self._missed += dropped
            found["imissed"] += self._missed
        return found

    def xstats(self) -> dict[str, int]:
        """The device's own counters, by its own names."""
        what = f"device {self.device}: extended statistics"
        n = _check(lib.rte_eth_xstats_get(self.port_id, ffi.NULL, 0), what)
        names, values = ffi.new("struct rte_eth_xstat_name[]", n), ffi.new("struct rte_eth_xstat[]", n)
        _check(lib.rte_eth_xstats_get_names(self.port_id, names, n), what)
        n = min(n, _check(lib.rte_eth_xstats_get(self.port_id, values, n), what))
        return {ffi.string(names[values[i].id].name).decode(): values[i].value for i in range(n)}

    def close(self) -> None:
        """Stops the port and puts its kernel interface back as it was. May be called twice."""
        for ring in self._sockets:
            ring.close()
        self._sockets = []
        self._close_port()
        if self._interface is not None:
            self._interface.restore()

    def _close_port(self) -> None:
        if self._port_id is not None:
            with self._untouched():
                lib.rte_eth_dev_stop(self._port_id)
                lib.rte_eth_dev_close(self._port_id)
            _open.discard(self._port_id)
            self._port_id = None
