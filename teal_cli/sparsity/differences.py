"""How far the thresholds of two calibrations are apart, site by site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from teal_cli.errors import UsageError
from teal_cli.sparsity.calibration import Calibration
from teal_kernels.spec import SITES


@dataclass(frozen=True, slots=True)
class Difference:
    """Thresholds of two calibrations at one site and sparsity.

    Attributes:
        first, second: mean over the layers.
        ratio: median over the layers of second / first; None where a threshold of the first is not positive.
        furthest: the largest |second / first - 1| of a layer; None as `ratio`.
        layer: where that is.
    """

    site: str
    sparsity: float
    first: float
    second: float
    ratio: float | None
    furthest: float | None
    layer: int | None


def differences(first: Calibration, second: Calibration, levels: Sequence[float]) -> Iterator[Difference]:
    """Compare the thresholds at each site, for each sparsity in (0, 1).

    Raises:
        UsageError: the calibrations have different numbers of layers.
    """
    if first.layers != second.layers:
        raise UsageError(
            f"{first.id} has {first.layers} layers and {second.id} has {second.layers}",
            hint="compare two calibrations of one model",
        )
    for site in SITES:
        for level in levels:
            a, b = (
                np.array([found.threshold(layer, site, level) for layer in range(found.layers)])
                for found in (first, second)
            )
            if (a > 0).all():
                apart = np.abs(b / a - 1)
                layer = int(apart.argmax())
                among = float(np.median(b / a)), float(apart[layer]), layer
                yield Difference(site, level, float(a.mean()), float(b.mean()), *among)
            else:
                yield Difference(site, level, float(a.mean()), float(b.mean()), None, None, None)
