"""A store open for reading, and its levels: lazy dense arrays per (layer, site or projection), and what lies beneath.

Only committed tokens are visible, so a store may be read while it is written; `ActivationStore.level` looks
again each time. Nothing that a store says is taken on trust: metadata at odds with the schema or each other, a row
that was never written, a checksum that does not match, a bitmap that disagrees with the row counts or a kept value
of zero (a chunk that is missing reads as zeros) is an error. So is a store that was replaced since it was opened.

Needs no torch and nothing of a model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from teal_cli.errors import NotFoundError, TealError, UsageError, counted
from teal_cli.store import layout
from teal_cli.store.arrays import ActivationArray, Blocks, SiteReader
from teal_cli.store.header import LevelState, StoreHeader, StoreState
from teal_cli.store.metadata import (
    DAMAGE_HINT,
    VERIFY_HINT,
    as_numpy,
    level_state,
    open_array,
    read_constant,
    read_state,
    reason,
    require_store,
)
from teal_cli.store.packing import exceeds
from teal_cli.store.remote import Place, sizes_of
from teal_cli.store.schema import EXPERT_ARRAY, EXPERT_THRESHOLDS, NO_EXPERT, PHASES, parse_level
from teal_cli.store.tokens import Tokens, align, column_problems
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS, SITES
from teal_kernels.spec import columns as columns_of
from teal_kernels.thresholds import site_thresholds


class ActivationStore:
    """A store open for reading. Use `open_store`.

    Attributes:
        path: its folder, or its URL.
        attrs: attrs["teal"] as it stands in the file: model, calibration, prompts, seed, backend, ...
        header: the same as a `StoreHeader`.
        levels: names of the levels, from the lowest sparsity to the highest.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        require_store(path)
        self._opened: os.stat_result | None = None
        if isinstance(path, Path):
            # An open folder keeps its inode from being used again, so that `check_same` cannot be deceived.
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, folder)
            self._opened = os.fstat(folder)
        self.state: StoreState = read_state(path)
        self.header: StoreHeader = self.state.header
        self.attrs: Mapping[str, Any] = self.state.attributes
        self.levels = tuple(sorted(self.state.levels, key=parse_level))
        self.check_same()

    def check_same(self) -> None:
        """Raises TealError if another store stands where this one was opened: the two must not be mixed. Nothing
        can be told of a URL.
        """
        if self._opened is None or not isinstance(self.path, Path):
            return
        try:
            now: os.stat_result | None = self.path.stat()
        except OSError:
            now = None
        if now is None or not os.path.samestat(now, self._opened):
            raise TealError(f"the store {self.path} was replaced or removed since it was opened", hint="open it again")

    @property
    def complete(self) -> bool:
        """Whether the run that wrote it came to its end, as of when the store was opened."""
        return self.state.complete

    @property
    def sequences(self) -> int:
        """Number of sequences: prompts, or where it does not keep those, one more than the largest index of a row."""
        texts = self.header.prompts.get("texts")
        if texts is not None:
            return len(texts)
        return 1 + max(int(self.level(name).tokens.sequence.max(initial=0)) for name in self.levels)

    def level(self, name: str | float) -> Level:
        """A level by name or target, with the tokens that are committed now.

        Raises:
            NotFoundError: no such level.
        """
        target = parse_level(name)
        for found in self.levels:
            if parse_level(found) == target:
                return self._level(found)
        raise NotFoundError(f"{self.path} has no level {name}", hint=f"it has {', '.join(self.levels)}")

    def _level(self, name: str) -> Level:
        level = Level(self, name, level_state(self.path, name))
        self.check_same()
        return level

    def align(self, levels: Sequence[str | float] = ()) -> dict[str, np.ndarray]:
        """The rows that levels have in common, by sequence and position.

        Args:
            levels: names or targets; all of the store if none is given.

        Returns:
            Name of each level -> int64 [rows], its row indices: row i of each is the same place of the same sequence,
            in the order of (sequence, position). The tokens there differ if each level decoded on its own.

        Raises:
            NotFoundError: no such level.
            TealError: token columns are damaged.
        """
        found = [self.level(name) for name in levels or self.levels]
        rows = align([level.tokens for level in found])
        return {level.name: indices for level, indices in zip(found, rows, strict=True)}

    def find(self, text: str) -> list[int]:
        """Sequences (indices of prompts) whose prompt contains the text; none if the store keeps no prompts."""
        return [index for index, prompt in enumerate(self.header.prompts.get("texts", ())) if text in prompt]

    def text(self, sequence: int, level: str | float | None = None) -> list[str]:
        """The text of each token of a sequence, in the order of its rows; one after the other they are its text.

        A token that ends inside a character has an empty text, the one that completes it the whole character.

        Args:
            level: whose tokens; None takes the lowest sparsity.

        Raises:
            NotFoundError: no such level or sequence, or the model is not in the registry.
            UsageError, TealError: as `store.text.texts`.
        """
        from teal_cli.store.text import texts

        found = self.level(self.levels[0] if level is None else level)
        return texts(self.header, sequence, found.tokens.token_id[found.rows(sequence)].tolist())

    def __repr__(self) -> str:
        levels = self.levels if len(self.levels) <= 4 else (*self.levels[:2], "...", self.levels[-1])
        name, header = type(self).__name__, self.header
        return f"<{name} {self.path.name}: {header.model}, {header.layers} layers, {' '.join(levels)}>"


class Level:
    """One sparsity level of a store, as of when it was opened. Use `ActivationStore.level`.

    Attributes:
        name: e.g. `s0.50`.
        state: what it says about itself.
        target: sparsity target.
        allocation: how the plan spread it, e.g. "uniform".
        complete: whether all its tokens are there.
    """

    def __init__(self, store: ActivationStore, name: str, state: LevelState) -> None:
        self.store, self.state = store, state
        self.name = name
        self.target, self.allocation, self.complete = self.state.target, self.state.allocation, self.state.complete
        self._tokens = self.state.tokens_committed
        # Rows that its arrays have: those of its tokens, or room for all that may come.
        block = store.header.block_tokens
        self._most = self._tokens if self.complete else layout.capacity(self.state.max_tokens, block)
        self._sites: dict[str, Blocks] = {}

    def __len__(self) -> int:
        return self._tokens

    @cached_property
    def thresholds(self) -> np.ndarray:
        """float32 [layer, projection] of scores, projections in the order q k v o gate up down.

        Raises:
            TealError: damaged, or an entry was never written.
        """
        return self._constant("thresholds")

    @cached_property
    def scale(self) -> dict[str, np.ndarray]:
        """site -> float32 [layer, projection of the site, channel], the factors of the score; sites without: none."""
        return {site: self._constant(f"{site}/scale") for site in self.state.scale}

    @cached_property
    def centre(self) -> dict[str, np.ndarray]:
        """site -> float32 [layer, channel], what was taken from a vector; rows are what was left."""
        return {site: self._constant(f"{site}/centre") for site in self.state.centre}

    @cached_property
    def expert_thresholds(self) -> np.ndarray | None:
        """float32 [layer, expert], of a mixture of experts what the part of a row of `mlp_mid` that is an expert's was
        compared with; None for another model.

        Raises:
            TealError: damaged, or an entry was never written.
        """
        return None if self.store.header.mixture is None else self._constant(EXPERT_THRESHOLDS)

    def experts(self, layer: int) -> np.ndarray:
        """Whose the parts of a row of `mlp_mid` are: uint16 [token, k], ascending; part j is channels j K / k to
        (j + 1) K / k.

        Raises:
            UsageError: no such layer, or it has no experts.
            TealError: damaged, or an entry was never written.
        """
        layer, mixture = self._layer(layer), self.store.header.mixture
        if mixture is None or not mixture.layers[layer]:
            raise UsageError(f"layer {layer} of {self.store.header.model} has no experts")
        return self.stored_experts(layer)

    def stored_experts(self, layer: int) -> np.ndarray:
        """The same of any layer; `NO_EXPERT` where it has none."""
        mixture = self.store.header.mixture
        assert mixture is not None
        spec = layout.level_arrays(self.store.header, self._most)[EXPERT_ARRAY]
        array = open_array(self.store.path / self.name, EXPERT_ARRAY, spec, least=self._tokens)
        where = f"{self.store.path}: {self.name}/{EXPERT_ARRAY}, layer {layer}"
        try:
            found = as_numpy(array[layer, : self._tokens])
        except Exception as error:  # on damaged bytes codecs raise anything from ValueError to RuntimeError
            raise TealError(f"{where}: unreadable: {reason(error)}", hint=DAMAGE_HINT) from error
        if mixture.layers[layer]:
            sound = (found < mixture.experts).all() and (found[:, 1:] > found[:, :-1]).all()
        else:
            sound = (found == NO_EXPERT).all()
        if not sound:
            raise TealError(f"{where}: these are no experts of a token", hint=VERIFY_HINT)
        self.store.check_same()
        return found

    @cached_property
    def whole(self) -> np.ndarray | None:
        """bool [token], rows that no threshold was applied to: those of a dense prompt; None where there are none."""
        if self.target == 0 or self.store.header.run.get("prefill") != "dense":
            return None
        return np.asarray(self.tokens.phase == PHASES["prefill"])

    def limits(self, layer: int, site: str) -> np.ndarray:
        """What entries were compared with, float32 [projection of the site], or [projection, channel] where there is
        a scale: |x| > limit is kept. In a store of the criterion `topk`, how many entries of a row are dropped.
        """
        scale = self.scale.get(site)
        return site_thresholds(self.thresholds[layer], site, None if scale is None else scale[layer])

    @cached_property
    def tokens(self) -> Tokens:
        """Which token each row belongs to.

        Raises:
            TealError: damaged, an entry that was never written, or sequences that are not in order.
        """
        columns = self.columns()
        for column, problem in column_problems(self.store.header, columns):
            raise TealError(f"{self.store.path}: {self.name}/{column}{problem}", hint=VERIFY_HINT)
        return Tokens(**columns)

    def columns(self, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Token columns as they are read, unchecked; all that there are if none is named.

        Raises:
            TealError: one is unreadable.
        """
        specs = layout.level_arrays(self.store.header, self._most)
        columns = {}
        for name in names or self.store.header.token_columns:
            array = open_array(self.store.path / self.name, name, specs[name], least=self._tokens)
            try:
                columns[name] = as_numpy(array[: self._tokens])
            except Exception as error:  # on damaged bytes codecs raise anything from ValueError to RuntimeError
                raise TealError(
                    f"{self.store.path}: {self.name}/{name} is damaged: {reason(error)}", hint=DAMAGE_HINT
                ) from error
        self.store.check_same()
        return columns

    def rows(self, sequence: int) -> slice:
        """The rows of one sequence, as a slice of the token axis.

        Raises:
            NotFoundError: no row of that sequence is committed.
        """
        found = np.flatnonzero(self.tokens.sequence == sequence)
        if not len(found):
            there = np.unique(self.tokens.sequence)
            hint = f"it has {counted(len(there), 'sequence')}, {there[0]} to {there[-1]}" if len(there) else None
            raise NotFoundError(f"level {self.name} has no row of sequence {sequence}", hint=hint)
        return slice(int(found[0]), int(found[-1]) + 1)  # `tokens` has checked that nothing lies between

    def site(self, layer: int, site: str) -> ActivationArray:
        """The input vectors of a site of a layer, lazily, [token, channel]; thresholded at its lowest threshold.

        Raises:
            UsageError: no such site or layer.
        """
        if site not in SITES:
            raise UsageError(f"there is no site {site!r}", hint=f"sites: {', '.join(SITES)}")
        return ActivationArray(self.site_reader(site), self._layer(layer), site)

    def projection(self, layer: int, projection: str) -> ActivationArray:
        """What one linear layer consumed, lazily, [token, channel]: its site, thresholded again at its own threshold;
        rows of a dense prompt are as they are.

        Raises:
            UsageError: no such projection or layer.
        """
        if projection not in PROJECTION_SITE:
            raise UsageError(f"there is no projection {projection!r}", hint=f"projections: {', '.join(PROJECTIONS)}")
        layer = self._layer(layer)
        site = PROJECTION_SITE[projection]
        limit = self.limits(layer, site)[SITE_PROJECTIONS[site].index(projection)]
        return ActivationArray(self.site_reader(site), layer, projection, limit=np.asarray(limit), whole=self.whole)

    def realised(self) -> np.ndarray:
        """Share of dropped entries, float64 [layer, projection]; NaN where there is no token. Rows of a dense prompt do
        not count.
        """
        counted = len(self) if self.whole is None else int(np.count_nonzero(~self.whole))
        kept = np.zeros((self.store.header.layers, len(PROJECTIONS)), np.int64)
        sizes = np.array([counted * self.store.header.channels[PROJECTION_SITE[p]] for p in PROJECTIONS])
        for site in SITES:
            reader = self.site_reader(site)
            limits = [self.limits(layer, site) for layer in range(len(kept))]
            for index in range(reader.blocks):
                for layer, block in enumerate(reader.read_layers(index)):
                    for column, limit in zip(range(7)[columns_of(site)], limits[layer], strict=True):
                        above = exceeds(block.values, block.compared(np.asarray(limit)))
                        if self.whole is not None:
                            span = slice(block.start, block.start + len(block.row_nnz))
                            above &= ~np.repeat(self.whole[span], block.row_nnz)
                        kept[layer, column] += np.count_nonzero(above)
        with np.errstate(invalid="ignore"):
            return 1.0 - kept / sizes

    def site_reader(self, site: str) -> Blocks:
        """Block by block access to a site, for checks and statistics."""
        if site not in self._sites:
            store = self.store
            self._sites[site] = SiteReader(
                store.path / self.name, site, store.header, self._tokens, most=self._most, guard=store.check_same
            )
        return self._sites[site]

    def stored_bytes(self, site: str) -> int:
        """Bytes of a site on disk, metadata left out."""
        sizes = sizes_of(self.store.path / self.name / site)
        return sum(size for file, size in sizes.items() if not file.endswith("zarr.json"))

    def _layer(self, layer: int) -> int:
        layers = self.store.header.layers
        if not -layers <= layer < layers:
            raise UsageError(f"there is no layer {layer}", hint=f"the model has layers 0 to {layers - 1}")
        return layer % layers

    def _constant(self, name: str) -> np.ndarray:
        found = read_constant(self.store.path, self.name, name, self.store.header)
        self.store.check_same()
        return found

    def __repr__(self) -> str:
        return f"<Level {self.name}: {self._tokens} tokens, {self.allocation}>"
