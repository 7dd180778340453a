"""Sum of the partial sums of q, k, v, bias, q/k norm, rotation and the append to the cache in one launch.

One program per head. A head is held as two halves, since the rotation pairs entry d with entry d + head_dim / 2.
Device code only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.threshold.kernel import await_previous
from teal_kernels.parts.kernel import inverse_rms, product_columns, rounded, weighted


@triton.jit
def squares_of_heads(
    partial_ptr, bias_ptr, low, inside, like_ptr, FIRST, COUNT: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Sum of the squares of COUNT heads, from head FIRST on."""
    total = tl.zeros_like(low).to(tl.float32)
    for head in range(FIRST, FIRST + COUNT):
        x = product_columns(partial_ptr, bias_ptr, head * D + low, inside, like_ptr, N, SPLITS, BIAS)
        y = product_columns(partial_ptr, bias_ptr, head * D + low + D // 2, inside, like_ptr, N, SPLITS, BIAS)
        total += x * x + y * y
    return tl.sum(total, axis=0)


@triton.jit
def scaled_half(x, scale, weight_ptr, norm_offset, offset, inside, like_ptr, ONCE: tl.constexpr):
    """RMSNorm of one half, given the scale of the whole vector."""
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return weighted(x * scale, weight, norm_offset, like_ptr, ONCE)


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
    norm_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ONCE: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: (HEADS + 2 KV_HEADS,); HALF is a power of two that holds D / 2. ONCE, WIDE: see `Traits`."""
    await_previous(OVERLAP)
    head = tl.program_id(0)
    position = tl.load(position_ptr)
    low = tl.arange(0, HALF)
    high = low + D // 2
    inside = low < D // 2
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    x = product_columns(partial_ptr, bias_ptr, head * D + low, inside, q_ptr, width, SPLITS, BIAS)
    y = product_columns(partial_ptr, bias_ptr, head * D + high, inside, q_ptr, width, SPLITS, BIAS)
    if head < HEADS + KV_HEADS:
        if NORM:
            weight_ptr = q_norm_ptr if head < HEADS else k_norm_ptr
            if WIDE:
                if head < HEADS:
                    squares = squares_of_heads(
                        partial_ptr, bias_ptr, low, inside, q_ptr, 0, HEADS, width, D, SPLITS, BIAS
                    )
                    scale = inverse_rms(squares, HEADS * D, eps)
                    weight_ptr += head * D
                else:
                    squares = squares_of_heads(
                        partial_ptr, bias_ptr, low, inside, q_ptr, HEADS, KV_HEADS, width, D, SPLITS, BIAS
                    )
                    scale = inverse_rms(squares, KV_HEADS * D, eps)
                    weight_ptr += (head - HEADS) * D
            else:
                scale = inverse_rms(tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0), D, eps)
            x = scaled_half(x, scale, weight_ptr, norm_offset, low, inside, q_ptr, ONCE)
            y = scaled_half(y, scale, weight_ptr, norm_offset, high, inside, q_ptr, ONCE)
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
