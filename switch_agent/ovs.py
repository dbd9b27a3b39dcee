# SPDX-License-Identifier: Apache-2.0
"""Open vSwitch in a namespace of a lab, for the tests and the demo: its own daemons, database and directory.

The datapath is the userspace one, over the veth interfaces that the namespace has. The daemons are children
of the lab: they end with it, whatever happens, and nothing of an installed service is touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nat_control.lab import LabError, Namespace, Process, call, until

SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
RECEIVE_BUFFER = Path("/proc/sys/net/core/rmem_default")  # of the whole machine, read when a port is opened
PRIORITY = -10  # of nice(1)


class OpenVSwitch:
    """One bridge with ``ports`` (interface of the namespace → OpenFlow port number), run by a controller.

    ``controllers`` are targets like ``tcp:127.0.0.1:6653``. The bridge has fail_mode=secure and speaks
    OpenFlow 1.3 only. With ``receive_buffer`` (bytes) the sockets of its ports have that size; the default
    overflows when the switch is descheduled for a few milliseconds. ``program`` is the daemon, and ``options``
    its other_config. Raises LabError with the daemon's words.
    """

    def __init__(
        self,
        namespace: Namespace,
        ports: Mapping[str, int],
        controllers: tuple[str, ...] = (),
        *,
        bridge: str = "tandem",
        datapath_id: int = 1,
        receive_buffer: int = 0,
        program: str = "ovs-vswitchd",
        options: tuple[str, ...] = (),
    ) -> None:
        self.namespace = namespace
        self.ports = dict(ports)
        self.bridge = bridge
        self.directory = namespace.lab.directory / f"ovs-{namespace.name}"
        self._receive_buffer = receive_buffer
        self._program = program
        self.directory.mkdir()
        variables = ("OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR")
        self._environment = ["env", *(f"{name}={self.directory}" for name in variables)]
        database = self.directory / "conf.db"
        call(["ovsdb-tool", "create", str(database), str(SCHEMA)])
        socket = self.directory / "db.sock"
        self.database = self._start("ovsdb-server", "ovsdb-server", str(database), f"--remote=punix:{socket}")
        _within_reach("ovsdb-server", self.database, socket.exists)
        self.vsctl("--no-wait", "init")
        if options:
            self.vsctl("--no-wait", "set", "Open_vSwitch", ".", *(f"other_config:{o}" for o in options))
        self.daemon = self._start_daemon()
        asked = ["--", "add-br", bridge, "--", "set", "bridge", bridge, "datapath_type=netdev"]
        asked += ["fail_mode=secure", "protocols=OpenFlow13", f"other_config:datapath-id={datapath_id:016x}"]
        asked += ["other_config:disable-in-band=true"]
        for device, number in self.ports.items():
            asked += ["--", "add-port", bridge, device]
            asked += ["--", "set", "interface", device, f"ofport_request={number}"]
        with self._buffers():
            self.vsctl(*asked)
        for device, number in self.ports.items():
            given = self.vsctl("get", "interface", device, "ofport").strip()
            if given != str(number):
                raise LabError(
                    f"{device} is OpenFlow port {given}, not {number}: is there such an interface?"
                )
        self.set_controllers(*controllers)

    def set_controllers(self, *targets: str, probe_ms: int = 5000) -> None:
        """A controller on a unix socket must be at ``controller_socket``, or at a path that begins like it. One that is
        silent for ``probe_ms`` is asked whether it lives, and is lost when it stays so as long again; 0: never."""
        if not targets:
            self.vsctl("del-controller", self.bridge)
            return
        self.vsctl("set-controller", self.bridge, *targets)
        # A lost controller is looked for again after a second at most, and not after eight.
        for uuid in self.vsctl("get", "bridge", self.bridge, "controller").strip("[]\n").split(","):
            self.vsctl("set", "controller", uuid.strip(), "max_backoff=1000", f"inactivity_probe={probe_ms}")

    def set_ssl(self, key: Path, certificate: Path, ca: Path) -> None:
        """What it shows controllers at ``ssl:ADDRESS:PORT``, and who may be one."""
        self.vsctl("set-ssl", *(str(path) for path in (key, certificate, ca)))

    @property
    def controller_socket(self) -> Path:
        """The only place where Open vSwitch accepts a unix socket of a controller."""
        return self.directory / f"{self.bridge}.controller"

    def vsctl(self, *arguments: str) -> str:
        """ovs-vsctl; waits until the switch has carried it out."""
        return self._tool("ovs-vsctl", f"--db=unix:{self.directory}/db.sock", "--timeout=10", *arguments)

    def ofctl(self, command: str, *arguments: str) -> str:
        """ovs-ofctl on the bridge, in OpenFlow 1.3."""
        management = f"unix:{self.directory}/{self.bridge}.mgmt"
        return self._tool("ovs-ofctl", "-O", "OpenFlow13", command, management, *arguments)

    def appctl(self, *arguments: str) -> str:
        return self._tool("ovs-appctl", "-t", str(self.directory / "ovs-vswitchd.ctl"), *arguments)

    def flows(self, *match: str) -> list[str]:
        """One line for each flow of the switch, without the header."""
        return [line.strip() for line in self.ofctl("dump-flows", *match).splitlines() if "cookie=" in line]

    def restart(self) -> None:
        """Ends the switch daemon and starts it anew, without any flow, on the same ports."""
        self.daemon.stop()
        with self._buffers():
            self.daemon = self._start_daemon()
            # a killed one has left its sockets, and the new one is slow to have the bridge
            until("the bridge answers", lambda: self._answers(lambda: self.ofctl("show")))

    def _start_daemon(self) -> Process:
        database = f"unix:{self.directory}/db.sock"
        daemon = self._start("ovs-vswitchd", self._program, database)
        _prefer(daemon.pid)
        control = self.directory / "ovs-vswitchd.ctl"
        return _within_reach(
            "ovs-vswitchd", daemon, lambda: control.exists() and self._answers(lambda: self.appctl("version"))
        )

    def _answers(self, ask: Callable[[], str]) -> bool:
        try:
            return bool(ask())
        except LabError:
            return False

    def _start(self, name: str, program: str, *arguments: str) -> Process:
        files = [f"--pidfile={self.directory}/{name}.pid", f"--unixctl={self.directory}/{name}.ctl"]
        command = [*self._environment, program, *arguments, *files, "-vconsole:warn", "-vsyslog:off"]
        return self.namespace.start(*command, name=name)

    def _tool(self, *argv: str) -> str:
        return self.namespace.run(*self._environment, *argv)

    @contextlib.contextmanager
    def _buffers(self) -> Iterator[None]:
        """The default receive buffer is raised while ports are opened, one lab at a time, and put back."""
        if not self._receive_buffer:
            yield
            return
        with RECEIVE_BUFFER.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = RECEIVE_BUFFER.read_text()
            RECEIVE_BUFFER.write_text(str(self._receive_buffer))
            try:
                yield
            finally:
                RECEIVE_BUFFER.write_text(before)


def _prefer(pid: int) -> None:
    """The priority that ovs-ctl gives it; where sessions share the CPUs as groups, that of its group counts."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, PRIORITY)
        Path(f"/proc/{pid}/autogroup").write_text(str(PRIORITY))


def _within_reach(program: str, process: Process, probe: Callable[[], bool]) -> Process:
    def there() -> bool:
        if not process.alive:
            raise LabError(f"{program} ended: {process.last_line}")
        return probe()

    until(f"{program} answers", there)
    return process
