"""What the entries of each site are compared with, for a whole model.

A criterion scores entry i of a vector as |x_i - c_i| * scale_i and keeps it where the score exceeds t. Kernels, the
reference and the store all compute it as |x_i - c_i| > t_i, with one threshold per projection, or, where there is a
scale, one per projection and channel. Only this file computes t_i, so that all of them compare the same bits. One
criterion has another score, the rank of |x_i| in its row (`Thresholds.ranked`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teal_kernels.spec import PROJECTIONS, columns


def channel_thresholds(t: NDArray[np.float32] | float, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The threshold of each channel: t / scale_i, one division in float32, rounded to nearest even.

    Args:
        t: float32 [...], not negative; what the score is compared with.
        scale: float32 [..., K], finite and not negative. Where it is 0, no score exceeds t: the threshold is infinite.

    Returns:
        float32 [..., K].
    """
    limits = np.asarray(t, np.float32)[..., None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        return np.where(scale > 0, limits / scale, np.float32(np.inf)).astype(np.float32, copy=False)


def site_thresholds(
    table: NDArray[np.float32], site: str, scale: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """What each projection of a site compares with.

    Args:
        table: float32 [..., 7], the thresholds of scores.
        scale: float32 [..., P, K] of this site's P projections; None where the score is the magnitude.

    Returns:
        float32 [..., P], or with a scale [..., P, K].
    """
    limits = table[..., columns(site)]
    return limits if scale is None else channel_thresholds(limits, scale)


def lowest(limits: NDArray[np.float32], *, projections: int) -> NDArray[np.float32]:
    """What decides whether a site keeps an entry: the lowest threshold among its projections, since what one of them
    keeps is kept.

    Args:
        limits: float32 [..., P] or [..., P, K], as `site_thresholds` gives it.
        projections: the axis of P, from the end: -1 or -2.

    Returns:
        float32 [...] or [..., K].
    """
    return limits.min(axis=projections)


@dataclass(frozen=True, slots=True, eq=False)
class Thresholds:
    """What a step compares with.

    Attributes:
        table: float32 [layers, 7], q k v o gate up down, none negative: the thresholds of scores.
        scale: site -> float32 [layers, P, K], for sites whose score has a scale; mostly empty.
        centre: site -> float32 [layers, K], what is subtracted from a vector before it is compared and multiplied;
            mostly empty.
        ranked: the score of an entry is 1 + how many entries of its row have a smaller magnitude, and the table says
            how many entries are dropped (`ops.threshold.reference.row_thresholds`). There is neither scale nor centre.
        experts: float32 [layers, E], of a mixture of experts: what the part of a vector at `mlp_mid` that is an
            expert's is compared with, in place of the table's number for `down`; None where that serves all.

    Raises:
        ValueError: a shape or dtype that does not fit, a negative number, or one that is not finite.
    """

    table: NDArray[np.float32]
    scale: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    centre: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    ranked: bool = False
    experts: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        table = self.table
        if table.ndim != 2 or table.shape[1] != len(PROJECTIONS) or table.dtype != np.float32 or not (table >= 0).all():
            raise ValueError(f"thresholds must be float32 [layers, {len(PROJECTIONS)}] and not negative")
        of_experts = self.experts
        if of_experts is not None and (
            of_experts.ndim != 2
            or len(of_experts) != len(table)
            or of_experts.dtype != np.float32
            or not (of_experts >= 0).all()
        ):
            raise ValueError("thresholds of experts must be float32 [layers, E] and not negative")
        for name, arrays, lead in (("scale", self.scale, 3), ("centre", self.centre, 2)):
            for site, array in arrays.items():
                group = columns(site)
                shape = (len(table), group.stop - group.start)[: lead - 1]
                if array.dtype != np.float32 or array.ndim != lead or array.shape[:-1] != shape:
                    raise ValueError(f"the {name} of {site} must be float32 {[*shape, 'K']}, not {list(array.shape)}")
                if not np.isfinite(array).all() or (name == "scale" and (array < 0).any()):
                    raise ValueError(f"the {name} of {site} must be finite, and a scale not negative")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.table)

    def site(self, layer: int, site: str) -> NDArray[np.float32]:
        """What each projection of a site compares with: float32 [P], or [P, K] where there is a scale."""
        scale = self.scale.get(site)
        return site_thresholds(self.table[layer], site, None if scale is None else scale[layer])

    def lowest(self, layer: int, site: str) -> NDArray[np.float32]:
        """What decides whether a site keeps an entry: float32 [], or [K] where there is a scale."""
        limits = self.site(layer, site)
        return np.asarray(lowest(limits, projections=-limits.ndim))

    def check_widths(self, channels: Mapping[str, int]) -> None:
        """Refuse arrays of another width K than a model's.

        Raises:
            ValueError: the width of a scale or a centre does not fit; it is named.
        """
        for name, arrays in (("scale", self.scale), ("centre", self.centre)):
            for site, array in arrays.items():
                if array.shape[-1] != channels[site]:
                    raise ValueError(f"the {name} of {site} has {array.shape[-1]} channels, the model {channels[site]}")
