"""The decode step that every thread runs: all layers and the head for one token, with no Python in between.

Each thread owns a range of the outputs of every matrix. What is cheap and needed whole (norms, thresholds,
lists of kept entries) every thread computes for itself, which saves a barrier each; five barriers a layer
remain, where outputs of one matrix become the input of the next. Results do not depend on timing: each sum is
formed by one thread in a fixed order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from teal_kernels.cpu_step.attention import TILE, attend, join_parts, parts_for
from teal_kernels.cpu_step.intrinsics import fetch, get, item_bytes, narrow, put
from teal_kernels.cpu_step.layout import (
    ATTN_NORM,
    ATTN_OUT,
    DONE,
    DOWN,
    GATE_UP,
    MEMBERS,
    MLP_NORM,
    NONE,
    O_BIAS,
    PLACES,
    QKV,
    QKV_BIAS,
    RELEASED,
    UNIT,
    Cache,
    Own,
    Shape,
    Shared,
    Token,
    Weights,
)
from teal_kernels.cpu_step.meeting import await_release, meet
from teal_kernels.cpu_step.meeting import release as release
from teal_kernels.cpu_step.rows import add_rows, dot_rows
from teal_kernels.cpu_step.vectors import compact, compiled, list_all, record, record_all, rms_norm, swish

ZERO = np.float32(0.0)
LINE = 16
"""Elements that keep what one thread writes off the cache lines of another."""
BARRIERS, BARRIERS_PER_LAYER = 2, 5
"""How often the threads meet in a step, besides and in each layer."""


@njit(nogil=True, error_model="numpy", cache=True, _nrt=False)
def run(kind: Any, own: Any, shape: Any, weights: Any, shared: Any) -> None:
    """For the caller's thread, 0: its part of the step just released, which ends when all parts have. For a member:
    its part of every step that is released, until none came for a while. Arguments: see layout.py."""
    if own.thread == 0:
        step(kind, own, shape, weights, shared)
    else:
        while await_release(shared.control, own.thread):
            step(kind, own, shape, weights, shared)


@compiled
def step(kind: Any, own: Any, shape: Any, weights: Any, shared: Any) -> None:
    """One thread's part: leaves logits in shared.logits, the new keys and values in the cache, rows where asked."""
    control, threads, order = shared.control, own.threads, shared.order
    token = Token(order[0], order[1], order[2], order[3])
    cache = Cache(order[4], order[5], order[6], order[7])
    rounds = (control[RELEASED] - 1) * (BARRIERS + BARRIERS_PER_LAYER * shape.layers)
    first, last = share(shape.hidden, own.thread, threads)
    for i in range(first, last):
        shared.hidden[i] = fetch(kind, weights.embedding, token.token * shape.hidden + i)
    rounds = meet(control, threads, rounds)
    for layer in range(shape.layers):
        tensors, thresholds = weights.tensors[layer], shared.thresholds[layer]
        rms_norm(kind, shared.hidden, 0, shape.hidden, tensors[ATTN_NORM], weights.eps, own.x)
        query_key_value(kind, shape, tensors, thresholds, layer, shared, own)
        rounds = meet(control, threads, rounds)
        attend(kind, shape, weights, cache, layer, token, shared, own)
        rounds = meet(control, threads, rounds)
        join_parts(kind, shape, shared, own.x)
        attention_out(kind, shape, tensors, thresholds, layer, shared, own)
        rounds = meet(control, threads, rounds)
        rms_norm(kind, shared.hidden, 0, shape.hidden, tensors[MLP_NORM], weights.eps, own.x)
        gate_up(kind, shape, tensors, thresholds, layer, shared, own)
        rounds = meet(control, threads, rounds)
        down(kind, shape, tensors, thresholds, layer, shared, own)
        rounds = meet(control, threads, rounds)
    rms_norm(kind, shared.hidden, 0, shape.hidden, weights.final_norm, weights.eps, own.x)
    first, last = share(shape.vocab, own.thread, threads)
    row = shape.hidden * item_bytes(kind)
    dot_rows(kind, weights.lm_head + first * row, row, last - first, own.x, shape.hidden, shared.logits[first:last])
    control[MEMBERS + PLACES * own.thread + DONE] = control[RELEASED]
    meet(control, threads, rounds)


@compiled
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The range of `count` outputs that a thread owns."""
    units = (count + UNIT - 1) // UNIT
    return units * thread // threads * UNIT, min(count, units * (thread + 1) // threads * UNIT)


@compiled
def capture(kind: Any, rows: Any, site: int, layer: int, x: Any, count: int, threshold: Any, own: Any) -> None:
    """Writes this thread's share of a site's thresholded vector to the caller's row, if one was given."""
    if rows[site, 0] != NONE:
        row = rows[site, 0] + layer * rows[site, 1]
        first, last = share(count, own.thread, own.threads)
        if threshold < ZERO:
            record_all(kind, x, first, last, row)
        else:
            record(kind, x, first, last, threshold, row)


@compiled
def list_kept(x: Any, count: int, threshold: Any, own: Any) -> int:
    """Lists the kept entries of x, unless they are listed already; see `Own.listed`."""
    if own.listed[0] != threshold:
        own.listed[0] = threshold
        if threshold < ZERO:
            own.kept[0] = list_all(x, count, own.index, own.value)
        else:
            own.kept[0] = compact(x, count, threshold, own.index, own.value)
    return own.kept[0]


@compiled
def project(
    kind: Any, x: Any, count: int, threshold: Any, weight: int, width: int, first: int, last: int, out: Any, own: Any
) -> None:
    """out[: last - first] = columns first..last of (x where |x| > threshold) @ weight [count, width], in float32."""
    if first < last:
        out[: last - first] = ZERO
        kept = list_kept(x, count, threshold, own)
        size = item_bytes(kind)
        add_rows(kind, weight + first * size, width * size, own.index, own.value, kept, last - first, out)


@compiled
def query_key_value(kind: Any, shape: Any, tensors: Any, thresholds: Any, layer: int, shared: Any, own: Any) -> None:
    """shared.qkv = x @ qkv + bias, each of q, k, v with its own threshold; equal neighbours are walked as one."""
    capture(kind, shared.rows, 0, layer, own.x, shape.hidden, min(thresholds[0], thresholds[1], thresholds[2]), own)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    edges = (0, shape.heads * shape.head_dim, (shape.heads + shape.kv_heads) * shape.head_dim, width)
    mine, limit = share(width, own.thread, own.threads)
    own.listed[0] = np.nan
    segment = 0
    while segment < 3:
        following = segment + 1
        while following < 3 and thresholds[following] == thresholds[segment]:
            following += 1
        first, last = max(mine, edges[segment]), min(limit, edges[following])
        out = shared.qkv[first : max(first, last)]
        project(kind, own.x, shape.hidden, thresholds[segment], tensors[QKV], width, first, last, out, own)
        finish(kind, out, first, last, tensors[QKV_BIAS])
        segment = following


@compiled
def finish(kind: Any, product: Any, first: int, last: int, bias: int) -> None:
    """Rounds the products of columns first..last in place; adds their bias, if there is one, and rounds again."""
    if bias == NONE:
        for i in range(last - first):
            product[i] = narrow(kind, product[i])
    else:
        for i in range(last - first):
            put(product, i, narrow(kind, narrow(kind, get(product, i)) + fetch(kind, bias, first + i)))


@compiled
def add_to(kind: Any, hidden: Any, product: Any, first: int, last: int) -> None:
    """The residual: hidden[first:last] += product, rounded."""
    hidden = hidden[first:last]
    for i in range(last - first):
        hidden[i] = narrow(kind, hidden[i] + product[i])


@compiled
def attention_out(kind: Any, shape: Any, tensors: Any, thresholds: Any, layer: int, shared: Any, own: Any) -> None:
    """shared.hidden += x @ attn_out + bias."""
    count = shape.heads * shape.head_dim
    capture(kind, shared.rows, 1, layer, own.x, count, thresholds[3], own)
    first, last = share(shape.hidden, own.thread, own.threads)
    own.listed[0] = np.nan
    project(kind, own.x, count, thresholds[3], tensors[ATTN_OUT], shape.hidden, first, last, own.out, own)
    finish(kind, own.out, first, last, tensors[O_BIAS])
    add_to(kind, shared.hidden, own.out, first, last)


@compiled
def gate_up(kind: Any, shape: Any, tensors: Any, thresholds: Any, layer: int, shared: Any, own: Any) -> None:
    """shared.mid = SiLU(x @ gate) * (x @ up); a thread owns the same columns of both."""
    capture(kind, shared.rows, 2, layer, own.x, shape.hidden, min(thresholds[4], thresholds[5]), own)
    width, between = 2 * shape.intermediate, shape.intermediate
    first, last = share(shape.intermediate, own.thread, own.threads)
    own.listed[0] = np.nan
    project(kind, own.x, shape.hidden, thresholds[4], tensors[GATE_UP], width, first, last, own.out, own)
    up_first, up_last = between + first, between + last
    project(kind, own.x, shape.hidden, thresholds[5], tensors[GATE_UP], width, up_first, up_last, own.up, own)
    finish(kind, own.out, first, last, NONE)
    finish(kind, own.up, first, last, NONE)
    mid = shared.mid[first:last]
    for i in range(last - first):
        mid[i] = swish(kind, own.out[i], own.up[i])


@compiled
def down(kind: Any, shape: Any, tensors: Any, thresholds: Any, layer: int, shared: Any, own: Any) -> None:
    """shared.hidden += mid @ down."""
    capture(kind, shared.rows, 3, layer, shared.mid, shape.intermediate, thresholds[6], own)
    first, last = share(shape.hidden, own.thread, own.threads)
    own.listed[0] = np.nan
    project(kind, shared.mid, shape.intermediate, thresholds[6], tensors[DOWN], shape.hidden, first, last, own.out, own)
    finish(kind, own.out, first, last, NONE)
    add_to(kind, shared.hidden, own.out, first, last)


def shared_buffers(threads: int, shape: Shape) -> Shared:
    """The record that all threads of a team share."""
    heads = shape.heads, parts_for(threads, shape.kv_heads)
    return Shared(
        order=np.zeros(len(Token._fields) + len(Cache._fields), np.int64),
        thresholds=np.zeros((shape.layers, 7), np.float32),
        rows=np.zeros((4, 2), np.int64),
        hidden=np.zeros(shape.hidden, np.float32),
        qkv=np.zeros((shape.heads + 2 * shape.kv_heads) * shape.head_dim, np.float32),
        tops=np.zeros(heads, np.float32),
        totals=np.zeros(heads, np.float32),
        mixed=np.zeros((*heads, shape.head_dim), np.float32),
        mid=np.zeros(shape.intermediate, np.float32),
        logits=np.zeros(shape.vocab, np.float32),
        control=np.zeros(MEMBERS + PLACES * threads, np.int64),
    )


def own_buffers(thread: int, threads: int, shape: Shape) -> Own:
    """One thread's record."""
    longest = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
    widest = max(longest, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    return Own(
        thread,
        threads,
        x=np.zeros(longest, np.float32),
        index=np.zeros(longest, np.int64),
        value=np.zeros(longest, np.float32),
        listed=np.zeros(LINE, np.float32),
        kept=np.zeros(LINE, np.int64),
        out=np.zeros(widest, np.float32),
        up=np.zeros(shape.intermediate, np.float32),
        normed=np.zeros(shape.head_dim, np.float32),
        rotated=np.zeros(shape.head_dim, np.float32),
        scores=np.zeros(TILE, np.float32),
        ramp=np.arange(TILE),
    )


def nothing(kind: Any) -> tuple[Any, ...]:
    """Arguments for `run` that make it do nothing: for a model without layers and without a vocabulary."""
    shape = Shape(0, 0, 0, 1, 1, 0, 0)
    weights = Weights(np.empty((0, 10), np.int64), np.empty(0, np.int64), np.float32(1.0), NONE, NONE, NONE)
    return kind, own_buffers(0, 1, shape), shape, weights, shared_buffers(1, shape)
