"""Draw one entry of a vector of logits by inverting the cumulative distribution. Device code only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sample_kernel(
    values_ptr,  # [n] logits
    ids_ptr,  # int64 [n], what the entries stand for; None: their positions
    temperature_ptr,  # float32 [1], above 0
    seed_ptr,  # int64 [1]
    position_ptr,  # int64 [1]
    choice_ptr,  # int64 [2], written: the token; 1 if a logit is NaN
    n: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The random number is a function of (seed, position) alone: a sequence can be resumed at any token. Grid: (1,)."""
    temperature = tl.load(temperature_ptr)
    entry = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        value = tl.load(values_ptr + start + entry, mask=start + entry < n, other=float("-inf"))
        peak = tl.maximum(peak, value.to(tl.float32))
    highest = tl.maximum(tl.max(peak, axis=0), -3e38)  # finite, also where all logits are NaN or -inf

    total = highest * 0.0
    for start in range(0, n, BLOCK):
        value = tl.load(values_ptr + start + entry, mask=start + entry < n, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp((value - highest) / temperature), axis=0)
    target = tl.rand(tl.load(seed_ptr), tl.load(position_ptr)) * total

    before = highest * 0.0
    passed = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        value = tl.load(values_ptr + start + entry, mask=start + entry < n, other=float("-inf")).to(tl.float32)
        weight = tl.exp((value - highest) / temperature)
        passed += ((before + tl.cumsum(weight, axis=0) <= target) & (start + entry < n)).to(tl.int32)
        before += tl.sum(weight, axis=0)
    choice = tl.minimum(tl.sum(passed, axis=0), n - 1).to(tl.int64)
    broken = total != total
    choice = tl.where(broken, 0, choice)
    tl.store(choice_ptr, tl.load(ids_ptr + choice) if IDS else choice)
    tl.store(choice_ptr + 1, broken.to(tl.int64))
