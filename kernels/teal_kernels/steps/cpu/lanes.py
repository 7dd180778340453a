"""Sixteen float32 as one value of numba's Python, and packed weights that become such values.

`Floats` is LLVM's <16 x float>: one register where the processor has AVX-512, two with AVX2, four on Arm. LLVM
vectorises loops over 16-bit weights by itself, but not these: it does not know that the product with a 4-bit code can
be looked up. A `kind` is an empty numpy array that tells the compiler how weights are packed: int8 for 8 bits, uint8
for 4 (packing.py has the layout). Addresses are ints. Loads of packed weights carry the alias scope of rows
(intrinsics.py); accesses to float32 buffers declare that they lie elsewhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from teal_kernels.steps.cpu.intrinsics import row_scope

LANES = 16
INT8, INT4 = types.int8, types.uint8
UNIT_BYTES = {INT8: 64, INT4: 32}
"""Bytes of a unit of 64 codes."""

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_FLOATS, _WORDS, _SHORTS = (ir.VectorType(element, LANES) for element in (_F32, _I32, _I16))


class Floats(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Floats")


floats = Floats()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


def load_row(builder: Any, element: Any, count: int, address: Any) -> Any:
    """<count x element> at an address of a row."""
    loaded = builder.load(builder.inttoptr(address, ir.VectorType(element, count).as_pointer()))
    loaded.align = 1
    loaded.set_metadata("alias.scope", row_scope(builder))
    return loaded


def repeated(builder: Any, value: Any, count: int) -> Any:
    """A number, `count` times."""
    vector = ir.VectorType(value.type, count)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _same(vector: Any, value: Any) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def has_permute(context: Any) -> bool:
    """Whether the processor compiled for picks sixteen float32 of a register by a register of indices."""
    triple, _, features = context.codegen().magic_tuple()
    return triple.startswith("x86_64") and "+avx512f" in features.split(",")


def _codes() -> Any:
    """The numbers that 4-bit codes 0..15 stand for, two's complement: 0..7, -8..-1."""
    return ir.Constant(_FLOATS, [float(code if code < 8 else code - 16) for code in range(16)])


def _low_bits(part: int) -> list[int]:
    """Per lane, where in its word code 16 * part + lane of an int4 unit begins."""
    return [4 * part + 16 * (lane // 8) for lane in range(LANES)]


def _words(builder: Any, address: Any) -> Any:
    """The eight words of an int4 unit, twice over."""
    eight = load_row(builder, _I32, 8, address)
    return builder.shuffle_vector(eight, eight, ir.Constant(_WORDS, [*range(8)] * 2))


def _shifted_down(builder: Any, address: Any, part: int) -> Any:
    """Words whose low four bits are the wanted codes; the upper bits are not defined."""
    return builder.lshr(_words(builder, address), ir.Constant(_WORDS, _low_bits(part)))


def _permuted(builder: Any, table: Any, index: Any) -> Any:
    """table[low four bits of index], per lane."""
    permute = ir.FunctionType(_FLOATS, [_FLOATS, _WORDS])
    name = "llvm.x86.avx512.permvar.sf.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, permute, name), [table, index])


def _widened(builder: Any, kind: Any, address: Any, part: int) -> Any:
    """Sixteen codes converted, on any processor."""
    if kind.dtype == INT8:
        at = builder.add(address, _I64(LANES * part))
        return builder.sitofp(builder.sext(load_row(builder, _I8, LANES, at), _WORDS), _FLOATS)
    high = builder.shl(_words(builder, address), ir.Constant(_WORDS, [28 - low for low in _low_bits(part)]))
    return builder.sitofp(builder.ashr(high, _same(_WORDS, 28)), _FLOATS)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of vectors, rounded once where the processor can."""
    function, name = ir.FunctionType(a.type, [a.type] * 3), f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [a, b, c])


@intrinsic
def zeros(typingctx: Any) -> Any:
    """zeros() -> Floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_FLOATS, [0.0] * LANES)

    return floats(), codegen


@intrinsic
def load_floats(typingctx: Any, array: Any, index: Any) -> Any:
    """load_floats(array, i) -> Floats: array[i : i + 16], float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        loaded = builder.load(builder.bitcast(builder.gep(data, [args[1]]), _FLOATS.as_pointer()))
        loaded.align = 4
        loaded.set_metadata("noalias", row_scope(builder))
        return loaded

    return floats(array, types.int64), codegen


@intrinsic
def store_floats(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """store_floats(array, i, Floats): array[i : i + 16] = value, float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        written = builder.store(args[2], builder.bitcast(builder.gep(data, [args[1]]), _FLOATS.as_pointer()))
        written.align = 4
        written.set_metadata("noalias", row_scope(builder))
        return context.get_dummy_value()

    return types.void(array, types.int64, floats), codegen


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """multiply_add(a, b, c) -> Floats: a * b + c."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fused(builder, *args)

    return floats(floats, floats, floats), codegen


@intrinsic
def add_times(typingctx: Any, total: Any, x: Any, a: Any) -> Any:
    """add_times(total, float32, a) -> Floats: total + x * a."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, x, a = args
        return fused(builder, repeated(builder, x, LANES), a, total)

    return floats(floats, types.float32, floats), codegen


@intrinsic
def add(typingctx: Any, a: Any, b: Any) -> Any:
    """add(a, b) -> Floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1])

    return floats(floats, floats), codegen


@intrinsic
def times(typingctx: Any, a: Any, b: Any) -> Any:
    """times(a, b) -> Floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], args[1])

    return floats(floats, floats), codegen


@intrinsic
def sum_lanes(typingctx: Any, a: Any) -> Any:
    """sum_lanes(Floats) -> float32, added in pairs."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, count = args[0], LANES
        while count > 1:
            count //= 2
            half = ir.VectorType(_I32, count)
            low, high = (ir.Constant(half, [*range(at, at + count)]) for at in (0, count))
            vector = builder.fadd(
                builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)
            )
        return builder.extract_element(vector, _I32(0))

    return types.float32(floats), codegen


@intrinsic
def load_scale(typingctx: Any, address: Any) -> Any:
    """load_scale(address) -> Floats: the bfloat16 there, sixteen times. Broadcast as 16 bits; through a general
    register it would take three instructions more."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = builder.load(builder.inttoptr(args[0], _I16.as_pointer()))
        half.align = 2
        half.set_metadata("alias.scope", row_scope(builder))
        bits = builder.bitcast(repeated(builder, half, 2 * LANES), _WORDS)
        return builder.bitcast(builder.shl(bits, _same(_WORDS, 16)), _FLOATS)

    return floats(types.int64), codegen


@intrinsic
def factors(typingctx: Any, kind: Any, x: Any) -> Any:
    """factors(kind, float32) -> Floats: what `products` takes once it is multiplied by a scale.

    int8: x, sixteen times. int4: x times each code, in the order of the codes' bits.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        same = repeated(builder, args[1], LANES)
        return builder.fmul(same, _codes()) if kind.dtype == INT4 and has_permute(context) else same

    return floats(kind, types.float32), codegen


@intrinsic(prefer_literal=True)
def products(typingctx: Any, kind: Any, address: Any, place: Any, factor: Any, total: Any) -> Any:
    """products(kind, address, place, factor, total) -> Floats: total + factor * code, for codes 16 * place + lane of
    the unit at an address."""
    part = place.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, address, _, factor, total = args
        if kind.dtype == INT4 and has_permute(context):
            return builder.fadd(_permuted(builder, factor, _shifted_down(builder, address, part)), total)
        return fused(builder, factor, _widened(builder, kind, address, part), total)

    return floats(kind, types.int64, place, floats, floats), codegen


@intrinsic(prefer_literal=True)
def codes(typingctx: Any, kind: Any, address: Any, place: Any) -> Any:
    """codes(kind, address, place) -> Floats: codes 16 * place + lane of the unit at an address, as numbers."""
    part = place.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind.dtype == INT4 and has_permute(context):
            return _permuted(builder, _codes(), _shifted_down(builder, args[1], part))
        return _widened(builder, kind, args[1], part)

    return floats(kind, types.int64, place), codegen


@intrinsic
def unit_bytes(typingctx: Any, kind: Any) -> Any:
    """unit_bytes(kind): the size of a unit of 64 codes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.IntType(64)(UNIT_BYTES[kind.dtype])

    return types.int64(kind), codegen


@intrinsic
def store_rounded(typingctx: Any, kind: Any, address: Any, value: Any) -> Any:
    """store_rounded(kind, address, Floats): sixteen elements of a dtype (see intrinsics.py) at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, vector = args[2], _FLOATS
        if kind.dtype == types.uint16:
            value = builder.trunc(builder.lshr(_rounded_bits(builder, value), _same(_WORDS, 16)), _SHORTS)
            vector = _SHORTS
        elif kind.dtype == types.int16:
            vector = ir.VectorType(ir.HalfType(), LANES)
            value = builder.fptrunc(value, vector)
        builder.store(value, builder.inttoptr(args[1], vector.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.void(kind, types.int64, floats), codegen


def _rounded_bits(builder: Any, value: Any) -> Any:
    """float32 -> its bits after rounding to bfloat16, to nearest even; finite numbers only."""
    bits = builder.bitcast(value, _WORDS)
    odd = builder.and_(builder.lshr(bits, _same(_WORDS, 16)), _same(_WORDS, 1))
    return builder.add(bits, builder.add(odd, _same(_WORDS, 0x7FFF)))


_KEPT = 8
"""Channels that `keep_lanes` looks at."""


def _kept_places() -> Any:
    """[256 x <8 x i8>]: the places of the ones of a byte, in order; zeros after them."""
    lanes = ir.VectorType(_I8, _KEPT)
    places = [[bit for bit in range(_KEPT) if byte >> bit & 1] for byte in range(256)]
    return ir.Constant(ir.ArrayType(lanes, 256), [ir.Constant(lanes, (row + [0] * _KEPT)[:_KEPT]) for row in places])


@intrinsic
def keep_lanes(typingctx: Any, x: Any, i: Any, threshold: Any, index: Any, kept: Any) -> Any:
    """keep_lanes(x, i, threshold, index, kept) -> how many are kept then: appends to index[:kept] the places of the
    entries of x[i : i + 8] with |x| > threshold, and overwrites index[kept : kept + 8].

    `threshold`: float32, or an array with one for each channel.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, i, threshold, index, kept = args
        floats, places = ir.VectorType(_F32, _KEPT), ir.VectorType(_I64, _KEPT)

        def load(kind: Any, array: Any) -> Any:
            data = context.make_array(kind)(context, builder, array).data
            loaded = builder.load(builder.bitcast(builder.gep(data, [i]), floats.as_pointer()))
            loaded.align = 4
            return loaded

        each = isinstance(signature.args[2], types.Array)
        limit = load(signature.args[2], threshold) if each else repeated(builder, threshold, _KEPT)
        size = ir.FunctionType(floats, [floats])
        size = builder.call(
            cgutils.get_or_insert_function(builder.module, size, "llvm.fabs.v8f32"), [load(signature.args[0], x)]
        )
        byte = builder.bitcast(builder.fcmp_ordered(">", size, limit), _I8)
        table = cgutils.global_constant(builder, "teal_kept_places", _kept_places())
        row = builder.gep(table, [_I64(0), builder.zext(byte, _I64)])
        found = builder.add(builder.zext(builder.load(row), places), repeated(builder, i, _KEPT))
        data = context.make_array(signature.args[3])(context, builder, index).data
        builder.store(found, builder.bitcast(builder.gep(data, [kept]), places.as_pointer())).align = 8
        return builder.add(kept, builder.zext(builder.ctpop(byte), _I64))

    return types.int64(x, types.int64, threshold, index, types.int64), codegen
