"""Second pass of the q, k, v product, bias, q/k norm, rotation and the append to the cache in one launch.

One program per head. A head is held as two halves, since the rotation pairs entry d with entry d + head_dim / 2.
Device code only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.sparse_gemv.kernel import sum_splits
from teal_kernels.parts.norm.kernel import inverse_rms, rounded


@triton.jit
def half_of_head(partial_ptr, bias_ptr, column, inside, like_ptr, N, SPLITS: tl.constexpr, BIAS: tl.constexpr):
    """One half of a head: the product, rounded, with its bias, rounded."""
    x = rounded(sum_splits(partial_ptr, column, inside, N, SPLITS), like_ptr)
    if BIAS:
        x = rounded(x + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32), like_ptr)
    return x


@triton.jit
def scaled_half(x, scale, weight_ptr, offset, inside, like_ptr):
    """RMSNorm of one half, given the scale of the whole head."""
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return rounded(rounded(x * scale, like_ptr) * weight, like_ptr)


@triton.jit
def rotated_half(x, other, cos_ptr, sin_ptr, offset, inside, like_ptr):
    """x cos + other sin, rounded after each product and after the sum."""
    cos = tl.load(cos_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return rounded(rounded(x * cos, like_ptr) + rounded(other * sin, like_ptr), like_ptr)


@triton.jit
def qkv_kernel(
    partial_ptr,  # [SPLITS, (HEADS + 2 KV_HEADS) D]
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,  # [max_tokens, D]
    sin_ptr,
    position_ptr,  # int64 [1]
    q_ptr,  # [HEADS, D]
    k_ptr,  # [KV_HEADS, max_tokens, D]
    v_ptr,
    head_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Grid: (HEADS + 2 KV_HEADS,); HALF is a power of two that holds D / 2."""
    head = tl.program_id(0)
    position = tl.load(position_ptr)
    low = tl.arange(0, HALF)
    high = low + D // 2
    inside = low < D // 2
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    x = half_of_head(partial_ptr, bias_ptr, head * D + low, inside, q_ptr, width, SPLITS, BIAS)
    y = half_of_head(partial_ptr, bias_ptr, head * D + high, inside, q_ptr, width, SPLITS, BIAS)
    if head < HEADS + KV_HEADS:
        if NORM:
            weight_ptr = q_norm_ptr if head < HEADS else k_norm_ptr
            scale = inverse_rms(tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0), D, eps)
            x = scaled_half(x, scale, weight_ptr, low, inside, q_ptr)
            y = scaled_half(y, scale, weight_ptr, high, inside, q_ptr)
        cos_ptr += position * D
        sin_ptr += position * D
        rotated = rotated_half(x, y, cos_ptr, sin_ptr, low, inside, q_ptr)
        y = rotated_half(y, x, cos_ptr, sin_ptr, high, inside, q_ptr)
        x = rotated
    if head < HEADS:
        target_ptr = q_ptr + head * D
    elif head < HEADS + KV_HEADS:
        target_ptr = k_ptr + (head - HEADS).to(tl.int64) * head_stride + position * D
    else:
        target_ptr = v_ptr + (head - HEADS - KV_HEADS).to(tl.int64) * head_stride + position * D
    tl.store(target_ptr + low, x.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(target_ptr + high, y.to(q_ptr.dtype.element_ty), mask=inside)
