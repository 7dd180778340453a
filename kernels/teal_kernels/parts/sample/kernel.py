"""Draw a token by the rule of `reference.py`: weights per chunk of the vocabulary, then one chunk. Device code only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(logits, peak, temperature):
    """`weights_reference`: float32 logits -> int64 with 32 bits after the point."""
    scaled = tl.div_rn(logits - tl.where(tl.abs(peak) < float("inf"), peak, 0.0), temperature)
    # Where a logit is NaN or infinite this may be NaN or above 0. No token is drawn then.
    share = tl.exp(tl.where(scaled <= 0.0, scaled, float("-inf")))
    return (share * 4294967296.0).to(tl.int64)


@triton.jit
def _chunk_weights(logits_ptr, peak, lowest_ptr, temperature, chunk, n: tl.constexpr, BLOCK: tl.constexpr):
    """Weights of one chunk of the vocabulary, int64 [BLOCK]; 0 for what is no candidate."""
    entry = chunk * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + entry, mask=entry < n, other=float("-inf")).to(tl.float32)
    weights = _weights(logits, peak, temperature)
    if lowest_ptr is not None:
        weights = tl.where(logits >= tl.load(lowest_ptr).to(tl.float32), weights, 0)
    return weights


@triton.jit
def _below(bits, total):
    """floor(bits * total / 2**64) for a fraction of 64 bits."""
    return tl.umulhi(bits.to(tl.uint64, bitcast=True), total.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)


@triton.jit
def totals_kernel(
    logits_ptr,  # [n]
    peak_ptr,  # [1], the largest logit
    lowest_ptr,  # [1], the smallest that is a candidate; None: all are
    temperature_ptr,  # float32 [1], above 0
    totals_ptr,  # int64 [chunks], written: the weight of each chunk
    n: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (chunks,)."""
    chunk, peak = tl.program_id(0), tl.load(peak_ptr).to(tl.float32)
    weights = _chunk_weights(logits_ptr, peak, lowest_ptr, tl.load(temperature_ptr), chunk, n, BLOCK)
    tl.store(totals_ptr + chunk, tl.sum(weights, axis=0))


@triton.jit
def nucleus_kernel(
    ranked_ptr,  # [ranked], the candidates' logits in descending order
    totals_ptr,  # int64 [chunks], of `totals_kernel`
    temperature_ptr,  # float32 [1]
    top_p_ptr,  # int64 [1], `top_p_bits`
    lowest_ptr,  # [1], written: the smallest logit that is still a candidate
    ranked: tl.constexpr,
    chunks: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (1,)."""
    chunk = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(totals_ptr + chunk, mask=chunk < chunks, other=0), axis=0)
    wanted = _below(tl.load(top_p_ptr), total) + 1
    peak, temperature = tl.load(ranked_ptr).to(tl.float32), tl.load(temperature_ptr)
    before, taken = total * 0, tl.zeros([BLOCK], tl.int32)
    for start in range(0, ranked, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        logits = tl.load(ranked_ptr + entry, mask=entry < ranked, other=float("-inf")).to(tl.float32)
        weights = _weights(logits, peak, temperature)
        taken += ((before + tl.cumsum(weights, axis=0) - weights < wanted) & (entry < ranked)).to(tl.int32)
        before += tl.sum(weights, axis=0)
    last = tl.maximum(tl.sum(taken, axis=0), 1) - 1  # none is taken where a logit is NaN
    tl.store(lowest_ptr, tl.load(ranked_ptr + last))


@triton.jit
def draw_kernel(
    logits_ptr,  # [n]
    peak_ptr,  # [1]
    lowest_ptr,  # [1] or None
    temperature_ptr,  # float32 [1]
    totals_ptr,  # int64 [chunks]
    stream_ptr,  # int64 [2]: seed, sequence
    position_ptr,  # int64 [1]
    choice_ptr,  # int64 [2], written: the token; 1 if none can be drawn
    n: tl.constexpr,
    chunks: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (1,)."""
    seed, sequence, position = tl.load(stream_ptr), tl.load(stream_ptr + 1), tl.load(position_ptr)
    high, low, _, _ = tl.philox(
        seed, position.to(tl.uint32), (position >> 32).to(tl.uint32), sequence.to(tl.uint32),
        (sequence >> 32).to(tl.uint32),
    )  # fmt: skip
    bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)

    chunk = tl.arange(0, CHUNKS)
    totals = tl.load(totals_ptr + chunk, mask=chunk < chunks, other=0)
    target = _below(bits, tl.sum(totals, axis=0))
    passed = tl.minimum(tl.sum((tl.cumsum(totals, axis=0) <= target).to(tl.int32), axis=0), chunks - 1)
    before = tl.sum(tl.where(chunk < passed, totals, 0), axis=0)

    peak = tl.load(peak_ptr).to(tl.float32)
    weights = _chunk_weights(logits_ptr, peak, lowest_ptr, tl.load(temperature_ptr), passed, n, BLOCK)
    inside = tl.sum((before + tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0)
    broken = (tl.abs(peak) < float("inf")) == 0  # true of NaN as well
    choice = tl.where(broken, 0, tl.minimum(passed * BLOCK + inside, n - 1))
    tl.store(choice_ptr, choice.to(tl.int64))
    tl.store(choice_ptr + 1, broken.to(tl.int64))
