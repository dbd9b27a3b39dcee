# SPDX-License-Identifier: Apache-2.0
"""Structured arrays moved as bytes: numpy copies them field by field, which takes thirty times as long."""

from __future__ import annotations

from typing import Any

import numpy as np

FEW = 32  # rows for which the detour of numpy's views takes longer
Table = np.ndarray[Any, np.dtype[np.void]]  # shape (n,)


def _raw(table: Table) -> Table:
    return table.view(f"V{table.dtype.itemsize}")


def copied(table: Table, dtype: np.dtype[np.void]) -> Table:
    """As a new array of this type, shape (n,)."""
    if not isinstance(table, np.ndarray) or table.dtype != dtype or table.ndim != 1:
        return np.array(table, dtype, copy=True, ndmin=1)
    if len(table) <= FEW:
        return np.frombuffer(bytearray(table.tobytes()), dtype)
    return _raw(table).copy().view(dtype)


def taken(table: Table, which: np.ndarray[Any, Any]) -> Table:
    """``table[which]``, a copy; ``which``: places, or a mask."""
    return np.asarray(_raw(table)[which].view(table.dtype))


def chosen(table: Table, which: np.ndarray[Any, np.dtype[np.bool_]]) -> Table:
    """The rows of this mask; the table itself where it has all."""
    return table if np.count_nonzero(which) == len(table) else taken(table, which)


def joined(*tables: Table) -> Table:
    """One after the other; of one that alone has rows it is that one itself."""
    some = [table for table in tables if len(table)] or [tables[0]]
    return some[0] if len(some) == 1 else np.concatenate([_raw(one) for one in some]).view(some[0].dtype)
