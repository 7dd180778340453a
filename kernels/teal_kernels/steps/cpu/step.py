"""The decode step that every thread runs: all layers and the head for one token, with no Python in between.

Each thread reads its share of every matrix. What is cheap and needed as a whole (the residual stream, norms,
thresholds, lists of kept entries) is computed by every thread for itself, which saves a barrier each; five barriers per
layer remain, where the product of one matrix becomes the input of the next. Results do not depend on timing: every sum
has a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from teal_kernels.spec import SITES, Geometry
from teal_kernels.steps.cpu.attention import TILE, attend, join_parts, parts_for, prefetch_keys
from teal_kernels.steps.cpu.heads import TOGETHER
from teal_kernels.steps.cpu.intrinsics import fetch, item_bytes, narrow, put
from teal_kernels.steps.cpu.layout import (
    ATTN_NORM,
    ATTN_POST_NORM,
    DONE,
    EMBEDDING,
    FIELDS,
    FORM,
    GROUP,
    HEAD,
    MEMBERS,
    MLP_NORM,
    MLP_POST_NORM,
    MOST_STOPS,
    MOST_TOKENS,
    NONE,
    NUMBERS,
    O_BIAS,
    PLACES,
    PLAIN,
    RELEASED,
    SCALES_AT,
    SINGLE,
    STRIDE,
    TABLE_UNITS,
    TENSORS,
    Cache,
    Codes,
    Draw,
    Norm,
    Own,
    Rules,
    Shape,
    Shared,
    Token,
    Weights,
)
from teal_kernels.steps.cpu.matrices import edges_of, row_groups
from teal_kernels.steps.cpu.packed_rows import dot_packed_rows
from teal_kernels.steps.cpu.rows import STREAM, dot_rows
from teal_kernels.steps.cpu.sample import advance
from teal_kernels.steps.cpu.sites import (
    EVERY,
    SITE_ATTN_IN,
    SITE_ATTN_OUT,
    SITE_MLP_IN,
    SITE_MLP_MID,
    ZERO,
    activate,
    add_picked,
    add_product,
    multiply,
    own_channels,
    share,
)
from teal_kernels.steps.cpu.sync import await_release, barrier
from teal_kernels.steps.cpu.sync import release as release
from teal_kernels.steps.cpu.vectors import ONE, cap_all, compiled, rms_norm
from teal_kernels.traits import GELU_TANH, LLAMA, Traits

BARRIERS, BARRIERS_PER_LAYER = 1, 5
"""Barriers of a step: outside of the layers, and in each layer."""


@njit(nogil=True, error_model="numpy", cache=True, _nrt=False)
def run(kind: Any, own: Any, shape: Any, weights: Any, shared: Any) -> bool:
    """For thread 0, the caller's: its part of the step that was released, and of those that it releases for the tokens
    that it chooses (`shared.draw`); returns when all threads have ended theirs, or True when it has released one for
    which members must be woken first.
    For a member: its part of every step that is released; returns when it has waited too long for the next.

    A step leaves logits in shared.logits, the new keys and values in the cache, rows where asked. Arguments: layout.py.
    """
    control, threads = shared.control, own.threads
    while own.thread == 0 or await_release(control, own.thread):
        order = shared.order
        token, cache = Token(order[0], order[1], order[2], order[3]), Cache(order[4], order[5], order[6], order[7])
        rounds = (control[RELEASED] - 1) * (BARRIERS + BARRIERS_PER_LAYER * shape.layers)
        embed(kind, weights, token.token, shape.hidden, own)
        for layer in range(shape.layers):
            tensors, rope = weights.tensors[layer], weights.ropes[layer]
            turned = Token(token.token, token.position, token.cos + rope, token.sin + rope)
            rms_norm(kind, own.hidden, shape.hidden, tensors[ATTN_NORM], weights.norm, own.x)
            multiply(kind, SITE_ATTN_IN, layer, own.x, shape.hidden, EVERY, weights, shared, shared.qkv, own)
            prefetch_keys(kind, shape, weights, cache, layer, token, shared.totals.shape[1], own)
            rounds = barrier(control, threads, rounds)
            attend(kind, shape, weights, cache, layer, turned, shared, own)
            rounds = barrier(control, threads, rounds)
            join_parts(kind, shape, shared, own.x)
            wide = shape.heads * shape.head_dim
            multiply(kind, SITE_ATTN_OUT, layer, own.x, wide, EVERY, weights, shared, shared.attn_out, own)
            rounds = barrier(control, threads, rounds)
            add_product(
                kind, own.hidden, shape.hidden, shared.attn_out, tensors[O_BIAS], tensors[ATTN_POST_NORM], weights, own
            )
            rms_norm(kind, own.hidden, shape.hidden, tensors[MLP_NORM], weights.norm, own.x)
            multiply(kind, SITE_MLP_IN, layer, own.x, shape.hidden, EVERY, weights, shared, shared.gate_up, own)
            rounds = barrier(control, threads, rounds)
            mine = own_channels(shape.intermediate, shared.down, own)
            activate(kind, mine, shape.intermediate, shared.gate_up, weights.rules, own)
            multiply(kind, SITE_MLP_MID, layer, own.mid, shape.intermediate, mine, weights, shared, shared.down, own)
            rounds = barrier(control, threads, rounds)
            add_product(kind, own.hidden, shape.hidden, shared.down, NONE, tensors[MLP_POST_NORM], weights, own)
        rms_norm(kind, own.hidden, shape.hidden, weights.final_norm, weights.norm, own.x)
        head(kind, shape, weights, own, shared.logits)
        control[MEMBERS + PLACES * own.thread + DONE] = control[RELEASED]
        barrier(control, threads, rounds)
        if own.thread == 0:
            following, asleep = advance(shared.order, control, shared.draw, shared.logits)
            if asleep or not following:
                return asleep
    return False


@compiled
def embed(kind: Any, weights: Any, token: int, count: int, own: Any) -> None:
    """own.hidden = the token's row, rounded, scaled and rounded again."""
    table, scale = weights.tables[EMBEDDING], weights.rules.embedding_scale
    if table[FORM] == PLAIN:
        for i in range(count):
            put(own.hidden, i, narrow(kind, fetch(kind, weights.embedding, token * count + i) * scale))
        return
    row = weights.embedding + token * table[STRIDE]
    own.room[:] = ZERO
    own.x[0] = ONE  # the sum of one row, once
    add_picked(
        weights.codes.int8, weights.codes.int4, table[FORM], row, row + table[SCALES_AT], table[STRIDE], table[GROUP],
        own.all[:1], own.x, table[TABLE_UNITS], own.room,
    )  # fmt: skip
    for i in range(count):
        own.hidden[i] = narrow(kind, narrow(kind, own.room[i]) * scale)


@compiled
def head(kind: Any, shape: Any, weights: Any, own: Any, logits: Any) -> None:
    """This thread's share of logits = lm_head @ own.x, not rounded."""
    first, last = share(shape.vocab, own.thread, own.threads)
    table, rules = weights.tables[HEAD], weights.rules
    if table[FORM] == PLAIN:
        row = shape.hidden * item_bytes(kind)
        own_rows = weights.lm_head + first * row
        dot_rows(kind, own_rows, row, last - first, own.x, shape.hidden, logits[first:last], STREAM)
    else:
        own.room[:] = ZERO
        for i in range(shape.hidden):
            own.room[i] = own.x[i]
        codes = weights.codes
        dot_packed(codes.int8, codes.int4, table, weights.lm_head + first * table[STRIDE], own.room, logits[first:last])
    if rules.logit_scale != ONE:
        for i in range(first, last):
            logits[i] *= rules.logit_scale
    if rules.logit_cap != ZERO:
        cap_all(logits[first:last], last - first, ONE, rules.logit_cap)


@compiled
def dot_packed(int8: Any, int4: Any, table: Any, base: int, x: Any, out: Any) -> None:
    """out = x . each row of a packed table, from the row at `base` on; x is zero beyond the width of the rows.
    int8, int4 as in `add_packed`."""
    scales, stride, group, units = base + table[SCALES_AT], table[STRIDE], table[GROUP], table[TABLE_UNITS]
    if int8 is not None and table[FORM] == 8:
        dot_packed_rows(int8, base, scales, stride, group, len(out), x, units, out, STREAM)
    if int4 is not None and table[FORM] == 4:
        dot_packed_rows(int4, base, scales, stride, group, len(out), x, units, out, STREAM)


def site_edges(geometry: Geometry) -> NDArray[np.int64]:
    """int64 [4, 4]: per site, where the columns of each of its projections begin, and where the last end."""
    return np.stack([edges_of(geometry.segments(site)) for site in SITES])


def numbers(traits: Traits, eps: float, head_dim: int) -> tuple[Norm, Rules]:
    """Traits as the compiled code takes them; the scale of the embedding must be one that the dtype can represent."""
    scale = head_dim**-0.5 if traits.attention_scale is None else traits.attention_scale
    factors = (
        scale, traits.score_cap or 0.0, traits.embedding_scale, traits.residual_scale, traits.logit_scale,
        traits.logit_cap or 0.0,
    )  # fmt: skip
    norm = Norm(np.float32(eps), np.float32(traits.norm_offset), traits.norm_rounds_once)
    return norm, Rules(traits.wide_head_norms, traits.activation == GELU_TANH, *map(np.float32, factors))


def shared_buffers(kind: Any, threads: int, shape: Shape, row_bytes: Sequence[int] | None = None) -> Shared:
    """The record that all threads of a team share.

    Args:
        row_bytes: per site, bytes of a row of its matrix; None where matrices have the model's dtype.
    """

    def parts(site: int, columns: int) -> NDArray[np.float32]:
        size = columns * kind.itemsize if row_bytes is None else row_bytes[site]
        return np.zeros((row_groups(threads, size), columns), np.float32)

    heads = shape.heads, parts_for(threads, shape.kv_heads)
    return Shared(
        order=np.zeros(len(Token._fields) + len(Cache._fields), np.int64),
        thresholds=np.zeros((shape.layers, 7), np.float32),
        limits=np.zeros(0, np.float32),
        limit_of=np.full((shape.layers, 7), SINGLE, np.int64),
        lowest_of=np.full((shape.layers, 4), SINGLE, np.int64),
        rows=np.zeros((4, 2), np.int64),
        draw=Draw(
            numbers=np.zeros(NUMBERS, np.int64),
            temperature=np.ones(1, np.float32),
            bits=np.zeros(MOST_TOKENS + 1, np.uint64),
            stops=np.zeros(MOST_STOPS, np.int64),
            tokens=np.zeros(MOST_TOKENS, np.int64),
            places=np.zeros(shape.vocab, np.int64),
            values=np.zeros(shape.vocab, np.float32),
            weights=np.zeros(shape.vocab, np.uint64),
        ),
        qkv=parts(SITE_ATTN_IN, (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
        tops=np.zeros(heads, np.float32),
        totals=np.zeros(heads, np.float32),
        mixed=np.zeros((*heads, shape.head_dim), np.float32),
        attn_out=parts(SITE_ATTN_OUT, shape.hidden),
        gate_up=parts(SITE_MLP_IN, 2 * shape.intermediate),
        down=parts(SITE_MLP_MID, shape.hidden),
        logits=np.zeros(shape.vocab, np.float32),
        kept=np.zeros((shape.layers, 7), np.int64),
        control=np.zeros(MEMBERS + PLACES * threads, np.int64),
    )


def own_buffers(thread: int, threads: int, shape: Shape, padded: int = 0) -> Own:
    """One thread's record. `padded`: the most columns that a packed matrix or table has, with padding."""
    longest = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
    return Own(
        thread,
        threads,
        hidden=np.zeros(shape.hidden, np.float32),
        x=np.zeros(longest, np.float32),
        index=np.zeros(longest, np.int64),
        all=np.arange(max(longest, TILE)),
        room=np.zeros(padded, np.float32),
        mid=np.zeros(shape.intermediate, np.float32),
        out=np.zeros(longest, np.float32),
        head=np.zeros(shape.head_dim, np.float32),
        normed=np.zeros(shape.head_dim, np.float32),
        rotated=np.zeros(shape.head_dim, np.float32),
        queries=np.zeros((TOGETHER, shape.head_dim), np.float32),
        scores=np.zeros((TOGETHER, TILE), np.float32),
        mixed=np.zeros((TOGETHER, shape.head_dim), np.float32),
    )


def no_tables() -> NDArray[np.int64]:
    """`Weights.tables` of an embedding and a head that are not packed."""
    return np.zeros((2, TABLE_UNITS + 1), np.int64)


def nothing(kind: Any, codes: Codes) -> tuple[Any, ...]:
    """Arguments for `run` that make it do nothing: for a model without layers and without a vocabulary."""
    shape = Shape(0, 0, 0, 1, 1, 0, 0)
    tensors, per_layer = np.empty((0, TENSORS), np.int64), np.empty(0, np.int64)
    norm, rules = numbers(LLAMA, 1.0, 1)
    edges = site_edges(Geometry(0, 0, 1, 1, 0))
    packed, units = np.empty((0, 4, FIELDS), np.int64), np.empty((0, 4, 4), np.int64)
    weights = Weights(
        tensors, per_layer, per_layer, edges, packed, units, no_tables(), codes, norm, rules, NONE, NONE, NONE
    )
    return kind, own_buffers(0, 1, shape), shape, weights, shared_buffers(kind, 1, shape)
