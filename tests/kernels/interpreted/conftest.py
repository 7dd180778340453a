"""These tests run Triton's interpreter, which must be chosen before Triton is imported.

They are therefore collected only where TRITON_INTERPRET=1; `tests/kernels/test_interpreted.py` runs them so,
each file in a process of its own.
"""

from __future__ import annotations

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language as tl
    from triton.runtime import interpreter

    _original_cast = interpreter.InterpreterBuilder.cast_impl

    def _cast(self, src, dst_type):
        """Round float32 to bfloat16 to nearest even as GPUs do (the interpreter cuts the low bits off);
        widen it fast."""
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
            rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            quiet = ((bits >> 16) | 0x40).astype(np.uint16)
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return interpreter.TensorHandle(np.where(nan, quiet, rounded), tl.bfloat16)
        return _original_cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = _cast
else:
    collect_ignore_glob = ["test_*.py"]
