"""Second pass of the gate-up product, SiLU, product, threshold and compaction in one launch. Device code only."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.kept.kernel import emit
from teal_kernels.ops.sparse_gemv.kernel import sum_splits
from teal_kernels.parts.norm.kernel import rounded


@triton.jit
def swiglu_kernel(
    partial_ptr,  # [SPLITS, 2 K]: gate, then up
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
    SPLITS: tl.constexpr,
):
    """Grid: (CHUNKS,). Gate, up, SiLU and the product are each rounded to the model's dtype."""
    chunk = tl.program_id(0)
    channel = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = channel < K
    gate = rounded(sum_splits(partial_ptr, channel, inside, 2 * K, SPLITS), like_ptr)
    up = rounded(sum_splits(partial_ptr + K, channel, inside, 2 * K, SPLITS), like_ptr)
    silu = rounded(tl.div_rn(gate, 1.0 + tl.exp(-gate)), like_ptr)
    x = (silu * up).to(like_ptr.dtype.element_ty)
    emit(x, chunk, channel, inside, thresholds_ptr, index_ptr, value_ptr, count_ptr, tally_ptr, row_ptr, ring_ptr,
         slot_ptr, K, P, CHUNKS, CHUNK, SPARSE, RING)  # fmt: skip
