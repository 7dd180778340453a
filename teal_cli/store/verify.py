"""Is every byte of a store what the schema says it must be?

Reads everything that is committed and holds it against what can be known without the model: checksums, the bitmap
against the row counts, kept values against the thresholds, zeros where zeros belong, the token columns against each
other, the metadata against the schema and against their consolidated copy. It cannot know whether the values are the
right ones. Yields progress and problems as they are found, so that a caller may stop at the first few.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr

from teal_cli.errors import TealError
from teal_cli.store import layout
from teal_cli.store.arrays import SiteReader
from teal_cli.store.collection import Collection
from teal_cli.store.digest import Digested, digesting, store_digest
from teal_cli.store.header import LevelHeader, LevelState, StoreHeader, site_widths
from teal_cli.store.metadata import as_numpy, read_node, reason
from teal_cli.store.packing import exceeds, magnitude_bits, per_value, unpack_mask
from teal_cli.store.reader import ActivationStore, Level, open_store
from teal_cli.store.remote import local, place_of
from teal_cli.store.schema import (
    BITORDER,
    COMPARE,
    EXPERT_SITE,
    NEVER_WRITTEN,
    SCHEMA_1,
    blocks_of,
    mask_bytes,
)
from teal_cli.store.tokens import column_problems
from teal_kernels.spec import PROJECTIONS, SITES
from teal_kernels.thresholds import lowest

_ROOT: Final = {"attributes", "zarr_format", "node_type", "consolidated_metadata"}


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


def verify(path: Path, *, allow_incomplete: bool = False) -> Iterator[Problem | Checked | Digested]:
    """Checks a store.

    Args:
        path: its folder.
        allow_incomplete: a run that was cut off, or is still going on, is no problem; only what is committed
            counts.

    Yields:
        A `Problem` for whatever is wrong, a `Checked` at the beginning and after each block of a site, all layers
        together, and at the end of each store a `Digested` after each array.

    Raises:
        NotFoundError, UsageError: no store of this schema there.
        TealError: the attributes are too damaged to go on.
    """
    store = open_store(local(place_of(path), "verified"))
    if isinstance(store, Collection):
        yield from _collection(store, allow_incomplete)
    else:
        yield from _store(store, allow_incomplete)


def _collection(store: Collection, allow_incomplete: bool) -> Iterator[Problem | Checked | Digested]:
    """Each part as the store that it is, and that together they are what the root says."""
    sound, read = True, 0
    for part in store.parts:
        done = 0
        for event in _store(part, allow_incomplete):
            if isinstance(event, Checked):
                done = event.done
                yield Checked(read + done, read + event.total)
            elif isinstance(event, Problem):
                sound = False
                yield Problem(f"{part.path.name}/{event.where}", event.what, event.fatal)
            else:
                yield event
        read += done
    for problem in (*_attributes(store, allow_incomplete), *_strangers(store), *_sequences(store)):
        sound = False
        yield problem
    if sound and store.complete:
        found = store_digest(store.attrs, [str(part.state.digest) for part in store.parts])
        if found != store.state.digest:
            yield Problem("zarr.json", f"what it says is not what was written: the digest is {found}")


def _sequences(store: Collection) -> Iterator[Problem]:
    """Sequences that two parts have; and those that no part has, where all are there and none may end at once."""
    for name in store.levels:
        try:
            there = np.unique(store.level(name).tokens.sequence)
        except TealError as error:
            yield Problem(name, error.message, fatal=True)
            continue
        missing = np.setdiff1d(np.arange(store.sequences), there)
        if store.complete and len(missing) and not store.header.sampling.get("stop_ids"):
            yield Problem(name, f"no part has sequence {missing[0]}")


def _store(store: ActivationStore, allow_incomplete: bool) -> Iterator[Problem | Checked | Digested]:
    sound = True
    levels, damaged = [], []
    for name in store.levels:
        try:
            levels.append(store.level(name))
        except TealError as error:
            damaged.append(Problem(name, error.message, fatal=True))
    for problem in (*damaged, *_attributes(store, allow_incomplete), *_consolidated(store), *_strangers(store)):
        sound = False
        yield problem
    total = sum(blocks_of(len(level), store.header.block_tokens) for level in levels) * len(SITES)
    done = 0
    yield Checked(done, total)
    for level in levels:
        problems = [*_metadata(store, level), *_tokens(store, level, allow_incomplete)]
        yield from problems
        sound = sound and not problems
        if any(problem.fatal for problem in problems):
            continue  # arrays of another shape or type, or no thresholds: the rows mean nothing
        routed = list(_experts(store, level))
        yield from routed
        sound = sound and not routed
        for site in SITES:
            for found in _site(store, level, site):
                yield from found
                sound = sound and not found
                done += 1
                yield Checked(done, total)
    if sound:  # where something else is wrong, that the digest is wrong too says nothing new
        yield from _digests(store, levels)
    store.check_same()


def _attributes(store: ActivationStore, allow_incomplete: bool) -> Iterator[Problem]:
    root = read_node(store.path)
    if root.get("node_type") != "group" or root.get("zarr_format") != 3 or type(root["zarr_format"]) is not int:
        yield Problem("zarr.json", "it is not the metadata of a group of Zarr's version 3")
    if strange := (root.keys() - _ROOT) | (root["attributes"].keys() - {"teal"}):
        yield Problem("zarr.json", f"it has what teal does not write: {', '.join(sorted(strange))[:200]}")
    for name, wanted in (("compare", COMPARE), ("bitorder", BITORDER)):
        if store.attrs.get(name) != wanted:
            yield Problem("zarr.json", f"{name} is {store.attrs.get(name)!r}, not {wanted!r}")
    if not store.complete and not allow_incomplete:
        yield Problem("zarr.json", "the store is not complete: its run was cut off, or is still going on")


def _is_nested(found: object, copies: dict[str, Any], name: str) -> bool:
    """Whether the copies that a group has within the root's are those of the nodes below it, or none, as Zarr does."""
    wanted = {key.removeprefix(f"{name}/"): copy for key, copy in copies.items() if key.startswith(f"{name}/")}
    return any(found == {"kind": "inline", "must_understand": False, "metadata": inner} for inner in ({}, wanted))


def _strangers(store: ActivationStore) -> Iterator[Problem]:
    """Folders that look like levels but are none of this store."""
    for entry in sorted(local(store.path, "verified").iterdir()):
        if entry.is_dir() and (entry / "zarr.json").exists() and entry.name not in (store.state.parts or store.levels):
            yield Problem(entry.name, "the store has no such level or part; the folder was not made by it")


def _reason(error: Exception) -> object:
    return error.message if isinstance(error, TealError) else error


def _digests(store: ActivationStore, levels: list[Level]) -> Iterator[Problem | Digested]:
    if store.state.schema == SCHEMA_1:
        return
    digests: list[str] = []
    whole, folder = [level for level in levels if level.complete], local(store.path, "verified")
    for before, level in enumerate(whole):
        try:
            digests.append((yield from digesting(folder, level.name, store.header, level.state, before, len(whole))))
        except (OSError, ValueError, TealError) as error:
            yield Problem(level.name, f"its digest cannot be taken: {_reason(error)}")
            continue
        if digests[-1] != level.state.digest:
            yield Problem(level.name, "data or metadata are not what was written: its digest is another")
    if store.complete and len(digests) == len(levels):
        found = store_digest(store.attrs, digests)
        if found != store.state.digest:
            yield Problem("zarr.json", f"what it says is not what was written: the digest is {found}")


def _consolidated(store: ActivationStore) -> Iterator[Problem]:
    """The copies of all metadata in the root of a finished store: both are written once and must agree."""
    whole = read_node(store.path).get("consolidated_metadata")
    copies = whole.get("metadata") if isinstance(whole, dict) else None
    if not isinstance(whole, dict) or not isinstance(copies, dict):
        if store.complete or copies is not None:
            yield Problem("zarr.json", "it has no copies of the metadata, as a finished store does")
        return
    around = {name: value for name, value in whole.items() if name != "metadata"}
    if around != {"kind": "inline", "must_understand": False} or around["must_understand"] is not False:
        yield Problem("zarr.json", "what stands around the copies of the metadata is not what Zarr writes")
    for name, copy in copies.items():
        try:
            own = read_node(store.path / name)
        except TealError as error:
            yield Problem(f"{name}/zarr.json", error.message)
            continue
        if not isinstance(copy, dict):
            yield Problem(f"{name}/zarr.json", "the copy of it in the store's zarr.json is damaged")
            continue
        nested = "consolidated_metadata"  # of a group inside a group
        if copy.get(nested) is not None and not _is_nested(copy[nested], copies, name):
            yield Problem("zarr.json", f"the copies of the metadata of {name} are damaged")
        if {**own, nested: None} != {**copy, nested: None}:
            yield Problem(f"{name}/zarr.json", "differs from the copy of it in the store's zarr.json")


def _metadata(store: ActivationStore, level: Level) -> Iterator[Problem]:
    """The arrays of a level against those that this schema makes."""
    header, state = store.header, level.state
    specs = layout.level_arrays(header, 0)
    for name, expected in _fresh(header, state).items():
        where = f"{level.name}/{name}"
        try:
            found = read_node(store.path / where)
            shape = list(found["shape"]) if name in specs else []
        except (TealError, KeyError, TypeError) as error:
            yield Problem(where, f"its metadata are unreadable: {_reason(error)}", fatal=True)
            continue
        if (axis := specs[name].grows if name in specs else None) is not None and len(shape) == len(expected["shape"]):
            block = header.block_tokens if "block" in specs[name].dimensions else 1
            least, most = blocks_of(len(level), block), expected["shape"][axis]
            # An unfinished level has room for all its tokens, or less if it was being finished or rewound.
            roomy = not level.complete and isinstance(shape[axis], int) and least <= shape[axis] <= most
            expected["shape"][axis] = shape[axis] if roomy else least
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                what = f"{key} is {str(found.get(key))[:200]}, not {str(expected.get(key))[:200]}"
                yield Problem(where, what, fatal=key != "attributes")


def _fresh(header: StoreHeader, state: LevelState) -> dict[str, dict[str, Any]]:
    """The metadata of all nodes of a new level, by their path in it."""
    shapes = {site: site_widths(header, site) for site in SITES}
    level = LevelHeader(
        state.target,
        state.allocation,
        np.zeros((header.layers, len(PROJECTIONS)), np.float32),
        state.max_tokens,
        scale={site: np.zeros(shapes[site]["scale"], np.float32) for site in state.scale},
        centre={site: np.zeros(shapes[site]["centre"], np.float32) for site in state.centre},
        experts=None if header.mixture is None else np.zeros((header.layers, header.mixture.experts), np.float32),
    )
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
        columns = level.columns()
        level.thresholds, level.scale, level.centre, level.expert_thresholds  # noqa: B018
    except TealError as error:
        yield Problem(level.name, error.message, fatal=True)
        return
    for column, problem in column_problems(store.header, columns):
        where, _, what = f"{level.name}/{column}{problem}".partition(": ")
        yield Problem(where, what)


def _experts(store: ActivationStore, level: Level) -> Iterator[Problem]:
    """Of a mixture of experts: that experts can be those of tokens, and parts of rows above their thresholds."""
    mixture, table = store.header.mixture, level.expert_thresholds
    if mixture is None or table is None:
        return
    width = store.header.channels[EXPERT_SITE] // mixture.routed
    reader = level.site_reader(EXPERT_SITE)
    for layer, mixed in enumerate(mixture.layers):
        try:
            experts = level.stored_experts(layer)
            for block in map(partial(reader.read, layer), range(reader.blocks) if mixed else ()):
                span = slice(block.start, block.start + len(block.row_nnz))
                wanted = np.repeat(table[layer][experts[span]], width, axis=1)
                fine = exceeds(block.values, per_value(wanted, block.kept))
                if level.whole is not None:
                    fine |= np.repeat(level.whole[span], block.row_nnz)
                if not fine.all():
                    where = f"{level.name}/{EXPERT_SITE}, tokens {span.start} to {span.stop}, layer {layer}"
                    yield Problem(where, "a kept value is not above the threshold of its expert")
        except TealError as error:
            yield Problem(f"{level.name}/{EXPERT_SITE}", error.message)


def _site(store: ActivationStore, level: Level, site: str) -> Iterator[list[Problem]]:
    """The blocks of a site, one list of problems for each."""
    try:
        reader = level.site_reader(site)
        assert isinstance(reader, SiteReader)  # not that of a collection, whose parts are verified each by itself
        arrays = dict(zip(("values", "mask", "row_nnz"), reader.arrays, strict=True))
    except TealError as error:
        yield [Problem(f"{level.name}/{site}", error.message)]
        return
    layers = range(store.header.layers)
    limits = [np.asarray(lowest(x, projections=-x.ndim)) for x in (level.limits(layer, site) for layer in layers)]
    size = store.header.block_tokens
    for block in range(blocks_of(len(level), size)):
        tokens = slice(block * size, min((block + 1) * size, len(level)))
        where = f"{level.name}/{site}, tokens {tokens.start} to {tokens.stop}"
        whole = np.zeros(tokens.stop - tokens.start, bool) if level.whole is None else level.whole[tokens]
        how = whole, store.header.ranked
        yield list(_block(arrays, block, tokens, store.header.channels[site], limits, how, where))


def _block(
    arrays: Mapping[str, layout.Array],
    block: int,
    tokens: slice,
    channels: int,
    limits: list[np.ndarray],
    how: tuple[np.ndarray, bool],
    where: str,
) -> Iterator[Problem]:
    """One block of a site, all layers; at most one problem per layer, the first in the order of the checks.

    Args:
        how: rows that no threshold was applied to, bool [tokens], and whether thresholds are numbers of entries.
    """
    read: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        try:
            read[name] = as_numpy(array[:, block if name == "values" else tokens])
        except Exception as error:  # on damaged bytes codecs raise anything from ValueError to RuntimeError
            yield Problem(f"{where}, {name}", f"unreadable: {reason(error)}")
    if len(read) < len(arrays):
        return
    for layer, limit in enumerate(limits):
        rows = {name: array[layer] for name, array in read.items()}
        what = _layer_problem(rows, channels, limit, *how)
        if what:
            yield Problem(f"{where}, layer {layer}", what)


def _layer_problem(
    rows: Mapping[str, np.ndarray], channels: int, limit: np.ndarray, whole: np.ndarray, ranked: bool
) -> str | None:
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
    if ranked:
        most = channels - int(limit)
        return f"a row keeps more than the {most} entries of its plan" if (row_nnz > most)[~whole].any() else None
    wanted = limit if limit.ndim == 0 else per_value(limit, unpack_mask(mask, channels))
    if not (exceeds(values[:kept], wanted) | np.repeat(whole, row_nnz)).all():
        threshold = f"the threshold {float(limit):.8g}" if limit.ndim == 0 else "its threshold"
        return f"a kept value is not above {threshold}"
    return None
