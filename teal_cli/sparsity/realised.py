"""What a plan does to text that it was not calibrated on: the part of the entries that its thresholds really drop.

Takes a histogram of the other text, observed in a dense pass; so it shows how far magnitudes differ from text
to text, not how dropping entries in one layer changes the next ones. A decode reports the latter by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.sparsity.histogram import MagnitudeHistogram
from teal_cli.sparsity.plan import Plan
from teal_kernels.spec import SITES, columns

CHECKED: Final = (0.25, 0.40, 0.50, 0.65, 0.90)
"""The sparsity levels that `teal calibrations check` looks at."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One site of one layer: what was meant to be dropped there, and what was."""

    layer: int
    site: str
    target: float
    sparsity: float

    @property
    def deviation(self) -> float:
        """Realised less target; 0.01 is one point."""
        return self.sparsity - self.target


@dataclass(frozen=True, slots=True, eq=False)
class Realised:
    """Realised sparsity of a plan.

    Attributes:
        target: of the plan, over the model.
        pairs: every layer and site.
    """

    target: float
    pairs: tuple[Pair, ...]

    @property
    def mean(self) -> float:
        """Mean over all pairs."""
        return float(np.mean([pair.sparsity for pair in self.pairs]))

    @property
    def p95(self) -> float:
        """The deviation, without its sign, that 95% of the pairs stay below."""
        return float(np.quantile(self._deviations(), 0.95))

    def furthest(self, count: int) -> list[Pair]:
        """The pairs furthest from their target, the worst first."""
        order = np.argsort(-self._deviations(), kind="stable")
        return [self.pairs[i] for i in order[:count]]

    def _deviations(self) -> NDArray[np.float64]:
        return np.abs([pair.deviation for pair in self.pairs])


def realised(histogram: MagnitudeHistogram, plan: Plan) -> Realised:
    """What the thresholds of a plan drop of the activations that were counted.

    A site is taken at the lowest threshold of its projections: what is dropped before any of them sees it.
    """
    pairs = []
    for layer in range(plan.layers):
        for site in SITES:
            experts = histogram.experts if site == "mlp_mid" else None
            if plan.experts is not None and experts is not None and experts.tokens(layer).any():
                dropped = experts.dropped(layer, plan.experts[layer])
            else:
                dropped = histogram.cdf(layer, site, plan.site_threshold(layer, site))
            pairs.append(Pair(layer, site, float(plan.sparsity[layer, columns(site)].min()), dropped))
    return Realised(plan.target, tuple(pairs))
