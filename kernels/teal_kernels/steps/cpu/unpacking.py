"""Unpacking of int8 and int4 rows, as a function that Python can call."""

from __future__ import annotations

from typing import Any

from numba import njit

from teal_kernels.steps.cpu.packed_rows import unpack_rows


@njit(nogil=True, error_model="numpy", cache=True, _nrt=False)
def unpack(
    kind: Any, base: int, scales: int, stride: int, group: int, count: int, units: int, dtype: Any, out: int, step: int
) -> None:
    """`unpack_rows`."""
    unpack_rows(kind, base, scales, stride, group, count, units, dtype, out, step)
