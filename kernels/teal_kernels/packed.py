"""Matrices of 8 or 4 bits a weight: kinds of `Matrix` whose rows `packing` describes.

The vectors that they multiply and the products are of a float dtype. The dense product for many tokens unpacks columns,
a tile at a time, into one buffer of the process, so that there is never a second copy of a model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from threading import Lock
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from teal_kernels.matrix import FLOATS, Matrix, is_widened
from teal_kernels.packing import UNIT, RowLayout, check, dequantize

_TILE: Final = 4 << 20
"""Weights that are unpacked at once; more where 64 columns have more."""

_CODES: Final = {8: np.empty(0, np.int8), 4: np.empty(0, np.uint8)}


class PackedMatrix(Matrix):
    """A matrix of int8 or int4 codes with a scale for each group of columns of a row.

    Args:
        data: uint8 [K, layout.stride], contiguous.
        layout: where things lie in a row; its widths are the segments.
        dtype: bfloat16, float16 or float32, of the vectors that it multiplies, and of products.

    Raises:
        ValueError: the bytes are not such rows, or another dtype.
    """

    def __init__(self, data: Tensor, layout: RowLayout, dtype: torch.dtype) -> None:
        if dtype not in FLOATS:
            raise ValueError(f"a matrix multiplies vectors of bfloat16, float16 or float32, not {dtype}")
        if data.ndim != 2 or not data.is_contiguous():
            raise ValueError("packed rows are a contiguous [K, stride]")
        check(data, layout, len(data))
        self.data, self.layout, self.segments, self.dtype = data, layout, layout.widths, dtype
        self.kind = f"int{layout.bits}"

    @property
    def row_bytes(self) -> tuple[int, ...]:
        bits, group = self.layout.bits, self.layout.group
        return tuple(-(-width * bits // 8) + 2 * -(-width // group) for width in self.segments)

    def tensor(self) -> Tensor:
        return self.rows(slice(None))

    def rows(self, index: Tensor | slice) -> Tensor:
        return dequantize(self.data[index], self.layout, self.dtype)

    def dense_transposed(self, x: Tensor) -> Tensor:
        if not _compiled(x):
            return linear(x, self.tensor())
        layout = self.layout
        dtype = torch.float32 if is_widened(x) else x.dtype
        padded, first = x.new_zeros(len(x), layout.padded, dtype=dtype), 0
        for width, unit in zip(layout.widths, layout.units, strict=False):
            padded[:, unit * UNIT : unit * UNIT + width] = x[:, first : first + width]
            first += width
        out, step = x.new_empty(len(x), len(self.data)), max(1, _TILE // layout.padded)
        with _SCRATCH_LOCK:
            for start in range(0, len(self.data), step):
                count = min(step, len(self.data) - start)
                tile = self._unpacked(start, count, 0, layout.units[-1], dtype)
                out[:, start : start + count] = padded @ tile.t()
        return out

    def dense(self, x: Tensor, projection: int | None = None) -> Tensor:
        layout = self.layout
        chosen = range(len(self.segments)) if projection is None else range(projection, projection + 1)
        out = x.new_empty(len(x), sum(layout.widths[p] for p in chosen))
        first = 0
        for p in chosen:
            columns = out[:, first : first + layout.widths[p]]
            self._multiply(x, layout.units[p], columns)
            first += layout.widths[p]
        return out

    def _multiply(self, x: Tensor, unit: int, out: Tensor) -> None:
        """out [S, n] = x @ the columns from a unit on."""
        if _compiled(x):
            # What PyTorch is slow with is widened.
            dtype = torch.float32 if is_widened(x) else x.dtype
            wide, done = x.to(dtype), 0
            with _SCRATCH_LOCK:
                for tile in self._tiles(unit, out.shape[1], dtype):
                    count = min(tile.shape[1], out.shape[1] - done)
                    out[:, done : done + count] = wide @ tile[:, :count]
                    done += count
            return
        layout = self.layout
        first = sum(width for width, at in zip(layout.widths, layout.units, strict=False) if at < unit)
        out.copy_(x @ self.tensor()[:, first : first + out.shape[1]])

    def _tiles(self, unit: int, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Columns from a unit on, unpacked [K, n] with padding; each tile overwrites the one before."""
        rows, step = len(self.data), max(1, self.layout.group // UNIT)
        most = max(step, _TILE // (rows * UNIT) // step * step)
        last = unit + -(-width // (UNIT * step)) * step
        for start in range(unit, last, most):
            yield self._unpacked(0, rows, start, min(most, last - start), dtype)

    def _unpacked(self, row: int, rows: int, unit: int, units: int, dtype: torch.dtype) -> Tensor:
        """Some rows and units as [rows, UNIT * units] in the scratch, with padding."""
        layout = self.layout
        tile = _scratch(dtype, rows * units * UNIT)[: rows * units * UNIT].view(rows, units * UNIT)
        base = self.data.data_ptr() + row * layout.stride
        _unpack()(
            _CODES[layout.bits], base + unit * layout.unit_bytes,
            base + layout.scales_at + 2 * (UNIT * unit // layout.group), layout.stride,
            layout.group.bit_length() - 1, rows, units, _dtype_code(dtype), tile.data_ptr(),
            tile.stride(0) * tile.itemsize,
        )  # fmt: skip
        return tile


def _compiled(x: Tensor) -> bool:
    """Whether a product with x may unpack into the scratch: a gradient would need what the next tile overwrites."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    return not x.is_cuda and not needs_gradient and _compiler_problem() is None


_SCRATCH_LOCK = Lock()
_SCRATCHES: dict[torch.dtype, Tensor] = {}


def _scratch(dtype: torch.dtype, size: int) -> Tensor:
    """The buffer of this process: new memory at every call would halve the speed, through page faults."""
    if dtype not in _SCRATCHES or len(_SCRATCHES[dtype]) < size:
        _SCRATCHES[dtype] = torch.empty(max(size, _TILE), dtype=dtype)
    return _SCRATCHES[dtype]


# numba is loaded by the first product, not by the import of this file.
@cache
def _compiler_problem() -> str | None:
    from teal_kernels.steps.cpu.compiled import unavailable

    return unavailable()


@cache
def _unpack() -> Callable[..., None]:
    from teal_kernels.steps.cpu.compiled import load_module

    unpack: Callable[..., None] = load_module("unpacking").unpack
    return unpack


def _dtype_code(dtype: torch.dtype) -> NDArray[Any]:
    from teal_kernels.steps.cpu.compiled import KINDS

    return np.empty(0, KINDS[dtype])
