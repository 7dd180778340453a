"""The product of many rows under a plan: what a sparse decode step computes for one row, as a matrix product.

Dropped entries are set to zero and multiplied; skipping their weight rows gains nothing when there are many rows. The
comparison is the step's own, so the same entries are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.transformer import dense
from teal_cli.sparsity.plan import Plan
from teal_kernels.ops.threshold.reference import threshold_reference
from teal_kernels.spec import PROJECTION_INDEX, SITE_PROJECTIONS, SITES


class PlanProjector:
    """The projections of one layer under a plan."""

    def __init__(self, config: ModelConfig, plan: Plan, layer: int, device: torch.device) -> None:
        self._layer = layer
        self._segments = {site: config.segments(site) for site in SITES}
        self._thresholds: dict[str, Tensor] = {}
        self._shared: dict[str, bool] = {}
        for site, group in SITE_PROJECTIONS.items():
            values = plan.thresholds[layer, [PROJECTION_INDEX[p] for p in group]]
            self._thresholds[site] = torch.tensor(values, device=device).clamp_min(0)
            self._shared[site] = bool((values == values[0]).all())

    def __call__(self, site: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x [S, K], weight [K, N] -> what any projection of the site reads [S, K], and the product [S, N]."""
        thresholds = self._thresholds[site]
        kept = threshold_reference(x, thresholds.min())
        if self._shared[site]:
            return kept, dense(self._layer, site, kept, weight)
        parts = [
            dense(self._layer, site, threshold_reference(kept, t), columns)
            for t, columns in zip(thresholds, weight.split(self._segments[site], dim=1), strict=True)
        ]
        return kept, torch.cat(parts, dim=1)
