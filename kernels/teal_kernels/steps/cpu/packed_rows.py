"""Products with packed int8 and int4 rows: weighted sums of selected rows, dot products with consecutive rows, and rows
unpacked for a matrix product of many tokens.

The counterpart of rows.py for weights that packing.py has packed. Four accumulators of sixteen columns stay in
registers while eight rows are added to them, and the same columns of later rows are prefetched. The product of a scale
and an activation is computed once per row and group. With AVX-512 the sixteen possible products of an int4 group are
one register, and a product is looked up in it instead of being computed; elsewhere codes are converted and multiplied.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from teal_kernels.steps.cpu.intrinsics import item_bytes, prefetch
from teal_kernels.steps.cpu.lanes import (
    add,
    codes,
    factors,
    load_floats,
    load_scale,
    multiply_add,
    products,
    store_floats,
    store_rounded,
    sum_lanes,
    times,
    unit_bytes,
    zeros,
)
from teal_kernels.steps.cpu.rows import LINE, prefetch_bytes, row_at
from teal_kernels.steps.cpu.vectors import INNER, compiled

UNIT = 64
"""Columns that are packed together and multiplied at once."""

FIRST = 1024
"""Bytes of each of the first rows that are prefetched before the first sum."""

inlined = njit(**INNER, forceinline=True)


@inlined
def add_unit(kind: Any, sums: Any, unit: int, scale: int, second: int, factor: Any) -> Any:
    """sums + x * 64 dequantised weights, the sums of 16 columns each.

    `second`: bytes from the scale of the unit's first half to that of its second, 0 where they are the same.
    """
    a, b, c, d = sums
    low = times(load_scale(scale), factor)
    high = times(load_scale(scale + second), factor) if second else low
    return (
        products(kind, unit, 0, low, a),
        products(kind, unit, 1, low, b),
        products(kind, unit, 2, high, c),
        products(kind, unit, 3, high, d),
    )


@inlined
def load_sums(out: Any, at: int) -> Any:
    return load_floats(out, at), load_floats(out, at + 16), load_floats(out, at + 32), load_floats(out, at + 48)


@inlined
def store_sums(out: Any, at: int, sums: Any) -> None:
    a, b, c, d = sums
    store_floats(out, at, a)
    store_floats(out, at + 16, b)
    store_floats(out, at + 32, c)
    store_floats(out, at + 48, d)


@compiled
def add_packed_rows(
    kind: Any, base: int, scales: int, stride: int, group: int, index: Any, kept: int, x: Any, units: int, out: Any
) -> None:
    """out[: 64 * units] += sum over k of x[index[k]] * dequantised row index[k], in the order of k.

    Args:
        kind: int8 or uint8 array, see lanes.py.
        base, scales: addresses of the first wanted unit and of its first scale in row 0; rows are `stride` bytes apart.
        group: log2 of the columns that share a scale, at least 5. A wanted unit begins a group.
        index: int64, `kept` of them.
        out: float32; stays in the first-level cache.
    """
    size, second = unit_bytes(kind), 2 if group == 5 else 0
    span, scale_bytes = units * size, ((UNIT * units - 1 >> group) + 1) * 2
    ahead = 8 if span >= FIRST else 16  # narrow rows are added before a prefetch completes
    for k in range(min(ahead, kept)):
        row = index[k] * stride
        prefetch_bytes(base + row, min(span, FIRST))
        prefetch_bytes(scales + row, scale_bytes)
    k = 0
    while k + 8 <= kept:
        r0, r1, r2, r3 = index[k] * stride, index[k + 1] * stride, index[k + 2] * stride, index[k + 3] * stride
        r4, r5, r6, r7 = index[k + 4] * stride, index[k + 5] * stride, index[k + 6] * stride, index[k + 7] * stride
        f0, f1 = factors(kind, x[index[k]]), factors(kind, x[index[k + 1]])
        f2, f3 = factors(kind, x[index[k + 2]]), factors(kind, x[index[k + 3]])
        f4, f5 = factors(kind, x[index[k + 4]]), factors(kind, x[index[k + 5]])
        f6, f7 = factors(kind, x[index[k + 6]]), factors(kind, x[index[k + 7]])
        later = k + ahead
        n0, n1 = row_at(base, stride, index, later, kept), row_at(base, stride, index, later + 1, kept)
        n2, n3 = row_at(base, stride, index, later + 2, kept), row_at(base, stride, index, later + 3, kept)
        n4, n5 = row_at(base, stride, index, later + 4, kept), row_at(base, stride, index, later + 5, kept)
        n6, n7 = row_at(base, stride, index, later + 6, kept), row_at(base, stride, index, later + 7, kept)
        for row in (n0, n1, n2, n3, n4, n5, n6, n7):
            prefetch_bytes(row + (scales - base), scale_bytes)
        k += 8
        for unit in range(units):
            at = unit * size
            if at % LINE == 0:
                for row in (n0, n1, n2, n3, n4, n5, n6, n7):
                    prefetch(row + at)
            at, scale = base + at, scales + (UNIT * unit >> group) * 2
            sums = load_sums(out, UNIT * unit)
            sums = add_unit(kind, sums, at + r0, scale + r0, second, f0)
            sums = add_unit(kind, sums, at + r1, scale + r1, second, f1)
            sums = add_unit(kind, sums, at + r2, scale + r2, second, f2)
            sums = add_unit(kind, sums, at + r3, scale + r3, second, f3)
            sums = add_unit(kind, sums, at + r4, scale + r4, second, f4)
            sums = add_unit(kind, sums, at + r5, scale + r5, second, f5)
            sums = add_unit(kind, sums, at + r6, scale + r6, second, f6)
            sums = add_unit(kind, sums, at + r7, scale + r7, second, f7)
            store_sums(out, UNIT * unit, sums)
    while k < kept:
        row, factor = index[k] * stride, factors(kind, x[index[k]])
        for unit in range(units):
            at, scale = base + unit * size, scales + (UNIT * unit >> group) * 2
            sums = load_sums(out, UNIT * unit)
            store_sums(out, UNIT * unit, add_unit(kind, sums, at + row, scale + row, second, factor))
        k += 1


@inlined
def dot_pair(x: Any, at: int, first: Any, second: Any) -> Any:
    """Sixteen sums that together are x[at : at + 32] . two vectors of sixteen codes."""
    return multiply_add(load_floats(x, at + 16), second, times(load_floats(x, at), first))


@compiled
def dot_packed_rows(
    kind: Any, base: int, scales: int, stride: int, group: int, count: int, x: Any, units: int, out: Any, ahead: int
) -> None:
    """out[i] = x . dequantised row i, for i < count; rows are consecutive. Arguments as in `add_packed_rows`.

    Args:
        x: float32 [64 * units], zero beyond the width of the rows.
        ahead: how many bytes in advance rows are prefetched.
    """
    size, second = unit_bytes(kind), 2 if group == 5 else 0
    for i in range(count):
        row = base + i * stride
        total = zeros()
        for unit in range(units):
            at, scale = row + unit * size, row + (scales - base) + (UNIT * unit >> group) * 2
            if unit * size % LINE == 0:
                prefetch(at + ahead)
            low = dot_pair(x, UNIT * unit, codes(kind, at, 0), codes(kind, at, 1))
            high = dot_pair(x, UNIT * unit + 32, codes(kind, at, 2), codes(kind, at, 3))
            if second:
                total = multiply_add(load_scale(scale), low, total)
                total = multiply_add(load_scale(scale + second), high, total)
            else:
                total = multiply_add(load_scale(scale), add(low, high), total)
        out[i] = sum_lanes(total)


@compiled
def unpack_rows(
    kind: Any, base: int, scales: int, stride: int, group: int, count: int, units: int, dtype: Any, out: int, step: int
) -> None:
    """Writes 64 * units dequantised weights of each of `count` rows, for a matrix product of many tokens. Arguments as
    in `add_packed_rows`.

    Args:
        dtype: an array that tells the dtype of the result, see intrinsics.py.
        out: address of the result; its rows are `step` bytes apart.
    """
    size, item = unit_bytes(kind), item_bytes(dtype)
    for k in range(count):
        for unit in range(units):
            at, scale = base + k * stride + unit * size, scales + k * stride
            low = load_scale(scale + (UNIT * unit >> group) * 2)
            high = load_scale(scale + (UNIT * unit + 32 >> group) * 2)
            to = out + k * step + UNIT * unit * item
            store_rounded(dtype, to, times(low, codes(kind, at, 0)))
            store_rounded(dtype, to + 16 * item, times(low, codes(kind, at, 1)))
            store_rounded(dtype, to + 32 * item, times(high, codes(kind, at, 2)))
            store_rounded(dtype, to + 48 * item, times(high, codes(kind, at, 3)))
