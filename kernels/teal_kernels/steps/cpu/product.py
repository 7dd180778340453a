"""One product of the compiled decode step, by itself: prepared once, called many times.

The step has no product that Python could call, so a batch of them is compiled here out of the step's own function. Each
thread computes its own columns, as in the step; the barrier between products, about a microsecond, is not in the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_kernels.matrix import Matrix, floats
from teal_kernels.spec import Geometry
from teal_kernels.steps.cpu.compiled import KINDS, load
from teal_kernels.steps.cpu.layout import DOWN, FIELDS, NONE, TENSORS, Shape, Weights
from teal_kernels.steps.cpu.op import default_threads
from teal_kernels.traits import LLAMA

_SITE, _THRESHOLD = 3, 6
"""Every matrix plays the part of `down`: one projection at a site of its own."""

MOST_CALLS = 256
"""Products in a batch. To the step's functions they are the layers of a model, for which their buffers have room."""


class CompiledProducts:
    """Products of vectors with matrices, on as many threads as a decode step has.

    Args:
        matrices: [K, N] floats of one shape, on the CPU.
        x: [count, K], what they are multiplied by; both are used in turn, product number i being of x[i % count] and
            matrices[i % len(matrices)].
        thresholds: float32 [count], of each vector; a negative one keeps everything.

    Raises:
        CpuStepUnavailableError: see `compiled.unavailable`.
        ValueError: a matrix of another kind than floats.

    Attributes:
        out: float32 [shares, N], the last product, as the step leaves it for what follows.
    """

    def __init__(self, matrices: Sequence[Matrix], x: Tensor, thresholds: Tensor) -> None:
        copies = [floats(matrix, "the compiled product") for matrix in matrices]
        inputs, outputs = copies[0].shape
        dtype = copies[0].dtype
        step = load(dtype)
        threads = default_threads()
        shape = Shape(layers=MOST_CALLS, hidden=outputs, intermediate=inputs, heads=1, kv_heads=1, head_dim=0, vocab=0)
        self._kind = np.empty(0, KINDS[dtype])
        self._batch = _batch(dtype)
        self._own = [step.own_buffers(thread, threads, shape) for thread in range(threads)]
        self._shared = step.shared_buffers(self._kind, threads, shape)
        norm, rules = step.numbers(LLAMA, 1.0, 1)
        none = np.empty(0, np.int64)
        self._weights = Weights(
            tensors=np.full((MOST_CALLS, TENSORS), NONE, np.int64), windows=none, ropes=none,
            edges=step.site_edges(Geometry(outputs, inputs, 1, 1, 0)),
            packed=np.zeros((MOST_CALLS, 4, FIELDS), np.int64), units=np.zeros((MOST_CALLS, 4, 4), np.int64),
            norm=norm, rules=rules, embedding=NONE, final_norm=NONE, lm_head=NONE,
        )  # fmt: skip
        self._others = ThreadPoolExecutor(max(1, threads - 1))
        self._copies = copies  # kept alive: the compiled code has addresses only
        self._addresses = np.array([copy.data_ptr() for copy in copies], np.int64)
        self._x = x.float().numpy()
        self._limits = thresholds.numpy()
        self.out = torch.from_numpy(self._shared.down)

    def run(self, first: int, calls: int) -> None:
        """The products of `calls` copies, at most MOST_CALLS, from `first` on."""
        turns = np.arange(first, first + calls)
        order = turns % len(self._x)
        self._weights.tensors[:calls, DOWN] = self._addresses[turns % len(self._addresses)]
        self._shared.thresholds[:calls, _THRESHOLD] = self._limits[order]
        arguments = self._x, order, self._weights, self._shared
        others = [self._others.submit(self._batch, self._kind, own, *arguments) for own in self._own[1:]]
        self._batch(self._kind, self._own[0], *arguments)
        for other in others:
            other.result()


@cache
def _batch(dtype: torch.dtype) -> Callable[..., None]:
    load(dtype)  # first, so that the step's modules are imported as it wants them
    from numba import njit

    from teal_kernels.steps.cpu.sites import multiply

    @njit(nogil=True, error_model="numpy")
    def batch(kind: Any, own: Any, x: Any, order: Any, weights: Any, shared: Any) -> None:
        for layer in range(len(order)):
            vector = x[order[layer]]
            multiply(kind, _SITE, layer, vector, len(vector), weights, shared, shared.down, own)

    compiled: Callable[..., None] = batch
    return compiled
