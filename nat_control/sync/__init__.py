# SPDX-License-Identifier: Apache-2.0
"""How two instances keep each other's sessions: a pure protocol, its bytes, and its sockets."""
