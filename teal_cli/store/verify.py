"""Is every byte of a store what the schema says it must be?

Reads everything that is committed and holds it against what can be known without the model: checksums, the
bitmap against the row counts, kept values against the thresholds, zeros where zeros belong, the token columns
against each other, the metadata against the schema and against their consolidated copy. It cannot know
whether the values are the right ones.

Yields progress and problems as they are found, so that a caller may stop at the first few.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from teal_cli.errors import TealError
from teal_cli.store import layout
from teal_cli.store.header import LevelHeader, StoreHeader, site_threshold
from teal_cli.store.packing import exceeds, magnitude_bits
from teal_cli.store.reader import ActivationStore, Level, open_store
from teal_cli.store.schema import (
    BITORDER,
    COMPARE,
    NEVER_WRITTEN,
    PHASES,
    TOKEN_COLUMNS,
    blocks_of,
    level_name,
    mask_bytes,
)
from teal_kernels.spec import SITES


@dataclass(frozen=True)
class Problem:
    """Something that is not as it must be.

    Attributes:
        where: a path inside the store, perhaps with tokens and layer.
        what: in words.
        fatal: the rows of that level cannot be checked any further.
    """

    where: str
    what: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Checked:
    """Progress: blocks of sites read so far and in all."""

    done: int
    total: int


def verify(path: Path, *, allow_incomplete: bool = False) -> Iterator[Problem | Checked]:
    """Checks a store.

    Args:
        path: its folder.
        allow_incomplete: a run that was cut off, or is still going on, is no problem; only what is committed
            counts.

    Yields:
        A `Problem` for whatever is wrong and a `Checked` after each block of a site, all layers together.

    Raises:
        NotFoundError, UsageError: no store of this schema there.
        TealError: the attributes are too damaged to go on.
    """
    store = open_store(path)
    yield from _attributes(store, allow_incomplete)
    yield from _consolidated(path)
    levels = [store.level(name) for name in store.levels]
    total = sum(blocks_of(len(level), store.header.block_tokens) for level in levels) * len(SITES)
    done = 0
    for level in levels:
        problems = [*_metadata(store, level), *_tokens(store, level, allow_incomplete)]
        yield from problems
        if any(problem.fatal for problem in problems):
            continue  # arrays of another shape or type, or no thresholds: the rows mean nothing
        for site in SITES:
            for found in _site(store, level, site):
                yield from found
                done += 1
                yield Checked(done, total)


def _attributes(store: ActivationStore, allow_incomplete: bool) -> Iterator[Problem]:
    for name, wanted in (("compare", COMPARE), ("bitorder", BITORDER)):
        if store.attrs.get(name) != wanted:
            yield Problem("zarr.json", f"{name} is {store.attrs.get(name)!r}, not {wanted!r}")
    if not store.complete and not allow_incomplete:
        yield Problem("zarr.json", "the store is not complete: its run was cut off, or is still going on")


def _consolidated(path: Path) -> Iterator[Problem]:
    """The copies of all metadata in the root of a finished store: both are written once and must agree."""
    root = json.loads((path / "zarr.json").read_bytes())
    for name, copy in ((root.get("consolidated_metadata") or {}).get("metadata") or {}).items():
        try:
            own = json.loads((path / name / "zarr.json").read_bytes())
        except (OSError, ValueError) as error:
            yield Problem(f"{name}/zarr.json", f"unreadable: {error}")
            continue
        nested = "consolidated_metadata"  # of a group inside a group; says nothing new
        if {**own, nested: None} != {**copy, nested: None}:
            yield Problem(f"{name}/zarr.json", "differs from the copy of it in the store's zarr.json")


def _metadata(store: ActivationStore, level: Level) -> Iterator[Problem]:
    """The arrays of a level against those that this schema makes."""
    header = store.header
    if level_name(level.target) != level.name:
        yield Problem(f"{level.name}/zarr.json", f"its target is {level.target}")
    thresholds = np.zeros((header.layers, 7), np.float32)
    attributes = layout.level_attributes(store.path, level.name)
    wanted = _fresh(header, LevelHeader(level.target, level.allocation, thresholds, attributes["max_tokens"]))
    growing = layout.row_arrays()
    for name, expected in wanted.items():
        where = f"{level.name}/{name}"
        try:
            found = json.loads((store.path / where / "zarr.json").read_bytes())
        except (OSError, ValueError) as error:
            yield Problem(where, f"its metadata are unreadable: {error}", fatal=True)
            continue
        if name in growing:
            axis = 0 if len(expected["shape"]) == 1 else 1
            block = header.block_tokens if growing[name] == "block" else 1
            least, most = blocks_of(len(level), block), expected["shape"][axis]
            # An unfinished level has room for all its tokens, or less if it was being finished or rewound.
            roomy = not level.complete and least <= found["shape"][axis] <= most
            expected["shape"][axis] = found["shape"][axis] if roomy else least
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                what = f"{key} is {found.get(key)!r}, not {expected.get(key)!r}"
                yield Problem(where, what, fatal=key != "attributes")


def _fresh(header: StoreHeader, level: LevelHeader) -> dict[str, dict[str, Any]]:
    """The metadata of all nodes of a new level, by their path in it."""
    written: dict[str, Any] = {}
    root = zarr.create_group(zarr.storage.MemoryStore(written))
    layout.create_level(root.create_group(level.name), header, level)
    prefix, suffix = f"{level.name}/", "/zarr.json"
    return {
        key.removeprefix(prefix).removesuffix(suffix): json.loads(buffer.to_bytes())
        for key, buffer in written.items()
        if key.startswith(prefix) and key.endswith(suffix) and key != f"{level.name}{suffix}"
    }


def _tokens(store: ActivationStore, level: Level, allow_incomplete: bool) -> Iterator[Problem]:
    if not level.complete and not allow_incomplete:
        yield Problem(level.name, f"the level is not complete; {len(level)} tokens are committed")
    try:
        tokens, thresholds = level.tokens, level.thresholds
    except TealError as error:
        yield Problem(level.name, error.message, fatal=True)
        return
    if not (np.isfinite(thresholds).all() and (thresholds >= 0).all()):
        yield Problem(f"{level.name}/thresholds", "a threshold is negative or not a number")
    for name in TOKEN_COLUMNS:
        if len(tokens[name]) != len(level):
            yield Problem(f"{level.name}/{name}", f"{len(tokens[name])} entries for {len(level)} tokens")
            return
    for name in ("token_id", "position", "sequence"):
        if (tokens[name] == NEVER_WRITTEN).any():
            yield Problem(f"{level.name}/{name}", "an entry was never written")
    if not np.isin(tokens.phase, list(PHASES.values())).all():
        yield Problem(f"{level.name}/phase", f"an entry is none of {sorted(PHASES.values())}")
    yield from _order(level, tokens.sequence, tokens.position)
    texts = store.header.prompts.get("texts")
    if texts is not None and len(tokens) and int(tokens.sequence.max()) >= len(texts):
        yield Problem(f"{level.name}/sequence", f"an entry is beyond the {len(texts)} prompts of the store")


def _order(level: Level, sequence: np.ndarray, position: np.ndarray) -> Iterator[Problem]:
    starts = np.flatnonzero(np.diff(sequence.astype(np.int64), prepend=-1))  # where a run of equal entries begins
    runs = sequence[starts]
    if len(np.unique(runs)) != len(runs):
        yield Problem(f"{level.name}/sequence", "a sequence is not contiguous")
    steps = np.diff(position.astype(np.int64))
    steps[starts[1:] - 1] = 1  # a new sequence may begin anywhere
    if (steps <= 0).any():
        token = int(np.flatnonzero(steps <= 0)[0]) + 1
        yield Problem(f"{level.name}/position, token {token}", "positions do not increase within the sequence")


def _site(store: ActivationStore, level: Level, site: str) -> Iterator[list[Problem]]:
    """The blocks of a site, one list of problems for each."""
    folder = store.path / level.name / site
    arrays = {name: layout.open_array(folder, name) for name in ("values", "mask", "row_nnz")}
    thresholds = site_threshold(level.thresholds, site)
    size = store.header.block_tokens
    for block in range(blocks_of(len(level), size)):
        tokens = slice(block * size, min((block + 1) * size, len(level)))
        where = f"{level.name}/{site}, tokens {tokens.start} to {tokens.stop}"
        yield list(_block(arrays, block, tokens, store.header.channels[site], thresholds, where))


def _block(
    arrays: Mapping[str, layout.Array],
    block: int,
    tokens: slice,
    channels: int,
    thresholds: np.ndarray,
    where: str,
) -> Iterator[Problem]:
    """One block of a site, all layers; at most one problem per layer, the first in the order of the checks."""
    read: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        try:
            read[name] = layout.as_numpy(array[:, block if name == "values" else tokens])
        except Exception as error:  # on damaged bytes codecs raise anything from ValueError to RuntimeError
            yield Problem(f"{where}, {name}", f"unreadable: {error}")
    if len(read) < len(arrays):
        return
    for layer, threshold in enumerate(thresholds):
        rows = {name: array[layer] for name, array in read.items()}
        what = _layer_problem(rows, channels, float(threshold))
        if what:
            yield Problem(f"{where}, layer {layer}", what)


def _layer_problem(rows: Mapping[str, np.ndarray], channels: int, threshold: float) -> str | None:
    values, mask, row_nnz = rows["values"], rows["mask"], rows["row_nnz"]
    if (row_nnz == NEVER_WRITTEN).any():
        return "a committed row was never written"
    if (np.bitwise_count(mask).sum(axis=1, dtype=np.int64) != row_nnz).any():
        return "the bitmap disagrees with row_nnz"
    spare = 8 * mask_bytes(channels) - channels
    if spare and (mask[:, -1] >> (8 - spare)).any():
        return "a padding bit of the bitmap is set"
    kept = int(row_nnz.sum(dtype=np.int64))
    if not magnitude_bits(values[:kept]).all():
        return "a kept value is zero, so values are missing"
    if values[kept:].any():
        return "there are values beyond the kept ones"
    if not exceeds(values[:kept], threshold).all():
        return f"a kept value is not above the threshold {threshold:.8g}"
    return None
