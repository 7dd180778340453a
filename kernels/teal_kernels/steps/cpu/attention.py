"""Attention of one token over the cache, in work items that threads share: a key-value head and a part of its
positions.

A part keeps a running softmax (maximum, sum of exponentials, weighted sum of values, as in FlashDecoding), so
that parts can be joined afterwards. Scores, probabilities and sums are float32; what enters the cache and
what leaves is rounded.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np

from teal_kernels.steps.cpu.heads import TOGETHER, add_together, dot_together
from teal_kernels.steps.cpu.intrinsics import get, item_bytes, narrow, put, store
from teal_kernels.steps.cpu.layout import K_NORM, NONE, Q_NORM, QKV_BIAS
from teal_kernels.steps.cpu.rows import prefetch_bytes
from teal_kernels.steps.cpu.sites import collect
from teal_kernels.steps.cpu.vectors import (
    LOWEST,
    apply_norm,
    cap_all,
    compiled,
    contracted,
    exp,
    inverse_rms,
    largest,
    reordered,
    rms_norm,
    rotate,
    sum_of_squares,
)

TILE = 256
"""Positions that are scored before their values are summed: scores and one tile of keys fit the first-level cache."""

LEAST = 16
"""Fewest positions in a part, where there are that many."""

ZERO, ONE = np.float32(0.0), np.float32(1.0)

QUERIES: Any = np.int64(0)
KEYS: Any = np.int64(1)
"""Which of the two scales of `wide_scales`; numpy's integers for the reason given at `layout.NONE`."""


def parts_for(threads: int, kv_heads: int) -> int:
    """Into how many parts each head's positions are divided, so that all threads get the same number of items."""
    return threads // gcd(threads, kv_heads)


@compiled
def positions(weights: Any, layer: int, token: Any, parts: int, item: int) -> tuple[int, int, int]:
    """Of a work item: the key-value head, and the range of positions, which may be empty."""
    first = max(0, token.position + 1 - weights.windows[layer])
    step = max(LEAST, (token.position + 1 - first + parts - 1) // parts)
    start = first + item % parts * step
    return item // parts, start, min(start + step, token.position + 1)


@compiled
def items_of(shape: Any, parts: int, number: int, threads: int) -> tuple[int, int]:
    """The range of the items of one of as many shares as there are threads."""
    items = shape.kv_heads * parts
    return items * number // threads, items * (number + 1) // threads


@compiled
def prefetch_keys(
    kind: Any, shape: Any, weights: Any, cache: Any, layer: int, token: Any, parts: int, own: Any
) -> None:
    """Prefetches the first keys that this thread will read in `attend`; called before it waits for the others."""
    row = shape.head_dim * item_bytes(kind)
    begin, end = items_of(shape, parts, own.thread, own.threads)
    for item in range(begin, end):
        head, start, stop = positions(weights, layer, token, parts, item)
        keys = cache.keys + layer * cache.layer_stride + head * cache.head_stride
        prefetch_bytes(keys + start * row, min(TILE, stop - start) * row)


@compiled
def share_of(
    kind: Any, shape: Any, weights: Any, tensors: Any, number: int, whose: int, shared: Any, own: Any
) -> tuple[int, int, Any]:
    """The range of the items of share `number`, and what the norm over all heads of its QUERIES or KEYS multiplies by;
    ZERO where there is no such norm."""
    begin, end = items_of(shape, shared.totals.shape[1], number, own.threads)
    if weights.rules.wide_head_norms and tensors[Q_NORM] != NONE and begin < end:
        return begin, end, wide_scales(kind, shape, tensors, weights.norm, shared.qkv, own)[whose]
    return begin, end, ZERO


@compiled
def append_all(
    kind: Any, shape: Any, weights: Any, cache: Any, layer: int, token: Any, number: int, shared: Any, own: Any
) -> None:
    """Appends the keys and values to the cache that belong to the items of share `number`."""
    parts, tensors = shared.totals.shape[1], weights.tensors[layer]
    begin, end, scale = share_of(kind, shape, weights, tensors, number, KEYS, shared, own)
    for item in range(begin, end):
        head, start, stop = positions(weights, layer, token, parts, item)
        if start < stop and stop == token.position + 1:
            keys = cache.keys + layer * cache.layer_stride + head * cache.head_stride
            values = cache.values + layer * cache.layer_stride + head * cache.head_stride
            append(kind, shape, tensors, weights.norm, scale, token, shared.qkv, head, keys, values, own)


@compiled
def attend(
    kind: Any, shape: Any, weights: Any, cache: Any, layer: int, token: Any, number: int, shared: Any, own: Any
) -> None:
    """The items of share `number`, after their keys and values were appended: rotates queries, leaves partial sums in
    `own`."""
    parts, group, tensors = shared.totals.shape[1], shape.heads // shape.kv_heads, weights.tensors[layer]
    begin, end, scale = share_of(kind, shape, weights, tensors, number, QUERIES, shared, own)
    for item in range(begin, end):
        head, start, stop = positions(weights, layer, token, parts, item)
        if start >= stop:
            own.totals[head * group : (head + 1) * group, item % parts] = ZERO
            continue
        keys = cache.keys + layer * cache.layer_stride + head * cache.head_stride
        values = cache.values + layer * cache.layer_stride + head * cache.head_stride
        for query in range(head * group, (head + 1) * group, TOGETHER):
            count = min(TOGETHER, (head + 1) * group - query)
            for i in range(count):
                at = own.queries[i]
                weight = head_weight(kind, shape, tensors[Q_NORM], query + i, scale)
                place(kind, shape, tensors, weight, weights.norm, scale, token, shared.qkv, query + i, own, at)
            attend_part(kind, shape, weights.rules, keys, values, start, stop, query, count, item % parts, own)


@compiled
def hand_over_sums(shape: Any, number: int, shared: Any, own: Any) -> None:
    """After `attend`: its partial sums for all to see."""
    parts, group = shared.totals.shape[1], shape.heads // shape.kv_heads
    begin, end = items_of(shape, parts, number, own.threads)
    for item in range(begin, end):
        for head in range(item // parts * group, (item // parts + 1) * group):
            part = item % parts
            shared.tops[head, part], shared.totals[head, part] = own.tops[head, part], own.totals[head, part]
            there, here = shared.mixed[head, part], own.parts[head, part]
            for i in range(shape.head_dim):
                put(there, i, get(here, i))


@compiled
def wide_scales(kind: Any, shape: Any, tensors: Any, norm: Any, qkv: Any, own: Any) -> tuple[Any, Any]:
    """What the norms over all heads of q, and over all of k, multiply by; own.x is free here."""
    wide, narrower = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    collect(kind, qkv, 0, wide, tensors[QKV_BIAS], own.x)
    query = inverse_rms(sum_of_squares(own.x, wide), wide, norm)
    collect(kind, qkv, wide, narrower, tensors[QKV_BIAS], own.x)
    return query, inverse_rms(sum_of_squares(own.x, narrower), narrower, norm)


@compiled
def head_weight(kind: Any, shape: Any, weight: int, head: int, scale: Any) -> int:
    """Where one head's part of the weight of a norm over all heads begins; of a norm of each head, the weight."""
    return weight + head * shape.head_dim * item_bytes(kind) if scale > ZERO else weight


@compiled
def place(
    kind: Any,
    shape: Any,
    tensors: Any,
    weight: int,
    norm: Any,
    scale: Any,
    token: Any,
    qkv: Any,
    head: int,
    own: Any,
    out: Any,
) -> None:
    """out = one head of the product, normalised if the model does that, turned to this token's position.

    Args:
        weight: address of the norm's weight, or NONE.
        scale: from `wide_scales`; 0 where each head is normalised by itself.
    """
    collect(kind, qkv, head * shape.head_dim, shape.head_dim, tensors[QKV_BIAS], own.head)
    if weight == NONE:
        rotate(kind, own.head, shape.head_dim, token.cos, token.sin, out)
    else:
        if scale > ZERO:
            apply_norm(kind, own.head, shape.head_dim, scale, weight, norm, own.normed)
        else:
            rms_norm(kind, own.head, shape.head_dim, weight, norm, own.normed)
        rotate(kind, own.normed, shape.head_dim, token.cos, token.sin, out)


@compiled
def append(
    kind: Any,
    shape: Any,
    tensors: Any,
    norm: Any,
    scale: Any,
    token: Any,
    qkv: Any,
    head: int,
    keys: int,
    values: int,
    own: Any,
) -> None:
    """Writes this token's key and value of one head into the cache."""
    first = token.position * shape.head_dim
    weight = head_weight(kind, shape, tensors[K_NORM], head, scale)
    place(kind, shape, tensors, weight, norm, scale, token, qkv, shape.heads + head, own, own.rotated)
    for i in range(shape.head_dim):
        store(kind, keys, first + i, own.rotated[i])
    start = (shape.heads + shape.kv_heads + head) * shape.head_dim
    collect(kind, qkv, start, shape.head_dim, tensors[QKV_BIAS], own.head)
    for i in range(shape.head_dim):
        store(kind, values, first + i, own.head[i])


@compiled
def attend_part(
    kind: Any,
    shape: Any,
    rules: Any,
    keys: int,
    values: int,
    start: int,
    stop: int,
    first: int,
    queries: int,
    part: int,
    own: Any,
) -> None:
    """Softmax-weighted sums of the values of positions start..stop for the first `queries` of own.queries, which are
    heads `first` and following."""
    row, width = shape.head_dim * item_bytes(kind), shape.head_dim
    scale = rules.attention_scale if rules.score_cap == ZERO else ONE
    tops, totals = own.tops[first : first + queries, part], own.totals[first : first + queries, part]
    tops[:] = LOWEST
    totals[:] = ZERO
    own.mixed[:] = ZERO
    for tile in range(start, stop, TILE):
        count = min(TILE, stop - tile)
        here, there = keys + tile * row, values + tile * row
        dot_together(kind, queries, here, row, count, own.queries, width, own.scores, there - here)
        for i in range(queries):
            if rules.score_cap != ZERO:
                cap_all(own.scores[i], count, rules.attention_scale, rules.score_cap)
            top = max(tops[i], largest(own.scores[i], count) * scale)
            shrink = exp(tops[i] - top)
            totals[i] = totals[i] * shrink + exponentials(own.scores[i], count, scale, top)
            for j in range(width):
                own.mixed[i, j] *= shrink
            tops[i] = top
        add_together(kind, queries, there, row, count, own.scores, width, own.mixed, here + TILE * row - there)
    for i in range(queries):
        for j in range(width):
            own.parts[first + i, part, j] = own.mixed[i, j]


@reordered
def exponentials(scores: Any, count: int, scale: Any, top: Any) -> Any:
    """scores[:count] = exp(scores * scale - top), and their sum."""
    for i in range(count):
        scores[i] = exp(scores[i] * scale - top)
    total = ZERO
    for i in range(count):
        total += scores[i]
    return total


@contracted
def join_parts(kind: Any, shape: Any, shared: Any, out: Any) -> None:
    """out = the attention's output of all heads, rounded: the parts, weighted by their softmax sums."""
    parts = shared.totals.shape[1]
    for head in range(shape.heads):
        top = LOWEST
        for part in range(parts):
            if shared.totals[head, part] > ZERO:
                top = max(top, shared.tops[head, part])
        mixed = out[head * shape.head_dim : (head + 1) * shape.head_dim]
        mixed[:] = ZERO
        total = ZERO
        for part in range(parts):
            if shared.totals[head, part] > ZERO:
                weight = exp(shared.tops[head, part] - top)
                total += weight * shared.totals[head, part]
                for i in range(shape.head_dim):
                    mixed[i] += weight * shared.mixed[head, part, i]
        for i in range(shape.head_dim):
            mixed[i] = narrow(kind, mixed[i] / total)
