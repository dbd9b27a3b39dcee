# SPDX-License-Identifier: Apache-2.0
"""The command `pktgen`: the traffic generator of the benchmarks, around any NAT."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import tempfile
from enum import StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated

import typer

from nat_control.cli_output import Json, cell, fail, print_json, table

PACE = 1e6  # new flows per second, at most


class OrderName(StrEnum):
    sequential = "sequential"
    random = "random"
    zipf = "zipf"


class Direction(StrEnum):
    out = "out"
    both = "both"
    unsolicited = "unsolicited"


def register(app: typer.Typer) -> None:
    app.command()(pktgen)


def _pool(text: str) -> tuple[IPv4Address, IPv4Address]:
    first, _, last = text.partition("-")
    try:
        found = IPv4Address(first), IPv4Address(last or first)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no ADDRESS or ADDRESS-ADDRESS") from None
    if found[0] > found[1]:
        raise typer.BadParameter(f"{text!r} ends before it begins")
    return found


def _sizes(text: str) -> tuple[int, ...]:
    from bench.pktgen import IMIX, LEAST_FRAME

    if text == "imix":
        return IMIX
    try:
        sizes = tuple(int(word) - 4 for word in text.split(","))  # the checksum of Ethernet is the device's
    except ValueError:
        raise typer.BadParameter(f"{text!r}: bytes of frames with commas, or imix") from None
    if not all(LEAST_FRAME <= size <= 1514 for size in sizes) or len(sizes) > 64:
        raise typer.BadParameter(f"{text!r}: frames have {LEAST_FRAME + 4} to 1518 bytes, 64 sizes at most")
    return sizes


def pktgen(
    inside: Annotated[str, typer.Argument(help="DPDK device or kernel interface at the NAT's inside.")],
    outside: Annotated[str, typer.Argument(help="The same at its outside.")],
    pool: Annotated[str, typer.Option(help="External addresses that the NAT may use: A or A-B.")],
    nat: Annotated[str, typer.Option(help="The NAT's own two addresses: INSIDE,OUTSIDE; asked by ARP.")] = "",
    ours: Annotated[str, typer.Option(help="Two addresses of ours on its subnets: INSIDE,OUTSIDE.")] = "",
    macs: Annotated[
        str, typer.Option(help="Instead of --nat and --ours, its two MACs: of one that answers no ARP.")
    ] = "",
    flows: Annotated[int, typer.Option(min=1, max=16_000_000)] = 1000,
    hosts: Annotated[str, typer.Option(help="The first inside address; 64 flows each.")] = "10.0.1.0",
    remote: Annotated[str, typer.Option(help="The first of 256 remote addresses.")] = "203.0.113.0",
    order: Annotated[OrderName, typer.Option(help="Which flow comes next.")] = OrderName.random,
    direction: Annotated[
        Direction, typer.Option(help="From inside, with answers, or unasked.")
    ] = Direction.both,
    size: Annotated[str, typer.Option(help="Bytes of frames, 64 to 1518, with commas; or imix.")] = "64",
    rate: Annotated[float, typer.Option(min=0, help="Packets per second; 0: as many as go.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.1)] = 5,
    check: Annotated[int, typer.Option(min=1, help="One in so many packets is looked at byte by byte.")] = 16,
    rfc9693: Annotated[
        bool, typer.Option(help="Search for set-up rate, capacity and throughput, below --rate.")
    ] = False,
    clear: Annotated[
        str,
        typer.Option(
            help="With --rfc9693, a command that empties the NAT's table, before each trial: then the tear-down rate too."
        ),
    ] = "",
    cpu: Annotated[int | None, typer.Option(help="Which CPU it shall poll on.")] = None,
    as_json: Json = False,
) -> None:
    """Generate traffic around a NAT and check what comes back: endpoints, checksums, losses, latency, rates.

    First every flow is opened once; then comes the phase that counts. Exit code 1 when something was wrong.
    """
    try:
        from bench.pktgen import (
            Flows,
            Generator,
            GeneratorError,
            Order,
            Phase,
            Result,
            What,
            phases,
            wait_for_links,
        )
        from nat_fastpath.dpdk import DpdkError, Eal, InterfaceError, Mempool, Port
    except ImportError as error:
        raise fail(str(error)) from None
    try:
        ends = [[IPv4Address(word) for word in text.split(",")] for text in (nat, ours)] if not macs else []
        known = [bytes.fromhex(word.replace(":", "")) for word in macs.split(",") if macs]
        first = IPv4Address(hosts), IPv4Address(remote)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if any(len(pair) != 2 for pair in ends):
        raise typer.BadParameter("--nat and --ours are two addresses each: INSIDE,OUTSIDE")
    if macs and [len(mac) for mac in known] != [6, 6]:
        raise typer.BadParameter("--macs are two MACs: INSIDE,OUTSIDE")
    of = Flows(flows, _pool(pool), inside=first[0], remote=first[1])
    sizes = _sizes(size)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="tandem-pktgen-") as state:
        opened: list[Port] = []
        try:
            Eal(memory_mb=256, cpu=cpu, devices=(inside, outside))
            buffers = Mempool("pktgen", 32768)
            for index, device in enumerate((inside, outside)):
                opened.append(Port(device, buffers, index=index, state_dir=Path(state)))
            wait_for_links(opened)
            generator = Generator((opened[0], opened[1]), buffers, of, (opened[0].mac, opened[1].mac))
            signal.signal(signal.SIGINT, lambda *_: generator.stop())
            for side in (0, 1):
                if macs:
                    generator.send_to(side, known[side])
                else:
                    generator.resolve(side, ends[1][side], ends[0][side])
            if rfc9693:
                emptied = (lambda: subprocess.run(shlex.split(clear), check=False)) if clear else None
                for figure in phases.all_phases(generator, rate or PACE, seconds, sizes, emptied):
                    print(json.dumps(figure), flush=True)
                return
            pace = min(rate, PACE) if rate else PACE
            if direction is not Direction.unsolicited:
                results["open"] = phases.open_all(generator, pace, check)
            what = {
                Direction.out: What.OUT,
                Direction.both: What.OUT | What.IN,
                Direction.unsolicited: What.UNSOLICITED,
            }[direction]
            results["run"] = generator.start(
                Phase(what, Order[order.upper()], rate=rate, seconds=seconds, sizes=sizes, check_every=check)
            ).wait()
            open_flows = int((generator.mappings() != 0).sum())
            generator.close()
        except (DpdkError, InterfaceError, GeneratorError) as error:
            raise fail(error) from None
        finally:
            for port in opened:
                port.close()
    if as_json:
        summaries = {name: result.summary() for name, result in results.items()}
        print_json({**summaries, "open_flows": open_flows})
    else:
        keys = list(results["run"].summary())
        rows = [
            [key.replace("_", " "), *(cell(_short(one.summary()[key])) for one in results.values())]
            for key in keys
        ]
        table(f"{flows} flows", ["", *results], rows)
    if any(result.wrong for result in results.values()):
        print("tandem-nat: the NAT did wrong, see `wrong`", file=sys.stderr)
        raise typer.Exit(1)


def _short(value: object) -> object:
    if isinstance(value, dict):
        return " ".join(f"{name} {one}" for name, one in value.items()) or "-"
    return value
