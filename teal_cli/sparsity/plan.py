"""A plan: which threshold each projection of each layer uses, and the sparsity it is meant to give.

Decoding, dumps and evaluation take a plan and nothing else from this room. `uniform_plan` gives every
projection the same sparsity; other allocations make the same object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teal_cli.checks import check_sparsity
from teal_cli.errors import TealError
from teal_cli.files import disk_errors, read_json, write_json
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.criterion import Scoring
from teal_kernels.spec import PROJECTIONS, SITES, columns
from teal_kernels.thresholds import Thresholds


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Thresholds for a whole model. The arrays are read-only.

    Attributes:
        target: the sparsity asked for, over the model.
        allocation: how it is spread, e.g. `uniform`.
        sparsity: float64 [layers, 7], the target of each projection, in the order of `PROJECTIONS`.
        thresholds: float32 [layers, 7]; an entry whose score is at most t is dropped. 0.0 drops zeros only; a negative
            one, which an imported calibration of TEAL can give at low sparsity, drops nothing. Under the criterion
            `topk` they are counts: how many entries of each row are dropped.
        calibration: id of the calibration that the thresholds come from; None for a plan that needs none.
        scoring: how entries are scored; by default by their magnitude.
        experts: float32 [layers, E], of a mixture of experts: the thresholds of each expert's `down`, not negative,
            in whose place `thresholds` has what the layer's experts give together; None where that serves all.
    """

    target: float
    allocation: str
    sparsity: NDArray[np.float64]
    thresholds: NDArray[np.float32]
    calibration: str | None
    scoring: Scoring = field(default_factory=Scoring)
    experts: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        shape = self.thresholds.shape
        if shape != self.sparsity.shape or len(shape) != 2 or shape[1] != len(PROJECTIONS):
            raise ValueError(f"a plan of shapes {self.sparsity.shape} and {shape}")
        self.sparsity.flags.writeable = False
        self.thresholds.flags.writeable = False
        if self.experts is not None:
            if self.experts.ndim != 2 or len(self.experts) != len(self.thresholds):
                raise ValueError(f"a plan of {len(self.thresholds)} layers and experts {self.experts.shape}")
            self.experts.flags.writeable = False

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.thresholds)

    def site_threshold(self, layer: int, site: str) -> float:
        """The lowest threshold among the projections that read a site: what every one of them drops."""
        return float(self.thresholds[layer, columns(site)].min())

    def applied(self) -> Thresholds:
        """What steps and passes compare with."""
        return self.scoring.thresholds(self.thresholds, self.experts)

    def by_projection(self) -> dict[str, list[float]]:
        """Projection -> its threshold in each layer."""
        return {name: self.thresholds[:, i].tolist() for i, name in enumerate(PROJECTIONS)}

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` gives the same plan back, bit for bit."""
        return {
            "target": self.target,
            "allocation": self.allocation,
            "calibration": self.calibration,
            "sparsity": {name: self.sparsity[:, i].tolist() for i, name in enumerate(PROJECTIONS)},
            "thresholds": self.by_projection(),
            **({} if self.experts is None else {"experts": self.experts.tolist()}),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan that `to_json` described.

        Raises:
            TealError: a value is missing or of the wrong kind.
        """
        try:
            sparsity = np.array([value["sparsity"][name] for name in PROJECTIONS], np.float64).T.copy()
            thresholds = np.array([value["thresholds"][name] for name in PROJECTIONS], np.float32).T.copy()
            experts = np.array(value["experts"], np.float32) if "experts" in value else None
            found = cls(value["target"], value["allocation"], sparsity, thresholds, value["calibration"])
            return replace(found, experts=experts)
        except (KeyError, TypeError, ValueError) as error:
            raise TealError(f"this is not a plan: {error}") from error

    def save(self, file: Path) -> None:
        """Write the plan as JSON; a file that is there is replaced at once or not at all."""
        with disk_errors(file.parent):
            write_json(file, self.to_json())

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            TealError: the file cannot be read, or is no plan.
        """
        try:
            return cls.from_json(read_json(file))
        except (OSError, ValueError) as error:
            raise TealError(f"{file} cannot be read as a plan: {error}") from error


def dense_plan(layers: int) -> Plan:
    """Sparsity 0 without a calibration: every threshold is 0.0, and nothing but zeros is dropped."""
    shape = (layers, len(PROJECTIONS))
    return Plan(0.0, "uniform", np.zeros(shape), np.zeros(shape, np.float32), None)


def uniform_plan(calibration: Calibration, sparsity: float) -> Plan:
    """The same sparsity for every projection of every layer (TEAL, section 4.2). Sparsity 0 drops nothing but zeros.

    Raises:
        UsageError: a sparsity outside [0, 1).
        TealError: the calibration has no counts for some layer.
    """
    check_sparsity(sparsity)
    if sparsity == 0.0:
        return dense_plan(calibration.layers)
    thresholds = np.empty((calibration.layers, len(PROJECTIONS)), np.float32)
    for layer in range(calibration.layers):
        for site in SITES:
            thresholds[layer, columns(site)] = calibration.threshold(layer, site, sparsity)
    experts = expert_thresholds(calibration, [sparsity] * calibration.layers)
    return Plan(sparsity, "uniform", np.full(thresholds.shape, sparsity), thresholds, calibration.id, experts=experts)


def expert_thresholds(calibration: Calibration, levels: Sequence[float]) -> NDArray[np.float32] | None:
    """Thresholds of each expert's `down`, for its sparsity in each layer: float32 [layers, E]; None where the
    calibration knows no experts."""
    found = [calibration.expert_thresholds(layer, level) for layer, level in enumerate(levels)]
    return None if any(row is None for row in found) else np.array(found, np.float32)
