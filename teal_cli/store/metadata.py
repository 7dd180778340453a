"""The boundary of a store: what its zarr.json files say is checked here, and nothing behind it guesses.

A store's metadata are as little to be trusted as its chunks: a number that lies could make a reader allocate
without end or return what nobody wrote. So every field is held against the schema and against the others
before an array is opened; a chunk is the business of `arrays`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from zarr.storage import StorePath

from teal_cli.errors import TealError, UsageError
from teal_cli.store.header import LevelState, StoreHeader, StoreState, is_level_name
from teal_cli.store.layout import Array, ArraySpec, level_arrays
from teal_cli.store.remote import Place, node_of, require_there, zarr_store
from teal_cli.store.schema import COLLECTION, SCHEMA, SCHEMA_1, SCHEMAS, parse_level
from teal_kernels.spec import SITES

VERIFY_HINT: Final = "`teal store verify` says more"
DAMAGE_HINT: Final = (
    "`teal store verify` lists what is damaged; remove that part of a collection and run `teal dump --resume`, "
    "or write the store again with `teal dump --like`"
)


def reason(error: Exception) -> str:
    """Why a chunk could not be read, without the bytes that a codec says of a checksum."""
    return "a checksum does not match" if "checksum" in str(error) else str(error)


def require_store(path: Place, *, plain: bool = False) -> None:
    """Raises unless the path holds a store of a known schema, or a collection where not a `plain` one is asked for;
    `read_state` says what it raises.
    """
    require_there(path)
    schema = schema_of(path)
    if schema is None:
        raise UsageError(f"{path} is not a teal store", hint="give the folder that `teal dump -o` wrote")
    if plain and schema == COLLECTION:
        raise UsageError(f"{path} is a collection, not one store", hint="`teal store merge` makes one store of it")
    if schema not in SCHEMAS:
        raise UsageError(
            f"{path} has the schema {schema[:80]}; this teal reads {SCHEMA}",
            hint="read it with the version of teal that wrote it (teal_version in its zarr.json)",
        )


def schema_of(path: Place) -> str | None:
    """What the group at a path says in attrs["teal"]["schema"]; None if it is not a teal store at all."""
    try:
        found = read_node(path)["attributes"]["teal"]["schema"]
    except (TealError, KeyError, TypeError):
        return None
    return str(found)


def read_node(folder: Place) -> dict[str, Any]:
    """The zarr.json of a node, as a JSON object.

    Raises:
        TealError: it is not there, too large, or no JSON object.
    """
    file = folder / "zarr.json"
    try:
        found = node_of(folder)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise TealError(f"{file} is unreadable: {what}", hint=VERIFY_HINT) from error
    return found


def read_attributes(folder: Place) -> dict[str, Any]:
    """attrs["teal"] of a group, as it is on disk now.

    Raises:
        TealError: unreadable, or the group has none.
    """
    attributes = read_node(folder).get("attributes")
    found = attributes.get("teal") if isinstance(attributes, dict) else None
    if not isinstance(found, dict):
        raise TealError(f"the attributes of {folder} are damaged: teal is missing", hint=VERIFY_HINT)
    return found


def read_state(path: Place) -> StoreState:
    """What a store says about itself, checked.

    Raises:
        NotFoundError: nothing at the path.
        UsageError: something else than a store of a known schema.
        TealError: its attributes are damaged.
    """
    require_store(path)
    try:
        state = StoreState.from_attributes(read_attributes(path))
    except ValueError as error:
        raise TealError(f"the attributes of the store {path} are damaged: {error}", hint=VERIFY_HINT) from error
    if state.schema != SCHEMA_1:
        return state
    levels = tuple(sorted(_levels_of_schema_1(path), key=parse_level))
    if not levels:
        raise TealError(f"the store {path} has no levels", hint=VERIFY_HINT)
    return replace(state, levels=levels)


def _levels_of_schema_1(path: Place) -> set[str]:
    """Its root does not list them: those of the consolidated metadata, and folders that hold the level they name."""
    root = read_node(path).get("consolidated_metadata")
    names = root.get("metadata") if isinstance(root, dict) else None
    if isinstance(names, dict):
        return {name for name in names if is_level_name(name)}
    if not isinstance(path, Path):
        return set()
    folders = {entry.name for entry in path.iterdir() if is_level_name(entry.name) and entry.is_dir()}
    return {name for name in folders if read_attributes(path / name).get("target") == parse_level(name)}


def level_state(path: Place, level: str) -> LevelState:
    """What a level says about itself now, checked.

    Raises:
        TealError: its attributes are damaged.
    """
    try:
        return LevelState.from_attributes(read_attributes(path / level), level)
    except ValueError as error:
        raise TealError(f"the attributes of level {level} of {path} are damaged: {error}", hint=VERIFY_HINT) from error


def open_array(folder: Place, name: str, spec: ArraySpec, *, least: int | None = None) -> Array:
    """One array below a folder, for reading; its metadata as they stand on disk now, held against the schema.

    Args:
        spec, least: as `read_array` takes them.

    Raises:
        TealError: unreadable, or not what the schema makes.
    """
    place = folder / name
    found = read_array(folder, name, spec, least=least)
    try:
        return zarr.Array.from_dict(StorePath(zarr_store(place), ""), found)
    except Exception as error:  # on metadata of the wrong type Zarr raises whatever comes
        raise TealError(f"{place / 'zarr.json'}: {type(error).__name__}: {error}", hint=VERIFY_HINT) from error


def read_array(folder: Place, name: str, spec: ArraySpec, *, least: int | None = None) -> dict[str, Any]:
    """The metadata of one array below a folder, held against the schema.

    Args:
        spec: what it must be.
        least: the axis that grows may be anything from this to `spec.shape`.

    Raises:
        TealError: unreadable, or not what the schema makes.
    """
    found = read_node(folder / name)
    try:
        problem = _difference(found, spec, least)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # fields of the wrong type
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise TealError(f"{folder / name / 'zarr.json'}: {problem}", hint=VERIFY_HINT)
    return found


def _difference(found: Mapping[str, Any], spec: ArraySpec, least: int | None) -> str | None:
    """What in the metadata of an array would make its chunks mean something else; None if nothing does."""
    shape = list(spec.shape)
    if spec.grows is not None and least is not None:
        length = found["shape"][spec.grows]
        if isinstance(length, int) and least <= length <= shape[spec.grows]:
            shape[spec.grows] = length
    codecs = found["codecs"]
    chunks = list(spec.chunks)
    if spec.shards is not None:
        inner = codecs[0]["configuration"]
        if codecs[0]["name"] != "sharding_indexed" or inner["chunk_shape"] != chunks:
            return f"its shards are not of chunks {chunks}"
        chunks, codecs = list(spec.shards), inner["codecs"]
    if tuple(codec["name"] for codec in codecs) != spec.codecs:
        return f"its codecs are not {', '.join(spec.codecs)}"
    fill = "NaN" if spec.fill != spec.fill else spec.fill
    for key, wanted in (
        ("shape", shape),
        ("data_type", spec.dtype.name),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": chunks}}),
        ("fill_value", fill),
    ):
        if found[key] != wanted:
            return f"{key} is {str(found[key])[:80]}, not {wanted}"
    return None


def read_constant(path: Place, level: str, name: str, header: StoreHeader) -> np.ndarray:
    """`thresholds`, `<site>/centre` or `<site>/scale`: finite, written, and but for a centre not negative.

    Raises:
        TealError: it is not, or unreadable.
    """
    array = open_array(path / level, name, level_arrays(header, 0, centre=SITES, scale=SITES)[name])
    try:
        found = as_numpy(array[...])
    except Exception as error:  # on damaged bytes codecs raise anything from ValueError to RuntimeError
        raise TealError(f"{path}: {level}/{name} is damaged: {reason(error)}", hint=DAMAGE_HINT) from error
    if not np.isfinite(found).all() or (not name.endswith("/centre") and (found < 0).any()):
        raise TealError(f"{path}: {level}/{name}: an entry is negative or not a number", hint=VERIFY_HINT)
    return found


def as_numpy(array: Any) -> np.ndarray:
    """What an indexed Zarr array returned, as a NumPy array (its annotation is wider than what it returns)."""
    return np.asarray(array)
