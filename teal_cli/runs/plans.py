"""The plans that a command works with: uniform ones by their target, and those of the registry by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teal_cli.checks import did_you_mean
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.model.weights import config_sha256
from teal_cli.registry.registry import ModelEntry
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.named import MANIFEST, NamedPlan
from teal_cli.sparsity.plan import Plan, dense_plan, uniform_plan


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """A plan as a command was asked for it.

    Attributes:
        name: its name in the registry; None for a uniform plan that was asked for by its target.
    """

    name: str | None
    plan: Plan

    @property
    def key(self) -> str:
        """What identifies the plan among results: its label, and a digest of what it drops."""
        scoring = self.plan.scoring
        digest = hashlib.sha256(self.plan.thresholds.tobytes() + scoring.criterion.encode())
        for arrays in (scoring.scale, scoring.centre):
            for site in sorted(arrays):
                digest.update(site.encode() + arrays[site].tobytes())
        return f"{self.label} {digest.hexdigest()[:12]}"

    @property
    def label(self) -> str:
        """How it is shown: the name, or the target."""
        return self.name or f"{self.plan.target:g}"


def plan_names(entry: ModelEntry) -> tuple[str, ...]:
    """Names of a model's plans, sorted."""
    return tuple(sorted(file.parent.name for file in entry.home.glob(f"plans/*/{MANIFEST}")))


def plan_folder(entry: ModelEntry, name: str) -> Path:
    """Where a plan of this name belongs; it need not exist."""
    return entry.home / "plans" / name


def find_plan(entry: ModelEntry, name: str) -> NamedPlan:
    """A plan of a model, by its name or as a folder.

    Raises:
        NotFoundError: there is none of that name.
        UsageError: it was made for another model.
        TealError: it is damaged.
    """
    if (Path(name) / MANIFEST).is_file():
        found = NamedPlan.load(Path(name))
    else:
        names = plan_names(entry)
        if name not in names:
            there = f"it has {', '.join(names)}" if names else f"`teal plan make -m {entry.name}` makes one"
            raise NotFoundError(f"{entry.name} has no plan called {name!r}", hint=did_you_mean(name, names) + there)
        found = NamedPlan.load(plan_folder(entry, name))
    if found.config_sha256 != config_sha256(entry.path):
        raise UsageError(
            f"the plan {found.name} was made for {found.model}, not for {entry.name}",
            hint=f"make one for this model: `teal plan make -m {entry.name}`",
        )
    return found


def levels_of(
    entry: ModelEntry,
    layers: int,
    sparsities: Sequence[float],
    names: Sequence[str],
    calibration: Calibration | None,
) -> tuple[Level, ...]:
    """The plans that were asked for, in that order, each once.

    Args:
        sparsities: targets of uniform plans.
        names: plans of the registry; not together with `sparsities`.
        calibration: of the uniform plans; None where only 0 is asked for.

    Raises:
        UsageError: both kinds, or nothing at all; a plan of another model.
        NotFoundError: no such plan, or no calibration.
    """
    if sparsities and names:
        raise UsageError("a plan says its own sparsity", hint="give either --plan or --sparsity")
    if not sparsities and not names:
        raise UsageError("no level was asked for", hint="give --sparsity 0,0.5 or --plan NAME")
    if names:
        return tuple(Level(name, find_plan(entry, name).plan) for name in dict.fromkeys(names))
    levels = []
    for target in dict.fromkeys(sparsities):
        assert calibration is not None or not target
        levels.append(Level(None, uniform_plan(calibration, target) if calibration and target else dense_plan(layers)))
    return tuple(levels)
