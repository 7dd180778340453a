"""The plans that a command works with: uniform ones by their target, and those of the registry by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from teal_cli.checks import did_you_mean
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.model.config import load_config
from teal_cli.model.weights import config_sha256
from teal_cli.registry.registry import ModelEntry, Registry
from teal_cli.sparsity.calibration import Calibration, check_fits
from teal_cli.sparsity.named import MANIFEST, NamedPlan, check_name, remove
from teal_cli.sparsity.plan import Plan, dense_plan, uniform_plan
from teal_cli.sparsity.teal_lookup import read_lookup
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS


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
        if self.plan.experts is not None:
            digest.update(self.plan.experts.tobytes())
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
    names = {file.parent.name for home in entry.homes for file in home.glob(f"plans/*/{MANIFEST}")}
    return tuple(sorted(name for name in names if not name.startswith(".")))  # one that is being written is hidden


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
        places = [home / "plans" / name for home in entry.homes]
        found = NamedPlan.load(next(place for place in places if (place / MANIFEST).is_file()))
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


def calibration_of(levels: Sequence[Level]) -> str | None:
    """The id of the calibration that the levels were made from; None where every one is dense."""
    return next((level.plan.calibration for level in levels if level.plan.calibration), None)


def readable_plans(entry: ModelEntry) -> tuple[list[NamedPlan], list[str]]:
    """Every plan of a model that can be read, and what is wrong with those that cannot."""
    found, damaged = [], []
    for name in plan_names(entry):
        try:
            found.append(NamedPlan.load(plan_folder(entry, name)))
        except TealError as error:
            damaged.append(error.message)
    return found, damaged


def remove_plan(registry: Registry, entry: ModelEntry, name: str) -> None:
    """Delete a plan, damaged ones too.

    Raises:
        NotFoundError: there is none of that name.
    """
    if name not in plan_names(entry):
        there = f"it has {', '.join(plan_names(entry)) or 'none'}"
        raise NotFoundError(
            f"{entry.name} has no plan called {name!r}", hint=did_you_mean(name, plan_names(entry)) + there
        )
    with registry.lock(entry.name):
        remove(plan_folder(entry, name))


def import_plan(
    registry: Registry,
    model: str | None,
    folder: Path,
    target: float,
    *,
    calibration: str | None = None,
    name: str | None = None,
    force: bool = False,
) -> tuple[NamedPlan, list[str]]:
    """Make a plan of TEAL's `lookup/` folder, with the thresholds of a calibration.

    Returns:
        The plan, which lies in the registry, and remarks: where TEAL's weight shares are wrong for the model.

    Raises:
        UsageError: a plan of that name is there; a calibration of another model.
        NotFoundError, TealError: as `read_lookup` and `Registry.find_calibration`.
    """
    entry = registry.get(model)
    config = load_config(entry.path)
    found = Calibration.load(registry.find_calibration(entry.name, calibration))
    check_fits(found, config, entry.path, found.provenance.dtype or config.torch_dtype)
    sizes = np.array(list(config.projection_sizes().values()), np.float64)
    lookup = read_lookup(folder, config.layers, sizes, target)
    thresholds = np.zeros(lookup.levels.shape, np.float32)
    for layer, column in np.argwhere(lookup.levels > 0):
        site, level = PROJECTION_SITE[PROJECTIONS[column]], float(min(lookup.levels[layer, column], 0.99))
        thresholds[layer, column] = found.threshold(int(layer), site, level)
    plan = Plan(target, "greedy", lookup.levels, thresholds, found.id)
    name = name or f"teal-{target:g}"
    check_new(entry, name, force=force)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    named = NamedPlan(name, plan, entry.name, config_sha256(entry.path), created, {"imported": str(folder.resolve())})
    with registry.lock(entry.name):
        named.save(plan_folder(entry, name))
    notes = [
        f"TEAL's table gives {projection} {told:.1%} of a block, and in this model it has {true:.1%}"
        for projection, (told, true) in lookup.wrong.items()
    ]
    return named, notes


def check_new(entry: ModelEntry, name: str, *, force: bool) -> None:
    """Refuse a name that cannot be one, or that a plan has, unless `force` is to replace it.

    Raises:
        UsageError: it is refused.
    """
    check_name(name)
    if (plan_folder(entry, name) / MANIFEST).exists() and not force:
        raise UsageError(
            f"{entry.name} has a plan called {name}", hint="choose another --name, or replace it with --force"
        )
