"""Device functions that the kernels of a decode step share: sums of partial products, rounding, RMSNorm.

A product [N] comes from the gather GEMV as partial sums [SPLITS, N], which the kernel that reads it adds up.
Device code only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.sparse_gemv.kernel import sum_splits


@triton.jit
def rounded(x, like_ptr):
    """Round to the dtype that `like_ptr` points to, and continue in float32: what storing and loading would do."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def product_columns(
    partial_ptr,  # [SPLITS, N]
    bias_ptr,  # [N], read where BIAS
    columns,
    inside,
    like_ptr,
    N,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Columns of a product: the partial sums added up and rounded, then its bias added and the sum rounded."""
    product = rounded(sum_splits(partial_ptr, columns, inside, N, SPLITS), like_ptr)
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        product = rounded(product + bias, like_ptr)
    return product


@triton.jit
def inverse_rms(sum_of_squares, SIZE: tl.constexpr, eps):
    """1 / sqrt(mean + eps), correctly rounded at each step, as PyTorch on a CPU computes it."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(sum_of_squares, SIZE * 1.0) + eps))


@triton.jit
def weighted(normed, weight, offset, like_ptr, ONCE: tl.constexpr):
    """normed * (weight + offset), rounded: at the end only (ONCE), or before the multiplication as well."""
    if not ONCE:
        normed = rounded(normed, like_ptr)
    return rounded(normed * (weight + offset), like_ptr)
