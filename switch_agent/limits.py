# SPDX-License-Identifier: Apache-2.0
"""Bounds of a channel to a switch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one switch may cost the agent; times in seconds. docs/switch.md says what happens beyond each."""

    newcomers: int = 8  # connections that have not said yet who they are
    outstanding: int = 4  # transactions that wait for their barrier
    events: int = 65536  # that wait to be taken; more end the connection, which is then made anew
    packets: int = 4096  # packet-ins among them; more are dropped and counted
    packet_bytes: int = 16 << 20  # of their frames; likewise
    ports: int = 65536  # of the switch
    errors: int = 65536  # of one transaction
    flows: int = 4_000_000  # of one answer with statistics
    empty: int = 100  # parts of it that say nothing, and that more comes
    write_buffer: int = (
        8 << 20
    )  # bytes; beyond it packet-outs are dropped and counted, an echo request ends it
    answer: float = 10  # for the greeting, a barrier and each part of statistics
    statistics: float = 60  # for all parts together
    proof: float = 2  # after the barrier, until a probe has come back
    idle: float = 5  # of silence until the switch is asked whether it lives, and again until it is given up
