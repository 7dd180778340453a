"""Make Triton's interpreter treat bfloat16 as a GPU does: it keeps the bits as integers, and forgets that twice.

Also lets Triton 3.6 interpret loops over loaded bounds with NumPy 2.4, as newer versions do, and patches the language
once for a process: Triton patches it anew at every launch and every call of a device function, half of a step's time.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast_impl = InterpreterBuilder.cast_impl
_create_dot = InterpreterBuilder.create_dot
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


def repair() -> None:
    """Install the corrections in this process."""
    interpreter._patch_lang = lambda fn: _patch_once()
    interpreter._patch_lang_tensor = _patch
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
