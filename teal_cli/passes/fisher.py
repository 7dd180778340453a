"""What each projection loses at each level of sparsity, estimated from gradients (see `gradients`).

Dropping entries of a projection's input changes the loss of a token by about e = sum of g_i x_i over the dropped i, and
the mean of e^2 over tokens is a second-order estimate of what the projection costs at that level. Only the mask is
needed, no product, so one backward pass gives all levels of all projections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.sparsity.criterion import Scoring, Threshold
from teal_cli.sparsity.histogram import MAGNITUDES, magnitudes
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, columns

LEVELS: Final = np.round(np.arange(0.0, 0.99, 0.02), 4)
"""The levels at which losses are known; between two of them they are taken as linear."""

CAP: Final = 0.95
"""Quantile at which each row's squared error is capped: a few rows with huge gradients spoil the mean. SmolLM2-135M and
Gemma 3 270M, 3,000 tokens of the Python docs, 2026-11: without it the plan of Gemma loses 0.90 of what a uniform one
loses at 50%, with it 0.86."""


@dataclass(eq=False)
class FisherLosses:
    """Collects the errors of rows, projection by projection; give `visit` to `gradients`.

    Args:
        thresholds: float32 [layers, 7, len(LEVELS)], of scores: what level j drops.
        scoring: how entries are scored.
        start: rows before this position are left out: decoding never makes them sparse.
    """

    thresholds: NDArray[np.float32]
    scoring: Scoring
    start: int
    _errors: dict[tuple[int, int], list[NDArray[np.float32]]] = field(default_factory=dict)

    def visit(self, layer: int, projection: str, sequence: int, x: Tensor, g: Tensor) -> None:
        """Note what each row of x [S, K] would lose at each level, given the gradient g [S, K]."""
        column, site = PROJECTION_INDEX[projection], PROJECTION_SITE[projection]
        x, g = x[self.start :], g[self.start :].float()
        if not len(x):
            return
        limits = self.thresholds[layer, column]
        centre, scale = self.scoring.centre.get(site), self.scoring.scale.get(site)
        # The first level that drops an entry; entries above the last threshold are never dropped.
        if centre is None and scale is None and x.dtype.itemsize == 2 and not self.scoring.ranked:
            level = _by_magnitude(x, limits)
        else:
            if centre is not None:
                x = x.float() - torch.from_numpy(centre[layer]).to(x.device)
            score = x.float().abs()
            if self.scoring.ranked:
                score = torch.searchsorted(score.sort(1).values, score).float() + 1
            if scale is not None:
                score = score * torch.from_numpy(scale[layer, column - columns(site).start]).to(x.device)
            level = torch.searchsorted(torch.from_numpy(limits).to(x.device), score)
        sums = torch.zeros(len(x), len(limits) + 1, device=x.device).scatter_add_(1, level, x * g)
        errors = sums.cumsum(1)[:, :-1].cpu().numpy()
        self._errors.setdefault((layer, column), []).append(errors)

    def losses(self) -> NDArray[np.float64]:
        """Mean over rows of the capped squared error, float64 [layers, 7, len(LEVELS)], rising with the level."""
        found = np.zeros(self.thresholds.shape)
        for (layer, column), errors in self._errors.items():
            squares = np.concatenate(errors).astype(np.float64) ** 2
            found[layer, column] = np.minimum(squares, np.quantile(squares, CAP, axis=0)).mean(axis=0)
        return np.maximum.accumulate(found, axis=2)


def _by_magnitude(x: Tensor, limits: NDArray[np.float32]) -> Tensor:
    """How many of the rising limits each |x| exceeds, int64 [S, K], for a 16-bit x: looked up by its magnitude's bits,
    a sixth of the time of a search."""
    exceeded_from = np.searchsorted(magnitudes(str(x.dtype).removeprefix("torch.")), limits, side="right")
    table = torch.from_numpy(np.cumsum(np.bincount(exceeded_from, minlength=MAGNITUDES)))
    bits = x.contiguous().view(torch.int16).bitwise_and(MAGNITUDES - 1)
    return table.to(x.device)[bits.int()]


def level_thresholds(layers: int, threshold: Threshold) -> NDArray[np.float32]:
    """Thresholds of every projection at `LEVELS`, float32 [layers, 7, len(LEVELS)]; at 0 nothing is dropped.

    Args:
        threshold: of a projection at a level.
    """
    found = np.full((layers, len(PROJECTIONS), len(LEVELS)), -1.0, np.float32)
    for layer in range(layers):
        for column, projection in enumerate(PROJECTIONS):
            found[layer, column, 1:] = [threshold(layer, projection, float(level)) for level in LEVELS[1:]]
    return np.maximum.accumulate(found, axis=2)
