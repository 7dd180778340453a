"""The contenders of `teal bench kernels`: every way to multiply a vector by a matrix that works on a device.

Each takes the same vectors and copies of the same weights, gives a product to check, and runs a batch to time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.bench.inputs import Operands
from teal_cli.bench.timing import replayed, wall_clock
from teal_kernels.backends import CPU, TRITON, backend_problem
from teal_kernels.matrix import FloatMatrix
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.steps.cpu.compiled import unavailable
from teal_kernels.steps.cpu.product import MOST_CALLS, CompiledProducts

DENSE, SPARSE, PUBLISHED = "dense", "sparse", "published"

_BATCH_S: Final = 25e-3  # on a CPU: waking the other threads takes up to half a millisecond
_LEAST_CALLS: Final = 16
"""In a graph, so that what starting it costs does not count."""
_TRIES: Final = 8


class Product(Protocol):
    """One way to multiply.

    Attributes:
        name: what the user sees.
        role: dense, sparse or published.
        turned: it reads the weights as [N, K].
    """

    name: str
    role: str
    turned: bool

    def one(self, turn: int) -> Tensor:
        """The product of vector and copy number `turn`, [N], or its shares [splits, N]."""
        ...

    def many(self, first: int, calls: int) -> None:
        """`calls` products from number `first` on."""
        ...


class _OneByOne:
    """A product that the host calls once for each vector."""

    turned = False

    def __init__(self, name: str, role: str, call: Callable[[int], Tensor], *, turned: bool = False) -> None:
        self.name, self.role, self.turned = name, role, turned
        self.one = call

    def many(self, first: int, calls: int) -> None:
        for turn in range(first, first + calls):
            self.one(turn)


class _Compiled:
    """The compiled step's product."""

    turned = False

    def __init__(self, operands: Operands, role: str) -> None:
        self.name, self.role = "numba", role
        self._products = CompiledProducts(
            [FloatMatrix(copy) for copy in operands.copies], operands.vectors.x, operands.vectors.thresholds
        )
        self.many = self._products.run

    def one(self, turn: int) -> Tensor:
        self._products.run(turn, 1)
        return self._products.out


def dense_products(operands: Operands) -> Iterator[Product]:
    """The dense peers: PyTorch's product in both orientations of the weights, and the compiled step's own.

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
        yield _OneByOne(f"{vendor} [K,N]", DENSE, input_major)
    yield _OneByOne(f"{vendor} [N,K]", DENSE, output_major, turned=True)
    if not operands.copies[0].is_cuda and unavailable() is None:
        yield _Compiled(operands, DENSE)


def sparse_products(operands: Operands) -> Iterator[Product]:
    """The sparse kernels that run on the device of the operands, and on a GPU the published method."""
    device = operands.copies[0].device.type
    if backend_problem(CPU, device) is None:
        yield _OneByOne(CPU, SPARSE, _library_call(operands))
    if device == "cpu" and unavailable() is None:
        yield _Compiled(operands, SPARSE)
    if backend_problem(TRITON, device) is None:
        from teal_cli.bench.triton_products import triton_products

        for name, published, call in triton_products(operands):
            yield _OneByOne(name, PUBLISHED if published else SPARSE, call)


def _library_call(operands: Operands) -> Callable[[int], Tensor]:
    segments = operands.matrix.segments
    limits = operands.vectors.thresholds[:, None].repeat(1, len(segments)).clamp_min(0)

    def call(turn: int) -> Tensor:
        x, weight, number = operands.at(turn)
        return sparse_gemv(x, FloatMatrix(weight, segments), limits[number], backend=CPU)

    return call


class Batch:
    """A product as a contender: batches long enough to be timed, over copies that no cache holds.

    Attributes:
        calls: products in a batch.
    """

    def __init__(self, product: Product, operands: Operands, counter: itertools.count[int]) -> None:
        self._product, self._counter = product, counter
        self._replay: Callable[[], float] | None = None
        if operands.copies[0].is_cuda:
            self.calls = max(_LEAST_CALLS, min(len(operands.copies), MOST_CALLS))
            self._replay = replayed(lambda: product.many(0, self.calls))
        else:
            tries: list[float] = []
            while len(tries) < 2 or (len(tries) < _TRIES and sum(tries) < _TRIES * _BATCH_S):
                tries.append(wall_clock(lambda: product.many(len(tries), 1)))
            self.calls = max(1, min(MOST_CALLS, round(_BATCH_S / max(min(tries), 1e-7))))

    def seconds(self) -> float:
        """Time of one product, mean over a batch."""
        if self._replay is not None:
            return self._replay() / self.calls
        first = next(self._counter) * self.calls
        return wall_clock(lambda: self._product.many(first, self.calls)) / self.calls
