"""The products of a step, one object per site: sparse over a kept list, or dense through the vendor's library.

Both read what a fused kernel left in their sink, and leave shares of the result [splits, N] for the next fused kernel;
a dense product has one share, in the model's dtype. Neither allocates while a step runs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from teal_kernels.configs import GemvConfig
from teal_kernels.matrix import Matrix
from teal_kernels.ops.kept.op import Capture, KeptList, Sink, chunk_for
from teal_kernels.ops.sparse_gemv.op import launch_gather


class Product(Protocol):
    """What stands between a site's vector and the outputs of its projections."""

    def sink(self, layer: int, capture: Capture | None) -> Sink:
        """Where the kernel before it leaves the vector of this layer."""
        ...

    def __call__(self, layer: int, matrix: Matrix) -> Tensor:
        """Shares [splits, N] of the product with a matrix [K, N]; overwritten by the next call."""
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
        self.segments, self.thresholds, self.config = segments, thresholds, config
        self.kept = KeptList.empty(size, dtype, device, chunk)
        self.tally = torch.zeros(*thresholds.shape[:2], len(self.kept.count), dtype=torch.int64, device=device)
        self._shares = torch.empty(config.splits, sum(segments), dtype=torch.float32, device=device)

    def sink(self, layer: int, capture: Capture | None) -> Sink:
        return Sink(self.kept.chunk, self.kept, self.thresholds[layer], self.tally[layer], None, capture)

    def __call__(self, layer: int, matrix: Matrix) -> Tensor:
        launch_gather(self.kept, matrix.data, self.thresholds[layer], self.segments, self._shares, self.config)
        return self._shares


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
