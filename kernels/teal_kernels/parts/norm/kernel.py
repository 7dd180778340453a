"""One launch from the partial sums of one product to the kept list of the next: bias, residual, RMSNorm, threshold.

The norm needs the whole vector, and no program may wait for another: each adds up all of it, reading from the L2 cache,
and then normalises, thresholds and compacts a chunk of its own. Device code only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.kept.kernel import emit
from teal_kernels.ops.threshold.kernel import await_previous
from teal_kernels.parts.kernel import inverse_rms, product_columns, rounded, weighted


@triton.jit
def rms_norm_kernel(
    hidden_ptr,  # [H] the residual stream; EMBED: [vocab, H], row token[0] is taken
    token_ptr,
    partial_ptr,  # [SPLITS, H]
    bias_ptr,
    post_ptr,  # [H] weight of the norm of the product before it is added
    weight_ptr,
    stream_ptr,  # [H] the residual stream after the addition; never the memory of hidden_ptr
    eps,
    norm_offset,
    embedding_scale,
    residual_scale,
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
    EMBED: tl.constexpr,
    BIAS: tl.constexpr,
    POST: tl.constexpr,
    NORM: tl.constexpr,
    ONCE: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """SPLITS = 0: nothing is added. POST, NORM: there is a norm of the product, of the sum. ONCE: see `Traits`.
    SCALED: embedding_scale and residual_scale are not both 1. Grid: (CHUNKS,)."""
    await_previous(OVERLAP)
    own = tl.program_id(0)
    offset = tl.arange(0, CHUNK)
    if EMBED:
        hidden_ptr += tl.load(token_ptr) * K
    post_scale = 1.0
    if POST:
        squares = tl.zeros([CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            channel = chunk * CHUNK + offset
            product = product_columns(partial_ptr, bias_ptr, channel, channel < K, stream_ptr, K, SPLITS, BIAS)
            squares += product * product
        post_scale = inverse_rms(tl.sum(squares, axis=0), K, eps)
    squares = tl.zeros([CHUNK], tl.float32)
    mine = tl.zeros([CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        channel = chunk * CHUNK + offset
        inside = channel < K
        hidden = tl.load(hidden_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        if EMBED and SCALED:
            hidden = rounded(hidden * embedding_scale, stream_ptr)
        if SPLITS > 0:
            product = product_columns(partial_ptr, bias_ptr, channel, inside, stream_ptr, K, SPLITS, BIAS)
            if POST:
                post = tl.load(post_ptr + channel, mask=inside, other=0.0).to(tl.float32)
                product = weighted(product * post_scale, post, norm_offset, stream_ptr, ONCE)
            if SCALED:
                product = rounded(product * residual_scale, stream_ptr)
            hidden = rounded(hidden + product, stream_ptr)
        squares += hidden * hidden
        mine = tl.where(chunk == own, hidden, mine)
    scale = inverse_rms(tl.sum(squares, axis=0), K, eps)
    channel = own * CHUNK + offset
    inside = channel < K
    tl.store(stream_ptr + channel, mine.to(stream_ptr.dtype.element_ty), mask=inside)
    x = mine
    if NORM:
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        x = weighted(mine * scale, weight, norm_offset, stream_ptr, ONCE)
    x = x.to(stream_ptr.dtype.element_ty)
    emit(x, own, channel, inside, thresholds_ptr, index_ptr, value_ptr, count_ptr, tally_ptr, row_ptr, ring_ptr,
         slot_ptr, K, P, CHUNKS, CHUNK, SPARSE, RING)  # fmt: skip
