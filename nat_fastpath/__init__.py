# SPDX-License-Identifier: Apache-2.0
"""Packets: the NAT core, its Python face, and the DPDK driver that feeds it."""
