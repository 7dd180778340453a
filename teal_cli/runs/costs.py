"""What levels are known to cost: `teal eval` leaves its perplexities beside the model, `teal chat` looks them up.

One small file for each text and each way of scoring it, so that levels which were evaluated apart stand side by side.
A plan is known by what it drops, not by its name: of one that was replaced nothing is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teal_cli.files import read_json, write_json
from teal_cli.registry.entry import ModelEntry
from teal_cli.runs.plans import Level
from teal_cli.sparsity.plan import dense_plan

NOTABLE: Final = 0.10
"""An increase of perplexity that a user is told of."""

_FOLDER: Final = "evaluations"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a level costs on one text.

    Attributes:
        increase: perplexity over that of the dense model, less 1.
        dataset: the text. tokens: how many were scored.
    """

    increase: float
    dataset: str
    tokens: int


def record_costs(
    entry: ModelEntry, settings: Mapping[str, Any], dataset: str, tokens: int, perplexities: Mapping[str, float]
) -> None:
    """Keep what an evaluation found, with what is known of the same text already.

    Args:
        settings: what must be equal for perplexities to stand side by side, JSON values.
        perplexities: `Level.key` -> perplexity.
    """
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    file = entry.home / _FOLDER / f"{name}.json"
    earlier = _read(file)
    found = {"dataset": dataset, "tokens": tokens, "perplexity": {**(earlier[1] if earlier else {}), **perplexities}}
    with suppress(OSError):  # the evaluation itself is told and saved elsewhere
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"schema": 1, "settings": dict(settings), **found})


def known_cost(entry: ModelEntry, level: Level) -> Cost | None:
    """What a level costs on the longest text it was evaluated on, the dense model as well; None where there is none."""
    dense = Level(None, dense_plan(len(level.plan.thresholds))).key
    costs = []
    for file in sorted(entry.home.glob(f"{_FOLDER}/*.json")):
        if (found := _read(file)) and {dense, level.key} <= found[1].keys():
            (dataset, tokens), known = found
            costs.append(Cost(known[level.key] / known[dense] - 1, dataset, tokens))
    return max(costs, key=lambda cost: cost.tokens, default=None)


def _read(file: Path) -> tuple[tuple[str, int], dict[str, float]] | None:
    """The text and its length, and `Level.key` -> perplexity; None where there is no file, or a damaged one."""
    try:
        found = read_json(file)
        perplexities = {str(key): float(value) for key, value in found["perplexity"].items()}
        return (str(found["dataset"]), int(found["tokens"])), perplexities
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
