# SPDX-License-Identifier: Apache-2.0
"""Settings of an Open vSwitch that spoil a failover; docs/switch.md says where each comes from."""

from __future__ import annotations

from collections.abc import Iterator

from nat_control.config import Config
from nat_control.findings import Command, Finding, Severity, good, sysctl
from nat_control.ovs_facts import Bridge, Ovs

RECEIVE_BUFFER = 4 << 20  # bytes, at least
RECOMMENDED_BUFFER = 64 << 20
FLOW_LIMIT = 300_000
DEFAULT_FLOW_LIMIT = 200_000  # of Open vSwitch, where nothing is configured
LIMIT_NOW = 200_000  # in force; the revalidator lowers what it cannot keep up with
ENOUGH_NOW = 100_000
RINGS = 2048  # descriptors
MAX_BACKOFF = 1000  # ms
INACTIVITY_PROBE = 5000  # ms; Open vSwitch's own default
SLEEP_KEYS = ("pmd-maxsleep", "pmd-sleep-max")  # in Open vSwitch 3.1, and later


def ovs_findings(ovs: Ovs, config: Config | None, rmem_default: int | None) -> Iterator[Finding]:
    bridges = list(ovs.bridges)
    if config and config.switch:
        wanted = f"{config.switch.datapath_id:016x}"
        bridges = [bridge for bridge in bridges if bridge.datapath_id == wanted]
        if not bridges:
            yield Finding(
                "ovs-bridge",
                Severity.PROBLEM,
                f"Open vSwitch has no bridge with datapath id {wanted}",
                "the agent takes no other switch than the one of switch.datapath_id",
                (_vsctl(ovs, "set", "bridge", "BRIDGE", f"other_config:datapath-id={wanted}"),),
                advice="put the bridge's name for BRIDGE",
            )
    elif not bridges:
        yield Finding("ovs-bridge", Severity.NOTE, "Open vSwitch has no bridge")
    yield from _daemon(ovs)
    for bridge in bridges:
        yield from _bridge(ovs, bridge, config)
    if bridges and config and config.switch and config.switch.ovs is None:
        yield _unmanaged(ovs)
    if any(bridge.datapath_type == "netdev" for bridge in bridges):
        yield from _buffers(ovs, rmem_default)


def _vsctl(ovs: Ovs, *words: str) -> Command:
    return ("ovs-vsctl", *([f"--db={ovs.database}"] if ovs.database else []), "--timeout=10", *words)


def _unmanaged(ovs: Ovs) -> Finding:
    where = ("-t", ovs.control) if ovs.control else ()
    return Finding(
        "ovs-unmanaged",
        Severity.WARNING,
        "the agent may not manage this Open vSwitch: switch.ovs is not set",
        "after the server has taken its flows back, stale entries of the datapath's cache must be purged, or the next"
        " takeover sends up to a quarter of its first second to the dead server",
        (("ovs-appctl", *where, "revalidator/purge"),),
        advice="after each return; or `switch: {ovs: /var/run/openvswitch}`, and the agent does it",
    )


def _daemon(ovs: Ovs) -> Iterator[Finding]:
    for key in SLEEP_KEYS:
        if ovs.other_config.get(key, "0") != "0":
            yield Finding(
                "ovs-pmd-maxsleep",
                Severity.WARNING,
                f"Open vSwitch's polling threads sleep: {key}={ovs.other_config[key]}",
                "installing rules becomes about 25 times slower",
                (_vsctl(ovs, "remove", "Open_vSwitch", ".", "other_config", key),),
                automatic=True,
                subject=key,
            )
    limit = ovs.other_config.get("flow-limit", str(DEFAULT_FLOW_LIMIT))
    if not limit.isdigit() or int(limit) < FLOW_LIMIT:
        yield Finding(
            "ovs-flow-limit",
            Severity.NOTE,
            f"Open vSwitch's datapath may hold {limit} flows",
            "with hundreds of thousands of packets per second of many flows, a takeover meets the limit",
            (_vsctl(ovs, "set", "Open_vSwitch", ".", f"other_config:flow-limit={FLOW_LIMIT}"),),
            automatic=True,
        )
    if ovs.control and ovs.limits and min(ovs.limits) < ENOUGH_NOW:
        yield Finding(
            "ovs-flow-limit-now",
            Severity.NOTE,
            f"Open vSwitch's datapath takes {min(ovs.limits)} flows at present",
            "above it flows pass one packet at a time, above twice of it all are thrown away; it begins at 10000 and grows"
            " by 1000 at a time",
            (("ovs-appctl", "-t", ovs.control, "upcall/set-flow-limit", str(LIMIT_NOW)),),
            advice="lasts until Open vSwitch is restarted; with switch.ovs the agent does it",
            automatic=True,
        )
    for port in ovs.poll_ports:
        if port.rings < RINGS:
            yield Finding(
                "ovs-rings",
                Severity.WARNING,
                f"port {port.name} of Open vSwitch has receive rings of {port.rings} descriptors",
                "they overflow at a takeover with thousands of active flows, each of which takes the slow path once",
                (_vsctl(ovs, "set", "interface", port.name, f"options:n_rxq_desc={RINGS}"),),
                advice="the port stops for a moment",
                subject=port.name,
            )
    if ovs.control:
        yield good("ovs-management", f"ovs-vswitchd answers at {ovs.control}, so its cache can be purged")
    else:
        yield Finding(
            "ovs-management",
            Severity.WARNING,
            "ovs-vswitchd's control socket does not answer",
            "after the server has taken its flows back, stale entries of the datapath's cache must be purged, or the"
            " next takeover finds them",
            (("ovs-appctl", "revalidator/purge"),),
            advice="run the agent on the switch's host, as a user who may run this, or run it after each return",
        )


def _bridge(ovs: Ovs, bridge: Bridge, config: Config | None) -> Iterator[Finding]:
    name = bridge.name
    if bridge.fail_mode != "secure":
        yield Finding(
            "ovs-fail-mode",
            Severity.PROBLEM,
            f"bridge {name} has fail_mode {bridge.fail_mode or 'standalone (not set)'}",
            "without its controller it becomes a learning switch: its rules go, and packets pass untranslated",
            (_vsctl(ovs, "set", "bridge", name, "fail_mode=secure"),),
            automatic=True,
            subject=name,
        )
    if bridge.protocols and "OpenFlow13" not in bridge.protocols:
        yield Finding(
            "ovs-protocols",
            Severity.PROBLEM,
            f"bridge {name} speaks {', '.join(bridge.protocols)}, and not OpenFlow13",
            "the agent speaks OpenFlow 1.3 only",
            (_vsctl(ovs, "add", "bridge", name, "protocols", "OpenFlow13"),),
            automatic=True,
            subject=name,
        )
    yield from _controllers(ovs, bridge, config)


def _target(place: str) -> str:
    """Of ``ovs-vsctl set-controller``, for where the agent listens."""
    if place.startswith("unix:"):
        return place
    return f"ssl:{place.removeprefix('tls:')}" if place.startswith("tls:") else f"tcp:{place}"


def _controllers(ovs: Ovs, bridge: Bridge, config: Config | None) -> Iterator[Finding]:
    wanted: tuple[str, ...] = ()
    if config and config.switch:
        places = (config.switch.openflow, config.switch.takeover)
        wanted = tuple(_target(place) for place in places)
    have = {controller.target for controller in bridge.controllers}
    mend = (_vsctl(ovs, "set-controller", bridge.name, *wanted),) if wanted else ()
    missing = [target for target in wanted if target not in have]
    if missing:
        yield Finding(
            "ovs-controller",
            Severity.WARNING,
            f"bridge {bridge.name} does not connect to {', '.join(missing)}",
            "the switch connects to the agent, once to program it and once for the takeover",
            mend,
            advice="right as it is where the addresses of CONFIG are seen under others by the switch",
        )
    elif not have:
        yield Finding("ovs-controller", Severity.NOTE, f"bridge {bridge.name} has no controller")
    for controller in bridge.controllers:
        where = f"bridge {bridge.name}, controller {controller.target}:"
        if controller.target.startswith(("ptcp:", "pssl:", "punix:")):
            yield Finding(
                "ovs-passive",
                Severity.WARNING,
                f"{where} the switch waits there to be called",
                "the agent listens, too: nobody would connect; and such a connection learns of no port that goes",
                mend,
                advice=""
                if mend
                else "let it connect: ovs-vsctl set-controller BRIDGE tcp:AGENT:PORT tcp:AGENT:PORT",
            )
            continue
        backoff, probe = controller.max_backoff, controller.inactivity_probe
        if backoff is None or backoff > MAX_BACKOFF:
            yield Finding(
                "ovs-max-backoff",
                Severity.WARNING,
                f"{where} max_backoff is {'not set, so 8000' if backoff is None else backoff} ms",
                "so long the switch may be without its agent after that was restarted",
                (_vsctl(ovs, "set", "controller", controller.uuid, f"max_backoff={MAX_BACKOFF}"),),
                automatic=True,
                subject=controller.uuid,
            )
        if probe is not None and not 0 < probe <= 2 * INACTIVITY_PROBE:
            yield Finding(
                "ovs-inactivity-probe",
                Severity.WARNING,
                f"{where} inactivity_probe is {probe} ms" + ("" if probe else ": it never asks"),
                "a connection whose other end has vanished is noticed late, or never",
                (_vsctl(ovs, "set", "controller", controller.uuid, f"inactivity_probe={INACTIVITY_PROBE}"),),
                automatic=True,
                subject=controller.uuid,
            )


def _buffers(ovs: Ovs, rmem_default: int | None) -> Iterator[Finding]:
    why = "the sockets of its ports overflow when the switch is descheduled: some 2 % of the first second are lost"
    raise_it = sysctl("net.core.rmem_default", RECOMMENDED_BUFFER)
    if rmem_default is not None and rmem_default < RECEIVE_BUFFER:
        yield Finding(
            "ovs-rmem-default",
            Severity.WARNING,
            f"net.core.rmem_default is {rmem_default} bytes, too little for ports that Open vSwitch opens",
            why,
            (raise_it,),
            advice="in /etc/sysctl.d to outlast a reboot; ports that are open keep what they have",
            automatic=True,
        )
    small = [size for size in ovs.receive_buffers if size < RECEIVE_BUFFER]
    if small:
        yield Finding(
            "ovs-receive-buffer",
            Severity.WARNING,
            f"{len(small)} sockets of Open vSwitch's ports have receive buffers of {min(small)} bytes",
            why,
            (raise_it, ("systemctl", "restart", "openvswitch-switch")),
            advice="the restart interrupts traffic; an agent with switch.ovs enlarges them, as root, without one",
        )
    elif ovs.receive_buffers:
        yield good(
            "ovs-receive-buffer", f"receive buffers of the ports: {min(ovs.receive_buffers)} bytes at least"
        )
