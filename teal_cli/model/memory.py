"""Room for weights on large pages, where the system gives them, and freed memory given back to it.

A sparse step jumps from row to row; on pages of 4 KB nearly every row costs an address translation. PyTorch allocates
each matrix by itself, and most are smaller than a large page or do not begin at one, so here they lie one after the
other. What it gains is in kernels/teal_kernels/steps/cpu/README.md.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from typing import Final

import torch
from torch import Tensor

_PAGE: Final = 2 << 20
_SLAB: Final = 64 << 20
_LINE: Final = 64
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


class WeightMemory:
    """Hands out uninitialised tensors on the CPU; a slab is freed when the last tensor in it is."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Like `torch.empty`; contiguous, on a cache line of its own. `device` must be the CPU."""
        assert torch.device(device).type == "cpu"
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._slab):
            self._slab, self._used = _large_pages(max(size, _SLAB)), 0
        start, self._used = self._used, -(-(self._used + size) // _LINE) * _LINE
        return self._slab[start : start + size].view(dtype).view(shape)


def give_back_freed() -> None:
    """Give memory that was freed back to the system, where the allocator is glibc's, which keeps it otherwise."""
    if _LIBC is not None and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def _large_pages(size: int) -> Tensor:
    """uint8 [size], at the start of a large page; what is never written takes no memory."""
    room = torch.empty(size + _PAGE, dtype=torch.uint8)
    slab = room[-room.data_ptr() % _PAGE :][:size]
    if _LIBC is not None and hasattr(mmap, "MADV_HUGEPAGE"):
        advise = _LIBC.madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(slab.data_ptr(), size // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)  # refused: small pages
    return slab
