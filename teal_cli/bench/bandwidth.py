"""How fast this device reads memory: what every floor is computed from.

The probe takes its turn among the contenders, so that a floor is of the same minutes as the times it judges.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from teal_cli.bench.machine import cache_bytes
from teal_cli.bench.timing import Contender, replayed, wall_clock

READ = "read"
"""Name of the probe among contenders."""

_TRIES = 5
_CACHES = 6
_LEAST = 192 << 20
_LEAST_ON_GPU = 2 << 30  # below a millisecond, what a launch costs would look like slow memory


class ReadProbe:
    """Reads a large array once, by the fastest of several ways.

    Args:
        device: whose memory.
        size: bytes of the array; several times the last-level cache if None.

    Attributes:
        way: how it reads.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        least = _LEAST_ON_GPU if device.type == "cuda" else _LEAST
        size = size or max(least, _CACHES * cache_bytes(device))
        side = max(64, int((size / 4) ** 0.5) // 64 * 64)
        self._array = torch.randn(side, device=device).repeat(side, 1)
        self._vector = torch.randn(side, device=device)
        self._out = torch.empty(side, device=device)
        self.size = self._array.nbytes
        timed: dict[str, Callable[[], float]] = {}
        for name, read in self._ways().items():
            timed[name] = replayed(read) if device.type == "cuda" else _on_host(read)
        best = {name: min(measure() for _ in range(_TRIES)) for name, measure in timed.items()}
        self.way = min(best, key=best.__getitem__)
        self._measure = timed[self.way]

    def _ways(self) -> dict[str, Callable[[], Tensor]]:
        flat = self._array.view(-1)
        return {
            "sum": flat.sum,
            "largest": flat.amax,
            "matrix times vector": lambda: torch.mv(self._array, self._vector, out=self._out),
        }

    def contender(self) -> Contender:
        """As a contender whose unit of work is one byte. A turn is several reads: the first one after another contender
        finds threads asleep."""
        return Contender(READ, lambda: statistics.median(self._measure() for _ in range(_TRIES)) / self.size)


def _on_host(read: Callable[[], Tensor]) -> Callable[[], float]:
    return lambda: wall_clock(read)
