"""What a store says about itself: the content of attrs["teal"] on the store and on each level.

Frozen dataclasses with a way to attributes and back, and the comparison that decides whether a run may resume
a store. Opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from teal_cli.errors import UsageError
from teal_cli.store.schema import BITORDER, COMPARE, SCHEMA, VALUE_DTYPES, block_tokens, level_name
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES


@dataclass(frozen=True)
class StoreHeader:
    """Provenance and shape of a store; everything here must be equal for a run to resume it.

    Attributes:
        model: name of the model in the registry.
        model_revision: revision or sha256 of its source, None where there is none.
        config_sha256: sha256 of the model's configuration.
        calibration: id of the calibration that gave the thresholds, None at sparsity 0 only.
        dtype: what the model computed in.
        prompts: JSON object on the prompts; `sequence` of a row is the index of its prompt. Keys the reader
            knows: `texts` (list of str, one per sequence).
        seed: seed of sampling.
        sampling: JSON object, e.g. {"temperature": 0.8, "top_k": 200}.
        backend: the sparse backend that consumed the rows.
        layers: number of layers L.
        channels: K of each site.
        value_dtype: bfloat16, float16 or float32; by default `dtype`.
        block_tokens: tokens per block T; by default from `schema.block_tokens`.
    """

    model: str
    model_revision: str | None
    config_sha256: str
    calibration: str | None
    dtype: str
    prompts: Mapping[str, Any]
    seed: int | None
    sampling: Mapping[str, Any]
    backend: str
    layers: int
    channels: Mapping[str, int]
    value_dtype: str = ""
    block_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dtype", self.value_dtype or self.dtype)
        if self.value_dtype not in VALUE_DTYPES:
            raise UsageError(
                f"a store cannot hold {self.value_dtype} values",
                hint=f"use one of {', '.join(VALUE_DTYPES)}",
            )
        if set(self.channels) != set(SITES) or min(self.channels.values()) < 1 or self.layers < 1:
            raise ValueError(f"channels must give a positive K for each of {SITES}, and layers be positive")
        if not self.block_tokens:
            itemsize = VALUE_DTYPES[self.value_dtype].itemsize
            object.__setattr__(self, "block_tokens", block_tokens(self.channels.values(), itemsize))

    def to_attributes(self, *, teal_version: str, complete: bool) -> dict[str, Any]:
        """The JSON object of attrs["teal"] on the store."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["channels"] = {site: int(self.channels[site]) for site in SITES}
        return {
            "schema": SCHEMA,
            "teal_version": teal_version,
            # The same types that reading back gives, and an early error for what is not JSON.
            **json.loads(json.dumps(own)),
            "compare": COMPARE,
            "bitorder": BITORDER,
            "complete": complete,
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> StoreHeader:
        """The header that `to_attributes` wrote.

        Raises:
            KeyError: a field is missing.
        """
        return cls(**{f.name: attributes[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class LevelHeader:
    """One sparsity level of a store.

    Attributes:
        target: sparsity target in [0, 1); also names the level.
        allocation: how the plan spread it over projections, e.g. "uniform".
        thresholds: float32 [layers, 7], projections in the order q k v o gate up down.
        max_tokens: upper bound of the rows that will be written.
    """

    target: float
    allocation: str
    thresholds: np.ndarray = field(repr=False, compare=False)
    max_tokens: int

    def __post_init__(self) -> None:
        thresholds = np.ascontiguousarray(self.thresholds, dtype=np.float32)
        if thresholds.ndim != 2 or thresholds.shape[1] != len(PROJECTIONS):
            raise ValueError(f"thresholds must be [layers, {len(PROJECTIONS)}], got {thresholds.shape}")
        object.__setattr__(self, "thresholds", thresholds)

    @property
    def name(self) -> str:
        """The level's group, e.g. `s0.50`."""
        return level_name(self.target)

    def to_attributes(self, *, tokens_committed: int, complete: bool) -> dict[str, Any]:
        """The JSON object of attrs["teal"] on the level."""
        return {
            "target": float(self.target),
            "allocation": self.allocation,
            "max_tokens": int(self.max_tokens),
            "tokens_committed": int(tokens_committed),
            "complete": complete,
        }


def site_threshold(thresholds: np.ndarray, site: str) -> np.ndarray:
    """Lowest threshold of a site's projections, the one stored rows passed: float32 [..., 7] -> [...]."""
    columns = [PROJECTIONS.index(projection) for projection in SITE_PROJECTIONS[site]]
    return thresholds[..., columns].min(axis=-1)


_NO_TOP_P = {"top_p": 1.0}
"""What a store's `sampling` means that was written before there was a top-p."""


def differing_fields(mine: StoreHeader, found: StoreHeader) -> list[str]:
    """Names of the fields in which the header of a run differs from the one a store was made with."""
    a = mine.to_attributes(teal_version="", complete=False)
    b = found.to_attributes(teal_version="", complete=False)
    a["sampling"], b["sampling"] = _NO_TOP_P | a["sampling"], _NO_TOP_P | b["sampling"]
    return [f.name for f in fields(StoreHeader) if a[f.name] != b[f.name]]


def differing_level_fields(mine: LevelHeader, attributes: Mapping[str, Any], thresholds: np.ndarray) -> list[str]:
    """The same for one level, given the level's attrs["teal"] and its thresholds as stored."""
    wanted = mine.to_attributes(tokens_committed=0, complete=False)
    names = [name for name in ("target", "allocation", "max_tokens") if wanted[name] != attributes.get(name)]
    same = thresholds.shape == mine.thresholds.shape and (thresholds == mine.thresholds).all()
    return [f"{mine.name} {name}" for name in (names if same else [*names, "thresholds"])]
