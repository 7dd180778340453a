"""The contenders of `teal bench kernels`: every way to multiply a vector by a matrix that works on a device.

Each takes the same vectors and copies of the same weights, gives a product to check, and runs a batch to time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.bench.inputs import Operands
from teal_cli.bench.timing import replayed, wall_clock
from teal_kernels.backends import CPU, NUMBA, TRITON, backend_problem
from teal_kernels.baselines.masked_splitk.op import CONFIGS, MaskedConfig, masked_splitk
from teal_kernels.ops.sparse_gemv.prepared import TritonProducts

DENSE, SPARSE, PUBLISHED = "dense", "sparse", "published"

_MOST_CALLS: Final = 256
"""Products in a batch."""
_BATCH_S: Final = 25e-3  # on a CPU: waking the other threads takes up to half a millisecond
_LEAST_CALLS: Final = 16
"""In a graph, so that what starting it costs does not count."""
_TRIES: Final = 8
_TRIAL_CALLS, _TRIALS = 64, 3


@dataclass(frozen=True)
class Product:
    """One way to multiply.

    Attributes:
        name: what the user sees.
        role: dense, sparse or published.
        run: (first, calls) -> the last of so many products, [N] or partial sums [splits, N]; number i is that of vector
            and copy number i of the operands.
        turned: it reads the weights as [N, K].
    """

    name: str
    role: str
    run: Callable[[int, int], Tensor]
    turned: bool = False


def _one_by_one(call: Callable[[int], Tensor]) -> Callable[[int, int], Tensor]:
    def run(first: int, calls: int) -> Tensor:
        for turn in range(first, first + calls):
            out = call(turn)
        return out

    return run


def dense_products(operands: Operands) -> Iterator[Product]:
    """The dense peers: PyTorch's product in both orientations of the weights, and the compiled one that keeps all rows.

    Args:
        operands: with vectors of sparsity 0.
    """
    inputs, outputs = operands.copies[0].shape

    def input_major(turn: int) -> Tensor:
        x, weight, _ = operands.at(turn)
        return torch.mm(x[None], weight)[0]

    def output_major(turn: int) -> Tensor:
        x, weight, _ = operands.at(turn)
        return F.linear(x, weight.view(outputs, inputs))

    vendor = "torch" if not operands.copies[0].is_cuda else "cuBLAS"
    if vendor != "torch" or operands.copies[0].dtype != torch.float16:  # which it multiplies hundreds of times slower
        yield Product(f"{vendor} [K,N]", DENSE, _one_by_one(input_major))
    yield Product(f"{vendor} [N,K]", DENSE, _one_by_one(output_major), turned=True)
    if backend_problem(NUMBA, operands.copies[0].device.type) is None:
        yield Product(NUMBA, DENSE, operands.prepare(NUMBA).run)


def sparse_products(operands: Operands) -> Iterator[Product]:
    """The backends of `sparse_gemv` that run on the device of the operands; with Triton also the gather alone, which is
    what a step launches for a product, and the published method.
    """
    device = operands.copies[0].device.type
    for backend in (CPU, NUMBA):
        if backend_problem(backend, device) is None:
            yield Product(backend, SPARSE, operands.prepare(backend).run)
    if backend_problem(TRITON, device) is None:
        products = operands.prepare(TRITON)
        assert isinstance(products, TritonProducts)
        yield Product(TRITON, SPARSE, products.run)
        yield Product("triton-step", SPARSE, products.gather)
        if published := _published(operands):
            yield Product("masked split-K", PUBLISHED, _one_by_one(published))


def _published(operands: Operands) -> Callable[[int], Tensor] | None:
    """The published method in the fastest of its configurations for this shape, dtype and sparsity.

    It has one threshold for a matrix: None where projections or channels have their own.
    """
    x, weight, _ = operands.at(0)
    thresholds = operands.vectors.thresholds
    if thresholds.ndim == 3 or not (thresholds == thresholds[:, :1]).all():
        return None
    limits = thresholds[:, 0].tolist()
    half = x.dtype == torch.float16
    out = torch.empty(weight.shape[1], dtype=torch.float16 if half else torch.float32, device=x.device)

    def with_config(config: MaskedConfig) -> Callable[[int], Tensor]:
        def call(turn: int) -> Tensor:
            x, weight, number = operands.at(turn)
            masked_splitk(x, weight, limits[number], out, config)
            return out

        return call

    def seconds(config: MaskedConfig) -> float:
        run = _one_by_one(with_config(config))
        replay = replayed(lambda: run(0, min(len(operands.copies), _TRIAL_CALLS)))
        return min(replay() for _ in range(_TRIALS))

    if x.device.type != "cuda":  # under Triton's interpreter there is nothing to choose by
        return with_config(CONFIGS[0])
    return with_config(min(CONFIGS, key=seconds))


class Batch:
    """A product as a contender: batches long enough to be timed, over copies that no cache holds.

    Attributes:
        calls: products in a batch.
    """

    def __init__(self, product: Product, operands: Operands, counter: itertools.count[int]) -> None:
        self._product, self._counter = product, counter
        self._replay: Callable[[], float] | None = None
        if operands.copies[0].is_cuda:
            self.calls = max(_LEAST_CALLS, min(len(operands.copies), _MOST_CALLS))
            self._replay = replayed(lambda: product.run(0, self.calls))
        else:
            tries: list[float] = []
            while len(tries) < 2 or (len(tries) < _TRIES and sum(tries) < _TRIES * _BATCH_S):
                tries.append(wall_clock(lambda: product.run(len(tries), 1)))
            self.calls = max(1, min(_MOST_CALLS, round(_BATCH_S / max(min(tries), 1e-7))))

    def seconds(self) -> float:
        """Time of one product, mean over a batch."""
        if self._replay is not None:
            return self._replay() / self.calls
        first = next(self._counter) * self.calls
        return wall_clock(lambda: self._product.run(first, self.calls)) / self.calls
