"""One product of the compiled decode step, by itself.

The step has no product that Python could call, so a batch of them is compiled here out of the step's own function. Each
thread computes its own columns, as in the step; the barrier between products, about a microsecond, is not in the time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.bench.inputs import Vectors
from teal_kernels.cpu_step.compiled import KINDS, load
from teal_kernels.cpu_step.layout import Shape
from teal_kernels.cpu_step.op import default_threads


class CompiledProducts:
    """Products of vectors with copies of a matrix, on as many threads as a decode step has.

    Args:
        copies: weights [K, N]; vectors: what they are multiplied by; both are used in turn.

    Attributes:
        out: float32 [N], the last product, rounded to the dtype of the weights.
    """

    def __init__(self, copies: list[Tensor], vectors: Vectors) -> None:
        inputs, outputs = copies[0].shape
        dtype = copies[0].dtype
        step = load(dtype)
        threads = default_threads()
        shape = Shape(0, inputs, outputs, 1, 1, 0, 0)
        self._batch = _batch(dtype)
        self._own = [step.own_buffers(thread, threads, shape) for thread in range(threads)]
        self._others = ThreadPoolExecutor(max(1, threads - 1))
        self._kind = np.empty(0, KINDS[dtype])
        self._copies = copies  # kept alive: the compiled code has addresses only
        self._addresses = np.array([copy.data_ptr() for copy in copies], np.int64)
        self._x = vectors.x.float().numpy()
        self._limits = np.array(vectors.limits, np.float32)
        self.out = torch.empty(outputs)

    def run(self, first: int, calls: int) -> None:
        """The products of `calls` copies from `first` on."""
        turns = np.arange(first, first + calls)
        arguments = (
            self._x,
            self._limits,
            turns % len(self._x),
            self._addresses[turns % len(self._addresses)],
            self.out.numpy(),
        )
        others = [self._others.submit(self._batch, self._kind, own, *arguments) for own in self._own[1:]]
        self._batch(self._kind, self._own[0], *arguments)
        for other in others:
            other.result()


@cache
def _batch(dtype: torch.dtype) -> Callable[..., None]:
    from numba import njit

    step = load(dtype)
    share, project, narrow = step.share, step.project, step.narrow

    @njit(nogil=True, error_model="numpy")
    def batch(kind: Any, own: Any, x: Any, limits: Any, order: Any, weights: Any, out: Any) -> None:
        first, last = share(len(out), own.thread, own.threads)
        for i in range(len(weights)):
            own.listed[0] = np.nan
            vector = x[order[i]]
            project(kind, vector, len(vector), limits[order[i]], weights[i], len(out), first, last, own.out, own)
            for j in range(first, last):
                out[j] = narrow(kind, own.out[j - first])

    compiled: Callable[..., None] = batch
    return compiled
