"""What decides that an entry of a vector is kept: its score |x_i - c_i| * scale_i, where that exceeds a threshold.

`c` is one constant per site and channel, `scale` one factor per projection and channel; both are usually absent, and
the score is the magnitude. This module holds what a criterion needs of one model; how a score becomes a comparison is
told in `teal_kernels.thresholds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from teal_kernels.thresholds import Thresholds

MAGNITUDE: Final = "magnitude"
"""The criterion of TEAL, |x_i|: neither constants nor factors."""
TOPK: Final = "topk"
"""A fixed count per row: the score is the rank of |x_i| in it, a threshold the number of entries dropped."""


Threshold: TypeAlias = Callable[[int, str, float], float]
"""(layer, projection, sparsity) -> the threshold of scores that drops this part of the projection's entries."""


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """A criterion with what it needs of one model.

    Attributes:
        criterion: its name, as calibrations, plans and stores have it.
        scale: site -> float32 [layers, P, K], a factor per projection and channel; sites left out have none.
        centre: site -> float32 [layers, K], a constant per channel; sites left out have none.
    """

    criterion: str = MAGNITUDE
    scale: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    centre: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def ranked(self) -> bool:
        """Whether scores are ranks, and thresholds counts."""
        return self.criterion == TOPK

    def thresholds(self, table: NDArray[np.float32], experts: NDArray[np.float32] | None = None) -> Thresholds:
        """What steps compare with, for thresholds of scores float32 [layers, 7], and of experts [layers, E].

        A negative threshold, which an imported calibration of TEAL can give, drops nothing; 0 drops zeros only, which
        gives the same product, and takes its place.
        """
        return Thresholds(np.maximum(table, np.float32(0)), self.scale, self.centre, self.ranked, experts)
