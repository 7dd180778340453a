"""How times are taken: contenders in turn, round after round, each round in another order.

What happens to the machine meanwhile happens to all of them, so ratios are formed within a round and the median is
taken over rounds. Knows nothing of what is timed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Seconds = dict[str, list[float]]
"""Name of a contender -> its time in each round."""


@dataclass(frozen=True)
class Contender:
    """Something that is timed; `measure` does it once and returns seconds per unit of work."""

    name: str
    measure: Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Quantiles over rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        return cls(_quantile(ordered, 0.2), _quantile(ordered, 0.5), _quantile(ordered, 0.8))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the neighbours, as numpy's default."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def interleave(contenders: Sequence[Contender], rounds: int, seed: int, seconds: Seconds) -> Iterator[int]:
    """Measure every contender once per round; yields the number of rounds done.

    One round before the first warms up and is not among the times.

    Args:
        seconds: receives the times.
    """
    order = list(contenders)
    shuffle = random.Random(seed)
    seconds.update({contender.name: [] for contender in contenders})
    for turn in range(rounds + 1):
        shuffle.shuffle(order)
        for contender in order:
            taken = contender.measure()
            if turn:
                seconds[contender.name].append(taken)
        if turn:
            yield turn


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over rounds of over / under: how many times faster `under` was."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds of one run on the host."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def replayed(launches: Callable[[], object]) -> Callable[[], float]:
    """Capture launches as one CUDA graph; the result replays it and returns its seconds on the device."""
    launches()  # compiles what has to be compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return measure
