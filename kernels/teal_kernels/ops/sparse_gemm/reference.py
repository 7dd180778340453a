"""What the product of many rows means: the plain one, in which zeros add nothing."""

from __future__ import annotations

from torch import Tensor

from teal_kernels.matrix import Matrix


def sparse_gemm_reference(x: Tensor, matrix: Matrix, projection: int | None = None) -> Tensor:
    """x [S, K] @ matrix -> [S, N], or the columns of one projection, rounded to the dtype of x."""
    return matrix.dense(x, projection)
