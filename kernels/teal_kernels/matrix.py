"""What a projection multiplies by: a matrix [K, N], input-major, so that one entry of the input needs one row.

A kind of matrix is one class: how its numbers lie in memory, how many bytes a row has, and the dense product that
prefill uses. Each backend says which kinds it multiplies by; the reference takes all, through `tensor`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

_WIDENED_ROWS: Final = 256
_FEW_ROWS: Final = 4  # fewer are as fast without widening
_HAS_AVX512: Final = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_SLOW: Final = {torch.float16} if _HAS_AVX512 else {torch.float16, torch.bfloat16}
"""Whose products torch has no fast kernel for on this CPU: bfloat16 has one (oneDNN's) from AVX-512 on."""

FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)


class Matrix(ABC):
    """A matrix [K, N] of the projections that read one site, side by side; or a table of tokens: the embedding and the
    output head are [vocab, hidden].

    Attributes:
        data: [K, ...] contiguous: row k is all that one kept entry k of the input reads.
        segments: output widths of the projections, sum N.
        dtype: of the vectors that it multiplies, and of products.
        kind: its name, e.g. "bfloat16" or "int4".
    """

    data: Tensor
    segments: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return len(self.data), sum(self.segments)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.data.nbytes

    @property
    @abstractmethod
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes that each projection reads of a row."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """[K, N] in `dtype`; for a kind of floats its own memory, for others new memory."""

    @abstractmethod
    def rows(self, index: Tensor | slice) -> Tensor:
        """Rows [n, N] in `dtype`, by their numbers."""

    @abstractmethod
    def dense(self, x: Tensor, projection: int | None = None) -> Tensor:
        """x [S, K] @ matrix -> [S, N], or the columns of one projection, by its number; new memory."""

    @abstractmethod
    def dense_transposed(self, x: Tensor) -> Tensor:
        """x [S, N] @ transposed matrix -> [S, K], as an output head does whose rows are tokens; new memory."""


class FloatMatrix(Matrix):
    """A matrix of bfloat16, float16 or float32 numbers.

    Args:
        data: [K, N] contiguous.
        segments: output widths of its projections; None for a single one.

    Raises:
        ValueError: it is no matrix, or the segments do not add up to its columns.
    """

    def __init__(self, data: Tensor, segments: tuple[int, ...] | None = None) -> None:
        if data.ndim != 2:
            raise ValueError(f"a matrix is [K, N], not {list(data.shape)}")
        segments = (data.shape[1],) if segments is None else tuple(segments)
        if sum(segments) != data.shape[1] or min(segments) < 1:
            raise ValueError(f"segments {segments} do not add up to the {data.shape[1]} columns of the weight")
        self.data, self.segments, self.dtype = data, segments, data.dtype
        self.kind = str(data.dtype).removeprefix("torch.")

    @property
    def row_bytes(self) -> tuple[int, ...]:
        return tuple(width * self.dtype.itemsize for width in self.segments)

    def tensor(self) -> Tensor:
        return self.data

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.data[index]

    def dense_transposed(self, x: Tensor) -> Tensor:
        if len(x) >= _FEW_ROWS and is_widened(x):
            return _linear_in_float32(x, self.data)
        return linear(x, self.data)

    def dense(self, x: Tensor, projection: int | None = None) -> Tensor:
        weight = self.data if projection is None else self.data.split(self.segments, dim=1)[projection]
        return _matmul_in_float32(x, weight) if is_widened(x) else x @ weight


def is_widened(x: Tensor) -> bool:
    """Whether products with many rows x are computed in float32 and rounded, for torch is slow in their dtype here."""
    return not x.is_cuda and x.dtype in _SLOW


def _linear_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """linear(x, weight) in pieces that are widened while they lie in the cache. 64 rows, 576x49152, bfloat16, one
    thread of an EPYC with AVX2: 74 instead of 463 ms."""
    result, wide = x.new_empty(len(x), len(weight)), x.float()
    for at in range(0, len(weight), _WIDENED_ROWS):
        result[:, at : at + _WIDENED_ROWS] = linear(wide, weight[at : at + _WIDENED_ROWS].float())
    return result


def _matmul_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight in pieces that are widened while they lie in the cache. float16, 128 tokens, 2048x4096: 0.04 instead
    of 5.7 s; bfloat16, 16 rows, 576x3072, one thread of an EPYC with AVX2: 2 instead of 70 ms."""
    result = x.new_zeros(len(x), weight.shape[1], dtype=torch.float32)
    for piece, rows in zip(x.split(_WIDENED_ROWS, dim=1), weight.split(_WIDENED_ROWS), strict=True):
        result.addmm_(piece.float(), rows.float())
    return result.to(x.dtype)


def floats(matrix: Matrix, user: str) -> Tensor:
    """The numbers [K, N] of a matrix of floats, for a backend that takes no other kind.

    Raises:
        ValueError: it is of another kind; the message names `user` and the kind.
    """
    if not isinstance(matrix, FloatMatrix):
        raise ValueError(f"{user} multiplies by matrices of 16- and 32-bit floats, not by {matrix.kind}")
    return matrix.data
