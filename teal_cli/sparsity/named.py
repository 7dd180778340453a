"""A plan with a name: what lies in a model's `plans/<name>/`, with where it comes from and what it gained.

`plan.json` holds everything but the arrays of a criterion (factors and constants per channel), which lie beside it in
`scoring.npz`, whose checksum the manifest names.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import disk_errors, new_folder, read_json, write_json
from teal_cli.sparsity.criterion import MAGNITUDE, TOPK, Scoring
from teal_cli.sparsity.plan import Plan
from teal_kernels.spec import SITES

SCHEMA: Final = "teal-plan/1"
MANIFEST: Final = "plan.json"
ARRAYS: Final = "scoring.npz"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, eq=False)
class NamedPlan:
    """A plan of a model of the registry.

    Attributes:
        name: its name among the plans of the model.
        model: name of the model. config_sha256: of its config.json; a plan is refused for any other.
        created: UTC, ISO 8601.
        made: how, as JSON: text, tokens, settings of the allocation, seconds, and what it gained over a uniform plan.
    """

    name: str
    plan: Plan
    model: str
    config_sha256: str
    created: str
    made: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the plan as `folder`: whole or not at all, in place of one that is there.

        Raises:
            UsageError: its name is none.
            TealError: the disk refuses.
        """
        check_name(self.name)
        scoring, arrays = self.plan.scoring, io.BytesIO()
        named: dict[str, Any] = {f"scale/{site}": value for site, value in scoring.scale.items()}
        named |= {f"centre/{site}": value for site, value in scoring.centre.items()}
        np.savez(arrays, **named)
        content = arrays.getvalue()
        manifest = {
            "schema": SCHEMA,
            "name": self.name,
            "model": self.model,
            "config_sha256": self.config_sha256,
            "created": self.created,
            "criterion": scoring.criterion,
            "arrays_sha256": hashlib.sha256(content).hexdigest(),
            "made": dict(self.made),
            **self.plan.to_json(),
        }
        with disk_errors(folder), new_folder(folder, replace=True) as partial:
            (partial / ARRAYS).write_bytes(content)
            write_json(partial / MANIFEST, manifest)

    @classmethod
    def load(cls, folder: Path) -> NamedPlan:
        """Read what `save` wrote.

        Raises:
            NotFoundError: there is none.
            TealError: it is damaged.
        """
        try:
            manifest = read_json(folder / MANIFEST)
            content = (folder / ARRAYS).read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest["arrays_sha256"]:
                raise ValueError(f"{ARRAYS} is not the one that {MANIFEST} names")
            scoring = _scoring(manifest["criterion"], content)
            plan = replace(Plan.from_json(manifest), scoring=scoring)
            named = {key: manifest[key] for key in ("model", "config_sha256", "created", "made")}
            return cls(folder.name, plan, **named)
        except FileNotFoundError:
            raise NotFoundError(f"there is no plan at {folder}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TealError(
                f"the plan {folder} is damaged: {error}", hint="remove it with `teal plan rm` and make it again"
            ) from error


def _scoring(criterion: str, content: bytes) -> Scoring:
    """The arrays of a criterion, checked: float32, finite, factors positive."""
    scale: dict[str, NDArray[np.float32]] = {}
    centre: dict[str, NDArray[np.float32]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key in arrays.files:
            kind, _, site = key.partition("/")
            value = arrays[key]
            if site not in SITES or value.dtype != np.float32 or not np.isfinite(value).all():
                raise ValueError(f"{ARRAYS} holds an unusable array {key}")
            if kind == "scale" and (value <= 0).any():
                raise ValueError(f"{ARRAYS} holds a factor in {key} that is not positive")
            (scale if kind == "scale" else centre)[site] = value
    if criterion in (MAGNITUDE, TOPK) and (scale or centre):
        raise ValueError(f"a plan by {criterion} has neither factors nor constants")
    return Scoring(criterion, scale, centre)


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a plan.

    Raises:
        UsageError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a plan",
            hint="use up to 100 letters, digits, dots, dashes and underscores",
        )


def remove(folder: Path) -> None:
    """Delete a plan: the manifest first, so that an interrupted removal leaves none."""
    with disk_errors(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
