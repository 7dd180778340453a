"""Query heads that share a key-value head and read its rows together: scores with keys, weighted sums of values.

Written as LLVM's vectors, for one to four heads each: widening an element costs more than multiplying by it, so a
row is widened once, and sums stay in registers. A loop that LLVM vectorises by itself adds the lanes of every score on
their own, and loads and stores the sums of values for every two rows. A `kind` and addresses are as in intrinsics.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.steps.cpu.intrinsics import (
    ELEMENT,
    ITEM_BYTES,
    fetch,
    item_bytes,
    prefetch_line,
    row_scope,
    widened,
)
from teal_kernels.steps.cpu.lanes import fused, load_row, repeated
from teal_kernels.steps.cpu.rows import prefetch_bytes
from teal_kernels.steps.cpu.vectors import compiled

TOGETHER = 4
"""The most query heads that read rows together."""

_LANES = 8
"""Lanes of the sums of a score: two rows of four heads fit the sixteen registers of AVX2."""

_COLUMNS = 16
"""Columns of the values that are summed at a time."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _row(builder: Any, kind: Any, address: Any, lanes: int) -> Any:
    """<lanes x float> of the elements of a row at an address."""
    return widened(builder, kind, load_row(builder, ELEMENT[kind.dtype], lanes, address))


def _at(builder: Any, data: Any, index: Any, lanes: int) -> Any:
    """<lanes x float> at an index of a float32 buffer, from memory where no row lies."""
    loaded = builder.load(builder.bitcast(builder.gep(data, [index]), ir.VectorType(_F32, lanes).as_pointer()))
    loaded.align = 4
    loaded.set_metadata("noalias", row_scope(builder))
    return loaded


def _put(builder: Any, data: Any, index: Any, value: Any) -> None:
    written = builder.store(value, builder.bitcast(builder.gep(data, [index]), value.type.as_pointer()))
    written.align = 4
    written.set_metadata("noalias", row_scope(builder))


_HALVES = (
    ((0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    ((0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
)
"""Which lanes of two vectors are added, until one vector has the sums of eight; each is one shuffle of AVX."""


def _lane_sums(builder: Any, sums: list[Any]) -> Any:
    """<8 x float>: of each of eight vectors the sum of its lanes."""
    for halves in _HALVES:
        masks = [ir.Constant(ir.VectorType(_I32, _LANES), list(half)) for half in halves]
        sums = [
            builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))
            for a, b in zip(sums[::2], sums[1::2], strict=True)
        ]
    return sums[0]


@intrinsic(prefer_literal=True)
def _dot_two(
    typingctx: Any, kind: Any, heads: Any, first: Any, second: Any, x: Any, width: Any, out: Any, index: Any
) -> Any:
    """out[h, index] and out[h, index + 1] = x[h, :width] . the rows at two addresses, for h < heads (a literal); width
    is a multiple of _LANES."""
    count = heads.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, first, second, x, width, out, index = args
        x, out = (
            context.make_array(signature.args[4])(context, builder, x),
            context.make_array(signature.args[6])(context, builder, out),
        )
        vector = ir.VectorType(_F32, _LANES)
        zero = ir.Constant(vector, [0.0] * _LANES)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * count)]
        strides = [cgutils.unpack_tuple(builder, array.shape, 2)[1] for array in (x, out)]
        with cgutils.for_range_slice(builder, _I64(0), width, _I64(_LANES)) as (at, _):
            offset = builder.mul(at, _I64(ITEM_BYTES[kind.dtype]))
            rows = [_row(builder, kind, builder.add(row, offset), _LANES) for row in (first, second)]
            for head in range(count):
                factor = _at(builder, x.data, builder.add(at, builder.mul(strides[0], _I64(head))), _LANES)
                for row, total in zip(rows, sums[2 * head : 2 * head + 2], strict=True):
                    builder.store(fused(builder, factor, row, builder.load(total)), total)
        totals = [builder.load(total) for total in sums]
        whole = _lane_sums(builder, totals + [totals[0]] * (8 - len(totals)))
        for head in range(count):
            pair = ir.Constant(ir.VectorType(_I32, 2), [2 * head, 2 * head + 1])
            place = builder.add(index, builder.mul(strides[1], _I64(head)))
            _put(builder, out.data, place, builder.shuffle_vector(whole, whole, pair))
        return context.get_dummy_value()

    return types.void(kind, heads, types.int64, types.int64, x, types.int64, out, types.int64), codegen


@intrinsic(prefer_literal=True)
def _add_columns(
    typingctx: Any,
    kind: Any,
    heads: Any,
    lanes: Any,
    row: Any,
    stride: Any,
    count: Any,
    x: Any,
    out: Any,
    column: Any,
    ahead: Any,
) -> Any:
    """out[h, column : column + lanes] += sum over i < count of x[h, i] * row i, for h < heads; heads and lanes are
    literals, `row` the address of the wanted column of row 0."""
    number, width = heads.literal_value, lanes.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, _, row, stride, count, x, out, column, ahead = args
        x, out = (
            context.make_array(signature.args[6])(context, builder, x),
            context.make_array(signature.args[7])(context, builder, out),
        )
        x_stride, out_stride = (cgutils.unpack_tuple(builder, array.shape, 2)[1] for array in (x, out))
        places = [builder.add(column, builder.mul(out_stride, _I64(head))) for head in range(number)]
        sums = [cgutils.alloca_once_value(builder, _at(builder, out.data, place, width)) for place in places]
        with cgutils.for_range(builder, count) as loop:
            address = builder.add(row, builder.mul(loop.index, stride))
            prefetch_line(builder, builder.add(address, ahead))
            values = _row(builder, kind, address, width)
            for head, total in enumerate(sums):
                weight = _at(builder, x.data, builder.add(loop.index, builder.mul(x_stride, _I64(head))), 1)
                factor = repeated(builder, builder.extract_element(weight, _I32(0)), width)
                builder.store(fused(builder, factor, values, builder.load(total)), total)
        for place, total in zip(places, sums, strict=True):
            _put(builder, out.data, place, builder.load(total))
        return context.get_dummy_value()

    return types.void(
        kind, heads, lanes, types.int64, types.int64, types.int64, x, out, types.int64, types.int64
    ), codegen


@compiled
def dot_together(
    kind: Any, heads: int, base: int, stride: int, count: int, x: Any, width: int, out: Any, ahead: int
) -> None:
    """out[h, i] = x[h, :width] . row i, for h < heads and i < count. Rows are consecutive; what lies `ahead` bytes
    after a row is prefetched meanwhile.

    Args:
        heads: 1 to TOGETHER.
        base: address of row 0; rows are `stride` bytes apart.
        x: float32 [>= heads, >= width]. out: float32 [>= heads, >= count], its second axis even.
    """
    whole = width // _LANES * _LANES
    for i in range(0, count, 2):
        first, second = base + i * stride, base + min(i + 1, count - 1) * stride
        prefetch_bytes(first + ahead, 2 * stride)
        if heads == 1:
            _dot_two(kind, 1, first, second, x, whole, out, i)
        elif heads == 2:
            _dot_two(kind, 2, first, second, x, whole, out, i)
        elif heads == 3:
            _dot_two(kind, 3, first, second, x, whole, out, i)
        else:
            _dot_two(kind, 4, first, second, x, whole, out, i)
    for j in range(whole, width):
        for i in range(count):
            element = fetch(kind, base + i * stride, j)
            for head in range(heads):
                out[head, i] += x[head, j] * element


@compiled
def add_together(
    kind: Any, heads: int, base: int, stride: int, count: int, x: Any, width: int, out: Any, ahead: int
) -> None:
    """out[h, :width] += sum over i < count of x[h, i] * row i, for h < heads; arguments as in `dot_together`."""
    size, whole = item_bytes(kind), width // _COLUMNS * _COLUMNS
    for column in range(0, whole, _COLUMNS):
        at = base + column * size
        if heads == 1:
            _add_columns(kind, 1, _COLUMNS, at, stride, count, x, out, column, ahead)
        elif heads == 2:
            _add_columns(kind, 2, _COLUMNS, at, stride, count, x, out, column, ahead)
        elif heads == 3:
            _add_columns(kind, 3, _COLUMNS, at, stride, count, x, out, column, ahead)
        else:
            _add_columns(kind, 4, _COLUMNS, at, stride, count, x, out, column, ahead)
    for j in range(whole, width):
        for i in range(count):
            element = fetch(kind, base + i * stride, j)
            for head in range(heads):
                out[head, j] += x[head, i] * element
