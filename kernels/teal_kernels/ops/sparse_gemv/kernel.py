"""Triton kernels of `sparse_gemv`: partial sums of the weight rows of a kept list, then their sum.

Nothing here is atomic and every sum has a fixed order: the same inputs give the same bits. How long the list
is, only the device knows; the host never asks. Device code only: sizes, launches and checks live in `op.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.kept.kernel import kept_total, list_address
from teal_kernels.ops.threshold.kernel import await_previous, is_kept, projection_threshold


@triton.jit
def tile_columns(tile, EDGES: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """First column, end of its segment, and segment number of a tile; no tile straddles two segments.

    Segment p covers columns EDGES[p] ... EDGES[p+1] and begins at tile TILES[p].
    """
    first = tile * BLOCK_N
    stop = first * 0 + EDGES[1]
    segment = first * 0
    for p in tl.static_range(1, len(TILES)):
        beyond = tile >= TILES[p]
        first = tl.where(beyond, EDGES[p] + (tile - TILES[p]) * BLOCK_N, first)
        stop = tl.where(beyond, EDGES[p + 1], stop)
        segment = tl.where(beyond, p, segment)
    return first, stop, segment


@triton.jit
def gather_gemv_kernel(
    weight_ptr,  # [K, N] row-major
    index_ptr,  # kept list
    value_ptr,
    count_ptr,
    thresholds_ptr,  # [P], or [P, K] where PER_CHANNEL
    partial_ptr,  # [SPLITS, N] float32, every element is written
    K: tl.constexpr,
    N: tl.constexpr,
    EDGES: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """partial[s, j] = sum over the s-th part of the kept entries r of value[r] * weight[index[r], j].

    Grid: (tiles, SPLITS). The kept entries, not the rows of the matrix, are divided evenly, so every
    program reads the same number of bytes whatever the sparsity. ALIGN divides every column at which a tile can begin
    or end (EVEN: all tiles are whole), which lets each thread load 16 bytes at once. The list entries of the next
    iteration are loaded while the weights of this one are in flight.
    """
    await_previous(OVERLAP)
    first, stop, segment = tile_columns(tl.program_id(0), EDGES, TILES, BLOCK_N)
    split = tl.program_id(1)
    columns = tl.multiple_of(first, ALIGN) + tl.arange(0, BLOCK_N)
    inside = columns < tl.multiple_of(stop, ALIGN)

    total = kept_total(count_ptr, CHUNKS)
    begin = (total.to(tl.int64) * split // SPLITS).to(tl.int32)
    end = (total.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32)

    position = begin + tl.arange(0, ROWS)
    address = list_address(position, count_ptr, CHUNKS, CHUNK)
    row = tl.load(index_ptr + address, mask=position < end, other=0)
    value = tl.load(value_ptr + address, mask=position < end, other=0.0).to(tl.float32)
    threshold = projection_threshold(thresholds_ptr, segment, row, position < end, K, PER_CHANNEL)
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for _ in range(begin, end, ROWS):
        used = is_kept(value, threshold)
        where = row.to(tl.int64)[:, None] * N + columns[None, :]
        mask = used[:, None] if EVEN else used[:, None] & inside[None, :]
        weight = tl.load(weight_ptr + where, mask=mask, other=0.0, eviction_policy="evict_first")
        scale = tl.where(used, value, 0.0)
        position += ROWS
        address = list_address(position, count_ptr, CHUNKS, CHUNK)
        row = tl.load(index_ptr + address, mask=position < end, other=0)
        value = tl.load(value_ptr + address, mask=position < end, other=0.0).to(tl.float32)
        if PER_CHANNEL:
            threshold = projection_threshold(thresholds_ptr, segment, row, position < end, K, PER_CHANNEL)
        sums = tl.fma(tl.broadcast_to(scale[:, None], (ROWS, BLOCK_N)), weight.to(tl.float32), sums)
    tl.store(partial_ptr + split.to(tl.int64) * N + columns, tl.sum(sums, axis=0), mask=inside)


@triton.jit
def sum_splits(partial_ptr, columns, inside, N, SPLITS: tl.constexpr):
    """Second pass of the split sum: partial[0] + partial[1] + ..., always in this order, four loads in flight."""
    total = tl.load(partial_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for s in tl.range(1, SPLITS, loop_unroll_factor=4):
        total += tl.load(partial_ptr + s * N + columns, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def reduce_kernel(partial_ptr, out_ptr, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[j] = sum of partial[:, j], rounded once. Grid: (cdiv(N, BLOCK),)."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = sum_splits(partial_ptr, columns, inside, N, SPLITS)
    tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
