"""Triton kernels of packed matrices: sums of kept int8 or int4 rows, dot products with packed rows, a row unpacked.

The layout of rows is `packing`'s. A row is read as 32-bit words, four of them (16 bytes) a thread; a word holds four
int8 or eight int4 codes, and every code of a word has float32 sums of its own, so that codes are widened in registers
and columns are sorted out once, at the end. A scale meets an activation once per word. Sums have a fixed order, as in
`sparse_gemv`. Device code only: sizes, launches and checks live in `op.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.ops.kept.kernel import kept_total, list_address
from teal_kernels.ops.sparse_gemv.kernel import tile_columns
from teal_kernels.ops.threshold.kernel import await_previous, is_kept, projection_threshold


@triton.jit
def code_column(word, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """The column of code NUMBER of a word, counted from the word that a unit of 64 columns begins with."""
    # Of 4 bits, those from 4m on in the lower half of word l are column 16m + l of the unit; the upper half lies 8 on.
    return word * 4 + NUMBER if BITS == 8 else word // 8 * 64 + NUMBER % 4 * 16 + NUMBER // 4 * 8 + word % 8


@triton.jit
def code(word, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """Code NUMBER of each word as float32; codes are two's complement."""
    return ((word << (32 - BITS - BITS * NUMBER)) >> (32 - BITS)).to(tl.float32)


@triton.jit
def first_group(word, GROUP: tl.constexpr, BITS: tl.constexpr):
    """The group of each word's code 0, where word 0 begins a unit; of int4, codes 2, 3, 6 and 7 belong to the one after
    it if groups are halves of units."""
    return word * 4 // GROUP if BITS == 8 else word // 8 * 64 // GROUP


@triton.jit
def group_scale(scales_ptr, row, group, groups, mask, STRIDE: tl.constexpr):
    """The scale of one group of each row, float32 like `row`; beyond the last group, where words are zero, that of the
    last. Scales in the shape of the words would be laid out among the threads in another way than words, and every code
    would go through shared memory to meet its own."""
    at = row * (STRIDE // 2) + tl.minimum(group, groups - 1)
    return tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def packed_gather_kernel(
    words_ptr,  # int32 [K, STRIDE / 4], packed rows
    scales_ptr,  # bfloat16 [K, STRIDE / 2], the same memory from the first scale of row 0 on
    index_ptr,  # kept list
    value_ptr,
    count_ptr,
    thresholds_ptr,  # [P], or [P, K] where PER_CHANNEL
    partial_ptr,  # [SPLITS, N] float32, every element is written
    K: tl.constexpr,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    EDGES: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,  # `RowLayout.units`
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """partial[s, j] = sum over the s-th share of the kept entries r of value[r] * weight[index[r], j].

    Grid: (tiles, SPLITS), dealt out as in `gather_gemv_kernel`; a tile has BLOCK_N columns, whole units of 64.
    """
    await_previous(OVERLAP)
    WORDS: tl.constexpr = BLOCK_N * BITS // 32
    PER_UNIT: tl.constexpr = 2 * BITS  # words of 64 columns
    first, stop, segment = tile_columns(tl.program_id(0), EDGES, TILES, BLOCK_N)
    padded = first * 0
    last = first * 0 + UNITS[1]
    for p in tl.static_range(len(TILES)):
        padded = tl.where(segment == p, UNITS[p] * 64 + first - EDGES[p], padded)
        last = tl.where(segment == p, UNITS[p + 1], last)
    split = tl.program_id(1)
    word = tl.arange(0, WORDS)
    place = tl.multiple_of(padded * BITS // 32, 4) + word
    inside = place < last * PER_UNIT
    group = padded // GROUP  # the first of the tile
    own = first_group(word, GROUP, BITS)

    total = kept_total(count_ptr, CHUNKS)
    begin = (total.to(tl.int64) * split // SPLITS).to(tl.int32)
    end = (total.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32)

    s0 = tl.zeros([ROWS, WORDS], tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    position = begin + tl.arange(0, ROWS)
    for _ in range(begin, end, ROWS * DEPTH):
        for _ in tl.static_range(DEPTH):
            address = list_address(position, count_ptr, CHUNKS, CHUNK)
            row = tl.load(index_ptr + address, mask=position < end, other=0)
            value = tl.load(value_ptr + address, mask=position < end, other=0.0).to(tl.float32)
            threshold = projection_threshold(thresholds_ptr, segment, row, position < end, K, PER_CHANNEL)
            used = is_kept(value, threshold) & (position < end)
            at = row.to(tl.int64)
            mask = used[:, None] & inside[None, :]
            words = tl.load(words_ptr + at[:, None] * (STRIDE // 4) + place[None, :], mask=mask, other=0,
                            eviction_policy="evict_first")  # fmt: skip
            x = tl.where(used, value, 0.0)
            low = tl.zeros([ROWS, WORDS], tl.float32)
            high = low
            for g in tl.static_range(BLOCK_N // GROUP):
                scaled = x * group_scale(scales_ptr, at, group + g, last * 64 // GROUP, used, STRIDE)
                low = tl.where((own == g)[None, :], scaled[:, None], low)
                high = tl.where((own + (BITS == 4 and GROUP < 64) == g)[None, :], scaled[:, None], high)
            s0 = tl.fma(low, code(words, 0, BITS), s0)
            s1 = tl.fma(low, code(words, 1, BITS), s1)
            s2 = tl.fma(high, code(words, 2, BITS), s2)
            s3 = tl.fma(high, code(words, 3, BITS), s3)
            if BITS == 4:
                s4 = tl.fma(low, code(words, 4, BITS), s4)
                s5 = tl.fma(low, code(words, 5, BITS), s5)
                s6 = tl.fma(high, code(words, 6, BITS), s6)
                s7 = tl.fma(high, code(words, 7, BITS), s7)
            position += ROWS
    out = partial_ptr + split.to(tl.int64) * N
    store_code(out, tl.sum(s0, axis=0), word, first, stop, 0, BITS)
    store_code(out, tl.sum(s1, axis=0), word, first, stop, 1, BITS)
    store_code(out, tl.sum(s2, axis=0), word, first, stop, 2, BITS)
    store_code(out, tl.sum(s3, axis=0), word, first, stop, 3, BITS)
    if BITS == 4:
        store_code(out, tl.sum(s4, axis=0), word, first, stop, 4, BITS)
        store_code(out, tl.sum(s5, axis=0), word, first, stop, 5, BITS)
        store_code(out, tl.sum(s6, axis=0), word, first, stop, 6, BITS)
        store_code(out, tl.sum(s7, axis=0), word, first, stop, 7, BITS)


@triton.jit
def store_code(out_ptr, sums, word, first, stop, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """Writes the columns that code NUMBER of each word of a tile stands for."""
    column = first + code_column(word, NUMBER, BITS)
    tl.store(out_ptr + column, sums, mask=column < stop)


@triton.jit
def packed_dot_kernel(
    words_ptr,
    scales_ptr,
    x_ptr,  # [N], in the dtype of the model
    out_ptr,  # [K]
    K,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[k] = x . row k of a packed table, rounded once. Grid: (cdiv(K, ROWS),)."""
    await_previous(OVERLAP)
    PER_UNIT: tl.constexpr = 2 * BITS
    GROUPS: tl.constexpr = max(1, WORDS // PER_UNIT * 64 // GROUP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = row.to(tl.int64), row < K
    word = tl.arange(0, WORDS)
    own = first_group(word, GROUP, BITS)
    sums = tl.zeros([ROWS, WORDS], tl.float32)
    for start in range(0, UNITS * PER_UNIT, WORDS):
        place = start + word
        mask = inside[:, None] & (place < UNITS * PER_UNIT)[None, :]
        words = tl.load(words_ptr + at[:, None] * (STRIDE // 4) + place[None, :], mask=mask, other=0)
        group = start // PER_UNIT * 64 // GROUP
        low = tl.zeros([ROWS, WORDS], tl.float32)
        high = low
        for g in tl.static_range(GROUPS):
            scale = group_scale(scales_ptr, at, group + g, UNITS * 64 // GROUP, inside, STRIDE)
            low = tl.where((own == g)[None, :], scale[:, None], low)
            high = tl.where((own + (BITS == 4 and GROUP < 64) == g)[None, :], scale[:, None], high)
        for number in tl.static_range(32 // BITS):
            column = code_column(place, number, BITS)
            x = tl.load(x_ptr + column, mask=column < N, other=0.0).to(tl.float32)
            scale = high if number // 2 % 2 else low
            sums = tl.fma(x[None, :] * scale, code(words, number, BITS), sums)
    tl.store(out_ptr + row, tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty), mask=row < K)


@triton.jit
def unpack_row_kernel(
    words_ptr, scales_ptr, row_ptr, out_ptr, N: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[j] = weight j of row `row_ptr[0]`, rounded. Grid: (cdiv(N, BLOCK),)."""
    await_previous(OVERLAP)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    at = tl.load(row_ptr)
    if BITS == 8:
        place, shift = column // 4, (column % 4) * 8
    else:
        inner = column % 64
        place, shift = (column // 64) * 8 + inner % 8, (inner // 16) * 4 + ((inner // 8) % 2) * 16
    word = tl.load(words_ptr + at * (STRIDE // 4) + place, mask=inside, other=0)
    scale = tl.load(scales_ptr + at * (STRIDE // 2) + column // GROUP, mask=inside, other=0.0).to(tl.float32)
    weight = scale * ((word << (32 - BITS - shift)) >> (32 - BITS)).to(tl.float32)
    tl.store(out_ptr + column, weight.to(out_ptr.dtype.element_ty), mask=inside)
