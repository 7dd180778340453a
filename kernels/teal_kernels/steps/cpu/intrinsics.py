"""The few machine operations that numba's Python lacks: elements of the model's dtype at an address, atomics,
hints.

A `kind` says in which dtype the memory behind an address is: an empty numpy array whose dtype the compiler
sees, uint16 for bfloat16, int16 for float16 (numba has neither on a CPU) or float32. All arithmetic is
float32; `narrow` rounds to the kind.

Rows of weights and of the key-value cache are read under one LLVM alias scope, and `put` declares that it
does not write there. Without that, each loop over rows begins with a comparison of every row's address with
the output's.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _HALF = ir.FloatType(), ir.HalfType()
ELEMENT = {types.uint16: _I16, types.int16: _HALF, types.float32: _F32}
ITEM_BYTES = {types.uint16: 2, types.int16: 2, types.float32: 4}


def row_scope(builder: Any) -> Any:
    """The alias scope of all rows."""
    module = builder.module
    domain = module.add_metadata(["teal"])
    return module.add_metadata([module.add_metadata(["rows", domain])])


def _element(builder: Any, kind: Any, base: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(base, ELEMENT[kind.dtype].as_pointer()), [index])


def widened(builder: Any, kind: Any, value: Any) -> Any:
    """An element of a kind, or a vector of them, as float32."""
    words, floats, half = _I32, _F32, _I32(16)
    if isinstance(value.type, ir.VectorType):
        lanes = value.type.count
        words, floats = ir.VectorType(_I32, lanes), ir.VectorType(_F32, lanes)
        half = ir.Constant(words, [16] * lanes)
    if kind.dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(value, words), half), floats)
    return builder.fpext(value, floats) if kind.dtype == types.int16 else value


def _rounded_bits(builder: Any, value: Any) -> Any:
    """float32 -> its bits after rounding to bfloat16, to nearest even; a NaN stays one."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    near = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
    return builder.select(builder.fcmp_unordered("uno", value, value), builder.or_(bits, _I32(0x400000)), near)


@intrinsic
def fetch(typingctx: Any, kind: Any, base: Any, index: Any) -> Any:
    """fetch(kind, address, index): the element at address + index, widened to float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(_element(builder, kind, args[1], args[2]))
        loaded.align = ITEM_BYTES[kind.dtype]
        loaded.set_metadata("alias.scope", row_scope(builder))
        return widened(builder, kind, loaded)

    return types.float32(kind, types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, kind: Any, base: Any, index: Any, value: Any) -> Any:
    """store(kind, address, index, value): writes a float32 that the kind can represent."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[3]
        if kind.dtype == types.uint16:
            value = builder.trunc(builder.lshr(builder.bitcast(value, _I32), _I32(16)), _I16)
        elif kind.dtype == types.int16:
            value = builder.fptrunc(value, _HALF)
        builder.store(value, _element(builder, kind, args[1], args[2])).align = ITEM_BYTES[kind.dtype]
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.float32), codegen


@intrinsic
def get(typingctx: Any, array: Any, index: Any) -> Any:
    """get(array, index): array[index], float32, from memory where no row lies."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        loaded = builder.load(builder.gep(data, [args[1]]))
        loaded.align = 4
        loaded.set_metadata("noalias", row_scope(builder))
        return loaded

    return types.float32(array, types.int64), codegen


@intrinsic
def put(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """put(array, index, value): array[index] = value, float32, in memory where no row lies."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        written = builder.store(args[2], builder.gep(data, [args[1]]))
        written.align = 4
        written.set_metadata("noalias", row_scope(builder))
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32), codegen


@intrinsic
def narrow(typingctx: Any, kind: Any, value: Any) -> Any:
    """narrow(kind, value): value rounded to the kind, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[1]
        if kind.dtype == types.uint16:
            return builder.bitcast(builder.and_(_rounded_bits(builder, value), _I32(0xFFFF0000)), _F32)
        return builder.fpext(builder.fptrunc(value, _HALF), _F32) if kind.dtype == types.int16 else value

    return types.float32(kind, types.float32), codegen


@intrinsic
def item_bytes(typingctx: Any, kind: Any) -> Any:
    """item_bytes(kind): the size of one element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _I64(ITEM_BYTES[kind.dtype])

    return types.int64(kind), codegen


@intrinsic
def power_of_two(typingctx: Any, exponent: Any) -> Any:
    """power_of_two(n): 2.0 ** n as float32, n an int32 in [-126, 127]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(args[0], _I32(127)), _I32(23)), _F32)

    return types.float32(types.int32), codegen


def prefetch_line(builder: Any, address: Any) -> None:
    """What `prefetch` does."""
    pointer = ir.IntType(8).as_pointer()
    hint = builder.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    )
    builder.call(hint, [builder.inttoptr(address, pointer), _I32(0), _I32(2), _I32(1)])


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """prefetch(address): asks for the cache line at address, into the second-level cache, without waiting."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch_line(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """atomic_add(array, index, value): adds to an int64, returns what was there. Sequentially consistent."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_swap(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """atomic_swap(array, index, value): sets an int64 and returns what was there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.atomic_rmw("xchg", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_replace(typingctx: Any, array: Any, index: Any, before: Any, after: Any) -> Any:
    """atomic_replace(array, index, before, after): sets an int64 that is `before` to `after`; whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        found = builder.cmpxchg(builder.gep(data, [args[1]]), args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(array, types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, array: Any, index: Any) -> Any:
    """atomic_load(array, index): an int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "seq_cst", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """pause(): tells the core that this is a spinning loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if context.codegen().magic_tuple()[0].startswith("x86_64"):
            name, operands = "llvm.x86.sse2.pause", []
        else:
            name, operands = "llvm.aarch64.hint", [_I32(1)]
        function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(cgutils.get_or_insert_function(builder.module, function, name), operands)
        return context.get_dummy_value()

    return types.void(), codegen


if sys.platform == "win32":
    yield_core = pause
else:
    yield_core = types.ExternalFunction("sched_yield", types.int32())
