"""`sparse_gemm(x, matrix)`: the product of many rows most of whose entries are zero. Checks and dispatches.

Compiled with numba on a CPU for matrices of floats (`steps/cpu/many_rows.py`): a zero costs nothing, and a row gives
the same bits whatever rows stand beside it. `skips_from` says when that is the quicker product.
"""

from __future__ import annotations

from functools import cache
from math import inf
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from teal_kernels.matrix import FloatMatrix, Matrix
from teal_kernels.ops.sparse_gemm.reference import sparse_gemm_reference


def skips_zeros(matrix: Matrix) -> bool:
    """Whether `sparse_gemm` reads only what entries that are not zero need of this matrix."""
    return isinstance(matrix, FloatMatrix) and matrix.device.type == "cpu" and _module() is not None


def skips_from(matrix: Matrix) -> float:
    """Share of zeros from which `sparse_gemm` is quicker than PyTorch's product; infinite where it never is.

    Measured on one thread, 576x3072: on an EPYC with AVX2, 400 rows (2026-11-24), as fast as PyTorch's float32 product
    at half zeros, 4 times as fast at 95%; on a Xeon with AVX-512 and AMX, 1,984 rows (2026-11-26), PyTorch's product
    takes 50 ms in float32 and 5.5 in bfloat16, this one about 106, 70, 52, 32, 22 at 0.5, 0.65, 0.8, 0.9, 0.95 in both.
    """
    if not skips_zeros(matrix):
        return inf
    features = _features()
    if matrix.data.dtype == torch.bfloat16 and {"avx512bf16", "amx-bf16"} & features:
        return inf
    return 0.8 if "avx512f" in features else 0.5


@cache
def _features() -> frozenset[str]:
    """What this processor can do, in LLVM's words; there is numba."""
    from llvmlite.binding import get_host_cpu_features

    return frozenset(name for name, there in get_host_cpu_features().items() if there)


@torch.inference_mode()
def sparse_gemm(x: Tensor, matrix: Matrix, projection: int | None = None) -> Tensor:
    """See `reference`; sums are float32, in the order of the channels. Runs in the caller's thread alone.

    Args:
        x: [S, K] on the matrix's device, of its dtype.
        projection: the columns of one projection, by its number; None takes all.

    Returns:
        [S, N] in the dtype of x, new memory.
    """
    module = _module()
    if module is None or not skips_zeros(matrix):
        return sparse_gemm_reference(x, matrix, projection)
    from teal_kernels.steps.cpu.compiled import KINDS

    x, kind = x.contiguous(), np.empty(0, KINDS[x.dtype])
    (count, channels), stride = x.shape, matrix.data.stride(0) * matrix.data.itemsize
    first = 0 if projection is None else sum(matrix.segments[:projection])
    width = sum(matrix.segments) if projection is None else matrix.segments[projection]
    tiles = -(-channels // module.DEPTH)
    places = np.empty((count, channels), np.uint32)
    values = np.empty((count, channels), np.float32)
    ends = np.empty((count, tiles + 1), np.uint32)
    # PyTorch's memory begins at a cache line, numpy's does not.
    tile, sums = torch.empty(module.DEPTH * module.WIDTH), torch.empty(count * module.WIDTH)
    out = x.new_empty(count, width)
    module.list_kept(kind, x.data_ptr(), channels * x.itemsize, channels, places, values, ends)
    module.multiply_rows(
        kind, matrix.data.data_ptr() + first * matrix.data.itemsize, stride, channels, width, places, values, ends,
        tile.numpy(), sums.numpy(), out.data_ptr(),
    )  # fmt: skip
    return out


@cache
def _module() -> ModuleType | None:
    from teal_kernels.steps.cpu.compiled import load_module, unavailable

    return load_module("many_rows") if unavailable() is None else None
