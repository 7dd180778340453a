"""The Zarr side of a store: which arrays exist, with which chunks and codecs; how they are made, grown and cut.

Knows Zarr and the schema; knows nothing of torch, buffers or threads.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.storage import LocalStore

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.store.header import LevelHeader, StoreHeader
from teal_cli.store.schema import (
    BLOSC_BLOCKSIZE,
    NEVER_WRITTEN,
    PHASE_NEVER,
    PHASES,
    SCHEMA,
    TOKEN_COLUMNS,
    VALUE_DTYPES,
    ZSTD_LEVEL,
    blocks_of,
    mask_bytes,
    token_chunk,
)
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES

# Without this Zarr compares every chunk with the fill value before it writes it: 2-7x slower writes in 3.1.6.
_CONFIG: Final[ArrayConfigParams] = {"write_empty_chunks": True}

Array: TypeAlias = "zarr.Array[Any]"

VERIFY_HINT: Final = "`teal store verify` says more"


def create_skeleton(path: Path, header: StoreHeader, levels: list[LevelHeader], *, teal_version: str) -> None:
    """Writes all metadata of a new store, no row, at a path that does not exist."""
    root = zarr.create_group(LocalStore(path))
    root.attrs.put({"teal": header.to_attributes(teal_version=teal_version, complete=False)})
    for level in levels:
        group = root.create_group(level.name)
        group.attrs.put({"teal": level.to_attributes(tokens_committed=0, complete=False)})
        create_level(group, header, level)


def create_level(group: zarr.Group, header: StoreHeader, level: LevelHeader) -> None:
    """The arrays of one level, without rows, in its group."""
    block, layers = header.block_tokens, header.layers
    rows = capacity(level.max_tokens, block)
    for name, dtype in TOKEN_COLUMNS.items():
        phase = name == "phase"
        column = group.create_array(
            name,
            shape=(rows,),
            chunks=(token_chunk(block),),
            dtype=dtype,
            fill_value=PHASE_NEVER if phase else NEVER_WRITTEN,
            compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
            dimension_names=("token",),
            config=_CONFIG,
        )
        if phase:
            column.attrs.put({"flag_values": list(PHASES.values()), "flag_meanings": " ".join(PHASES)})
    thresholds = group.create_array(
        "thresholds",
        shape=level.thresholds.shape,
        chunks=level.thresholds.shape,
        dtype="float32",
        fill_value=float("nan"),
        compressors=[Crc32cCodec()],
        dimension_names=("layer", "projection"),
        attributes={"projections": list(PROJECTIONS)},
        config=_CONFIG,
    )
    thresholds[...] = level.thresholds
    for site in SITES:
        _create_site(group.create_group(site), header, site, rows, layers)


def _create_site(group: zarr.Group, header: StoreHeader, site: str, rows: int, layers: int) -> None:
    block, channels = header.block_tokens, header.channels[site]
    group.attrs.put({"teal": {"channels": channels, "projections": list(SITE_PROJECTIONS[site])}})
    dtype = VALUE_DTYPES[header.value_dtype]
    group.create_array(
        "values",
        shape=(layers, rows // block, block * channels),
        chunks=(1, 1, block * channels),
        shards=(layers, 1, block * channels),
        dtype=dtype,
        fill_value=0,
        compressors=[
            BloscCodec(
                cname="zstd",
                clevel=ZSTD_LEVEL,
                shuffle="shuffle",
                blocksize=BLOSC_BLOCKSIZE,
                typesize=dtype.itemsize,
            ),
            Crc32cCodec(),
        ],
        dimension_names=("layer", "block", "slot"),
        config=_CONFIG,
    )
    group.create_array(
        "mask",
        shape=(layers, rows, mask_bytes(channels)),
        chunks=(1, block, mask_bytes(channels)),
        shards=(layers, block, mask_bytes(channels)),
        dtype="uint8",
        fill_value=0,
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        dimension_names=("layer", "token", "byte"),
        config=_CONFIG,
    )
    group.create_array(
        "row_nnz",
        shape=(layers, rows),
        chunks=(layers, block),
        dtype="uint32",
        fill_value=NEVER_WRITTEN,
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        dimension_names=("layer", "token"),
        config=_CONFIG,
    )


def capacity(tokens: int, block: int) -> int:
    """Rows the arrays are made for: whole blocks, so that every write of a block is a whole shard."""
    return blocks_of(tokens, block) * block


def open_root(path: Path, *, use_consolidated: bool | None = None) -> zarr.Group:
    """The root group of a store of this schema.

    Raises:
        NotFoundError: nothing at the path.
        UsageError: something else than a store of this schema.
    """
    require_store(path)
    return zarr.open_group(LocalStore(path), mode="r", use_consolidated=use_consolidated)


def require_store(path: Path) -> None:
    """Raises unless the path holds a store of this schema; `open_root` says what it raises."""
    if not path.exists():
        raise NotFoundError(f"there is no store at {path}", hint="`teal dump -o PATH` makes one")
    schema = schema_of(path)
    if schema is None:
        raise UsageError(f"{path} is not a teal store", hint="give the folder that `teal dump -o` wrote")
    if schema != SCHEMA:
        raise UsageError(
            f"{path} has the schema {schema}; this teal reads {SCHEMA}",
            hint="read it with the version of teal that wrote it (teal_version in its zarr.json)",
        )


def schema_of(path: Path) -> str | None:
    """What the group at a path says in attrs["teal"]["schema"]; None if it is not a teal store at all."""
    try:
        found = json.loads((path / "zarr.json").read_bytes())["attributes"]["teal"]["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)


def open_array(path: Path, name: str) -> Array:
    """One array below a folder, for reading; its metadata as they stand on disk now."""
    return zarr.open_array(LocalStore(path, read_only=True), path=name, mode="r")


def open_for_writing(path: Path, name: str) -> Array:
    """One array below a folder, for writing."""
    return zarr.open_array(LocalStore(path), path=name, mode="r+", config=_CONFIG)


def row_arrays() -> dict[str, str]:
    """The arrays of a level that grow with its tokens -> what their growing axis counts: token or block."""
    arrays = dict.fromkeys(TOKEN_COLUMNS, "token")
    for site in SITES:
        arrays |= {f"{site}/values": "block", f"{site}/mask": "token", f"{site}/row_nnz": "token"}
    return arrays


def drop_rows(path: Path, level: str, *, keep: int, rows: int, block: int) -> None:
    """Cuts a level to its first `keep` rows (whole blocks) and gives it room for `rows` again.

    Files of later blocks are removed; in the chunk of the token columns that straddles the cut, the fill comes back.
    """
    resize_rows(path, level, tokens=keep, block=block)
    resize_rows(path, level, tokens=rows, block=block)
    chunk = token_chunk(block)
    end = min(rows, blocks_of(keep, chunk) * chunk)
    if end > keep:
        for name in TOKEN_COLUMNS:
            column = open_for_writing(path, f"{level}/{name}")
            column[keep:end] = column.fill_value


def resize_rows(path: Path, level: str, *, tokens: int, block: int) -> None:
    """Sets the length of every row array of a level; what lies wholly past the end is deleted."""
    for name, unit in row_arrays().items():
        array = open_for_writing(path / level, name)
        length = tokens if unit == "token" else blocks_of(tokens, block)
        axis = 0 if array.ndim == 1 else 1
        if array.shape[axis] != length:
            array.resize(tuple(length if i == axis else n for i, n in enumerate(array.shape)))


def level_attributes(path: Path, level: str) -> dict[str, Any]:
    """attrs["teal"] of a level, as it is on disk now.

    Raises:
        TealError: it is missing or lacks a field.
    """
    try:
        found = zarr.open_group(LocalStore(path), path=level, mode="r", use_consolidated=False).attrs["teal"]
        assert isinstance(found, dict)
        for name in ("target", "allocation", "max_tokens", "tokens_committed", "complete"):
            found[name]
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise TealError(
            f"the attributes of level {level} of {path} are damaged: {error!r}", hint=VERIFY_HINT
        ) from error
    return found


def set_attributes(path: Path, group: str, changes: Mapping[str, Any]) -> None:
    """Changes fields of attrs["teal"] of a group: one file, replaced atomically."""
    node = zarr.open_group(LocalStore(path), path=group, mode="r+", use_consolidated=False)
    current = node.attrs["teal"]
    assert isinstance(current, dict)
    node.attrs.put({"teal": {**current, **changes}})


def consolidate(path: Path) -> None:
    """Copies all metadata into the root's zarr.json, so that opening a finished store is one read."""
    with warnings.catch_warnings():
        # zarr warns that consolidated metadata is not in the specification yet; readers without it ignore it.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(LocalStore(path))


def read_header(root: zarr.Group) -> StoreHeader:
    """The header of an open store.

    Raises:
        TealError: its attributes lack a field.
    """
    try:
        attributes = root.attrs["teal"]
        assert isinstance(attributes, dict)
        return StoreHeader.from_attributes(attributes)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise TealError(f"the attributes of the store {root.store} are damaged: {error}", hint=VERIFY_HINT) from error


def as_numpy(array: Any) -> np.ndarray:
    """What an indexed Zarr array returned, as a NumPy array (its annotation is wider than what it returns)."""
    return np.asarray(array)
