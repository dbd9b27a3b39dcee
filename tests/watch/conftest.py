# SPDX-License-Identifier: Apache-2.0
"""What the tests of failure detection share."""

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture
def stream() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours, to write on, and the far end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs
