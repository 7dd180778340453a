"""Flash-decoding: each program attends to a share of the positions, a second launch combines them (Dao et al. 2023).

A program serves all query heads that share a key-value head, so keys and values are read once. The length of the cache
is known on the device only: the filled positions are divided evenly among a fixed number of programs, so the grid, and
with it the order of the sums, does not depend on it. The second launch writes the kept list that the output projection
reads.
Device code only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.kept.kernel import emit
from teal_kernels.ops.threshold.kernel import await_previous


@triton.jit
def attention_kernel(
    q_ptr,  # [KV_HEADS * GROUP, D]
    k_ptr,  # [KV_HEADS, max_tokens, D]
    v_ptr,
    position_ptr,  # int64 [1]; positions up to and with it are filled
    mixed_ptr,  # [KV_HEADS * GROUP, SHARES, D] float32: sum of exp(score - peak) v
    peak_ptr,  # [KV_HEADS * GROUP, SHARES] float32
    total_ptr,  # [KV_HEADS * GROUP, SHARES] float32: sum of exp(score - peak)
    head_stride,
    scale,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SHARES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CAPPED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: (KV_HEADS, SHARES). WINDOW = 0: none. A share without positions has peak -inf and total 0."""
    await_previous(OVERLAP)
    kv_head, share = tl.program_id(0), tl.program_id(1)
    length = (tl.load(position_ptr) + 1).to(tl.int32)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    begin = first + ((length - first).to(tl.int64) * share // SHARES).to(tl.int32)
    end = first + ((length - first).to(tl.int64) * (share + 1) // SHARES).to(tl.int32)

    group, d, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    head = kv_head * GROUP + group
    wanted = (group[:, None] < GROUP) & (d[None, :] < D)
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=wanted, other=0.0)
    base = kv_head.to(tl.int64) * head_stride
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_T):
        live = start + t < end
        offset = base + (start + t).to(tl.int64)[:, None] * D + d[None, :]
        mask = live[:, None] & (d[None, :] < D)
        k = tl.load(k_ptr + offset, mask=mask, other=0.0)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            score = cap * (1.0 - 2.0 / (tl.exp(2.0 * score / cap) + 1.0))
        score = tl.where(live[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        fade = tl.exp(peak - higher)
        weight = tl.exp(score - higher[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher
    cell = head * SHARES + share
    tl.store(peak_ptr + cell, peak, mask=group < GROUP)
    tl.store(total_ptr + cell, total, mask=group < GROUP)
    tl.store(mixed_ptr + cell[:, None] * D + d[None, :], mixed, mask=wanted)


@triton.jit
def join_kernel(
    mixed_ptr,
    peak_ptr,
    total_ptr,
    like_ptr,  # anything of the model's dtype
    thresholds_ptr,
    index_ptr,
    value_ptr,
    count_ptr,
    tally_ptr,
    row_ptr,
    ring_ptr,
    slot_ptr,
    K: tl.constexpr,
    P: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPARSE: tl.constexpr,
    RING: tl.constexpr,
    D: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Combine the shares of every head, in order, and emit. K = heads * D. Grid: (CHUNKS,)."""
    await_previous(OVERLAP)
    chunk = tl.program_id(0)
    channel = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = channel < K
    head = channel // D
    peak = tl.load(peak_ptr + head * SHARES, mask=inside, other=0.0)
    for s in tl.range(1, SHARES, loop_unroll_factor=4):
        peak = tl.maximum(peak, tl.load(peak_ptr + head * SHARES + s, mask=inside, other=0.0))
    total = tl.zeros([CHUNK], tl.float32)
    mixed = tl.zeros([CHUNK], tl.float32)
    for s in tl.range(0, SHARES, loop_unroll_factor=4):
        cell = head * SHARES + s
        fade = tl.exp(tl.load(peak_ptr + cell, mask=inside, other=0.0) - peak)
        total += fade * tl.load(total_ptr + cell, mask=inside, other=1.0)
        mixed += fade * tl.load(mixed_ptr + cell * D + channel % D, mask=inside, other=0.0)
    x = tl.div_rn(mixed, total).to(like_ptr.dtype.element_ty)
    emit(x, chunk, channel, inside, thresholds_ptr, index_ptr, value_ptr, count_ptr, tally_ptr, row_ptr, ring_ptr,
         slot_ptr, K, P, CHUNKS, CHUNK, SPARSE, RING)  # fmt: skip
