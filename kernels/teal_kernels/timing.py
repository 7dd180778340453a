"""Time launches on a GPU the way a decode step runs them: in a CUDA graph, over weights that no cache holds.

Knows nothing of what is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Launch = Callable[[], None]


def copies_beyond_cache(size: int, device: torch.device) -> int:
    """How many buffers of `size` bytes it takes, so that using them in turn finds none of them in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-3 * cache // size))


def time_launches(launches: Sequence[Launch], repeats: int = 25) -> list[float]:
    """Seconds per launch, one value per replay of a graph that holds all of `launches` once.

    Give one launch per weight buffer (`copies_beyond_cache`). The first replays, which warm clocks and caches up, are
    not among the values.
    """
    for launch in launches:
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    seconds = []
    for turn in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 3:
            seconds.append(begin.elapsed_time(end) / 1000 / len(launches))
    return seconds


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]
