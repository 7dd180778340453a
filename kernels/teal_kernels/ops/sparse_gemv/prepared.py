"""`sparse_gemv` made ready: addresses, buffers and launch configurations once, then many products.

What a benchmark times: nothing but products. The results are those of `sparse_gemv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from teal_kernels.backends import NUMBA, TRITON, choose_backend
from teal_kernels.configs import gemv_config
from teal_kernels.matrix import Matrix, floats
from teal_kernels.ops.kept.op import KeptList, launch_compact
from teal_kernels.ops.sparse_gemv.compiled import CompiledProducts
from teal_kernels.ops.sparse_gemv.gather import GatherGemv
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.packed import PackedMatrix


class Products(Protocol):
    """Products that are ready to run: number i multiplies x[i % V] by matrices[i % M] under thresholds[i % V]."""

    def run(self, first: int = 0, count: int = 1) -> Tensor:
        """`count` products from number `first` on.

        Returns:
            The last one: [N], or partial sums [splits, N]; in memory that the next call may overwrite.
        """
        ...


def prepare(
    matrices: Sequence[Matrix],
    x: Tensor,
    thresholds: Tensor,
    *,
    backend: str | None = None,
    sparsity: float = 0.5,
) -> Products:
    """Make products ready.

    Args:
        matrices: M of one shape, dtype and kind, [K, N] with P projections. One is enough; many of them, used in turn,
            are too large for any cache, as the layers of a model are.
        x: [V, K], of their dtype and on their device.
        thresholds: float32 [V, P], or [V, P, K] with one for each channel; negative ones keep every entry.
        backend: as for `sparse_gemv`.
        sparsity: about the share that is dropped, which chooses among tuned configurations of a GPU.

    Raises:
        ValueError, TypeError, BackendError: as `sparse_gemv`, of the first product.
    """
    name, first = choose_backend(x.device.type, backend), matrices[0]
    if any(_form(matrix) != _form(first) for matrix in matrices):
        raise ValueError("prepared matrices do not fit each other: they have one shape, dtype, kind and device")
    if len(x) != len(thresholds):
        raise ValueError(f"{len(x)} vectors have {len(thresholds)} sets of thresholds")
    sparse_gemv(x[0], first, thresholds[0], backend=name)  # which checks them
    if name == NUMBA:
        return CompiledProducts(matrices, x, thresholds)
    if name == TRITON:
        return TritonProducts(matrices, x, thresholds, sparsity)
    return _Calls(matrices, x, thresholds, name)


def _form(matrix: Matrix) -> tuple[object, ...]:
    """What the matrices of one `Products` have in common."""
    layout = matrix.layout if isinstance(matrix, PackedMatrix) else None
    data = matrix.data
    return matrix.kind, matrix.dtype, matrix.segments, layout, data.shape, data.stride(), data.device


class _Calls:
    """Calls of the op."""

    def __init__(self, matrices: Sequence[Matrix], x: Tensor, thresholds: Tensor, backend: str) -> None:
        self._matrices, self._x, self._thresholds, self._backend = matrices, x, thresholds, backend

    def run(self, first: int = 0, count: int = 1) -> Tensor:
        for i in range(first, first + count):
            vector, matrix = i % len(self._x), self._matrices[i % len(self._matrices)]
            out = sparse_gemv(self._x[vector], matrix, self._thresholds[vector], backend=self._backend)
        return out


class TritonProducts:
    """Products by Triton, which a CUDA graph can hold. Arguments as for `prepare`; matrices of floats."""

    def __init__(self, matrices: Sequence[Matrix], x: Tensor, thresholds: Tensor, sparsity: float = 0.5) -> None:
        self._weights = [floats(matrix, "the triton backend") for matrix in matrices]
        self._x, self._thresholds = x, thresholds
        (inputs, outputs), dtype, device = matrices[0].shape, x.dtype, x.device
        config = gemv_config(inputs, outputs, dtype.itemsize, sparsity, device)
        self._gemv = GatherGemv(inputs, matrices[0].segments, dtype, device, config)
        self._out = torch.empty(outputs, dtype=dtype, device=device)
        self._lists = [KeptList.empty(inputs, dtype, device) for _ in x]
        for vector, limits, kept in zip(x, thresholds, self._lists, strict=True):
            launch_compact(vector, limits, kept)

    def run(self, first: int = 0, count: int = 1) -> Tensor:
        """Whole products: see `Products`."""
        for i in range(first, first + count):
            vector = i % len(self._x)
            self._gemv.compact(self._x[vector], self._thresholds[vector])
            self._gemv.gather(self._weights[i % len(self._weights)], self._thresholds[vector])
            self._gemv.reduce(self._out)
        return self._out

    def gather(self, first: int = 0, count: int = 1) -> Tensor:
        """What a decode step launches for a product: the kept lists are there, and the partial sums float32 [splits, N]
        are left to the kernel that reads them."""
        for i in range(first, first + count):
            vector = i % len(self._x)
            weight, thresholds = self._weights[i % len(self._weights)], self._thresholds[vector]
            self._gemv.gather(weight, thresholds, self._lists[vector])
        return self._gemv.partial
