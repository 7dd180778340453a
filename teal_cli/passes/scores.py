"""Histograms of scores |x - c| * scale, per projection: what thresholds of a criterion other than the magnitude come
from.

Also the mean of every channel, which a centre is made of. Scores are float32 and counted by their top 16 bits, cut off;
a threshold is the upper end of its bin, so what was counted as dropped is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.passes.forward import Advance, Where, forward
from teal_cli.passes.layers import Layers
from teal_cli.sparsity.criterion import Scoring
from teal_cli.sparsity.histogram import MAGNITUDES
from teal_kernels.spec import PROJECTION_INDEX, PROJECTIONS, SITE_PROJECTIONS, SITES

_INFINITE = 0x7F80


class ScoreHistogram:
    """How often each score occurs, per layer and projection.

    Args:
        counts: int64 [layers, 7, 32768].
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self._counts = counts

    @classmethod
    def empty(cls, layers: int) -> ScoreHistogram:
        return cls(np.zeros((layers, len(PROJECTIONS), MAGNITUDES), np.int64))

    def add(self, layer: int, projection: str, scores: Tensor) -> None:
        """Count every entry of scores, float32 of any shape, none negative.

        Raises:
            TealError: one is not finite.
        """
        bits = scores.reshape(-1).contiguous().view(torch.int32) >> 16
        found = torch.bincount(bits, minlength=MAGNITUDES).cpu().numpy()
        if found[_INFINITE:].any():
            raise TealError(
                f"layer {layer}, {projection}: a score is not finite",
                hint="try --dtype float32, or `teal models verify`",
            )
        self._counts[layer, PROJECTION_INDEX[projection]] += found

    def threshold(self, layer: int, projection: str, sparsity: float) -> float:
        """The smallest threshold with P(score <= t) >= sparsity, for sparsity in (0, 1).

        Raises:
            TealError: nothing was counted there.
        """
        cumulative = np.cumsum(self._counts[layer, PROJECTION_INDEX[projection]])
        if not cumulative[-1]:
            raise TealError(f"layer {layer}, {projection}: the histogram is empty")
        index = np.searchsorted(cumulative / cumulative[-1], sparsity, side="left")
        return float(np.array(index << 16 | 0xFFFF, np.uint32).view(np.float32))

    def levels(self, thresholds: NDArray[np.float32], sizes: Mapping[str, int], nominal: float) -> NDArray[np.float64]:
        """The levels that thresholds drop once all are moved by one factor, so that together they drop `nominal`.

        Args:
            thresholds: [layers, 7], positive.
            sizes: entries of each projection's matrix, which their mean is weighted by.

        Returns:
            [layers, 7]. The factor lies between e^-4 and e^4.

        Raises:
            TealError: nothing was counted somewhere.
        """
        cumulative = np.cumsum(self._counts, axis=2)
        if not cumulative[..., -1].all():
            layer, column = np.argwhere(cumulative[..., -1] == 0)[0]
            raise TealError(f"layer {layer}, {PROJECTIONS[column]}: the histogram is empty")
        weights = np.array([sizes[projection] for projection in PROJECTIONS], np.float64)

        def dropped(log_factor: float) -> NDArray[np.float64]:
            moved = (thresholds * np.float32(np.exp(log_factor))).view(np.uint32) >> 16
            below = np.take_along_axis(cumulative, moved[..., None].astype(np.int64), axis=2)[..., 0]
            return below / cumulative[..., -1]

        low, high = -4.0, 4.0
        for _ in range(30):
            middle = (low + high) / 2
            if np.average(dropped(middle), weights=np.broadcast_to(weights, thresholds.shape)) < nominal:
                low = middle
            else:
                high = middle
        return dropped(high)


def count_scores(histogram: ScoreHistogram, where: Where, x: Tensor, scoring: Scoring) -> None:
    """Count the scores of a site's rows x [S, K] for each projection that reads them."""
    magnitude = x.float()
    if where.site in scoring.centre:
        magnitude = magnitude - torch.from_numpy(scoring.centre[where.site][where.layer]).to(x.device)
    magnitude = magnitude.abs()
    scale = scoring.scale.get(where.site)
    for index, projection in enumerate(SITE_PROJECTIONS[where.site]):
        factor = 1.0 if scale is None else torch.from_numpy(scale[where.layer, index]).to(x.device)
        histogram.add(where.layer, projection, magnitude * factor)


def score_histogram(
    layers: Layers, tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64], scoring: Scoring
) -> Iterator[Advance | ScoreHistogram]:
    """Count the scores of a dense pass; the histogram comes last. Raises as `forward`."""
    histogram = ScoreHistogram.empty(layers.config.layers)

    def count(where: Where, x: Tensor, kept: Tensor) -> None:
        count_scores(histogram, where, x, scoring)

    yield from forward(layers, tokens, visit=count)
    yield histogram


def channel_means(
    layers: Layers, tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64]
) -> Iterator[Advance | Mapping[str, NDArray[np.float32]]]:
    """Mean of every channel over a dense pass, site -> float32 [layers, K]; it comes last. Raises as `forward`."""
    config = layers.config
    sums = {site: np.zeros((config.layers, config.channels(site))) for site in SITES}
    count = sum(len(row) for row in tokens)

    def add(where: Where, x: Tensor, kept: Tensor) -> None:
        sums[where.site][where.layer] += x.double().sum(0).cpu().numpy()

    yield from forward(layers, tokens, visit=add)
    yield {site: (total / count).astype(np.float32) for site, total in sums.items()}
