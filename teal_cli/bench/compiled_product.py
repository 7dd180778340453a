"""One product of the compiled decode step, by itself: what a step spends between two of its barriers.

The step has no products that Python could call, so a batch of them is compiled here, from the step's own function, with
the step's threads and its barrier after each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.bench.inputs import Vectors
from teal_kernels.cpu_step.compiled import KINDS, load
from teal_kernels.cpu_step.layout import Shape
from teal_kernels.cpu_step.op import default_threads
from teal_kernels.cpu_step.team import Team


class CompiledProducts:
    """Products of vectors with copies of a matrix, on the threads of a decode step.

    Args:
        copies: weights [K, N]; vectors: what they are multiplied by; both are used in turn.

    Attributes:
        out: float32 [N], the last product, rounded to the dtype of the weights.
    """

    def __init__(self, copies: list[Tensor], vectors: Vectors) -> None:
        inputs, outputs = copies[0].shape
        dtype = copies[0].dtype
        self._module = load(dtype)
        self._batch = _batch(dtype)
        self._team = Team(default_threads())
        shape = Shape(0, inputs, outputs, 1, 1, 0, 0)
        self._own = [self._module.own_buffers(i, self._team.size, shape) for i in range(self._team.size)]
        self._kind = np.empty(0, KINDS[dtype])
        self._copies = copies  # kept alive: the compiled code has addresses only
        self._addresses = np.array([copy.data_ptr() for copy in copies], np.int64)
        self._x = vectors.x.float().numpy()
        self._limits = np.array(vectors.limits, np.float32)
        self.out = torch.empty(outputs)

    def run(self, first: int, calls: int) -> None:
        """The products of `calls` copies from `first` on."""
        turns = np.arange(first, first + calls)
        addresses = self._addresses[turns % len(self._addresses)]
        order = turns % len(self._x)
        out = self.out.numpy()

        def part(thread: int, rounds: int) -> None:
            arrivals = self._team.arrivals
            self._batch(self._kind, self._own[thread], rounds, self._x, self._limits, order, addresses, out, arrivals)

        self._team.run(part)

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()


@cache
def _batch(dtype: torch.dtype) -> Callable[..., None]:
    from numba import njit

    step = load(dtype)
    share, project, meet, narrow = step.share, step.project, step.meet, step.narrow

    @njit(nogil=True, error_model="numpy")
    def batch(kind: Any, own: Any, rounds: int, x: Any, limits: Any, order: Any, weights: Any, out: Any,
              arrivals: Any) -> None:
        first, last = share(len(out), own.thread, own.threads)
        for i in range(len(weights)):
            own.listed[0] = np.nan
            vector = x[order[i]]
            project(kind, vector, len(vector), limits[order[i]], weights[i], len(out), first, last, own.out, own)
            for j in range(first, last):
                out[j] = narrow(kind, own.out[j - first])
            rounds = meet(arrivals, own.threads, rounds)

    compiled: Callable[..., None] = batch
    return compiled
