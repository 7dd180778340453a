"""The Triton kernel of `masked_splitk`: masked loads, split K, atomic additions.

Device code only: sizes and launches live in `op.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def masked_splitk_kernel(x_ptr, weight_ptr, out_ptr, threshold, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [N] += x [K] @ weight [K, N] over one tile. Grid: (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K))."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    kept = tl.abs(x) > threshold
    mask = kept[:, None] & (n[None, :] < N)
    weight = tl.load(
        weight_ptr + k.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
    )
    total = tl.sum(weight.to(tl.float32) * x[:, None], axis=0)
    tl.atomic_add(out_ptr + n, total.to(out_ptr.dtype.element_ty), mask=n < N, sem="relaxed")
