"""How a budget of dropped bytes is spread over projections, given what each loses at each level.

Pure functions on arrays: where losses come from (gradients, block errors) is the business of `passes`. Nothing here
knows a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Segment(NamedTuple):
    """One edge of the lower convex hull of a projection's losses.

    Attributes:
        slope: loss per dropped byte along it.
        projection: flat index.
        size: bytes that it drops.
        first, last: levels at its ends.
    """

    slope: float
    projection: int
    size: float
    first: float
    last: float


def spend(losses: Floats, levels: Floats, weights: Floats, target: float, *, lowest: Floats, highest: Floats) -> Floats:
    """The levels that drop `target` of all bytes at the least summed loss, where losses are additive.

    Every projection begins at its lowest level; then whatever loses least per byte is dropped next, along the lower
    convex hull of each projection's losses. That is the optimum of the problem in which levels may be mixed.

    Args:
        losses: [P, J], what projection p loses at level j, finite.
        levels: [J] in [0, 1), rising: the part of its entries that each drops.
        weights: [P], bytes of each projection's matrix.
        target: part of all bytes to drop.
        lowest, highest: [P], bounds of each projection's level; at least one level lies between them.

    Returns:
        [P], the level of each projection; their mean by weight is the target, or the nearest that the bounds allow.
    """
    found = np.array([levels[_within(levels, low, high)][0] for low, high in zip(lowest, highest, strict=True)])
    room = target * weights.sum() - float((found * weights).sum())
    segments = [
        segment
        for p in range(len(losses))
        for segment in _hull(p, losses[p], levels, weights[p], _within(levels, lowest[p], highest[p]))
    ]
    for segment in sorted(segments):
        if room < segment.size:  # the rest of the budget ends within this edge
            part = max(0.0, room / segment.size)
            if part > 0:
                found[segment.projection] = segment.first + part * (segment.last - segment.first)
            break
        found[segment.projection] = segment.last
        room -= segment.size
    return found


def _within(levels: Floats, low: float, high: float) -> NDArray[np.intp]:
    return np.flatnonzero((levels >= low - 1e-9) & (levels <= high + 1e-9))


def _hull(projection: int, loss: Floats, levels: Floats, weight: float, allowed: NDArray[np.intp]) -> Iterator[Segment]:
    """Edges of the lower convex hull of (level, loss), from left to right."""
    corners: list[int] = []
    for j in allowed:
        while len(corners) >= 2 and _above(corners[-2], corners[-1], int(j), levels, loss):
            corners.pop()
        corners.append(int(j))
    for a, b in pairwise(corners):
        size = (levels[b] - levels[a]) * weight
        yield Segment(float((loss[b] - loss[a]) / size), projection, float(size), float(levels[a]), float(levels[b]))


def _above(a: int, b: int, c: int, x: Floats, y: Floats) -> bool:
    """Whether corner b lies on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))
