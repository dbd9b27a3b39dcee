# SPDX-License-Identifier: Apache-2.0
"""Measurements, each beside the floor of the same run."""
