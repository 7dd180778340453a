"""What is multiplied: weights that no cache holds, and vectors with a known share of entries to keep.

Vectors are normal numbers, or rows of a store that a real model left (`Replay`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from teal_cli.bench.machine import cache_bytes
from teal_cli.bench.shapes import MatrixShape
from teal_cli.errors import UsageError
from teal_cli.store.reader import ActivationStore, open_store
from teal_kernels.matrix import FloatMatrix
from teal_kernels.ops.sparse_gemv.prepared import Products, prepare

VECTORS = 8
"""Different input vectors per sparsity."""

_TILE = (1 << 21) + 13
_SPREAD = 0.02
_LEAST_POOL = 256 << 20
_CACHES = 6


def fill_random(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill with normal numbers of standard deviation 0.02, in a fraction of the time that so many would take to draw:
    some millions are drawn and repeated."""
    flat = tensor.view(-1)
    tile = (_SPREAD * torch.randn(min(_TILE, len(flat)), generator=generator)).to(tensor.device, tensor.dtype)
    for piece in flat.split(len(tile)):
        piece.copy_(tile[: len(piece)])


class WeightPool:
    """Random weights in one large buffer, out of which each shape is cut many times over.

    Used in turn, the copies of a matrix evict one another from every cache, as the layers of a model do.

    Args:
        device, dtype: of the weights.
        size: bytes; by default several times the cache.
        largest: bytes of the largest matrix; two of it will fit.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, largest: int, size: int | None = None, seed: int = 0
    ) -> None:
        size = max(size or max(_LEAST_POOL, _CACHES * cache_bytes(device)), 2 * largest)
        self._flat = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        fill_random(self._flat, torch.Generator().manual_seed(seed))

    def copies(self, rows: int, columns: int) -> list[Tensor]:
        """As many contiguous [rows, columns] as fit, at least two, none sharing memory with another."""
        entries = rows * columns
        return [
            piece.view(rows, columns) for piece in self._flat[: len(self._flat) // entries * entries].split(entries)
        ]


@dataclass(frozen=True)
class Vectors:
    """Input vectors of one sparsity.

    Attributes:
        x: [count, K] on the device.
        thresholds: float32 [count, P] on the device, or [count, P, K] with one for each channel.
        kept: mean number of entries that a column of the matrix keeps.
    """

    x: Tensor
    thresholds: Tensor
    kept: float

    @classmethod
    def make(cls, x: Tensor, thresholds: Tensor, segments: Sequence[int]) -> Vectors:
        """Vectors with the thresholds of P projections, of these output widths."""
        limits = thresholds if thresholds.ndim == 3 else thresholds[:, :, None]
        kept = (x.float().abs()[:, None] > limits).sum(2).double().mean(0).cpu()
        widths = torch.tensor(segments, dtype=torch.float64)
        return cls(x, thresholds, float(kept @ widths / widths.sum()))


@dataclass(frozen=True)
class Operands:
    """What a product multiplies: copies [K, N] of a matrix, and vectors of one sparsity."""

    matrix: MatrixShape
    copies: list[Tensor]
    vectors: Vectors
    sparsity: float

    def prepare(self, backend: str) -> Products:
        """The products of `at(0)`, `at(1)`, ... by a backend of `sparse_gemv`."""
        matrices = [FloatMatrix(copy, self.matrix.segments) for copy in self.copies]
        return prepare(matrices, self.vectors.x, self.vectors.thresholds, backend=backend, sparsity=self.sparsity)

    def at(self, turn: int) -> tuple[Tensor, Tensor, int]:
        """Vector, copy, and the vector's number."""
        number = turn % len(self.vectors.x)
        return self.vectors.x[number], self.copies[turn % len(self.copies)], number


def random_vectors(shape: MatrixShape, sparsity: float, dtype: torch.dtype, device: torch.device, seed: int) -> Vectors:
    """Normal numbers and the threshold that drops this share of them; at sparsity 0 it drops none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(VECTORS, shape.inputs, generator=generator).to(dtype)
    limit = torch.tensor(-1.0)
    if sparsity > 0:
        magnitudes = x.float().abs().view(-1)
        limit = magnitudes.kthvalue(max(1, round(sparsity * len(magnitudes)))).values
    limits = limit.to(device).expand(VECTORS, len(shape.segments)).contiguous()
    return Vectors.make(x.to(device), limits, shape.segments)


class Replay:
    """Rows of a store in place of random vectors.

    Args:
        path: a store that `teal dump` wrote.

    Raises:
        NotFoundError, UsageError: no store there, or one without rows.
    """

    def __init__(self, path: Path) -> None:
        self.store: ActivationStore = open_store(path)
        self.levels = {self.store.level(name).target: self.store.level(name) for name in self.store.levels}
        self.levels = {target: level for target, level in self.levels.items() if len(level) and target > 0}
        if not self.levels:
            raise UsageError(f"{path} has no rows of a sparse level", hint="dump some, e.g. `teal dump -s 0.5,0.9`")

    def matching(self, matrices: list[MatrixShape]) -> list[MatrixShape]:
        """The matrices that take the store's vectors.

        Raises:
            UsageError: none does.
        """
        channels = self.store.header.channels
        found = [matrix for matrix in matrices if matrix.site and channels[matrix.site] == matrix.inputs]
        if not found:
            has = ", ".join(f"{site} {width}" for site, width in channels.items())
            raise UsageError(
                f"no matrix takes the vectors of {self.store.path}: it has {has}",
                hint=f"name the model that it comes from, --model {self.store.header.model}",
            )
        return found

    def vectors(
        self, shape: MatrixShape, sparsity: float, dtype: torch.dtype, device: torch.device, seed: int
    ) -> Vectors:
        """Random rows of random layers at a level, with what each projection of their site compared them with."""
        assert shape.site is not None, "`matching` gives shapes with a site only"
        level = self.levels[sparsity]
        choice = np.random.default_rng(seed)
        rows, limits = [], []
        for layer in choice.integers(self.store.header.layers, size=VECTORS).tolist():
            row = int(choice.integers(len(level)))
            rows.append(np.asarray(level.site(layer, shape.site)[row : row + 1])[0])
            limits.append(level.limits(layer, shape.site))
        x = torch.from_numpy(np.stack(rows)).to(dtype).to(device)
        return Vectors.make(x, torch.from_numpy(np.stack(limits)).to(device), shape.segments)
