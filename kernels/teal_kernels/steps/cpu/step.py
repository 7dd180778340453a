"""The decode step that every thread runs: all layers and the head for one token, with no Python in between.

Each thread reads its share of every matrix. What is cheap and needed as a whole (the residual stream, norms,
thresholds, lists of kept entries) is computed by every thread for itself, which saves a barrier each; five phases per
layer remain, where the product of one matrix becomes the input of the next. Results do not depend on timing, nor on
which thread has computed a part (parts.py): every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from teal_kernels.spec import SITES, Geometry
from teal_kernels.steps.cpu.attention import TILE, join_parts, parts_for
from teal_kernels.steps.cpu.heads import TOGETHER
from teal_kernels.steps.cpu.intrinsics import fetch, narrow, put
from teal_kernels.steps.cpu.layout import (
    ATTN_NORM,
    ATTN_POST_NORM,
    DONE,
    EMBEDDING,
    FIELDS,
    FORM,
    GROUP,
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
    Candidates,
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
from teal_kernels.steps.cpu.matrices import MOST_PROJECTIONS, edges_of, row_groups, spans
from teal_kernels.steps.cpu.parts import (
    IN_DOWN,
    IN_GATE_UP,
    IN_HEAD,
    IN_OUT,
    IN_QKV,
    PHASES,
    run_phase,
)
from teal_kernels.steps.cpu.sample import conclude
from teal_kernels.steps.cpu.sites import (
    SITE_ATTN_IN,
    SITE_ATTN_OUT,
    SITE_MLP_IN,
    SITE_MLP_MID,
    ZERO,
    add_picked,
    add_product,
)
from teal_kernels.steps.cpu.sync import OVER, await_members, await_release, leave_stream, rejoin
from teal_kernels.steps.cpu.sync import release as release
from teal_kernels.steps.cpu.vectors import ONE, compiled, merged, rms_norm
from teal_kernels.traits import GELU_TANH, LLAMA, Traits


@njit(nogil=True, error_model="numpy", cache=True, _nrt=False)
def run(kind: Any, own: Any, shape: Any, weights: Any, shared: Any) -> None:
    """For thread 0, the caller's: its part of the step that was released, and of those that follow for the tokens that
    are chosen (`shared.draw`); returns when all threads have ended theirs.
    For a member: its part of every step that is released; returns when it has waited too long for the next.

    A step leaves logits in shared.logits, the new keys and values in the cache, rows where asked. Arguments: layout.py.
    """
    control, phases = shared.control, PHASES * shape.layers + 1
    while own.thread == 0 or await_release(control, own.thread):
        phase, begins = (control[RELEASED] - 1) * phases, True
        while phase != OVER:
            order, step = shared.order, phase // phases
            token, cache = Token(order[0], order[1], order[2], order[3]), Cache(order[4], order[5], order[6], order[7])
            if begins:
                embed(kind, weights, token.token, shape.hidden, own)
            begins = run_layers(kind, phase, token, cache, shape, weights, shared, own)
            if not begins:
                phase = rejoin(control, own.thread, phase, own.hidden, shared.stream)
            else:
                following = conclude(shared, step, (step + 1) * phases, own)
                phase = (step + 1) * phases if following else OVER
        if own.thread == 0:
            await_members(control, own.threads)
            break
        control[MEMBERS + PLACES * own.thread + DONE] = control[RELEASED]


@merged
def run_layers(kind: Any, phase: int, token: Any, cache: Any, shape: Any, weights: Any, shared: Any, own: Any) -> bool:
    """The layers from the one on whose first phase is given, and the head. False: this thread was late in some phase,
    or the step was abandoned."""
    whole = PHASES * shape.layers + 1
    for within in range(phase % whole, whole):
        layer, what = within // PHASES, within % PHASES
        if layer == shape.layers:
            what = IN_HEAD
        prepare(kind, what, phase, layer, shape, weights, shared, own)
        if not run_phase(kind, what, phase, layer, token, cache, shape, weights, shared, own):
            return False
        if what in (IN_OUT, IN_DOWN):
            tensors = weights.tensors[layer]
            bias, norm, sums = tensors[O_BIAS], tensors[ATTN_POST_NORM], shared.attn_out
            if what == IN_DOWN:
                bias, norm, sums = NONE, tensors[MLP_POST_NORM], shared.down
            add_product(kind, own.hidden, shape.hidden, sums, bias, norm, weights, own)
        phase += 1
    return True


@compiled
def prepare(kind: Any, what: int, phase: int, layer: int, shape: Any, weights: Any, shared: Any, own: Any) -> None:
    """own.x = the input of a phase, where one is needed by all parts."""
    if what == IN_OUT:
        join_parts(kind, shape, shared, own.x)
    elif what in (IN_QKV, IN_GATE_UP, IN_HEAD):
        weight = weights.final_norm
        if what == IN_QKV:
            leave_stream(shared.control, phase, own.threads, own.hidden, shared.stream)
            weight = weights.tensors[layer, ATTN_NORM]
        elif what == IN_GATE_UP:
            weight = weights.tensors[layer, MLP_NORM]
        rms_norm(kind, own.hidden, shape.hidden, weight, weights.norm, own.x)


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
        rows=np.zeros((4, 3), np.int64),
        draw=Draw(
            numbers=np.zeros(NUMBERS, np.int64),
            temperature=np.ones(1, np.float32),
            bits=np.zeros(MOST_TOKENS + 1, np.uint64),
            stops=np.zeros(MOST_STOPS, np.int64),
            tokens=np.zeros(MOST_TOKENS, np.int64),
        ),
        stream=np.zeros(shape.hidden, np.float32),
        qkv=parts(SITE_ATTN_IN, (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
        tops=np.zeros(heads, np.float32),
        totals=np.zeros(heads, np.float32),
        mixed=np.zeros((*heads, shape.head_dim), np.float32),
        attn_out=parts(SITE_ATTN_OUT, shape.hidden),
        gate_up=parts(SITE_MLP_IN, 2 * shape.intermediate),
        down=parts(SITE_MLP_MID, shape.hidden),
        logits=np.zeros(shape.vocab, np.float32),
        kept=np.zeros((MOST_TOKENS, shape.layers, 7), np.int64),
        control=np.zeros(MEMBERS + PLACES * threads, np.int64),
    )


def own_buffers(thread: int, threads: int, shape: Shape, padded: int = 0) -> Own:
    """One thread's record. `padded`: the most columns that a packed matrix or table has, with padding."""
    longest = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
    widest = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    heads = shape.heads, parts_for(threads, shape.kv_heads)
    return Own(
        thread,
        threads,
        hidden=np.zeros(shape.hidden, np.float32),
        x=np.zeros(longest, np.float32),
        index=np.zeros(longest, np.int64),
        all=np.arange(max(longest, TILE)),
        room=np.zeros(padded, np.float32),
        spans=spans(),
        counts=np.zeros(MOST_PROJECTIONS, np.int64),
        sums=np.zeros(max(longest, widest, 2 * shape.intermediate, shape.vocab), np.float32),
        tops=np.zeros(heads, np.float32),
        totals=np.zeros(heads, np.float32),
        parts=np.zeros((*heads, shape.head_dim), np.float32),
        candidates=Candidates(
            np.zeros(shape.vocab, np.int64), np.zeros(shape.vocab, np.float32), np.zeros(shape.vocab, np.uint64)
        ),
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
