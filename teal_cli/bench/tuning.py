"""Search launch configurations of the gather GEMV on this GPU, and leave the best ones on disk for `configs`.

Runs only when asked to. A candidate whose result is wrong is an error, not a slow candidate.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from teal_cli.bench.inputs import WeightPool
from teal_cli.bench.timing import replayed
from teal_kernels.configs import (
    BANDS,
    GemvConfig,
    config_key,
    default_gemv_config,
    table_file,
    tuned_configs,
)
from teal_kernels.ops.sparse_gemv.gather import GatherGemv
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference

BAND_POINTS = dict(zip(BANDS, (0.25, 0.5, 0.7, 0.9), strict=True))
"""The sparsity that stands for each band."""

_WARM_UP, _REPEATS = 3, 25
_MOST_COPIES = 64

Launch = Callable[[], None]
Measure = Callable[[list[Launch]], float]
"""Seconds of one of the launches it is given."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best configuration for one weight shape and sparsity band; `seconds` with it, and with the default."""

    inputs: int
    outputs: int
    dtype: str
    sparsity: float
    config: GemvConfig
    seconds: float
    default_seconds: float


def candidates(inputs: int, outputs: int, itemsize: int) -> list[GemvConfig]:
    """The default, and around it other widths, depths and numbers of splits: up to twenty."""
    found = [default_gemv_config(inputs, outputs, itemsize)]
    for width in (128, 256, 512):
        block_n = width // itemsize
        if block_n > 2 * outputs:
            continue
        tiles = -(-outputs // block_n)
        for depth in (8192, 16384):
            rows = depth // width
            found.extend(
                GemvConfig(block_n, rows, splits)
                for splits in (1, 2, 4, 8, 16, 32)
                if 256 <= tiles * splits <= 2048 and inputs >= 4 * rows * splits
            )
    return list(dict.fromkeys(found))


def tune(
    shapes: Iterable[tuple[int, tuple[int, ...]]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    bands: Iterable[float] = BANDS,
    measure: Measure | None = None,
) -> Iterator[Tuned]:
    """Search for every (K, segments) and band, and write the table after each result, so that a stop loses nothing.

    Args:
        dtype: of weights; another dtype of the same size takes the same configurations.
        measure: by default the median of some replays of a CUDA graph that holds all launches.

    Raises:
        RuntimeError: a candidate computes something else than the reference.
    """
    measure = measure or _median_of_replays
    file = table_file(device)
    for inputs, segments in shapes:
        bench = _Bench(inputs, segments, dtype, device)
        for band in bands:
            sparsity = BAND_POINTS[band]
            times = {c: bench.seconds(c, sparsity, measure) for c in candidates(inputs, sum(segments), dtype.itemsize)}
            best = min(times, key=times.__getitem__)
            _store(file, config_key(inputs, sum(segments), dtype.itemsize, sparsity), best)
            default = next(iter(times.values()))
            yield Tuned(inputs, sum(segments), str(dtype).removeprefix("torch."), sparsity, best, times[best], default)


def _median_of_replays(launches: list[Launch]) -> float:
    replay = replayed(lambda: [launch() for launch in launches])
    seconds = [replay() for _ in range(_WARM_UP + _REPEATS)]
    return statistics.median(seconds[_WARM_UP:]) / len(launches)


class _Bench:
    """Random inputs of one shape, and as many weights as it takes to miss the cache."""

    def __init__(self, inputs: int, segments: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._segments = segments
        size = inputs * sum(segments) * dtype.itemsize
        pool = WeightPool(device, dtype, largest=size, size=None if device.type == "cuda" else 2 * size)
        self._weights = pool.copies(inputs, sum(segments))[:_MOST_COPIES]
        generator = torch.Generator(device).manual_seed(0)
        self._x = torch.randn(inputs, generator=generator, dtype=dtype, device=device)
        self._out = torch.empty(sum(segments), dtype=dtype, device=device)

    def seconds(self, config: GemvConfig, sparsity: float, measure: Measure) -> float:
        """Time of the gather and of adding up its partial sums, which whatever reads the product has to do."""
        limit = self._x.float().abs().quantile(sparsity)
        thresholds = limit.expand(len(self._segments)).contiguous()
        product = GatherGemv(len(self._x), self._segments, self._x.dtype, self._x.device, config)
        product.compact(self._x, thresholds)

        def launch(weight: Tensor) -> None:
            product.gather(weight, thresholds)
            product.reduce(self._out)

        launch(self._weights[0])
        wanted = sparse_gemv_reference(self._x.double(), self._weights[0].double(), thresholds, self._segments)
        error = (self._out.double() - wanted).norm() / wanted.norm()
        if not error < 1e-2:
            raise RuntimeError(f"{config} gives a relative error of {float(error):.2g}")
        return measure([lambda w=weight: launch(w) for weight in self._weights])  # type: ignore[misc]


def _store(file: Path, key: str, config: GemvConfig) -> None:
    """Add one entry to the table, atomically."""
    tuned_configs.cache_clear()
    table = {name: asdict(value) for name, value in tuned_configs(file).items()} | {key: asdict(config)}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
    temporary.replace(file)
    tuned_configs.cache_clear()
