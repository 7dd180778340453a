"""Thresholds from what the sparse model itself computes, so that a plan drops what it says.

Thresholds of a calibration come from dense activations. When everything upstream is sparse too, a layer sees other
vectors, and a 75% plan drops 81%. Here each site is calibrated on what the sites before it, already sparse, really
give: a layer is run once for each of its four sites.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.passes.forward import Advance, Layer, Sparse, States, Visit, Where
from teal_cli.passes.layers import Layers
from teal_cli.passes.scores import ScoreHistogram, count_scores
from teal_cli.sparsity.plan import Plan
from teal_kernels.spec import PROJECTION_INDEX, SITE_PROJECTIONS, SITES


def close_loop(
    layers: Layers, tokens: Sequence[NDArray[np.int64]], plan: Plan, start: int
) -> Iterator[Advance | NDArray[np.float32]]:
    """Find the thresholds at which every projection drops its level under the plan itself.

    Args:
        tokens: token ids of each sequence, all longer than `start`.
        plan: levels and criterion; its thresholds are not used.
        start: rows from this position on are sparse, and counted.

    Yields:
        Advance after each layer, and the thresholds float32 [layers, 7] last.

    Raises:
        UsageError, TealError: as `passes.forward.forward`.
    """
    config, begun = layers.config, time.perf_counter()
    thresholds = np.zeros(plan.thresholds.shape, np.float32)
    rope = layers.rope.at(0, max(map(len, tokens)))
    embedded = layers.embed([torch.tensor(row, device=layers.device) for row in tokens])
    states = [States(x[:start], [x[start:]], len(x)) for x in embedded]
    for index in range(config.layers):
        weights = layers.layer(index)
        for site in SITES:
            histogram = ScoreHistogram.empty(config.layers)
            count = _counter(histogram, site, plan)
            sparse = [Sparse(replace(plan, thresholds=thresholds.copy()), start)]
            layer = Layer(config, index, weights, rope[index], sparse, count)
            for sequence, state in enumerate(states):
                layer.advance(States(state.dense, list(state.sparse), state.length), sequence)
            for projection in SITE_PROJECTIONS[site]:
                column = PROJECTION_INDEX[projection]
                level = float(plan.sparsity[index, column])
                thresholds[index, column] = histogram.threshold(index, projection, level) if level > 0 else 0.0
        sparse = [Sparse(replace(plan, thresholds=thresholds.copy()), start)]
        layer = Layer(config, index, weights, rope[index], sparse, None)
        for sequence, state in enumerate(states):
            layer.advance(state, sequence)
        yield Advance(index + 1, config.layers, config.layers, time.perf_counter() - begun)
        del weights, layer
    yield thresholds


def _counter(histogram: ScoreHistogram, site: str, plan: Plan) -> Visit:
    """Counts the scores of the sparse rows of one site."""

    def count(where: Where, x: Tensor, kept: Tensor) -> None:
        if where.variant is not None and where.site == site:
            count_scores(histogram, where, x, plan.scoring)

    return count
