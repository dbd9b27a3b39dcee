# SPDX-License-Identifier: Apache-2.0
"""Links of the switch's ports by the word of this host's kernel."""

import json
import select

from nat_control.lab import Lab
from switch_agent.codec import PortDescription
from switch_agent.devices import Devices
from tests.entered import entered


def test_the_links_of_ports_that_are_devices_here() -> None:
    told: list[tuple[int, bool]] = []
    with Lab() as lab:
        switch, server = lab.namespace("switch"), lab.namespace("server")
        for name in ("one", "two", "other"):
            lab.cable(switch, name, server, f"far-{name}")
        with entered(switch):
            devices = Devices(lambda port, up: told.append((port.number, up)))
            links = json.loads(switch.ip("-json", "link", "show"))
            macs = {link["ifname"]: bytes.fromhex(link["address"].replace(":", "")) for link in links}
            elsewhere = bytes(6)  # a device of that name on another host
            devices.watch(
                [
                    PortDescription(1, "one", macs["one"], True),
                    PortDescription(2, "two", macs["two"], True),
                    PortDescription(3, "other", elsewhere, True),
                    PortDescription(4, "nowhere", elsewhere, True),
                ]
            )

        def hear(many: int) -> None:
            while len(told) < many and select.select([devices], [], [], 5)[0]:
                devices.read()

        server.ip("link", "set", "far-other", "down")
        server.ip("link", "set", "far-one", "down")
        server.ip("link", "set", "far-two", "down")
        hear(2)
        assert told == [(1, False), (2, False)]
        server.ip("link", "set", "far-one", "up")
        hear(3)
        switch.ip("link", "delete", "two")
        switch.ip("link", "delete", "one")
        hear(4)
        assert told[2:] == [(1, True), (1, False)], "two was down already"
        devices.close()
