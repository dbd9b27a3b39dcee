# SPDX-License-Identifier: Apache-2.0
"""Borrowing an interface from the kernel: what must change for frames to come as they are on the wire.

The kernel hands packets around that no wire ever saw: checksums left to hardware, several segments merged into
one (GRO) or not yet split (GSO).  While the NAT has an interface, merging is off, and a program attached to a
veth makes its other end split what it sends (that end is in another namespace, out of our reach; the program
goes when the process goes).  Checksums that are missing all the same are filled in by the worker.  The kernel's
own IP is kept away from the packets: no forwarding, no ARP replies.

All that is changed stands in a journal before it is changed.  ``restore`` puts it back; after a kill -9 the
next start does, by ``repair``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from nat_fastpath.dpdk.packet_ring import Ring, leave_fanout
from nat_fastpath.dpdk.xdp import attach_pass_program

# what `ethtool -k` calls the features that merge packets, and what `ethtool -K` takes for them
MERGING = {
    "generic-receive-offload": "gro",
    "large-receive-offload": "lro",
    "rx-gro-hw": "rx-gro-hw",
    "rx-gro-list": "rx-gro-list",
    "rx-udp-gro-forwarding": "rx-udp-gro-forwarding",
}
# takes the tag out of the frame: AF_XDP would never see it, and the driver for AF_PACKET puts it back
TAG_STRIPPING = {"rx-vlan-offload": "rxvlan"}
SYSCTLS = {"forwarding": "0", "arp_ignore": "8"}  # 8: do not reply for any address
SIOCGIFFLAGS, IFF_RUNNING = 0x8913, 0x40
UPPER_KINDS = {"vlan", "macvlan", "macvtap", "ipvlan", "macsec"}


class InterfaceError(Exception):
    """A kernel interface cannot be used; one line: which, why, and how to mend it."""


def interface_names() -> list[str]:
    """The interfaces of this network namespace."""
    return sorted(name for _, name in socket.if_nameindex())


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise InterfaceError(f"the command {command[0]} is missing: apt install iproute2 ethtool") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"exit code {error.returncode}"
        raise InterfaceError(f"{' '.join(command)}: {reason}") from None


def _ip(*arguments: str) -> list[dict[str, Any]]:
    return [row for row in json.loads(_run("ip", "-j", "-d", *arguments) or "[]") if row]


def _sysctl(name: str, key: str) -> Path:
    return Path("/proc/sys/net/ipv4/conf") / name / key


def _namespace() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def _start_time(pid: int) -> str | None:
    """Tells a process from a later one with the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _features(name: str, wanted: dict[str, str]) -> dict[str, bool]:
    """Which of these features are on, of those that can be changed."""
    features = json.loads(_run("ethtool", "--json", "-k", name))[0]
    return {
        word: features[key]["active"]
        for key, word in wanted.items()
        if key in features and not features[key]["fixed"]
    }


def _set_features(name: str, features: dict[str, bool]) -> None:
    if features:
        words = [word for key, on in features.items() for word in (key, "on" if on else "off")]
        _run("ethtool", "-K", name, *words)


def below_default_route() -> set[str]:
    """The interfaces without which this host has no default route: its devices, and what those stand on.

    In any table, with any number of next hops, or as two halves.
    """
    links = {row["ifname"]: row for row in _ip("link", "show")}
    found: set[str] = set()
    due: set[str] = set()
    for family in "46":
        for row in _ip(f"-{family}", "route", "show", "table", "all", "type", "unicast"):
            if row["dst"] == "default" or row["dst"].endswith(("/0", "/1")):
                due |= {hop["dev"] for hop in (row, *row.get("nexthops", ())) if "dev" in hop}
    while due:
        name = due.pop()
        found.add(name)
        row = links.get(name, {})
        if row.get("linkinfo", {}).get("info_kind") in UPPER_KINDS and "link" in row:
            due.add(row["link"])
        due |= {member for member, other in links.items() if other.get("master") == name}
        due -= found
    return found


def _own(name: str) -> socket.socket:
    """A lock on this interface that ends with the process, whatever its state directory.

    Names of abstract sockets belong to the network namespace, as interfaces do.
    """
    lock = socket.socket(socket.AF_UNIX)
    path = f"\0tandem-nat/{name}"
    try:
        lock.bind(path)
        lock.listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise InterfaceError(f"device {name}: {error.strerror}") from None
        try:
            lock.connect(path)
            credentials = lock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            owner = f"the NAT with process id {struct.unpack('3i', credentials)[0]}"
        except OSError:
            owner = "another NAT"
        lock.close()
        raise InterfaceError(f"device {name}: in use by {owner}") from None
    return lock


class Interface:
    """A kernel interface, prepared for the NAT until ``restore``.

    Raises InterfaceError, with nothing changed, when it carries the host's default route (unless ``force``),
    belongs to a bridge or bond, has one of ``addresses`` or is used by another process.
    """

    _running = True

    def __init__(
        self,
        name: str,
        *,
        mtu: int,
        mac: bytes | None = None,
        addresses: Sequence[IPv4Address] = (),
        state_dir: Path,
        force: bool = False,
    ) -> None:
        self.name = name
        self.changes: tuple[str, ...] = ()
        self._journal = _journal_path(state_dir, name)
        self._lock = _own(name)
        try:
            self._take(mtu, mac, addresses, force)
        except BaseException:
            self._lock.close()
            raise

    def _take(self, mtu: int, mac: bytes | None, addresses: Sequence[IPv4Address], force: bool) -> None:
        name = self.name
        self._refuse(addresses, force)
        [link] = _ip("link", "show", "dev", name)
        before = {
            "name": name,
            "ifindex": link["ifindex"],
            "namespace": _namespace(),
            "pid": os.getpid(),
            "start_time": _start_time(os.getpid()),
            "up": "UP" in link["flags"],
            "promisc": "PROMISC" in link["flags"],
            "mtu": link["mtu"],
            "mac": link["address"],
            "features": _features(name, MERGING | TAG_STRIPPING),
            "xdp": "xdp" in link,
            "channels": None,
            "sysctls": {key: _sysctl(name, key).read_text().strip() for key in SYSCTLS},
        }
        self._before = before
        _write_journal(self._journal, before)
        try:
            self._prepare(before, link, mtu, mac)
        except BaseException:
            self.restore()
            raise

    def _refuse(self, addresses: Sequence[IPv4Address], force: bool) -> None:
        name = self.name
        try:
            owner = json.loads(self._journal.read_text())
        except (OSError, ValueError):
            owner = None
        if owner:
            _put_back(owner)
        [link] = _ip("link", "show", "dev", name)
        if link.get("link_type") != "ether":
            raise InterfaceError(
                f"device {name}: a NAT needs an Ethernet interface, this is {link.get('link_type')}"
            )
        if not force and name in below_default_route():
            raise InterfaceError(
                f"device {name}: carries this host's default route, which the NAT would cut off; "
                "name another device, or say --force"
            )
        if "master" in link:
            raise InterfaceError(
                f"device {name}: belongs to {link['master']}, which takes its packets; ip link set {name} nomaster"
            )
        self.refuse_addresses(addresses)

    def refuse_addresses(self, addresses: Sequence[IPv4Address]) -> None:
        """Raises InterfaceError when the kernel has one of them, which it would answer for."""
        for row in _ip("-4", "addr", "show"):
            for address in row.get("addr_info", ()):
                if IPv4Address(address["local"]) in addresses:
                    raise InterfaceError(
                        f"device {self.name}: {address['local']} is to be the NAT's, but the kernel has it too and would "
                        f"answer for it; ip addr del {address['local']}/{address['prefixlen']} dev {row['ifname']}"
                    )

    def _prepare(self, before: dict[str, Any], link: dict[str, Any], mtu: int, mac: bytes | None) -> None:
        name, changes = self.name, []
        if mtu > link["mtu"]:
            _run("ip", "link", "set", "dev", name, "mtu", str(mtu))
            changes.append(f"MTU {link['mtu']} -> {mtu}")
        if mac is not None and mac.hex(":") != link["address"]:
            _run("ip", "link", "set", "dev", name, "address", mac.hex(":"))
            changes.append(f"MAC {link['address']} -> {mac.hex(':')}")
        for key, value in SYSCTLS.items():
            if before["sysctls"][key] != value:
                _sysctl(name, key).write_text(value)
                changes.append(f"net.ipv4.conf.{name}.{key} {before['sysctls'][key]} -> {value}")
        if not before["up"]:
            _run("ip", "link", "set", "dev", name, "up")
            changes.append("set up")
        self.changes = tuple(changes)

    def before_af_xdp(self) -> None:
        """AF_XDP sees one queue only, and needs the place of the XDP program."""
        if self._before["xdp"]:
            raise InterfaceError(
                f"device {self.name}: has an XDP program already; ip link set dev {self.name} xdp off"
            )
        channels = _channels(self.name)
        many = {kind: n for kind, n in channels.items() if n > 1}
        if not many:
            return
        _write_journal(self._journal, self._before | {"channels": many})
        self._before["channels"] = many
        _set_channels(self.name, dict.fromkeys(many, 1))
        self.changes += tuple(f"{kind} channels {n} -> 1" for kind, n in many.items())

    def for_af_xdp(self, *, tagged: bool = False) -> None:
        """After AF_XDP attached its program, which turns GRO on. ``tagged``: VLAN tags stay in the frames."""
        self._turn_off(MERGING | TAG_STRIPPING if tagged else MERGING)

    def after_af_xdp(self) -> None:
        """Takes back what an AF_XDP that did not open has left."""
        _xdp_off(self._before)
        if channels := self._before["channels"]:
            _set_channels(self.name, channels)
            self._before["channels"] = None
            self.changes = tuple(change for change in self.changes if " channels " not in change)

    def for_af_packet(self) -> None:
        [link] = _ip("link", "show", "dev", self.name)
        if self.kind == "veth":
            changes = list(self.changes)
            try:
                attach_pass_program(link["ifindex"])
                changes.append(
                    "an XDP program that passes everything: the other end splits large segments itself"
                )
            except OSError as error:
                changes.append(
                    f"not changed: no XDP program can be attached ({error.strerror}); without it TCP crawls unless "
                    f"segmentation is off at the other end: ethtool -K {link.get('link', 'PEER')} tso off gso off"
                )
            self.changes = tuple(changes)
        self._turn_off(MERGING)

    def _turn_off(self, wanted: dict[str, str]) -> None:
        """After the XDP program: attaching one turns GRO on."""
        if features := [key for key, on in _features(self.name, wanted).items() if on]:
            _set_features(self.name, dict.fromkeys(features, False))
        if features := [key for key in features if self._before["features"].get(key)]:
            self.changes += (f"{', '.join(features)} off",)

    @property
    def kind(self) -> str:
        """The kernel's word for a virtual interface (``veth``), empty for hardware."""
        [link] = _ip("link", "show", "dev", self.name)
        return str(link.get("linkinfo", {}).get("info_kind", ""))

    def restore(self) -> None:
        """Puts everything back and forgets the journal. May be called twice."""
        if self._journal.exists():
            _put_back(self._before)
            self._journal.unlink()
        self._lock.close()

    @property
    def is_there(self) -> bool:
        """Whether it still is the interface that was taken: one that is made anew under its name is another."""
        return (self._before["ifindex"], self.name) in socket.if_nameindex()

    @property
    def is_running(self) -> bool:
        """Up, and with a carrier; as it was when last seen, while this process can open nothing more."""
        try:
            any_socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        except OSError:
            return self._running
        with any_socket:
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sH14x", self.name.encode(), 0))
            except OSError:
                self._running = False
                return False
        (flags,) = struct.unpack_from("H", answer, 16)
        self._running = bool(flags & IFF_RUNNING)
        return self._running

    def packet_sockets(self) -> dict[int, socket.socket]:
        """AF_PACKET sockets of this process that are bound to it: descriptor and duplicate."""
        found = {}
        for number in os.listdir("/proc/self/fd"):
            try:
                copy = os.dup(int(number))
            except OSError:  # closed meanwhile
                continue
            try:
                duplicate = socket.socket(fileno=copy)
            except OSError:  # no socket; kept open, it would hold what it is, such as the XDP program
                os.close(copy)
                continue
            if duplicate.family == socket.AF_PACKET and duplicate.getsockname()[0] == self.name:
                found[int(number)] = duplicate
            else:
                duplicate.close()
        return found

    def keep_fragments(self, ring: Ring) -> None:
        """Lets the driver's sockets have fragments as they are on the wire. Raises InterfaceError."""
        for number, duplicate in self.packet_sockets().items():
            duplicate.close()
            try:
                leave_fanout(number, self.name, ring)
            except OSError as error:
                raise InterfaceError(
                    f"device {self.name}: its packet socket cannot be made anew: {error.strerror}"
                ) from None


def _xdp_off(before: dict[str, Any]) -> None:
    """Detaches the program that we, or AF_XDP for us, attached: it outlives its process."""
    [link] = _ip("link", "show", "dev", before["name"])
    if "xdp" in link and not before.get("xdp", True):
        _run("ip", "link", "set", "dev", before["name"], "xdp", "off")


def _channels(name: str) -> dict[str, int]:
    """How many queues it uses, by ethtool's words; empty where it has no choice."""
    try:
        said = _run("ethtool", "-l", name)
    except InterfaceError:
        return {}
    current = said.partition("Current hardware settings:")[2]
    pairs = (line.split(":") for line in current.splitlines() if ":" in line)
    found = {kind.strip().lower(): n.strip() for kind, n in pairs}
    return {kind: int(n) for kind, n in found.items() if kind in ("rx", "tx", "combined") and n.isdecimal()}


def _set_channels(name: str, channels: dict[str, int]) -> None:
    _run("ethtool", "-L", name, *(word for kind, n in channels.items() for word in (kind, str(n))))


def _put_back(before: dict[str, Any]) -> bool:
    """Returns whether the interface is still there."""
    name = before["name"]
    if (before["ifindex"], name) not in socket.if_nameindex():
        return False
    _xdp_off(before)
    if channels := before.get("channels"):
        _set_channels(name, channels)
    [link] = _ip("link", "show", "dev", name)
    for key, value in before["sysctls"].items():
        _sysctl(name, key).write_text(value)
    active = _features(name, MERGING | TAG_STRIPPING)
    _set_features(name, {key: on for key, on in before["features"].items() if active.get(key) != on})
    if link["mtu"] != before["mtu"]:
        _run("ip", "link", "set", "dev", name, "mtu", str(before["mtu"]))
    if link["address"] != before["mac"]:
        _run("ip", "link", "set", "dev", name, "address", before["mac"])
    if ("PROMISC" in link["flags"]) != before["promisc"]:
        _run("ip", "link", "set", "dev", name, "promisc", "on" if before["promisc"] else "off")
    if not before["up"]:
        _run("ip", "link", "set", "dev", name, "down")
    return True


def _journal_path(state_dir: Path, name: str) -> Path:
    return state_dir / "interfaces" / f"{_namespace()}-{name}.json"


def _write_journal(path: Path, before: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".new")
        with partial.open("w") as file:
            json.dump(before, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise InterfaceError(f"cannot write {path}: {error.strerror}") from None


def repair(state_dir: Path) -> list[str]:
    """Puts back the interfaces of this namespace that a killed process left changed; one line for each."""
    lines = []
    for path in sorted((state_dir / "interfaces").glob("*.json")):
        try:
            before = json.loads(path.read_text())
            if _start_time(before["pid"]) == before["start_time"]:
                continue
            if before["namespace"] != _namespace():
                if before["namespace"] not in _live_namespaces():
                    path.unlink()
                continue
            there = _put_back(before)
        except (ValueError, KeyError):
            path.unlink()
            lines.append(f"{path}: not a journal of ours, removed")
            continue
        path.unlink()
        if there:
            lines.append(f"{before['name']}: put back as it was before process {before['pid']} was killed")
    return lines


def _live_namespaces() -> set[int]:
    found = set()
    for path in [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/run/netns").glob("*")]:
        try:
            found.add(path.stat().st_ino)
        except OSError:
            continue
    return found
