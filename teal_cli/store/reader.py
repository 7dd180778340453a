"""Reading a store: lazy dense arrays per (level, layer, site or projection), and what lies beneath them.

    store = open_store("out.zarr")
    level = store.level(0.5)
    rows = level.projection(3, "gate")     # [token, channel], nothing read yet
    rows[level.rows(sequence=0)]           # float32, zeros where the kernel skipped

Only committed tokens are visible, so a store may be read while it is written; `ActivationStore.level` looks
again each time. Nothing that a block says is taken on trust: a row that was never written, a checksum that
does not match, a bitmap that disagrees with the row counts or a kept value of zero (a chunk that is missing
reads as zeros) is an error.

Needs no torch and nothing of a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import sizes_below
from teal_cli.store import layout
from teal_cli.store.arrays import ActivationArray, SiteReader
from teal_cli.store.header import StoreHeader
from teal_cli.store.packing import exceeds
from teal_cli.store.schema import TOKEN_COLUMNS, parse_level
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS, SITES


def open_store(path: str | os.PathLike[str]) -> ActivationStore:
    """Opens a store for reading.

    Raises:
        NotFoundError: nothing there.
        UsageError: not a teal store, or one of another schema.
        TealError: its attributes are damaged.
    """
    return ActivationStore(Path(path))


class ActivationStore:
    """A store open for reading. Use `open_store`.

    Attributes:
        path: its folder.
        attrs: attrs["teal"] as it stands in the file: model, calibration, prompts, seed, backend, ...
        header: the same as a `StoreHeader`.
        levels: names of the levels, from the lowest sparsity to the highest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        root = layout.open_root(path)
        self.header: StoreHeader = layout.read_header(root)
        self.attrs: Mapping[str, Any] = dict(root.attrs["teal"])  # type: ignore[arg-type]
        names = [entry.name for entry in path.iterdir() if entry.is_dir() and (entry / "zarr.json").is_file()]
        self.levels = tuple(sorted(names, key=parse_level))

    @property
    def complete(self) -> bool:
        """Whether the run that wrote it came to its end, as of when the store was opened."""
        return bool(self.attrs["complete"])

    def level(self, name: str | float) -> Level:
        """A level by name or target, with the tokens that are committed now.

        Raises:
            NotFoundError: no such level.
        """
        target = parse_level(name)
        for found in self.levels:
            if parse_level(found) == target:
                return Level(self, found)
        raise NotFoundError(f"{self.path} has no level {name}", hint=f"it has {', '.join(self.levels)}")

    def find(self, text: str) -> list[int]:
        """Sequences (indices of prompts) whose prompt contains the text; none if the store keeps no prompts."""
        return [index for index, prompt in enumerate(self.header.prompts.get("texts", ())) if text in prompt]

    def __repr__(self) -> str:
        levels = ", ".join(self.levels)
        return f"<ActivationStore {self.path}: {self.header.model}, {self.header.layers} layers, {levels}>"


@dataclass(frozen=True)
class Tokens:
    """The token columns of a level, one entry per row in the order of decoding.

    Attributes:
        token_id: uint32 [token], the token whose step the row belongs to.
        position: uint32 [token], its place in its sequence, prompt included.
        sequence: uint32 [token], index of the prompt; each sequence is one contiguous run.
        phase: uint8 [token], see `schema.PHASES`.
    """

    token_id: np.ndarray
    position: np.ndarray
    sequence: np.ndarray
    phase: np.ndarray

    def __len__(self) -> int:
        return len(self.token_id)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column by its name, as in a table."""
        if name not in TOKEN_COLUMNS:
            raise KeyError(name)
        column: np.ndarray = getattr(self, name)
        return column


class Level:
    """One sparsity level of a store, as of when it was opened. Use `ActivationStore.level`.

    Attributes:
        name: e.g. `s0.50`.
        target: sparsity target.
        allocation: how the plan spread it, e.g. "uniform".
        complete: whether all its tokens are there.
    """

    def __init__(self, store: ActivationStore, name: str) -> None:
        attributes = layout.level_attributes(store.path, name)
        self.store = store
        self.name = name
        self.target = float(attributes["target"])
        self.allocation = str(attributes["allocation"])
        self.complete = bool(attributes["complete"])
        self._tokens = int(attributes["tokens_committed"])
        self._sites: dict[str, SiteReader] = {}

    def __len__(self) -> int:
        return self._tokens

    @cached_property
    def thresholds(self) -> np.ndarray:
        """float32 [layer, projection], projections in the order q k v o gate up down."""
        return self._read("thresholds", slice(None))

    @cached_property
    def tokens(self) -> Tokens:
        """Which token each row belongs to."""
        return Tokens(**{name: self._read(name, slice(0, self._tokens)) for name in TOKEN_COLUMNS})

    def rows(self, sequence: int) -> slice:
        """The rows of one sequence, as a slice of the token axis.

        Raises:
            NotFoundError: no row of that sequence is committed.
        """
        found = np.flatnonzero(self.tokens.sequence == sequence)
        if not len(found):
            raise NotFoundError(f"level {self.name} has no row of sequence {sequence}")
        return slice(int(found[0]), int(found[-1]) + 1)

    def site(self, layer: int, site: str) -> ActivationArray:
        """The input vectors of a site of a layer, lazily, [token, channel]; thresholded at its lowest threshold.

        Raises:
            UsageError: no such site or layer.
        """
        if site not in SITES:
            raise UsageError(f"there is no site {site!r}", hint=f"sites: {', '.join(SITES)}")
        return ActivationArray(self.site_reader(site), self._layer(layer))

    def projection(self, layer: int, projection: str) -> ActivationArray:
        """What one linear layer consumed, lazily, [token, channel]: its site, thresholded again at its own threshold.

        Raises:
            UsageError: no such projection or layer.
        """
        if projection not in PROJECTION_SITE:
            raise UsageError(f"there is no projection {projection!r}", hint=f"projections: {', '.join(PROJECTIONS)}")
        layer = self._layer(layer)
        threshold = float(self.thresholds[layer, PROJECTION_INDEX[projection]])
        return ActivationArray(self.site_reader(PROJECTION_SITE[projection]), layer, threshold=threshold)

    def realised(self) -> np.ndarray:
        """Share of dropped entries over all tokens, float64 [layer, projection]; NaN where there is none."""
        kept = np.zeros((self.store.header.layers, len(PROJECTIONS)), np.int64)
        sizes = np.array([self._tokens * self.store.header.channels[PROJECTION_SITE[p]] for p in PROJECTIONS])
        for site, projections in SITE_PROJECTIONS.items():
            reader = self.site_reader(site)
            columns = [PROJECTION_INDEX[projection] for projection in projections]
            for index in range(reader.blocks):
                for layer, block in enumerate(reader.read_layers(index)):
                    for column in columns:
                        kept[layer, column] += np.count_nonzero(exceeds(block.values, self.thresholds[layer, column]))
        with np.errstate(invalid="ignore"):
            return 1.0 - kept / sizes

    def site_reader(self, site: str) -> SiteReader:
        """Block by block access to a site, for checks and statistics."""
        if site not in self._sites:
            self._sites[site] = SiteReader(
                self.store.path / self.name,
                site,
                channels=self.store.header.channels[site],
                block=self.store.header.block_tokens,
                tokens=self._tokens,
                where=f"{self.store.path}: {self.name}/{site}",
            )
        return self._sites[site]

    def _layer(self, layer: int) -> int:
        layers = self.store.header.layers
        if not -layers <= layer < layers:
            raise UsageError(f"there is no layer {layer}", hint=f"the model has layers 0 to {layers - 1}")
        return layer % layers

    def _read(self, name: str, key: slice) -> np.ndarray:
        try:
            return layout.as_numpy(layout.open_array(self.store.path / self.name, name)[key])
        except Exception as error:  # on damaged bytes codecs raise anything from ValueError to RuntimeError
            raise TealError(
                f"{self.store.path}: {self.name}/{name} is damaged: {error}", hint=layout.VERIFY_HINT
            ) from error

    def __repr__(self) -> str:
        return f"<Level {self.name}: {self._tokens} tokens, {self.allocation}>"


@dataclass(frozen=True)
class LevelInfo:
    """One level: committed tokens and sequences, the most tokens it was made for, and whether it is complete."""

    name: str
    target: float
    allocation: str
    tokens: int
    max_tokens: int
    sequences: int
    complete: bool


@dataclass(frozen=True)
class Match:
    """A sequence whose prompt has the text that was asked for; per level its rows [start, stop)."""

    sequence: int
    prompt: str
    rows: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class StoreInfo:
    """A store: attributes but for the prompts, size on disk, levels, and the prompts that were asked for."""

    path: str
    attributes: dict[str, object]
    prompts: int | None
    bytes: int
    files: int
    levels: list[LevelInfo]
    matches: list[Match] = field(default_factory=list)


def describe(store: ActivationStore, find: str | None = None) -> StoreInfo:
    """Collects it; with `find`, also the sequences whose prompt contains that text.

    Raises:
        TealError: attributes or token columns are damaged.
    """
    sizes = sizes_below(store.path)
    texts = store.header.prompts.get("texts")
    return StoreInfo(
        path=str(store.path),
        attributes={name: value for name, value in store.attrs.items() if name != "prompts"},
        prompts=None if texts is None else len(texts),
        bytes=sum(sizes.values()),
        files=len(sizes),
        levels=[_describe_level(store, name) for name in store.levels],
        matches=[] if find is None else [_match(store, sequence) for sequence in store.find(find)],
    )


def _describe_level(store: ActivationStore, name: str) -> LevelInfo:
    level = store.level(name)
    return LevelInfo(
        name=name,
        target=level.target,
        allocation=level.allocation,
        tokens=len(level),
        max_tokens=int(layout.level_attributes(store.path, name)["max_tokens"]),
        sequences=len(set(level.tokens.sequence.tolist())),
        complete=level.complete,
    )


def _match(store: ActivationStore, sequence: int) -> Match:
    rows = {}
    for name in store.levels:
        level = store.level(name)
        if (level.tokens.sequence == sequence).any():
            found = level.rows(sequence)
            rows[name] = (found.start, found.stop)
    return Match(sequence, store.header.prompts["texts"][sequence], rows)
