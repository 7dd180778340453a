"""`sparse_gemv(x, matrix, thresholds)`: checks, device dispatch, registration as `torch.ops.teal.sparse_gemv`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teal_kernels.backends import CPU, NUMBA, REFERENCE, TRITON, choose_backend
from teal_kernels.configs import gemv_config
from teal_kernels.experts import Experts
from teal_kernels.matrix import FLOATS, FloatMatrix, Matrix, floats
from teal_kernels.ops.packed.op import packed_gemv_config
from teal_kernels.ops.sparse_gemv.compiled import sparse_gemv_compiled
from teal_kernels.ops.sparse_gemv.cpu import sparse_gemv_cpu
from teal_kernels.ops.sparse_gemv.gather import GatherGemv
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference
from teal_kernels.ops.threshold.reference import threshold_reference
from teal_kernels.packed import PackedMatrix


def _sparse_gemv_triton(x: Tensor, weight: Tensor, thresholds: Tensor, segments: tuple[int, ...]) -> Tensor:
    inputs, outputs = weight.shape
    config = gemv_config(inputs, outputs, weight.element_size(), 0.5, weight.device)
    product = GatherGemv(inputs, segments, x.dtype, x.device, config)
    out = torch.empty(outputs, dtype=x.dtype, device=x.device)
    product.compact(x, thresholds)
    product.gather(weight, thresholds)
    product.reduce(out)
    return out


def _sparse_gemv_numba(x: Tensor, weight: Tensor, thresholds: Tensor, segments: tuple[int, ...]) -> Tensor:
    return sparse_gemv_compiled(x, FloatMatrix(weight, segments), thresholds)


def _unpacked_rows(x: Tensor, matrix: PackedMatrix, thresholds: Tensor) -> Tensor:
    """The CPU backend's product with a packed matrix: the rows that any projection keeps are unpacked."""
    index = (x.float().abs() > thresholds.amin(dim=0)).nonzero()[:, 0]
    if not len(index):
        return x.new_zeros(sum(matrix.segments))
    limits = thresholds if thresholds.ndim == 1 else thresholds[:, index].contiguous()
    return torch.ops.teal.sparse_gemv(x[index], matrix.rows(index), limits, matrix.segments, CPU)


def _sparse_gemv_packed(x: Tensor, matrix: PackedMatrix, thresholds: Tensor) -> Tensor:
    inputs, outputs = matrix.shape
    product = GatherGemv(inputs, matrix.segments, x.dtype, x.device, packed_gemv_config(inputs, matrix.layout))
    out = torch.empty(outputs, dtype=x.dtype, device=x.device)
    product.compact(x, thresholds)
    product.gather(matrix, thresholds)
    product.reduce(out)
    return out


def _sparse_gemv_experts(x: Tensor, matrix: Experts, thresholds: Tensor, backend: str) -> Tensor:
    if len(matrix.segments) == 1:  # each expert reads a part of x: what is dropped of it is dropped here, for all
        x, thresholds = threshold_reference(x, thresholds[0]), thresholds.new_zeros(1)

    def multiply(part: Tensor, expert: Matrix) -> Tensor:
        return sparse_gemv(part[0], expert, thresholds, backend=backend)[None]

    return matrix.product(x[None], multiply)[0]


_PACKED = {CPU: _unpacked_rows, NUMBA: sparse_gemv_compiled, TRITON: _sparse_gemv_packed}
_IMPLEMENTATIONS = {CPU: sparse_gemv_cpu, NUMBA: _sparse_gemv_numba, TRITON: _sparse_gemv_triton}


def _sparse_gemv(x: Tensor, weight: Tensor, thresholds: Tensor, segments: Sequence[int], backend: str) -> Tensor:
    return _IMPLEMENTATIONS.get(backend, sparse_gemv_reference)(x, weight, thresholds, tuple(segments))


def _sparse_gemv_fake(x: Tensor, weight: Tensor, thresholds: Tensor, segments: Sequence[int], backend: str) -> Tensor:
    return x.new_empty(weight.shape[1])


_LIBRARY = torch.library.Library("teal", "FRAGMENT")
_LIBRARY.define("sparse_gemv(Tensor x, Tensor weight, Tensor thresholds, SymInt[] segments, str backend) -> Tensor")
_LIBRARY.impl("sparse_gemv", _sparse_gemv, "CompositeExplicitAutograd")
torch.library.register_fake("teal::sparse_gemv", _sparse_gemv_fake, lib=_LIBRARY)


def _check(x: Tensor, matrix: Matrix, thresholds: Tensor) -> None:
    if x.ndim != 1 or x.shape[0] != matrix.shape[0]:
        raise ValueError(f"x [K] and weight [K, N] do not fit: {tuple(x.shape)} and {matrix.shape}")
    if x.dtype not in FLOATS or matrix.dtype != x.dtype:
        raise TypeError(f"x and weight share one dtype of bfloat16, float16, float32; got {x.dtype} and {matrix.dtype}")
    count = len(matrix.segments)
    if thresholds.dtype != torch.float32 or thresholds.shape not in ((count,), (count, len(x))):
        raise ValueError(
            f"thresholds are float32 [{count}], one per segment, or [{count}, {len(x)}]; "
            f"got {thresholds.dtype} {tuple(thresholds.shape)}"
        )
    if not (x.is_contiguous() and matrix.data.is_contiguous() and thresholds.is_contiguous()):
        raise ValueError("x, weight and thresholds must be contiguous (weights are stored input-major, [K, N])")
    if not x.device == matrix.device == thresholds.device:
        raise ValueError(
            f"x, weight, thresholds lie on {x.device}, {matrix.device}, {thresholds.device}; want one device"
        )


def sparse_gemv(x: Tensor, matrix: Matrix, thresholds: Tensor, *, backend: str | None = None) -> Tensor:
    """A vector times a matrix, reading only the rows whose input entry is kept (TEAL, section 4).

    `y[j] = sum of x[i] * weight[i, j] over the i with |x[i]| > thresholds[p]` (or `thresholds[p, i]`), j in the columns
    of projection p. Sums are in float32 and their order is fixed: the same inputs, backend, device and thread count
    give the same bits.

    Args:
        x: [K], bfloat16, float16 or float32; thresholded already or not, both give the same.
        matrix: [K, N] of the dtype of `x`, with P projections: row i holds what input i contributes to every output.
            Every backend takes every kind: of packed rows the reference unpacks all and "cpu" those that are kept,
            "numba" and "triton" multiply them as they are. Of a mixture of experts the matrices of the token's own are
            multiplied, one after the other.
        thresholds: [P] or [P, K] float32, not negative, on the device of `x`; compared with |x| in float32.
        backend: "reference", "cpu", "numba" or "triton"; by default see `choose_backend`.

    Returns:
        [N], dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or memory layout do not fit, or the backend does not take such a
            matrix; the message says which.
        BackendError: the backend does not exist or cannot run on the device of `x`.
    """
    name = choose_backend(x.device.type, backend)
    _check(x, matrix, thresholds)
    if isinstance(matrix, Experts):
        return _sparse_gemv_experts(x, matrix, thresholds, name)
    if isinstance(matrix, PackedMatrix) and name in _PACKED:
        return _PACKED[name](x, matrix, thresholds)
    weight = matrix.tensor() if name == REFERENCE else floats(matrix, f"the {name} backend")
    return torch.ops.teal.sparse_gemv(x, weight, thresholds, matrix.segments, name)
