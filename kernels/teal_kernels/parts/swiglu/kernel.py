"""Gate and up from their partial sums, activation, product, threshold, compaction in one launch. Device code only."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.kept.kernel import emit
from teal_kernels.ops.threshold.kernel import await_previous
from teal_kernels.parts.kernel import product_columns, rounded


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
    GELU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: (CHUNKS,). Gate, up, activation and the product are each rounded to the model's dtype.

    GELU in its tanh form is g / (1 + exp(-2u)), u = sqrt(2 / pi) (g + 0.044715 g^3), since 1 + tanh(u) is
    2 / (1 + exp(-2u)).
    """
    await_previous(OVERLAP)
    chunk = tl.program_id(0)
    channel = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = channel < K
    gate = product_columns(partial_ptr, None, channel, inside, like_ptr, 2 * K, SPLITS, False)
    up = product_columns(partial_ptr, None, K + channel, inside, like_ptr, 2 * K, SPLITS, False)
    exponent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    active = rounded(tl.div_rn(gate, 1.0 + tl.exp(-exponent)), like_ptr)
    x = (active * up).to(like_ptr.dtype.element_ty)
    emit(x, chunk, channel, inside, thresholds_ptr, index_ptr, value_ptr, count_ptr, tally_ptr, row_ptr, ring_ptr,
         slot_ptr, K, P, CHUNKS, CHUNK, SPARSE, RING)  # fmt: skip
