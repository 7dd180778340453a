"""The criteria there are: a row each, with what a criterion needs of a model before it can score.

A new criterion of the form |x_i - c_i| * scale_i is a function here and a row in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.model.config import ModelConfig
from teal_cli.model.weights import LayerWeights
from teal_cli.sparsity.criterion import MAGNITUDE, TOPK, Scoring
from teal_kernels.spec import SITE_PROJECTIONS, SITES

Means = Mapping[str, NDArray[np.float32]]
"""Site -> float32 [layers, K], the mean of every channel over the calibration's text."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a criterion may ask for; each is computed only when it is called.

    Attributes:
        layer: the weights of a layer.
        means: the mean of every channel.
    """

    config: ModelConfig
    layer: Callable[[int], LayerWeights]
    means: Callable[[], Means]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A row: what it is, and how its factors and constants are made."""

    about: str
    prepare: Callable[[Material], Scoring]


def _wina(material: Material) -> Scoring:
    """|x_i| times the Euclidean norm of row i of the projection's matrix (WINA, arXiv 2505.19427, equation 4)."""
    config = material.config
    scale = {
        site: np.empty((config.layers, len(group), config.channels(site)), np.float32)
        for site, group in SITE_PROJECTIONS.items()
    }
    for index in range(config.layers):
        weights = material.layer(index)
        for site in SITES:
            matrix = weights.matrix(site)
            for column, part in enumerate(matrix.tensor().split(matrix.segments, dim=1)):
                norms = part.float().norm(dim=1).cpu().numpy()
                # A row of zeros contributes nothing and is dropped first; a factor must stay positive.
                scale[site][index, column] = np.maximum(norms, np.finfo(np.float32).tiny)
    return Scoring("wina", scale=scale)


def _centred(material: Material) -> Scoring:
    """|x_i - mean_i|: what is dropped is replaced by its mean (SCAP, arXiv 2412.07174, section 3.2, with the mean)."""
    return Scoring("centred", centre=dict(material.means()))


def learned_scoring(thresholds: Mapping[str, NDArray[np.float32]]) -> tuple[Scoring, NDArray[np.float32]]:
    """Thresholds of channels as a criterion: |x_i| times what brings the channel's threshold to its projection's.

    Args:
        thresholds: site -> [layers, P, K], positive.

    Returns:
        The criterion and float32 [layers, 7], of each projection the geometric mean of its channels' thresholds.
    """
    logs = {site: np.log(thresholds[site].astype(np.float64)) for site in SITES}
    means = {site: value.mean(axis=2) for site, value in logs.items()}
    scale = {site: np.exp(means[site][..., None] - value).astype(np.float32) for site, value in logs.items()}
    return Scoring("learned", scale=scale), np.exp(np.concatenate([means[site] for site in SITES], axis=1), dtype="f4")


CRITERIA: Final[Mapping[str, Criterion]] = {
    MAGNITUDE: Criterion("the magnitude |x| (TEAL)", lambda _: Scoring()),
    "wina": Criterion("|x| times the norm of the weight row that it meets (WINA)", _wina),
    TOPK: Criterion("the largest |x| of each row, a fixed count of them", lambda _: Scoring(TOPK)),
    "centred": Criterion("the distance from the channel's mean, which replaces what is dropped (SCAP)", _centred),
}
