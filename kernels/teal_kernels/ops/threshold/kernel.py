"""The Triton kernel of `threshold`, and the device functions every other kernel builds on.

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
def projection_threshold(thresholds_ptr, projection, channel, inside, K, PER_CHANNEL: tl.constexpr):
    """What a projection compares with: its one threshold of float32 [P], or those of `channel` of float32 [P, K]."""
    if PER_CHANNEL:
        threshold = tl.load(thresholds_ptr + projection * K + channel, mask=inside, other=0.0)
    else:
        threshold = tl.load(thresholds_ptr + projection)
    return threshold


@triton.jit
def lowest_threshold(thresholds_ptr, channel, inside, K, COUNT: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """The smallest of the thresholds of COUNT projections: a shared list holds what any of them keeps."""
    lowest = projection_threshold(thresholds_ptr, 0, channel, inside, K, PER_CHANNEL)
    for i in tl.static_range(1, COUNT):
        lowest = tl.minimum(lowest, projection_threshold(thresholds_ptr, i, channel, inside, K, PER_CHANNEL))
    return lowest


@triton.jit
def threshold_kernel(x_ptr, thresholds_ptr, out_ptr, size, K, BLOCK: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """out[i] = x[i] if |x[i]| > t else 0, with t = thresholds[0], or thresholds[i % K]. Grid: (cdiv(size, BLOCK),)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    kept = is_kept(x, projection_threshold(thresholds_ptr, 0, offset % K, inside, K, PER_CHANNEL))
    tl.store(out_ptr + offset, tl.where(kept, x, 0.0).to(x.dtype), mask=inside)


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Wait until the launch before this one has written its results, and let the next one begin.

    From compute capability 9.0 on a launch that asks for it (`configs.launch_options`) need not wait for the end of the
    one before it: its programs are placed on multiprocessors as they fall free, and wait there. That hides what it
    costs to begin a kernel, which a decode step pays ten times a layer. It is the first statement of a kernel: nothing
    that another launch writes is read before it, and as every program executes it, the end of a launch implies the end
    of all before it.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
