"""`teal bench kernels`: every matrix, dtype and sparsity, all ways to multiply in the same rounds.

Puts inputs, products, checks and the clock together and yields rows as they are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teal_cli.bench.bandwidth import READ, ReadProbe
from teal_cli.bench.checks import Check, check_product, exact_product
from teal_cli.bench.inputs import Operands, Replay, Vectors, WeightPool, random_vectors
from teal_cli.bench.products import DENSE, Batch, Product, dense_products, sparse_products
from teal_cli.bench.rows import KernelRow, Progress
from teal_cli.bench.shapes import MatrixShape
from teal_cli.bench.timing import Contender, Seconds, Spread, interleave, median_ratio
from teal_cli.errors import HardwareError
from teal_cli.ui.table import percent


@dataclass(frozen=True)
class KernelRequest:
    """What to measure.

    Attributes:
        matrices, dtypes, sparsities: every combination of them.
        device: where.
        rounds: how often each contender is measured.
        seed: of weights and vectors.
        replay: rows of a store in place of random vectors; the sparsities are levels of it.
        tune: search launch configurations first, and keep the best for every later command; GPUs only.
        pool_bytes, probe_bytes: memory for copies of the weights, and for measuring bandwidth; several times the
            cache by default.
    """

    matrices: list[MatrixShape]
    dtypes: tuple[torch.dtype, ...]
    sparsities: tuple[float, ...]
    device: torch.device
    rounds: int
    seed: int = 0
    replay: Replay | None = None
    tune: bool = False
    pool_bytes: int | None = None
    probe_bytes: int | None = None


@dataclass
class _Entry:
    """A product that takes part, and what is known of it."""

    product: Product
    operands: Operands
    check: Check
    batch: Batch | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.product.name}@{self.operands.sparsity}"


def bench_kernels(request: KernelRequest) -> Iterator[Progress | KernelRow]:
    """Measure; a product whose check fails is not timed and its row says so.

    Raises:
        HardwareError: `tune` without a GPU.
    """
    if request.tune:
        yield from _tune(request)
    probe = ReadProbe(request.device, request.probe_bytes)
    total = len(request.dtypes) * len(request.matrices)
    done = 0
    for dtype in request.dtypes:
        largest = max(matrix.inputs * matrix.outputs for matrix in request.matrices) * dtype.itemsize
        pool = WeightPool(request.device, dtype, largest=largest, size=request.pool_bytes, seed=request.seed)
        for matrix in request.matrices:
            yield Progress(done, total, f"{matrix.inputs}x{matrix.outputs} {_name(dtype)}")
            yield from _bench_matrix(request, matrix, dtype, pool, probe)
            done += 1
        del pool
    yield Progress(done, total, "done")


def _tune(request: KernelRequest) -> Iterator[Progress]:
    if request.device.type != "cuda":
        raise HardwareError(
            f"there is nothing to tune on {request.device}", hint="--tune searches configurations of GPU kernels"
        )
    from teal_cli.bench.tuning import BAND_POINTS, tune

    shapes = list(dict.fromkeys((matrix.inputs, matrix.segments) for matrix in request.matrices))
    by_size = {dtype.itemsize: dtype for dtype in request.dtypes}  # dtypes of one size share their configurations
    done, total = 0, len(shapes) * len(by_size) * len(BAND_POINTS)
    yield Progress(done, total, "Tuning")
    for dtype in by_size.values():
        for found in tune(shapes, dtype, request.device):
            done += 1
            gain = found.default_seconds / found.seconds
            text = f"Tuned {found.inputs}x{found.outputs} {found.dtype} at {percent(found.sparsity)}: {gain:.2f}x"
            yield Progress(done, total, text)


def _bench_matrix(
    request: KernelRequest, matrix: MatrixShape, dtype: torch.dtype, pool: WeightPool, probe: ReadProbe
) -> Iterator[KernelRow]:
    copies = pool.copies(matrix.inputs, matrix.outputs)
    entries = _checked(request, matrix, dtype, copies)
    turns = itertools.count()
    contenders = [probe.contender()]
    for entry in entries:
        if entry.check.passed:
            entry.batch = Batch(entry.product, entry.operands, turns)
            contenders.append(Contender(entry.name, entry.batch.seconds))
    seconds: Seconds = {}
    for _ in interleave(contenders, request.rounds, request.seed, seconds):
        pass
    dense = [entry.name for entry in entries if entry.product.role == DENSE and entry.batch]
    fastest = min(dense, key=lambda name: Spread.of(seconds[name]).p50, default=None)
    for entry in entries:
        yield _row(entry, seconds, fastest, dtype, request.rounds)


def _checked(request: KernelRequest, matrix: MatrixShape, dtype: torch.dtype, copies: list[Tensor]) -> list[_Entry]:
    """Every product with its check, on one vector and one copy; the vector is another one than is timed first."""
    entries: list[_Entry] = []
    for sparsity in (0.0, *request.sparsities):
        operands = Operands(matrix, copies, _vectors(request, matrix, sparsity, dtype), sparsity)
        x, weight, number = operands.at(1)
        exact: dict[bool, Tensor] = {}
        for product in sparse_products(operands) if sparsity else dense_products(operands):
            if product.turned not in exact:
                used = weight.view(matrix.outputs, matrix.inputs).T if product.turned else weight
                exact[product.turned] = _exact(x, used, operands.vectors.thresholds[number], matrix.segments)
            check = check_product(product.run(1, 1), exact[product.turned], dtype)
            entries.append(_Entry(product, operands, check))
    return entries


def _exact(x: Tensor, weight: Tensor, thresholds: Tensor, segments: tuple[int, ...]) -> Tensor:
    """[N]: `exact_product` of each projection at its own thresholds."""
    parts = zip(weight.split(segments, dim=1), thresholds, strict=True)
    return torch.cat([exact_product(x, part, own) for part, own in parts])


def _vectors(request: KernelRequest, matrix: MatrixShape, sparsity: float, dtype: torch.dtype) -> Vectors:
    if request.replay is not None and sparsity and matrix.site is not None:
        return request.replay.vectors(matrix, sparsity, dtype, request.device, request.seed)
    return random_vectors(matrix, sparsity, dtype, request.device, request.seed)


def _row(entry: _Entry, seconds: Seconds, dense: str | None, dtype: torch.dtype, rounds: int) -> KernelRow:
    matrix, vectors = entry.operands.matrix, entry.operands.vectors
    reading = Spread.of([1 / s for s in seconds[READ]])
    read = reading.p50
    weight_bytes = round(vectors.kept * matrix.outputs * dtype.itemsize)
    floor = weight_bytes / read
    timed = Spread.of(seconds[entry.name]) if entry.batch else None
    return KernelRow(
        models=matrix.models, matrix=matrix.name, site=matrix.site, inputs=matrix.inputs, outputs=matrix.outputs,
        dtype=_name(dtype), sparsity=entry.operands.sparsity, realised=1 - vectors.kept / matrix.inputs,
        product=entry.product.name, role=entry.product.role, check=str(entry.check), error=entry.check.finite,
        rounds=rounds, calls=entry.batch.calls if entry.batch else 0, copies=len(entry.operands.copies),
        p20_us=timed.p20 * 1e6 if timed else None, p50_us=timed.p50 * 1e6 if timed else None,
        p80_us=timed.p80 * 1e6 if timed else None,
        bytes=weight_bytes, gbps=weight_bytes / timed.p50 / 1e9 if timed else None, read_gbps=read / 1e9,
        floor_us=floor * 1e6,
        to_floor=timed.p50 / floor if timed and floor else None,
        dense=dense and dense.partition("@")[0],
        to_dense=median_ratio(seconds[dense], seconds[entry.name]) if timed and dense else None,
        read_p20=reading.p20 / 1e9, read_p80=reading.p80 / 1e9,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
