# SPDX-License-Identifier: Apache-2.0
"""Decisions: configuration, the control loop, the operator's socket and command."""
