"""Device functions that write and read kept lists, and the kernel that makes one from a vector in memory.

A **kept list** is what thresholding a vector gives: positions (int32) and values of its kept entries,
ascending. It is stored in chunks, so that many programs can write it in one launch with no program waiting
for another: program c compacts entries `c*CHUNK ... (c+1)*CHUNK` to the front of its own section of the list
and writes their number to `count[c]`. A reader finds the r-th kept entry at `r + sum over chunks that end at
or before r of (CHUNK - count[c])`. How many entries are kept is known on the device only.

Device code only: sizes and launches live in `op.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.threshold.kernel import is_kept, lowest_threshold, projection_threshold


@triton.jit
def write_kept(index_ptr, value_ptr, count_ptr, chunk, channel, x, kept, CHUNK: tl.constexpr):
    """Compact one chunk: entry `channel[j]`, of value `x[j]`, is listed where `kept[j]`."""
    ones = kept.to(tl.int32)
    slot = chunk * CHUNK + tl.cumsum(ones, axis=0) - ones
    tl.store(index_ptr + slot, channel, mask=kept)
    tl.store(value_ptr + slot, x, mask=kept)
    tl.store(count_ptr + chunk, tl.sum(ones, axis=0))


@triton.jit
def compact_kernel(
    x_ptr,
    thresholds_ptr,  # [P], or [P, K] where PER_CHANNEL
    index_ptr,
    value_ptr,
    count_ptr,
    K,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """The kept list of x [K] at the lowest of the thresholds of P projections. Grid: (cdiv(K, CHUNK),)."""
    chunk = tl.program_id(0)
    channel = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = channel < K
    x = tl.load(x_ptr + channel, mask=inside, other=0.0)
    kept = is_kept(x, lowest_threshold(thresholds_ptr, channel, inside, K, P, PER_CHANNEL))
    write_kept(index_ptr, value_ptr, count_ptr, chunk, channel, x, kept, CHUNK)


@triton.jit
def emit(
    x,  # this program's CHUNK entries, in the dtype of the model
    chunk,
    channel,
    inside,
    thresholds_ptr,
    index_ptr,
    value_ptr,
    count_ptr,
    tally_ptr,  # int64 [P, CHUNKS]
    row_ptr,
    ring_ptr,  # [slots, K]
    slot_ptr,
    K,
    P: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPARSE: tl.constexpr,  # 0: dense; 1: a threshold per projection, [P]; 2: one per projection and channel, [P, K]
    RING: tl.constexpr,
):
    """Write one chunk of a site's vector in the form that its product reads.

    A sparse product gets a kept list, and the number each projection keeps is added to the tally; a dense one
    gets the row as it is. What is captured is what the product consumes. The tally needs no atomics: every
    program has cells of its own.
    """
    if SPARSE:
        kept = is_kept(x, lowest_threshold(thresholds_ptr, channel, inside, K, P, SPARSE == 2)) & inside
        write_kept(index_ptr, value_ptr, count_ptr, chunk, channel, x, kept, CHUNK)
        for p in tl.static_range(P):
            counted = is_kept(x, projection_threshold(thresholds_ptr, p, channel, inside, K, SPARSE == 2)) & inside
            cell = tally_ptr + p * CHUNKS + chunk
            tl.store(cell, tl.load(cell) + tl.sum(counted.to(tl.int32), axis=0))
        x = tl.where(kept, x, 0.0).to(x.dtype)
    else:
        tl.store(row_ptr + channel, x, mask=inside)
    if RING:
        tl.store(ring_ptr + tl.load(slot_ptr) * K + channel, x, mask=inside)


@triton.jit
def list_address(position, count_ptr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Where the kept entries number `position` are stored in a chunked list."""
    address = position
    if CHUNKS > 1:
        end = tl.load(count_ptr) * 0
        for c in tl.static_range(CHUNKS):
            here = tl.load(count_ptr + c)
            end += here
            address += tl.where(end <= position, CHUNK - here, 0)
    return address


@triton.jit
def kept_total(count_ptr, CHUNKS: tl.constexpr):
    """How many entries a chunked list holds."""
    total = tl.load(count_ptr)
    for c in tl.static_range(1, CHUNKS):
        total += tl.load(count_ptr + c)
    return total
