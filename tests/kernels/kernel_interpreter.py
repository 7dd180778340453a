"""Make Triton's interpreter treat bfloat16 as a GPU does: it keeps the bits as integers, and forgets that twice.

Also lets Triton 3.6 interpret loops over loaded bounds with NumPy 2.4, as newer versions do, and patches the language
once for a process: Triton patches it anew at every launch and every call of a device function, half of a step's time.
A third of the rest went into what no result depends on: tables and shapes made anew at every operation, and integers
checked for an overflow that nobody is told of.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast_impl = InterpreterBuilder.cast_impl
_create_dot = InterpreterBuilder.create_dot
_get_np_dtype = interpreter._get_np_dtype
_tensor_init = tl.tensor.__init__
_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, uint16, to the nearest, ties to even (the interpreter cuts the low bits off)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16)


def _cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return TensorHandle(widen(source.data), tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        return TensorHandle(narrow(source.data), tl.bfloat16)
    return _cast_impl(self, source, target)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Multiply the numbers that bfloat16 operands stand for; the interpreter multiplies their bit patterns."""
    a, b = (TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def _patch(tensor, scope) -> None:
    """A loaded scalar is an array of one entry, which NumPy 2.4 no longer turns into an int unasked."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


@cache
def _patch_once() -> SimpleNamespace:
    """Both modules that a kernel may know the language by; nothing in such a process compiles, so it stays patched."""
    _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    return SimpleNamespace(restore=lambda: None)


_dtypes: dict[str, np.dtype] = {}
_shapes: dict[str, dict[str, object]] = {}


def _dtype(kind: tl.dtype) -> np.dtype:
    """As `_get_np_dtype`, which makes its table at every call; by names, since not every type has a hash."""
    name = kind.scalar.name
    if name not in _dtypes:
        _dtypes[name] = _get_np_dtype(kind)
    return _dtypes[name]


def _tensor(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    """As `tl.tensor.__init__`, which makes the shape of every result anew."""
    if type.name in _shapes:
        vars(self).update(_shapes[type.name], handle=handle, type=type, dtype=type.scalar)
    else:
        _tensor_init(self, handle, type)
        own = ("handle", "type", "dtype")
        _shapes[type.name] = {name: value for name, value in vars(self).items() if name not in own}


def repair() -> None:
    """Install the corrections in this process."""
    interpreter._patch_lang = lambda fn: _patch_once()
    interpreter._patch_lang_tensor = _patch
    interpreter._get_np_dtype = _dtype
    tl.tensor.__init__ = _tensor
    # Sums and products of integers are computed again in 64 bits for an assertion that is made in debugging only.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
