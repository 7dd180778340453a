"""What a store says about itself: the content of attrs["teal"] on the store and on each level.

Frozen dataclasses with a way to attributes and back, and the comparison that decides whether a run may resume
a store. What is read is checked field by field: a value of the wrong type or out of range is an error that
names it. Opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import numpy as np

from teal_cli.errors import UsageError
from teal_cli.sparsity.criterion import TOPK
from teal_cli.store.schema import (
    BITORDER,
    COLLECTION,
    COMPARE,
    EXPERT_SITE,
    EXPERT_THRESHOLDS,
    MAX_BLOCK_BYTES,
    MAX_CHANNELS,
    MAX_LAYERS,
    MAX_LEVELS,
    MAX_TOKENS,
    OPTIONAL_COLUMNS,
    SCHEMA,
    SCHEMA_1,
    TOKEN_COLUMNS,
    VALUE_DTYPES,
    StoredMixture,
    block_tokens,
    is_part_name,
    items,
    level_name,
    parse_level,
    take,
)
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES

MAGNITUDE: Final[Mapping[str, Any]] = {"name": "magnitude"}
_SINCE_2: Final = ("criterion", "plan", "run", "columns")


@dataclass(frozen=True)
class StoreHeader:
    """Provenance and shape of a store; everything here but `run` must be equal for a run to resume it.

    Attributes:
        model: name of the model in the registry.
        model_revision: revision or sha256 of its source, None where there is none.
        config_sha256: sha256 of the model's configuration.
        calibration: id of the calibration that gave the thresholds, None at sparsity 0 only.
        dtype: what the model computed in.
        prompts: JSON object on the prompts; `sequence` of a row is the index of its prompt. Keys the reader
            knows: `texts` (list of str, one per sequence), `token_ids` (list of list of int).
        seed: seed of sampling.
        sampling: JSON object, e.g. {"temperature": 0.8, "top_k": 200}.
        backend: the sparse backend that consumed the rows.
        layers: number of layers L.
        channels: K of each site.
        value_dtype: bfloat16, float16 or float32; by default `dtype`.
        block_tokens: tokens per block T; by default from `schema.block_tokens`.
        criterion: how entries were scored: JSON object with its `name`.
        plan: name of the plan in the registry, None where the thresholds come straight from the calibration.
        run: JSON object, what it takes beyond the fields above to go on or to repeat; see `runs.stored`.
        columns: which of `schema.OPTIONAL_COLUMNS` the levels have.
        mixture: of a mixture of experts: how many experts a layer has, how many of them a token passes, and which
            layers have them; else None, and no attribute.
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
    criterion: Mapping[str, Any] = field(default_factory=lambda: MAGNITUDE)
    plan: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    mixture: StoredMixture | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dtype", self.value_dtype or self.dtype)
        if self.value_dtype not in VALUE_DTYPES:
            raise UsageError(
                f"a store cannot hold {self.value_dtype} values",
                hint=f"use one of {', '.join(VALUE_DTYPES)}",
            )
        widths = self.channels.values()
        if set(self.channels) != set(SITES) or not all(1 <= width <= MAX_CHANNELS for width in widths):
            raise ValueError(f"channels must give a positive K for each of {SITES}, at most {MAX_CHANNELS}")
        if not 1 <= self.layers <= MAX_LAYERS:
            raise ValueError(f"layers must be 1 to {MAX_LAYERS}, not {self.layers}")
        itemsize = VALUE_DTYPES[self.value_dtype].itemsize
        if not self.block_tokens:
            object.__setattr__(self, "block_tokens", block_tokens(widths, itemsize))
        if not 1 <= self.block_tokens * max(widths) * itemsize <= MAX_BLOCK_BYTES or self.block_tokens < 1:
            raise ValueError(f"block_tokens is {self.block_tokens}, which is no size of a block")
        if self.mixture is not None:
            self.mixture.check(self.layers, self.channels[EXPERT_SITE])
        if not set(self.columns) <= set(OPTIONAL_COLUMNS):
            raise ValueError(f"columns may be {list(OPTIONAL_COLUMNS)}, not {list(self.columns)}")

    @property
    def ranked(self) -> bool:
        """Whether thresholds are counts: how many entries of a row are dropped."""
        return bool(self.criterion["name"] == TOPK)

    @property
    def token_columns(self) -> dict[str, np.dtype]:
        """The columns that each level has -> their data types."""
        return TOKEN_COLUMNS | {name: OPTIONAL_COLUMNS[name] for name in self.columns}

    def to_attributes(self) -> dict[str, Any]:
        """The fields as JSON values, of the types that reading back gives; an early error for what is not JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.mixture is None:
            del own["mixture"]
        else:
            own["mixture"] = asdict(self.mixture)
        own["channels"] = {site: int(self.channels[site]) for site in SITES}
        return dict(json.loads(json.dumps(own)))

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> StoreHeader:
        """The header that `to_attributes` wrote, checked.

        Raises:
            ValueError: a field is missing, of the wrong type, or out of range.
        """
        given = dict(attributes)
        if given.get("schema") == SCHEMA_1:
            given |= {"criterion": dict(MAGNITUDE), "plan": None, "run": {}, "columns": []}
        for name in ("model", "config_sha256", "dtype", "value_dtype", "backend"):
            take(given, name, str)
        for name in ("model_revision", "calibration", "plan"):
            take(given, name, str, optional=True)
        for name in ("prompts", "sampling", "channels", "criterion", "run"):
            take(given, name, dict)
        for name in ("layers", "block_tokens"):
            take(given, name, int)
        take(given, "seed", int, optional=True)
        for site in given["channels"]:
            take(given["channels"], site, int)
        take(given["criterion"], "name", str)
        given["columns"] = tuple(items(given, "columns", str))
        given["mixture"] = StoredMixture.from_attributes(given["mixture"]) if "mixture" in given else None
        _check_prompts(given["prompts"])
        try:
            return cls(**{f.name: given[f.name] for f in fields(cls)})
        except UsageError as error:
            raise ValueError(error.message) from error


@dataclass(frozen=True)
class LevelHeader:
    """One sparsity level of a store.

    Attributes:
        target: sparsity target in [0, 1); also names the level.
        allocation: how the plan spread it over projections, e.g. "uniform".
        thresholds: float32 [layers, 7] of scores, projections in the order q k v o gate up down; under the criterion
            `topk`, how many entries of a row are dropped.
        max_tokens: upper bound of the rows that will be written.
        scale: site -> float32 [layers, P, K], a factor of the score per projection and channel; mostly empty.
        centre: site -> float32 [layers, K], what was taken from a vector before it was compared; mostly empty.
        experts: float32 [layers, E], of a mixture of experts what the part of a row that is an expert's was compared
            with; the number of `down` in `thresholds` is the lowest of them. None for another model.
    """

    target: float
    allocation: str
    thresholds: np.ndarray = field(repr=False, compare=False)
    max_tokens: int
    scale: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    centre: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    experts: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        thresholds = np.ascontiguousarray(self.thresholds, dtype=np.float32)
        if thresholds.ndim != 2 or thresholds.shape[1] != len(PROJECTIONS):
            raise ValueError(f"thresholds must be [layers, {len(PROJECTIONS)}], got {thresholds.shape}")
        if not 0 <= self.max_tokens <= MAX_TOKENS:
            raise ValueError(f"a level holds at most {MAX_TOKENS} tokens, not {self.max_tokens}")
        object.__setattr__(self, "thresholds", thresholds)

    @property
    def name(self) -> str:
        """The level's group, e.g. `s0.50`."""
        return level_name(self.target)

    def site_arrays(self, site: str) -> dict[str, np.ndarray]:
        """`centre` and `scale` of a site, where it has them."""
        parts = {"centre": self.centre, "scale": self.scale}
        return {name: np.asarray(part[site], np.float32) for name, part in parts.items() if site in part}

    def to_attributes(self, *, schema: str = SCHEMA) -> dict[str, Any]:
        """The JSON object of attrs["teal"] on a new level."""
        own = {
            "target": float(self.target),
            "allocation": self.allocation,
            "max_tokens": int(self.max_tokens),
            "tokens_committed": 0,
            "complete": False,
        }
        if schema == SCHEMA_1:
            return own
        return own | {"centre": [s for s in SITES if s in self.centre], "scale": [s for s in SITES if s in self.scale]}


@dataclass(frozen=True)
class StoreState:
    """attrs["teal"] of a store as they were read, checked.

    Attributes:
        schema: `schema.SCHEMA`, `schema.SCHEMA_1` or `schema.COLLECTION`.
        levels: the levels it has, as the root lists them; empty where the schema has no such list.
        digest: of a complete store, see `store.digest`.
        attributes: all of them, as they stand in the file.
        parts: of a collection, names of the stores that it is made of.
    """

    header: StoreHeader
    schema: str
    levels: tuple[str, ...]
    complete: bool
    digest: str | None
    attributes: Mapping[str, Any]
    parts: tuple[str, ...] = ()

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> StoreState:
        """Raises ValueError as `StoreHeader.from_attributes`."""
        header = StoreHeader.from_attributes(attributes)
        complete = take(attributes, "complete", bool)
        if attributes["schema"] == SCHEMA_1:
            return cls(header, SCHEMA_1, (), complete, None, attributes)
        levels = items(attributes, "levels", str)
        if not levels or len(set(levels)) < len(levels) or len(levels) > MAX_LEVELS:
            raise ValueError(f"levels must be 1 to {MAX_LEVELS} different names")
        for name in levels:
            if not is_level_name(name):
                raise ValueError(f"{name!r} in levels names no level")
        digest = take(attributes, "digest", str, optional=True)
        if attributes["schema"] != COLLECTION:
            return cls(header, SCHEMA, tuple(levels), complete, digest, attributes)
        parts = items(attributes, "parts", str)
        if not parts or len(set(parts)) < len(parts) or not all(map(is_part_name, parts)):
            raise ValueError("parts must be different names such as part-00000")
        return cls(header, COLLECTION, tuple(levels), complete, digest, attributes, tuple(parts))


@dataclass(frozen=True)
class LevelState:
    """attrs["teal"] of a level as they were read, checked. `centre` and `scale` are the sites that have one."""

    target: float
    allocation: str
    max_tokens: int
    tokens_committed: int
    complete: bool
    centre: tuple[str, ...]
    scale: tuple[str, ...]
    digest: str | None

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], name: str) -> LevelState:
        """The state of the level of this name.

        Raises:
            ValueError: a field is missing, of the wrong type, or at odds with the others or the name.
        """
        target = float(take(attributes, "target", (int, float)))
        if not 0.0 <= target < 1.0 or level_name(target) != name:
            raise ValueError(f"its target is {target}, which is not that of {name}")
        most, committed = take(attributes, "max_tokens", int), take(attributes, "tokens_committed", int)
        if not 0 <= committed <= most <= MAX_TOKENS:
            raise ValueError(f"tokens_committed is {committed}, but its arrays are shaped for at most {most}")
        centre, scale = (tuple(items(attributes, key, str)) if key in attributes else () for key in ("centre", "scale"))
        if not {*centre, *scale} <= set(SITES):
            raise ValueError("centre or scale names what is no site")
        return cls(
            target,
            take(attributes, "allocation", str),
            most,
            committed,
            take(attributes, "complete", bool),
            centre,
            scale,
            take(attributes, "digest", str, optional=True) if "digest" in attributes else None,
        )


def new_attributes(
    header: StoreHeader, levels: list[str], *, teal_version: str, parts: Sequence[str] = ()
) -> dict[str, Any]:
    """The JSON object of attrs["teal"] on a new store; with `parts`, on a new collection."""
    return {
        "schema": COLLECTION if parts else SCHEMA,
        "teal_version": teal_version,
        **header.to_attributes(),
        "levels": levels,
        "compare": COMPARE,
        "bitorder": BITORDER,
        **({"parts": list(parts)} if parts else {}),
        "complete": False,
        "digest": None,
    }


def is_level_name(name: str) -> bool:
    """Whether this is how `level_name` writes a target."""
    try:
        return name.startswith("s") and level_name(parse_level(name)) == name
    except UsageError:
        return False


def _check_prompts(prompts: Mapping[str, Any]) -> None:
    counts = []
    if "texts" in prompts:
        counts.append(len(items(prompts, "texts", str)))
    if "token_ids" in prompts:
        lists = items(prompts, "token_ids", list)
        if not all(isinstance(i, int) and 0 <= i <= MAX_TOKENS for ids in lists for i in ids):
            raise ValueError("token_ids has an entry that is no token id")
        counts.append(len(lists))
    if len(set(counts)) > 1:
        raise ValueError("texts and token_ids are not as many")


def site_widths(header: StoreHeader, site: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the optional arrays of a site."""
    channels = header.channels[site]
    return {
        "centre": (header.layers, channels),
        "scale": (header.layers, len(SITE_PROJECTIONS[site]), channels),
    }


_NO_TOP_P = {"top_p": 1.0}
"""What a store's `sampling` means that was written before there was a top-p."""


def differing_fields(mine: StoreHeader, found: StoreState) -> list[str]:
    """Names of the fields in which the header of a run differs from the one a store was made with."""
    a, b = mine.to_attributes(), found.header.to_attributes()
    a["sampling"], b["sampling"] = _NO_TOP_P | a["sampling"], _NO_TOP_P | b["sampling"]
    skipped = {"run", *(_SINCE_2 if found.schema == SCHEMA_1 else ())}
    return [name for name in a if name not in skipped and a[name] != b[name]]


def differing_level_fields(mine: LevelHeader, found: LevelState, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The same for one level, given what it says and its arrays `thresholds`, `<site>/centre`, `<site>/scale`."""
    names = [name for name in ("target", "allocation", "max_tokens") if getattr(mine, name) != getattr(found, name)]
    wanted = {"thresholds": mine.thresholds}
    if mine.experts is not None:
        wanted[EXPERT_THRESHOLDS] = mine.experts
    for site in SITES:
        wanted |= {f"{site}/{name}": array for name, array in mine.site_arrays(site).items()}
    names += [name for name in {**wanted, **arrays} if not _same(wanted.get(name), arrays.get(name))]
    return [f"{mine.name} {name}" for name in names]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)
