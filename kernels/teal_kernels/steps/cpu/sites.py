"""The four products of a layer, divided among threads: captured input, list of kept entries, partial sums.

Memory bandwidth decides how a product is divided: threads that each read half of every 1 KB row get half the bandwidth
of threads that each read half of the rows, whole. So the threads divide the columns as long as each still has PIECE
bytes of a row (matrices.py), and beyond that the kept rows, which leaves partial sums that are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teal_kernels.spec import SITES, columns
from teal_kernels.steps.cpu.intrinsics import atomic_add, fetch, get, item_bytes, narrow, put
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
    Limits,
    Rows,
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

ZERO = np.float32(0.0)
EVERY = (-1, -1)
"""Instead of a range of channels: all of them, and every thread knows them."""
_SITE_NUMBERS: list[Any] = [np.int64(site) for site in range(4)]
SITE_ATTN_IN, SITE_ATTN_OUT, SITE_MLP_IN, SITE_MLP_MID = _SITE_NUMBERS
"""In the order of `SITES`; numpy's integers, so that `multiply` is compiled once for all of them (see layout.NONE)."""
FIRST, LAST = tuple(columns(site).start for site in SITES), tuple(columns(site).stop for site in SITES)
"""Per site: the range of its projections among the seven."""
MATRIX = (QKV, ATTN_OUT, GATE_UP, DOWN)
"""Per site: its column in `Weights.tensors`."""


@compiled
def multiply(
    kind: Any,
    site: int,
    layer: int,
    x: Any,
    count: int,
    channels: tuple[int, int],
    weights: Any,
    shared: Any,
    parts: Any,
    own: Any,
) -> None:
    """This thread's part of the product of a site's vector x float32 [count] with its matrix (`add_kept_rows`), and its
    share of the captured row.

    Args:
        channels: those that `own_channels` gives, where this thread knows x there only; `EVERY` where it knows all.
    """
    begin, end = FIRST[site], LAST[site]
    thresholds = shared.thresholds[layer, begin:end]
    if shared.rows[site, 0] != NONE:
        row, lowest = shared.rows[site, 0] + layer * shared.rows[site, 1], shared.lowest_of[layer, site]
        if channels == EVERY:
            first, last = share(count, own.thread, own.threads)
        else:
            groups = len(parts)
            first, last = share(channels[1] - channels[0], own.thread // groups, own.threads // groups)
            first, last = channels[0] + first, channels[0] + last
        if lowest == SINGLE:
            capture(kind, row, x, first, last, thresholds)
        else:
            record_each(kind, x, first, last, shared.limits[lowest : lowest + count], row)
    rows = Rows(
        weights.tensors[layer, MATRIX[site]],
        weights.edges[site],
        weights.packed[layer, site],
        weights.units[layer, site],
        weights.codes,
    )
    limits = Limits(thresholds, shared.limit_of[layer, begin:end], shared.limits)
    add_kept_rows(kind, rows, limits, x, count, channels, shared.kept[layer, begin:end], parts, own)


@compiled
def own_channels(count: int, parts: Any, own: Any) -> tuple[int, int]:
    """The range of `count` channels that belongs to this thread's group, where a product is divided by kept rows."""
    return share(count, own.thread % len(parts), len(parts))


@compiled
def add_kept_rows(
    kind: Any, rows: Any, limits: Any, x: Any, count: int, channels: tuple[int, int], kept: Any, parts: Any, own: Any
) -> None:
    """This thread's part of (x where |x| > threshold) @ matrix.

    Neighbouring projections with the same thresholds share one list of kept entries.

    Args:
        rows, limits: `Rows` and `Limits` of P projections.
        x: float32, `count` channels.
        channels: those of which this thread's group adds all kept rows; `EVERY`: the groups share the kept rows of all
            channels evenly.
        kept: int64 [P], to which the number of entries that each projection keeps is added.
        parts: float32 [row groups, columns of the matrix], written.
        own: thread, threads, index, all and room as in `Own`.
    """
    thresholds, limit_of, edges = limits.thresholds, limits.limit_of, rows.edges
    projections = len(thresholds)
    width, size, groups = edges[projections], item_bytes(kind), len(parts)
    group, column, shares = own.thread % groups, own.thread // groups, own.threads // groups
    first_channel, last_channel = (0, count) if channels == EVERY else channels
    found, places = last_channel - first_channel, own.all[first_channel:]
    segment, listed = 0, np.float32(np.nan)
    while segment < projections:
        following = segment + 1
        while (
            following < projections
            and thresholds[following] == thresholds[segment]
            and limit_of[following] == limit_of[segment]
        ):
            following += 1
        first_limit = limit_of[segment]
        if first_limit != SINGLE:
            listed = np.float32(np.nan)
            each = limits.limits[first_limit : first_limit + count]
            found, places = compact_each(x, first_channel, last_channel, each, own.index), own.index
        elif thresholds[segment] >= ZERO and thresholds[segment] != listed:
            listed = thresholds[segment]
            found, places = compact(x, first_channel, last_channel, listed, own.index), own.index
        if own.thread == 0 or (column == 0 and channels != EVERY):
            for projection in range(segment, following):
                atomic_add(kept, projection, found)
        begin, end = 0, found
        if channels == EVERY:
            begin, end = found * group // groups, found * (group + 1) // groups
        index = places[begin:end]
        if rows.packed[FORM] == PLAIN:
            first, last = share(edges[following] - edges[segment], column, shares)
            first, last = edges[segment] + first, edges[segment] + last
            out = parts[group, first : max(first, last)]
            out[:] = ZERO
            add_rows(kind, rows.address + first * size, width * size, index, end - begin, x, last - first, out)
        else:
            units = rows.units
            while segment < following:
                stop = adjacent_end(edges, units, segment, following)
                out = parts[group, edges[segment] : edges[stop]]
                add_packed(
                    rows.codes.int8, rows.codes.int4, rows.address, rows.packed, units[segment], units[stop], index, x,
                    out, column, shares, own,
                )  # fmt: skip
                segment = stop
        segment = following


@compiled
def adjacent_end(edges: Any, units: Any, segment: int, following: int) -> int:
    """The end of the projections from `segment` on that have no padding between them."""
    stop = segment + 1
    while stop < following and PACKED_UNIT * (units[stop] - units[segment]) == edges[stop] - edges[segment]:
        stop += 1
    return stop


@compiled
def add_packed(
    int8: Any,
    int4: Any,
    weight: int,
    packed: Any,
    begin: int,
    end: int,
    index: Any,
    x: Any,
    out: Any,
    column: int,
    shares: int,
    own: Any,
) -> None:
    """out = this thread's columns of the sum over k of x[k] * row k of a packed matrix, for k in `index`.

    Args:
        int8, int4: of `Codes`. Arguments of their own: numba leaves out a branch if an *argument* is None.
        packed: the matrix's row of `Weights.packed`; begin, end: the units of the wanted columns.
        out: float32, the wanted columns; the last of them may lie in a unit that has padding.
    """
    step = max(1, (1 << packed[GROUP]) // PACKED_UNIT)
    blocks = (end - begin) // step
    first, last = blocks * column // shares * step, blocks * (column + 1) // shares * step
    units = last - first
    if units == 0:
        return
    padded = PACKED_UNIT * last > len(out)
    sums = own.room[: PACKED_UNIT * units] if padded else out[PACKED_UNIT * first : PACKED_UNIT * last]
    sums[:] = ZERO
    at = begin + first
    scales = weight + packed[SCALES_AT] + (PACKED_UNIT * at >> packed[GROUP]) * 2
    stride, group = packed[STRIDE], packed[GROUP]
    add_picked(
        int8, int4, packed[FORM], weight + at * PACKED_UNIT * packed[FORM] // 8, scales, stride, group, index, x, units,
        sums,
    )  # fmt: skip
    if padded:
        for i in range(len(out) - PACKED_UNIT * first):  # a slice would be copied first
            out[PACKED_UNIT * first + i] = sums[i]


@compiled
def add_picked(
    int8: Any,
    int4: Any,
    bits: int,
    base: int,
    scales: int,
    stride: int,
    group: int,
    index: Any,
    x: Any,
    units: int,
    out: Any,
) -> None:
    """`add_packed_rows` of the rows of `index`, in codes of so many bits; int8, int4 as in `add_packed`."""
    if int8 is not None and bits == 8:
        add_packed_rows(int8, base, scales, stride, group, index, len(index), x, units, out)
    if int4 is not None and bits == 4:
        add_packed_rows(int4, base, scales, stride, group, index, len(index), x, units, out)


@compiled
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The range of `count` outputs or channels that one of `threads` has."""
    units = (count + UNIT - 1) // UNIT
    return units * thread // threads * UNIT, min(count, units * (thread + 1) // threads * UNIT)


@compiled
def capture(kind: Any, row: int, x: Any, first: int, last: int, thresholds: Any) -> None:
    """Writes x[first:last] to a row (an address), thresholded at the lowest threshold."""
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
def activate(kind: Any, channels: tuple[int, int], count: int, parts: Any, rules: Any, own: Any) -> None:
    """own.mid = activation(gate) * up, for a range of the `count` channels."""
    first, width = channels[0], channels[1] - channels[0]
    mid = own.mid[first : first + width]
    collect(kind, parts, first, width, NONE, mid)
    collect(kind, parts, count + first, width, NONE, own.out)
    if rules.gelu:
        for i in range(width):
            mid[i] = gelu(kind, mid[i], own.out[i])
    else:
        for i in range(width):
            mid[i] = swish(kind, mid[i], own.out[i])
