# SPDX-License-Identifier: Apache-2.0
"""Open vSwitch's connection tracking, besides what OpenFlow says of it: settings, and the list of its entries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_agent.conntrack import ENTRY, IDLE, PAGE, ZONE, Entries, entries
from switch_agent.ovs_control import OvsError, ask, transact

DATAPATH = "netdev@ovs-netdev"  # that of all bridges with datapath_type=netdev
_TIMEOUTS = [
    *(f"udp_{name}" for name in ("first", "single", "multiple")),
    *(
        f"tcp_{name}"
        for name in (
            "syn_sent", "syn_recv", "established", "fin_wait", "time_wait", "close", "close_wait", "last_ack",
            "retransmit", "unack",
        )
    ),
]  # fmt: skip


async def prepare(where: Path, room: int) -> None:
    """The tracker forgets nothing by itself, minds no sequence numbers (it has not seen the connections begin), and has
    room. Raises OvsError."""
    await ask(where, "dpctl/ct-disable-tcp-seq-chk", DATAPATH)
    if int(await ask(where, "dpctl/ct-get-maxconns", DATAPATH)) < room:
        await ask(where, "dpctl/ct-set-maxconns", DATAPATH, str(room))
    await _keep_long(where)


async def dump(where: Path) -> Entries:
    """All entries of sessions; shape (n,), dtype ENTRY. Raises OvsError."""
    lines = (await ask(where, "dpctl/dump-conntrack", "-s", DATAPATH, f"zone={ZONE}")).splitlines()
    found = [np.zeros(0, ENTRY)]
    for at in range(0, len(lines), PAGE):
        found.append(entries("\n".join(lines[at : at + PAGE])))
        await asyncio.sleep(0)  # others have their turn
    return np.concatenate(found)


async def _keep_long(where: Path) -> None:
    """The zone's timeout policy, in the database."""
    wanted = dict.fromkeys(_TIMEOUTS, IDLE)
    results = await transact(
        where,
        {"op": "select", "table": "Open_vSwitch", "where": [], "columns": ["datapaths", "next_cfg"]},
        {"op": "select", "table": "Datapath", "where": [], "columns": ["_uuid", "ct_zones"]},
        {"op": "select", "table": "CT_Zone", "where": [], "columns": ["_uuid", "timeout_policy"]},
        {"op": "select", "table": "CT_Timeout_Policy", "where": [], "columns": ["_uuid", "timeouts"]},
    )
    (settings,), datapaths, zones, policies = (one["rows"] for one in results)
    known = {row["_uuid"][1]: row for row in (*datapaths, *zones, *policies)}
    datapath = dict(settings["datapaths"][1]).get("netdev")
    zone = dict(known[datapath[1]]["ct_zones"][1]).get(ZONE) if datapath else None
    policy = known[zone[1]]["timeout_policy"] if zone else None
    if policy and dict(known[policy[1]]["timeouts"][1] if policy[0] == "uuid" else ()) == wanted:
        return
    put = {ZONE: ["named-uuid", "zone"]}
    operations = [
        _insert("CT_Timeout_Policy", "policy", timeouts=["map", [list(one) for one in wanted.items()]]),
        _insert("CT_Zone", "zone", timeout_policy=["named-uuid", "policy"]),
    ]
    if datapath:
        change = [["ct_zones", "delete", ["set", [ZONE]]], ["ct_zones", "insert", _map(put)]]
        operations.append(
            {"op": "mutate", "table": "Datapath", "where": [["_uuid", "==", datapath]], "mutations": change}
        )
    else:
        operations.append(_insert("Datapath", "datapath", ct_zones=_map(put)))
        new = ["datapaths", "insert", _map({"netdev": ["named-uuid", "datapath"]})]
        operations.append({"op": "mutate", "table": "Open_vSwitch", "where": [], "mutations": [new]})
    counted = {"op": "mutate", "table": "Open_vSwitch", "where": [], "mutations": [["next_cfg", "+=", 1]]}
    await transact(where, *operations, counted)
    # until the daemon has it
    await transact(
        where,
        {
            "op": "wait",
            "table": "Open_vSwitch",
            "timeout": 4000,
            "where": [["cur_cfg", ">", settings["next_cfg"]]],
            "columns": ["db_version"],
            "until": "!=",
            "rows": [],
        },
    )


def _insert(table: str, name: str, **row: object) -> dict[str, object]:
    return {"op": "insert", "table": table, "uuid-name": name, "row": row}


def _map(values: Mapping[Any, object]) -> list[object]:
    return ["map", [list(one) for one in values.items()]]


__all__ = ["DATAPATH", "OvsError", "dump", "prepare"]
