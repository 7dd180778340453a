"""`sparse_gemv` compiled with numba: the products of the compiled decode step (`steps/cpu`), without the step.

Every thread computes its own columns, or its own kept rows of a matrix with short rows, as in the step. Many products
are one call, since waking a thread takes longer than a small product. Takes matrices of floats and packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_kernels.matrix import Matrix
from teal_kernels.steps.cpu.compiled import KINDS, codes, load_module
from teal_kernels.steps.cpu.layout import SINGLE, Worker
from teal_kernels.steps.cpu.matrices import (
    address,
    edges_of,
    limit_places,
    packed_bits,
    packed_fields,
    row_groups,
    spans,
)
from teal_kernels.steps.cpu.op import default_threads


class CompiledProducts:
    """Products that are ready to run: number i multiplies x[i % V] by matrices[i % M] under thresholds[i % V].

    Args:
        matrices: M of one shape, dtype and layout, [K, N] with P projections, on the CPU.
        x: [V, K], of the dtype of the matrices.
        thresholds: float32 [V, P], or [V, P, K] with one for each channel; negative ones keep every entry.

    Raises:
        CpuStepUnavailableError: numba or this processor cannot run compiled code.
        ValueError: a matrix of a kind that compiled code does not read.
    """

    def __init__(self, matrices: Sequence[Matrix], x: Tensor, thresholds: Tensor) -> None:
        first, threads = matrices[0], default_threads()
        inputs, outputs = first.shape
        self._multiply_each: Callable[..., None] = load_module("product").multiply_each
        self._addresses = np.array([address(matrix, "the numba backend") for matrix in matrices], np.int64)
        self._kept_alive = tuple(matrices)
        self._x = x.float().numpy()
        packed, units = packed_fields(first)
        self._partial = np.zeros((row_groups(threads, sum(first.row_bytes)), outputs), np.float32)
        self._arguments = (
            np.empty(0, KINDS[first.dtype]), codes(packed_bits([first])), self._x, edges_of(first.segments), packed,
            units, *_limits(thresholds), np.zeros(len(first.segments), np.int64), self._partial,
        )  # fmt: skip
        room, every = 64 * int(units.max(initial=0)), np.arange(inputs)
        self._workers = [
            Worker(thread, threads, np.zeros(inputs, np.int64), every, np.zeros(room, np.float32), spans())
            for thread in range(threads)
        ]

    def run(self, first: int = 0, count: int = 1) -> Tensor:
        """`count` products from number `first` on.

        Returns:
            The last one, as partial sums float32 [splits, N], in memory that the next call overwrites.
        """
        turns = np.arange(first, first + count)
        order = turns % len(self._x), self._addresses[turns % len(self._addresses)]
        others = _other_threads(len(self._workers))
        running = [others.submit(self._multiply_each, *order, worker, *self._arguments) for worker in self._workers[1:]]
        self._multiply_each(*order, self._workers[0], *self._arguments)
        for each in running:
            each.result()
        return torch.from_numpy(self._partial)


def sparse_gemv_compiled(x: Tensor, matrix: Matrix, thresholds: Tensor) -> Tensor:
    """See `sparse_gemv`: one product, [N] in the dtype of `x`."""
    return CompiledProducts([matrix], x[None], thresholds[None]).run().sum(0).to(x.dtype)


def _limits(thresholds: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """thresholds float32 [V, P], limit_of int64 [V, P] and limits float32 [any], as `layout.Limits` has them."""
    limits = thresholds.numpy()
    if limits.ndim == 2:
        return limits, np.full(limits.shape, SINGLE, np.int64), np.zeros(0, np.float32)
    places = [limit_places(own, number * own.size) for number, own in enumerate(limits)]
    return np.zeros(limits.shape[:2], np.float32), np.stack(places), limits.ravel()


@cache
def _other_threads(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), "teal-product")
