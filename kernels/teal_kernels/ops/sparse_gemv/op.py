"""`sparse_gemv(x, matrix, thresholds)`: checks, device dispatch, registration as
`torch.ops.teal.sparse_gemv`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from teal_kernels.backends import CPU, REFERENCE, TRITON, choose_backend
from teal_kernels.configs import EXACT, GemvConfig, gemv_config
from teal_kernels.matrix import Matrix, floats
from teal_kernels.ops.kept.op import KeptList, launch_compact
from teal_kernels.ops.sparse_gemv.cpu import sparse_gemv_cpu
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference
from teal_kernels.packed import PackedMatrix

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_REDUCE_BLOCK = 256


def launch_gather(
    kept: KeptList,
    weight: Tensor,
    thresholds: Tensor,
    segments: tuple[int, ...],
    partial: Tensor,
    config: GemvConfig,
) -> None:
    """Fill partial [config.splits, N] float32 with the partial sums of the kept rows of weight [K, N]."""
    from teal_kernels.ops.sparse_gemv.kernel import gather_gemv_kernel

    edges = (0, *accumulate(segments))
    tiles = (0, *accumulate(-(-n // config.block_n) for n in segments))
    gather_gemv_kernel[(tiles[-1], config.splits)](
        weight, kept.index, kept.value, kept.count, thresholds, partial,
        K=weight.shape[0], N=edges[-1], EDGES=edges, TILES=tiles[:-1], CHUNKS=len(kept.count), CHUNK=kept.chunk,
        SPLITS=config.splits, ROWS=config.rows, BLOCK_N=config.block_n, ALIGN=math.gcd(config.block_n,
        *edges), EVEN=all(n % config.block_n == 0 for n in segments),
        PER_CHANNEL=thresholds.dim() == 2, num_warps=config.warps, **EXACT,
    )  # fmt: skip


def launch_reduce(partial: Tensor, out: Tensor) -> None:
    """out [N] = sum over the first dimension of partial [splits, N], in order."""
    from teal_kernels.ops.sparse_gemv.kernel import reduce_kernel

    splits, size = partial.shape
    reduce_kernel[(-(-size // _REDUCE_BLOCK),)](
        partial, out, size, SPLITS=splits, BLOCK=_REDUCE_BLOCK, num_warps=2, **EXACT
    )


def _sparse_gemv_triton(x: Tensor, weight: Tensor, thresholds: Tensor, segments: tuple[int, ...]) -> Tensor:
    inputs, outputs = weight.shape
    config = gemv_config(inputs, outputs, weight.element_size(), 0.5, weight.device)
    kept = KeptList.empty(inputs, x.dtype, x.device)
    partial = torch.empty(config.splits, outputs, dtype=torch.float32, device=x.device)
    out = torch.empty(outputs, dtype=x.dtype, device=x.device)
    launch_compact(x, thresholds, kept)
    launch_gather(kept, weight, thresholds, segments, partial, config)
    launch_reduce(partial, out)
    return out


_IMPLEMENTATIONS = {CPU: sparse_gemv_cpu, TRITON: _sparse_gemv_triton}


def _sparse_gemv(x: Tensor, weight: Tensor, thresholds: Tensor, segments: Sequence[int], backend: str) -> Tensor:
    return _IMPLEMENTATIONS.get(backend, sparse_gemv_reference)(x, weight, thresholds, tuple(segments))


def _sparse_gemv_fake(x: Tensor, weight: Tensor, thresholds: Tensor, segments: Sequence[int], backend: str) -> Tensor:
    return x.new_empty(weight.shape[1])


_LIBRARY = torch.library.Library("teal", "FRAGMENT")
_LIBRARY.define("sparse_gemv(Tensor x, Tensor weight, Tensor thresholds, SymInt[] segments, str backend) -> Tensor")
_LIBRARY.impl("sparse_gemv", _sparse_gemv, "CompositeExplicitAutograd")
torch.library.register_fake("teal::sparse_gemv", _sparse_gemv_fake, lib=_LIBRARY)


def _check(x: Tensor, weight: Tensor, thresholds: Tensor, segments: Sequence[int]) -> None:
    if x.ndim != 1 or x.shape[0] != weight.shape[0]:
        raise ValueError(f"x [K] and weight [K, N] do not fit: {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        raise TypeError(f"x and weight share one dtype of bfloat16, float16, float32; got {x.dtype} and {weight.dtype}")
    count = len(segments)
    if thresholds.dtype != torch.float32 or thresholds.shape not in ((count,), (count, len(x))):
        raise ValueError(
            f"thresholds are float32 [{count}], one per segment, or [{count}, {len(x)}]; "
            f"got {thresholds.dtype} {tuple(thresholds.shape)}"
        )
    if not (x.is_contiguous() and weight.is_contiguous() and thresholds.is_contiguous()):
        raise ValueError("x, weight and thresholds must be contiguous (weights are stored input-major, [K, N])")
    if not x.device == weight.device == thresholds.device:
        raise ValueError(
            f"x, weight, thresholds lie on {x.device}, {weight.device}, {thresholds.device}; want one device"
        )


def _sparse_gemv_unpacked(x: Tensor, matrix: PackedMatrix, thresholds: Tensor) -> Tensor:
    lowest = thresholds.amin(dim=0)
    index = (x.float().abs() > lowest).nonzero()[:, 0]
    rows, limits = matrix.rows(index), thresholds if thresholds.ndim == 1 else thresholds[:, index].contiguous()
    kept = x[index]
    if not len(index):
        return x.new_zeros(sum(matrix.segments))
    _check(kept, rows, limits, matrix.segments)
    return torch.ops.teal.sparse_gemv(kept, rows, limits, matrix.segments, CPU)


def sparse_gemv(x: Tensor, matrix: Matrix, thresholds: Tensor, *, backend: str | None = None) -> Tensor:
    """A vector times a matrix, reading only the rows whose input entry is kept (TEAL, section 4).

    `y[j] = sum of x[i] * weight[i, j] over the i with |x[i]| > thresholds[p]` (or `thresholds[p, i]`), j in the columns
    of projection p. Sums are in float32 and their order is fixed: the same inputs, backend, device and thread count
    give the same bits.

    Args:
        x: [K], bfloat16, float16 or float32; thresholded already or not, both give the same.
        matrix: [K, N] of the dtype of `x`, with P projections: row i holds what input i contributes to every output.
            The reference takes every kind of matrix, the CPU backend floats and packed rows, of which it unpacks those
            that are kept, and Triton floats.
        thresholds: [P] or [P, K] float32, not negative, on the device of `x`; compared with |x| in float32.
        backend: "reference", "cpu" or "triton"; by default the fastest that works on the device of `x`.

    Returns:
        [N], dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or memory layout do not fit, or the backend does not take such a
            matrix; the message says which.
        BackendError: the backend does not exist or cannot run on the device of `x`.
    """
    name = choose_backend(x.device.type, backend)
    if name == CPU and isinstance(matrix, PackedMatrix):
        return _sparse_gemv_unpacked(x, matrix, thresholds)
    weight = matrix.tensor() if name == REFERENCE else floats(matrix, f"the {name} backend")
    _check(x, weight, thresholds, matrix.segments)
    return torch.ops.teal.sparse_gemv(x, weight, thresholds, matrix.segments, name)
