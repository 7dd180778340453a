"""Greedy allocation within each block by its output error (TEAL, Algorithm 1).

The level of one projection after another is raised, each time that of the one which adds least error per byte dropped,
with the bytes of the model's own matrices, until the block drops what it should. TEAL tries all seven at every step;
here a candidate is tried anew only when it heads the list by its last known price, which asks for a fifth of the
products and differs only where prices fall as other projections are raised.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.model.rope import Rotation
from teal_cli.passes.forward import Advance, Layer, Sparse, States
from teal_cli.passes.layers import Layers
from teal_cli.sparsity.criterion import Threshold
from teal_cli.sparsity.plan import Plan
from teal_kernels.spec import PROJECTIONS

STEP: Final = 0.05
HIGHEST: Final = 0.95
_ROUNDING: Final = 1e-9
"""A budget smaller than this part of a block is what subtractions left of none."""


def greedy(
    layers: Layers,
    tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64],
    plan: Plan,
    threshold: Threshold,
    targets: Sequence[float],
    start: int,
    known: Sequence[NDArray[np.float64]] = (),
    keep: Callable[[NDArray[np.float64]], None] = lambda levels: None,
) -> Iterator[Advance | NDArray[np.float64]]:
    """Choose the levels of every block, one layer in memory at a time.

    Args:
        tokens: token ids of each sequence; the blocks read what the dense model gives them.
        plan: any plan of the model; its criterion is used, its thresholds are not.
        threshold: of a projection at a level.
        targets: parts of each block's bytes to drop, T of them; one search finds for each what a search for it alone
            would find.
        start: rows from this position on are sparse.
        known: levels [T, 7] of the first layers, as an earlier run of the same search found them.
        keep: called with the levels of all layers so far, [n, T, 7], after each one that was searched.

    Yields:
        Advance after each layer, and the levels float64 [layers, T, 7] last.

    Raises:
        UsageError, TealError: as `passes.forward.forward`.
    """
    config = layers.config
    weights = np.array(list(config.projection_sizes().values()), np.float64)
    found = np.zeros((config.layers, len(targets), len(PROJECTIONS)))
    count = max(map(len, tokens))
    rope = layers.rope.at(0, count)
    hidden = layers.embed([torch.tensor(row, device=layers.device) for row in tokens])
    begun = time.perf_counter()
    for index in range(config.layers):
        block = _Block(layers, index, rope, hidden, plan, threshold, start)
        if index < len(known):
            found[index] = known[index]
        else:
            found[index] = block.levels(weights, targets)
            keep(found[: index + 1])
        hidden = block.dense
        yield Advance(index + 1, config.layers, config.layers, time.perf_counter() - begun)
        del block
    yield found


class _Block:
    """One layer on the hidden states that the dense model gives it.

    Attributes:
        dense: what comes out of it densely.
    """

    def __init__(
        self,
        layers: Layers,
        index: int,
        rope: Sequence[Rotation],
        hidden: Sequence[Tensor],
        plan: Plan,
        threshold: Threshold,
        start: int,
    ) -> None:
        self._config, self._index, self._rope = layers.config, index, rope
        self._hidden, self._plan, self._threshold, self._start = hidden, plan, threshold, start
        self._weights = layers.layer(index)
        self.dense = [self._run(x, None).dense for x in hidden]

    def _run(self, hidden: Tensor, plan: Plan | None) -> States:
        variants = [] if plan is None else [Sparse(plan, self._start)]
        cut = len(hidden) if plan is None else min(self._start, len(hidden))
        states = States(hidden[:cut], [hidden[cut:] for _ in variants], len(hidden))
        layer = Layer(self._config, self._index, self._weights, self._rope[self._index], variants, None)
        layer.advance(states, 0)
        return states

    def error(self, levels: NDArray[np.float64]) -> float:
        """Squared error of the block's output over the sparse rows, with these levels [7]."""
        thresholds = np.full(self._plan.thresholds.shape, -1.0, np.float32)
        for column, projection in enumerate(PROJECTIONS):
            if levels[column] > 0:
                thresholds[self._index, column] = self._threshold(self._index, projection, float(levels[column]))
        plan = replace(self._plan, thresholds=thresholds)
        total = 0.0
        for hidden, dense in zip(self._hidden, self.dense, strict=True):
            out = self._run(hidden, plan).sparse[0]
            total += float((out.float() - dense[len(dense) - len(out) :].float()).square().sum(dtype=torch.float64))
        return total

    def levels(self, weights: NDArray[np.float64], targets: Sequence[float]) -> NDArray[np.float64]:
        """Levels [T, 7] that drop each target of the block's bytes."""
        search = _Search(self.error, weights)
        found = {target: search.until(target) for target in sorted(set(targets))}
        return np.stack([found[target] for target in targets])


@dataclass(eq=False)
class _Search:
    """The levels of one block on their way up.

    Attributes:
        error: of the block's output at levels [7]. weights: [7], bytes of each matrix.
        levels: [7]; reached: their error.
        prices: heap of (error per byte of raising a projection, as last known, its column).
    """

    error: Callable[[NDArray[np.float64]], float]
    weights: NDArray[np.float64]
    levels: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(PROJECTIONS)))
    reached: float = 0.0
    prices: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, c) for c in range(len(PROJECTIONS))])

    def until(self, target: float) -> NDArray[np.float64]:
        """Levels [7] that drop `target` of the bytes, no less than any target before.

        The steps that end at a target are cut to fit, on a copy; a later target goes on from the whole steps.
        """
        while self._goes_on(target) and self._room(target) >= STEP * self.weights[self.prices[0][1]]:
            self._step(target)
        last = replace(self, prices=self.prices.copy())
        while last._goes_on(target):
            last._step(target)
        return last.levels

    def _room(self, target: float) -> float:
        return float(target * self.weights.sum() - (self.levels * self.weights).sum())

    def _goes_on(self, target: float) -> bool:
        return bool(self.prices) and self._room(target) > _ROUNDING * self.weights.sum()

    def _step(self, target: float) -> None:
        """Raise what heads the list, or put it where its new price belongs."""
        _, column = heapq.heappop(self.prices)
        size = min(STEP, self._room(target) / self.weights[column])
        raised = self.levels.copy()
        raised[column] += size
        added = self.error(raised) - self.reached
        price = added / (size * self.weights[column])
        if self.prices and price > self.prices[0][0]:
            heapq.heappush(self.prices, (price, column))
            return
        self.levels, self.reached = raised, self.reached + added
        if raised[column] + STEP <= HIGHEST:
            heapq.heappush(self.prices, (price, column))
