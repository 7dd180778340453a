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

from teal_kernels.cpu_step.attention import TILE, attend, join_parts
from teal_kernels.cpu_step.intrinsics import atomic_add, atomic_load, fetch, give_way, item_bytes, narrow, pause
from teal_kernels.cpu_step.layout import (
    ABANDON,
    ATTN_NORM,
    ATTN_OUT,
    DOWN,
    GATE_UP,
    MLP_NORM,
    NONE,
    O_BIAS,
    QKV,
    QKV_BIAS,
    UNIT,
    Cache,
    Own,
    Shape,
    Shared,
    Token,
    Weights,
)
from teal_kernels.cpu_step.rows import add_rows, dot_rows
from teal_kernels.cpu_step.vectors import compact, compiled, list_all, record, record_all, rms_norm, swish

ZERO = np.float32(0.0)
LINE = 16
"""Elements that keep what one thread writes off the cache lines of another."""
SPINS = 2000
"""Looks at a barrier before the thread offers its core to others: some 50 microseconds."""


@njit(nogil=True, error_model="numpy", cache=True, _nrt=False)
def run(kind: Any, own: Any, rounds: int, shape: Any, weights: Any, cache: Any, token: Any, shared: Any) -> None:
    """One thread's part of a step; `own.threads` of them must run at once, and have passed `rounds` barriers before.

    Arguments: see layout.py.

    Leaves the logits, float32 [vocab], in shared.logits, and the new keys and values in the cache.
    """
    thread, threads = own.thread, own.threads
    first, last = share(shape.hidden, thread, threads)
    for i in range(first, last):
        shared.hidden[i] = fetch(kind, weights.embedding, token.token * shape.hidden + i)
    rounds = meet(shared.arrivals, threads, rounds)
    for layer in range(shape.layers):
        tensors = weights.tensors[layer]
        thresholds = token.thresholds[layer]
        rms_norm(kind, shared.hidden, 0, shape.hidden, tensors[ATTN_NORM], weights.eps, own.x)
        query_key_value(kind, shape, tensors, thresholds, token, layer, shared, own)
        rounds = meet(shared.arrivals, threads, rounds)
        attend(kind, shape, weights, cache, layer, token, shared, own)
        rounds = meet(shared.arrivals, threads, rounds)
        join_parts(kind, shape, shared, own.x)
        attention_out(kind, shape, tensors, thresholds, token, layer, shared, own)
        rounds = meet(shared.arrivals, threads, rounds)
        rms_norm(kind, shared.hidden, 0, shape.hidden, tensors[MLP_NORM], weights.eps, own.x)
        gate_up(kind, shape, tensors, thresholds, token, layer, shared, own)
        rounds = meet(shared.arrivals, threads, rounds)
        down(kind, shape, tensors, thresholds, token, layer, shared, own)
        rounds = meet(shared.arrivals, threads, rounds)
    rms_norm(kind, shared.hidden, 0, shape.hidden, weights.final_norm, weights.eps, own.x)
    first, last = share(shape.vocab, thread, threads)
    row = shape.hidden * item_bytes(kind)
    dot_rows(kind, weights.lm_head + first * row, row, last - first, own.x, shape.hidden, shared.logits[first:last])
    meet(shared.arrivals, threads, rounds)


@compiled
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The range of `count` outputs that a thread owns."""
    units = (count + UNIT - 1) // UNIT
    return units * thread // threads * UNIT, min(count, units * (thread + 1) // threads * UNIT)


@compiled
def meet(arrivals: Any, threads: int, rounds: int) -> int:
    """A barrier: returns, with the number of barriers passed, when all threads have come. The count of arrivals only
    grows, so that a thread that looks late finds it at its goal or beyond."""
    rounds += 1
    atomic_add(arrivals, 0, 1)
    looks = 0
    while atomic_load(arrivals, 0) < rounds * threads:
        looks += 1
        if looks < SPINS:
            pause()
        elif atomic_load(arrivals, ABANDON) != 0:
            break
        else:
            give_way()
    return rounds


@compiled
def capture(kind: Any, token: Any, site: int, layer: int, x: Any, count: int, threshold: Any, own: Any) -> None:
    """Writes this thread's share of a site's thresholded vector to the caller's row, if one was given."""
    if token.rows[site, 0] != NONE:
        row = token.rows[site, 0] + layer * token.rows[site, 1]
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
def query_key_value(
    kind: Any, shape: Any, tensors: Any, thresholds: Any, token: Any, layer: int, shared: Any, own: Any
) -> None:
    """shared.qkv = x @ qkv + bias, each of q, k, v with its own threshold; equal neighbours are walked as one."""
    capture(kind, token, 0, layer, own.x, shape.hidden, min(thresholds[0], thresholds[1], thresholds[2]), own)
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
        out = own.out[: max(0, last - first)]
        project(kind, own.x, shape.hidden, thresholds[segment], tensors[QKV], width, first, last, out, own)
        for i in range(first, last):
            shared.qkv[i] = biased(kind, out[i - first], tensors[QKV_BIAS], i)
        segment = following


@compiled
def biased(kind: Any, product: Any, bias: int, i: int) -> Any:
    """A product, rounded, plus its bias if there is one, rounded again."""
    value = narrow(kind, product)
    return value if bias == NONE else narrow(kind, value + fetch(kind, bias, i))


@compiled
def attention_out(
    kind: Any, shape: Any, tensors: Any, thresholds: Any, token: Any, layer: int, shared: Any, own: Any
) -> None:
    """shared.hidden += x @ attn_out + bias."""
    count = shape.heads * shape.head_dim
    capture(kind, token, 1, layer, own.x, count, thresholds[3], own)
    first, last = share(shape.hidden, own.thread, own.threads)
    own.listed[0] = np.nan
    project(kind, own.x, count, thresholds[3], tensors[ATTN_OUT], shape.hidden, first, last, own.out, own)
    for i in range(first, last):
        shared.hidden[i] = narrow(kind, shared.hidden[i] + biased(kind, own.out[i - first], tensors[O_BIAS], i))


@compiled
def gate_up(
    kind: Any, shape: Any, tensors: Any, thresholds: Any, token: Any, layer: int, shared: Any, own: Any
) -> None:
    """shared.mid = SiLU(x @ gate) * (x @ up); a thread owns the same columns of both."""
    capture(kind, token, 2, layer, own.x, shape.hidden, min(thresholds[4], thresholds[5]), own)
    width, between = 2 * shape.intermediate, shape.intermediate
    first, last = share(shape.intermediate, own.thread, own.threads)
    own.listed[0] = np.nan
    project(kind, own.x, shape.hidden, thresholds[4], tensors[GATE_UP], width, first, last, own.out, own)
    up_first, up_last = between + first, between + last
    project(kind, own.x, shape.hidden, thresholds[5], tensors[GATE_UP], width, up_first, up_last, own.up, own)
    for i in range(last - first):
        shared.mid[first + i] = swish(kind, narrow(kind, own.out[i]), narrow(kind, own.up[i]))


@compiled
def down(kind: Any, shape: Any, tensors: Any, thresholds: Any, token: Any, layer: int, shared: Any, own: Any) -> None:
    """shared.hidden += mid @ down."""
    capture(kind, token, 3, layer, shared.mid, shape.intermediate, thresholds[6], own)
    first, last = share(shape.hidden, own.thread, own.threads)
    own.listed[0] = np.nan
    project(kind, shared.mid, shape.intermediate, thresholds[6], tensors[DOWN], shape.hidden, first, last, own.out, own)
    for i in range(first, last):
        shared.hidden[i] = narrow(kind, shared.hidden[i] + narrow(kind, own.out[i - first]))


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
    empty = np.empty(0, np.float32)
    shape = Shape(0, 0, 0, 1, 1, 0, 0)
    weights = Weights(np.empty((0, 10), np.int64), np.empty(0, np.int64), np.float32(1.0), NONE, NONE, NONE)
    token = Token(0, 0, NONE, NONE, np.empty((0, 7), np.float32), np.zeros((4, 2), np.int64))
    parts = np.empty((1, 1), np.float32)
    shared = Shared(empty, empty, parts, parts, np.empty((1, 1, 0), np.float32), empty, empty, np.zeros(16, np.int64))
    return kind, own_buffers(0, 1, shape), 0, shape, weights, Cache(NONE, NONE, 0, 0), token, shared
