"""The four products of a layer, divided into parts: list of kept entries, partial sums, captured input.

Memory bandwidth decides how a product is divided: threads that each read half of every 1 KB row get half the bandwidth
of threads that each read half of the rows, whole. So the threads divide the columns as long as each still has PIECE
bytes of a row (matrices.py), and beyond that the kept rows, which leaves partial sums that are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teal_kernels.spec import SITES, columns
from teal_kernels.steps.cpu.intrinsics import atomic_add, atomic_load, fetch, get, item_bytes, narrow, put
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
    kind: Any, site: int, layer: int, x: Any, count: int, channels: tuple[int, int], weights: Any, shared: Any,
    part: Any, own: Any,
) -> bool:  # fmt: skip
    """own.sums = a part of the product of a site's vector x float32 [count] with its matrix; the rest as of
    `add_kept_rows`."""
    begin, end = FIRST[site], LAST[site]
    rows = Rows(
        weights.tensors[layer, MATRIX[site]],
        weights.edges[site],
        weights.packed[layer, site],
        weights.units[layer, site],
        weights.codes,
    )
    limits = Limits(shared.thresholds[layer, begin:end], shared.limit_of[layer, begin:end], shared.limits)
    own.counts[:] = 0
    return add_kept_rows(kind, rows, limits, x, count, channels, own.counts, part, own.sums, own)


@compiled
def hand_over(
    kind: Any, site: int, layer: int, x: Any, count: int, channels: tuple[int, int], shared: Any, sums: Any, kept: Any,
    part: Any, own: Any,
) -> None:  # fmt: skip
    """After `multiply`: its columns for all to see in `sums`, the kept entries counted, and the part's share of the
    captured row written, if one is captured. Arguments as of `multiply`; sums: float32 [groups, columns]; kept: int64
    [layers, 7]."""
    begin, end = FIRST[site], LAST[site]
    group = sums[part.number % part.groups]
    for span in range(own.spans[0]):
        for i in range(own.spans[2 * span + 1], own.spans[2 * span + 2]):
            put(group, i, get(own.sums, i))
    for projection in range(end - begin):
        if own.counts[projection] != 0:
            atomic_add(kept[layer], begin + projection, own.counts[projection])
    if shared.rows[site, 0] != NONE:
        row, lowest = shared.rows[site, 0] + layer * shared.rows[site, 1], shared.lowest_of[layer, site]
        if channels == EVERY:
            first, last = share(count, part.number, part.parts)
        else:
            first, last = share(channels[1] - channels[0], part.number // part.groups, part.parts // part.groups)
            first, last = channels[0] + first, channels[0] + last
        if lowest == SINGLE:
            capture(kind, row, x, first, last, shared.thresholds[layer, begin:end])
        else:
            record_each(kind, x, first, last, shared.limits[lowest : lowest + count], row)


@compiled
def own_channels(count: int, part: Any) -> tuple[int, int]:
    """The range of `count` channels that belongs to a part's group, where a product is divided by kept rows."""
    return share(count, part.number % part.groups, part.groups)


@compiled
def add_kept_rows(
    kind: Any, rows: Any, limits: Any, x: Any, count: int, channels: tuple[int, int], kept: Any, part: Any, out: Any,
    own: Any,
) -> bool:  # fmt: skip
    """A part of (x where |x| > threshold) @ matrix. False: it was given up, see `Part`.

    Neighbouring projections with the same thresholds share one list of kept entries.

    Args:
        rows, limits: `Rows` and `Limits` of P projections.
        x: float32, `count` channels.
        channels: those of which the part's group adds all kept rows, where this thread may know x there only; `EVERY`:
            the groups share the kept rows of all channels evenly, and this thread knows them all.
        kept: int64 [P], to which one part of each group adds the number of entries that each projection keeps.
        out: float32 [columns of the matrix]; the part's columns are written.
        own: index, all and room as in `Own`; spans int64 [1 + 2 * MOST_PROJECTIONS]: receives how many ranges the
            part's columns are, and where each begins and ends.
    """
    thresholds, limit_of, edges = limits.thresholds, limits.limit_of, rows.edges
    projections = len(thresholds)
    width, groups = edges[projections], part.groups
    group, column, shares = part.number % groups, part.number // groups, part.parts // groups
    first_channel, last_channel = (0, count) if channels == EVERY else channels
    found, places = last_channel - first_channel, own.all[first_channel:]
    segment, listed = 0, np.float32(np.nan)
    own.spans[0] = 0
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
        if part.number == 0 or (column == 0 and channels != EVERY):
            for projection in range(segment, following):
                kept[projection] += found
        begin, end = 0, found
        if channels == EVERY:
            begin, end = found * group // groups, found * (group + 1) // groups
        index = places[begin:end]
        if rows.packed[FORM] == PLAIN:
            if not add_plain(
                kind, rows.address, width, edges[segment], edges[following], index, x, out, column, shares, part, own
            ):  # fmt: skip
                return False
        else:
            units = rows.units
            while segment < following:
                stop = adjacent_end(edges, units, segment, following)
                if not add_packed(
                    rows.codes.int8, rows.codes.int4, rows.address, rows.packed, units[segment], units[stop], index, x,
                    out[edges[segment] : edges[stop]], edges[segment], column, shares, part, own,
                ):  # fmt: skip
                    return False
                segment = stop
        segment = following
    return True


@compiled
def add_plain(
    kind: Any, weight: int, width: int, begin: int, end: int, index: Any, x: Any, out: Any, column: int, shares: int,
    part: Any, own: Any,
) -> bool:  # fmt: skip
    """As `add_packed`, of columns `begin` to `end` of a matrix of floats with `width` columns; out: all of these."""
    size = item_bytes(kind)
    first, last = share(end - begin, column, shares)
    first, last = begin + first, begin + last
    mine = out[first : max(first, last)]
    note_span(own, first, max(first, last))
    mine[:] = ZERO
    address = weight + first * size
    for done in range(0, len(index), part.rows):
        if atomic_load(part.control, part.place) > part.state:
            return False
        some = index[done : done + part.rows]
        add_rows(kind, address, width * size, some, len(some), x, last - first, mine)
    return True


@compiled
def note_span(own: Any, first: int, last: int) -> None:
    at = 2 * own.spans[0]
    own.spans[at + 1], own.spans[at + 2] = first, last
    own.spans[0] += 1


@compiled
def adjacent_end(edges: Any, units: Any, segment: int, following: int) -> int:
    """The end of the projections from `segment` on that have no padding between them."""
    stop = segment + 1
    while stop < following and PACKED_UNIT * (units[stop] - units[segment]) == edges[stop] - edges[segment]:
        stop += 1
    return stop


@compiled
def add_packed(
    int8: Any, int4: Any, weight: int, packed: Any, begin: int, end: int, index: Any, x: Any, out: Any, edge: int,
    column: int, shares: int, part: Any, own: Any,
) -> bool:  # fmt: skip
    """out = one share of the columns of the sum over k of x[k] * row k of a packed matrix, for k in `index`.

    Args:
        int8, int4: of `Codes`. Arguments of their own: numba leaves out a branch if an *argument* is None.
        packed: the matrix's row of `Weights.packed`; begin, end: the units of the wanted columns.
        out: float32, the wanted columns; the last of them may lie in a unit that has padding.
        edge: the matrix's column that out[0] is.
        column, shares: which share of the columns, of how many. part, own: as of `add_kept_rows`.
    """
    step = max(1, (1 << packed[GROUP]) // PACKED_UNIT)
    blocks = (end - begin) // step
    first, last = blocks * column // shares * step, blocks * (column + 1) // shares * step
    units = last - first
    if units == 0:
        return True
    padded = PACKED_UNIT * last > len(out)
    sums = own.room[: PACKED_UNIT * units] if padded else out[PACKED_UNIT * first : PACKED_UNIT * last]
    sums[:] = ZERO
    at = begin + first
    scales = weight + packed[SCALES_AT] + (PACKED_UNIT * at >> packed[GROUP]) * 2
    base = weight + at * PACKED_UNIT * packed[FORM] // 8
    stride, group = packed[STRIDE], packed[GROUP]
    for done in range(0, len(index), part.rows):
        if atomic_load(part.control, part.place) > part.state:
            return False
        some = index[done : done + part.rows]
        add_picked(int8, int4, packed[FORM], base, scales, stride, group, some, x, units, sums)
    note_span(own, edge + PACKED_UNIT * first, edge + min(PACKED_UNIT * last, len(out)))
    if padded:
        for i in range(len(out) - PACKED_UNIT * first):  # a slice would be copied first
            out[PACKED_UNIT * first + i] = sums[i]
    return True


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
