"""The product of many rows under a plan: what a sparse decode step computes for one row, as a matrix product.

Dropped entries are set to zero and multiplied; skipping their weight rows gains nothing when there are many rows. The
comparison is the step's own, so the same entries are dropped.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.sparsity.plan import Plan
from teal_kernels.matrix import Matrix
from teal_kernels.ops.threshold.reference import row_thresholds, threshold_reference
from teal_kernels.spec import SITES, columns


class PlanProjector:
    """The projections of one layer under a plan.

    Args:
        plan: its thresholds; layer: which of its layers.
        device: of the activations.
    """

    def __init__(self, plan: Plan, layer: int, device: torch.device) -> None:
        thresholds = plan.applied()
        self._ranked = thresholds.ranked
        self._limits = {site: torch.from_numpy(thresholds.site(layer, site)).to(device) for site in SITES}
        self._lowest = {site: torch.from_numpy(thresholds.lowest(layer, site)).to(device) for site in SITES}
        self._shared = {site: bool((limits == limits[0]).all()) for site, limits in self._limits.items()}
        self._numbers = {
            site: limits.tolist() for site, limits in self._limits.items() if limits.ndim == 1 and not self._ranked
        }
        self._centre = {site: torch.from_numpy(c[layer]).to(device) for site, c in plan.scoring.centre.items()}

    def __call__(
        self, site: str, x: Tensor, matrix: Matrix, counts: NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The product of a site.

        Args:
            x: [S, K]; matrix: [K, N].
            counts: int64 [7], to which the number of entries that each projection keeps is added.

        Returns:
            What any projection of the site reads [S, K], dropped entries zero (with a centre c it is x - c that is
            read), and the product [S, N].
        """
        x = self.centred(site, x)
        numbers = self._numbers.get(site)
        kept = shrink(x, min(numbers)) if numbers else threshold_reference(x, self._cut(site, x))
        return kept, self.product(site, kept, matrix, counts)

    def centred(self, site: str, x: Tensor) -> Tensor:
        """What entries of x are compared: x, or where the site has a centre c, x - c in x's dtype."""
        centre = self._centre.get(site)
        return x if centre is None else (x.float() - centre).to(x.dtype)

    def beyond(self, site: str, x: Tensor) -> Tensor:
        """By how much entries of a centred x [S, K] exceed what drops them, float32; 0 where they are dropped."""
        return (x.float().abs() - self._cut(site, x)).clamp_min(0)

    def _cut(self, site: str, x: Tensor) -> Tensor:
        """What decides that the site keeps an entry: [] or [K], or where a count is dropped of each row [S, 1]."""
        lowest = self._lowest[site]
        return row_thresholds(x, lowest[None]) if self._ranked else lowest

    def product(self, site: str, kept: Tensor, matrix: Matrix, counts: NDArray[np.int64] | None = None) -> Tensor:
        """What follows from the entries that were kept; arguments as for a call."""
        out = self._multiply(site, kept, matrix, counts)
        centre = self._centre.get(site)
        if centre is not None:
            out += matrix.dense(centre.to(kept.dtype)[None])
        return out

    def _multiply(self, site: str, kept: Tensor, matrix: Matrix, counts: NDArray[np.int64] | None) -> Tensor:
        group = columns(site)
        if self._shared[site]:
            if counts is not None:
                counts[group] += int(torch.count_nonzero(kept))
            return matrix.dense(kept)
        parts: list[Tensor] = []
        every = self._limits[site]
        if self._ranked:
            every = row_thresholds(kept, every).T[..., None]
        numbers = self._numbers.get(site)
        for projection, limits in enumerate(every):
            read = shrink(kept, numbers[projection]) if numbers else threshold_reference(kept, limits)
            if counts is not None:
                counts[group.start + projection] += int(torch.count_nonzero(read))
            parts.append(matrix.dense(read, projection))
        return torch.cat(parts, dim=1)


def shrink(x: Tensor, t: float) -> Tensor:
    """`threshold_reference` for one threshold, not negative, in a twentieth of its time on a CPU.

    hardshrink rounds t to the dtype of x; once it is rounded towards zero that changes no comparison. Unlike the
    reference it keeps NaN, which whoever looks at the result then finds.
    """
    return F.hardshrink(x, _towards_zero(t, x.dtype))


def _towards_zero(t: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that is at most t >= 0."""
    if dtype == torch.bfloat16:
        return float((np.array(t, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
    if dtype != torch.float16:
        return t
    with np.errstate(over="ignore"):  # beyond its largest number it is infinite, and the next one below is that number
        near = np.float16(t)
        return float(near if float(near) <= t else np.nextafter(near, np.float16(0)))
