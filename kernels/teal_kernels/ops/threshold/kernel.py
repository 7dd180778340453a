"""The Triton kernel of `threshold`, and the two device functions every other kernel builds on.

Device code only: sizes, launches and checks live in `op.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_kept(value, threshold):
    """|value| > threshold in float32: the one comparison of teal. NaN is dropped."""
    return tl.abs(value.to(tl.float32)) > threshold


@triton.jit
def lowest_threshold(thresholds_ptr, COUNT: tl.constexpr):
    """The smallest of COUNT float32 thresholds: whoever keeps the most decides what a shared list holds."""
    lowest = tl.load(thresholds_ptr)
    for i in tl.static_range(1, COUNT):
        lowest = tl.minimum(lowest, tl.load(thresholds_ptr + i))
    return lowest


@triton.jit
def threshold_kernel(x_ptr, thresholds_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out[i] = x[i] if |x[i]| > thresholds[0] else 0. Grid: (cdiv(size, BLOCK),)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    kept = is_kept(x, tl.load(thresholds_ptr))
    tl.store(out_ptr + offset, tl.where(kept, x, 0.0).to(x.dtype), mask=inside)
