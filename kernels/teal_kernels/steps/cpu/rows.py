"""The two ways in which a step reads rows from memory: weighted sums of rows, and dot products with each row.

Sums of rows are the sparse projections: rows of an input-major matrix, weighted by the kept entries. Dot products are
the output head: rows of the embedding. Attention reads its rows in heads.py. Nearly all the time of a step is spent
here, waiting for memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teal_kernels.steps.cpu.intrinsics import fetch, get, item_bytes, prefetch, put
from teal_kernels.steps.cpu.vectors import compiled, contracted, reordered

ZERO = np.float32(0.0)
LINE = 64
"""Bytes of a cache line."""
CHUNK, LONG_CHUNK = 128, 512
"""Columns that are prefetched at a time: of selected rows, and of consecutive rows."""
STREAM = 8192
"""How many bytes in advance consecutive rows are prefetched, where nothing else is read next."""


@compiled
def prefetch_bytes(address: int, size: int) -> None:
    """Prefetch `size` bytes: the hardware prefetcher restarts at each row. More bytes at a time would fill the core's
    line-fill buffers (cache lines in flight), and loads of the current rows would wait for them.
    """
    for byte in range(0, size, LINE):
        prefetch(address + byte)


@compiled
def row_at(base: int, stride: int, index: Any, k: int, kept: int) -> int:
    """Address of selected row k, or of the last one."""
    return base + index[min(k, kept - 1)] * stride


@contracted
def add_rows(kind: Any, base: int, stride: int, index: Any, kept: int, x: Any, width: int, out: Any) -> None:
    """out[:width] += sum over k of x[index[k]] * row index[k], in the order of k.

    Args:
        base: address of the first wanted element of row 0; rows are `stride` bytes apart.
        index: int64, `kept` of them.
        out: float32; its first `width` elements stay in the first-level cache while eight rows at a time are added and
            the next eight are prefetched.
    """
    size = item_bytes(kind)
    for k in range(min(8, kept)):
        prefetch_bytes(base + index[k] * stride, min(width, 4 * CHUNK) * size)
    k = 0
    while k + 8 <= kept:
        r0, r1 = base + index[k] * stride, base + index[k + 1] * stride
        r2, r3 = base + index[k + 2] * stride, base + index[k + 3] * stride
        r4, r5 = base + index[k + 4] * stride, base + index[k + 5] * stride
        r6, r7 = base + index[k + 6] * stride, base + index[k + 7] * stride
        v0, v1, v2, v3 = x[index[k]], x[index[k + 1]], x[index[k + 2]], x[index[k + 3]]
        v4, v5, v6, v7 = x[index[k + 4]], x[index[k + 5]], x[index[k + 6]], x[index[k + 7]]
        k += 8
        n0, n1 = row_at(base, stride, index, k, kept), row_at(base, stride, index, k + 1, kept)
        n2, n3 = row_at(base, stride, index, k + 2, kept), row_at(base, stride, index, k + 3, kept)
        n4, n5 = row_at(base, stride, index, k + 4, kept), row_at(base, stride, index, k + 5, kept)
        n6, n7 = row_at(base, stride, index, k + 6, kept), row_at(base, stride, index, k + 7, kept)
        for first in range(0, width, CHUNK):
            part, count, at = out[first : first + CHUNK], min(CHUNK, width - first), first * size
            for row in (n0, n1, n2, n3, n4, n5, n6, n7):
                prefetch_bytes(row + at, count * size)
            for i in range(count):
                total = get(part, i) + v0 * fetch(kind, r0 + at, i)
                total += v1 * fetch(kind, r1 + at, i)
                total += v2 * fetch(kind, r2 + at, i)
                total += v3 * fetch(kind, r3 + at, i)
                total += v4 * fetch(kind, r4 + at, i)
                total += v5 * fetch(kind, r5 + at, i)
                total += v6 * fetch(kind, r6 + at, i)
                total += v7 * fetch(kind, r7 + at, i)
                put(part, i, total)
    while k < kept:
        r0, v0 = base + index[k] * stride, x[index[k]]
        for i in range(width):
            put(out, i, get(out, i) + v0 * fetch(kind, r0, i))
        k += 1


@reordered
def dot_rows(kind: Any, base: int, stride: int, count: int, x: Any, width: int, out: Any, ahead: int) -> None:
    """out[i] = x[:width] . row i for i < count; arguments as in `add_rows`. What lies `ahead` bytes after a row is
    prefetched meanwhile. Rows are consecutive and read one at a time: four at a time give a third of the bandwidth."""
    size = item_bytes(kind)
    for i in range(count):
        row, total = base + i * stride, ZERO
        for first in range(0, width, LONG_CHUNK):
            part, at = x[first : min(first + LONG_CHUNK, width)], row + first * size
            prefetch_bytes(at + ahead, len(part) * size)
            for j in range(len(part)):
                total += part[j] * fetch(kind, at, j)
        out[i] = total
