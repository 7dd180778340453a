"""Products of many sparse rows with one matrix, as functions that Python can call.

Rows are independent of each other: a row gives the same bits whatever others there are. The matrix is gone through tile
by tile. A tile is widened to float32 once and stays in the first-level cache, while each row adds those of its lines
that it keeps to sums in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from teal_kernels.steps.cpu.intrinsics import fetch, item_bytes, narrow, put, store
from teal_kernels.steps.cpu.lanes import LANES, add_times, load_floats, store_floats, store_rounded
from teal_kernels.steps.cpu.vectors import compiled

ZERO = np.float32(0.0)
WIDTH = 4 * LANES
"""Columns of a tile: their sums are eight registers with AVX2, as many as hide the latency of an addition."""
DEPTH = 96
"""Rows of a tile: 24 KB as float32."""

_PUBLIC = {"nogil": True, "error_model": "numpy", "cache": True, "_nrt": False}


@njit(**_PUBLIC)
def list_kept(kind: Any, x: int, stride: int, count: int, places: Any, values: Any, ends: Any) -> None:
    """Lists the entries of each row that are not zero.

    Args:
        kind: dtype of the rows, see intrinsics.py; x: address of the first; stride: bytes from row to row.
        count: K, entries of a row.
        places: uint32 [R, K], of each kept entry WIDTH times its line in its tile.
        values: float32 [R, K].
        ends: uint32 [R, T + 1], kept entries before tile t, for the T tiles of DEPTH entries.
    """
    for row in range(len(places)):
        place, value, end, base = places[row], values[row], ends[row], x + row * stride
        kept = 0
        for tile in range(len(end) - 1):
            end[tile] = kept
            first = tile * DEPTH
            for line in range(min(DEPTH, count - first)):
                entry = fetch(kind, base, first + line)
                place[kept] = np.uint32(WIDTH * line)
                value[kept] = entry
                kept += int(entry != 0)
        end[len(end) - 1] = kept


@njit(**_PUBLIC)
def multiply_rows(
    kind: Any,
    weight: int,
    stride: int,
    count: int,
    width: int,
    places: Any,
    values: Any,
    ends: Any,
    tile: Any,
    sums: Any,
    out: int,
) -> None:
    """out = rows @ matrix, sums in float32.

    Args:
        kind: dtype of the matrix; weight: address of its first wanted column; stride: bytes from row to row.
        count, width: K, and the wanted columns.
        places, values, ends: as `list_kept` left them.
        tile: float32 [DEPTH * WIDTH], overwritten; it should begin at a cache line.
        sums: float32 [R * WIDTH], overwritten.
        out: address of [R, width] of the kind.
    """
    size, rows = item_bytes(kind), len(places)
    for column in range(0, width, WIDTH):
        wanted = min(WIDTH, width - column)
        sums[:] = ZERO
        for number in range(ends.shape[1] - 1):
            first = number * DEPTH
            for line in range(min(DEPTH, count - first)):
                address = weight + (first + line) * stride + column * size
                for i in range(wanted):
                    put(tile, WIDTH * line + i, fetch(kind, address, i))
            for row in range(rows):
                if ends[row, number] < ends[row, number + 1]:
                    add_lines(places[row], values[row], ends[row, number], ends[row, number + 1], tile, sums, row)
        for row in range(rows):
            address, at = out + (row * width + column) * size, row * WIDTH
            if wanted == WIDTH:
                for part in range(0, WIDTH, LANES):
                    store_rounded(kind, address + part * size, load_floats(sums, at + part))
            else:
                for i in range(wanted):
                    store(kind, address, i, narrow(kind, sums[at + i]))


@compiled
def add_lines(place: Any, value: Any, begin: int, end: int, tile: Any, sums: Any, row: int) -> None:
    """sums of a row += its kept entries `begin` to `end`, each times its line of the tile."""
    at = row * WIDTH
    a, b = load_floats(sums, at), load_floats(sums, at + LANES)
    c, d = load_floats(sums, at + 2 * LANES), load_floats(sums, at + 3 * LANES)
    for k in range(begin, end):
        x, line = value[k], place[k]
        a = add_times(a, x, load_floats(tile, line))
        b = add_times(b, x, load_floats(tile, line + LANES))
        c = add_times(c, x, load_floats(tile, line + 2 * LANES))
        d = add_times(d, x, load_floats(tile, line + 3 * LANES))
    store_floats(sums, at, a)
    store_floats(sums, at + LANES, b)
    store_floats(sums, at + 2 * LANES, c)
    store_floats(sums, at + 3 * LANES, d)
