"""The products of a step, one object per site: sparse over a kept list, or dense through the vendor's library. A dense
product with packed rows is a sparse one that keeps all entries.

Both read what a fused kernel wrote to their sink, and leave partial sums [splits, N] for the next fused kernel; a dense
product has one row, in the model's dtype. Neither allocates while a step runs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from teal_kernels.configs import GemvConfig
from teal_kernels.matrix import Matrix
from teal_kernels.ops.kept.op import Capture, Sink, chunk_for
from teal_kernels.ops.sparse_gemv.gather import GatherGemv
from teal_kernels.packed import PackedMatrix


class Product(Protocol):
    """The product of a site's vector with the matrix of its projections."""

    def sink(self, layer: int, capture: Capture | None) -> Sink:
        """Where the kernel before it writes the vector of this layer."""
        ...

    def __call__(self, layer: int, matrix: Matrix) -> Tensor:
        """Partial sums [splits, N] of the product with a matrix [K, N]; overwritten by the next call."""
        ...


class SparseProduct:
    """Reads the rows of the weight whose input entry is kept.

    Args:
        size: K, entries of the site's vector.
        segments: output widths of its projections.
        thresholds: float32 [layers, P] or [layers, P, K] on the device; may be overwritten between steps.
        config: of the gather GEMV.
        chunk: entries per chunk of the kept list at most.
        dtype: of vector and weight.

    Attributes:
        tally: int64 [layers, P, chunks], entries kept since it was last zeroed.
    """

    def __init__(
        self,
        size: int,
        segments: tuple[int, ...],
        thresholds: Tensor,
        config: GemvConfig,
        chunk: int,
        dtype: torch.dtype,
    ) -> None:
        device = thresholds.device
        self.thresholds = thresholds
        self._gemv = GatherGemv(size, segments, dtype, device, config, chunk)
        chunks = len(self._gemv.kept.count)
        self.tally = torch.zeros(*thresholds.shape[:2], chunks, dtype=torch.int64, device=device)

    def sink(self, layer: int, capture: Capture | None) -> Sink:
        kept = self._gemv.kept
        return Sink(kept.chunk, kept, self.thresholds[layer], self.tally[layer], None, capture)

    def __call__(self, layer: int, matrix: Matrix) -> Tensor:
        weight = matrix if isinstance(matrix, PackedMatrix) else matrix.data
        return self._gemv.gather(weight, self.thresholds[layer])


class DenseProduct:
    """The whole matrix, through cuBLAS.

    Args:
        size: K; width: N; dtype: of vector, weight and result.
        chunk: entries per program of the kernel that writes the vector, at most.
    """

    def __init__(self, size: int, width: int, chunk: int, dtype: torch.dtype, device: torch.device) -> None:
        self._chunk = chunk_for(size, chunk)
        self._row = torch.empty(1, size, dtype=dtype, device=device)
        self._out = torch.empty(1, width, dtype=dtype, device=device)

    def sink(self, layer: int, capture: Capture | None) -> Sink:
        return Sink(self._chunk, None, None, None, self._row[0], capture)

    def __call__(self, layer: int, matrix: Matrix) -> Tensor:
        return torch.mm(self._row, matrix.data, out=self._out)
