"""The two ways in which a step reads rows from memory: weighted sums of rows, and dot products with each row.

Both serve two masters. Sums of rows are the sparse projections (rows of an input-major matrix, weighted by
the kept entries) and the values in attention (weighted by probabilities); dot products are the output head
(rows of the embedding) and the scores in attention. Nearly all the time of a step is spent here, waiting for
memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teal_kernels.cpu_step.intrinsics import fetch, get, item_bytes, prefetch, put
from teal_kernels.cpu_step.vectors import contracted, reordered

ZERO = np.float32(0.0)
LINE = 64
SHORT = 2048
"""Bytes of a row up to which software asks for rows in advance: the processor's prefetcher starts anew at each row, and
it needs some kilobytes to get going."""
AHEAD = 8
"""How many rows in advance, where rows are picked."""
STREAM = 8192
"""How many bytes in advance, where rows follow each other."""


@contracted
def add_rows(kind: Any, base: int, stride: int, index: Any, kept: int, x: Any, width: int, out: Any) -> None:
    """out[:width] += sum over k of x[index[k]] * row index[k], in the order of k.

    Args:
        base: address of the first wanted element of row 0; rows are `stride` bytes apart.
        index: int64, `kept` of them.
        out: float32; its first `width` elements stay in the first-level cache while eight rows at a time pass by.
    """
    k = 0
    while k + 8 <= kept:
        r0, r1 = base + index[k] * stride, base + index[k + 1] * stride
        r2, r3 = base + index[k + 2] * stride, base + index[k + 3] * stride
        r4, r5 = base + index[k + 4] * stride, base + index[k + 5] * stride
        r6, r7 = base + index[k + 6] * stride, base + index[k + 7] * stride
        v0, v1, v2, v3 = x[index[k]], x[index[k + 1]], x[index[k + 2]], x[index[k + 3]]
        v4, v5, v6, v7 = x[index[k + 4]], x[index[k + 5]], x[index[k + 6]], x[index[k + 7]]
        for i in range(width):
            total = get(out, i) + v0 * fetch(kind, r0, i)
            total += v1 * fetch(kind, r1, i)
            total += v2 * fetch(kind, r2, i)
            total += v3 * fetch(kind, r3, i)
            total += v4 * fetch(kind, r4, i)
            total += v5 * fetch(kind, r5, i)
            total += v6 * fetch(kind, r6, i)
            total += v7 * fetch(kind, r7, i)
            put(out, i, total)
        k += 8
    while k < kept:
        r0, v0 = base + index[k] * stride, x[index[k]]
        for i in range(width):
            put(out, i, get(out, i) + v0 * fetch(kind, r0, i))
        k += 1


@contracted
def add_short_rows(kind: Any, base: int, stride: int, index: Any, kept: int, x: Any, width: int, out: Any) -> None:
    """`add_rows` for rows of a kilobyte or two: two at a time, nearly in the order in which they lie in memory, with
    rows further on asked for in advance. The processor's prefetcher neither starts in time nor follows eight rows."""
    row_bytes = width * item_bytes(kind)
    for k in range(min(AHEAD, kept)):
        for byte in range(0, row_bytes, LINE):
            prefetch(base + index[k] * stride + byte)
    k = 0
    while k + 2 <= kept:
        for ahead in range(k + AHEAD, min(k + AHEAD + 2, kept)):
            for byte in range(0, row_bytes, LINE):
                prefetch(base + index[ahead] * stride + byte)
        r0, r1 = base + index[k] * stride, base + index[k + 1] * stride
        v0, v1 = x[index[k]], x[index[k + 1]]
        for i in range(width):
            total = get(out, i) + v0 * fetch(kind, r0, i)
            total += v1 * fetch(kind, r1, i)
            put(out, i, total)
        k += 2
    if k < kept:
        r0, v0 = base + index[k] * stride, x[index[k]]
        for i in range(width):
            put(out, i, get(out, i) + v0 * fetch(kind, r0, i))


@reordered
def dot_rows(kind: Any, base: int, stride: int, count: int, x: Any, width: int, out: Any) -> None:
    """out[i] = x[:width] . row i for i < count; arguments as in `add_rows`, rows without gaps."""
    distance = STREAM if stride <= SHORT else 0
    for i in range(count):
        row = base + i * stride
        for byte in range(distance, distance + min(distance, stride), LINE):
            prefetch(row + byte)
        total = ZERO
        for j in range(width):
            total += x[j] * fetch(kind, row, j)
        out[i] = total
