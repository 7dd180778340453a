"""The four products of a layer, split over threads: captured input, list of kept entries, parts of the sum.

Memory decides how a product is split. It wants long runs: threads that read half of every 1 KB row each get half
of the bandwidth that they get from half of the rows, whole. So threads first share the columns, as long as each still
has PIECE bytes of a row; beyond that they share the kept rows, and leave partial sums that are added in a fixed
order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teal_kernels.spec import SITES, columns
from teal_kernels.steps.cpu.intrinsics import fetch, get, item_bytes, narrow, put
from teal_kernels.steps.cpu.layout import (
    ATTN_OUT,
    DOWN,
    FORM,
    GATE_UP,
    GROUP,
    NONE,
    PLAIN,
    QKV,
    SCALES_AT,
    SINGLE,
    STRIDE,
    UNIT,
)
from teal_kernels.steps.cpu.packed_rows import UNIT as PACKED_UNIT
from teal_kernels.steps.cpu.packed_rows import add_packed_rows
from teal_kernels.steps.cpu.rows import add_rows
from teal_kernels.steps.cpu.vectors import (
    ONE,
    compact,
    compact_each,
    compiled,
    gelu,
    record,
    record_all,
    record_each,
    rms_norm,
    swish,
)

PIECE = 4096
"""Bytes of a row that one thread reads at least, where a row has them."""

ZERO = np.float32(0.0)
INT8, INT4 = np.empty(0, np.int8), np.empty(0, np.uint8)
"""What tells the compiler how weights are packed, see lanes.py."""
SITE_ATTN_IN, SITE_ATTN_OUT, SITE_MLP_IN, SITE_MLP_MID = range(4)
"""In the order of `SITES`."""
FIRST, LAST = tuple(columns(site).start for site in SITES), tuple(columns(site).stop for site in SITES)
"""Per site: the range of its projections among the seven."""
MATRIX = (QKV, ATTN_OUT, GATE_UP, DOWN)
"""Per site: its column in `Weights.tensors`."""


def row_groups(threads: int, row_bytes: int) -> int:
    """Among how many threads the kept rows of a matrix are shared; as many times fewer share its columns."""
    columns = [n for n in range(1, threads + 1) if threads % n == 0 and (n == 1 or row_bytes >= n * PIECE)]
    return threads // max(columns)


@compiled
def multiply(
    kind: Any, site: int, layer: int, x: Any, count: int, weights: Any, shared: Any, parts: Any, own: Any
) -> None:
    """This thread's part of (x where |x| > threshold) @ weight, and its share of the captured row.

    Neighbouring projections with the same thresholds are walked as one.

    Args:
        x: float32, `count` channels.
        parts: float32 [row groups, columns of the fused matrix].
    """
    thresholds = shared.thresholds[layer, FIRST[site] : LAST[site]]
    limit_of = shared.limit_of[layer, FIRST[site] : LAST[site]]
    edges = weights.edges[site]
    weight, width, size = weights.tensors[layer, MATRIX[site]], edges[len(thresholds)], item_bytes(kind)
    groups = len(parts)
    group, column, shares = own.thread % groups, own.thread // groups, own.threads // groups
    if shared.rows[site, 0] != NONE:
        row, lowest = shared.rows[site, 0] + layer * shared.rows[site, 1], shared.lowest_of[layer, site]
        if lowest == SINGLE:
            capture(kind, row, x, count, thresholds, own)
        else:
            first, last = share(count, own.thread, own.threads)
            record_each(kind, x, first, last, shared.limits[lowest : lowest + count], row)
    segment, listed, kept, places = 0, np.float32(np.nan), count, own.all
    while segment < len(thresholds):
        following = segment + 1
        while (
            following < len(thresholds)
            and thresholds[following] == thresholds[segment]
            and limit_of[following] == limit_of[segment]
        ):
            following += 1
        limits = limit_of[segment]
        if limits != SINGLE:
            listed = np.float32(np.nan)
            kept, places = compact_each(x, count, shared.limits[limits : limits + count], own.index), own.index
        elif thresholds[segment] >= ZERO and thresholds[segment] != listed:
            listed = thresholds[segment]
            kept, places = compact(x, count, listed, own.index), own.index
        if own.thread == 0:
            for projection in range(FIRST[site] + segment, FIRST[site] + following):
                shared.kept[layer, projection] += kept
        begin, end = kept * group // groups, kept * (group + 1) // groups
        index = places[begin:end]
        if weights.packed[layer, site, FORM] == PLAIN:
            first, last = share(edges[following] - edges[segment], column, shares)
            first, last = edges[segment] + first, edges[segment] + last
            out = parts[group, first : max(first, last)]
            out[:] = ZERO
            add_rows(kind, weight + first * size, width * size, index, end - begin, x, last - first, out)
        else:
            units = weights.units[layer, site]
            while segment < following:
                stop = abreast(edges, units, segment, following)
                multiply_packed(
                    weight, weights.packed[layer, site], units[segment], units[stop], index, x,
                    parts[group, edges[segment] : edges[stop]], column, shares, own,
                )  # fmt: skip
                segment = stop
        segment = following


@compiled
def abreast(edges: Any, units: Any, segment: int, following: int) -> int:
    """Where the projections end that lie side by side from `segment` on, without padding between them."""
    stop = segment + 1
    while stop < following and PACKED_UNIT * (units[stop] - units[segment]) == edges[stop] - edges[segment]:
        stop += 1
    return stop


@compiled
def multiply_packed(
    weight: int, packed: Any, begin: int, end: int, index: Any, x: Any, out: Any, column: int, shares: int, own: Any
) -> None:
    """out = this thread's columns of the sum over k of x[k] * row k of a packed matrix, for k in `index`.

    Args:
        packed: the matrix's row of `Weights.packed`; begin, end: the units of the wanted columns.
        out: float32, the wanted columns; the last of them may lie in a unit that has padding.
    """
    step = max(1, (1 << packed[GROUP]) // PACKED_UNIT)
    lots = (end - begin) // step
    first, last = lots * column // shares * step, lots * (column + 1) // shares * step
    units = last - first
    if units == 0:
        return
    padded = PACKED_UNIT * last > len(out)
    sums = own.room[: PACKED_UNIT * units] if padded else out[PACKED_UNIT * first : PACKED_UNIT * last]
    sums[:] = ZERO
    at = begin + first
    scales = weight + packed[SCALES_AT] + (PACKED_UNIT * at >> packed[GROUP]) * 2
    stride, group = packed[STRIDE], packed[GROUP]
    if packed[FORM] == 8:
        add_packed_rows(INT8, weight + at * 64, scales, stride, group, index, len(index), x, units, sums)
    else:
        add_packed_rows(INT4, weight + at * 32, scales, stride, group, index, len(index), x, units, sums)
    if padded:
        for i in range(len(out) - PACKED_UNIT * first):  # a slice would be copied first
            out[PACKED_UNIT * first + i] = sums[i]


@compiled
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The range of `count` outputs or channels that one of `threads` has."""
    units = (count + UNIT - 1) // UNIT
    return units * thread // threads * UNIT, min(count, units * (thread + 1) // threads * UNIT)


@compiled
def capture(kind: Any, row: int, x: Any, count: int, thresholds: Any, own: Any) -> None:
    """Writes this thread's share of x to a row (an address), thresholded at the lowest threshold."""
    first, last = share(count, own.thread, own.threads)
    lowest = thresholds[0]
    for threshold in thresholds[1:]:
        lowest = min(lowest, threshold)
    if lowest < ZERO:
        record_all(kind, x, first, last, row)
    else:
        record(kind, x, first, last, lowest, row)


@compiled
def collect(kind: Any, parts: Any, first: int, count: int, bias: int, out: Any) -> None:
    """out[:count] = columns first.. of a product: its parts added and rounded; plus bias, if any, rounded again."""
    part = parts[0, first : first + count]
    for i in range(count):
        out[i] = part[i]
    for group in range(1, len(parts)):
        part = parts[group, first : first + count]
        for i in range(count):
            out[i] += part[i]
    if bias == NONE:
        for i in range(count):
            out[i] = narrow(kind, out[i])
    else:
        for i in range(count):
            put(out, i, narrow(kind, narrow(kind, get(out, i)) + fetch(kind, bias, first + i)))


@compiled
def add_product(
    kind: Any, hidden: Any, count: int, parts: Any, bias: int, post_norm: int, weights: Any, own: Any
) -> None:
    """The residual connection: hidden += the product, or its norm if there is a `post_norm`; rounded."""
    collect(kind, parts, 0, count, bias, own.out)
    if post_norm != NONE:
        rms_norm(kind, own.out, count, post_norm, weights.norm, own.out)
    scale = weights.rules.residual_scale
    if scale != ONE:
        for i in range(count):
            own.out[i] = narrow(kind, own.out[i] * scale)
    for i in range(count):
        hidden[i] = narrow(kind, hidden[i] + own.out[i])


@compiled
def activate(kind: Any, count: int, parts: Any, rules: Any, own: Any) -> None:
    """own.mid = activation(gate) * up."""
    collect(kind, parts, 0, count, NONE, own.mid)
    collect(kind, parts, count, count, NONE, own.out)
    if rules.gelu:
        for i in range(count):
            own.mid[i] = gelu(kind, own.mid[i], own.out[i])
    else:
        for i in range(count):
            own.mid[i] = swish(kind, own.mid[i], own.out[i])
